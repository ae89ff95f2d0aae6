//! The story: which verb comes when.
//!
//! A *step* takes some sequences forward by some tokens, through every layer:
//!
//! ```text
//! begin_step   blocks are found (all or none), copies made, the plan written
//!   append     for each layer: keys and values into pages
//!   attend     for each layer, after its append: queries against pages
//! commit       the tokens are the sequences' own         or abort: nothing happened
//! ```
//!
//! Sequences in an open step cannot be forked, freed, truncated or stepped. Committed tokens change no more.

use crate::backend::cpu::{Cpu, CpuConfig, Level};
use crate::backend::{AttendOptions, Backend, Fresh, TensorView, TensorViewMut};
use crate::config::{CacheConfig, env};
use crate::error::{Error, Result};
use crate::format::FORMAT_VERSION;
use crate::paging::{BlockId, Paging, Sequence, SequenceId, StepRequest};
use crate::plan::{Rows, SequenceInput, StepPlan};
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

/// What a cache holds; bytes are those of whole blocks, every layer together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CacheStats {
    /// Blocks that a sequence holds.
    pub blocks_in_use: usize,
    /// Most blocks ever in use.
    pub peak_blocks: usize,
    /// Blocks left; `None` when the pool grows.
    pub free_blocks: Option<usize>,
    /// Blocks in use that still have room.
    pub open_blocks: usize,
    /// Bytes of the blocks in use.
    pub bytes_in_use: usize,
    /// Bytes of the most blocks ever in use.
    pub peak_bytes: usize,
    /// Bytes of address space held; a page takes memory when it is first used.
    pub allocated_bytes: usize,
    /// Bytes of one block.
    pub bytes_per_block: usize,
    /// `bytes_per_block` over the tokens of a block.
    pub bytes_per_token: f64,
    /// Sequences alive.
    pub num_sequences: usize,
    /// Blocks copied because a fork wrote into a shared one.
    pub cow_copies: usize,
}

/// The cache's side of a [`Step`].
#[derive(Debug)]
struct OpenStep {
    plan: Arc<StepPlan>,
    sequences: Arc<[SequenceId]>,
    /// Which layers have their keys and values.
    appended: Vec<bool>,
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
}

impl PagedKvCache {
    /// An empty cache, at the machine's fastest SIMD level unless `KVARN_SIMD` names another.
    ///
    /// # Errors
    /// What [`CacheConfig::validate`] refuses; a `KVARN_SIMD` that does not exist or that the machine lacks.
    pub fn new(config: CacheConfig) -> Result<Self> {
        let level = env::simd().map_or_else(|| Ok(Level::best()), |name| Level::parse(&name))?;
        Self::with_level(config, level)
    }

    /// An empty cache at a SIMD level that this machine has.
    ///
    /// # Errors
    /// What [`CacheConfig::validate`] refuses; a level that the machine lacks.
    pub fn with_level(config: CacheConfig, level: Level) -> Result<Self> {
        config.validate()?;
        let level = Level::parse(level.name())?;
        let mut cache = Self {
            paging: Paging::new(config.block_size, config.num_blocks, &fingerprint(&config))?,
            backend: new_backend(&config, level)?,
            steps: HashMap::new(),
            next_step: 0,
            config,
        };
        if let Some(num_blocks) = cache.config.num_blocks {
            cache.backend.grow(num_blocks)?;
        }
        Ok(cache)
    }

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

    /// Keeps the first `len` tokens.
    ///
    /// # Errors
    /// [`Error::RollbackTooFar`] when it has fewer, or when the window has released what the next query would see.
    pub fn truncate(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        self.paging.truncate(sequence, len, self.config.window)
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

    /// Begins a step: row counts or masks a sequence, in the order of the step's tensors. With `retain`, nothing that
    /// left the window is released, so that a later [`Self::truncate`] may come back to it.
    ///
    /// # Errors
    /// [`Error::OutOfBlocks`], [`Error::OutOfMemory`], [`Error::UnknownSequence`], [`Error::OpenStep`],
    /// [`Error::Config`]; nothing has changed.
    pub fn begin_step(&mut self, requests: &[(SequenceId, Rows<'_>)], retain: bool) -> Result<Step> {
        let mut reservations = Vec::with_capacity(requests.len());
        for &(sequence, rows) in requests {
            let held = self.paging.sequence(sequence)?;
            let keep_from = match self.config.window {
                Some(window) if !retain => (held.len() + 1).saturating_sub(window),
                _ => 0,
            };
            reservations.push(StepRequest { sequence, num_new: rows.num_tokens(), keep_from });
        }
        self.backend.grow(self.paging.num_blocks_after(&reservations)?)?;
        // From here on only a plan can fail, and an abort keeps the copies in the block tables: they are made first.
        let copies = self.paging.begin(&reservations)?;
        self.backend.copy_blocks(&copies);
        let sequences: Arc<[SequenceId]> = requests.iter().map(|request| request.0).collect();
        let plan = match self.plan(requests) {
            Ok(plan) => Arc::new(plan),
            Err(error) => {
                self.paging.abort(&sequences)?;
                return Err(error);
            }
        };
        let id = self.next_step;
        self.next_step += 1;
        self.steps
            .insert(id, OpenStep { plan: Arc::clone(&plan), sequences, appended: vec![false; self.config.num_layers] });
        Ok(Step { id, plan })
    }

    fn plan(&self, requests: &[(SequenceId, Rows<'_>)]) -> Result<StepPlan> {
        let inputs = requests
            .iter()
            .map(|&(sequence, rows)| {
                let sequence = self.paging.sequence(sequence)?;
                Ok(SequenceInput {
                    block_table: sequence.blocks(),
                    context_len: sequence.len(),
                    first_held: sequence.first_held(),
                    rows,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        StepPlan::new(self.config.block_size, &inputs)
    }

    /// Writes a layer's keys and values of the step. A layer may be written again: the last write counts.
    ///
    /// # Errors
    /// [`Error::StaleStep`], [`Error::Config`] for a layer that does not exist, and what [`Backend::append`] refuses.
    pub fn append(&mut self, step: &Step, layer: usize, fresh: Fresh<'_>) -> Result<()> {
        self.check_layer(layer)?;
        let open = self.steps.get_mut(&step.id).filter(|open| open.is_of(step)).ok_or_else(stale)?;
        self.backend.append(layer, &step.plan, fresh)?;
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
        mut options: AttendOptions<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        self.check_layer(layer)?;
        if !self.open_step(step)?.appended[layer] {
            return Err(Error::IncompleteStep { missing: vec![layer] });
        }
        options.window = match (self.config.window, options.window) {
            (Some(own), Some(asked)) => Some(own.min(asked)),
            (own, asked) => own.or(asked),
        };
        self.backend.attend(layer, &step.plan, q, fresh, options, out)
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
        self.paging.commit(&sequences)?;
        self.steps.remove(&step.id);
        Ok(())
    }

    /// Forgets the step: its sequences hold the tokens that they held before it. Blocks that left the window when it
    /// began stay released.
    ///
    /// # Errors
    /// [`Error::StaleStep`].
    pub fn abort(&mut self, step: &Step) -> Result<()> {
        let sequences = Arc::clone(&self.open_step(step)?.sequences);
        self.steps.remove(&step.id);
        self.paging.abort(&sequences)
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
        let appended = self.steps.values().any(|open| open.appended[layer] && open.sequences.contains(&sequence));
        let end = held.len() + held.pending().filter(|_| appended).unwrap_or(0);
        if start < held.first_held() || start.saturating_add(batch.saturating_mul(count)) > end {
            let expected = format!("tokens within {}..{end}, from {start} on", held.first_held());
            return Err(Error::Shape { name: "k", expected, got: k.shape().to_vec() });
        }
        self.backend.dequantize(layer, held.blocks(), start, k, v)
    }

    /// What it holds.
    #[must_use]
    pub fn stats(&self) -> CacheStats {
        let block_bytes = self.config.block_bytes();
        CacheStats {
            blocks_in_use: self.paging.blocks_in_use(),
            peak_blocks: self.paging.peak_blocks(),
            free_blocks: self.paging.num_free(),
            open_blocks: self.paging.open_blocks(),
            bytes_in_use: self.paging.blocks_in_use() * block_bytes,
            peak_bytes: self.paging.peak_blocks() * block_bytes,
            allocated_bytes: self.backend.allocated_bytes(),
            bytes_per_block: block_bytes,
            bytes_per_token: block_bytes as f64 / self.config.block_size as f64,
            num_sequences: self.paging.num_sequences(),
            cow_copies: self.paging.cow_copies(),
        }
    }

    /// Forgets every sequence, step and prefix; keeps the memory.
    pub fn reset(&mut self) {
        self.steps.clear();
        self.paging.clear();
    }

    /// A cache with the same sequences and pages, of its own memory.
    ///
    /// # Errors
    /// [`Error::OpenStep`] while a step is open, [`Error::OutOfMemory`].
    pub fn try_clone(&self) -> Result<Self> {
        if let Some(id) = self.steps.values().flat_map(|open| open.sequences.iter()).next() {
            return Err(Error::OpenStep { id: id.0 });
        }
        Ok(Self {
            config: self.config.clone(),
            paging: self.paging.clone(),
            backend: self.backend.try_clone()?,
            steps: HashMap::new(),
            next_step: self.next_step,
        })
    }

    /// The blocks of a sequence; entries before the first token held are [`BlockId::RELEASED`].
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn block_table(&self, sequence: SequenceId) -> Result<&[BlockId]> {
        Ok(self.paging.sequence(sequence)?.blocks())
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

fn new_backend(config: &CacheConfig, level: Level) -> Result<Cpu> {
    let &CacheConfig { format, dtype, num_layers, num_kv_heads, head_dim, block_size, .. } = config;
    Cpu::new(CpuConfig { format, dtype, num_layers, num_kv_heads, head_dim, block_size }, level)
}

/// What two caches must have in common for their blocks to mean the same: seeds the prefix index.
fn fingerprint(config: &CacheConfig) -> Vec<u8> {
    let &CacheConfig { format, dtype, num_layers, num_kv_heads, head_dim, block_size, .. } = config;
    let (format, dtype) = (format.name(), dtype.name());
    format!("kvarn {FORMAT_VERSION} {format} {dtype} {num_layers} {num_kv_heads} {head_dim} {block_size}").into_bytes()
}
