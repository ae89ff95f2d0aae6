//! The evaluation codecs against their definitions; the reference codec against the sample of its conformance list.

use kvarn::quant::reference::ReferenceTile;
use kvarn::quant::{Codec, DualScaleOptions, dual_scale, rotate, to_f16_clamped};
use proptest::collection::vec;
use proptest::prelude::*;

/// Channels, and tokens, of the sample.
const SIZE: usize = 64;

/// The sample, `[tokens, channels]`, rotated.
fn sample() -> Vec<f32> {
    let mut x: Vec<f32> = (0..SIZE * SIZE)
        .map(|i| {
            let (t, d) = (i / SIZE, i % SIZE);
            let value = ((31 * i * i + 7 * i) % 1009) as f64 / 1009.0 * 4.0 - 2.0;
            (value * (1 + d % 7) as f64 * (1.0 + 0.5 * (t % 5) as f64)) as f32
        })
        .collect();
    x.chunks_exact_mut(SIZE).for_each(rotate);
    x
}

fn transposed(m: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| m.iter().skip(c).step_by(columns).copied()).collect()
}

fn relative_error(m: &[f32], decoded: &[f32]) -> f64 {
    let error: f64 = m.iter().zip(decoded).map(|(&x, &y)| f64::from(x - y).powi(2)).sum();
    error / m.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>()
}

/// Channel d, bytes of its first tokens, low codes first.
fn packed(codes: &[u8], bits: u32) -> Vec<u8> {
    let byte = |codes: &[u8]| codes.iter().rev().fold(0, |byte, code| byte << bits | code);
    codes.chunks_exact(8 / bits as usize).map(byte).collect()
}

#[test]
fn the_reference_scales_the_sample_as_listed() {
    let k = transposed(&sample(), SIZE);
    let start = dual_scale(&k, SIZE, DualScaleOptions { iterations: 0, rms_step: false });
    let end = dual_scale(&k, SIZE, DualScaleOptions::REFERENCE);
    assert!((start.imbalance - 5.38414).abs() < 1e-5, "{}", start.imbalance);
    assert!((end.imbalance - 2.0).abs() < 1e-5, "{}", end.imbalance);
    for (ours, listed) in end.token.iter().zip([5.414, 8.2, 10.85, 13.984]) {
        assert!((ours - listed).abs() < 0.01, "{:?}", &end.token[..4]);
    }
}

#[test]
fn the_reference_codes_the_sample_as_listed() {
    let v = sample();
    let k = transposed(&v, SIZE);
    let mut decoded = vec![0.0; SIZE * SIZE];
    for (m, bits, listed, bytes) in [
        (&k, 4, 0.007_707, Some([102, 234, 75, 67])),
        (&k, 2, 0.191_807, Some([229, 86, 78, 105])),
        (&v, 4, 0.007_977, None),
        (&v, 2, 0.197_482, None),
    ] {
        let tile = ReferenceTile::encode(m, SIZE, bits);
        tile.decode(&mut decoded);
        let error = relative_error(m, &decoded);
        assert!((error - listed).abs() < 1e-6, "{bits} bits: {error} for {listed}");
        if let Some(bytes) = bytes {
            assert_eq!(packed(&tile.codes, bits)[..4], bytes);
        }
    }
}

#[test]
fn a_block_of_the_reference_comes_back_in_the_plain_frame() {
    let mut plain = sample();
    plain.chunks_exact_mut(SIZE).for_each(rotate);
    for (codec, k_listed, v_listed) in [
        (Codec::KvarnK4v4, 0.007_707, 0.007_977),
        (Codec::KvarnK4v2, 0.007_707, 0.197_482),
        (Codec::KvarnK2v2, 0.191_807, 0.197_482),
    ] {
        let (mut k, mut v) = (plain.clone(), plain.clone());
        codec.apply_block(&mut k, &mut v, SIZE);
        assert!((relative_error(&plain, &k) - k_listed).abs() < 2e-6, "{}", codec.name());
        assert!((relative_error(&plain, &v) - v_listed).abs() < 2e-6, "{}", codec.name());
    }
}

/// Every number of e4m3fn that is not negative.
fn e4m3_numbers() -> Vec<f32> {
    (0..=0x7eu32)
        .map(|bits| {
            let (exponent, mantissa) = ((bits >> 3) as i32, (bits & 7) as f32);
            if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) }
        })
        .collect()
}

fn fp8(x: f32) -> f32 {
    let (mut k, mut v) = ([x], [x]);
    Codec::Fp8.apply_token(&mut k, &mut v);
    assert_eq!(k, v);
    k[0]
}

#[test]
fn fp8_keeps_its_own_numbers_and_rounds_ties_to_even() {
    let numbers = e4m3_numbers();
    assert_eq!((numbers[0], numbers[1], numbers[0x7e]), (0.0, 1.0 / 512.0, 448.0));
    for (i, pair) in numbers.windows(2).enumerate() {
        let (low, high) = (pair[0], pair[1]);
        let middle = f32::midpoint(low, high);
        assert_eq!((fp8(low), fp8(-high)), (low, -high));
        assert_eq!(fp8(middle), if i % 2 == 0 { low } else { high }, "between {low} and {high}");
        assert_eq!((fp8(middle.next_down()), fp8(middle.next_up())), (low, high));
    }
}

#[test]
fn fp8_saturates() {
    for x in [448.0, 449.0, 500.0, 65504.0, 1e30, f32::INFINITY] {
        assert_eq!((fp8(x), fp8(-x)), (448.0, -448.0));
    }
}

#[test]
fn names_are_parsed_back_and_no_others() {
    for codec in Codec::ALL {
        assert_eq!(Codec::parse(codec.name()), Some(codec));
    }
    assert_eq!(
        Codec::ALL.map(Codec::name),
        ["fp8", "int8_plain", "int4_plain", "kivi4", "kvarn_k4v4", "kvarn_k4v2", "kvarn_k2v2"]
    );
    assert_eq!((Codec::parse("int4"), Codec::parse("")), (None, None));
}

#[test]
fn bytes_a_token_are_those_of_the_tables() {
    let bytes = Codec::ALL.map(|codec| codec.bytes_per_token(128, 128));
    assert_eq!(bytes, [256.0, 260.0, 136.0, 160.0, 140.0, 108.0, 76.0]);
    assert_eq!(Codec::Kivi4.bytes_per_token(80, 16), 80.0 + 4.0 * (80.0 / 16.0 + 3.0));
}

#[test]
fn a_codec_of_blocks_leaves_single_tokens_alone() {
    for codec in Codec::ALL {
        let token: Vec<f32> = (0..64).map(|d| (1.7 * d as f32).sin()).collect();
        let (mut k, mut v) = (token.clone(), token.clone());
        codec.apply_token(&mut k, &mut v);
        assert_eq!(codec.is_per_token(), k != token && v != token, "{}", codec.name());
    }
}

#[test]
fn a_codec_of_tokens_makes_of_a_block_what_it_makes_of_its_tokens() {
    let block = sample();
    for codec in Codec::ALL.into_iter().filter(|codec| codec.is_per_token()) {
        let (mut k, mut v) = (block.clone(), block.clone());
        codec.apply_block(&mut k, &mut v, SIZE);
        let (mut k_token, mut v_token) = (block[SIZE..2 * SIZE].to_vec(), block[SIZE..2 * SIZE].to_vec());
        codec.apply_token(&mut k_token, &mut v_token);
        assert_eq!((&k[SIZE..2 * SIZE], &v[SIZE..2 * SIZE]), (&k_token[..], &v_token[..]));
    }
}

#[test]
fn kivi_groups_k_along_tokens_and_v_along_channels() {
    // A jump between token 31 and 32, and between channel 31 and 32, costs nothing: each side has its own grid.
    let jump = |i: usize| if i < 32 { 0.0 } else { 1000.0 };
    let k: Vec<f32> = (0..64 * 48).map(|i| jump(i / 48) + (i / 48 % 16) as f32).collect();
    let v: Vec<f32> = (0..64 * 48).map(|i| jump(i % 48) + (i % 48 % 16) as f32).collect();
    let (mut k_back, mut v_back) = (k.clone(), v.clone());
    Codec::Kivi4.apply_block(&mut k_back, &mut v_back, 48);
    assert_eq!((k_back, v_back), (k, v));
}

#[test]
fn no_codec_makes_a_nan_of_a_finite_value() {
    let blocks = [vec![0.0; 32 * 48], vec![3.5; 32 * 48], vec![1e30; 32 * 48], vec![-1e-30; 32 * 48], {
        let mut block = vec![0.0; 32 * 48];
        (block[7], block[900]) = (1e30, -1e-30);
        block
    }];
    for codec in Codec::ALL {
        for block in &blocks {
            let (mut k, mut v) = (block.clone(), block.clone());
            codec.apply_block(&mut k, &mut v, 48);
            assert!(k.iter().chain(&v).all(|x| x.is_finite()), "{} of {}", codec.name(), block[0]);
        }
    }
}

proptest! {
    #[test]
    fn fp8_gives_the_nearest_number(x in -460f32..460.0) {
        let nearest = e4m3_numbers().into_iter().map(|y| (x.abs() - y).abs()).fold(f32::INFINITY, f32::min);
        prop_assert_eq!((x - fp8(x)).abs(), nearest);
    }

    #[test]
    fn int8_is_within_half_a_code(x in vec(-50f32..50.0, 64)) {
        let (mut k, mut v) = (x.clone(), x.clone());
        Codec::Int8Plain.apply_token(&mut k, &mut v);
        let scale = to_f16_clamped(x.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0).to_f32();
        for d in 0..64 {
            // f16 rounding of the scale moves the largest value by up to 127 * 2^-11 of a code more
            prop_assert!((x[d] - k[d]).abs() <= 0.5625 * scale);
            prop_assert_eq!(k[d], v[d]);
        }
    }

    #[test]
    fn int4_has_sixteen_levels_one_of_them_zero(x in vec(-50f32..50.0, 64)) {
        let (mut k, mut v) = (x.clone(), x.clone());
        Codec::Int4Plain.apply_token(&mut k, &mut v);
        let (lo, hi) = x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &x| (lo.min(x), hi.max(x)));
        let scale = (hi - lo) / 15.0;
        for d in 0..64 {
            // the zero point is rounded to a whole code, so that an end of the range may lie half a code further out
            prop_assert!((x[d] - k[d]).abs() <= 1.001 * scale);
            prop_assert!((k[d] / scale - (k[d] / scale).round()).abs() < 1e-3);
            prop_assert_eq!(k[d], v[d]);
        }
    }

    #[test]
    fn kivi_is_within_half_a_code_and_the_rounded_zero_point(x in vec(-50f32..50.0, 32 * 48)) {
        let (mut k, mut v) = (x.clone(), x.clone());
        Codec::Kivi4.apply_block(&mut k, &mut v, 48);
        for i in 0..x.len() {
            // the widest group has codes 100/15 apart; its zero point moves by up to 2^-6, its top by 15 * 2^-11 codes
            prop_assert!((x[i] - k[i]).abs() <= 0.51 * 100.0 / 15.0 + 0.02);
            prop_assert!((x[i] - v[i]).abs() <= 0.51 * 100.0 / 15.0 + 0.02);
        }
    }
}
