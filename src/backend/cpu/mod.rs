//! The CPU backend: records in host memory, kernels chosen once a cache, threads by rayon.
//!
//! Results depend neither on the number of threads nor on what else is in the batch: work is cut at fixed places, and
//! the pieces are merged in order.

mod append;
mod arena;
mod attend;
mod dispatch;
mod generic;
mod page;
mod page_kernel;
mod prefill;
mod scalar;
mod simd;

#[cfg(target_arch = "x86_64")]
mod avx2;

pub use dispatch::Level;

use super::{AttendOptions, Backend, Fresh, TensorView, TensorViewMut};
use crate::error::{Error, Result};
use crate::format::{BLOCK_SIZES, Dtype, Format, MAX_HEAD_DIM, supports_block_size, supports_head_dim};
use crate::paging::BlockId;
use crate::plan::StepPlan;
use arena::Arena;
use dispatch::Kernels;
use page::PageLayout;

/// Below this many values touched, waking threads costs more than it brings.
const PARALLEL_VALUES: usize = 1 << 16;

/// What the pages of a cache look like.
#[derive(Debug, Clone, Copy)]
pub struct CpuConfig {
    /// How pages hold their tokens.
    pub format: Format,
    /// Element type of `raw` pages.
    pub dtype: Dtype,
    /// Layers.
    pub num_layers: usize,
    /// Key/value heads of a layer.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Tokens of a block.
    pub block_size: usize,
}

/// Pages in host memory, and the level that reads them.
#[derive(Debug)]
pub struct Cpu {
    layout: PageLayout,
    num_kv_heads: usize,
    head_dim: usize,
    block_size: usize,
    layers: Vec<Arena>,
    kernels: Kernels,
}

impl Cpu {
    /// An empty backend.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a `head_dim` that pages do not hold or a level that this machine lacks;
    /// [`Error::Config`] for a block size, or a number of heads, that cannot be; [`Error::OutOfMemory`] for more layers
    /// than can be listed.
    pub fn new(config: CpuConfig, level: Level) -> Result<Self> {
        let CpuConfig { format, dtype, num_layers, num_kv_heads, head_dim, block_size } = config;
        if !supports_head_dim(head_dim) {
            return Err(Error::Unsupported(format!("head_dim {head_dim}: pages hold multiples of 16 up to 256")));
        }
        if !supports_block_size(block_size) {
            return Err(Error::Config(format!("block_size must be one of {BLOCK_SIZES:?}, got {block_size}")));
        }
        let layout = PageLayout::new(format, dtype, head_dim, block_size);
        if num_kv_heads == 0 || num_kv_heads.checked_mul(layout.bytes()).is_none_or(|n| n > isize::MAX as usize / 2) {
            return Err(Error::Config(format!("num_kv_heads {num_kv_heads}: no block can be of so many heads")));
        }
        if !level.is_available() {
            return Err(Error::Unsupported(format!("this machine does not have SIMD level {}", level.name())));
        }
        let mut layers = Vec::new();
        if layers.try_reserve_exact(num_layers).is_err() {
            let bytes = num_layers.saturating_mul(size_of::<Arena>());
            return Err(Error::OutOfMemory { bytes, what: "the list of layers" });
        }
        layers.extend((0..num_layers).map(|_| Arena::new(num_kv_heads, layout.bytes())));
        Ok(Self { layout, num_kv_heads, head_dim, block_size, layers, kernels: dispatch::kernels(level) })
    }

    /// A backend with the same pages, in memory of its own.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn try_clone(&self) -> Result<Self> {
        let layers = self.layers.iter().map(Arena::try_clone).collect::<Result<_>>()?;
        Ok(Self { layers, ..*self })
    }

    /// Is this a plan, and a layer, that this backend's pages can be used with?
    fn check_plan(&self, layer: usize, plan: &StepPlan) -> Result<()> {
        self.check_layer(layer)?;
        if plan.block_size != self.block_size {
            let (own, plan) = (self.block_size, plan.block_size);
            return Err(Error::Config(format!("a plan for blocks of {plan} tokens, pages of {own}")));
        }
        self.check_block(plan.max_block)
    }

    fn check_layer(&self, layer: usize) -> Result<()> {
        if layer < self.layers.len() {
            return Ok(());
        }
        Err(Error::Config(format!("layer {layer}: the backend has {} layers", self.layers.len())))
    }

    fn check_block(&self, block: Option<BlockId>) -> Result<()> {
        let num_blocks = self.layers.first().map_or(0, Arena::num_blocks);
        match block {
            Some(BlockId(id)) if id as usize >= num_blocks => Err(Error::UnknownBlock { id, num_blocks }),
            _ => Ok(()),
        }
    }

    /// Bytes of address space that the pages take; a page takes memory when it is first used.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        self.layers.iter().map(Arena::bytes).sum()
    }
}

impl Backend for Cpu {
    fn grow(&mut self, num_blocks: usize) -> Result<()> {
        let missing = self.layers.iter().map(|arena| arena.missing_bytes(num_blocks));
        let bytes = missing.fold(0, usize::saturating_add);
        // A system that hands out memory when it is first used refuses only what no machine could give, and only in
        // one piece: ask for the whole first.
        if std::hint::black_box(&mut Vec::<u8>::new()).try_reserve_exact(bytes).is_err() {
            return Err(Error::OutOfMemory { bytes, what: "pages" });
        }
        self.layers.iter_mut().try_for_each(|arena| arena.grow(num_blocks))
    }

    fn copy_blocks(&mut self, copies: &[(BlockId, BlockId)]) {
        for arena in &mut self.layers {
            copies.iter().for_each(|&(source, destination)| arena.copy_block(source, destination));
        }
    }

    fn append(&mut self, layer: usize, plan: &StepPlan, fresh: Fresh<'_>) -> Result<()> {
        self.check_plan(layer, plan)?;
        self.append_step(layer, plan, fresh)
    }

    fn attend(
        &self,
        layer: usize,
        plan: &StepPlan,
        q: TensorView<'_>,
        fresh: Option<Fresh<'_>>,
        options: AttendOptions<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        self.check_plan(layer, plan)?;
        self.attend_step(layer, plan, q, fresh, options, &out)
    }

    fn dequantize(
        &self,
        layer: usize,
        block_table: &[BlockId],
        start: usize,
        k: TensorViewMut<'_>,
        v: TensorViewMut<'_>,
    ) -> Result<()> {
        self.check_layer(layer)?;
        let count = k.shape()[0].saturating_mul(k.shape()[2]);
        k.check("k", self.num_kv_heads, count, self.head_dim)?;
        v.check("v", self.num_kv_heads, count, self.head_dim)?;
        if start.saturating_add(count) > block_table.len() * self.block_size {
            return Err(Error::Shape {
                name: "k",
                expected: format!("at most {} tokens from {start} on", block_table.len() * self.block_size),
                got: k.shape().to_vec(),
            });
        }
        let read = start / self.block_size..(start + count).div_ceil(self.block_size);
        self.check_block(block_table[read].iter().copied().max())?;
        let mut values = [0f32; MAX_HEAD_DIM];
        let values = &mut values[..self.head_dim];
        for position in start..start + count {
            let (block, token) = (block_table[position / self.block_size], position % self.block_size);
            for head in 0..self.num_kv_heads {
                let record = self.layers[layer].record(block, head);
                page::read_k(self.layout, record, token, values);
                // SAFETY: `&mut self`-like exclusivity of the view: this thread alone writes it.
                unsafe { k.write_row(position - start, head, values) };
                page::read_v(self.layout, record, token, values);
                // SAFETY: as above.
                unsafe { v.write_row(position - start, head, values) };
            }
        }
        Ok(())
    }
}
