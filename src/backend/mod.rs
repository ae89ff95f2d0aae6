//! The work of one device: memory for records, and the verbs that read and write them.
//!
//! A [`Backend`] executes a [`crate::plan::StepPlan`] and decides nothing. Whether it owns its memory or was lent it
//! ([`memory::LayerMemory`]) makes no difference to the verbs. An [`Executor`] checks what it is given and calls the
//! verbs in order; a cache and an engine with block tables of its own both come through it.
//!
//! ```text
//! begin    seal pages of committed tokens, open pages that follow them     all layers at once
//! append   open the other pages, write the tokens, seal whole blocks       a layer
//! attend   queries against pages and tiles                                 a layer, after its append
//! refit    first pages of few tokens                                       all layers, once the tokens are committed
//! ```

mod check;
mod codec;
pub mod cpu;
pub mod cuda;
mod device;
mod executor;
mod health;
mod launch;
pub mod memory;
mod records;
pub mod view;

pub use codec::Coded;
pub use device::{Device, Stream};
pub use executor::Executor;
pub use health::LayerHealth;
pub use launch::{DevicePlan, Launch, Plan};
pub use view::{TensorView, TensorViewMut};

use crate::config::Shape;
use crate::error::Result;
use crate::format::{Arrangement, Format};
use crate::paging::{PageId, Place};
use crate::plan::{Bounds, StepView};
use crate::quant::LayerCalibration;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

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
    /// Which tokens are attended to.
    pub over: Over,
    /// Sequences with more new tokens are left out: nothing is written in their rows.
    pub max_query_len: Option<usize>,
}

impl AttendOptions<'_> {
    /// Plain causal attention.
    pub const PLAIN: Self =
        Self { scale: None, window: None, softcap: None, sinks: None, over: Over::All, max_query_len: None };
}

/// Which of the tokens that a query sees it attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Over {
    /// All.
    #[default]
    All,
    /// Those before the step. A caller that attends to the step's own tokens itself merges both by their log-sum-exp.
    History,
}

/// The keys and values of a step's own tokens, `[B, num_kv_heads, T, head_dim]` each.
#[derive(Debug, Clone, Copy)]
pub struct Fresh<'a> {
    /// Keys.
    pub k: TensorView<'a>,
    /// Values.
    pub v: TensorView<'a>,
}

/// Where attention writes.
#[derive(Debug)]
pub struct Output<'a> {
    /// `[B, num_q_heads, T, head_dim]`; zeros in rows of padding and in rows that see no token.
    pub out: TensorViewMut<'a>,
    /// `[B, num_q_heads, T, 1]`, f32: natural logarithm of the sum of the exponentials of a row's scores, a sink's
    /// included; minus infinity in rows of padding, and in those that see no token and have no sink.
    pub lse: Option<TensorViewMut<'a>>,
}

impl<'a> From<TensorViewMut<'a>> for Output<'a> {
    fn from(out: TensorViewMut<'a>) -> Self {
        Self { out, lse: None }
    }
}

/// Where sealing and opening find tokens.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    /// In the pages and tiles: tokens from before the step.
    Stored,
    /// The tokens of the step, of one layer; of a page that the step opens, also those before them.
    New(Fresh<'a>),
}

/// What is known of a layer's model, if anything.
pub type Model = Option<Arc<LayerCalibration>>;

/// The verbs of a device, over records of one [`Shape`]. Every layer has its own pages and tiles; ids are the same in all.
///
/// Verbs are launched and not waited for: on a device other than the host, an error of the work itself comes from a later
/// call. They take what an [`Executor`] has checked: with other ids or shapes they may panic. `models` and `layers` run
/// side by side.
pub trait Backend: Debug + Send + Sync {
    /// The shape of the records.
    fn shape(&self) -> &Shape;

    /// The device that tensors and plans have to be on.
    fn device(&self) -> Device;

    /// The order of the bytes of [`read_records`](Self::read_records).
    fn arrangement(&self) -> Arrangement;

    /// Are tokens stored other than as they were given, so that a prefill's own tokens are better attended to as given?
    fn is_lossy(&self) -> bool {
        self.shape().format != Format::Raw
    }

    /// Are full blocks sealed?
    fn seals(&self) -> bool {
        self.shape().tile().is_some()
    }

    /// The ids that there is memory for.
    fn capacity(&self) -> Bounds;

    /// Makes room for block ids below `num_blocks` and pages below `num_pages`; never shrinks, never moves a record.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Unsupported`] on lent memory that is too small; nothing has changed
    /// for a caller.
    fn grow(&mut self, num_blocks: usize, num_pages: usize) -> Result<()>;

    /// Copies whole pages in every layer, in order, as `(source, destination)`.
    ///
    /// # Errors
    /// Those of the device.
    fn copy_pages(&mut self, copies: &[(PageId, PageId)], stream: Stream) -> Result<()>;

    /// The records of all heads at a place, one after the other, in [`arrangement`](Self::arrangement). Waits for the
    /// device.
    ///
    /// # Errors
    /// Those of the device.
    fn read_records(&self, layer: usize, place: Place) -> Result<Vec<u8>>;

    /// Writes what [`read_records`](Self::read_records) reads. Waits for the device.
    ///
    /// # Errors
    /// Those of the device.
    fn write_records(&mut self, layer: usize, place: Place, records: &[u8]) -> Result<()>;

    /// The same records in memory of its own.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Unsupported`] on lent memory.
    fn try_clone(&self) -> Result<Box<dyn Backend>>;

    /// Bytes of address space of memory of its own; a page may take memory only when it is first used.
    fn allocated_bytes(&self) -> usize;

    /// Copies a plan, and what has changed in the table of places, to where the verbs read it; `None` where they read the
    /// host's. What is copied stays until [`unload`](Self::unload).
    ///
    /// # Errors
    /// Those of the device.
    fn load(&mut self, step: StepView<'_>, stream: Stream) -> Result<Option<DevicePlan>>;

    /// Gives the memory of a loaded plan back.
    fn unload(&mut self, plan: DevicePlan);

    /// Seals the plan's blocks whose tokens are in `from`: the tile is what [`crate::quant::encode_tile`] makes of K and
    /// the rotated V, as they are decoded from the page or as the step brings them, with the feedback of the layer's model
    /// or [`crate::quant::HeadFeedback::none`].
    ///
    /// # Errors
    /// Those of the device.
    fn seal(&mut self, launch: Launch<'_>, layers: Range<usize>, from: Source<'_>, models: &[Model]) -> Result<()>;

    /// Opens the plan's pages whose statistics are taken over tokens in `from`, and stores the statistics. All statistics
    /// are taken before any page changes: over the step's K as given, and K from before the step as
    /// [`crate::quant::record::read_k`] decodes it, without low bytes.
    ///
    /// A page that the step does not write whole is zeroed first. A first page that is opened again keeps its rows instead:
    /// its committed K is decoded with low bytes, also for its own statistics, and encoded under them for the tokens that
    /// the page has after the step ([`crate::quant::record::int8::rewrite_first_k`]).
    ///
    /// # Errors
    /// Those of the device.
    fn open(&mut self, launch: Launch<'_>, layers: Range<usize>, from: Source<'_>, models: &[Model]) -> Result<()>;

    /// Writes the step's tokens into their pages, V rotated in formats that seal. In a first page K has low bytes where a
    /// page of as many tokens as after the step has room for them ([`crate::format::Int8Page::has_low_bytes`]).
    ///
    /// # Errors
    /// Those of the device.
    fn write(&mut self, launch: Launch<'_>, layer: usize, new: Fresh<'_>) -> Result<()>;

    /// Takes the statistics of the pages that the plan's [`crate::plan::PageRefit`]s name anew, and encodes their K:
    /// [`crate::quant::record::int8::refit_k`].
    ///
    /// # Errors
    /// Those of the device.
    fn refit(&mut self, launch: Launch<'_>, layers: Range<usize>, models: &[Model]) -> Result<()>;

    /// Attends causally with `q`, `[B, num_q_heads, T, head_dim]`. With `new`, a prefill's own tokens attend to each other
    /// as given.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], those of the device.
    fn attend(
        &self,
        launch: Launch<'_>,
        layer: usize,
        q: TensorView<'_>,
        new: Option<Fresh<'_>>,
        options: AttendOptions<'_>,
        output: &Output<'_>,
    ) -> Result<()>;

    /// Decodes positions `start..` of a sequence into `k` and `v`, `[1, num_kv_heads, n, head_dim]` each. `places` are
    /// those of its blocks.
    ///
    /// # Errors
    /// Those of the device.
    fn dequantize(
        &self,
        layer: usize,
        places: &[Place],
        start: usize,
        k: &TensorViewMut<'_>,
        v: &TensorViewMut<'_>,
        stream: Stream,
    ) -> Result<()>;

    /// Is every element at a row that is a token finite? A device that cannot say without waiting stores finite values
    /// for others, and counts them.
    ///
    /// # Errors
    /// [`crate::Error::NonFinite`].
    fn check_finite(&self, launch: Launch<'_>, new: Fresh<'_>) -> Result<()>;

    /// Rows of a tensor, `[rows, heads, head_dim]`. Waits for the device.
    ///
    /// # Errors
    /// Those of the device.
    fn read_rows(&self, view: TensorView<'_>, rows: &[usize], stream: Stream) -> Result<Vec<f32>>;

    /// How well the statistics and grids of a layer fit what was written to it. Waits for the device.
    ///
    /// # Errors
    /// Those of the device.
    fn health(&self, layer: usize) -> Result<LayerHealth>;

    /// Begins [`health`](Self::health) anew in every layer.
    ///
    /// # Errors
    /// Those of the device.
    fn forget_health(&mut self) -> Result<()>;
}
