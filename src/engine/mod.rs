//! Quantized attention for a serving engine that owns the memory, the block tables and the step.
//!
//! An [`Engine`] has records in memory of its caller (or of its own), takes a step's block tables and lengths, and keeps
//! account of one thing: which blocks are open, and their pages.
//!
//! ```text
//! begin    plans a step over the caller's tables; full blocks of committed tokens are sealed
//!   append, attend or forward     for each layer
//! commit   tokens stay, pages of sealed blocks are free          or abort
//! release  blocks that nobody will read again give their pages back
//! ```
//!
//! A block of `raw` or `int8` is its own page: there is nothing to seal and nothing to release. In formats that seal, a
//! block that is full and committed is sealed by the next step in which one of its sequences takes part, be it without
//! new tokens; with a window, while the window still shows it. A block that others may read, by a prefix cache say, is
//! sealed first. [`Engine::release`] is called for blocks whose tokens are gone: of requests that are finished or
//! preempted, and those that have left the window.

mod layers;
mod model;
mod pages;
mod step;
mod tables;
mod undo;

pub use layers::{Layers, Progress};
pub use model::ModelCalibration;
pub use tables::Tables;

use crate::backend::{AttendOptions, Executor, Fresh, LayerHealth, Output, Stream, TensorView, TensorViewMut};
use crate::calibration::{Calibration, State};
use crate::config::{Shape, check_window};
use crate::error::{Error, Result};
use crate::paging::{BlockId, Places, UsedBlock};
use crate::plan::StepPlan;
use pages::OpenPages;
use std::sync::Arc;
use step::{OpenStep, Sequence, check_accepted, place};

/// A group of layers whose sequences a caller keeps.
#[derive(Debug)]
pub struct Engine {
    layers: Layers,
    /// In formats that seal.
    pages: Option<OpenPages>,
    num_blocks: usize,
    window: Option<usize>,
    step: Option<OpenStep>,
    sealed: usize,
}

/// Figures of an engine.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineStats {
    /// Pages that open blocks have; 0 in formats that do not seal.
    pub open_pages: usize,
    /// Most of them at once.
    pub peak_open_pages: usize,
    /// Blocks sealed so far.
    pub sealed: usize,
    /// How the calibration came about; see [`ModelCalibration::state`].
    pub calibrated: State,
    /// One entry a layer.
    pub layers: Vec<LayerHealth>,
}

impl Engine {
    /// An engine over all the records that the executor has. Queries see `window` tokens at most.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] for a window of no token.
    pub fn new(executor: Executor, window: Option<usize>) -> Result<Self> {
        check_window(window)?;
        let capacity = executor.backend().capacity();
        let (most, block_size) = (capacity.num_pages.max(capacity.num_tiles), executor.shape().block_size);
        if most.checked_mul(block_size).is_none_or(|tokens| i32::try_from(tokens).is_err()) {
            return Err(Error::Config(format!(
                "{most} blocks or pages of {block_size} tokens: slots and places count to {}",
                i32::MAX
            )));
        }
        let seals = executor.backend().seals();
        let pages = seals.then(|| OpenPages::new(capacity.num_tiles, capacity.num_pages));
        let num_blocks = pages.as_ref().map_or(capacity.num_pages, OpenPages::num_blocks);
        Ok(Self { layers: Layers::new(executor), pages, num_blocks, window, step: None, sealed: 0 })
    }

    /// The shape of the records.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        self.layers.executor.shape()
    }

    /// Queues work on this stream from now on.
    pub fn set_stream(&mut self, stream: Stream) {
        self.layers.stream = stream;
    }

    /// Uses a model's calibration, and goes on with it until it is frozen; `layers[i]` is the model's number of layer `i`.
    ///
    /// # Errors
    /// Those of [`ModelCalibration::new`].
    pub fn set_calibration(&mut self, shared: Arc<Calibration>, layers: Vec<usize>) -> Result<()> {
        self.layers.calibration = Some(ModelCalibration::new(self.shape(), shared, layers)?);
        Ok(())
    }

    /// The plan of the open step.
    #[must_use]
    pub fn plan(&self) -> Option<&StepPlan> {
        self.step.as_ref().map(|step| &**step.progress.plan())
    }

    /// Begins a step. Its sequences' blocks are those of earlier steps, and new ones for the new tokens. Full blocks of the
    /// tokens before it are sealed if [`Tables::seals`] says so.
    ///
    /// # Errors
    /// [`Error::StaleStep`] while another step is open; [`Error::Shape`], [`Error::Config`] for tables that do not fit;
    /// [`Error::UnknownBlock`] for a block without memory; [`Error::OutOfOpenPages`]. Nothing has changed then.
    pub fn begin(&mut self, tables: &Tables<'_>) -> Result<()> {
        if self.step.is_some() {
            return Err(Error::StaleStep("a step is open: commit or abort it first".to_owned()));
        }
        tables.check()?;
        let sequences = (0..tables.num_sequences()).map(|index| self.sequence(tables, index));
        let sequences: Vec<Sequence> = sequences.collect::<Result<_>>()?;
        let written: Vec<BlockId> = sequences.iter().flat_map(Sequence::opened).collect();
        let allocated = self.pages.as_mut().map_or(Ok(Vec::new()), |pages| pages.allocate(&written))?;
        match self.plan_step(&sequences, tables.seals) {
            Ok(step) => {
                self.step = Some(OpenStep { allocated, ..step });
                self.pages.iter_mut().for_each(OpenPages::note_peak);
                Ok(())
            }
            Err(error) => {
                self.pages.iter_mut().for_each(|pages| pages.release(allocated.iter().copied()));
                Err(error)
            }
        }
    }

    /// Writes a layer's keys and values of the open step; see [`Layers::append`].
    ///
    /// # Errors
    /// [`Error::StaleStep`] without an open step, [`Error::Dtype`] for `raw` pages of another dtype, and those of
    /// [`Layers::append`].
    pub fn append(&mut self, layer: usize, new: Fresh<'_>, q: Option<TensorView<'_>>) -> Result<()> {
        self.layers.check_layer(layer)?;
        self.layers.executor.check_dtype(new)?;
        let step = self.step.as_mut().ok_or_else(closed)?;
        let places = Places::new(&step.places, step.stride);
        self.layers.append(&mut step.progress, places, layer, new, q)
    }

    /// Attends in a layer of the open step; see [`Layers::attend`].
    ///
    /// # Errors
    /// [`Error::StaleStep`] without an open step, and those of [`Layers::attend`].
    pub fn attend<'a>(
        &self,
        layer: usize,
        q: TensorView<'_>,
        new: Option<Fresh<'_>>,
        options: AttendOptions<'_>,
        output: impl Into<Output<'a>>,
    ) -> Result<()> {
        self.layers.check_layer(layer)?;
        let step = self.step.as_ref().ok_or_else(closed)?;
        self.layers.attend(&step.progress, step.places(), layer, q, new, options, &output.into())
    }

    /// [`append`](Self::append) with the queries, then [`attend`](Self::attend) with the keys and values.
    ///
    /// # Errors
    /// Those of both; nothing is written then, but by [`Error::OutOfMemory`] of attention, before which the layer was
    /// appended.
    pub fn forward<'a>(
        &mut self,
        layer: usize,
        q: TensorView<'_>,
        new: Fresh<'_>,
        options: AttendOptions<'_>,
        output: impl Into<Output<'a>>,
    ) -> Result<()> {
        self.layers.check_layer(layer)?;
        let output = output.into();
        let step = self.step.as_ref().ok_or_else(closed)?;
        self.layers.check_attend(&step.progress, step.places(), layer, q, Some(new), options, &output)?;
        self.append(layer, new, Some(q))?;
        let step = self.step.as_ref().ok_or_else(closed)?;
        self.layers.attend(&step.progress, step.places(), layer, q, Some(new), options, &output)
    }

    /// Decodes tokens `start..` of a sequence of the open step into `k` and `v`, `[B, num_kv_heads, T, head_dim]` each,
    /// `B * T` tokens: what attention of the step reads, the step's own tokens included.
    ///
    /// # Errors
    /// [`Error::StaleStep`] without an open step, [`Error::IncompleteStep`] before the layer's append, [`Error::Config`]
    /// for a sequence that the step does not have, and those of [`Layers::dequantize`].
    pub fn dequantize(
        &self,
        layer: usize,
        sequence: usize,
        start: usize,
        k: &TensorViewMut<'_>,
        v: &TensorViewMut<'_>,
    ) -> Result<()> {
        self.layers.check_layer(layer)?;
        let step = self.step.as_ref().ok_or_else(closed)?;
        step.progress.check_appended(layer)?;
        let num_sequences = step.progress.plan().num_sequences();
        if sequence >= num_sequences {
            return Err(Error::Config(format!("sequence {sequence} of a step of {num_sequences}")));
        }
        let view = step.progress.plan().over(step.places()).sequence(sequence);
        let tokens = (view.places, view.first_held..view.seq_len());
        self.layers.dequantize(layer, tokens, start, k, v)
    }

    /// Ends the step: its tokens are committed, or of each sequence the first `num_accepted` of them, and those after are
    /// to be written again. A first page that the step opened anew keeps the statistics of all of them.
    ///
    /// # Errors
    /// [`Error::StaleStep`] without an open step, [`Error::IncompleteStep`] when a layer has no keys and values,
    /// [`Error::Config`] for counts that do not fit the step; it stays open.
    pub fn commit(&mut self, num_accepted: Option<&[usize]>) -> Result<()> {
        let step = self.step.as_ref().ok_or_else(closed)?;
        step.progress.check_whole()?;
        let plan = step.progress.plan();
        if let Some(counts) = num_accepted {
            check_accepted(plan, counts)?;
        }
        let is_whole = |sequence: usize| num_accepted.is_none_or(|counts| counts[sequence] == plan.num_new(sequence));
        self.layers.refit(&step.progress, step.places(), &|refit| is_whole(refit.sequence))?;
        if let Some(step) = self.step.take() {
            self.layers.end(&step.progress);
            self.sealed += step.sealed.len();
            self.pages.iter_mut().for_each(|pages| pages.release(step.sealed.iter().copied()));
        }
        Ok(())
    }

    /// Drops the step: its tokens are to be written again, if at all.
    ///
    /// # Errors
    /// [`Error::StaleStep`] without an open step.
    pub fn abort(&mut self) -> Result<()> {
        let step = self.step.as_ref().ok_or_else(closed)?;
        self.layers.undo(&step.progress)?;
        let step = self.step.take().ok_or_else(closed)?;
        self.layers.end(&step.progress);
        self.pages.iter_mut().for_each(|pages| pages.release(step.allocated.iter().copied()));
        Ok(())
    }

    /// Gives the pages of these blocks back: nobody reads the tokens again that are in pages. Sealed blocks stay as they
    /// are.
    ///
    /// # Errors
    /// [`Error::StaleStep`] while a step is open, [`Error::UnknownBlock`]; nothing has changed.
    pub fn release(&mut self, blocks: &[BlockId]) -> Result<()> {
        self.check_idle(blocks)?;
        self.pages.iter_mut().for_each(|pages| pages.release(blocks.iter().copied()));
        Ok(())
    }

    /// Is a block a page? In formats that seal: one that was written, and neither sealed nor released.
    ///
    /// # Errors
    /// [`Error::UnknownBlock`].
    pub fn has_page(&self, block: BlockId) -> Result<bool> {
        self.check_block(block)?;
        Ok(place(self.pages.as_ref(), block).as_page().is_some())
    }

    /// Copies a block that is not sealed into another, for a sequence that is forked within it.
    ///
    /// # Errors
    /// [`Error::StaleStep`] while a step is open, [`Error::UnknownBlock`], [`Error::OutOfOpenPages`],
    /// [`Error::Unsupported`] for a sealed block, which is shared instead; nothing has changed.
    pub fn copy_block(&mut self, source: BlockId, destination: BlockId) -> Result<()> {
        self.check_idle(&[source, destination])?;
        let Some(from) = place(self.pages.as_ref(), source).as_page() else {
            return Err(Error::Unsupported(format!(
                "block {source} has no page: it is sealed (share it), or was never written"
            )));
        };
        let allocated = self.pages.as_mut().map_or(Ok(Vec::new()), |pages| pages.allocate(&[destination]))?;
        let Some(to) = place(self.pages.as_ref(), destination).as_page() else {
            unreachable!("it has just got a page")
        };
        let copied = self.layers.executor.copy_pages(&[(from, to)], self.layers.stream);
        if copied.is_err() {
            self.pages.iter_mut().for_each(|pages| pages.release(allocated.iter().copied()));
        }
        self.pages.iter_mut().for_each(OpenPages::note_peak);
        copied
    }

    /// The records of a block in a layer, head by head, as files have them: of `used` tokens, those of a sequence's first
    /// block if `is_first`.
    ///
    /// # Errors
    /// [`Error::StaleStep`] while a step is open, [`Error::UnknownBlock`], [`Error::Config`] for a layer that does not
    /// exist.
    pub fn records(&self, layer: usize, block: BlockId, used: usize, is_first: bool) -> Result<Vec<u8>> {
        self.check_idle(&[block])?;
        let block_size = self.shape().block_size;
        if used > block_size {
            return Err(Error::Config(format!("{used} tokens of a block of {block_size}")));
        }
        let place = place(self.pages.as_ref(), block);
        self.layers.executor.save(layer, place, &UsedBlock { id: block, used, is_first })
    }

    /// Figures.
    ///
    /// # Errors
    /// Those of [`Executor::health`].
    pub fn stats(&self) -> Result<EngineStats> {
        let health = |layer| self.layers.executor.health(layer);
        Ok(EngineStats {
            open_pages: self.pages.as_ref().map_or(0, OpenPages::in_use),
            peak_open_pages: self.pages.as_ref().map_or(0, OpenPages::peak),
            sealed: self.sealed,
            calibrated: self.layers.calibration.as_ref().map_or(State::No, ModelCalibration::state),
            layers: (0..self.shape().num_layers).map(health).collect::<Result<_>>()?,
        })
    }

    fn check_idle(&self, blocks: &[BlockId]) -> Result<()> {
        if self.step.is_some() {
            return Err(Error::StaleStep("a step is open: commit or abort it first".to_owned()));
        }
        blocks.iter().try_for_each(|&block| self.check_block(block))
    }

    fn check_block(&self, block: BlockId) -> Result<()> {
        if (block.0 as usize) < self.num_blocks {
            return Ok(());
        }
        Err(Error::UnknownBlock { id: block.0, num_blocks: self.num_blocks })
    }
}

fn closed() -> Error {
    Error::StaleStep("no step is open".to_owned())
}
