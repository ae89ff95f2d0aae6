//! The CUDA backend: records in a device's memory, kernels compiled beforehand, work queued on the caller's streams.
//!
//! [`params`] and [`layout`] say what kernels are given, and print their header; they are there without the `cuda`
//! feature, as the tests that compare the header are. With it, `Cuda` loads the driver when it is first made: a machine
//! without one can import and build all of this.
//!
//! There are memory, plans and copies. The verbs that encode and attend launch nothing yet: they are refused
//! (`docs/design/20261128-cuda.md`).

pub mod constants;
pub mod layout;
pub mod params;

#[cfg(feature = "cuda")]
mod backend;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda")]
mod launch;
#[cfg(feature = "cuda")]
mod memory;
#[cfg(feature = "cuda")]
mod module;
#[cfg(feature = "cuda")]
mod plan;
#[cfg(feature = "cuda")]
mod records;
#[cfg(feature = "cuda")]
mod rows;

#[cfg(feature = "cuda")]
pub use backend::Cuda;
#[cfg(feature = "cuda")]
pub use driver::{num_devices, start};
