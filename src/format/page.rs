//! The fields of a page's record, where each starts when it is kept whole: `raw` pages and INT8 pages.

use super::kind::Dtype;
use super::{F16_BYTES, RECORD_ALIGNMENT};
use half::f16;

/// The `k_token_scale` of a row that holds the low bytes of another token's K codes; those of tokens are not negative.
pub const LOW_BYTES: f16 = f16::NEG_ONE;

/// The shape of an INT8 page's record, and the offsets of its fields in arrangements that keep them whole.
///
/// | field | type | shape |
/// |---|---|---|
/// | `k_codes` | i8, -127 to 127 | `[block_size, head_dim]`, in an [`Arrangement`](super::Arrangement) |
/// | `v_codes` | u8 | `[block_size, head_dim]`, in an [`Arrangement`](super::Arrangement) |
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

/// The f16 fields of an INT8 page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Int8Parameter {
    /// Scale of a token's K codes.
    KTokenScale,
    /// Scale of a token's V codes.
    VTokenScale,
    /// Zero point of a token's V codes.
    VTokenZeroPoint,
    /// Mean of a K channel.
    KChannelMean,
    /// Scale of a K channel.
    KChannelScale,
}

impl Int8Parameter {
    /// Every parameter, in the order of the fields.
    pub const ALL: [Self; 5] =
        [Self::KTokenScale, Self::VTokenScale, Self::VTokenZeroPoint, Self::KChannelMean, Self::KChannelScale];

    /// The field's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::KTokenScale => "k_token_scale",
            Self::VTokenScale => "v_token_scale",
            Self::VTokenZeroPoint => "v_token_zero_point",
            Self::KChannelMean => "k_channel_mean",
            Self::KChannelScale => "k_channel_scale",
        }
    }

    /// How many of it a page has: one a token, or one a channel.
    #[must_use]
    pub const fn count(self, page: Int8Page) -> usize {
        match self {
            Self::KTokenScale | Self::VTokenScale | Self::VTokenZeroPoint => page.block_size,
            Self::KChannelMean | Self::KChannelScale => page.head_dim,
        }
    }

    /// Offset of the field in `page`.
    #[must_use]
    pub const fn offset(self, page: Int8Page) -> usize {
        match self {
            Self::KTokenScale => page.k_token_scale(),
            Self::VTokenScale => page.v_token_scale(),
            Self::VTokenZeroPoint => page.v_token_zero_point(),
            Self::KChannelMean => page.k_channel_mean(),
            Self::KChannelScale => page.k_channel_scale(),
        }
    }
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

/// The shape of a `raw` page's record, and the offsets of its fields: K, then V, `[block_size, head_dim]` elements each.
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
