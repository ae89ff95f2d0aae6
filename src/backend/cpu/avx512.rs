//! AVX-512 (F, BW, DQ, VL): sixteen lanes are one register.

use super::simd::Simd;
#[allow(clippy::wildcard_imports)] // thirty intrinsics of one prefix
use std::arch::x86_64::*;

/// AVX-512 F, BW, DQ and VL.
#[derive(Debug, Clone, Copy)]
pub struct Avx512;

// SAFETY: the dispatch table names this level only after the processor said that it has all four. Each block below
// runs those instructions (the trait's contract) on values, or on pointers that the caller made valid for the lanes.
unsafe impl Simd for Avx512 {
    type F = __m512;
    type W = __m512i;
    const CHAINS: usize = 2;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: see the impl; so for every block here.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: valid for sixteen f32.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: __m512) {
        // SAFETY: valid for sixteen f32.
        unsafe { _mm512_storeu_ps(to, x) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m512 {
        // SAFETY: valid for sixteen f16.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> __m512 {
        // SAFETY: valid for sixteen bf16.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_words(from: *const u8) -> __m512i {
        // SAFETY: valid for 64 bytes.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_half_words(from: *const u8) -> __m512i {
        // SAFETY: valid for 32 bytes.
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn and(words: __m512i, mask: u32) -> __m512i {
        // SAFETY: values only.
        unsafe { _mm512_and_si512(words, _mm512_set1_epi32(mask.cast_signed())) }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: values only.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn shift_left<const N: i32>(words: __m512i) -> __m512i {
        // SAFETY: values only.
        unsafe { _mm512_sll_epi32(words, _mm_cvtsi32_si128(N)) }
    }
    #[inline(always)]
    unsafe fn shift_right<const N: i32>(words: __m512i) -> __m512i {
        // SAFETY: values only.
        unsafe { _mm512_srl_epi32(words, _mm_cvtsi32_si128(N)) }
    }
    /// The byte wanted is shifted to the top of its lane, then down with its sign.
    #[inline(always)]
    unsafe fn i8x4(words: __m512i) -> [__m512; 4] {
        // SAFETY: values only.
        unsafe {
            [
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(words))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<16>(words))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<8>(words))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(words)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn u8x4(words: __m512i) -> [__m512; 4] {
        // SAFETY: values only.
        unsafe {
            let low = _mm512_set1_epi32(0xff);
            [
                _mm512_cvtepi32_ps(_mm512_and_si512(words, low)),
                _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32::<8>(words), low)),
                _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32::<16>(words), low)),
                _mm512_cvtepi32_ps(_mm512_srli_epi32::<24>(words)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: values only.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        // SAFETY: values only.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: values only.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        // SAFETY: values only.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: values only.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        // SAFETY: values only.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sum(x: __m512) -> f32 {
        // SAFETY: values only.
        unsafe { _mm512_reduce_add_ps(x) }
    }
    #[inline(always)]
    unsafe fn max_lane(x: __m512) -> f32 {
        // SAFETY: values only.
        unsafe { _mm512_reduce_max_ps(x) }
    }
    #[inline(always)]
    unsafe fn exp2_integral(n: __m512) -> __m512 {
        // SAFETY: values only.
        unsafe {
            let n = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n))
        }
    }
}
