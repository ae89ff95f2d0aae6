//! Blocks that a step seals, and what from.
//!
//! ```text
//! before the step's tokens are written   every full block of committed tokens that is still a page, from the page
//! with them, in a prefill                every block that the step writes whole but the last full one, from its rows
//! ```
//!
//! The last full block of a prefill stays a page, so that tokens which turn out to be rejected drafts can be rolled
//! back. What the first rule seals was committed before; what the second seals is dropped with the step.

use super::{DECODE_TOKENS, SequenceInput};
use crate::paging::{BlockId, PageId, Place, PlaceChange};
use std::collections::HashSet;

/// A block that a step seals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    /// Index of the sequence in the step.
    pub sequence: usize,
    /// Index in its block table; its place there is the tile.
    pub block: usize,
    /// The page that holds its tokens; `None` where they are among the step's own rows.
    pub page: Option<PageId>,
    /// The row of the block that is kept apart, unquantized: the first token of a sequence.
    pub first_row: Option<usize>,
}

impl Seal {
    pub(super) fn from_words([sequence, block, page, first_row]: [i32; 4]) -> Self {
        Self {
            sequence: sequence as usize,
            block: block as usize,
            page: u32::try_from(page).ok().map(PageId),
            first_row: usize::try_from(first_row).ok(),
        }
    }

    pub(super) fn words(self) -> [i32; 4] {
        let page = self.page.map_or(-1, |page| page.0 as i32);
        [self.sequence as i32, self.block as i32, page, self.first_row.map_or(-1, |row| row as i32)]
    }
}

/// Index of the first block that a step of `num_new` tokens does not seal itself: new blocks before it need no page.
#[must_use]
pub fn sealed_to(block_size: usize, context_len: usize, num_new: usize) -> usize {
    let first = context_len.div_ceil(block_size);
    let last_full = (context_len.saturating_add(num_new) / block_size).saturating_sub(1);
    if num_new > DECODE_TOKENS { last_full.max(first) } else { first }
}

/// What the sequences of a step have sealed so far.
#[derive(Default)]
pub(super) struct SealedByStep {
    blocks: HashSet<BlockId>,
    /// The places of blocks that become tiles, in the rows of all sequences of the step that hold them.
    pub(super) tiles: Vec<PlaceChange>,
}

/// The seals of a sequence. Blocks that another sequence of the step seals are tiles of this one too.
pub(super) fn plan_seals(
    block_size: usize,
    index: usize,
    input: &SequenceInput<'_>,
    num_new: usize,
    is_partial: &dyn Fn(BlockId) -> bool,
    sealed: &mut SealedByStep,
) -> Vec<Seal> {
    let context_len = input.context_len;
    let mut seals = Vec::new();
    // Padding takes no slot: the first token of a sequence is row 0 of its first block.
    let seal = |block: usize, page| Seal { sequence: index, block, page, first_row: (block == 0).then_some(0) };
    for block in input.num_tiles.max(input.first_held / block_size)..context_len / block_size {
        let (id, place) = (input.blocks[block], input.places[block]);
        let Some(page) = place.as_page().filter(|_| !is_partial(id)) else { continue };
        sealed.tiles.push(PlaceChange { row: input.row, block, place: Place::tile(id) });
        if sealed.blocks.insert(id) {
            seals.push(seal(block, Some(page)));
        }
    }
    let new = context_len.div_ceil(block_size)..sealed_to(block_size, context_len, num_new);
    seals.extend(new.map(|block| seal(block, None)));
    seals
}

#[cfg(test)]
mod tests {
    use super::super::{Rows, Sealing, StepPlan};
    use super::*;
    use crate::error::Result;

    const OPEN: Place = Place::page(PageId(9));
    const NOBODY: &dyn Fn(BlockId) -> bool = &|_| false;

    fn sealed_before(block: u32) -> Place {
        Place::tile(BlockId(block))
    }

    fn page_of_new(block: u32) -> Place {
        Place::page(PageId(100 + block))
    }

    fn plan(context_len: usize, places: &[Place], num_new: usize, is_partial: &dyn Fn(BlockId) -> bool) -> StepPlan {
        let blocks: Vec<BlockId> = (0..100).map(BlockId).collect();
        let mut places = places.to_vec();
        let sealed = sealed_to(16, context_len, num_new).max(places.len());
        places.extend((places.len() as u32..sealed as u32).map(sealed_before));
        places.extend((sealed as u32..100).map(page_of_new));
        one(&blocks, &places, context_len, num_new, is_partial).unwrap()
    }

    fn one(
        blocks: &[BlockId],
        places: &[Place],
        context_len: usize,
        num_new: usize,
        is_partial: &dyn Fn(BlockId) -> bool,
    ) -> Result<StepPlan> {
        let rows = Rows::All(num_new);
        let input = SequenceInput { row: 0, blocks, places, num_tiles: 0, context_len, first_held: 0, rows };
        StepPlan::new(16, None, &[input], Sealing::FullBlocks { is_partial })
    }

    fn sealed(plan: &StepPlan) -> Vec<(usize, Option<PageId>)> {
        plan.seals().map(|seal| (seal.block, seal.page)).collect()
    }

    #[test]
    fn a_full_page_of_committed_tokens_is_sealed_by_the_next_step() {
        let page = Some(PageId(9));
        assert_eq!(sealed(&plan(15, &[OPEN], 1, NOBODY)), []);
        let next = plan(16, &[OPEN], 1, NOBODY);
        assert_eq!(sealed(&next), [(0, page)]);
        let change = PlaceChange { row: 0, block: 0, place: sealed_before(0) };
        assert_eq!(next.changes().collect::<Vec<_>>(), [change]);
        assert_eq!(next.slots(), [101 * 16]);
        assert_eq!(sealed(&plan(33, &[sealed_before(0), OPEN, OPEN], 1, NOBODY)), [(1, page)]);
    }

    #[test]
    fn the_first_token_of_a_sequence_is_kept_apart() {
        let seals: Vec<_> = plan(0, &[], 70, NOBODY).seals().map(|seal| seal.first_row).collect();
        assert_eq!(seals, [Some(0), None, None]);
    }

    #[test]
    fn a_block_that_a_sequence_ends_within_stays_a_page() {
        let partial = |block| block == BlockId(1);
        let next = plan(48, &[OPEN, Place::page(PageId(8)), Place::page(PageId(7))], 1, &partial);
        assert_eq!(sealed(&next), [(0, Some(PageId(9))), (2, Some(PageId(7)))]);
    }

    #[test]
    fn a_prefill_seals_what_it_writes_whole_but_the_last_full_block() {
        let fresh = |blocks: &[usize]| blocks.iter().map(|&block| (block, None)).collect::<Vec<_>>();
        let seventy = plan(0, &[], 70, NOBODY);
        assert_eq!(sealed(&seventy), fresh(&[0, 1, 2]));
        assert_eq!((seventy.slots()[47], seventy.slots()[48]), (-1, 103 * 16), "no page for what is sealed at once");
        assert_eq!(sealed(&plan(0, &[], 64, NOBODY)), fresh(&[0, 1, 2]));
        assert_eq!(sealed(&plan(0, &[], 31, NOBODY)), []);
        assert_eq!(sealed(&plan(8, &[OPEN], 60, NOBODY)), fresh(&[1, 2]));
    }

    #[test]
    fn a_decode_seals_nothing_of_its_own() {
        assert_eq!(sealed(&plan(0, &[], 16, NOBODY)), []);
        assert_eq!(sealed_to(1, 5, 16), 5);
    }

    #[test]
    fn pages_are_where_tokens_are_written_and_only_there() {
        let blocks: Vec<BlockId> = (0..4).map(BlockId).collect();
        let pages: Vec<Place> = (0..4).map(page_of_new).collect();
        let refused = one(&blocks, &pages, 0, 60, NOBODY).unwrap_err().to_string();
        assert!(
            refused.contains("block 0 of a sequence of 60 tokens is sealed by the step and has a page"),
            "{refused}"
        );
        let tiles: Vec<Place> = (0..4).map(sealed_before).collect();
        let refused = one(&blocks, &tiles, 8, 1, NOBODY).unwrap_err().to_string();
        assert!(refused.contains("block 0 of a sequence of 9 tokens is written and has no page"), "{refused}");
        let refused = one(&blocks, &[sealed_before(3), pages[1]], 16, 0, NOBODY).unwrap_err().to_string();
        assert!(refused.contains("2 places for a block table of 4"), "{refused}");
        let other = [&[sealed_before(3)], &pages[1..]].concat();
        let refused = one(&blocks, &other, 16, 0, NOBODY).unwrap_err().to_string();
        assert!(refused.contains("is at the tile of block 3"), "{refused}");
    }

    #[test]
    fn a_block_that_two_sequences_share_is_sealed_once_and_a_tile_of_both() {
        let table = [BlockId(0), BlockId(1)];
        let other = [BlockId(0), BlockId(2)];
        let input = |row, blocks, places| SequenceInput {
            row,
            blocks,
            places,
            num_tiles: 0,
            context_len: 16,
            first_held: 0,
            rows: Rows::All(1),
        };
        let (first, second) = ([OPEN, page_of_new(1)], [OPEN, page_of_new(2)]);
        let inputs = [input(0, &table, &first), input(1, &other, &second)];
        let plan = StepPlan::new(16, None, &inputs, Sealing::FullBlocks { is_partial: NOBODY }).unwrap();
        assert_eq!(plan.seals().len(), 1);
        let tile = |row| PlaceChange { row, block: 0, place: sealed_before(0) };
        assert_eq!(plan.changes().collect::<Vec<_>>(), [tile(0), tile(1)]);
    }
}
