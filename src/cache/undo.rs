//! What a step changes of committed tokens before it is committed, and takes back when it is aborted.
//!
//! That is the first page of a sequence which the step opens anew: its K is encoded under other statistics.

use super::{PagedKvCache, Step, stale};
use crate::backend::{Backend, Fresh};
use crate::error::Result;
use crate::paging::Place;
use crate::plan::StepPlan;

/// A page as it was before a layer's append.
#[derive(Debug, Clone)]
pub(super) struct Before {
    layer: usize,
    place: Place,
    records: Vec<u8>,
}

impl PagedKvCache {
    /// The pages with tokens that the plan opens anew, as they are.
    pub(super) fn pages_opened_again(&self, plan: &StepPlan, layer: usize) -> Vec<Before> {
        let again = plan.opens().filter(|open| open.is_again(plan.context_len(open.sequence)));
        again
            .map(|open| {
                let place = plan.over(self.paging.places()).place(open.sequence, open.block);
                Before { layer, place, records: self.backend.read_records(layer, place) }
            })
            .collect()
    }

    /// Puts back what a layer's first append wrote over, before it is appended again.
    ///
    /// # Errors
    /// Those of the append that follows; nothing has changed.
    pub(super) fn undo_append(&mut self, step: &Step, layer: usize, fresh: Fresh<'_>) -> Result<()> {
        let open = self.steps.get(&step.id).ok_or_else(stale)?;
        let of_layer = open.before.iter().filter(|page| page.layer == layer);
        let before: Vec<Before> = of_layer.cloned().collect();
        if !before.is_empty() {
            self.backend.check_append(layer, step.plan.over(self.paging.places()), fresh)?;
            self.put_back(&before);
        }
        Ok(())
    }

    /// Puts pages back as they were.
    pub(super) fn put_back(&mut self, before: &[Before]) {
        for page in before {
            self.backend.write_records(page.layer, page.place, &page.records);
        }
    }
}
