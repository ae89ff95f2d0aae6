//! What each byte of the cache means.
//!
//! A *block* is `block_size` tokens of one layer, all key/value heads. It is stored as one *record* per head, heads in
//! order: a *page* while tokens are written to it, and, in formats that seal, a *tile* once it is full. [`kind`] names the
//! formats, [`page`] and [`tile`] list the fields of a record, [`record`] chooses among them, [`order`] says where each
//! value of a field sits in the record, [`emit`] prints all of it for other languages and for the golden file.
//!
//! Nothing here computes on values: `core` only. `quant::record` reads and writes records.

pub mod emit;
pub mod kind;
pub mod order;
pub mod page;
pub mod plan_layout;
pub mod record;
pub mod tile;

pub use kind::{Dtype, Format};
pub use order::Arrangement;
pub use page::{Int8Page, Int8Parameter, LOW_BYTES, RawPage};
pub use plan_layout::{PlanArray, PlanLayout};
pub use record::{RecordLayout, page_bytes, record_bytes};
pub use tile::{Plane, SealedTile, TileParameter};

/// Records start on multiples of this many bytes.
pub const RECORD_ALIGNMENT: usize = 16;

/// Bytes of a parameter.
const F16_BYTES: usize = 2;

/// Version of everything in this module; a change of any byte raises it.
pub const FORMAT_VERSION: u32 = 2;

/// How many of the tokens before a new page its channel statistics are taken over.
pub const STATISTICS_TOKENS: usize = 512;

/// The statistics of a sequence's first page are taken anew as tokens are appended, until they are this many. Up to
/// then the rows past the middle of the page have room for the low bytes of K ([`Int8Page::low_row`]).
#[must_use]
pub const fn first_page_tokens(block_size: usize) -> usize {
    block_size / 2
}

/// The accepted numbers of tokens in a block. Small blocks make small tests.
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
