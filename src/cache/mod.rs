//! The paged cache of a group of layers: sequences, and steps over them.
//!
//! A *step* takes some sequences forward by some tokens, through every layer:
//!
//! ```text
//! begin_step   blocks are found (all or none), copies made, the plan made, full pages sealed in every layer
//!   append     for each layer: keys and values into pages, whole blocks into tiles
//!   attend     for each layer, after its append: queries against pages and tiles
//! commit       the tokens are the sequences' own, what was sealed is a tile, first pages of few tokens are refitted
//!              or abort: nothing happened
//! ```
//!
//! Sequences in an open step cannot be forked, freed, truncated or stepped. Committed tokens change when their block is
//! sealed, and, in a first page, when it is refitted: until half of it is written.

mod build;
pub mod file;
mod read;
mod rollback;
mod stats;

pub use stats::{CacheStats, LayerStats};

use crate::backend::{AttendOptions, Device, Fresh, Output, Stream, TensorView};
use crate::calibration::{Calibration, State};
use crate::config::CacheConfig;
use crate::engine::{Layers, ModelCalibration, Progress};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::paging::{BlockId, Paging, Sequence, SequenceId, StepRequest};
use crate::plan::{Rows, StepPlan, bounds_of, num_rows};
use crate::quant::Codec;
use std::collections::HashMap;
use std::sync::Arc;

/// A step in progress. It stays open until it is committed or aborted.
#[derive(Debug, Clone)]
pub struct Step {
    id: u64,
    plan: Arc<StepPlan>,
}

impl Step {
    /// What it does, in integers.
    #[must_use]
    pub fn plan(&self) -> &StepPlan {
        &self.plan
    }
}

/// The cache's side of a [`Step`].
#[derive(Debug)]
struct OpenStep {
    progress: Progress,
    sequences: Arc<[SequenceId]>,
}

impl OpenStep {
    /// Ids of steps are counted by each cache on its own; the plan says whose step it is.
    fn is_of(&self, step: &Step) -> bool {
        Arc::ptr_eq(self.progress.plan(), &step.plan)
    }
}

/// The pages and tiles of a group of layers of one shape, on one device.
#[derive(Debug)]
pub struct PagedKvCache {
    config: CacheConfig,
    paging: Paging,
    layers: Layers,
    /// What quantizes `raw` pages in place.
    codec: Option<Codec>,
    steps: HashMap<u64, OpenStep>,
    next_step: u64,
    sealed: usize,
    unsealed: usize,
    first_page_tokens: Option<usize>,
}

impl PagedKvCache {
    /// The settings.
    #[must_use]
    pub fn config(&self) -> &CacheConfig {
        &self.config
    }

    /// Where the records, and every tensor that is passed, are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.layers.executor.backend().device()
    }

    /// Queues work on this stream from now on; see [`Stream`].
    pub fn set_stream(&mut self, stream: Stream) {
        self.layers.stream = stream;
    }

    /// Uses a model's calibration, and goes on with it until it is frozen; `layers[i]` is the model's number of layer `i`.
    ///
    /// # Errors
    /// Those of [`ModelCalibration::new`].
    pub fn set_calibration(&mut self, shared: Arc<Calibration>, layers: Vec<usize>) -> Result<()> {
        self.layers.calibration = Some(ModelCalibration::new(&self.config.shape(), shared, layers)?);
        Ok(())
    }

    /// A sequence without tokens.
    pub fn new_sequence(&mut self) -> SequenceId {
        self.paging.new_sequence()
    }

    /// A sequence with the same tokens, sharing every block until one of the two writes into it.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::OpenStep`].
    pub fn fork(&mut self, sequence: SequenceId) -> Result<SequenceId> {
        self.paging.fork(sequence)
    }

    /// Gives the sequence's blocks back.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::OpenStep`].
    pub fn free(&mut self, sequence: SequenceId) -> Result<()> {
        self.paging.free(sequence)
    }

    /// A new sequence that shares the longest published prefix of `token_ids`: whole blocks, and not the last token.
    pub fn match_prefix(&mut self, token_ids: &[u32]) -> SequenceId {
        self.paging.match_prefix(token_ids)
    }

    /// Makes the full blocks of a sequence, whose tokens are `token_ids`, findable; gives how many are new.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::OpenStep`], or [`Error::Config`] for fewer ids than tokens.
    pub fn publish_prefix(&mut self, sequence: SequenceId, token_ids: &[u32]) -> Result<usize> {
        self.paging.publish_prefix(sequence, token_ids)
    }

    /// A sequence's length, blocks and first token held.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn sequence(&self, sequence: SequenceId) -> Result<&Sequence> {
        self.paging.sequence(sequence)
    }

    /// The sequences not yet freed, by ascending id.
    #[must_use]
    pub fn sequences(&self) -> Vec<SequenceId> {
        self.paging.ids()
    }

    /// Begins a step: row counts or masks a sequence, in the order of the step's tensors. With `retain`, nothing that
    /// left the window is released, so that a later [`Self::truncate`] may come back to it.
    ///
    /// # Errors
    /// [`Error::OutOfBlocks`], [`Error::OutOfOpenPages`], [`Error::OutOfMemory`], [`Error::UnknownSequence`],
    /// [`Error::OpenStep`], [`Error::Config`]; nothing has changed.
    pub fn begin_step(&mut self, requests: &[(SequenceId, Rows<'_>)], retain: bool) -> Result<Step> {
        let asked = StepPlan::requests(&self.paging, self.config.window, requests, retain)?;
        let plan = self.begin(&asked, requests)?;
        let sequences: Arc<[SequenceId]> = requests.iter().map(|request| request.0).collect();
        let progress = match self.layers.begin(Arc::clone(&plan), self.paging.places()) {
            Ok(progress) => progress,
            Err(error) => {
                self.paging.abort(&sequences)?;
                return Err(error);
            }
        };
        let id = self.next_step;
        self.next_step += 1;
        self.steps.insert(id, OpenStep { progress, sequences });
        Ok(Step { id, plan })
    }

    /// Appends a layer's keys and values and attends to what the layer then holds: [`Self::append`] with the queries, then
    /// [`Self::attend`] with the keys and values.
    ///
    /// # Errors
    /// Those of both; nothing is written then, but by [`Error::OutOfMemory`] of attention, before which the layer was
    /// appended.
    pub fn forward<'a>(
        &mut self,
        step: &Step,
        layer: usize,
        q: TensorView<'_>,
        new: Fresh<'_>,
        options: AttendOptions<'_>,
        output: impl Into<Output<'a>>,
    ) -> Result<()> {
        let output = output.into();
        self.layers.check_layer(layer)?;
        let (progress, places) = (&self.open_step(step)?.progress, self.paging.places());
        self.layers.check_attend(progress, places, layer, q, Some(new), options, &output)?;
        self.append(step, layer, new, Some(q))?;
        self.attend(step, layer, q, Some(new), options, output)
    }

    /// Writes a layer's keys and values of the step, and seals the blocks that are due. A layer may be written again: the
    /// last write counts. The calibration, if there is one that is not frozen, learns from the queries `q`,
    /// `[B, num_q_heads, T, head_dim]`; without them it learns nothing. It keeps what it learned of a step that is aborted.
    ///
    /// # Errors
    /// [`Error::StaleStep`], [`Error::Config`] for a layer that does not exist or a calibration of another shape,
    /// [`Error::Dtype`] for `raw` pages of another dtype, and what [`Layers::append`] refuses.
    pub fn append(&mut self, step: &Step, layer: usize, new: Fresh<'_>, q: Option<TensorView<'_>>) -> Result<()> {
        self.layers.check_layer(layer)?;
        self.layers.executor.check_dtype(new)?;
        self.open_step(step)?;
        let Self { layers, steps, paging, .. } = self;
        let open = steps.get_mut(&step.id).ok_or_else(stale)?;
        layers.append(&mut open.progress, paging.places(), layer, new, q)
    }

    /// Attends in a layer whose keys and values the step has appended; see [`Layers::attend`]. The window is the smaller
    /// of the cache's and the options'. Of `output`, a tensor or an [`Output`], every row is written.
    ///
    /// # Errors
    /// [`Error::StaleStep`], [`Error::IncompleteStep`] before the layer's append, [`Error::Config`], [`Error::Shape`].
    pub fn attend<'a>(
        &self,
        step: &Step,
        layer: usize,
        q: TensorView<'_>,
        new: Option<Fresh<'_>>,
        options: AttendOptions<'_>,
        output: impl Into<Output<'a>>,
    ) -> Result<()> {
        self.layers.check_layer(layer)?;
        let (progress, places) = (&self.open_step(step)?.progress, self.paging.places());
        self.layers.attend(progress, places, layer, q, new, options, &output.into())
    }

    /// Makes the step's tokens the sequences' own.
    ///
    /// # Errors
    /// [`Error::StaleStep`]; [`Error::IncompleteStep`] when a layer has not been appended, and the step stays open.
    pub fn commit(&mut self, step: &Step) -> Result<()> {
        self.open_step(step)?.progress.check_whole()?;
        let Self { layers, steps, paging, .. } = self;
        layers.refit(&steps.get(&step.id).ok_or_else(stale)?.progress, paging.places(), &|_| true)?;
        let Some(open) = self.close(step) else { return Err(stale()) };
        let num_sealed = self.paging.commit(&open.sequences)?;
        let at_once = step.plan.seals().filter(|seal| seal.page.is_none()).count();
        self.sealed += num_sealed + at_once;
        if self.config.format != Format::Raw {
            self.first_page_tokens = step.plan.first_page_tokens().or(self.first_page_tokens);
        }
        Ok(())
    }

    /// Forgets the step: its sequences hold the tokens that they held before it. Blocks that left the window when it
    /// began stay released.
    ///
    /// # Errors
    /// [`Error::StaleStep`].
    pub fn abort(&mut self, step: &Step) -> Result<()> {
        self.open_step(step)?;
        let Self { layers, steps, .. } = self;
        layers.undo(&steps.get(&step.id).ok_or_else(stale)?.progress)?;
        let Some(open) = self.close(step) else { return Err(stale()) };
        self.paging.abort(&open.sequences)
    }

    /// Is the step neither committed nor aborted?
    #[must_use]
    pub fn is_open(&self, step: &Step) -> bool {
        self.open_step(step).is_ok()
    }

    /// Blocks, pages and bytes in use, and how well the stored statistics fit.
    ///
    /// # Errors
    /// Those of [`crate::backend::Executor::health`].
    pub fn stats(&self) -> Result<CacheStats> {
        let (block_bytes, page_bytes) = (self.config.block_bytes(), self.config.open_page_bytes());
        let (open_pages, peak_open_pages) = self.paging.open_pages().unwrap_or_default();
        let bytes_per_open_page = if self.paging.seals() { page_bytes } else { 0 };
        Ok(CacheStats {
            blocks_in_use: self.paging.blocks_in_use(),
            peak_blocks: self.paging.peak_blocks(),
            free_blocks: self.paging.num_free(),
            partial_blocks: self.paging.partial_blocks(),
            open_pages,
            peak_open_pages,
            bytes_in_use: self.paging.blocks_in_use() * block_bytes + open_pages * bytes_per_open_page,
            peak_bytes: self.paging.peak_blocks() * block_bytes + peak_open_pages * bytes_per_open_page,
            allocated_bytes: self.layers.executor.backend().allocated_bytes(),
            bytes_per_block: block_bytes,
            bytes_per_open_page,
            bytes_per_token: block_bytes as f64 / self.config.block_size as f64,
            num_sequences: self.paging.num_sequences(),
            cow_copies: self.paging.cow_copies(),
            sealed: self.sealed,
            unsealed: self.unsealed,
            first_page_tokens: self.first_page_tokens,
            calibrated: self.layers.calibration.as_ref().map_or(State::No, ModelCalibration::state),
            layers: (0..self.config.num_layers)
                .map(|layer| self.layers.executor.health(layer).map(LayerStats::from))
                .collect::<Result<_>>()?,
        })
    }

    /// Forgets every sequence, step and prefix, and what was counted; keeps the memory and the calibration.
    ///
    /// # Errors
    /// Those of [`crate::backend::Executor::forget_health`].
    pub fn reset(&mut self) -> Result<()> {
        self.layers.executor.forget_health()?;
        self.steps.drain().for_each(|(_, open)| self.layers.end(&open.progress));
        self.paging.clear();
        (self.sealed, self.unsealed, self.first_page_tokens) = (0, 0, None);
        Ok(())
    }

    /// The blocks of a sequence; entries before the first token held are [`BlockId::RELEASED`].
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn block_table(&self, sequence: SequenceId) -> Result<&[BlockId]> {
        Ok(self.paging.sequence(sequence)?.blocks())
    }

    /// Begins a step in the tables, with the memory and the copies that it needs.
    fn begin(&mut self, asked: &[StepRequest], rows: &[(SequenceId, Rows<'_>)]) -> Result<Arc<StepPlan>> {
        let room = self.paging.room(asked)?;
        num_rows(rows.iter().map(|request| request.1))?;
        let bounds = bounds_of(&room);
        self.layers.executor.grow(room.num_blocks(), room.num_pages())?;
        let copies = room.begin();
        if let Err(error) = self.layers.executor.copy_pages(&copies, self.layers.stream) {
            let sequences: Vec<SequenceId> = rows.iter().map(|request| request.0).collect();
            self.paging.abort(&sequences)?;
            return Err(error);
        }
        Ok(Arc::new(StepPlan::begin(&mut self.paging, self.config.window, rows, bounds)))
    }

    /// Takes the step out of the open ones.
    fn close(&mut self, step: &Step) -> Option<OpenStep> {
        let open = self.steps.remove(&step.id)?;
        self.layers.end(&open.progress);
        Some(open)
    }

    fn open_step(&self, step: &Step) -> Result<&OpenStep> {
        self.steps.get(&step.id).filter(|open| open.is_of(step)).ok_or_else(stale)
    }
}

fn stale() -> Error {
    Error::StaleStep("the step is not open: it was committed or aborted, or belongs to another cache".to_owned())
}
