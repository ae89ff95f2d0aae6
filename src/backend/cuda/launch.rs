//! Launches: a kernel, its grid, and one struct of parameters.

use super::driver::call;
use super::module::Function;
use super::params::{self, Parameter, PlanPointers};
use crate::backend::{DevicePlan, TensorView, TensorViewMut};
use crate::error::Result;
use crate::format::PlanArray;
use cudarc::driver::sys;
use std::ptr;

/// The stream behind a number: torch's `cuda_stream`.
pub(super) fn raw(stream: u64) -> sys::CUstream {
    ptr::with_exposed_provenance_mut(stream as usize)
}

/// Blocks, threads and dynamic shared memory of a launch.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Blocks, in three dimensions.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory; above 48 KB [`Function::allow_shared`] is called once before.
    pub shared_bytes: u32,
    /// May the kernel start before the one before it has ended? It waits by `griddepcontrol.wait`.
    pub overlaps: bool,
}

impl Grid {
    /// A grid without dynamic shared memory.
    #[must_use]
    pub const fn new(blocks: [u32; 3], threads: u32) -> Self {
        Self { blocks, threads, shared_bytes: 0, overlaps: false }
    }
}

impl Function {
    /// Lets blocks have so much dynamic shared memory.
    ///
    /// # Errors
    /// Those of the driver.
    #[expect(dead_code, reason = "for decode and seal")]
    pub fn allow_shared(self, bytes: u32) -> Result<()> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function's module stays loaded.
        unsafe { call!(cuFuncSetAttribute(self.0, attribute, bytes as i32)) }
    }

    /// Queues the kernel; nothing where the grid is empty. The context is current.
    ///
    /// # Safety
    /// The kernel takes these parameters, and the addresses in them are good until it has run.
    ///
    /// # Errors
    /// Those of the driver, of this launch or of work before it.
    pub unsafe fn launch<P: Parameter>(self, grid: Grid, parameters: &P, stream: u64) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        // SAFETY: a struct of numbers; each attribute is set below before it is read.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: grid.blocks[0],
            gridDimY: grid.blocks[1],
            gridDimZ: grid.blocks[2],
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared_bytes,
            hStream: raw(stream),
            attrs: &raw mut attribute,
            numAttrs: u32::from(grid.overlaps),
        };
        let mut pointers = [ptr::from_ref(parameters).cast_mut().cast()];
        // SAFETY: the caller's word; the driver copies the parameters before it returns.
        unsafe { call!(cuLaunchKernelEx(&raw const config, self.0, pointers.as_mut_ptr(), ptr::null_mut())) }
    }
}

impl From<&DevicePlan> for PlanPointers {
    fn from(plan: &DevicePlan) -> Self {
        let mut starts = [0; PlanArray::ALL.len() + 1];
        for array in PlanArray::ALL {
            let words = plan.layout.range(array);
            starts[array as usize] = words.start as i32;
            starts[array as usize + 1] = words.end as i32;
        }
        Self { words: plan.words, places: plan.places, places_stride: plan.places_stride as i32, starts }
    }
}

impl From<TensorView<'_>> for params::Tensor {
    fn from(view: TensorView<'_>) -> Self {
        Self { base: view.address(), strides: view.strides() }
    }
}

impl From<&TensorViewMut<'_>> for params::Tensor {
    fn from(view: &TensorViewMut<'_>) -> Self {
        Self { base: view.address(), strides: view.strides() }
    }
}
