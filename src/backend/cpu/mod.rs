//! The CPU backend: records in host memory, kernels chosen once a cache, threads by rayon.
//!
//! Results depend neither on the number of threads nor on what else is in the batch: work is cut at fixed places, and
//! the pieces are merged in order.

mod append;
mod arena;
mod attend;
mod dispatch;
mod generic;
mod health;
mod prefill;
mod record_kernel;
mod saved;
mod scalar;
mod seal;
mod simd;
mod tile_kernel;
mod unpack;

#[cfg(target_arch = "x86_64")]
mod avx2;

pub use dispatch::Level;
pub use health::LayerHealth;

use super::{AttendOptions, Backend, Fresh, TensorView, TensorViewMut};
use crate::error::{Error, Result};
use crate::format::{Arrangement, BLOCK_SIZES, Dtype, Format, RecordLayout, supports_block_size, supports_head_dim};
use crate::paging::{PageId, Place, PlaceKind};
use crate::plan::{Bounds, StepView};
use crate::quant::{self, Codec, HeadCalibration, record};
use arena::Arena;
use dispatch::Kernels;

/// What the kernels read, and the records here are in.
const ORDER: Arrangement = Arrangement::Cpu;

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
    /// Quantize `raw` pages in place, for evaluation.
    pub codec: Option<Codec>,
}

/// One layer's records.
#[derive(Debug)]
struct Layer {
    /// By page.
    pages: Arena,
    /// By block; empty where blocks do not seal.
    tiles: Arena,
    health: LayerHealth,
}

/// Pages in host memory, and the level that reads them.
#[derive(Debug)]
pub struct Cpu {
    page: RecordLayout,
    /// What blocks become when they are sealed; of a codec, raw records again.
    tile: Option<RecordLayout>,
    codec: Option<Codec>,
    num_kv_heads: usize,
    head_dim: usize,
    block_size: usize,
    layers: Vec<Layer>,
    kernels: Kernels,
}

impl Cpu {
    /// An empty backend.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a `head_dim` that pages do not hold or a level that this machine lacks;
    /// [`Error::Config`] for a block size, or a number of heads, that cannot be, or a codec on quantized pages;
    /// [`Error::OutOfMemory`] for more layers
    /// than can be listed.
    pub fn new(config: CpuConfig, level: Level) -> Result<Self> {
        let CpuConfig { format, dtype, num_layers, num_kv_heads, head_dim, block_size, codec } = config;
        if !supports_head_dim(head_dim) {
            return Err(Error::Unsupported(format!("head_dim {head_dim}: pages hold multiples of 16 up to 256")));
        }
        if !supports_block_size(block_size) {
            return Err(Error::Config(format!("block_size must be one of {BLOCK_SIZES:?}, got {block_size}")));
        }
        if codec.is_some() && format != Format::Raw {
            return Err(Error::Config(format!("a codec works on raw pages, not on {}", format.name())));
        }
        let page = RecordLayout::page(format, dtype, head_dim, block_size);
        let coded = codec.is_some_and(|codec| !codec.is_per_token()).then_some(page);
        let tile = RecordLayout::tile(format, head_dim, block_size).or(coded);
        if num_kv_heads == 0 || num_kv_heads.checked_mul(page.bytes()).is_none_or(|n| n > isize::MAX as usize / 2) {
            return Err(Error::Config(format!("num_kv_heads {num_kv_heads}: no block can be of so many heads")));
        }
        if !level.is_available() {
            return Err(Error::Unsupported(format!("this machine does not have SIMD level {}", level.name())));
        }
        let mut layers = Vec::new();
        if layers.try_reserve_exact(num_layers).is_err() {
            let bytes = num_layers.saturating_mul(size_of::<Layer>());
            return Err(Error::OutOfMemory { bytes, what: "the list of layers" });
        }
        layers.extend((0..num_layers).map(|_| Layer {
            pages: Arena::new(num_kv_heads, page.bytes()),
            tiles: Arena::new(num_kv_heads, tile.unwrap_or(page).bytes()),
            health: LayerHealth::default(),
        }));
        let kernels = dispatch::kernels(level);
        Ok(Self { page, tile, codec, num_kv_heads, head_dim, block_size, layers, kernels })
    }

    /// A backend with the same pages, in memory of its own.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn try_clone(&self) -> Result<Self> {
        let copy = |layer: &Layer| {
            let (pages, tiles) = (layer.pages.try_clone()?, layer.tiles.try_clone()?);
            Ok(Layer { pages, tiles, health: layer.health })
        };
        let layers = self.layers.iter().map(copy).collect::<Result<_>>()?;
        Ok(Self { layers, ..*self })
    }

    /// How well the statistics and grids of a layer fit what was written to it.
    #[must_use]
    pub fn health(&self, layer: usize) -> LayerHealth {
        self.layers.get(layer).map_or_else(LayerHealth::default, |layer| layer.health)
    }

    /// What quantizes `raw` pages in place.
    #[must_use]
    pub fn codec(&self) -> Option<Codec> {
        self.codec
    }

    /// Begins [`Self::health`] anew in every layer.
    pub fn forget_health(&mut self) {
        self.layers.iter_mut().for_each(|layer| layer.health = LayerHealth::default());
    }

    /// Is V kept rotated? Where K may be.
    fn rotates_v(&self) -> bool {
        matches!(self.tile, Some(RecordLayout::Tile(_)))
    }

    /// The record of a page or tile, and its layout.
    fn record(&self, layer: usize, place: Place, head: usize) -> (RecordLayout, &[u8]) {
        let layer = &self.layers[layer];
        match place.kind() {
            PlaceKind::Page(page) => (self.page, layer.pages.record(page.0, head)),
            PlaceKind::Tile(block) => (self.tile.unwrap_or(self.page), layer.tiles.record(block.0, head)),
        }
    }

    /// Is this a plan, and a layer, that this backend's pages can be used with?
    fn check_plan(&self, layer: usize, step: StepView<'_>) -> Result<()> {
        self.check_layer(layer)?;
        if step.block_size() != self.block_size {
            let (planned, size) = (step.block_size(), self.block_size);
            return Err(Error::Config(format!("a plan for blocks of {planned} tokens, pages of {size}")));
        }
        self.check_bounds(step.bounds())
    }

    fn check_layer(&self, layer: usize) -> Result<()> {
        if layer < self.layers.len() {
            return Ok(());
        }
        Err(Error::Config(format!("layer {layer}: the backend has {} layers", self.layers.len())))
    }

    /// Is there memory for the pages and tiles?
    fn check_bounds(&self, bounds: Bounds) -> Result<()> {
        let layer = self.layers.first();
        let (num_pages, num_tiles) =
            layer.map_or((0, 0), |layer| (layer.pages.num_records(), layer.tiles.num_records()));
        for (bound, num_blocks) in [(bounds.num_tiles, num_tiles), (bounds.num_pages, num_pages)] {
            if bound > num_blocks {
                return Err(Error::UnknownBlock { id: (bound - 1) as u32, num_blocks });
            }
        }
        Ok(())
    }

    /// Bytes of address space that the pages take; a page takes memory when it is first used.
    #[must_use]
    pub fn allocated_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.pages.bytes() + layer.tiles.bytes()).sum()
    }
}

impl Backend for Cpu {
    fn grow(&mut self, num_blocks: usize, num_pages: usize) -> Result<()> {
        let num_tiles = if self.tile.is_some() { num_blocks } else { 0 };
        let of_layer =
            |layer: &Layer| layer.pages.missing_bytes(num_pages).saturating_add(layer.tiles.missing_bytes(num_tiles));
        let bytes = self.layers.iter().map(of_layer).fold(0, usize::saturating_add);
        // A system that hands out memory when it is first used refuses only what no machine could give, and only in
        // one piece: ask for the whole first.
        if std::hint::black_box(&mut Vec::<u8>::new()).try_reserve_exact(bytes).is_err() {
            return Err(Error::OutOfMemory { bytes, what: "pages" });
        }
        self.layers.iter_mut().try_for_each(|layer| {
            layer.pages.grow(num_pages)?;
            layer.tiles.grow(num_tiles)
        })
    }

    fn copy_pages(&mut self, copies: &[(PageId, PageId)]) {
        for layer in &mut self.layers {
            copies.iter().for_each(|&(source, destination)| layer.pages.copy(source.0, destination.0));
        }
    }

    fn check_append(&self, layer: usize, step: StepView<'_>, fresh: Fresh<'_>) -> Result<()> {
        self.check_plan(layer, step)?;
        self.check_fresh(step, fresh)
    }

    fn append(&mut self, layer: usize, step: StepView<'_>, fresh: Fresh<'_>, heads: &[HeadCalibration]) -> Result<()> {
        self.check_plan(layer, step)?;
        self.append_step(layer, step, fresh, heads)
    }

    fn refit(&mut self, layer: usize, step: StepView<'_>, heads: &[HeadCalibration]) {
        self.refit_pages(layer, step, heads);
    }

    fn read_records(&self, layer: usize, place: Place) -> Vec<u8> {
        (0..self.num_kv_heads).flat_map(|head| self.record(layer, place, head).1).copied().collect()
    }

    fn write_records(&mut self, layer: usize, place: Place, records: &[u8]) {
        let layer = &self.layers[layer];
        let (arena, index) = match place.kind() {
            PlaceKind::Page(page) => (&layer.pages, page.0),
            PlaceKind::Tile(block) => (&layer.tiles, block.0),
        };
        for (head, bytes) in records.chunks_exact(records.len() / self.num_kv_heads).enumerate() {
            // SAFETY: `&mut self` holds the arena exclusively, and one record at a time is asked for.
            unsafe { arena.record_mut(index, head) }.copy_from_slice(bytes);
        }
    }

    fn attend(
        &self,
        layer: usize,
        step: StepView<'_>,
        q: TensorView<'_>,
        fresh: Option<Fresh<'_>>,
        options: AttendOptions<'_>,
        out: TensorViewMut<'_>,
    ) -> Result<()> {
        self.check_plan(layer, step)?;
        self.attend_step(layer, step, q, fresh, options, &out)
    }

    fn dequantize(
        &self,
        layer: usize,
        places: &[Place],
        start: usize,
        k: TensorViewMut<'_>,
        v: TensorViewMut<'_>,
    ) -> Result<()> {
        self.check_layer(layer)?;
        let count = k.shape()[0].saturating_mul(k.shape()[2]);
        k.check("k", self.num_kv_heads, count, self.head_dim)?;
        v.check("v", self.num_kv_heads, count, self.head_dim)?;
        let num_tokens = places.len() * self.block_size;
        if start.saturating_add(count) > num_tokens {
            return Err(Error::Shape {
                name: "k",
                expected: format!("at most {num_tokens} tokens from {start} on"),
                got: k.shape().to_vec(),
            });
        }
        let read = start / self.block_size..(start + count).div_ceil(self.block_size);
        self.check_bounds(Bounds::of(&places[read.clone()]))?;
        let mut rows = vec![0f32; self.block_size * self.head_dim];
        for block in read {
            let first = start.max(block * self.block_size);
            let end = (start + count).min((block + 1) * self.block_size);
            for head in 0..self.num_kv_heads {
                let (layout, record) = self.record(layer, places[block], head);
                let tokens = |rows: &[f32], view: &TensorViewMut<'_>| {
                    for position in first..end {
                        let row = &rows[position % self.block_size * self.head_dim..][..self.head_dim];
                        // SAFETY: `&mut self`-like exclusivity of the view: this thread alone writes it.
                        unsafe { view.write_row(position - start, head, row) };
                    }
                };
                record::read_k(layout, ORDER, record, &mut rows);
                tokens(&rows, &k);
                record::read_v(layout, ORDER, record, &mut rows);
                if self.rotates_v() {
                    rows.chunks_exact_mut(self.head_dim).for_each(quant::hadamard::rotate);
                }
                tokens(&rows, &v);
            }
        }
        Ok(())
    }
}
