//! The plan of a step, where a backend reads it, and the stream that its work goes to.

use super::{Device, Stream};
use crate::format::{PlanArray, PlanLayout};
use crate::plan::{Bounds, StepView};

/// What the verbs of one step are told.
#[derive(Debug, Clone, Copy)]
pub struct Launch<'a> {
    /// The plan.
    pub plan: Plan<'a>,
    /// Where the work is queued.
    pub stream: Stream,
}

impl<'a> Launch<'a> {
    /// A step whose plan is read on the host.
    #[must_use]
    pub const fn host(step: StepView<'a>) -> Self {
        Self { plan: Plan::Host(step), stream: Stream(0) }
    }

    /// The plan of a backend that reads it on the host.
    ///
    /// # Panics
    /// When it is on another device; an [`Executor`](super::Executor) refuses that.
    pub(super) fn step(&self) -> StepView<'a> {
        match self.plan {
            Plan::Host(step) => step,
            Plan::Device(plan) => unreachable!("a plan on {}", plan.device),
        }
    }
}

/// A plan in the memory of the device that reads it.
#[derive(Debug, Clone, Copy)]
pub enum Plan<'a> {
    /// In host memory, its numbers known.
    Host(StepView<'a>),
    /// In the memory of another device, its numbers perhaps known to the device alone.
    Device(DevicePlan),
}

/// A plan by addresses of a device: a copy of the host's, or made by the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevicePlan {
    /// The device.
    pub device: Device,
    /// Address of the plan's words.
    pub words: u64,
    /// Where each array is among the words. Of a plan that the device made, the records that each has room for.
    pub layout: PlanLayout,
    /// Address of the table of places.
    pub places: u64,
    /// Entries of a row of the table.
    pub places_stride: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// Queries see this many tokens at most.
    pub window: Option<usize>,
    /// What the backend must have memory for.
    pub bounds: Bounds,
}

impl Plan<'_> {
    /// Tokens of a block.
    #[must_use]
    pub fn block_size(&self) -> usize {
        match self {
            Self::Host(step) => step.block_size(),
            Self::Device(plan) => plan.block_size,
        }
    }

    /// What the backend must have memory for.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        match self {
            Self::Host(step) => step.bounds(),
            Self::Device(plan) => plan.bounds,
        }
    }

    /// Where each array is among the words.
    #[must_use]
    pub fn layout(&self) -> &PlanLayout {
        match self {
            Self::Host(step) => step.layout(),
            Self::Device(plan) => &plan.layout,
        }
    }

    /// Token rows of the step's tensors, padding included.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.layout().count(PlanArray::Positions)
    }

    /// The device that reads it.
    #[must_use]
    pub fn device(&self) -> Device {
        match self {
            Self::Host(_) => Device::Cpu,
            Self::Device(plan) => plan.device,
        }
    }
}
