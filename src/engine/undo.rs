//! Snapshots of the committed pages that a step rewrites, restored if the step is aborted.
//!
//! Those are first pages that the step opens again: their K is encoded under other statistics.

use crate::backend::Executor;
use crate::error::Result;
use crate::paging::Place;
use crate::plan::StepView;

/// The records of a page before a layer's append.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    pub(super) layer: usize,
    place: Place,
    records: Vec<u8>,
}

impl Snapshot {
    /// Snapshots of the pages with tokens that the step opens again in a layer.
    pub(super) fn of_step(executor: &Executor, step: StepView<'_>, layer: usize) -> Result<Vec<Self>> {
        let again = step.opens().filter(|open| open.is_again(step.context_len(open.sequence)));
        let before = again.map(|open| {
            let place = step.place(open.sequence, open.block);
            Ok(Self { layer, place, records: executor.read_records(layer, place)? })
        });
        before.collect()
    }

    /// Restores the page.
    pub(super) fn restore(&self, executor: &mut Executor) -> Result<()> {
        executor.write_records(self.layer, self.place, &self.records)
    }
}
