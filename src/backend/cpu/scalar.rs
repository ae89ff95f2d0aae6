//! The level of every machine: sixteen lanes as an array, which the compiler may vectorize with what it has.

use super::simd::Simd;
use half::f16;
use std::array::from_fn;

/// No instruction set assumed.
#[derive(Debug, Clone, Copy)]
pub struct Scalar;

const WIDTH: usize = 16;
type Lanes = [f32; WIDTH];
type Words = [u32; WIDTH];

// SAFETY: plain Rust on valid pointers.
unsafe impl Simd for Scalar {
    type F = Lanes;
    type W = Words;
    const CHAINS: usize = 1;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Lanes {
        [x; WIDTH]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Lanes {
        // SAFETY: the caller's pointer is valid for the lanes.
        unsafe { from.cast::<Lanes>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: Lanes) {
        // SAFETY: the caller's pointer is valid for the lanes.
        unsafe { to.cast::<Lanes>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Lanes {
        // SAFETY: the caller's pointer is valid for the lanes.
        unsafe { from.cast::<[u16; WIDTH]>().read_unaligned() }.map(|bits| f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Lanes {
        // SAFETY: the caller's pointer is valid for the lanes.
        unsafe { from.cast::<[u16; WIDTH]>().read_unaligned() }.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }
    #[inline(always)]
    unsafe fn load_words(from: *const u8) -> Words {
        // SAFETY: the caller's pointer is valid for four bytes a lane.
        unsafe { from.cast::<Words>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_half_words(from: *const u8) -> Words {
        // SAFETY: the caller's pointer is valid for two bytes a lane.
        unsafe { from.cast::<[u16; WIDTH]>().read_unaligned() }.map(u32::from)
    }
    #[inline(always)]
    unsafe fn and(words: Words, mask: u32) -> Words {
        words.map(|word| word & mask)
    }
    #[inline(always)]
    unsafe fn or(a: Words, b: Words) -> Words {
        from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn shift_left<const N: i32>(words: Words) -> Words {
        words.map(|word| word << N)
    }
    #[inline(always)]
    unsafe fn shift_right<const N: i32>(words: Words) -> Words {
        words.map(|word| word >> N)
    }
    #[inline(always)]
    unsafe fn i8x4(words: Words) -> [Lanes; 4] {
        from_fn(|j| from_fn(|lane| f32::from(words[lane].to_le_bytes()[j].cast_signed())))
    }
    #[inline(always)]
    unsafe fn u8x4(words: Words) -> [Lanes; 4] {
        from_fn(|j| from_fn(|lane| f32::from(words[lane].to_le_bytes()[j])))
    }

    #[inline(always)]
    unsafe fn add(a: Lanes, b: Lanes) -> Lanes {
        from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Lanes, b: Lanes) -> Lanes {
        from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Lanes, b: Lanes) -> Lanes {
        from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Lanes, b: Lanes) -> Lanes {
        from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn mul_add(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        from_fn(|i| a[i] * b[i] + c[i]) // without FMA instructions a fused one would be a library call
    }
    #[inline(always)]
    unsafe fn max(a: Lanes, b: Lanes) -> Lanes {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn sum(x: Lanes) -> f32 {
        x.iter().sum()
    }
    #[inline(always)]
    unsafe fn max_lane(x: Lanes) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn exp2_integral(n: Lanes) -> Lanes {
        n.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
}
