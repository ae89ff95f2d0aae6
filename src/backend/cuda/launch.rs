//! Launches: a kernel, its grid, and one struct of parameters.

use super::driver::call;
use super::module::Function;
use super::params::{Parameter, PlanPointers};
use crate::backend::DevicePlan;
use crate::error::Result;
use crate::format::PlanArray;
use cudarc::driver::sys;
use std::ptr;

/// The stream behind a number: torch's `cuda_stream`.
pub(super) fn raw(stream: u64) -> sys::CUstream {
    ptr::with_exposed_provenance_mut(stream as usize)
}

/// Blocks and threads of a launch.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Blocks, in three dimensions.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
}

impl Grid {
    /// A grid.
    #[must_use]
    pub const fn new(blocks: [u32; 3], threads: u32) -> Self {
        Self { blocks, threads }
    }
}

impl Function {
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
        let config = sys::CUlaunchConfig {
            gridDimX: grid.blocks[0],
            gridDimY: grid.blocks[1],
            gridDimZ: grid.blocks[2],
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: raw(stream),
            attrs: ptr::null_mut(),
            numAttrs: 0,
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
