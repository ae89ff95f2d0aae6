//! AVX2 with FMA and F16C: sixteen lanes are two registers.

use super::simd::Simd;
#[allow(clippy::wildcard_imports)] // thirty intrinsics of one prefix
use std::arch::x86_64::*;

/// AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub struct Avx2;

type Lanes = [__m256; 2];
type Words = [__m256i; 2];

// SAFETY: the dispatch table names this level only after the processor said that it has all three. Each block below
// runs those instructions (the trait's contract) on values, or on pointers that the caller made valid for the lanes.
unsafe impl Simd for Avx2 {
    type F = Lanes;
    type W = Words;
    const CHAINS: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Lanes {
        // SAFETY: see the impl; so for every block here.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Lanes {
        // SAFETY: valid for sixteen f32.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Lanes) {
        // SAFETY: valid for sixteen f32.
        unsafe {
            _mm256_storeu_ps(to, x[0]);
            _mm256_storeu_ps(to.add(8), x[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Lanes {
        // SAFETY: valid for sixteen f16.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(from.cast())), _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast()))] }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Lanes {
        // SAFETY: valid for sixteen bf16.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high))]
        }
    }
    #[inline(always)]
    unsafe fn load_words(from: *const u8) -> Words {
        // SAFETY: valid for 64 bytes.
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn load_half_words(from: *const u8) -> Words {
        // SAFETY: valid for 32 bytes.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            [low, _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(16).cast()))]
        }
    }
    #[inline(always)]
    unsafe fn and(words: Words, mask: u32) -> Words {
        // SAFETY: values only.
        unsafe { words.map(|word| _mm256_and_si256(word, _mm256_set1_epi32(mask.cast_signed()))) }
    }
    #[inline(always)]
    unsafe fn or(a: Words, b: Words) -> Words {
        // SAFETY: values only.
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn shift_left<const N: i32>(words: Words) -> Words {
        // SAFETY: values only.
        unsafe { [_mm256_slli_epi32::<N>(words[0]), _mm256_slli_epi32::<N>(words[1])] }
    }
    #[inline(always)]
    unsafe fn shift_right<const N: i32>(words: Words) -> Words {
        // SAFETY: values only.
        unsafe { [_mm256_srli_epi32::<N>(words[0]), _mm256_srli_epi32::<N>(words[1])] }
    }
    #[inline(always)]
    unsafe fn i8x4(words: Words) -> [Lanes; 4] {
        // SAFETY: values only.
        let (low, high) = unsafe { (i8x4(words[0]), i8x4(words[1])) };
        [[low[0], high[0]], [low[1], high[1]], [low[2], high[2]], [low[3], high[3]]]
    }
    #[inline(always)]
    unsafe fn u8x4(words: Words) -> [Lanes; 4] {
        // SAFETY: values only.
        let (low, high) = unsafe { (u8x4(words[0]), u8x4(words[1])) };
        [[low[0], high[0]], [low[1], high[1]], [low[2], high[2]], [low[3], high[3]]]
    }

    #[inline(always)]
    unsafe fn add(a: Lanes, b: Lanes) -> Lanes {
        // SAFETY: values only.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn sub(a: Lanes, b: Lanes) -> Lanes {
        // SAFETY: values only.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn mul(a: Lanes, b: Lanes) -> Lanes {
        // SAFETY: values only.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn div(a: Lanes, b: Lanes) -> Lanes {
        // SAFETY: values only.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn mul_add(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        // SAFETY: values only.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn max(a: Lanes, b: Lanes) -> Lanes {
        // SAFETY: values only.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn sum(x: Lanes) -> f32 {
        // SAFETY: values only.
        unsafe {
            let x = _mm256_add_ps(x[0], x[1]);
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    unsafe fn max_lane(x: Lanes) -> f32 {
        // SAFETY: values only.
        unsafe {
            let x = _mm256_max_ps(x[0], x[1]);
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    unsafe fn exp2_integral(n: Lanes) -> Lanes {
        // SAFETY: values only.
        unsafe { [exp2(n[0]), exp2(n[1])] }
    }
}

/// The byte wanted is shifted to the top of its lane, then down with its sign.
#[inline(always)]
unsafe fn i8x4(w: __m256i) -> [__m256; 4] {
    // SAFETY: values only.
    unsafe {
        [
            _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(w))),
            _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<16>(w))),
            _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<8>(w))),
            _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(w)),
        ]
    }
}

#[inline(always)]
unsafe fn u8x4(w: __m256i) -> [__m256; 4] {
    // SAFETY: values only.
    unsafe {
        let low = _mm256_set1_epi32(0xff);
        [
            _mm256_cvtepi32_ps(_mm256_and_si256(w, low)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<8>(w), low)),
            _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32::<16>(w), low)),
            _mm256_cvtepi32_ps(_mm256_srli_epi32::<24>(w)),
        ]
    }
}

#[inline(always)]
unsafe fn exp2(n: __m256) -> __m256 {
    // SAFETY: values only.
    unsafe {
        let n = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n))
    }
}
