//! Scores and sums over one record, as it is stored: what differs between layouts. Pages are here, tiles beside.

use super::simd::Simd;
use crate::format::order::{DEPTH, LANES};
use crate::format::{Int8Page, MAX_HEAD_DIM, RawPage};

/// Most query rows that a kernel takes at once.
pub const MAX_ROWS: usize = 6;
/// Most tokens of a block: the distance between two rows of weights.
pub const BLOCK_TOKENS: usize = 128;

/// Room for the partial sums of a row; [`Simd::CHAINS`] of them are used.
pub const MAX_CHAINS: usize = 2;

/// The partial sum that term `index` of a row's sum is added to.
#[inline(always)]
pub const fn chain<S: Simd>(rows: usize, index: usize) -> usize {
    if rows * S::CHAINS <= MAX_ROWS { index % S::CHAINS } else { 0 }
}

/// One block of one head, read by `R` query rows at once.
///
/// # Safety
/// Methods run on a machine with `S`'s instructions; panels lie within the record; `q` is `[R, head_dim]`, `scaled`
/// `[R, MAX_HEAD_DIM]`, `weights` `[R, BLOCK_TOKENS]`, `acc` `[R, head_dim]`.
pub unsafe trait RecordKernel<S: Simd> {
    /// Rows that fit the registers.
    const ROWS: usize;

    /// Writes the queries as [`Self::scores`] wants them; gives what the sums of a row have in common.
    unsafe fn prepare<const R: usize>(&self, q: *const f32, scaled: *mut f32) -> [f32; R];

    /// Products of the rows with the sixteen tokens of `panel`.
    unsafe fn scores<const R: usize>(&self, panel: usize, scaled: *const f32, common: &[f32; R]) -> [S::F; R];

    /// `acc += weights * V` over the panels `first..end`; may change the weights.
    unsafe fn accumulate<const R: usize>(&self, first: usize, end: usize, weights: *mut f32, acc: *mut f32);
}

/// An element type of `raw` pages.
pub trait Element: Copy {
    /// Reads sixteen elements from element `index` on.
    ///
    /// # Safety
    /// They lie behind `base`; the machine has `S`'s instructions.
    unsafe fn load<S: Simd>(base: *const u8, index: usize) -> S::F;
}

macro_rules! element {
    ($name:ident, $bits:ty, $load:ident) => {
        #[derive(Debug, Clone, Copy)]
        pub struct $name;

        impl Element for $name {
            #[inline(always)]
            unsafe fn load<S: Simd>(base: *const u8, index: usize) -> S::F {
                // SAFETY: passed on to the caller.
                unsafe { S::$load(base.cast::<$bits>().add(index)) }
            }
        }
    };
}
element!(F32, f32, load);
element!(F16, u16, load_f16);
element!(Bf16, u16, load_bf16);

/// A `raw` page in [`crate::format::Arrangement::Cpu`].
pub struct RawKernel<E> {
    k: *const u8,
    v: *const u8,
    block_size: usize,
    head_dim: usize,
    element: E,
}

impl<E: Element> RawKernel<E> {
    pub fn new(page: RawPage, record: &[u8], element: E) -> Self {
        debug_assert!(record.len() >= page.bytes());
        let k = record[page.k()..].as_ptr();
        Self { k, v: record[page.v()..].as_ptr(), block_size: page.block_size, head_dim: page.head_dim, element }
    }
}

// SAFETY: reads stay within the record that `new` was given, by the caller's panels.
unsafe impl<S: Simd, E: Element> RecordKernel<S> for RawKernel<E> {
    const ROWS: usize = 6;

    #[inline(always)]
    unsafe fn prepare<const R: usize>(&self, q: *const f32, scaled: *mut f32) -> [f32; R] {
        let _ = self.element;
        for r in 0..R {
            // SAFETY: `[R, head_dim]` into `[R, MAX_HEAD_DIM]`.
            unsafe {
                std::ptr::copy_nonoverlapping(q.add(r * self.head_dim), scaled.add(r * MAX_HEAD_DIM), self.head_dim);
            }
        }
        [0.0; R]
    }

    #[inline(always)]
    unsafe fn scores<const R: usize>(&self, panel: usize, scaled: *const f32, _: &[f32; R]) -> [S::F; R] {
        // SAFETY: see the trait.
        unsafe {
            let mut sums = [[S::splat(0.0); R]; MAX_CHAINS];
            let first = panel * LANES * self.head_dim;
            for d in (0..self.head_dim).step_by(MAX_CHAINS) {
                for j in 0..MAX_CHAINS {
                    let k = E::load::<S>(self.k, first + (d + j) * LANES);
                    let sums = &mut sums[chain::<S>(R, j)];
                    for r in 0..R {
                        sums[r] = S::mul_add(S::splat(*scaled.add(r * MAX_HEAD_DIM + d + j)), k, sums[r]);
                    }
                }
            }
            total::<S, R>(sums)
        }
    }

    #[inline(always)]
    unsafe fn accumulate<const R: usize>(&self, first: usize, end: usize, weights: *mut f32, acc: *mut f32) {
        // SAFETY: see the trait.
        unsafe {
            for channel in (0..self.head_dim).step_by(LANES) {
                let mut sums = [[S::splat(0.0); R]; MAX_CHAINS];
                for r in 0..R {
                    sums[0][r] = S::load(acc.add(r * self.head_dim + channel));
                }
                for t in (first * LANES..end * LANES).step_by(MAX_CHAINS) {
                    for j in 0..MAX_CHAINS {
                        let v = E::load::<S>(self.v, channel * self.block_size + (t + j) * LANES);
                        let sums = &mut sums[chain::<S>(R, j)];
                        for r in 0..R {
                            sums[r] = S::mul_add(S::splat(*weights.add(r * BLOCK_TOKENS + t + j)), v, sums[r]);
                        }
                    }
                }
                let sums = total::<S, R>(sums);
                for r in 0..R {
                    S::store(acc.add(r * self.head_dim + channel), sums[r]);
                }
            }
        }
    }
}

/// The sum of each row's partial sums.
///
/// # Safety
/// The machine has `S`'s instructions.
#[inline(always)]
pub unsafe fn total<S: Simd, const R: usize>(sums: [[S::F; R]; MAX_CHAINS]) -> [S::F; R] {
    let [mut total, rest] = sums;
    if chain::<S>(R, 1) == 1 {
        for r in 0..R {
            // SAFETY: arithmetic on values.
            total[r] = unsafe { S::add(total[r], rest[r]) };
        }
    }
    total
}

/// Scales query rows by channel: gives `q . offset` of each, and `q * scale` in `scaled`.
///
/// # Safety
/// That of [`RecordKernel`]; `scale` and `offset` are `[head_dim]` f16.
#[inline(always)]
pub unsafe fn scale_queries<S: Simd, const R: usize>(
    head_dim: usize,
    q: *const f32,
    scale: *const u16,
    offset: *const u16,
    scaled: *mut f32,
) -> [f32; R] {
    // SAFETY: passed on.
    unsafe {
        let mut sums = [S::splat(0.0); R];
        for d in (0..head_dim).step_by(LANES) {
            let (scale, offset) = (S::load_f16(scale.add(d)), S::load_f16(offset.add(d)));
            for r in 0..R {
                let q = S::load(q.add(r * head_dim + d));
                sums[r] = S::mul_add(q, offset, sums[r]);
                S::store(scaled.add(r * MAX_HEAD_DIM + d), S::mul(q, scale));
            }
        }
        sums.map(|sum| S::sum(sum))
    }
}

/// Scales weights by token, over the panels `first..end`: gives `weights . zero_point` of each row.
///
/// # Safety
/// That of [`RecordKernel`]; `scale` and `zero_point` are f16, one a token.
#[inline(always)]
pub unsafe fn scale_weights<S: Simd, const R: usize>(
    first: usize,
    end: usize,
    scale: *const u16,
    zero_point: *const u16,
    weights: *mut f32,
) -> [f32; R] {
    // SAFETY: passed on.
    unsafe {
        let mut sums = [S::splat(0.0); R];
        for t in (first * LANES..end * LANES).step_by(LANES) {
            let (scale, zero_point) = (S::load_f16(scale.add(t)), S::load_f16(zero_point.add(t)));
            for r in 0..R {
                let weight = S::load(weights.add(r * BLOCK_TOKENS + t));
                sums[r] = S::mul_add(weight, zero_point, sums[r]);
                S::store(weights.add(r * BLOCK_TOKENS + t), S::mul(weight, scale));
            }
        }
        sums.map(|sum| S::sum(sum))
    }
}

/// An INT8 page: codes in [`crate::format::Arrangement::Cpu`].
///
/// ```text
/// q . K^[t] = q . k_channel_mean + k_token_scale[t] * sum_d (q_d * k_channel_scale[d]) * code[t,d]
/// sum_t p[t] V^[t,d] = sum_t (p[t] * v_token_scale[t]) * code[t,d] + sum_t p[t] * v_token_zero_point[t]
/// ```
pub struct Int8Kernel<'a> {
    pub page: Int8Page,
    pub record: &'a [u8],
}

impl Int8Kernel<'_> {
    #[inline(always)]
    fn halves(&self, offset: usize) -> *const u16 {
        self.record[offset..].as_ptr().cast()
    }
}

// SAFETY: reads stay within the record, by its layout and the caller's panels.
unsafe impl<S: Simd> RecordKernel<S> for Int8Kernel<'_> {
    const ROWS: usize = 4;

    #[inline(always)]
    unsafe fn prepare<const R: usize>(&self, q: *const f32, scaled: *mut f32) -> [f32; R] {
        let head_dim = self.page.head_dim;
        let mean = self.halves(self.page.k_channel_mean());
        let scale = self.halves(self.page.k_channel_scale());
        // SAFETY: see the trait.
        unsafe { scale_queries::<S, R>(head_dim, q, scale, mean, scaled) }
    }

    #[inline(always)]
    unsafe fn scores<const R: usize>(&self, panel: usize, scaled: *const f32, common: &[f32; R]) -> [S::F; R] {
        let head_dim = self.page.head_dim;
        // SAFETY: see the trait.
        unsafe {
            let codes = self.record.as_ptr().add(self.page.k_codes() + panel * LANES * head_dim);
            let mut sums = [[S::splat(0.0); R]; MAX_CHAINS];
            for d in (0..head_dim).step_by(DEPTH) {
                let k = S::i8x4(S::load_words(codes.add(d * LANES)));
                for j in 0..DEPTH {
                    let sums = &mut sums[chain::<S>(R, j)];
                    for r in 0..R {
                        sums[r] = S::mul_add(S::splat(*scaled.add(r * MAX_HEAD_DIM + d + j)), k[j], sums[r]);
                    }
                }
            }
            let mut sums = total::<S, R>(sums);
            let token_scale = S::load_f16(self.halves(self.page.k_token_scale()).add(panel * LANES));
            for r in 0..R {
                sums[r] = S::add(S::mul(sums[r], token_scale), S::splat(common[r]));
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn accumulate<const R: usize>(&self, first: usize, end: usize, weights: *mut f32, acc: *mut f32) {
        let head_dim = self.page.head_dim;
        let scale = self.halves(self.page.v_token_scale());
        let zero_point = self.halves(self.page.v_token_zero_point());
        // SAFETY: see the trait.
        unsafe {
            let common = scale_weights::<S, R>(first, end, scale, zero_point, weights);
            let codes = self.record.as_ptr().add(self.page.v_codes());
            for channel in (0..head_dim).step_by(LANES) {
                let mut sums = [[S::splat(0.0); R]; MAX_CHAINS];
                for r in 0..R {
                    sums[0][r] = S::add(S::load(acc.add(r * head_dim + channel)), S::splat(common[r]));
                }
                for t in (first * LANES..end * LANES).step_by(DEPTH) {
                    let v = S::u8x4(S::load_words(codes.add(channel * self.page.block_size + t * LANES)));
                    for j in 0..DEPTH {
                        let sums = &mut sums[chain::<S>(R, j)];
                        for r in 0..R {
                            sums[r] = S::mul_add(S::splat(*weights.add(r * BLOCK_TOKENS + t + j)), v[j], sums[r]);
                        }
                    }
                }
                let sums = total::<S, R>(sums);
                for r in 0..R {
                    S::store(acc.add(r * head_dim + channel), sums[r]);
                }
            }
        }
    }
}
