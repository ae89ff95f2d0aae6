//! The bytes of sealed tiles, against those that `tests/golden/make_sealed_tiles.py` computes in float64 from the
//! description alone, and what holds of any tile.

mod common;
#[path = "golden/inputs.rs"]
mod inputs;

use common::Random;
use half::f16;
use inputs::{deviation, keys, loud_keys, query_moment, transposed, turned, values};
use kvarn::format::{Arrangement, RecordLayout, SealedTile};
use kvarn::quant::round::round_k;
use kvarn::quant::{Feedback, Frame, HeadFeedback, Tile, decode_tile_k, decode_tile_v, encode_tile, record};
use proptest::collection::vec;
use proptest::prelude::*;
use sha2::{Digest, Sha256};

/// Bits; sha256 of 64 channels and 128 tokens with feedback and first row 0; of 96 loud channels and 32 tokens without.
const GOLDENS: [(u32, &str, &str); 3] = [
    (
        4,
        "434eca60e9665b6a639e1ab88e9c1804e48313c821fedbd38dcf18471360f2d9",
        "06d98b896707f36ad0dd55cf981e29227c4d3725b8f36109d21f09f2c77fcc2a",
    ),
    (
        3,
        "084cd863dc2a9485834bd3ce376b764b86aaa868ed7b8315e937d3638bca3f26",
        "11b073ae3d8195d99b15b25679572e2cce05ad7bb8225b0a7109d1d1bfc55e9c",
    ),
    (
        2,
        "7ed0b9e902a5ebe39cea5c29f5ef78f82653ca6133fa0cb31f15ae3d601e4dff",
        "f50c42b5c1a232c60b78f8e2eb2f79f439490d52775e30a198352259b2aec7e9",
    ),
];

fn head_feedback(k: &[f32], head_dim: usize, rank: usize) -> HeadFeedback {
    let tokens = k.len() / head_dim;
    let plain = deviation(&transposed(k, head_dim), tokens);
    let rotated = deviation(&transposed(&turned(k, head_dim), head_dim), tokens);
    HeadFeedback::factor(&query_moment(head_dim, rank), &plain, &rotated).expect("a moment")
}

/// The record of a tile in canonical order, as it is written, and as it is saved from every other arrangement.
fn record(tile: &Tile) -> Vec<u8> {
    let layout = SealedTile { head_dim: tile.head_dim, block_size: tile.block_size, bits: tile.bits };
    let write = |order: Arrangement| {
        let mut bytes = vec![0xa5; layout.bytes()];
        record::tile::write(layout, order, &mut bytes, tile);
        bytes
    };
    let canonical = write(Arrangement::Canonical);
    for order in Arrangement::ALL {
        let mut saved = vec![0x5a; layout.bytes()];
        record::reorder(RecordLayout::Tile(layout), [order, Arrangement::Canonical], &write(order), &mut saved);
        assert!(saved == canonical, "{order:?}");
    }
    canonical
}

fn sha256(bytes: &[u8]) -> String {
    let half = |bytes: &[u8]| bytes.iter().fold(0u128, |number, &byte| number << 8 | u128::from(byte));
    let digest = Sha256::digest(bytes);
    format!("{:032x}{:032x}", half(&digest[..16]), half(&digest[16..]))
}

#[test]
fn tiles_have_the_golden_bytes() {
    let (k, v) = (keys(64, 128), values(64, 128));
    let (loud, short_v) = (loud_keys(96, 32), values(96, 32));
    for (bits, with_feedback, without) in GOLDENS {
        let tile = encode_tile(&k, &v, 64, bits, &head_feedback(&k, 64, 16), Some(0));
        assert_eq!(sha256(&record(&tile)), with_feedback, "{bits} bits: if it was meant, raise TILE_VERSION");
        let tile = encode_tile(&loud, &short_v, 96, bits, &HeadFeedback::none(96), None);
        assert_eq!(sha256(&record(&tile)), without, "{bits} bits: if it was meant, raise TILE_VERSION");
    }
}

#[test]
fn independent_queries_give_the_codes_of_plain_rounding_in_each_frame() {
    let n = 64;
    let identity: Vec<f64> = (0..n * n).map(|i| f64::from(u8::from(i % (n + 1) == 0))).collect();
    for k in [keys(n, 128), turned(&keys(n, 128), n), loud_keys(n, 32)] {
        let (m, tokens) = (transposed(&k, n), k.len() / n);
        let feedback = Feedback::factor(&identity, &deviation(&m, tokens)).expect("a moment");
        for bits in [4, 3, 2] {
            let (with, without) = (round_k(&m, tokens, bits, &feedback), round_k(&m, tokens, bits, &Feedback::none(n)));
            assert_eq!(with.codes, without.codes);
            assert_eq!(
                (with.channel_scale, with.channel_zero_point, with.token_scale, with.num_clamped),
                (without.channel_scale, without.channel_zero_point, without.token_scale, without.num_clamped)
            );
        }
    }
}

#[test]
fn the_frame_of_the_smaller_loss_is_kept() {
    let (n, tokens, none) = (96, 32, Feedback::none(96));
    for k in [keys(n, tokens), loud_keys(n, tokens)] {
        for bits in [4, 3, 2] {
            let plain = round_k(&transposed(&k, n), tokens, bits, &none);
            let rotated = round_k(&transposed(&turned(&k, n), n), tokens, bits, &none);
            let tile = encode_tile(&k, &values(n, tokens), n, bits, &HeadFeedback::none(n), None);
            let best = if plain.loss < rotated.loss { (Frame::Plain, plain) } else { (Frame::Rotated, rotated) };
            assert_eq!((tile.k_frame, tile.k_codes), (best.0, best.1.codes));
        }
    }
    let silent = encode_tile(&[0.0; 64 * 16], &[0.0; 64 * 16], 64, 4, &HeadFeedback::none(64), None);
    assert_eq!(silent.k_frame, Frame::Rotated, "of equal losses");
}

#[test]
fn the_first_token_s_v_is_kept_beside_the_tile() {
    let (n, row) = (64, 3);
    let (k, v) = (keys(n, 32), values(n, 32));
    let with = encode_tile(&k, &v, n, 2, &HeadFeedback::none(n), Some(row));
    let without = encode_tile(&k, &v, n, 2, &HeadFeedback::none(n), None);
    assert_eq!((with.v_token_scale[row], with.v_token_zero_point[row]), (f16::ZERO, f16::ZERO));
    assert!(with.v_codes[row * n..][..n].iter().all(|&code| code == 0));
    assert_eq!((&with.k_codes, &without.first_v), (&without.k_codes, &None));
    let (mut exact, mut coarse) = (vec![0.0; v.len()], vec![0.0; v.len()]);
    decode_tile_v(&with, &mut exact);
    decode_tile_v(&without, &mut coarse);
    for t in 0..32 {
        let rows = (&exact[t * n..][..n], &coarse[t * n..][..n]);
        assert_eq!(t == row, rows.0 != rows.1, "row {t}");
    }
    let width =
        |row: &[f32]| row.iter().copied().fold(f32::MIN, f32::max) - row.iter().copied().fold(f32::MAX, f32::min);
    let step = width(&v[row * n..][..n]) / 255.0;
    assert!((0..n).all(|d| (exact[row * n + d] - v[row * n + d]).abs() < 0.75 * step));
}

#[test]
fn a_tile_is_a_function_of_its_own_rows() {
    let (k, v) = (keys(64, 128), values(64, 128));
    let feedback = head_feedback(&k, 64, 16);
    let alone = record(&encode_tile(&k, &v, 64, 3, &feedback, None));
    let huge = vec![1e30; k.len()];
    let _ = encode_tile(&huge, &huge, 64, 3, &feedback, Some(0));
    // the same rows, elsewhere in a larger batch
    let (mut batch_k, mut batch_v) = (huge.clone(), huge);
    batch_k.extend(&k);
    batch_v.extend(&v);
    assert_eq!(record(&encode_tile(&batch_k[128 * 64..], &batch_v[128 * 64..], 64, 3, &feedback, None)), alone);
}

#[test]
fn rows_come_back_in_their_own_frame() {
    for (k, head_dim, rank) in [(keys(64, 128), 64, 16), (loud_keys(96, 32), 96, 24), (keys(256, 16), 256, 32)] {
        let v = values(head_dim, k.len() / head_dim);
        let energy = |xs: &[f32]| xs.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
        for (bits, limit) in [(4, 0.02), (3, 0.08), (2, 0.4)] {
            let tile = encode_tile(&k, &v, head_dim, bits, &head_feedback(&k, head_dim, rank), None);
            let (mut k_back, mut v_back) = (vec![0.0; k.len()], vec![0.0; v.len()]);
            decode_tile_k(&tile, &mut k_back);
            decode_tile_v(&tile, &mut v_back);
            let share = |x: &[f32], back: &[f32]| {
                energy(&x.iter().zip(back).map(|(a, b)| a - b).collect::<Vec<_>>()) / energy(x)
            };
            let shares = (share(&k, &k_back), share(&v, &v_back));
            assert!(shares.0 < limit && shares.1 < limit, "head_dim {head_dim}, {bits} bits: {shares:?}");
        }
    }
}

#[test]
fn no_finite_input_makes_a_nan() {
    let (n, tokens) = (48, 16);
    let feedback = head_feedback(&keys(n, 128), n, 12);
    let spike = |base: f32, spike: f32| {
        let mut rows = vec![base; n * tokens];
        (rows[5], rows[n + 40]) = (spike, -spike);
        rows
    };
    let mut tried =
        vec![spike(0.0, 1e30), spike(1e-30, 1e30), spike(1.0, 1e-30), spike(65504.0, 65504.0), spike(0.0, f32::MAX)];
    tried.extend([0.0, 1.0, -3.5, 1e30, -1e30, f32::MAX, 1e-30, 1e-45, 6e-8, 65504.0].map(|x| vec![x; n * tokens]));
    tried.push(keys(n, tokens).iter().map(|x| x * 1e29).collect());
    tried.push(keys(n, tokens).iter().map(|x| x * 1e-30).collect());
    for rows in tried {
        for feedback in [&feedback, &HeadFeedback::none(n)] {
            for bits in [4, 3, 2] {
                let tile = encode_tile(&rows, &rows, n, bits, feedback, Some(0));
                let (mut k, mut v) = (vec![f32::NAN; rows.len()], vec![f32::NAN; rows.len()]);
                decode_tile_k(&tile, &mut k);
                decode_tile_v(&tile, &mut v);
                let finite = (k.iter().all(|x| x.is_finite()), v.iter().all(|x| x.is_finite()));
                assert_eq!(finite, (true, true), "{bits} bits of {:?}", &rows[..6]);
                let largest = (1 << bits) - 1;
                assert!(tile.k_codes.iter().chain(&tile.v_codes).all(|&code| code <= largest));
            }
        }
    }
}

#[test]
fn constant_rows_are_kept_by_their_zero_points() {
    let tile = encode_tile(&[1.5; 64 * 16], &[-0.25; 64 * 16], 64, 2, &HeadFeedback::none(64), None);
    let (mut k, mut v) = (vec![0.0; 64 * 16], vec![0.0; 64 * 16]);
    decode_tile_k(&tile, &mut k);
    decode_tile_v(&tile, &mut v);
    assert!(k.iter().all(|x| (x - 1.5).abs() < 1e-2), "{}", k[0]);
    assert_eq!(v, [-0.25; 64 * 16]);
    assert!(tile.v_codes.iter().all(|&code| code == 0));
}

/// The same body under wider instructions.
#[cfg(target_arch = "x86_64")]
mod wide {
    use super::{HeadFeedback, Tile, encode_tile};

    #[target_feature(enable = "avx2,fma")]
    pub fn avx2(k: &[f32], v: &[f32], n: usize, bits: u32, feedback: &HeadFeedback) -> Tile {
        encode_tile(k, v, n, bits, feedback, Some(0))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,fma")]
    pub fn avx512(k: &[f32], v: &[f32], n: usize, bits: u32, feedback: &HeadFeedback) -> Tile {
        encode_tile(k, v, n, bits, feedback, Some(0))
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn wider_instructions_give_the_same_bytes() {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl");
    for n in [64, 96, 128] {
        let (k, v) = (keys(n, 128), values(n, 128));
        let feedback = head_feedback(&k, n, 16);
        for bits in [4, 3, 2] {
            let tile = encode_tile(&k, &v, n, bits, &feedback, Some(0));
            if avx2 {
                // SAFETY: the machine has the features.
                assert_eq!(unsafe { wide::avx2(&k, &v, n, bits, &feedback) }, tile);
            }
            if avx2 && avx512 {
                // SAFETY: the machine has the features.
                assert_eq!(unsafe { wide::avx512(&k, &v, n, bits, &feedback) }, tile);
            }
        }
    }
}

/// The factors that a row's width is drawn in by to be the width of a grid of V, of which the best is taken.
const V_SHRINKS: [(u32, &[f32]); 3] =
    [(4, &[1.0]), (3, &[1.0, 0.95, 0.9, 0.85, 0.8, 0.7]), (2, &[1.0, 0.9, 0.8, 0.7, 0.6, 0.5])];

/// How far two parameters in f16 that are the same but for the order of f32 arithmetic may be apart, relative to the
/// row's width: two units in the last place. Neighbouring factors are 25 times as far apart.
const PARAMETER_TOLERANCE: f32 = 2e-3;

/// A grid whose error is beyond the best one's by no more than this is as good: sums are made in another order.
const ERROR_TOLERANCE: f64 = 1e-3;

/// Rows of every shape are asked, of uniform values to a few far from all others: these alone want the narrowest grids.
/// Without them, and with a bound on the error instead of a look at the grid, the test passed with the factors of 2 bits
/// in place of those of 3: uniform rows never took 0.6 or 0.5, which the code does not have, and where it took 0.95 or 0.85,
/// which the test did not have, it was better than the best one known.
#[test]
fn a_row_of_v_takes_the_best_width_of_its_bits_and_each_width_is_some_row_s() {
    let (n, mut random) = (64, Random(5));
    for (bits, shrinks) in V_SHRINKS {
        let mut taken = vec![0; shrinks.len()];
        for power in [0, 1, 2, 3, 5, 8].repeat(32) {
            let v: Vec<f32> = (0..n * 16).map(|_| (random.normal() / 4.0).powi(2 * power + 1) * 4.0).collect();
            let tile = encode_tile(&vec![0.0; v.len()], &v, n, bits, &HeadFeedback::none(n), None);
            for (t, row) in v.chunks_exact(n).enumerate() {
                let (lo, hi) = row.iter().fold((f32::MAX, f32::MIN), |(lo, hi), &x| (lo.min(x), hi.max(x)));
                let code_max = ((1 << bits) - 1) as f32;
                let grids = shrinks.iter().map(|shrink| {
                    let margin = (hi - lo) * (1.0 - shrink) / 2.0;
                    [(hi - lo) * shrink / code_max, lo + margin].map(|x| f16::from_f32(x).to_f32())
                });
                let grids: Vec<[f32; 2]> = grids.collect();
                let errors: Vec<f64> = grids.iter().map(|&grid| squared_error(row, grid, code_max)).collect();
                let ours = [tile.v_token_scale[t].to_f32(), tile.v_token_zero_point[t].to_f32()];
                let is_ours = |grid: &[f32; 2]| {
                    let distance = ((grid[0] - ours[0]) * code_max).abs().max((grid[1] - ours[1]).abs());
                    distance <= PARAMETER_TOLERANCE * (hi - lo)
                };
                let found =
                    grids.iter().position(is_ours).unwrap_or_else(|| panic!("{bits} bits: {ours:?}, {grids:?}"));
                let best = errors.iter().copied().fold(f64::INFINITY, f64::min);
                assert!(errors[found] <= best * (1.0 + ERROR_TOLERANCE), "{bits} bits: factor {found} of {errors:?}");
                taken[found] += 1;
            }
        }
        assert!(taken.iter().all(|&times| times > 0), "{bits} bits: {taken:?}");
    }
}

fn squared_error(row: &[f32], [scale, zero_point]: [f32; 2], code_max: f32) -> f64 {
    let (scale, zero_point, code_max) = (f64::from(scale), f64::from(zero_point), f64::from(code_max));
    let error = |x: f64| x - ((x - zero_point) / scale).round_ties_even().clamp(0.0, code_max) * scale - zero_point;
    row.iter().map(|&x| error(f64::from(x)).powi(2)).sum()
}

/// A tile's tokens and channels of any accepted size, with values whose channels have centres of their own.
fn any_k() -> impl Strategy<Value = (usize, Vec<f32>)> {
    (prop::sample::select(vec![16usize, 48, 64]), prop::sample::select(vec![16usize, 32])).prop_flat_map(
        |(n, tokens)| {
            (vec(-5f32..5.0, n * tokens), vec(-20f32..20.0, n)).prop_map(move |(noise, centre)| {
                (n, noise.iter().enumerate().map(|(i, x)| x + centre[i % n]).collect())
            })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn plain_rounding_is_within_half_a_code((n, k) in any_k(), bits in 2u32..=4) {
        let (m, tokens) = (transposed(&k, n), k.len() / n);
        let rounded = round_k(&m, tokens, bits, &Feedback::none(n));
        let code_max = ((1 << bits) - 1) as f32;
        let (mut clamped, mut squares) = (0, 0.0);
        for d in 0..n {
            let (a, z) = (rounded.channel_scale[d].to_f32(), rounded.channel_zero_point[d].to_f32());
            for t in 0..tokens {
                let (x, c) = (m[d * tokens + t], rounded.token_scale[t].to_f32());
                let error = (x - (f32::from(rounded.codes[d * tokens + t]) * a + z) * c).abs();
                squares += f64::from(error) * f64::from(error);
                let unclamped = (x / c - z) / a;
                clamped += usize::from(unclamped.round_ties_even() < 0.0 || unclamped.round_ties_even() > code_max);
                if (0.0..=code_max).contains(&unclamped) {
                    prop_assert!(error <= a / 2.0 * (1.0 + 1.0 / 512.0) * c, "{error} of a code {a} times {c}");
                }
            }
        }
        prop_assert_eq!(rounded.num_clamped, clamped);
        prop_assert!((rounded.loss - squares).abs() <= 1e-6 * squares);
    }

    #[test]
    fn v_of_four_bits_is_within_half_a_code(v in vec(-50f32..50.0, 64 * 16)) {
        let tile = encode_tile(&vec![0.0; v.len()], &v, 64, 4, &HeadFeedback::none(64), None);
        let mut back = vec![0.0; v.len()];
        decode_tile_v(&tile, &mut back);
        for t in 0..16 {
            let (row, back) = (&v[t * 64..][..64], &back[t * 64..][..64]);
            let (a, z) = (tile.v_token_scale[t].to_f32(), tile.v_token_zero_point[t].to_f32());
            let (lo, hi) = row.iter().fold((f32::MAX, f32::MIN), |(lo, hi), &x| (lo.min(x), hi.max(x)));
            prop_assert_eq!((a, z), (f16::from_f32((hi - lo) / 15.0).to_f32(), f16::from_f32(lo).to_f32()));
            for (x, y) in row.iter().zip(back) {
                let inside = (0.0..=15.0).contains(&((x - z) / a));
                prop_assert!(!inside || (x - y).abs() <= a / 2.0 * (1.0 + 1.0 / 512.0));
            }
        }
    }
}
