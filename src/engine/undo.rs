//! What a step changes of committed tokens before it is committed, and takes back when it is aborted.
//!
//! That is the first page of a sequence which the step opens anew: its K is encoded under other statistics.

use crate::backend::Executor;
use crate::error::Result;
use crate::paging::Place;
use crate::plan::StepView;

/// A page as it was before a layer's append.
#[derive(Debug, Clone)]
pub(super) struct Before {
    pub(super) layer: usize,
    place: Place,
    records: Vec<u8>,
}

impl Before {
    /// The pages with tokens that the step opens anew in a layer, as they are.
    pub(super) fn of_step(executor: &Executor, step: StepView<'_>, layer: usize) -> Result<Vec<Self>> {
        let again = step.opens().filter(|open| open.is_again(step.context_len(open.sequence)));
        let before = again.map(|open| {
            let place = step.place(open.sequence, open.block);
            Ok(Self { layer, place, records: executor.read_records(layer, place)? })
        });
        before.collect()
    }

    /// Puts the page back.
    pub(super) fn put_back(&self, executor: &mut Executor) -> Result<()> {
        executor.write_records(self.layer, self.place, &self.records)
    }
}
