//! The order of the CUDA kernels. Codes lie as operand A of `mma.m16n8k16`, so that a lane of a warp reads its operands
//! with 16-byte loads, without a shuffle: rows are tokens in K and channels in V.
//!
//! Sixteen tokens of all channels are `head_dim / 16` *fragments* of 16 x 16 codes. Of a fragment, lane `4 g + t` has eight
//! codes: those of rows `g + 8 h` and columns `2 t + 8 j + e`, where `h`, `j` and `e` are 0 or 1.
//!
//! * K: row `token % 16`. Of each 32 channels lane `t` has the eight from `8 t` on, in two fragments; of the last sixteen,
//!   where `head_dim` is not a multiple of 32, it has four in one.
//! * V: column `token % 16`. Lane `g` has the `head_dim / 8` channels from `g * head_dim / 8` on.
//!
//! Fragments that share 32 bits of a plane are a *unit*: of 2-bit codes two, of 1-bit codes four; half as many, or one,
//! where the number of fragments is no multiple. A unit of a lane follows the one before it where both fit a 16-byte load;
//! then the next lane follows, and after 32 lanes the next units. Where units do not fill such loads, a lane has all of
//! its units side by side.
//!
//! * A `raw` page is groups of 16 tokens, each its K, then its V.
//! * An INT8 page is its means and scales of channels, then groups of 32 tokens (16, in a block of 16), each its K codes,
//!   its V codes and its three parameters of tokens.
//! * A tile has its fields at the offsets of the layout.
//!
//! Parameters of tokens are permuted in groups of 32: the four of rows `g` and `g + 8` of two fragments are side by side.

use super::super::F16_BYTES;
use super::super::page::{Int8Page, Int8Parameter, RawPage};

/// Tokens of a fragment.
pub(super) const FRAGMENT: usize = 16;
const LANES: usize = 32;
/// What a lane loads at once.
const LOAD_BITS: usize = 128;
/// Tokens of a group of an INT8 page, and of permuted parameters.
const GROUP_TOKENS: usize = 32;

/// A code's place among the fragments.
#[derive(Clone, Copy)]
pub(super) struct Spot {
    num_fragments: usize,
    group: usize,
    fragment: usize,
    lane: usize,
    h: usize,
    j: usize,
    e: usize,
}

/// The place of a K code.
pub(super) const fn k_spot(head_dim: usize, token: usize, channel: usize) -> Spot {
    let (fragment, t) = if channel / 32 < head_dim / 32 {
        (channel / 32 * 2 + channel / 4 % 2, channel / 8 % 4)
    } else {
        (channel / 16, channel / 4 % 4)
    };
    Spot {
        num_fragments: head_dim / FRAGMENT,
        group: token / FRAGMENT,
        fragment,
        lane: token % 8 * 4 + t,
        h: token / 8 % 2,
        j: channel / 2 % 2,
        e: channel % 2,
    }
}

/// The place of a V code.
pub(super) const fn v_spot(head_dim: usize, token: usize, channel: usize) -> Spot {
    let channels = head_dim / 8;
    Spot {
        num_fragments: head_dim / FRAGMENT,
        group: token / FRAGMENT,
        fragment: channel % channels / 2,
        lane: channel / channels * 4 + token % 8 / 2,
        h: channel % 2,
        j: token / 8 % 2,
        e: token % 2,
    }
}

impl Spot {
    /// Index of a `raw` element among all of K, or of V.
    pub(super) const fn raw(self) -> usize {
        self.in_units(1, LOAD_BITS, (self.h + 2 * self.j) * 2 + self.e)
    }

    /// Index of an INT8 code.
    pub(super) const fn int8(self) -> usize {
        self.in_units(1, 64, self.h * 4 + self.j * 2 + self.e)
    }

    /// Index of a tile's code in a plane.
    pub(super) const fn tile(self, plane_bits: u32) -> usize {
        let Self { fragment, h, j, e, .. } = self;
        let natural = e * 4 + j * 2 + h;
        match (plane_bits, fragments_of_unit(plane_bits, self.num_fragments)) {
            (4, _) => self.in_units(1, 32, natural),
            (2, 2) => self.in_units(2, 32, natural * 2 + fragment % 2),
            (2, _) => self.in_units(1, 16, (j * 2 + h) * 2 + e),
            // Above the two low bits of its code, once these are masked: bit 2 of its nibble, or bit 0 of the next.
            (_, 4) if fragment.is_multiple_of(2) => self.in_units(4, 32, natural * 4 + 2 + fragment / 2 % 2),
            (_, 4) => self.in_units(4, 32, (natural * 4 + 4 + fragment / 2 % 2) % 32),
            (_, 2) => self.in_units(2, 16, (j * 2 + h) * 4 + fragment % 2 * 2 + e),
            _ => self.in_units(1, 8, natural),
        }
    }

    /// Index of a code: of its unit, of so many fragments and bits, the code `within`.
    const fn in_units(self, fragments: usize, unit_bits: usize, within: usize) -> usize {
        let (units, unit) = (self.num_fragments / fragments, self.fragment / fragments);
        let a_load = LOAD_BITS / unit_bits;
        let side_by_side = if units.is_multiple_of(a_load) { a_load } else { units };
        let load = self.group * (units / side_by_side) + unit / side_by_side;
        ((load * LANES + self.lane) * side_by_side + unit % side_by_side) * 8 * fragments + within
    }
}

/// Fragments of a unit, in a plane: those that fit 32 bits, if they divide the number of fragments.
const fn fragments_of_unit(plane_bits: u32, num_fragments: usize) -> usize {
    let mut fragments = 4 / plane_bits as usize;
    while !num_fragments.is_multiple_of(fragments) {
        fragments /= 2;
    }
    fragments
}

/// Is a code's bit the sum of what token and channel have only modulo 32, within their word? See [`Spot::tile`].
pub(super) const fn wraps(plane_bits: u32, head_dim: usize) -> bool {
    plane_bits == 1 && fragments_of_unit(1, head_dim / FRAGMENT) == 4
}

/// Index of a token's parameter, among those of a block.
pub(super) const fn token_index(block_size: usize, token: usize) -> usize {
    if block_size < GROUP_TOKENS {
        return token % 8 * 2 + token / 8;
    }
    token / GROUP_TOKENS * GROUP_TOKENS + token % 8 * 4 + token / 16 % 2 * 2 + token / 8 % 2
}

const fn group_tokens(page: Int8Page) -> usize {
    if page.block_size < GROUP_TOKENS { page.block_size } else { GROUP_TOKENS }
}

/// First byte of a token's group in an INT8 page.
const fn group(page: Int8Page, token: usize) -> usize {
    let tokens = group_tokens(page);
    2 * F16_BYTES * page.head_dim + token / tokens * (tokens * (2 * page.head_dim + 3 * F16_BYTES))
}

/// Byte of an INT8 K code.
pub(super) const fn k_code(page: Int8Page, token: usize, channel: usize) -> usize {
    group(page, token) + k_spot(page.head_dim, token % group_tokens(page), channel).int8()
}

/// Byte of an INT8 V code.
pub(super) const fn v_code(page: Int8Page, token: usize, channel: usize) -> usize {
    let tokens = group_tokens(page);
    group(page, token) + tokens * page.head_dim + v_spot(page.head_dim, token % tokens, channel).int8()
}

/// First byte of a parameter of an INT8 page.
pub(super) const fn parameter(page: Int8Page, parameter: Int8Parameter, index: usize) -> usize {
    let number = match parameter {
        Int8Parameter::KChannelMean => return F16_BYTES * index,
        Int8Parameter::KChannelScale => return F16_BYTES * (page.head_dim + index),
        Int8Parameter::KTokenScale => 0,
        Int8Parameter::VTokenScale => 1,
        Int8Parameter::VTokenZeroPoint => 2,
    };
    let tokens = group_tokens(page);
    let among = token_index(page.block_size, index) % tokens;
    group(page, index) + 2 * tokens * page.head_dim + F16_BYTES * (number * tokens + among)
}

/// First byte of a `raw` K element.
pub(super) const fn raw_k(page: RawPage, token: usize, channel: usize) -> usize {
    raw(page, token, k_spot(page.head_dim, token % FRAGMENT, channel))
}

/// First byte of a `raw` V element.
pub(super) const fn raw_v(page: RawPage, token: usize, channel: usize) -> usize {
    let k_bytes = FRAGMENT * page.head_dim * page.dtype.bytes();
    k_bytes + raw(page, token, v_spot(page.head_dim, token % FRAGMENT, channel))
}

const fn raw(page: RawPage, token: usize, spot: Spot) -> usize {
    page.dtype.bytes() * (token / FRAGMENT * 2 * FRAGMENT * page.head_dim + spot.raw())
}
