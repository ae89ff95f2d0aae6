//! A quantized, paged key/value cache for LLM inference, with attention that reads the quantized data directly.
//!
//! Tokens are appended to INT8 pages, full pages are sealed into tiles, and attention reads both:
//!
//! ```text
//!          k, v (one step)                                             q
//!             |                                                        |
//!   append -> INT8 page (open) --seal--> tile (packed, immutable) --> attend --> out
//!             ^                    ^                                   ^
//!    opens, token_rows, slots    seals         rows, context_lens, positions, split_start_loc
//!             +--------------------+-----------------------------------+
//!                              StepPlan   integers only, made on the host, in one buffer
//!                                  ^
//!                                plan <- paging (block pool, sequences, places, open pages, prefix index)
//! ```
//!
//! [`format::PlanArray`] lists the arrays of a plan. The table [`paging::Places`], which persists between steps, says where
//! each block of a sequence is read from; `rows` are indices into it.
//!
//! Blocks of `int8` and `raw` stay pages; full blocks of `int4`, `int3` and `int2` are sealed.
//!
//! Start reading at [`cache`], which runs these operations in order; then [`mod@format`] (the byte layout), [`quant`] (the
//! specification of the arithmetic, in scalar f32), [`paging`] and [`plan`] (integers only), and [`backend`] (memory and
//! kernels). A serving engine that has memory and block tables of its own begins at [`engine`]. A module imports only from
//! its own row and those above:
//!
//! | layer | modules |
//! |---|---|
//! | definitions | [`error`], [`mod@format`], [`config`], [`archive`] |
//! | arithmetic | [`quant`] |
//! | allocation | [`paging`] |
//! | planning | [`plan`] |
//! | execution | [`backend`] |
//! | cache | [`calibration`], [`engine`], [`cache`] |
//!
//! ```
//! use kvarn::backend::{AttendOptions, Fresh, TensorView, TensorViewMut};
//! use kvarn::{CacheConfig, PagedKvCache, plan::Rows};
//!
//! let mut cache = PagedKvCache::new(CacheConfig::new(1, 2, 64))?;
//! let sequence = cache.new_sequence();
//! let step = cache.begin_step(&[(sequence, Rows::All(1))], false)?;
//! let (k, v, q) = (vec![0.5; 2 * 64], vec![0.25; 2 * 64], vec![1.0; 8 * 64]);
//! let fresh = Fresh {
//!     k: TensorView::from_slice("k", &k, [1, 2, 1, 64])?,
//!     v: TensorView::from_slice("v", &v, [1, 2, 1, 64])?,
//! };
//! let mut out = vec![0.0; 8 * 64];
//! cache.append(&step, 0, fresh, None)?;
//! cache.attend(
//!     &step,
//!     0,
//!     TensorView::from_slice("q", &q, [1, 8, 1, 64])?,
//!     Some(fresh),
//!     AttendOptions::PLAIN,
//!     TensorViewMut::from_slice("out", &mut out, [1, 8, 1, 64])?,
//! )?;
//! cache.commit(&step)?;
//! assert!(out.iter().all(|x| (x - 0.25).abs() < 1e-3));
//! # Ok::<(), kvarn::Error>(())
//! ```

#[cfg(target_endian = "big")]
compile_error!("big-endian targets are not supported: kernels read little-endian records without conversion");

pub mod archive;
pub mod backend;
pub mod cache;
pub mod calibration;
pub mod config;
pub mod engine;
pub mod error;
pub mod format;
pub mod paging;
mod parallel;
pub mod plan;
pub mod quant;

#[cfg(feature = "python")]
mod py;

pub use cache::{PagedKvCache, Step};
pub use config::CacheConfig;
pub use error::{Error, Result};
