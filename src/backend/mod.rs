//! The work of one device. A backend executes a [`crate::plan::StepPlan`] and decides nothing.

pub mod cpu;
pub mod view;

pub use view::{TensorView, TensorViewMut};

use crate::error::Result;
use crate::paging::{PageId, Place};
use crate::plan::StepView;
use crate::quant::HeadCalibration;

/// What attention is asked for, besides tensors and plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttendOptions<'a> {
    /// Factor on the scores; `1/sqrt(head_dim)` when `None`.
    pub scale: Option<f32>,
    /// A query sees this many tokens at most, itself included.
    pub window: Option<usize>,
    /// Scores become `softcap * tanh(score / softcap)`.
    pub softcap: Option<f32>,
    /// One logit a query head that takes part in the softmax and has no value (attention sinks), `[num_q_heads]`.
    pub sinks: Option<&'a [f32]>,
}

impl AttendOptions<'_> {
    /// Plain causal attention.
    pub const PLAIN: Self = Self { scale: None, window: None, softcap: None, sinks: None };
}

/// The keys and values of a step's own tokens, `[B, num_kv_heads, T, head_dim]` each.
#[derive(Debug, Clone, Copy)]
pub struct Fresh<'a> {
    /// Keys.
    pub k: TensorView<'a>,
    /// Values.
    pub v: TensorView<'a>,
}

/// The verbs of a device. Every layer has its own pages; block ids are the same in all of them.
pub trait Backend {
    /// Makes room for block ids below `num_blocks` and pages below `num_pages`; never shrinks. The other verbs refuse
    /// ids without room ([`crate::Error::UnknownBlock`]); `copy_pages` takes only ids that have it.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`]; nothing has changed for a caller.
    fn grow(&mut self, num_blocks: usize, num_pages: usize) -> Result<()>;

    /// Copies whole pages in every layer, in order, as `(source, destination)`.
    fn copy_pages(&mut self, copies: &[(PageId, PageId)]);

    /// What [`append`](Self::append) would say of the step's keys and values. Changes nothing.
    ///
    /// # Errors
    /// Those of [`append`](Self::append).
    fn check_append(&self, layer: usize, step: StepView<'_>, fresh: Fresh<'_>) -> Result<()>;

    /// Writes the step's keys and values, `[B, num_kv_heads, T, head_dim]`, into the pages of `layer`, and seals what the
    /// plan says. `heads` are what the model's calibration knows of the layer's kv heads, or empty.
    ///
    /// # Errors
    /// [`crate::Error::Shape`], or [`crate::Error::NonFinite`] for a NaN or infinity at a row that is a token. Nothing
    /// is written then.
    fn append(&mut self, layer: usize, step: StepView<'_>, fresh: Fresh<'_>, heads: &[HeadCalibration]) -> Result<()>;

    /// Takes the statistics of the pages that the plan's [`crate::plan::PageRefit`]s name anew, once the step's tokens
    /// are committed. `heads` as for [`append`](Self::append).
    fn refit(&mut self, layer: usize, step: StepView<'_>, heads: &[HeadCalibration]);

    /// The records of all heads at a place, as this backend arranges them.
    fn read_records(&self, layer: usize, place: Place) -> Vec<u8>;

    /// Writes the records of all heads at a place: what [`read_records`](Self::read_records) gave of one of its kind.
    fn write_records(&mut self, layer: usize, place: Place, records: &[u8]);

    /// Attends with `q`, `[B, num_q_heads, T, head_dim]`, to what `layer` holds, causally, and writes `out` of the same
    /// shape; rows of padding become zeros. With `fresh`, a prefill's own tokens attend to each other unquantized.
    fn attend(
        &self,
        layer: usize,
        step: StepView<'_>,
        q: TensorView<'_>,
        fresh: Option<Fresh<'_>>,
        options: AttendOptions<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()>;

    /// Decodes positions `start..` of a sequence into `k` and `v`, `[1, num_kv_heads, n, head_dim]` each. `places` are
    /// those of its blocks.
    fn dequantize(
        &self,
        layer: usize,
        places: &[Place],
        start: usize,
        k: TensorViewMut<'_>,
        v: TensorViewMut<'_>,
    ) -> Result<()>;
}
