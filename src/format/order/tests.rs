//! What holds of every arrangement, and what the kernels of each want of it.

use super::*;
use crate::format::{BLOCK_SIZES, Dtype, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM};

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
        self.modulo(None, [block_size, head_dim], size, place);
    }

    /// Takes the places of codes, each the sum of two parts; of two words and of two bits in a word, where they wrap.
    fn modulo(
        &mut self,
        word: Option<usize>,
        [block_size, head_dim]: [usize; 2],
        size: usize,
        place: impl Fn(usize, usize) -> usize,
    ) {
        let add = |token: usize, channel: usize, none: usize| match word {
            None => token + channel - none,
            Some(word) => {
                let words = token / word + channel / word - none / word;
                words * word + (token % word + channel % word - none % word) % word
            }
        };
        for token in 0..block_size {
            for channel in 0..head_dim {
                let at = place(token, channel);
                let sum = add(place(token, 0), place(0, channel), place(0, 0));
                assert_eq!(at, sum, "token {token} and channel {channel} of {head_dim} are apart");
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
                let word = order.wraps(tile, plane).then_some(32);
                let (shape, size) = ([block_size, head_dim], plane.bits as usize);
                bits.modulo(word, shape, size, |t, d| order.tile_k(tile, plane, t, d));
                bits.modulo(word, shape, size, |t, d| order.tile_v(tile, plane, t, d));
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
    let bits = |plane| [(0, 0), (1, 0), (5, 0), (0, 1)].map(|(t, d)| Arrangement::Canonical.tile_k(tile, plane, t, d));
    assert_eq!(bits(low), [0, 2, 10, 2 * 128]);
    assert_eq!(bits(high), [0, 1, 5, 128].map(|index| 8 * (64 * 128 / 4) + index));
}

#[test]
fn a_lane_of_cuda_order_loads_four_fragments_of_4_bits_at_once_and_each_word_is_one_operand() {
    let tile = SealedTile { head_dim: 128, block_size: 128, bits: 4 };
    let bit = |t, d| Arrangement::Cuda.tile_k(tile, tile.planes()[0], t, d);
    let word = |t, d| bit(t, d) / 32;
    assert_eq!([0, 4, 32, 36].map(|d| word(0, d)), [0, 1, 2, 3]); // fragments of lane 0
    assert_eq!([8, 16, 24].map(|d| word(0, d)), [4, 8, 12]); // lanes 1 to 3: the next channels
    assert_eq!([1, 2, 7].map(|t| word(t, 0)), [16, 32, 112]); // lanes 4, 8, 28: the next tokens
    // Registers h + 2 j are nibbles of a half of the word, low and high code of a register are in different halves.
    assert_eq!([(0, 0), (8, 0), (0, 2), (8, 2), (0, 1), (8, 3)].map(|(t, d)| bit(t, d)), [0, 4, 8, 12, 16, 28]);
}

#[test]
fn three_bits_of_cuda_order_are_side_by_side_once_their_planes_are_masked_and_shifted() {
    let tile = SealedTile { head_dim: 128, block_size: 128, bits: 3 };
    let [low, high] = [tile.planes()[0], tile.planes()[1]];
    for (t, d) in [(0, 0), (8, 3), (7, 31), (25, 4), (31, 7), (120, 100), (127, 127), (127, 126)] {
        let fragment = Arrangement::Cuda.tile_k(tile, low, t, d) / 2 % 2;
        let second = d / 32 % 2; // of the pairs of fragments in a word of the high plane
        let at = Arrangement::Cuda.tile_k(tile, low, t, d) % 32;
        let above = Arrangement::Cuda.tile_k(tile, high, t, d) % 32;
        assert_eq!((at % 4, (above + 32 - second) % 32), (2 * fragment, (at + 2) % 32), "token {t}, channel {d}");
    }
}

#[test]
fn an_int8_page_of_cuda_order_is_channel_parameters_and_then_whole_groups_of_32_tokens() {
    for block_size in BLOCK_SIZES {
        let page = Int8Page { head_dim: 80, block_size };
        let (order, tokens) = (Arrangement::Cuda, block_size.min(32));
        let (header, bytes) = (4 * page.head_dim, tokens * (2 * page.head_dim + 6));
        assert_eq!(order.parameter(page, Int8Parameter::KChannelScale, 0), 2 * page.head_dim);
        for t in 0..block_size {
            let group = header + t / tokens * bytes;
            let parameters = [Int8Parameter::KTokenScale, Int8Parameter::VTokenScale, Int8Parameter::VTokenZeroPoint];
            for (number, parameter) in parameters.into_iter().enumerate() {
                let field = group + 2 * tokens * page.head_dim + 2 * tokens * number;
                assert!((field..field + 2 * tokens).contains(&order.parameter(page, parameter, t)));
            }
            for d in 0..page.head_dim {
                assert!((group..group + tokens * page.head_dim).contains(&order.k_code(page, t, d)));
                let v = group + tokens * page.head_dim;
                assert!((v..v + tokens * page.head_dim).contains(&order.v_code(page, t, d)));
            }
        }
    }
}

#[test]
fn the_four_tokens_of_a_lane_have_their_parameters_side_by_side_in_cuda_order() {
    let tile = SealedTile { head_dim: 64, block_size: 64, bits: 4 };
    let at = |t| Arrangement::Cuda.tile_parameter(tile, TileParameter::VTokenScale, t) - tile.v_token_scale();
    assert_eq!([0, 8, 16, 24, 1, 32].map(at), [0, 2, 4, 6, 8, 64]);
    let small = SealedTile { head_dim: 64, block_size: 16, bits: 4 };
    let at = |t| Arrangement::Cuda.tile_parameter(small, TileParameter::KTokenScale, t) - small.k_token_scale();
    assert_eq!([0, 8, 1, 15].map(at), [0, 2, 4, 30]);
}
