//! The story: which verb comes when.
//!
//! A *step* takes some sequences forward by some tokens, through every layer:
//!
//! ```text
//! begin_step   blocks are found (all or none), copies made, the plan made
//!   append     for each layer: keys and values into pages, full pages into tiles
//!   attend     for each layer, after its append: queries against pages and tiles
//! commit       the tokens are the sequences' own, what was sealed is a tile, first pages of few tokens are refitted
//!              or abort: nothing happened
//! ```
//!
//! Sequences in an open step cannot be forked, freed, truncated or stepped. Committed tokens change when their block is
//! sealed, and, in a first page, when it is refitted: until half of it is written.

mod build;
pub mod file;
mod learn;
mod rollback;
mod stats;
mod undo;

pub use stats::{CacheStats, LayerStats};

use crate::backend::cpu::Cpu;
use crate::backend::{AttendOptions, Backend, Fresh, TensorView, TensorViewMut};
use crate::calibration::State;
use crate::config::CacheConfig;
use crate::error::{Error, Result};
use crate::format::Format;
use crate::paging::{BlockId, Paging, Sequence, SequenceId, StepRequest};
use crate::plan::{Rows, StepPlan, bounds_of, num_rows};
use learn::{ModelCalibration, heads};
use std::collections::HashMap;
use std::sync::Arc;
use undo::Before;

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
    plan: Arc<StepPlan>,
    sequences: Arc<[SequenceId]>,
    /// Which layers have their keys and values.
    appended: Vec<bool>,
    /// What was appended over.
    before: Vec<Before>,
}

impl OpenStep {
    /// Ids of steps are counted by each cache on its own; the plan says whose step it is.
    fn is_of(&self, step: &Step) -> bool {
        Arc::ptr_eq(&self.plan, &step.plan)
    }
}

/// The pages of a group of layers of one shape, on the CPU.
#[derive(Debug)]
pub struct PagedKvCache {
    config: CacheConfig,
    paging: Paging,
    backend: Cpu,
    steps: HashMap<u64, OpenStep>,
    next_step: u64,
    calibration: Option<ModelCalibration>,
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
        let id = self.next_step;
        self.next_step += 1;
        let appended = vec![false; self.config.num_layers];
        self.steps.insert(id, OpenStep { plan: Arc::clone(&plan), sequences, appended, before: Vec::new() });
        Ok(Step { id, plan })
    }

    /// Writes a layer's keys and values of the step, and seals the blocks that are due. A layer may be written again: the
    /// last write counts. The calibration, if there is one that is not frozen, learns from the queries `q`,
    /// `[B, num_q_heads, T, head_dim]`; without them it learns nothing. It keeps what it learned of a step that is aborted.
    ///
    /// # Errors
    /// [`Error::StaleStep`], [`Error::Config`] for a layer that does not exist or a calibration of another shape,
    /// [`Error::Dtype`] for `raw` pages of another dtype, [`Error::Shape`] for other queries, and what
    /// [`Backend::append`] refuses.
    pub fn append(&mut self, step: &Step, layer: usize, fresh: Fresh<'_>, q: Option<TensorView<'_>>) -> Result<()> {
        self.check_layer(layer)?;
        let appended = self.open_step(step)?.appended[layer];
        if self.config.format == Format::Raw {
            fresh.k.check_dtype("k", self.config.dtype)?;
            fresh.v.check_dtype("v", self.config.dtype)?;
        }
        if let Some(q) = q {
            let rows = self.wanted_rows(&step.plan, layer, q)?;
            if !appended && !rows.is_empty() {
                // What is refused teaches nothing.
                self.backend.check_append(layer, step.plan.over(self.paging.places()), fresh)?;
                self.observe(&rows, layer, fresh.k, q)?;
            }
        }
        let calibrated = self.calibrated_for(&step.plan, layer)?;
        let before = if appended {
            self.undo_append(step, layer, fresh)?;
            Vec::new()
        } else {
            self.pages_opened_again(&step.plan, layer)
        };
        let view = step.plan.over(self.paging.places());
        self.backend.append(layer, view, fresh, heads(calibrated.as_deref()))?;
        let open = self.steps.get_mut(&step.id).ok_or_else(stale)?;
        open.before.extend(before);
        open.appended[layer] = true;
        Ok(())
    }

    /// Attends in a layer whose keys and values the step has appended; see [`Backend::attend`]. The window is the
    /// smaller of the cache's and the options'.
    ///
    /// # Errors
    /// [`Error::StaleStep`], [`Error::IncompleteStep`] before the layer's append, [`Error::Config`], [`Error::Shape`].
    pub fn attend(
        &self,
        step: &Step,
        layer: usize,
        q: TensorView<'_>,
        fresh: Option<Fresh<'_>>,
        options: AttendOptions<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        self.check_layer(layer)?;
        if !self.open_step(step)?.appended[layer] {
            return Err(Error::IncompleteStep { missing: vec![layer] });
        }
        self.backend.attend(layer, step.plan.over(self.paging.places()), q, fresh, options, out)
    }

    /// Makes the step's tokens the sequences' own.
    ///
    /// # Errors
    /// [`Error::StaleStep`]; [`Error::IncompleteStep`] when a layer has not been appended, and the step stays open.
    pub fn commit(&mut self, step: &Step) -> Result<()> {
        let open = self.open_step(step)?;
        let missing: Vec<usize> = (0..open.appended.len()).filter(|&layer| !open.appended[layer]).collect();
        if !missing.is_empty() {
            return Err(Error::IncompleteStep { missing });
        }
        let sequences = Arc::clone(&open.sequences);
        let num_sealed = self.paging.commit(&sequences)?;
        let at_once = step.plan.seals().filter(|seal| seal.page.is_none()).count();
        self.sealed += num_sealed + at_once;
        if self.config.format != Format::Raw {
            self.first_page_tokens = step.plan.first_page_tokens().or(self.first_page_tokens);
        }
        if step.plan.refits().len() > 0 {
            for layer in 0..self.config.num_layers {
                let calibrated = self.calibrated(layer);
                let view = step.plan.over(self.paging.places());
                self.backend.refit(layer, view, heads(calibrated.as_deref()));
            }
        }
        self.steps.remove(&step.id);
        Ok(())
    }

    /// Forgets the step: its sequences hold the tokens that they held before it. Blocks that left the window when it
    /// began stay released.
    ///
    /// # Errors
    /// [`Error::StaleStep`].
    pub fn abort(&mut self, step: &Step) -> Result<()> {
        self.open_step(step)?;
        let Some(open) = self.steps.remove(&step.id) else { return Err(stale()) };
        self.put_back(&open.before);
        self.paging.abort(&open.sequences)
    }

    /// Is the step neither committed nor aborted?
    #[must_use]
    pub fn is_open(&self, step: &Step) -> bool {
        self.open_step(step).is_ok()
    }

    /// Decodes tokens `start..` of a sequence into `k` and `v`, `[B, num_kv_heads, T, head_dim]` each, `B * T` tokens.
    /// Tokens of an open step count once its `layer` has been appended.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Shape`] for tokens that the sequence does not hold, or tensors that differ.
    pub fn dequantize(
        &self,
        layer: usize,
        sequence: SequenceId,
        start: usize,
        k: TensorViewMut<'_>,
        v: TensorViewMut<'_>,
    ) -> Result<()> {
        self.check_layer(layer)?;
        let held = self.paging.sequence(sequence)?;
        let [batch, _, count, _] = k.shape();
        let of_sequence = |open: &&OpenStep| open.appended[layer] && open.sequences.contains(&sequence);
        let open = self.steps.values().find(of_sequence);
        let end = held.len() + held.pending().filter(|_| open.is_some()).unwrap_or(0);
        if start < held.first_held() || start.saturating_add(batch.saturating_mul(count)) > end {
            let expected = format!("tokens within {}..{end}, from {start} on", held.first_held());
            return Err(Error::Shape { name: "k", expected, got: k.shape().to_vec() });
        }
        // What attention of the step reads: blocks that it has sealed are tiles already.
        if open.is_some() {
            let places = &self.paging.places().row(self.paging.row(sequence)?)[..held.blocks().len()];
            return self.backend.dequantize(layer, places, start, k, v);
        }
        self.backend.dequantize(layer, &self.paging.committed_places(sequence)?, start, k, v)
    }

    /// What it holds.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        let (block_bytes, page_bytes) = (self.config.block_bytes(), self.config.open_page_bytes());
        let (open_pages, peak_open_pages) = self.paging.open_pages().unwrap_or_default();
        let bytes_per_open_page = if self.paging.seals() { page_bytes } else { 0 };
        CacheStats {
            blocks_in_use: self.paging.blocks_in_use(),
            peak_blocks: self.paging.peak_blocks(),
            free_blocks: self.paging.num_free(),
            open_blocks: self.paging.open_blocks(),
            open_pages,
            peak_open_pages,
            bytes_in_use: self.paging.blocks_in_use() * block_bytes + open_pages * bytes_per_open_page,
            peak_bytes: self.paging.peak_blocks() * block_bytes + peak_open_pages * bytes_per_open_page,
            allocated_bytes: self.backend.allocated_bytes(),
            bytes_per_block: block_bytes,
            bytes_per_open_page,
            bytes_per_token: block_bytes as f64 / self.config.block_size as f64,
            num_sequences: self.paging.num_sequences(),
            cow_copies: self.paging.cow_copies(),
            sealed: self.sealed,
            unsealed: self.unsealed,
            first_page_tokens: self.first_page_tokens,
            calibrated: self.calibration.as_ref().map_or(State::No, ModelCalibration::state),
            layers: (0..self.config.num_layers).map(|layer| self.backend.health(layer).into()).collect(),
        }
    }

    /// Forgets every sequence, step and prefix, and what was counted; keeps the memory and the calibration.
    pub fn reset(&mut self) {
        self.steps.clear();
        self.paging.clear();
        self.backend.forget_health();
        (self.sealed, self.unsealed, self.first_page_tokens) = (0, 0, None);
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
        self.backend.grow(room.num_blocks(), room.num_pages())?;
        let copies = room.begin();
        self.backend.copy_pages(&copies);
        Ok(Arc::new(StepPlan::begin(&mut self.paging, self.config.window, rows, bounds)))
    }

    fn open_step(&self, step: &Step) -> Result<&OpenStep> {
        self.steps.get(&step.id).filter(|open| open.is_of(step)).ok_or_else(stale)
    }

    fn check_layer(&self, layer: usize) -> Result<()> {
        if layer < self.config.num_layers {
            return Ok(());
        }
        Err(Error::Config(format!("layer {layer}: the cache has {} layers", self.config.num_layers)))
    }
}

fn stale() -> Error {
    Error::StaleStep("the step is not open: it was committed or aborted, or belongs to another cache".to_owned())
}
