//! The fields of a sealed tile's record, and where each starts when it is kept whole.

use super::{F16_BYTES, RECORD_ALIGNMENT};

/// `flags` bit of the header: K is kept rotated.
pub const K_ROTATED: u8 = 1;
/// `first_row` of the header where the tile does not hold its sequence's first token.
pub const NO_FIRST_ROW: u8 = 255;
/// `version` of the header.
pub const TILE_VERSION: u8 = 1;

/// The shape of a sealed tile's record, and the offsets of its fields in arrangements that keep them whole. Codes are `bits` wide: of 3 bits, the low two are in a 2-bit plane and the high
/// one in a 1-bit plane behind it.
///
/// | field | type | shape |
/// |---|---|---|
/// | `k_codes` | `bits` | `[head_dim, block_size]`, in an [`Arrangement`](super::Arrangement) |
/// | `v_codes` | `bits` | `[block_size, head_dim]`, in an [`Arrangement`](super::Arrangement) |
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

/// A plane of a tile's codes: their bits from `shift` on, `bits` of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plane {
    /// Bits of each code that the plane has: 4, 2 or 1.
    pub bits: u32,
    /// The lowest of them.
    pub shift: u32,
}

/// The f16 fields of a sealed tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TileParameter {
    /// Scale of a K channel.
    KChannelScale,
    /// Zero point of a K channel.
    KChannelZeroPoint,
    /// Scale of a token's K.
    KTokenScale,
    /// Scale of a token's V.
    VTokenScale,
    /// Zero point of a token's V.
    VTokenZeroPoint,
    /// Scale of the first token's V.
    FirstVScale,
    /// Zero point of the first token's V.
    FirstVZeroPoint,
}

impl TileParameter {
    /// Every parameter, in the order of the fields.
    pub const ALL: [Self; 7] = [
        Self::KChannelScale,
        Self::KChannelZeroPoint,
        Self::KTokenScale,
        Self::VTokenScale,
        Self::VTokenZeroPoint,
        Self::FirstVScale,
        Self::FirstVZeroPoint,
    ];

    /// The field's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::KChannelScale => "k_channel_scale",
            Self::KChannelZeroPoint => "k_channel_zero_point",
            Self::KTokenScale => "k_token_scale",
            Self::VTokenScale => "v_token_scale",
            Self::VTokenZeroPoint => "v_token_zero_point",
            Self::FirstVScale => "first_v scale",
            Self::FirstVZeroPoint => "first_v zero point",
        }
    }

    /// How many of it a tile has: one a channel, one a token, or one.
    #[must_use]
    pub const fn count(self, tile: SealedTile) -> usize {
        match self {
            Self::KChannelScale | Self::KChannelZeroPoint => tile.head_dim,
            Self::KTokenScale | Self::VTokenScale | Self::VTokenZeroPoint => tile.block_size,
            Self::FirstVScale | Self::FirstVZeroPoint => 1,
        }
    }

    /// Offset of the field in `tile`.
    #[must_use]
    pub const fn offset(self, tile: SealedTile) -> usize {
        match self {
            Self::KChannelScale => tile.k_channel_scale(),
            Self::KChannelZeroPoint => tile.k_channel_zero_point(),
            Self::KTokenScale => tile.k_token_scale(),
            Self::VTokenScale => tile.v_token_scale(),
            Self::VTokenZeroPoint => tile.v_token_zero_point(),
            Self::FirstVScale => tile.first_v_scale(),
            Self::FirstVZeroPoint => tile.first_v_zero_point(),
        }
    }
}

impl SealedTile {
    /// The planes of the codes of K, and of V.
    #[must_use]
    pub const fn planes(self) -> &'static [Plane] {
        match self.bits {
            4 => &[Plane { bits: 4, shift: 0 }],
            3 => &[Plane { bits: 2, shift: 0 }, Plane { bits: 1, shift: 2 }],
            _ => &[Plane { bits: 2, shift: 0 }],
        }
    }
    /// Offset, within the codes of K or of V, of a plane.
    #[must_use]
    pub const fn plane(self, plane: Plane) -> usize {
        if plane.shift == 0 { 0 } else { self.high_plane() }
    }
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
