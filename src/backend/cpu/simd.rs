//! What an instruction set must do: the words that the generic kernels are written in.

/// Vectors of [`crate::format::order::LANES`] (16) f32, whatever registers a level has. A level implements this once;
/// every kernel is written against it.
///
/// # Safety
/// The methods may only run on a machine that has the level's instructions, and pointers must be valid for the lanes
/// (or bytes) that they say.
pub unsafe trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen f32 lanes.
    type F: Copy;
    /// Sixteen lanes of 32 bits.
    type W: Copy;

    /// Partial sums of a row that keep the multipliers busy, while one waits for its last addition: 1 or 2.
    const CHAINS: usize;

    /// Every lane `x`.
    unsafe fn splat(x: f32) -> Self::F;
    /// Reads sixteen f32.
    unsafe fn load(from: *const f32) -> Self::F;
    /// Writes sixteen f32.
    unsafe fn store(to: *mut f32, x: Self::F);
    /// Reads sixteen f16, widened.
    unsafe fn load_f16(from: *const u16) -> Self::F;
    /// Reads sixteen bf16, widened.
    unsafe fn load_bf16(from: *const u16) -> Self::F;
    /// Reads sixteen words of 32 bits.
    unsafe fn load_words(from: *const u8) -> Self::W;
    /// Reads sixteen words of 16 bits, widened with zeros.
    unsafe fn load_half_words(from: *const u8) -> Self::W;
    /// `words & mask`
    unsafe fn and(words: Self::W, mask: u32) -> Self::W;
    /// `a | b`
    unsafe fn or(a: Self::W, b: Self::W) -> Self::W;
    /// `words << N`
    unsafe fn shift_left<const N: i32>(words: Self::W) -> Self::W;
    /// `words >> N`, zeros from above.
    unsafe fn shift_right<const N: i32>(words: Self::W) -> Self::W;
    /// The four i8 of every word, as four vectors.
    unsafe fn i8x4(words: Self::W) -> [Self::F; 4];
    /// The four u8 of every word.
    unsafe fn u8x4(words: Self::W) -> [Self::F; 4];

    /// `a + b`
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, fused where the level can.
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger of `a` and `b`; neither is NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// Sum of the lanes.
    unsafe fn sum(x: Self::F) -> f32;
    /// Largest lane.
    unsafe fn max_lane(x: Self::F) -> f32;
    /// `2^n` for integral `n` in -127 ..= 127, given as floats; 0 at -127.
    unsafe fn exp2_integral(n: Self::F) -> Self::F;

    /// `e^x`, within 2 units in the last place; 0 below -87.7 (minus infinity included), finite above 88.
    #[inline(always)]
    unsafe fn exp(x: Self::F) -> Self::F {
        // Range reduction by ln 2 in two parts, then the degree-6 polynomial of Cephes' expf.
        const SHIFT: f32 = 12_582_912.0; // rounds to integers, ties to even
        // SAFETY: arithmetic on values.
        unsafe {
            let zero = Self::splat(0.0);
            let x = Self::max(x, Self::splat(-88.0));
            let x = Self::sub(zero, Self::max(Self::sub(zero, x), Self::splat(-88.0)));
            let shift = Self::splat(SHIFT);
            let n = Self::sub(Self::mul_add(x, Self::splat(std::f32::consts::LOG2_E), shift), shift);
            let r = Self::mul_add(n, Self::splat(-0.693_359_4), x);
            let r = Self::mul_add(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.987_569_1e-4);
            p = Self::mul_add(p, r, Self::splat(1.398_199_9e-3));
            p = Self::mul_add(p, r, Self::splat(8.333_452e-3));
            p = Self::mul_add(p, r, Self::splat(4.166_579_6e-2));
            p = Self::mul_add(p, r, Self::splat(0.166_666_65));
            p = Self::mul_add(p, r, Self::splat(0.5));
            let p = Self::add(Self::mul_add(Self::mul(r, r), p, r), Self::splat(1.0));
            Self::mul(p, Self::exp2_integral(n))
        }
    }

    /// `tanh(x)`, within 1e-6 of it.
    #[inline(always)]
    unsafe fn tanh(x: Self::F) -> Self::F {
        // SAFETY: arithmetic on values.
        unsafe {
            let one = Self::splat(1.0);
            let e = Self::exp(Self::add(x, x));
            Self::sub(one, Self::div(Self::splat(2.0), Self::add(e, one)))
        }
    }
}
