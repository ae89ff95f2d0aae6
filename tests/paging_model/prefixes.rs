//! Prefixes: what is found, and what is published.

use kvarn::error::Error;
use kvarn::paging::{BlockId, SequenceId};

use super::model::{Model, Tokens};
use super::operation::MAX_SEQUENCES;

impl Model {
    /// Looks for `len` tokens: those of a sequence if one is picked, then random ones.
    pub(super) fn match_prefix(&mut self, pick: Option<usize>, len: usize, bits: u32) {
        if self.sequences.len() == MAX_SEQUENCES {
            return;
        }
        let known = pick.and_then(|pick| self.sequences.get(&self.pick(pick)));
        let mut ids = known.map_or(Vec::new(), |tokens| tokens.committed.clone());
        ids.truncate(len);
        ids.extend((ids.len()..len).map(|i| (bits >> i) & 1));

        let block_size = self.setup.block_size;
        let ends = (1..).map(|n| n * block_size).take_while(|&end| end < ids.len());
        let expected: Vec<BlockId> = ends.map_while(|end| self.published.get(&ids[..end]).copied()).collect();
        let in_use = self.paging.blocks_in_use();
        let id = self.paging.match_prefix(&ids);
        assert_eq!(self.table(id), expected);
        self.count("matched", usize::from(!expected.is_empty()));
        self.count("revived", usize::from(self.paging.blocks_in_use() > in_use));
        let committed = ids[..expected.len() * block_size].to_vec();
        self.sequences.insert(id, Tokens { committed, chained: expected.len(), ..Tokens::default() });
    }

    pub(super) fn publish(&mut self, id: SequenceId, short: bool) {
        let mut ids = self.sequences.get(&id).map_or(Vec::new(), |tokens| tokens.committed.clone());
        let too_few = short && ids.pop().is_some();
        let result = self.paging.publish_prefix(id, &ids);
        let Some(tokens) = self.sequences.get_mut(&id) else {
            return assert_eq!(result, Err(Error::UnknownSequence { id: id.0 }));
        };
        if too_few {
            return assert!(matches!(result, Err(Error::Config(_))), "{result:?}");
        }
        let mut num_published = 0;
        if tokens.first_held == 0 {
            let table = self.paging.sequence(id).unwrap().blocks();
            let num_full = ids.len() / self.setup.block_size;
            for (index, &block) in table.iter().enumerate().take(num_full).skip(tokens.chained) {
                let prefix = ids[..(index + 1) * self.setup.block_size].to_vec();
                if !self.published.contains_key(&prefix) && !self.published.values().any(|&known| known == block) {
                    self.published.insert(prefix, block);
                    num_published += 1;
                }
            }
            tokens.chained = num_full;
        }
        assert_eq!(result, Ok(num_published));
        self.count("published", num_published);
    }
}
