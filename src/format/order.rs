//! Where a code sits within its field. An order is a bijection from (token, channel) to an index.
//!
//! The *canonical* order is the oracle's and that of files: K and V both `[token][channel]`, in tiles K `[channel][token]`;
//! codes of tiles follow each other from the low bits of a byte up. A backend may keep its own:
//!
//! * `Cpu`, INT8 codes: sixteen lanes of four values, what a vector unit multiplies without a shuffle or a sum across
//!   lanes. A lane of K is a token, `[token/16][channel/4][16 tokens][4 channels]`; a lane of V is a channel,
//!   `[channel/16][token/4][16 channels][4 tokens]`.
//! * `Cpu`, codes of tiles: the same lanes, each a word of [`word_codes`] codes: 32 bits of eight 4-bit or sixteen 2-bit
//!   codes, or 16 bits of sixteen 1-bit ones. Shifted by a multiple of the code's width and masked, a word is four codes
//!   in four bytes (1-bit codes: in four nibbles), as an INT8 lane. K `[token/16][channel/codes][16 tokens][codes]`,
//!   V `[channel/16][token/codes][16 channels][codes]`.
//! * `Cpu`, `raw` elements: K `[token/16][channel][16 tokens]`, V `[channel/16][token][16 channels]`.
//!
//! The kernels take K panel by panel and V channel group by channel group: both are read front to back.

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

/// An order of the codes within a field of shape `page`: `[block_size, head_dim]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodeOrder {
    /// `[token][channel]`.
    Canonical,
    /// What the CPU kernels read.
    Cpu,
}

impl CodeOrder {
    /// Every order.
    pub const ALL: [Self; 2] = [Self::Canonical, Self::Cpu];

    /// Index of an INT8 K code.
    #[must_use]
    pub const fn k_code(self, page: [usize; 2], token: usize, channel: usize) -> usize {
        let [_, head_dim] = page;
        match self {
            Self::Canonical => token * head_dim + channel,
            Self::Cpu => {
                token / LANES * LANES * head_dim
                    + channel / DEPTH * (LANES * DEPTH)
                    + token % LANES * DEPTH
                    + channel % DEPTH
            }
        }
    }

    /// Index of an INT8 V code.
    #[must_use]
    pub const fn v_code(self, page: [usize; 2], token: usize, channel: usize) -> usize {
        let [block_size, head_dim] = page;
        match self {
            Self::Canonical => token * head_dim + channel,
            Self::Cpu => {
                channel / LANES * LANES * block_size
                    + token / DEPTH * (LANES * DEPTH)
                    + channel % LANES * DEPTH
                    + token % DEPTH
            }
        }
    }

    /// Index of a K code within a plane of a tile: its lowest bit is bit `index * plane_bits` of the plane.
    #[must_use]
    pub const fn tile_k(self, page: [usize; 2], plane_bits: u32, token: usize, channel: usize) -> usize {
        let [block_size, head_dim] = page;
        match self {
            Self::Canonical => channel * block_size + token,
            Self::Cpu => in_words(plane_bits, token, channel, head_dim),
        }
    }

    /// Index of a V code within a plane of a tile.
    #[must_use]
    pub const fn tile_v(self, page: [usize; 2], plane_bits: u32, token: usize, channel: usize) -> usize {
        let [block_size, head_dim] = page;
        match self {
            Self::Canonical => token * head_dim + channel,
            Self::Cpu => in_words(plane_bits, channel, token, block_size),
        }
    }

    /// Index of a `raw` K element.
    #[must_use]
    pub const fn raw_k(self, page: [usize; 2], token: usize, channel: usize) -> usize {
        let [_, head_dim] = page;
        match self {
            Self::Canonical => token * head_dim + channel,
            Self::Cpu => token / LANES * LANES * head_dim + channel * LANES + token % LANES,
        }
    }

    /// Index of a `raw` V element.
    #[must_use]
    pub const fn raw_v(self, page: [usize; 2], token: usize, channel: usize) -> usize {
        let [block_size, head_dim] = page;
        match self {
            Self::Canonical => token * head_dim + channel,
            Self::Cpu => channel / LANES * LANES * block_size + token * LANES + channel % LANES,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BLOCK_SIZES, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM};
    use super::*;

    fn assert_bijection(index: impl Fn(usize, usize) -> usize, block_size: usize, head_dim: usize) {
        let mut hit = vec![false; block_size * head_dim];
        for token in 0..block_size {
            for channel in 0..head_dim {
                let at = index(token, channel);
                assert!(!hit[at], "index {at} is taken twice at token {token}, channel {channel}");
                hit[at] = true;
            }
        }
    }

    #[test]
    fn every_order_is_a_bijection() {
        // Miri is some thousand times as slow: the smallest and the largest.
        let step = if cfg!(miri) { MAX_HEAD_DIM - HEAD_DIM_MULTIPLE } else { HEAD_DIM_MULTIPLE };
        for order in CodeOrder::ALL {
            for block_size in BLOCK_SIZES {
                for head_dim in (HEAD_DIM_MULTIPLE..=MAX_HEAD_DIM).step_by(step) {
                    assert_bijection(|t, d| order.k_code([block_size, head_dim], t, d), block_size, head_dim);
                    assert_bijection(|t, d| order.v_code([block_size, head_dim], t, d), block_size, head_dim);
                    assert_bijection(|t, d| order.raw_k([block_size, head_dim], t, d), block_size, head_dim);
                    assert_bijection(|t, d| order.raw_v([block_size, head_dim], t, d), block_size, head_dim);
                    for bits in [4, 2, 1] {
                        assert_bijection(|t, d| order.tile_k([block_size, head_dim], bits, t, d), block_size, head_dim);
                        assert_bijection(|t, d| order.tile_v([block_size, head_dim], bits, t, d), block_size, head_dim);
                    }
                }
            }
        }
    }

    #[test]
    fn a_shifted_word_of_a_tile_holds_four_channels_in_four_bytes() {
        for (bits, shift) in [(4, 4), (2, 2)] {
            let bit = |d| CodeOrder::Cpu.tile_k([128, 64], bits, 0, d) * bits as usize;
            assert_eq!([0, 1, 2, 3].map(bit), [0, 8, 16, 24]);
            assert_eq!([4, 5, 6, 7].map(bit), [0, 8, 16, 24].map(|first| first + shift));
        }
        assert_eq!([0, 1, 2, 3, 4].map(|d| CodeOrder::Cpu.tile_k([128, 64], 1, 0, d)), [0, 4, 8, 12, 1]);
    }

    #[test]
    fn cpu_order_puts_four_channels_of_a_token_and_four_tokens_of_a_channel_side_by_side() {
        let cpu = CodeOrder::Cpu;
        assert_eq!([0, 1, 2, 3].map(|d| cpu.k_code([128, 64], 5, 8 + d) - cpu.k_code([128, 64], 5, 8)), [0, 1, 2, 3]);
        assert_eq!([0, 1, 2, 3].map(|t| cpu.v_code([128, 64], 4 + t, 9) - cpu.v_code([128, 64], 4, 9)), [0, 1, 2, 3]);
    }
}
