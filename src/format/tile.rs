//! Where each field of a sealed tile's record starts.

use super::layout::{F16_BYTES, RECORD_ALIGNMENT};

/// `flags` bit of the header: K is kept rotated.
pub const K_ROTATED: u8 = 1;
/// `first_row` of the header where the tile does not hold its sequence's first token.
pub const NO_FIRST_ROW: u8 = 255;
/// `version` of the header.
pub const TILE_VERSION: u8 = 1;

/// Offsets of a sealed tile's record. Codes are `bits` wide: of 3 bits, the low two are in a 2-bit plane and the high
/// one in a 1-bit plane behind it.
///
/// | field | type | shape |
/// |---|---|---|
/// | `k_codes` | `bits` | `[head_dim, block_size]`, in a [`super::CodeOrder`] |
/// | `v_codes` | `bits` | `[block_size, head_dim]`, in a [`super::CodeOrder`] |
/// | `k_channel_scale` | f16 | `[head_dim]` |
/// | `k_channel_zero_point` | f16 | `[head_dim]`, in units of K over its token scale |
/// | `k_token_scale` | f16 | `[block_size]` |
/// | `v_token_scale` | f16 | `[block_size]` |
/// | `v_token_zero_point` | f16 | `[block_size]`, in units of V |
/// | `first_v` | u8, f16, f16 | `[head_dim]` codes, scale, zero point |
/// | header | u8 | `version`, `flags`, `first_row`, 0 |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealedTile {
    /// Channels of one head.
    pub head_dim: usize,
    /// Tokens of one tile.
    pub block_size: usize,
    /// Bits of a code: 4, 3 or 2.
    pub bits: u32,
}

impl SealedTile {
    /// Bytes of the codes of K, or of V.
    #[must_use]
    pub const fn code_bytes(self) -> usize {
        self.block_size * self.head_dim * self.bits as usize / 8
    }
    /// Offset of the K codes.
    #[must_use]
    pub const fn k_codes(self) -> usize {
        0
    }
    /// Offset of the V codes.
    #[must_use]
    pub const fn v_codes(self) -> usize {
        self.code_bytes()
    }
    /// Offset, within the codes of K or of V, of the 1-bit plane of 3-bit codes.
    #[must_use]
    pub const fn high_plane(self) -> usize {
        self.block_size * self.head_dim / 4
    }
    /// Offset of the K scales, one a channel.
    #[must_use]
    pub const fn k_channel_scale(self) -> usize {
        2 * self.code_bytes()
    }
    /// Offset of the K zero points, one a channel.
    #[must_use]
    pub const fn k_channel_zero_point(self) -> usize {
        self.k_channel_scale() + F16_BYTES * self.head_dim
    }
    /// Offset of the K scales, one a token.
    #[must_use]
    pub const fn k_token_scale(self) -> usize {
        self.k_channel_zero_point() + F16_BYTES * self.head_dim
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
    /// Offset of the first token's V codes, one a channel.
    #[must_use]
    pub const fn first_v(self) -> usize {
        self.v_token_zero_point() + F16_BYTES * self.block_size
    }
    /// Offset of the first token's V scale.
    #[must_use]
    pub const fn first_v_scale(self) -> usize {
        self.first_v() + self.head_dim
    }
    /// Offset of the first token's V zero point.
    #[must_use]
    pub const fn first_v_zero_point(self) -> usize {
        self.first_v_scale() + F16_BYTES
    }
    /// Offset of the header: `version`, `flags`, `first_row`, 0.
    #[must_use]
    pub const fn header(self) -> usize {
        self.first_v_zero_point() + F16_BYTES
    }
    /// Bytes of the record.
    #[must_use]
    pub const fn bytes(self) -> usize {
        (self.header() + 4).next_multiple_of(RECORD_ALIGNMENT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_take_the_bytes_that_the_format_names() {
        for (head_dim, bytes) in
            [(128, [17_808, 13_712, 9_616]), (64, [9_296, 7_248, 5_200]), (256, [34_832, 26_640, 18_448])]
        {
            assert_eq!([4, 3, 2].map(|bits| SealedTile { head_dim, block_size: 128, bits }.bytes()), bytes);
        }
    }
}
