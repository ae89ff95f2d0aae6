//! Where each value sits in a record. An [`Arrangement`] gives the byte of every value of every field, by its token and
//! channel; of the codes of a tile, the bit.
//!
//! *Canonical* is the order of the oracle and of files. Every field is whole, at the offset that [`Int8Page`],
//! [`RawPage`] and [`SealedTile`] give it. K and V are `[token][channel]`, in tiles K `[channel][token]`. Codes of tiles
//! follow each other from the low bits of a byte up: code `i` of a 4-bit plane is in byte `i/2` at bit `4 (i mod 2)`, of a
//! 2-bit plane in byte `i/4` at bit `2 (i mod 4)`, of a 1-bit plane in byte `i/8` at bit `i mod 8`.
//!
//! *Cpu* is what the CPU kernels read: fields are whole, at the same offsets, and within them
//!
//! * INT8 codes are sixteen lanes of four values, what a vector unit multiplies without a shuffle or a sum across lanes. A
//!   lane of K is a token, `[token/16][channel/4][16 tokens][4 channels]`; a lane of V is a channel,
//!   `[channel/16][token/4][16 channels][4 tokens]`.
//! * Codes of tiles are in the same lanes, each a word of [`word_codes`] codes: 32 bits of eight 4-bit or sixteen 2-bit
//!   codes, or 16 bits of sixteen 1-bit ones. Shifted by a multiple of the code's width and masked, a word is four codes
//!   in four bytes (1-bit codes: in four nibbles), as an INT8 lane. K `[token/16][channel/codes][16 tokens][codes]`,
//!   V `[channel/16][token/codes][16 channels][codes]`.
//! * `raw` elements are K `[token/16][channel][16 tokens]`, V `[channel/16][token][16 channels]`.
//!
//! The kernels take K panel by panel and V channel group by channel group: both are read front to back.
//!
//! # Another arrangement
//!
//! It is a variant here, and each method says where it keeps that field; nothing else that writes, reads, saves or checks
//! records (`quant::record`) knows of it. It need not keep fields whole: an INT8 page of a GPU may be its channel parameters
//! and then groups of 32 tokens, each `[K codes | V codes | token parameters]`, so that
//! `k_code = header + token / 32 * group + ..` and `parameter(KTokenScale) = header + token / 32 * group + 64 * head_dim + ..`.
//! The tests below hold of every arrangement: values do not overlap and lie within the record, whose length is the
//! same in all; a code's place is the sum of one part for its token and one for its channel, which encoders tabulate.
//! Kernels that read whole fields use the offsets of the layouts, and are tied to arrangements that keep them so.

use super::F16_BYTES;
use super::page::{Int8Page, Int8Parameter, RawPage};
use super::tile::{Plane, SealedTile, TileParameter};

/// Lanes of a panel: tokens side by side in K, channels side by side in V.
pub const LANES: usize = 16;

/// Values of one lane side by side, in INT8 fields.
pub const DEPTH: usize = 4;

/// Codes of one lane's word in a plane of a tile, for planes of 4, 2 or 1 bits.
#[must_use]
pub const fn word_codes(plane_bits: u32) -> usize {
    if plane_bits == 4 { 8 } else { 16 }
}

/// Index of a code whose lane and depth are given: values of a lane lie in words, four of them a quarter of a word apart.
const fn in_words(plane_bits: u32, lane: usize, depth: usize, depth_len: usize) -> usize {
    let word = word_codes(plane_bits);
    let first = (lane / LANES * (depth_len / word) + depth / word) * (LANES * word) + lane % LANES * word;
    let within = depth % word;
    first + within % DEPTH * (word / DEPTH) + within / DEPTH
}

/// An arrangement of the values of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrangement {
    /// That of files.
    Canonical,
    /// What the CPU kernels read.
    Cpu,
}

impl Arrangement {
    /// Every arrangement.
    pub const ALL: [Self; 2] = [Self::Canonical, Self::Cpu];

    /// Byte of an INT8 K code.
    #[must_use]
    pub const fn k_code(self, page: Int8Page, token: usize, channel: usize) -> usize {
        page.k_codes()
            + match self {
                Self::Canonical => token * page.head_dim + channel,
                Self::Cpu => {
                    token / LANES * LANES * page.head_dim
                        + channel / DEPTH * (LANES * DEPTH)
                        + token % LANES * DEPTH
                        + channel % DEPTH
                }
            }
    }

    /// Byte of an INT8 V code.
    #[must_use]
    pub const fn v_code(self, page: Int8Page, token: usize, channel: usize) -> usize {
        page.v_codes()
            + match self {
                Self::Canonical => token * page.head_dim + channel,
                Self::Cpu => {
                    channel / LANES * LANES * page.block_size
                        + token / DEPTH * (LANES * DEPTH)
                        + channel % LANES * DEPTH
                        + token % DEPTH
                }
            }
    }

    /// First byte of a parameter of an INT8 page; `index` is its token or its channel.
    #[must_use]
    pub const fn parameter(self, page: Int8Page, parameter: Int8Parameter, index: usize) -> usize {
        match self {
            Self::Canonical | Self::Cpu => parameter.offset(page) + F16_BYTES * index,
        }
    }

    /// First byte of a `raw` K element.
    #[must_use]
    pub const fn raw_k(self, page: RawPage, token: usize, channel: usize) -> usize {
        let index = match self {
            Self::Canonical => token * page.head_dim + channel,
            Self::Cpu => token / LANES * LANES * page.head_dim + channel * LANES + token % LANES,
        };
        page.k() + page.dtype.bytes() * index
    }

    /// First byte of a `raw` V element.
    #[must_use]
    pub const fn raw_v(self, page: RawPage, token: usize, channel: usize) -> usize {
        let index = match self {
            Self::Canonical => token * page.head_dim + channel,
            Self::Cpu => channel / LANES * LANES * page.block_size + token * LANES + channel % LANES,
        };
        page.v() + page.dtype.bytes() * index
    }

    /// Lowest bit, counted from the record's first, of what `plane` has of a tile's K code.
    #[must_use]
    pub const fn tile_k(self, tile: SealedTile, plane: Plane, token: usize, channel: usize) -> usize {
        let index = match self {
            Self::Canonical => channel * tile.block_size + token,
            Self::Cpu => in_words(plane.bits, token, channel, tile.head_dim),
        };
        8 * (tile.k_codes() + tile.plane(plane)) + plane.bits as usize * index
    }

    /// Lowest bit, counted from the record's first, of what `plane` has of a tile's V code.
    #[must_use]
    pub const fn tile_v(self, tile: SealedTile, plane: Plane, token: usize, channel: usize) -> usize {
        let index = match self {
            Self::Canonical => token * tile.head_dim + channel,
            Self::Cpu => in_words(plane.bits, channel, token, tile.block_size),
        };
        8 * (tile.v_codes() + tile.plane(plane)) + plane.bits as usize * index
    }

    /// First byte of a parameter of a tile; `index` is its token, its channel, or 0.
    #[must_use]
    pub const fn tile_parameter(self, tile: SealedTile, parameter: TileParameter, index: usize) -> usize {
        match self {
            Self::Canonical | Self::Cpu => parameter.offset(tile) + F16_BYTES * index,
        }
    }

    /// Byte of a V code of the sequence's first token, in a tile.
    #[must_use]
    pub const fn first_v(self, tile: SealedTile, channel: usize) -> usize {
        match self {
            Self::Canonical | Self::Cpu => tile.first_v() + channel,
        }
    }

    /// First of the four bytes of a tile's header.
    #[must_use]
    pub const fn header(self, tile: SealedTile) -> usize {
        match self {
            Self::Canonical | Self::Cpu => tile.header(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BLOCK_SIZES, Dtype, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM};
    use super::*;

    fn shapes() -> impl Iterator<Item = (usize, usize)> {
        // Miri is some thousand times as slow: the smallest and the largest.
        let step = if cfg!(miri) { MAX_HEAD_DIM - HEAD_DIM_MULTIPLE } else { HEAD_DIM_MULTIPLE };
        let head_dims = move || (HEAD_DIM_MULTIPLE..=MAX_HEAD_DIM).step_by(step);
        BLOCK_SIZES.into_iter().flat_map(move |block_size| head_dims().map(move |head_dim| (block_size, head_dim)))
    }

    fn tiles() -> impl Iterator<Item = SealedTile> {
        shapes().flat_map(|(block_size, head_dim)| [4, 3, 2].map(|bits| SealedTile { head_dim, block_size, bits }))
    }

    /// Units of a record, each of which one value takes.
    struct Taken(Vec<bool>);

    impl Taken {
        fn take(&mut self, first: usize, count: usize) {
            for at in first..first + count {
                assert!(!self.0[at], "{at} is taken twice");
                self.0[at] = true;
            }
        }

        fn codes(&mut self, block_size: usize, head_dim: usize, size: usize, place: impl Fn(usize, usize) -> usize) {
            for token in 0..block_size {
                for channel in 0..head_dim {
                    let at = place(token, channel);
                    assert_eq!(at + place(0, 0), place(token, 0) + place(0, channel), "token and channel are apart");
                    self.take(at, size);
                }
            }
        }

        fn free(&self) -> usize {
            self.0.iter().filter(|taken| !**taken).count()
        }
    }

    #[test]
    fn the_values_of_an_int8_page_fill_it() {
        for order in Arrangement::ALL {
            for (block_size, head_dim) in shapes() {
                let page = Int8Page { head_dim, block_size };
                let mut bytes = Taken(vec![false; page.bytes()]);
                bytes.codes(block_size, head_dim, 1, |t, d| order.k_code(page, t, d));
                bytes.codes(block_size, head_dim, 1, |t, d| order.v_code(page, t, d));
                for parameter in Int8Parameter::ALL {
                    let places = (0..parameter.count(page)).map(|index| order.parameter(page, parameter, index));
                    places.for_each(|at| bytes.take(at, F16_BYTES));
                }
                assert_eq!(bytes.free(), 0);
            }
        }
    }

    #[test]
    fn the_values_of_a_raw_page_fill_it() {
        for order in Arrangement::ALL {
            for (block_size, head_dim) in shapes() {
                for dtype in [Dtype::F32, Dtype::Bf16] {
                    let page = RawPage { head_dim, block_size, dtype };
                    let mut bytes = Taken(vec![false; page.bytes()]);
                    bytes.codes(block_size, head_dim, dtype.bytes(), |t, d| order.raw_k(page, t, d));
                    bytes.codes(block_size, head_dim, dtype.bytes(), |t, d| order.raw_v(page, t, d));
                    assert_eq!(bytes.free(), 0);
                }
            }
        }
    }

    #[test]
    fn the_values_of_a_tile_fill_it_but_for_its_alignment() {
        for order in Arrangement::ALL {
            for tile in tiles() {
                let SealedTile { head_dim, block_size, .. } = tile;
                let mut bits = Taken(vec![false; 8 * tile.bytes()]);
                for &plane in tile.planes() {
                    bits.codes(block_size, head_dim, plane.bits as usize, |t, d| order.tile_k(tile, plane, t, d));
                    bits.codes(block_size, head_dim, plane.bits as usize, |t, d| order.tile_v(tile, plane, t, d));
                }
                for parameter in TileParameter::ALL {
                    let places = (0..parameter.count(tile)).map(|index| order.tile_parameter(tile, parameter, index));
                    places.for_each(|at| bits.take(8 * at, 8 * F16_BYTES));
                }
                (0..head_dim).for_each(|channel| bits.take(8 * order.first_v(tile, channel), 8));
                bits.take(8 * order.header(tile), 32);
                assert_eq!(bits.free(), 8 * (tile.bytes() - tile.header() - 4));
            }
        }
    }

    #[test]
    fn a_shifted_word_of_a_tile_holds_four_channels_in_four_bytes() {
        for (bits, shift) in [(4, 4), (2, 2)] {
            let tile = SealedTile { head_dim: 64, block_size: 128, bits };
            let bit = |d| Arrangement::Cpu.tile_k(tile, tile.planes()[0], 0, d);
            assert_eq!([0, 1, 2, 3].map(bit), [0, 8, 16, 24]);
            assert_eq!([4, 5, 6, 7].map(bit), [0, 8, 16, 24].map(|first| first + shift));
        }
        let tile = SealedTile { head_dim: 64, block_size: 128, bits: 3 };
        let bit = |d| Arrangement::Cpu.tile_k(tile, tile.planes()[1], 0, d) - 8 * tile.high_plane();
        assert_eq!([0, 1, 2, 3, 4].map(bit), [0, 4, 8, 12, 1]);
    }

    #[test]
    fn cpu_order_puts_four_channels_of_a_token_and_four_tokens_of_a_channel_side_by_side() {
        let (cpu, page) = (Arrangement::Cpu, Int8Page { head_dim: 64, block_size: 128 });
        assert_eq!([0, 1, 2, 3].map(|d| cpu.k_code(page, 5, 8 + d) - cpu.k_code(page, 5, 8)), [0, 1, 2, 3]);
        assert_eq!([0, 1, 2, 3].map(|t| cpu.v_code(page, 4 + t, 9) - cpu.v_code(page, 4, 9)), [0, 1, 2, 3]);
    }

    #[test]
    fn canonical_codes_of_a_tile_follow_each_other_from_the_low_bits_up() {
        let tile = SealedTile { head_dim: 64, block_size: 128, bits: 3 };
        let [low, high] = [tile.planes()[0], tile.planes()[1]];
        let bits =
            |plane| [(0, 0), (1, 0), (5, 0), (0, 1)].map(|(t, d)| Arrangement::Canonical.tile_k(tile, plane, t, d));
        assert_eq!(bits(low), [0, 2, 10, 2 * 128]);
        assert_eq!(bits(high), [0, 1, 5, 128].map(|index| 8 * (64 * 128 / 4) + index));
    }
}
