//! What paging must do, from block tables and token ids alone.

use std::collections::{BTreeMap, BTreeSet};

use kvarn::error::Error;
use kvarn::paging::{BlockId, Paging, SequenceId, StepRequest};

use super::{MAX_SEQUENCES, NO_SEQUENCE, Operation, Setup};

const POISON: u32 = u32::MAX;

#[derive(Debug, Clone, Default)]
struct Tokens {
    committed: Vec<u32>,
    pending: Option<Vec<u32>>,
    first_held: usize,
    /// Full blocks matched or published: not published again.
    chained: usize,
}

/// How often what happened.
pub(super) type Outcomes = BTreeMap<&'static str, usize>;

pub(super) struct Model {
    setup: Setup,
    paging: Paging,
    sequences: BTreeMap<SequenceId, Tokens>,
    memory: Vec<u32>,
    /// The block that holds the last tokens of each published prefix.
    published: BTreeMap<Vec<u32>, BlockId>,
    num_copies: usize,
    peak: usize,
    pub(super) outcomes: Outcomes,
}

impl Model {
    pub(super) fn new(setup: Setup) -> Self {
        let paging = Paging::new(setup.block_size, setup.num_blocks, b"model").unwrap();
        let (sequences, memory, published) = (BTreeMap::new(), Vec::new(), BTreeMap::new());
        Self { setup, paging, sequences, memory, published, num_copies: 0, peak: 0, outcomes: Outcomes::new() }
    }

    /// Below `MAX_SEQUENCES` any sequence, then one without an open step; `NO_SEQUENCE`, and any pick when there are
    /// none, an id never given out.
    fn pick(&self, pick: usize) -> SequenceId {
        let candidates = self.sequences.iter().filter(|(_, tokens)| pick < MAX_SEQUENCES || tokens.pending.is_none());
        let candidates: Vec<SequenceId> = candidates.map(|(&id, _)| id).collect();
        if pick == NO_SEQUENCE || candidates.is_empty() {
            return SequenceId(u64::MAX);
        }
        candidates[pick % candidates.len()]
    }

    /// The sequences of a step to close: those picked, or all that are open.
    fn pick_open(&self, picks: Option<&[usize]>) -> Vec<SequenceId> {
        let open = || self.sequences.iter().filter(|(_, tokens)| tokens.pending.is_some()).map(|(&id, _)| id);
        picks.map_or_else(|| open().collect(), |picks| picks.iter().map(|&pick| self.pick(pick)).collect())
    }

    pub(super) fn count(&mut self, outcome: &'static str, times: usize) {
        *self.outcomes.entry(outcome).or_default() += times;
    }

    fn table(&self, id: SequenceId) -> Vec<BlockId> {
        self.paging.sequence(id).unwrap().blocks().to_vec()
    }

    fn tables(&self) -> BTreeMap<SequenceId, Vec<BlockId>> {
        self.sequences.keys().map(|&id| (id, self.table(id))).collect()
    }

    fn refuses_open(&self, id: SequenceId) -> Option<Error> {
        match self.sequences.get(&id) {
            None => Some(Error::UnknownSequence { id: id.0 }),
            Some(tokens) if tokens.pending.is_some() => Some(Error::OpenStep { id: id.0 }),
            Some(_) => None,
        }
    }

    pub(super) fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::New if self.sequences.len() < MAX_SEQUENCES => {
                self.sequences.insert(self.paging.new_sequence(), Tokens::default());
            }
            Operation::Fork { pick } if self.sequences.len() < MAX_SEQUENCES => self.fork(self.pick(*pick)),
            Operation::New | Operation::Fork { .. } => {}
            Operation::Clear => self.clear(),
            Operation::Free { pick } => self.free(self.pick(*pick)),
            Operation::Truncate { pick, back } => self.truncate(self.pick(*pick), *back),
            Operation::Begin { requests, raw } => self.begin(requests, *raw),
            Operation::Commit { picks } => self.close(&self.pick_open(picks.as_deref()), true),
            Operation::Abort { picks } => self.close(&self.pick_open(picks.as_deref()), false),
            Operation::Match { pick, len, bits } => self.match_prefix(*pick, *len, *bits),
            Operation::Publish { pick, short } => self.publish(self.pick(*pick), *short),
        }
    }

    fn clear(&mut self) {
        self.paging.clear();
        self.sequences.clear();
        self.published.clear();
        self.peak = 0;
        self.count("cleared", 1);
    }

    fn fork(&mut self, id: SequenceId) {
        let result = self.paging.fork(id);
        if let Some(error) = self.refuses_open(id) {
            return assert_eq!(result, Err(error));
        }
        let fork = result.unwrap();
        assert_eq!(self.table(fork), self.table(id));
        self.count("forked", 1);
        self.sequences.insert(fork, self.sequences[&id].clone());
    }

    fn free(&mut self, id: SequenceId) {
        let result = self.paging.free(id);
        if let Some(error) = self.refuses_open(id) {
            return assert_eq!(result, Err(error));
        }
        result.unwrap();
        self.count("freed", 1);
        self.sequences.remove(&id);
    }

    /// `back` 12 asks for one token more than there are.
    fn truncate(&mut self, id: SequenceId, back: usize) {
        let committed = self.sequences.get(&id).map_or(0, |tokens| tokens.committed.len());
        let len = if back == 12 { committed + 1 } else { committed.saturating_sub(back) };
        let result = self.paging.truncate(id, len, self.setup.window);
        if let Some(error) = self.refuses_open(id) {
            return assert_eq!(result, Err(error));
        }
        let block_size = self.setup.block_size;
        let tokens = self.sequences.get_mut(&id).unwrap();
        let first_seen = self.setup.window.map_or(0, |window| (len + 1).saturating_sub(window));
        if len > committed || len < committed && first_seen < tokens.first_held {
            let too_far = Error::RollbackTooFar { id: id.0, requested: len, floor: tokens.first_held, len: committed };
            self.count("rollback refused", usize::from(len < committed));
            return assert_eq!(result, Err(too_far));
        }
        result.unwrap();
        tokens.committed.truncate(len);
        if tokens.chained > len / block_size {
            tokens.chained = 0;
        }
        self.count("rolled back", usize::from(len < committed));
    }

    fn begin(&mut self, requests: &[(usize, usize, u32)], raw: bool) {
        let block_size = self.setup.block_size;
        let (mut steps, mut new_bits) = (Vec::<StepRequest>::new(), Vec::new());
        for &(pick, num_new, bits) in requests {
            let step = self.request(pick, num_new);
            if raw || steps.iter().all(|other| other.sequence != step.sequence) {
                steps.push(step);
                new_bits.push(bits);
            }
        }
        let before = self.tables();
        let result = self.paging.begin(&steps);
        let distinct: BTreeSet<_> = steps.iter().map(|step| step.sequence).collect();
        if distinct.len() < steps.len() || steps.iter().any(|step| self.refuses_open(step.sequence).is_some()) {
            let error = result.unwrap_err();
            let known = [matches!(error, Error::Config(_)), matches!(error, Error::OpenStep { .. })];
            assert!(known.contains(&true) || matches!(error, Error::UnknownSequence { .. }), "{error}");
            return assert_eq!(self.tables(), before);
        }

        let mut kept = before.clone();
        for step in &steps {
            let first_held = self.first_held_in(step);
            kept.get_mut(&step.sequence).unwrap()[..first_held / block_size].fill(BlockId::RELEASED);
        }
        let (shared, needed) = self.shared_pages(&steps, &kept);
        let in_use = distinct_blocks(&kept).len();
        if let Some(bound) = self.setup.num_blocks
            && needed > bound - in_use
        {
            self.count("out of blocks", 1);
            assert_eq!(result, Err(Error::OutOfBlocks { needed, free: bound - in_use }));
            return assert_eq!(self.tables(), before);
        }

        let copies = result.unwrap();
        assert_eq!(copies.iter().map(|copy| copy.0).collect::<Vec<_>>(), shared);
        self.num_copies += copies.len();
        self.count("begun", 1);
        self.count("copied", copies.len());
        self.count("released", usize::from(kept != before));
        self.memory.resize(self.memory.len().max(self.paging.num_blocks() * block_size), POISON);
        let used = distinct_blocks(&kept);
        for block in distinct_blocks(&self.tables()).difference(&used) {
            self.forget(*block);
            self.memory[slots(*block, block_size)].fill(POISON);
        }
        for (source, destination) in copies {
            self.memory.copy_within(slots(source, block_size), destination.0 as usize * block_size);
        }
        for (step, bits) in steps.iter().zip(new_bits) {
            self.write(step, bits);
        }
    }

    /// With a window, some requests keep a token too many, everything (`num_new` 9) or nothing (8).
    fn request(&self, pick: usize, num_new: usize) -> StepRequest {
        let sequence = self.pick(pick);
        let len = self.sequences.get(&sequence).map_or(0, |tokens| tokens.committed.len());
        let first_seen = self.setup.window.map_or(0, |window| (len + 1).saturating_sub(window));
        let keep_from = match num_new {
            9 => 0,
            8 if self.setup.window.is_some() => usize::MAX,
            _ => first_seen.saturating_sub(num_new % 2),
        };
        StepRequest { sequence, num_new, keep_from }
    }

    fn first_held_in(&self, step: &StepRequest) -> usize {
        let tokens = &self.sequences[&step.sequence];
        let keep_from = step.keep_from.min(tokens.committed.len());
        tokens.first_held.max(keep_from / self.setup.block_size * self.setup.block_size)
    }

    /// The open pages that must be copied, in order, and all blocks needed, from the tables after the release.
    fn shared_pages(&self, steps: &[StepRequest], kept: &BTreeMap<SequenceId, Vec<BlockId>>) -> (Vec<BlockId>, usize) {
        let (mut tables, mut shared, mut needed) = (kept.clone(), Vec::new(), 0);
        for step in steps {
            let len = self.sequences[&step.sequence].committed.len();
            let blocks = tables[&step.sequence].len();
            needed += (len + step.num_new).div_ceil(self.setup.block_size) - blocks;
            if step.num_new == 0 || len.is_multiple_of(self.setup.block_size) {
                continue;
            }
            let page = tables[&step.sequence][blocks - 1];
            if tables.values().flatten().filter(|&&block| block == page).count() > 1 {
                tables.get_mut(&step.sequence).unwrap().pop();
                shared.push(page);
            }
        }
        needed += shared.len();
        (shared, needed)
    }

    fn forget(&mut self, block: BlockId) {
        self.published.retain(|_, &mut published| published != block);
    }

    fn write(&mut self, step: &StepRequest, bits: u32) {
        let block_size = self.setup.block_size;
        let first_held = self.first_held_in(step);
        let table = self.table(step.sequence);
        let tokens = self.sequences.get_mut(&step.sequence).unwrap();
        tokens.first_held = first_held;
        let new: Vec<u32> = (0..step.num_new).map(|i| (bits >> i) & 1).collect();
        let start = tokens.committed.len();
        for (position, &token) in (start..).zip(&new) {
            let block = table[position / block_size];
            self.memory[block.0 as usize * block_size + position % block_size] = token;
        }
        tokens.pending = Some(new);
        if step.num_new > 0 {
            for &block in &table[start / block_size..] {
                self.forget(block);
            }
        }
    }

    fn close(&mut self, ids: &[SequenceId], commit: bool) {
        let result = if commit { self.paging.commit(ids) } else { self.paging.abort(ids) };
        let open: BTreeSet<_> =
            ids.iter().filter(|id| self.sequences.get(id).is_some_and(|tokens| tokens.pending.is_some())).collect();
        if open.len() < ids.len() {
            return assert!(
                matches!(result, Err(Error::Config(_) | Error::StaleStep(_) | Error::UnknownSequence { .. })),
                "{result:?}"
            );
        }
        result.unwrap();
        self.count(if commit { "committed" } else { "aborted" }, ids.len());
        for id in ids {
            let tokens = self.sequences.get_mut(id).unwrap();
            let pending = tokens.pending.take().unwrap();
            if commit {
                tokens.committed.extend(pending);
            }
        }
    }

    /// Looks for `len` tokens: those of a sequence if one is picked, then random ones.
    fn match_prefix(&mut self, pick: Option<usize>, len: usize, bits: u32) {
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

    fn publish(&mut self, id: SequenceId, short: bool) {
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

    pub(super) fn check(&mut self) {
        self.paging.check().unwrap();
        assert!(self.paging.is_valid());
        let block_size = self.setup.block_size;
        let mut open_pages = BTreeSet::new();
        for (&id, tokens) in &self.sequences {
            let sequence = self.paging.sequence(id).unwrap();
            assert_eq!(sequence.len(), tokens.committed.len());
            assert_eq!(sequence.first_held(), tokens.first_held);
            assert_eq!(sequence.pending(), tokens.pending.as_ref().map(Vec::len));
            let written = tokens.committed.iter().chain(tokens.pending.iter().flatten());
            for (position, &token) in written.enumerate().skip(tokens.first_held) {
                let block = sequence.blocks()[position / block_size];
                let read = self.memory[block.0 as usize * block_size + position % block_size];
                assert_eq!(read, token, "sequence {id}, position {position}, block {block}");
            }
            if tokens.committed.len() % block_size > 0 {
                open_pages.insert(sequence.blocks()[tokens.committed.len() / block_size]);
            }
        }
        let in_use = distinct_blocks(&self.tables()).len();
        self.peak = self.peak.max(in_use);
        let paging = &self.paging;
        assert_eq!(paging.blocks_in_use(), in_use);
        assert_eq!(paging.num_free(), self.setup.num_blocks.map(|bound| bound - in_use));
        assert_eq!(paging.num_blocks(), self.setup.num_blocks.unwrap_or(self.peak), "grows only when it must");
        assert_eq!(paging.peak_blocks(), self.peak);
        assert_eq!(paging.num_sequences(), self.sequences.len());
        assert_eq!(paging.open_blocks(), open_pages.len());
        assert_eq!(paging.cow_copies(), self.num_copies);
    }
}

fn slots(block: BlockId, block_size: usize) -> std::ops::Range<usize> {
    block.0 as usize * block_size..(block.0 as usize + 1) * block_size
}

fn distinct_blocks(tables: &BTreeMap<SequenceId, Vec<BlockId>>) -> BTreeSet<BlockId> {
    tables.values().flatten().copied().filter(|&block| block != BlockId::RELEASED).collect()
}
