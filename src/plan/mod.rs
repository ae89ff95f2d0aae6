//! The plan of a step: everything that is decided about it, as integers. A pure function of block tables and lengths.
//!
//! A *step* appends some tokens to some sequences, in every layer, and lets their queries attend. Its tensors have
//! `num_rows` token rows; a row is a token or padding. For each sequence `s`, with `c = context_lens[s]`:
//!
//! ```text
//! rows of s              query_start_loc[s] .. query_start_loc[s + 1]
//! position of a token    c, c + 1, .. in row order; -1 for padding
//! slot of a token        page * block_size + position % block_size; -1 for padding and in blocks sealed at once
//! place of block b of s  places[rows[s]][b]
//! a query sees           positions max(first_held[s], first_seen(position, window)) ..= position
//! ```
//!
//! The arrays stand one after the other in one buffer, [`PlanLayout`] says where. The table of places is not among them:
//! it persists in [`crate::paging`], and a plan holds the rows of its sequences and the entries that have changed. A
//! sequence changes by no other way while its step is open, so the rows stay as they are until it is closed.
//!
//! The same plan serves every layer. Backends execute it and decide nothing: they seal what [`Seal`] names, open what
//! [`PageOpen`] names, write the tokens by their slots, then seal the blocks that the step fills, and attend by
//! [`Split`]s. At commit, they refit what [`PageRefit`] names.

mod build;
mod check;
mod input;
mod open;
mod request;
mod seal;
mod sequence;
mod split;

pub use input::{Rows, Sealing, SequenceInput, num_rows};
pub use open::{PageOpen, PageRefit};
pub use request::bounds_of;
pub use seal::{Seal, sealed_to};
pub use sequence::{SequencePlan, first_seen};
pub use split::{SPLIT_TOKENS, Split, splits};

use crate::format::{PlanArray, PlanLayout, first_page_tokens};
use crate::paging::{Place, PlaceChange, PlaceKind, Places};
use std::ops::Deref;

/// Most new tokens of a sequence in decode, and in the verification of drafts.
pub const DECODE_TOKENS: usize = 16;

/// Is a step of `num_new` tokens after `context_len` a prefill, whose tokens attend to each other unquantized? In decode
/// they are read from pages like all others, but not from a first page whose statistics are still taken anew.
#[must_use]
pub const fn is_prefill(block_size: usize, context_len: usize, num_new: usize) -> bool {
    num_new > DECODE_TOKENS || context_len < first_page_tokens(block_size)
}

/// What a backend must have memory for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bounds {
    /// Every page of the step has a number below this.
    pub num_pages: usize,
    /// Every block of the step that is a tile has a number below this; 0 where blocks do not seal.
    pub num_tiles: usize,
}

impl Bounds {
    /// The least bounds of these places.
    #[must_use]
    pub fn of(places: &[Place]) -> Self {
        places.iter().fold(Self::default(), |bounds, place| match place.kind() {
            PlaceKind::Page(page) => Self { num_pages: bounds.num_pages.max(page.0 as usize + 1), ..bounds },
            PlaceKind::Tile(block) => Self { num_tiles: bounds.num_tiles.max(block.0 as usize + 1), ..bounds },
        })
    }
}

/// The plan of one step. Made by [`StepPlan::new`] and [`StepPlan::begin`] only, whose checks backends rely on.
#[derive(Debug, Clone)]
pub struct StepPlan {
    block_size: usize,
    window: Option<usize>,
    bounds: Bounds,
    is_whole_table: bool,
    layout: PlanLayout,
    words: Vec<i32>,
}

impl StepPlan {
    /// Tokens of a block.
    #[must_use]
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Queries see this many tokens at most.
    #[must_use]
    pub fn window(&self) -> Option<usize> {
        self.window
    }

    /// What a backend must have memory for.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Where each array is in [`words`](Self::words).
    #[must_use]
    pub fn layout(&self) -> &PlanLayout {
        &self.layout
    }

    /// All arrays.
    #[must_use]
    pub fn words(&self) -> &[i32] {
        &self.words
    }

    /// The words of one array.
    #[must_use]
    pub fn array(&self, array: PlanArray) -> &[i32] {
        &self.words[self.layout.range(array)]
    }

    fn records<const N: usize>(&self, array: PlanArray) -> impl ExactSizeIterator<Item = [i32; N]> + '_ {
        debug_assert_eq!(array.width(), N);
        self.array(array).as_chunks().0.iter().copied()
    }

    /// Sequences of the step.
    #[must_use]
    pub fn num_sequences(&self) -> usize {
        self.layout.count(PlanArray::Rows)
    }

    /// Token rows of the step's tensors, padding included.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.layout.count(PlanArray::Positions)
    }

    /// New tokens of the step.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        self.layout.count(PlanArray::TokenRows)
    }

    /// Position of each row's token, -1 for padding.
    #[must_use]
    pub fn positions(&self) -> &[i32] {
        self.array(PlanArray::Positions)
    }

    /// Slot of each row: page and offset; -1 where no page is written.
    #[must_use]
    pub fn slots(&self) -> &[i32] {
        self.array(PlanArray::Slots)
    }

    /// Rows that hold tokens, in order.
    #[must_use]
    pub fn token_rows(&self) -> &[i32] {
        self.array(PlanArray::TokenRows)
    }

    /// The pages that the step opens, by sequence and block.
    pub fn opens(&self) -> impl ExactSizeIterator<Item = PageOpen> + '_ {
        self.records(PlanArray::Opens).map(PageOpen::from_words)
    }

    /// The first pages whose statistics are taken anew when the step is committed.
    pub fn refits(&self) -> impl ExactSizeIterator<Item = PageRefit> + '_ {
        self.records(PlanArray::Refits).map(PageRefit::from_words)
    }

    /// The blocks that the step seals, by sequence: from pages, before its tokens are written, and from its rows.
    pub fn seals(&self) -> impl ExactSizeIterator<Item = Seal> + '_ {
        self.records(PlanArray::Seals).map(Seal::from_words)
    }

    /// Does the step seal pages of committed tokens, or open pages with statistics of such?
    #[must_use]
    pub fn has_stored_work(&self) -> bool {
        self.seals().any(|seal| seal.page.is_some())
            || self.opens().any(|open| open.is_of_stored(self.context_len(open.of)))
    }

    /// The pieces that the history of each sequence that decodes is attended to in, by sequence and position.
    pub fn splits(&self) -> impl Iterator<Item = Split> + '_ {
        let (starts, first_held) = (self.array(PlanArray::SplitStartLoc), self.array(PlanArray::FirstHeld));
        let decoding = (0..self.num_sequences()).filter(move |&index| starts[index] < starts[index + 1]);
        decoding.flat_map(move |sequence| {
            let context_len = self.context_len(sequence);
            let start = first_seen(context_len, self.window).max(first_held[sequence] as usize);
            let cuts = splits(start, context_len + self.num_new(sequence));
            cuts.map(move |(start, end)| Split { sequence, start, end })
        })
    }

    /// What a copy of the table of places must be told before the step, in order; see
    /// [`is_whole_table`](Self::is_whole_table). Of a plan by [`new`](Self::new), what the owner of the table must set.
    #[must_use]
    pub fn changes(&self) -> impl ExactSizeIterator<Item = PlaceChange> + '_ {
        self.records(PlanArray::Changes).map(|[row, block, place]| PlaceChange {
            row: row as usize,
            block: block as usize,
            place: Place::from_word(place),
        })
    }

    /// Has the table of places moved or grown, so that a copy of it is taken whole? So is the table of a plan by
    /// [`new`](Self::new), which is not known from before.
    #[must_use]
    pub fn is_whole_table(&self) -> bool {
        self.is_whole_table
    }

    /// The same plan with those of its refits that `keep` accepts.
    #[must_use]
    pub fn with_refits(&self, keep: &dyn Fn(&PageRefit) -> bool) -> Self {
        let mut arrays = PlanArray::ALL.map(|array| self.array(array).to_vec());
        arrays[PlanArray::Refits as usize] = self.refits().filter(keep).flat_map(PageRefit::words).collect();
        let layout = PlanLayout::of_words(arrays.each_ref().map(Vec::len));
        Self { layout, words: arrays.concat(), ..self.clone() }
    }

    /// The plan beside the table that it was made over.
    #[must_use]
    pub fn over<'a>(&'a self, places: Places<'a>) -> StepView<'a> {
        StepView { plan: self, places }
    }

    /// (sequence, index in its block table) of every block that this step writes, those that it seals at once included.
    pub fn written_blocks(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        (0..self.num_sequences()).flat_map(move |index| {
            let num_new = self.num_new(index);
            let context_len = self.context_len(index);
            let first = context_len / self.block_size;
            let end = if num_new == 0 { first } else { (context_len + num_new).div_ceil(self.block_size) };
            (first..end).map(move |block| (index, block))
        })
    }

    /// Tokens of a sequence before the step.
    #[must_use]
    pub fn context_len(&self, sequence: usize) -> usize {
        self.array(PlanArray::ContextLens)[sequence] as usize
    }

    /// New tokens of a sequence.
    #[must_use]
    pub fn num_new(&self, sequence: usize) -> usize {
        let starts = self.array(PlanArray::TokenStartLoc);
        (starts[sequence + 1] - starts[sequence]) as usize
    }
}

/// A plan and the table of places that its rows are of.
#[derive(Debug, Clone, Copy)]
pub struct StepView<'a> {
    plan: &'a StepPlan,
    places: Places<'a>,
}

impl Deref for StepView<'_> {
    type Target = StepPlan;

    fn deref(&self) -> &StepPlan {
        self.plan
    }
}

impl<'a> StepView<'a> {
    /// One sequence of the step.
    ///
    /// # Panics
    /// When the step has fewer sequences.
    #[must_use]
    pub fn sequence(&self, index: usize) -> SequencePlan<'a> {
        SequencePlan::of(self.plan, self.places, index)
    }

    /// The table of places.
    #[must_use]
    pub const fn places(&self) -> Places<'a> {
        self.places
    }

    /// The place of a block of a sequence.
    #[must_use]
    pub fn place(&self, sequence: usize, block: usize) -> Place {
        self.places.row(self.array(PlanArray::Rows)[sequence] as usize)[block]
    }
}

#[cfg(test)]
mod tests;
