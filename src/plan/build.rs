//! Building a plan, sequence by sequence.

use super::check::{check, check_written};
use super::open::{Writers, plan_opens, plan_refit};
use super::seal::{SealedByStep, plan_seals};
use super::{Bounds, Sealing, SequenceInput, StepPlan, first_seen, is_prefill, num_rows, splits};
use crate::error::{Error, Result};
use crate::format::{PlanArray, PlanLayout};
use crate::paging::{PlaceChange, PlaceChanges};

pub(super) struct Builder {
    block_size: usize,
    window: Option<usize>,
    num_rows: usize,
    num_splits: usize,
    arrays: [Vec<i32>; PlanArray::ALL.len()],
    pub(super) sealed: SealedByStep,
}

impl StepPlan {
    /// Plans a step over `inputs`, tables that the caller owns. Queries see `window` tokens at most.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] for blocks of no token; [`Error::Config`] when the tables of a sequence are too short for
    /// its tokens, when `first_held` is no block boundary before the step, when a page is missing or too many, or when
    /// two sequences would write the same block or page.
    pub fn new(
        block_size: usize,
        window: Option<usize>,
        inputs: &[SequenceInput<'_>],
        sealing: Sealing<'_>,
    ) -> Result<Self> {
        if block_size == 0 {
            return Err(Error::setting("block_size", "at least 1", &block_size));
        }
        num_rows(inputs.iter().map(|input| input.rows))?;
        let mut bounds = Bounds::default();
        let seals = matches!(sealing, Sealing::FullBlocks { .. });
        for input in inputs {
            check(block_size, input, seals)?;
            let end = (input.context_len + input.rows.num_tokens()).div_ceil(block_size);
            let held = input.first_held / block_size..end;
            let of_input = Bounds::of(&input.places[held.clone()]);
            // A block that seals has a tile, also while it is a page.
            let blocks = if seals { &input.blocks[held] } else { &[] };
            let num_tiles = blocks.iter().map(|block| block.0 as usize + 1).max().unwrap_or(0);
            bounds.num_pages = bounds.num_pages.max(of_input.num_pages);
            bounds.num_tiles = bounds.num_tiles.max(of_input.num_tiles).max(num_tiles);
        }
        check_written(block_size, inputs)?;
        let mut builder = Builder::new(block_size, window);
        let writers = Writers::new(block_size, inputs);
        inputs.iter().for_each(|input| builder.push(input, sealing, &writers));
        let entries = std::mem::take(&mut builder.sealed.tiles);
        Ok(builder.finish(bounds, &PlaceChanges { is_whole: true, entries }))
    }
}

impl Builder {
    pub(super) fn new(block_size: usize, window: Option<usize>) -> Self {
        let mut arrays: [Vec<i32>; PlanArray::ALL.len()] = Default::default();
        arrays[PlanArray::QueryStartLoc as usize].push(0);
        arrays[PlanArray::TokenStartLoc as usize].push(0);
        arrays[PlanArray::SplitStartLoc as usize].push(0);
        Self { block_size, window, num_rows: 0, num_splits: 0, arrays, sealed: SealedByStep::default() }
    }

    fn word(&mut self, array: PlanArray, word: usize) {
        self.arrays[array as usize].push(word as i32);
    }

    fn record<const N: usize>(&mut self, array: PlanArray, words: [i32; N]) {
        debug_assert_eq!(array.width(), N);
        self.arrays[array as usize].extend(words);
    }

    pub(super) fn push(&mut self, input: &SequenceInput<'_>, sealing: Sealing<'_>, writers: &Writers<'_>) {
        let &SequenceInput { context_len, first_held, .. } = input;
        let index = self.arrays[PlanArray::Rows as usize].len();
        let mut position = context_len;
        for row in 0..input.rows.num_rows() {
            if !input.rows.is_token(row) {
                self.record(PlanArray::Positions, [-1]);
                self.record(PlanArray::Slots, [-1]);
                continue;
            }
            let slot = input.places[position / self.block_size]
                .as_page()
                .map_or(-1, |page| (page.0 as usize * self.block_size + position % self.block_size) as i32);
            self.word(PlanArray::Positions, position);
            self.record(PlanArray::Slots, [slot]);
            self.word(PlanArray::TokenRows, self.num_rows + row);
            position += 1;
        }
        let num_new = position - context_len;
        let is_prefill = is_prefill(self.block_size, context_len, num_new);
        self.num_rows += input.rows.num_rows();
        self.word(PlanArray::Rows, input.row);
        self.word(PlanArray::ContextLens, context_len);
        self.word(PlanArray::FirstHeld, first_held);
        self.word(PlanArray::IsPrefill, usize::from(is_prefill));
        self.word(PlanArray::QueryStartLoc, self.num_rows);
        self.word(PlanArray::TokenStartLoc, self.arrays[PlanArray::TokenRows as usize].len());
        if let Sealing::FullBlocks { is_partial } = sealing {
            for seal in plan_seals(self.block_size, index, input, num_new, is_partial, &mut self.sealed) {
                self.record(PlanArray::Seals, seal.words());
            }
        }
        for open in plan_opens(self.block_size, index, input, num_new) {
            self.record(PlanArray::Opens, writers.redirect(self.block_size, open).words());
        }
        if let Some(refit) = plan_refit(self.block_size, index, input, num_new) {
            self.record(PlanArray::Refits, refit.words());
        }
        let num_splits = if is_prefill || num_new == 0 {
            0
        } else {
            splits(first_seen(context_len, self.window).max(first_held), position).len()
        };
        self.num_splits += num_splits;
        self.word(PlanArray::SplitStartLoc, self.num_splits);
    }

    pub(super) fn finish(mut self, bounds: Bounds, changes: &PlaceChanges) -> StepPlan {
        for &PlaceChange { row, block, place } in &changes.entries {
            self.record(PlanArray::Changes, [row as i32, block as i32, place.word()]);
        }
        let layout = PlanLayout::of_words(self.arrays.each_ref().map(Vec::len));
        let Self { block_size, window, .. } = self;
        let words = self.arrays.concat();
        StepPlan { block_size, window, bounds, is_whole_table: changes.is_whole, layout, words }
    }
}
