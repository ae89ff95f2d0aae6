//! What does each byte mean?
//!
//! A *block* is `block_size` tokens of one layer, all key/value heads. It is stored as one *record* per head, heads in
//! order: a *page* while tokens are written to it, and, in formats that seal, a *tile* once it is full. [`kind`] names the
//! formats, [`layout`] and [`tile`] place every field of a record, [`order`] says where a code sits within its field,
//! [`emit`] prints all of it for other languages and for the golden file.
//!
//! Nothing here computes on values: `core` only.

pub mod emit;
pub mod kind;
pub mod layout;
pub mod order;
pub mod plan_layout;
pub mod tile;

pub use kind::{Dtype, Format};
pub use layout::{LOW_BYTES, RawPage, TokenPage, page_bytes, record_bytes};
pub use order::CodeOrder;
pub use plan_layout::{PlanArray, PlanLayout};
pub use tile::SealedTile;

/// Version of everything in this module; a change of any byte raises it.
pub const FORMAT_VERSION: u32 = 2;

/// Tokens of the calibration window: how far a new page looks back for its channel statistics.
pub const CALIBRATION_WINDOW_TOKENS: usize = 512;

/// The statistics of a sequence's first page are taken anew as tokens are appended, until they are this many. Up to
/// then the rows past the middle of the page have room for the low bytes of K ([`TokenPage::low_row`]).
#[must_use]
pub const fn first_page_tokens(block_size: usize) -> usize {
    block_size / 2
}

/// The accepted numbers of tokens in a block. The GPU takes 128 only; small blocks make small tests.
pub const BLOCK_SIZES: [usize; 4] = [16, 32, 64, 128];

/// The largest `head_dim`; it is a multiple of [`HEAD_DIM_MULTIPLE`].
pub const MAX_HEAD_DIM: usize = 256;

/// What `head_dim` must be a multiple of: the lanes of a panel (see [`order`]).
pub const HEAD_DIM_MULTIPLE: usize = 16;

/// Is `head_dim` one that pages can hold?
#[must_use]
pub const fn supports_head_dim(head_dim: usize) -> bool {
    head_dim > 0 && head_dim <= MAX_HEAD_DIM && head_dim.is_multiple_of(HEAD_DIM_MULTIPLE)
}

/// Is `block_size` one of [`BLOCK_SIZES`]?
#[must_use]
pub const fn supports_block_size(block_size: usize) -> bool {
    matches!(block_size, 16 | 32 | 64 | 128)
}
