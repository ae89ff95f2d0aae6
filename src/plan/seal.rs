//! Which blocks does a step seal, and from what?
//!
//! ```text
//! before the step's tokens are written   every full block of committed tokens that is still a page, from the page
//! with them, in a prefill                every block that the step writes whole but the last full one, from its rows
//! ```
//!
//! The last full block of a prefill stays a page, so that tokens which turn out to be rejected drafts can be rolled
//! back. What the first rule seals was committed before; what the second seals is dropped with the step.

use super::{DECODE_TOKENS, SequenceInput, SequencePlan, StepPlan};
use crate::error::{Error, Result};
use crate::paging::{BlockId, PageId};
use std::collections::HashSet;

/// A block that a step seals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    /// Index of the sequence in the step.
    pub sequence: usize,
    /// Index in its block table.
    pub block: usize,
    /// Where its tokens are.
    pub source: SealSource,
}

/// Where the tokens of a block that is sealed are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SealSource {
    /// In its page.
    Page(PageId),
    /// Among the step's own rows.
    Fresh,
}

/// Index of the first block that a step of `num_new` tokens does not seal itself: new blocks before it need no page.
#[must_use]
pub fn sealed_to(block_size: usize, context_len: usize, num_new: usize) -> usize {
    let first = context_len.div_ceil(block_size);
    let last_full = (context_len.saturating_add(num_new) / block_size).saturating_sub(1);
    if num_new > DECODE_TOKENS { last_full.max(first) } else { first }
}

/// What the sequences of a step have to agree on.
pub(super) struct Sealing {
    /// Blocks that a sequence ends within: not to be sealed.
    pub partly_used: HashSet<BlockId>,
    /// Blocks that a sequence of the step seals already.
    pub taken: HashSet<BlockId>,
}

/// Appends the seals of a sequence, and marks its blocks as tiles.
pub(super) fn plan_seals(
    block_size: usize,
    index: usize,
    sequence: &mut SequencePlan,
    sealing: &mut Sealing,
    seals: &mut Vec<Seal>,
) {
    let new = sequence.context_len.div_ceil(block_size);
    for block in sequence.first_held / block_size..sequence.context_len / block_size {
        let id = sequence.block_table[block];
        if sealing.partly_used.contains(&id) {
            continue;
        }
        let page = std::mem::replace(&mut sequence.pages[block], PageId::SEALED);
        if page != PageId::SEALED && sealing.taken.insert(id) {
            seals.push(Seal { sequence: index, block, source: SealSource::Page(page) });
        }
    }
    let end = sealed_to(block_size, sequence.context_len, sequence.num_new());
    seals.extend((new..end).map(|block| Seal { sequence: index, block, source: SealSource::Fresh }));
}

/// Every new block has a page but those that the step seals itself, and so has the block that is written further.
pub(super) fn check_pages(
    block_size: usize,
    input: &SequenceInput<'_>,
    pages: &[PageId],
    seq_len: usize,
) -> Result<()> {
    let (context_len, num_new) = (input.context_len, input.rows.num_tokens());
    if pages.len() != input.block_table.len() {
        let (pages, blocks) = (pages.len(), input.block_table.len());
        return Err(Error::Config(format!("{pages} pages for a block table of {blocks} blocks")));
    }
    let first = if num_new == 0 { seq_len.div_ceil(block_size) } else { context_len / block_size };
    let (new, sealed) = (context_len.div_ceil(block_size), sealed_to(block_size, context_len, num_new));
    for block in first..seq_len.div_ceil(block_size) {
        let is_sealed = pages[block] == PageId::SEALED;
        if is_sealed != (new..sealed).contains(&block) {
            let what = if is_sealed { "is written and has no page" } else { "is sealed by the step and has a page" };
            return Err(Error::Config(format!("block {block} of a sequence of {seq_len} tokens {what}")));
        }
    }
    Ok(())
}

impl StepPlan {
    /// Every page that the step reads: of the blocks that its sequences hold, and of those that it seals.
    pub fn pages(&self) -> impl Iterator<Item = PageId> + '_ {
        let held = self.sequences.iter().flat_map(|sequence| {
            let first = sequence.first_held / self.block_size;
            sequence.pages[first..].iter().copied().filter(|&page| page != PageId::SEALED)
        });
        held.chain(self.seals.iter().filter_map(|seal| match seal.source {
            SealSource::Page(page) => Some(page),
            SealSource::Fresh => None,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Rows, SequenceInput, StepPlan};
    use super::*;

    const OPEN: PageId = PageId(9);

    fn page_of_new(block: u32) -> PageId {
        PageId(100 + block)
    }

    fn plan(context_len: usize, pages: &[PageId], num_new: usize) -> StepPlan {
        let block_table: Vec<BlockId> = (0..100).map(BlockId).collect();
        let mut pages = pages.to_vec();
        let sealed = sealed_to(16, context_len, num_new).max(pages.len());
        pages.resize(sealed, PageId::SEALED);
        pages.extend((sealed as u32..100).map(page_of_new));
        let input = SequenceInput {
            block_table: &block_table,
            pages: Some(&pages),
            context_len,
            first_held: 0,
            rows: Rows::All(num_new),
        };
        StepPlan::new(16, &[input]).unwrap()
    }

    fn sealed(plan: &StepPlan) -> Vec<(usize, SealSource)> {
        plan.seals.iter().map(|seal| (seal.block, seal.source)).collect()
    }

    #[test]
    fn a_full_page_of_committed_tokens_is_sealed_by_the_next_step() {
        let page = SealSource::Page(OPEN);
        assert_eq!(sealed(&plan(15, &[OPEN], 1)), []);
        let next = plan(16, &[OPEN], 1);
        assert_eq!(sealed(&next), [(0, page)]);
        assert_eq!(next.sequences[0].pages[..2], [PageId::SEALED, page_of_new(1)]);
        assert_eq!(sealed(&plan(33, &[PageId::SEALED, OPEN, OPEN], 1)), [(1, page)]);
    }

    #[test]
    fn a_prefill_seals_what_it_writes_whole_but_the_last_full_block() {
        let fresh = |blocks: &[usize]| blocks.iter().map(|&block| (block, SealSource::Fresh)).collect::<Vec<_>>();
        assert_eq!(sealed(&plan(0, &[], 70)), fresh(&[0, 1, 2]));
        assert_eq!(sealed(&plan(0, &[], 64)), fresh(&[0, 1, 2]));
        assert_eq!(sealed(&plan(0, &[], 31)), []);
        assert_eq!(sealed(&plan(8, &[OPEN], 60)), fresh(&[1, 2]));
    }

    #[test]
    fn a_decode_seals_nothing_of_its_own() {
        assert_eq!(sealed(&plan(0, &[], 16)), []);
        assert_eq!(sealed_to(1, 5, 16), 5);
    }

    #[test]
    fn a_block_that_two_sequences_share_is_sealed_once() {
        let table = [BlockId(0), BlockId(1)];
        let other = [BlockId(0), BlockId(2)];
        let pages = [OPEN, PageId(1)];
        let input = |block_table, pages| SequenceInput {
            block_table,
            pages: Some(pages),
            context_len: 16,
            first_held: 0,
            rows: Rows::All(1),
        };
        let plan = StepPlan::new(16, &[input(&table, &pages), input(&other, &[OPEN, PageId(2)])]).unwrap();
        assert_eq!(plan.seals.len(), 1);
        assert_eq!([plan.sequences[0].pages[0], plan.sequences[1].pages[0]], [PageId::SEALED; 2]);
    }
}
