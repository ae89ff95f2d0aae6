//! kvarn keeps the key/value cache of an LLM quantized, in pages, and attends to it without unpacking it first.
//!
//! A token's life is four verbs:
//!
//! ```text
//!          k, v (one step)                                             q
//!             |                                                        |
//!   append -> INT8 page (open) --seal--> tile (packed, immutable) --> attend --> out
//!             ^                    ^                                   ^
//!    opens, token_rows, slots    seals              rows, context_lens, positions, splits
//!             +--------------------+-----------------------------------+
//!                              StepPlan   integers only, made on the host, in one buffer
//!                                  ^
//!                                plan <- paging (block pool, sequences, places, open pages, prefix index)
//! ```
//!
//! The arrays of a plan are those of [`format::PlanArray`]. Where each block of a sequence is read stands in the table of
//! [`paging::Places`], which persists; `rows` are its rows.
//!
//! `int8` and `raw` blocks stay pages; `int4`, `int3` and `int2` ones are sealed when they are full.
//!
//! Start reading at [`cache`], the only file that orders the verbs; then [`mod@format`] (what each byte means), [`quant`]
//! (the specification, in scalar f32), [`paging`] and [`plan`] (integers), [`backend`] (the work). Imports point down:
//!
//! | layer | modules |
//! |---|---|
//! | words | [`error`], [`mod@format`], [`config`], [`archive`] |
//! | maths | [`quant`] |
//! | places | [`paging`] |
//! | intent | [`plan`] |
//! | work | [`backend`] |
//! | story | [`cache`], [`calibration`] |
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
compile_error!("records and files are little-endian, and are used as they lie in memory: there is no big-endian build");

pub mod archive;
pub mod backend;
pub mod cache;
pub mod calibration;
pub mod config;
pub mod error;
pub mod format;
pub mod paging;
pub mod plan;
pub mod quant;

#[cfg(feature = "python")]
mod py;

pub use cache::{PagedKvCache, Step};
pub use config::CacheConfig;
pub use error::{Error, Result};
