//! One sequence of a plan, and what its queries see.

use super::StepPlan;
use crate::format::PlanArray;
use crate::paging::{PageId, Place, Places};

/// First position that the query at `position` sees, its own included, under a sliding window of so many tokens.
#[must_use]
pub const fn first_seen(position: usize, window: Option<usize>) -> usize {
    match window {
        Some(window) => position.saturating_add(1).saturating_sub(window),
        None => 0,
    }
}

/// One sequence of a planned step: views of the plan's arrays.
#[derive(Debug, Clone, Copy)]
pub struct SequencePlan<'a> {
    /// Where each of its blocks is read once the step has sealed; entries of released blocks are stale.
    pub places: &'a [Place],
    /// Tokens before this step.
    pub context_len: usize,
    /// First token still held.
    pub first_held: usize,
    /// Row of each new token, in order.
    pub token_rows: &'a [i32],
    /// Do its new tokens attend to each other unquantized ([`is_prefill`](super::is_prefill))?
    pub is_prefill: bool,
    window: Option<usize>,
}

impl<'a> SequencePlan<'a> {
    pub(super) fn of(plan: &'a StepPlan, places: Places<'a>, index: usize) -> Self {
        let word = |array: PlanArray| plan.array(array)[index] as usize;
        let (start, context_len) = (word(PlanArray::TokenStartLoc), word(PlanArray::ContextLens));
        let num_new = plan.num_new(index);
        let num_blocks = (context_len + num_new).div_ceil(plan.block_size);
        Self {
            places: &places.row(word(PlanArray::Rows))[..num_blocks],
            context_len,
            first_held: word(PlanArray::FirstHeld),
            token_rows: &plan.token_rows()[start..start + num_new],
            is_prefill: word(PlanArray::IsPrefill) != 0,
            window: plan.window,
        }
    }

    /// The page of a block, `None` for a tile.
    #[must_use]
    pub fn page(&self, block: usize) -> Option<PageId> {
        self.places[block].as_page()
    }

    /// New tokens of this step.
    #[must_use]
    pub fn num_new(&self) -> usize {
        self.token_rows.len()
    }

    /// Tokens after this step.
    #[must_use]
    pub fn seq_len(&self) -> usize {
        self.context_len + self.num_new()
    }

    /// The positions that the query at `position` sees, as a half-open range: those in the smaller of the step's window
    /// and this one.
    #[must_use]
    pub fn visible(&self, position: usize, window: Option<usize>) -> (usize, usize) {
        let start = first_seen(position, self.window).max(first_seen(position, window));
        (start.max(self.first_held), position + 1)
    }
}
