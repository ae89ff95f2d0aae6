//! One token of one head: encode and decode.

use super::{ChannelStatistics, lanes, rint_even, to_byte, to_f16_clamped};
use half::f16;

/// Largest K code.
pub const K_CODE_MAX: f32 = 127.0;
/// Steps of a low byte of K in one code.
const K_LOW_STEPS: f32 = 256.0;
/// Largest V code.
pub const V_CODE_MAX: f32 = 255.0;

/// Encodes one token's K under its page's statistics; gives its `k_token_scale`.
///
/// `k`, `codes` and `statistics` have `head_dim` entries.
#[inline(always)]
pub fn encode_k(k: &[f32], statistics: &ChannelStatistics, codes: &mut [i8]) -> f16 {
    let (mean, scale) = (&statistics.mean[..k.len()], &statistics.scale[..k.len()]);
    let largest = lanes::largest([k, mean, scale], |[k, mean, scale]| ((k - mean) / scale).abs());
    let stored = to_f16_clamped(largest / K_CODE_MAX);
    let token_scale = stored.to_f32();
    // A zero scale makes the quotient NaN or infinite: those codes are 0.
    let inverse_exists = token_scale > 0.0;
    for d in 0..k.len() {
        let z = (k[d] - mean[d]) / scale[d];
        let code = rint_even(z / token_scale).clamp(-K_CODE_MAX, K_CODE_MAX);
        codes[d] = to_byte(if inverse_exists { code } else { 0.0 }).cast_signed();
    }
    stored
}

/// The low bytes of one token's K codes, in units of 1/256 of a code: what [`encode_k`] rounded off.
pub fn encode_k_low(k: &[f32], statistics: &ChannelStatistics, token_scale: f16, codes: &[i8], low: &mut [i8]) {
    let token_scale = token_scale.to_f32();
    for d in 0..k.len() {
        let z = (k[d] - statistics.mean[d]) / statistics.scale[d];
        let rest = rint_even((z / token_scale - f32::from(codes[d])) * K_LOW_STEPS).clamp(-K_CODE_MAX, K_CODE_MAX);
        low[d] = if token_scale > 0.0 { rest as i8 } else { 0 };
    }
}

/// Decodes one token's K from its codes and their low bytes.
pub fn decode_k_low(codes: &[i8], low: &[i8], token_scale: f16, statistics: &ChannelStatistics, k: &mut [f32]) {
    for (d, (&code, &low)) in codes.iter().zip(low).enumerate() {
        let code = f32::from(code) + f32::from(low) / K_LOW_STEPS;
        k[d] = statistics.mean[d] + statistics.scale[d] * token_scale.to_f32() * code;
    }
}

/// Decodes one token's K.
#[inline(always)]
pub fn decode_k(codes: &[i8], token_scale: f16, statistics: &ChannelStatistics, k: &mut [f32]) {
    let token_scale = token_scale.to_f32();
    for (d, code) in codes.iter().enumerate() {
        k[d] = statistics.mean[d] + statistics.scale[d] * token_scale * f32::from(*code);
    }
}

/// Encodes one token's V; gives its `v_token_scale` and `v_token_zero_point`.
#[inline(always)]
pub fn encode_v(v: &[f32], codes: &mut [u8]) -> (f16, f16) {
    // Of zeros of both signs, the first: its sign is stored.
    let first =
        |bound: f32| if bound == 0.0 { v.iter().copied().find(|&x| x == bound).unwrap_or(bound) } else { bound };
    let (lo, hi) = lanes::bounds(v);
    let (lo, hi) = (first(lo), first(hi));
    let stored_scale = to_f16_clamped((hi - lo) / V_CODE_MAX);
    let stored_zero_point = to_f16_clamped(lo);
    let (scale, zero_point) = (stored_scale.to_f32(), stored_zero_point.to_f32());
    let inverse_exists = scale > 0.0;
    for (code, &x) in codes.iter_mut().zip(v) {
        let rounded = rint_even((x - zero_point) / scale).clamp(0.0, V_CODE_MAX);
        *code = to_byte(if inverse_exists { rounded } else { 0.0 });
    }
    (stored_scale, stored_zero_point)
}

/// Decodes one token's V.
#[inline(always)]
pub fn decode_v(codes: &[u8], token_scale: f16, zero_point: f16, v: &mut [f32]) {
    let (scale, zero_point) = (token_scale.to_f32(), zero_point.to_f32());
    for (x, code) in v.iter_mut().zip(codes) {
        *x = scale * f32::from(*code) + zero_point;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// f16 rounding of the scale (2^-11) moves a value of up to 127 or 255 codes by less than 1/8 code.
    const SCALE_ROUNDING_CODES: f32 = 0.125;

    #[test]
    fn a_bound_of_zeros_of_both_signs_is_the_first_of_them() {
        for (first, second) in [(0.0f32, -0.0f32), (-0.0, 0.0)] {
            for sign in [1.0, -1.0] {
                let mut v = [sign; 32];
                (v[9], v[4], v[20]) = (first, if sign > 0.0 { 2.0 } else { -2.0 }, second);
                let (lo, hi) = if sign > 0.0 { (first, 2.0) } else { (-2.0, first) };
                let (scale, zero_point) = encode_v(&v, &mut [0; 32]);
                assert_eq!(zero_point.to_bits(), to_f16_clamped(lo).to_bits());
                assert_eq!(scale.to_bits(), to_f16_clamped((hi - lo) / V_CODE_MAX).to_bits());
            }
            let (scale, zero_point) = encode_v(&[first, second], &mut [0; 2]);
            assert_eq!((scale.to_bits(), zero_point.to_bits()), (0, to_f16_clamped(first).to_bits()));
        }
    }

    #[test]
    fn a_token_equal_to_the_mean_has_scale_and_codes_zero() {
        let statistics = ChannelStatistics { mean: vec![2.0; 16], scale: vec![1.0; 16] };
        let mut codes = [1i8; 16];
        assert_eq!(encode_k(&[2.0; 16], &statistics, &mut codes), f16::ZERO);
        assert_eq!(codes, [0; 16]);
    }

    #[test]
    fn a_constant_v_is_kept_by_its_zero_point() {
        let mut codes = [9u8; 16];
        let (scale, zero_point) = encode_v(&[-1.5; 16], &mut codes);
        assert_eq!((scale.to_f32(), zero_point.to_f32(), codes), (0.0, -1.5, [0; 16]));
    }

    #[test]
    fn golden_codes() {
        let statistics = ChannelStatistics { mean: vec![0.5, -1.0, 0.0, 8.0], scale: vec![1.0, 0.25, 2.0, 4.0] };
        let mut k_codes = [0i8; 4];
        let scale = encode_k(&[1.0, -1.5, 3.0, 0.0], &statistics, &mut k_codes);
        // z = 0.5, -2, 1.5, -2; the scale is f16(2/127), a little below it, and -127.03 rounds to -127
        assert_eq!((scale.to_bits(), k_codes), (0x2408, [32, -127, 95, -127]));
        let mut v_codes = [0u8; 4];
        let (scale, zero_point) = encode_v(&[-1.0, 0.0, 0.25, 1.0], &mut v_codes);
        assert_eq!((scale.to_bits(), zero_point.to_bits(), v_codes), (0x2004, 0xbc00, [0, 128, 159, 255]));
    }

    proptest! {
        #[test]
        fn k_round_trip_is_within_half_a_code(
            k in vec(-50f32..50.0, 64), mean in vec(-20f32..20.0, 64), scale in vec(0.01f32..4.0, 64)
        ) {
            let f16s = |xs: Vec<f32>| xs.into_iter().map(|x| to_f16_clamped(x).to_f32()).collect::<Vec<_>>();
            let statistics = ChannelStatistics { mean: f16s(mean), scale: f16s(scale) };
            let (mut codes, mut back) = ([0i8; 64], [0f32; 64]);
            let token_scale = encode_k(&k, &statistics, &mut codes);
            decode_k(&codes, token_scale, &statistics, &mut back);
            for d in 0..64 {
                let code = statistics.scale[d] * token_scale.to_f32();
                prop_assert!((k[d] - back[d]).abs() <= (0.5 + SCALE_ROUNDING_CODES) * code);
            }
        }

        #[test]
        fn low_bytes_make_the_round_trip_256_times_closer(
            k in vec(-50f32..50.0, 64), mean in vec(-20f32..20.0, 64), scale in vec(0.01f32..4.0, 64)
        ) {
            let f16s = |xs: Vec<f32>| xs.into_iter().map(|x| to_f16_clamped(x).to_f32()).collect::<Vec<_>>();
            let statistics = ChannelStatistics { mean: f16s(mean), scale: f16s(scale) };
            let (mut codes, mut low, mut back) = ([0i8; 64], [0i8; 64], [0f32; 64]);
            let token_scale = encode_k(&k, &statistics, &mut codes);
            encode_k_low(&k, &statistics, token_scale, &codes, &mut low);
            decode_k_low(&codes, &low, token_scale, &statistics, &mut back);
            for d in 0..64 {
                let low_step = statistics.scale[d] * token_scale.to_f32() / K_LOW_STEPS;
                // Half a step; one where the low byte would be 128; f32 of |k| up to 70.
                prop_assert!((k[d] - back[d]).abs() <= 1.01 * low_step + 1e-5, "{} became {}", k[d], back[d]);
            }
        }

        #[test]
        fn v_round_trip_is_within_half_a_code_and_the_rounded_zero_point(v in vec(-50f32..50.0, 1..130)) {
            let (mut codes, mut back) = (vec![0u8; v.len()], vec![0f32; v.len()]);
            let (scale, zero_point) = encode_v(&v, &mut codes);
            decode_v(&codes, scale, zero_point, &mut back);
            let lo = v.iter().copied().fold(f32::INFINITY, f32::min);
            let bound = (0.5 + SCALE_ROUNDING_CODES) * scale.to_f32() + (lo - zero_point.to_f32()).abs() + 1e-6;
            for d in 0..v.len() {
                prop_assert!((v[d] - back[d]).abs() <= bound, "{} became {}", v[d], back[d]);
            }
        }
    }
}
