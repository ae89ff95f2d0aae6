//! The CUDA backend: what its kernels are given, and the text of their header.

pub mod constants;
pub mod layout;
pub mod params;
