//! Where each field of a record starts, in bytes from the record's first. A record is one (block, kv head).

use super::kind::{Dtype, Format};
use super::tile::SealedTile;
use half::f16;

/// Records start on multiples of this many bytes.
pub const RECORD_ALIGNMENT: usize = 16;

pub(super) const F16_BYTES: usize = 2;

/// The `k_token_scale` of a row that holds the low bytes of another token's K codes; those of tokens are not negative.
pub const LOW_BYTES: f16 = f16::NEG_ONE;

/// Offsets of an INT8 page's record.
///
/// | field | type | shape |
/// |---|---|---|
/// | `k_codes` | i8, -127 to 127 | `[block_size, head_dim]`, in a [`super::CodeOrder`] |
/// | `v_codes` | u8 | `[block_size, head_dim]`, in a [`super::CodeOrder`] |
/// | `k_token_scale` | f16 | `[block_size]` |
/// | `v_token_scale` | f16 | `[block_size]` |
/// | `v_token_zero_point` | f16 | `[block_size]`, in units of V |
/// | `k_channel_mean` | f16 | `[head_dim]` |
/// | `k_channel_scale` | f16 | `[head_dim]` |
///
/// In a sequence's first page, token `t` of the first half has the low bytes of its K codes (i8, units of 1/256 of a
/// code) as the K codes of row [`low_row(t)`](Self::low_row), marked by [`LOW_BYTES`] as that row's `k_token_scale`, until
/// a token is written to the row. Refitting the page reads them, so that it does not round K twice; attention does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Int8Page {
    /// Channels of one head.
    pub head_dim: usize,
    /// Tokens of one page.
    pub block_size: usize,
}

impl Int8Page {
    /// Offset of the K codes.
    #[must_use]
    pub const fn k_codes(self) -> usize {
        0
    }
    /// Offset of the V codes.
    #[must_use]
    pub const fn v_codes(self) -> usize {
        self.block_size * self.head_dim
    }
    /// Offset of the K scales, one a token.
    #[must_use]
    pub const fn k_token_scale(self) -> usize {
        2 * self.block_size * self.head_dim
    }
    /// The row that has the low bytes of a token's K codes, in a first page.
    #[must_use]
    pub const fn low_row(self, token: usize) -> usize {
        self.block_size - 1 - token
    }
    /// Does a first page of `num_tokens` tokens have the low bytes of this one's K codes?
    #[must_use]
    pub const fn has_low_bytes(self, token: usize, num_tokens: usize) -> bool {
        token < super::first_page_tokens(self.block_size) && self.low_row(token) >= num_tokens
    }
    /// Offset of the V scales, one a token.
    #[must_use]
    pub const fn v_token_scale(self) -> usize {
        self.k_token_scale() + F16_BYTES * self.block_size
    }
    /// Offset of the V zero points, one a token.
    #[must_use]
    pub const fn v_token_zero_point(self) -> usize {
        self.v_token_scale() + F16_BYTES * self.block_size
    }
    /// Offset of the K means, one a channel.
    #[must_use]
    pub const fn k_channel_mean(self) -> usize {
        self.v_token_zero_point() + F16_BYTES * self.block_size
    }
    /// Offset of the K scales, one a channel.
    #[must_use]
    pub const fn k_channel_scale(self) -> usize {
        self.k_channel_mean() + F16_BYTES * self.head_dim
    }
    /// Bytes of the record.
    #[must_use]
    pub const fn bytes(self) -> usize {
        (self.k_channel_scale() + F16_BYTES * self.head_dim).next_multiple_of(RECORD_ALIGNMENT)
    }
}

/// Offsets of a `raw` page's record: K, then V, each `[block_size, head_dim]` elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawPage {
    /// Channels of one head.
    pub head_dim: usize,
    /// Tokens of one page.
    pub block_size: usize,
    /// Element type.
    pub dtype: Dtype,
}

impl RawPage {
    /// Offset of K.
    #[must_use]
    pub const fn k(self) -> usize {
        0
    }
    /// Offset of V.
    #[must_use]
    pub const fn v(self) -> usize {
        self.block_size * self.head_dim * self.dtype.bytes()
    }
    /// Bytes of the record.
    #[must_use]
    pub const fn bytes(self) -> usize {
        (2 * self.v()).next_multiple_of(RECORD_ALIGNMENT)
    }
}

/// Bytes of the record of one (block, kv head) at rest: a page, or a tile in formats that seal. `dtype` is the element
/// type of `raw` pages and says nothing of others.
#[must_use]
pub const fn record_bytes(format: Format, dtype: Dtype, head_dim: usize, block_size: usize) -> usize {
    match format.tile_bits() {
        Some(bits) => SealedTile { head_dim, block_size, bits }.bytes(),
        None => page_bytes(format, dtype, head_dim, block_size),
    }
}

/// Bytes of the page that one (block, kv head) is while tokens are written to it.
#[must_use]
pub const fn page_bytes(format: Format, dtype: Dtype, head_dim: usize, block_size: usize) -> usize {
    match format {
        Format::Raw => RawPage { head_dim, block_size, dtype }.bytes(),
        _ => Int8Page { head_dim, block_size }.bytes(),
    }
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
