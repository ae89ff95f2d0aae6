//! The layout of a record: a `raw` page, an INT8 page or a sealed tile, of one (block, kv head).

use super::kind::{Dtype, Format};
use super::page::{Int8Page, RawPage};
use super::tile::SealedTile;

/// What a record is, and its shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordLayout {
    /// An unquantized page.
    Raw(RawPage),
    /// An INT8 page.
    Int8(Int8Page),
    /// A sealed tile.
    Tile(SealedTile),
}

impl RecordLayout {
    /// The page that tokens of a format are written to. `dtype` is the element type of `raw` pages and says nothing of
    /// others.
    #[must_use]
    pub const fn page(format: Format, dtype: Dtype, head_dim: usize, block_size: usize) -> Self {
        match format {
            Format::Raw => Self::Raw(RawPage { head_dim, block_size, dtype }),
            _ => Self::Int8(Int8Page { head_dim, block_size }),
        }
    }

    /// The tile that full blocks of a format become, if it seals.
    #[must_use]
    pub const fn tile(format: Format, head_dim: usize, block_size: usize) -> Option<Self> {
        match format.tile_bits() {
            Some(bits) => Some(Self::Tile(SealedTile { head_dim, block_size, bits })),
            None => None,
        }
    }

    /// Bytes of the record, in every arrangement.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Raw(page) => page.bytes(),
            Self::Int8(page) => page.bytes(),
            Self::Tile(tile) => tile.bytes(),
        }
    }

    /// Is it a `raw` page?
    #[must_use]
    pub const fn is_raw(self) -> bool {
        matches!(self, Self::Raw(_))
    }
}

/// Bytes of the record of one (block, kv head) at rest: a page, or a tile in formats that seal. `dtype` is the element
/// type of `raw` pages and says nothing of others.
#[must_use]
pub const fn record_bytes(format: Format, dtype: Dtype, head_dim: usize, block_size: usize) -> usize {
    match RecordLayout::tile(format, head_dim, block_size) {
        Some(tile) => tile.bytes(),
        None => page_bytes(format, dtype, head_dim, block_size),
    }
}

/// Bytes of the record of one (block, kv head) as an open page.
#[must_use]
pub const fn page_bytes(format: Format, dtype: Dtype, head_dim: usize, block_size: usize) -> usize {
    RecordLayout::page(format, dtype, head_dim, block_size).bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn int8_takes_266_bytes_a_token_at_128_channels_and_136_at_64() {
        assert_eq!(record_bytes(Format::Int8, Dtype::Bf16, 128, 128), 266 * 128);
        assert_eq!(record_bytes(Format::Int8, Dtype::Bf16, 64, 128), 136 * 128);
    }

    #[test]
    fn what_seals_is_a_tile_at_rest_and_an_int8_page_while_open() {
        assert_eq!(record_bytes(Format::Int4, Dtype::Bf16, 128, 128), 17_808);
        assert_eq!(page_bytes(Format::Int4, Dtype::Bf16, 128, 128), 266 * 128);
    }

    #[test]
    fn raw_takes_512_bytes_a_token_at_128_channels_in_bf16() {
        assert_eq!(record_bytes(Format::Raw, Dtype::Bf16, 128, 128), 512 * 128);
        assert_eq!(record_bytes(Format::Raw, Dtype::F32, 128, 16), 1024 * 16);
    }
}
