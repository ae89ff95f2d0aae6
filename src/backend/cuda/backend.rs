//! The backend: memory, plans, copies and counters. Verbs that encode and attend are refused.

use super::driver::Context;
use super::launch::Grid;
use super::layout::HEALTH_SLOTS;
use super::memory::Buffer;
use super::module::{Function, Kernels};
use super::params::{CopyParams, HealthSlot};
use super::plan::Plans;
use super::records::Memory;
use super::rows::read_rows;
use crate::backend::memory::{LayerMemory, check};
use crate::backend::{
    AttendOptions, Backend, Device, DevicePlan, Fresh, Launch, LayerHealth, Model, Output, Source, Stream, TensorView,
    TensorViewMut,
};
use crate::config::Shape;
use crate::error::{Error, Result};
use crate::format::Arrangement;
use crate::paging::{PageId, Place};
use crate::plan::{Bounds, StepView};
use std::ops::Range;
use std::sync::Arc;

const SLOT_BYTES: usize = size_of::<HealthSlot>();
/// Pages that one launch copies.
const COPIES: usize = 64;

/// Pages and tiles in the memory of a CUDA device.
#[derive(Debug)]
pub struct Cuda {
    pub(super) shape: Shape,
    pub(super) memory: Memory,
    pub(super) kernels: Arc<Kernels>,
    copy_pages: Function,
    plans: Plans,
    /// `HealthSlot [num_layers][HEALTH_SLOTS]`
    health: Buffer,
    /// Dropped last.
    pub(super) context: Arc<Context>,
}

impl Cuda {
    /// An empty backend with memory of its own, on the device of this index.
    ///
    /// # Errors
    /// What [`Shape::validate`] refuses, [`Error::Unsupported`] where there is no driver, no such device or none that the
    /// kernels run on, [`Error::OutOfMemory`], [`Error::Driver`].
    pub fn new(shape: Shape, device: u32) -> Result<Self> {
        shape.validate()?;
        let context = Arc::new(Context::new(device)?);
        let memory = Memory::new(&context, shape)?;
        Self::build(shape, context, memory)
    }

    /// A backend over memory of the device that the caller owns, one entry a layer. [`Backend::grow`] and
    /// [`Backend::try_clone`] do not apply to it.
    ///
    /// # Safety
    /// Every record is memory of the device, apart from all others, that outlives the backend and the work that it has
    /// queued; nobody else reads or writes it but in the order of the streams that the backend's work is queued on.
    ///
    /// # Errors
    /// Those of [`new`](Self::new); [`Error::Config`] for memory that cannot be of this shape
    /// (see [`check`](crate::backend::memory::check)).
    pub unsafe fn lent(shape: Shape, device: u32, layers: &[LayerMemory]) -> Result<Self> {
        shape.validate()?;
        check(&shape, layers)?;
        let context = Arc::new(Context::new(device)?);
        let memory = Memory::lent(&context, shape, layers)?;
        Self::build(shape, context, memory)
    }

    fn build(shape: Shape, context: Arc<Context>, memory: Memory) -> Result<Self> {
        let kernels = Kernels::of(&context)?;
        let copy_pages = kernels.function("copy_pages")?;
        let plans = Plans::new(Arc::clone(&context), kernels.function("change_places")?);
        let health = Buffer::zeroed(&context, shape.num_layers * HEALTH_SLOTS * SLOT_BYTES)?;
        Ok(Self { shape, memory, kernels, copy_pages, plans, health, context })
    }

    /// Which build of the kernels the device runs: `sm_90`, or `compute_90` where its driver compiled them.
    #[must_use]
    pub fn kernels(&self) -> &str {
        &self.kernels.source
    }
}

/// What a verb says whose kernels this build does not launch.
fn refused<T>(verb: &str) -> Result<T> {
    Err(Error::Unsupported(format!("CUDA: this build does not {verb} on a device")))
}

impl Backend for Cuda {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn device(&self) -> Device {
        Device::Cuda(self.context.index)
    }

    fn arrangement(&self) -> Arrangement {
        Arrangement::Cuda
    }

    fn capacity(&self) -> Bounds {
        self.memory.capacity()
    }

    fn grow(&mut self, num_blocks: usize, num_pages: usize) -> Result<()> {
        self.memory.grow(num_blocks, num_pages)
    }

    fn copy_pages(&mut self, copies: &[(PageId, PageId)], stream: Stream) -> Result<()> {
        let _entered = self.context.enter()?;
        let grid = Grid::new([self.shape.num_kv_heads as u32, self.shape.num_layers as u32, 1], 256);
        for chunk in copies.chunks(COPIES) {
            let mut parameters = CopyParams {
                layers: self.memory.list(0),
                record_bytes: self.shape.page().bytes() as i32,
                num_copies: chunk.len() as i32,
                copies: [0; 2 * COPIES],
            };
            for (pair, (from, to)) in parameters.copies.as_chunks_mut().0.iter_mut().zip(chunk) {
                *pair = [from.0 as i32, to.0 as i32];
            }
            // SAFETY: what the kernel takes; the pages are within the memory, as an executor has checked.
            unsafe { self.copy_pages.launch(grid, &parameters, stream.0) }?;
        }
        Ok(())
    }

    fn read_records(&self, layer: usize, place: Place) -> Result<Vec<u8>> {
        self.memory.read(layer, place)
    }

    fn write_records(&mut self, layer: usize, place: Place, records: &[u8]) -> Result<()> {
        self.memory.write(layer, place, records)
    }

    fn try_clone(&self) -> Result<Box<dyn Backend>> {
        let memory = self.memory.try_clone()?;
        let copy = Self::build(self.shape, Arc::clone(&self.context), memory)?;
        copy.health.write(&self.health.read(self.health.bytes)?)?;
        Ok(Box::new(copy))
    }

    fn allocated_bytes(&self) -> usize {
        self.memory.bytes()
    }

    fn load(&mut self, step: StepView<'_>, stream: Stream) -> Result<Option<DevicePlan>> {
        self.plans.load(step, stream.0).map(Some)
    }

    fn unload(&mut self, plan: DevicePlan) {
        self.plans.unload(&plan);
    }

    fn seal(&mut self, _: Launch<'_>, _: Range<usize>, _: Source<'_>, _: &[Model]) -> Result<()> {
        refused("seal blocks")
    }

    fn open(&mut self, _: Launch<'_>, _: Range<usize>, _: Source<'_>, _: &[Model]) -> Result<()> {
        refused("open pages")
    }

    fn write(&mut self, _: Launch<'_>, _: usize, _: Fresh<'_>) -> Result<()> {
        refused("write tokens")
    }

    fn refit(&mut self, _: Launch<'_>, _: Range<usize>, _: &[Model]) -> Result<()> {
        refused("refit pages")
    }

    fn attend(
        &self,
        _: Launch<'_>,
        _: usize,
        _: TensorView<'_>,
        _: Option<Fresh<'_>>,
        _: AttendOptions<'_>,
        _: &Output<'_>,
    ) -> Result<()> {
        refused("attend")
    }

    fn dequantize(
        &self,
        _: usize,
        _: &[Place],
        _: usize,
        _: &TensorViewMut<'_>,
        _: &TensorViewMut<'_>,
        _: Stream,
    ) -> Result<()> {
        refused("dequantize tokens")
    }

    fn check_finite(&self, _: Launch<'_>, _: Fresh<'_>) -> Result<()> {
        Ok(()) // kernels store finite values for others, and count them
    }

    fn read_rows(&self, view: TensorView<'_>, rows: &[usize], _: Stream) -> Result<Vec<f32>> {
        read_rows(&self.context, view, rows)
    }

    /// Means are over all that was written since the counters were last forgotten, and a token counts once a head.
    fn health(&self, layer: usize) -> Result<LayerHealth> {
        let bytes = self.health.read(self.health.bytes)?;
        let slots = bytes.chunks_exact(SLOT_BYTES).skip(layer * HEALTH_SLOTS).take(HEALTH_SLOTS);
        let (mut squares, mut counts) = (0.0, [0u64; SLOT_BYTES / 8 - 1]);
        for slot in slots {
            let words = slot.as_chunks::<8>().0;
            squares += f64::from_le_bytes(words[0]);
            counts.iter_mut().zip(&words[1..]).for_each(|(sum, word)| *sum += u64::from_le_bytes(*word));
        }
        let [num_rows, num_codes, num_clamped, out_of_range, _] = counts;
        let codes = [num_codes, num_clamped];
        Ok(LayerHealth::counted(squares, num_rows, self.shape.head_dim, codes, out_of_range))
    }

    fn forget_health(&mut self) -> Result<()> {
        self.context.wait()?;
        self.health.write(&vec![0; self.health.bytes])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CacheConfig;

    #[test]
    fn without_a_driver_or_such_a_device_the_error_is_typed() {
        let found = Cuda::new(CacheConfig::new(1, 1, 64).shape(), 9_999);
        assert!(matches!(found, Err(Error::Unsupported(_))), "{found:?}");
    }
}
