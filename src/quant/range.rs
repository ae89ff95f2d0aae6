//! Which tokens does f16 not hold? A stored parameter is an f16: one that would be larger is 65504, and a scale that would
//! be much smaller is 0 or far from what it should be. What is decoded then is not what came, and nothing else says so.
//!
//! | | beyond f16 | below f16 |
//! |---|---|---|
//! | V of a token | its scale or its zero point | its scale, and it is not constant |
//! | K of a token in a page | its scale | (deviations of its channels that small do not matter) |
//! | K of a tile | the scale or zero point of a channel | the scales of all channels, and they are not constant |
//!
//! A page's channel statistics only choose how K is divided up: what they miss is in the token's scale.

use super::tile::Tile;
use half::f16;

/// A scale below this, 2^-21, has fewer than four bits in f16: codes miss the ends of their range by a 16th or more.
const SMALLEST_SCALE: f16 = f16::from_bits(8);

/// Tokens of a block, bit by bit.
pub type TokenSet = u128;

/// Is the K of a token in a page, of this `k_token_scale`, out of range?
#[inline(always)]
#[must_use]
pub fn k_is_out_of_range(token_scale: f16) -> bool {
    is_at_the_end(token_scale)
}

/// Is a row of V that is stored under these parameters?
#[inline(always)]
#[must_use]
pub fn v_is_out_of_range(row: &[f32], scale: f16, zero_point: f16) -> bool {
    // The end of f16 is itself a value: that of models which clamp to it.
    let end = f16::MAX.to_f32();
    let least = || row.iter().copied().fold(f32::INFINITY, f32::min);
    is_at_the_end(scale)
        || is_at_the_end(zero_point) && !(-end..=end).contains(&least())
        || scale < SMALLEST_SCALE && !is_constant(row.iter())
}

/// The tokens of a tile that are out of range in K or V; `k` and `v_rotated` are the rows that it was made of.
#[must_use]
pub fn out_of_range_tokens(tile: &Tile, k: &[f32], v_rotated: &[f32]) -> TokenSet {
    let (scales, zero_points) = (&tile.k_channel_scale, &tile.k_channel_zero_point);
    let moves = |d: usize| !is_constant(k.iter().skip(d).step_by(tile.head_dim));
    let beyond = || scales.iter().chain(zero_points).any(|&parameter| is_at_the_end(parameter));
    let below = || scales.iter().all(|&scale| scale < SMALLEST_SCALE) && (0..tile.head_dim).any(moves);
    if beyond() || below() {
        return TokenSet::MAX >> (TokenSet::BITS as usize - tile.block_size);
    }
    let is_out = |t: usize, row: &[f32]| match &tile.first_v {
        Some(first) if first.row == t => v_is_out_of_range(row, first.scale, first.zero_point),
        _ => v_is_out_of_range(row, tile.v_token_scale[t], tile.v_token_zero_point[t]),
    };
    let rows = v_rotated.chunks_exact(tile.head_dim).enumerate();
    rows.fold(0, |set, (t, row)| set | TokenSet::from(is_out(t, row)) << t)
}

#[inline(always)]
fn is_at_the_end(parameter: f16) -> bool {
    parameter.to_bits() & 0x7fff == f16::MAX.to_bits()
}

fn is_constant<'a>(mut values: impl Iterator<Item = &'a f32>) -> bool {
    let first = values.next();
    values.all(|x| Some(x) == first)
}

#[cfg(test)]
mod tests {
    use super::super::{ChannelStatistics, HeadFeedback, encode_k, encode_tile, encode_v};
    use super::*;

    const HEAD_DIM: usize = 16;
    const BLOCK: usize = 32;

    fn v_of_page(row: &[f32]) -> bool {
        let (scale, zero_point) = encode_v(row, &mut [0; HEAD_DIM]);
        v_is_out_of_range(row, scale, zero_point)
    }

    fn ramp(from: f32, to: f32) -> Vec<f32> {
        (0..HEAD_DIM).map(|d| from + (to - from) * d as f32 / (HEAD_DIM - 1) as f32).collect()
    }

    #[test]
    fn v_is_in_range_up_to_the_ends_of_f16() {
        for row in [ramp(-65504.0, 65504.0), ramp(0.0, 1e6), ramp(0.0, 1e-3), vec![65504.0; HEAD_DIM]] {
            assert!(!v_of_page(&row), "{row:?}");
        }
        for constant in [0.0, 1.0, 1e-30, -3e-6] {
            assert!(!v_of_page(&[constant; HEAD_DIM]), "nothing is lost of a constant {constant}");
        }
    }

    #[test]
    fn v_beyond_and_below_f16_is_out_of_range() {
        for row in [ramp(-7e4, 0.0), ramp(7e4, 8e4), ramp(0.0, 2e7), ramp(-1e30, 1e30)] {
            assert!(v_of_page(&row), "{row:?} is clamped");
        }
        for row in [ramp(0.0, 7e-6), ramp(-1e-5, 1e-5), ramp(-1e-30, 0.0)] {
            assert!(v_of_page(&row), "{row:?} is lost");
        }
    }

    #[test]
    fn k_of_a_page_is_out_of_range_where_its_residual_is() {
        let k_of_page = |k: f32, scale: f32| {
            let statistics = ChannelStatistics { mean: vec![0.0; HEAD_DIM], scale: vec![scale; HEAD_DIM] };
            k_is_out_of_range(encode_k(&[k; HEAD_DIM], &statistics, &mut [0; HEAD_DIM]))
        };
        assert!(!k_of_page(1e6, 1.0));
        assert!(k_of_page(1e7, 1.0));
        assert!(k_of_page(1.0, 6e-8), "a channel that had been silent");
        assert!(!k_of_page(1e-9, 1.0), "a millionth of a deviation is nothing");
    }

    #[test]
    fn of_a_tile_every_token_is_where_a_channel_of_k_is() {
        let tile = |k: &[f32], v: &[f32]| {
            let tile = encode_tile(k, v, HEAD_DIM, 4, &HeadFeedback::none(HEAD_DIM), Some(0));
            out_of_range_tokens(&tile, k, v)
        };
        let wave = |size: f32| -> Vec<f32> { (0..BLOCK * HEAD_DIM).map(|i| (i as f32 * 0.7).sin() * size).collect() };
        let all = (1 << BLOCK) - 1;
        assert_eq!(tile(&wave(1.0), &wave(1.0)), 0);
        assert_eq!(tile(&[2.5; BLOCK * HEAD_DIM], &[0.0; BLOCK * HEAD_DIM]), 0);
        assert_eq!(tile(&wave(3e6), &wave(1.0)), all);
        assert_eq!(tile(&wave(1e-7), &wave(1.0)), all);
        let mut v = wave(1.0);
        v[..HEAD_DIM].copy_from_slice(&ramp(-1e5, 0.0)); // the first token's, which has 8 bits
        v[7 * HEAD_DIM..8 * HEAD_DIM].copy_from_slice(&ramp(0.0, 1e-7));
        assert_eq!(tile(&wave(1.0), &v), 1 | 1 << 7);
    }
}
