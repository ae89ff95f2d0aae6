//! The CPU backend: records in host memory, kernels chosen once a cache, threads those of the process.
//!
//! Results depend neither on the number of threads nor on what else is in the batch: work is cut at fixed places, and
//! the pieces are merged in order.

mod attend;
mod dequantize;
mod dispatch;
mod generic;
mod memory;
mod open;
mod prefill;
mod record_kernel;
mod rows;
mod scalar;
mod seal;
mod simd;
mod tile_kernel;
mod unpack;
mod write;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

pub use dispatch::Level;

use super::memory::LayerMemory;
use super::{
    AttendOptions, Backend, Device, DevicePlan, Fresh, Launch, LayerHealth, Model, Output, Source, Stream, TensorView,
    TensorViewMut,
};
use crate::config::Shape;
use crate::error::{Error, Result};
use crate::format::{Arrangement, RecordLayout};
use crate::paging::{PageId, Place, PlaceKind};
use crate::parallel::Threads;
use crate::plan::{Bounds, StepView};
use dispatch::Kernels;
use memory::Memory;
use std::ops::Range;

/// What the kernels read, and the records here are in.
const ORDER: Arrangement = Arrangement::Cpu;

/// Below this many values touched, waking threads costs more than it brings.
const PARALLEL_VALUES: usize = 1 << 16;

/// One layer's records.
#[derive(Debug)]
struct Layer {
    /// By page.
    pages: Memory,
    /// By block; empty where blocks do not seal.
    tiles: Memory,
    health: LayerHealth,
}

/// Pages and tiles in host memory, and the level that reads them.
#[derive(Debug)]
pub struct Cpu {
    shape: Shape,
    page: RecordLayout,
    tile: Option<RecordLayout>,
    layers: Vec<Layer>,
    kernels: Kernels,
    threads: Threads,
}

impl Cpu {
    /// An empty backend with memory of its own.
    ///
    /// # Errors
    /// What [`Shape::validate`] refuses, [`Error::Unsupported`] for a level that this machine lacks,
    /// [`Error::OutOfMemory`] for more layers than can be listed.
    pub fn new(shape: Shape, level: Level) -> Result<Self> {
        Self::with_tile(shape, shape.tile(), level)
    }

    /// An empty backend whose blocks become such records when they are sealed. A `raw` record holds the rows as they are.
    pub(super) fn with_tile(shape: Shape, tile: Option<RecordLayout>, level: Level) -> Result<Self> {
        let (page, heads) = (shape.page(), shape.num_kv_heads);
        Self::build(shape, tile, level, |_| Layer {
            pages: Memory::new(heads, page.bytes()),
            tiles: Memory::new(heads, tile.unwrap_or(page).bytes()),
            health: LayerHealth::default(),
        })
    }

    /// A backend over memory that the caller owns, one entry a layer. [`Backend::grow`] and [`Backend::try_clone`] do not
    /// apply to it.
    ///
    /// # Safety
    /// Every record is initialized memory, apart from all others, that outlives the backend; between two calls of the
    /// backend it may be moved about by its owner, during a call nobody else reads or writes it.
    ///
    /// # Errors
    /// Those of [`new`](Self::new); [`Error::Config`] for memory that cannot be of this shape
    /// (see [`check`](super::memory::check)).
    pub unsafe fn lent(shape: Shape, level: Level, memory: &[LayerMemory]) -> Result<Self> {
        shape.validate()?;
        super::memory::check(&shape, memory)?;
        let (page, heads) = (shape.page(), shape.num_kv_heads);
        let tile_bytes = shape.at_rest().bytes();
        // SAFETY: the caller's word, and the checks above.
        Self::build(shape, shape.tile(), level, |layer| unsafe {
            Layer {
                pages: Memory::lent(memory[layer].pages, heads, page.bytes()),
                tiles: match memory[layer].tiles {
                    Some(tiles) => Memory::lent(tiles, heads, tile_bytes),
                    None => Memory::new(heads, tile_bytes),
                },
                health: LayerHealth::default(),
            }
        })
    }

    fn build(
        shape: Shape,
        tile: Option<RecordLayout>,
        level: Level,
        layer: impl FnMut(usize) -> Layer,
    ) -> Result<Self> {
        shape.validate()?;
        if !level.is_available() {
            return Err(Error::Unsupported(format!("this machine does not have SIMD level {}", level.name())));
        }
        let mut layers = Vec::new();
        if layers.try_reserve_exact(shape.num_layers).is_err() {
            let bytes = shape.num_layers.saturating_mul(size_of::<Layer>());
            return Err(Error::OutOfMemory { bytes, what: "the list of layers" });
        }
        layers.extend((0..shape.num_layers).map(layer));
        Ok(Self {
            shape,
            page: shape.page(),
            tile,
            layers,
            kernels: dispatch::kernels(level),
            threads: Threads::of_process(),
        })
    }

    /// Is V stored rotated? Where K may be.
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

    fn is_worth_threads(&self, num_tokens: usize) -> bool {
        num_tokens * self.shape.num_kv_heads * self.shape.head_dim >= PARALLEL_VALUES
    }
}

impl Backend for Cpu {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn arrangement(&self) -> Arrangement {
        ORDER
    }

    fn seals(&self) -> bool {
        self.tile.is_some()
    }

    fn capacity(&self) -> Bounds {
        self.layers
            .first()
            .map_or(Bounds::default(), |layer| Bounds { num_pages: layer.pages.num(), num_tiles: layer.tiles.num() })
    }

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

    fn copy_pages(&mut self, copies: &[(PageId, PageId)], _: Stream) -> Result<()> {
        for layer in &mut self.layers {
            copies.iter().for_each(|&(source, destination)| layer.pages.copy(source.0, destination.0));
        }
        Ok(())
    }

    fn read_records(&self, layer: usize, place: Place) -> Result<Vec<u8>> {
        let records: Vec<&[u8]> = (0..self.shape.num_kv_heads).map(|head| self.record(layer, place, head).1).collect();
        Ok(records.concat())
    }

    fn write_records(&mut self, layer: usize, place: Place, records: &[u8]) -> Result<()> {
        let layer = &self.layers[layer];
        let (memory, index) = match place.kind() {
            PlaceKind::Page(page) => (&layer.pages, page.0),
            PlaceKind::Tile(block) => (&layer.tiles, block.0),
        };
        for (head, bytes) in records.chunks_exact(records.len() / self.shape.num_kv_heads).enumerate() {
            // SAFETY: `&mut self` holds the memory exclusively, and one record at a time is asked for.
            unsafe { memory.record_mut(index, head) }.copy_from_slice(bytes);
        }
        Ok(())
    }

    fn try_clone(&self) -> Result<Box<dyn Backend>> {
        let copy = |layer: &Layer| {
            let (pages, tiles) = (layer.pages.try_clone()?, layer.tiles.try_clone()?);
            Ok(Layer { pages, tiles, health: layer.health })
        };
        let layers = self.layers.iter().map(copy).collect::<Result<_>>()?;
        Ok(Box::new(Self { layers, ..*self }))
    }

    fn allocated_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.pages.bytes() + layer.tiles.bytes()).sum()
    }

    fn load(&mut self, _: StepView<'_>, _: Stream) -> Result<Option<DevicePlan>> {
        Ok(None)
    }

    fn unload(&mut self, _: DevicePlan) {}

    fn seal(&mut self, launch: Launch<'_>, layers: Range<usize>, from: Source<'_>, models: &[Model]) -> Result<()> {
        self.seal_blocks(layers, launch.step(), from, models);
        Ok(())
    }

    fn open(&mut self, launch: Launch<'_>, layers: Range<usize>, from: Source<'_>, models: &[Model]) -> Result<()> {
        self.open_pages(layers, launch.step(), from, models);
        Ok(())
    }

    fn write(&mut self, launch: Launch<'_>, layer: usize, new: Fresh<'_>) -> Result<()> {
        self.write_tokens(layer, launch.step(), new);
        Ok(())
    }

    fn refit(&mut self, launch: Launch<'_>, layers: Range<usize>, models: &[Model]) -> Result<()> {
        self.refit_pages(layers, launch.step(), models);
        Ok(())
    }

    fn attend(
        &self,
        launch: Launch<'_>,
        layer: usize,
        q: TensorView<'_>,
        new: Option<Fresh<'_>>,
        options: AttendOptions<'_>,
        output: &Output<'_>,
    ) -> Result<()> {
        self.attend_step(layer, launch.step(), q, new, options, output)
    }

    fn dequantize(
        &self,
        layer: usize,
        places: &[Place],
        start: usize,
        k: &TensorViewMut<'_>,
        v: &TensorViewMut<'_>,
        _: Stream,
    ) -> Result<()> {
        self.dequantize_tokens(layer, places, start, k, v);
        Ok(())
    }

    fn check_finite(&self, launch: Launch<'_>, new: Fresh<'_>) -> Result<()> {
        self.check_finite_rows(launch.step(), new)
    }

    fn read_rows(&self, view: TensorView<'_>, rows: &[usize], _: Stream) -> Result<Vec<f32>> {
        Ok(self.gather_rows(view, rows))
    }

    fn health(&self, layer: usize) -> Result<LayerHealth> {
        Ok(self.layers[layer].health)
    }

    fn forget_health(&mut self) -> Result<()> {
        self.layers.iter_mut().for_each(|layer| layer.health = LayerHealth::default());
        Ok(())
    }
}
