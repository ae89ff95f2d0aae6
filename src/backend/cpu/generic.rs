//! One body for every instruction set: query rows against one page, under an online softmax.
//!
//! For each row, with `m` the largest score so far, after any number of pages:
//!
//! ```text
//! sum = sum_t exp(score[t] - m)        acc[d] = sum_t exp(score[t] - m) * V[t,d]
//! ```
//!
//! Everything here is inlined into the entry points of [`super::dispatch`], which turn the instructions on.

use super::page::PageLayout;
use super::page_kernel::{Bf16, F16, F32, Int8Kernel, MAX_ROWS, PAGE_TOKENS, PageKernel, RawKernel};
use super::simd::Simd;
use crate::format::order::{DEPTH, LANES};
use crate::format::{Dtype, MAX_HEAD_DIM, TokenPage};

/// Tokens that lie together: one page of one head, and where in the sequence it begins.
#[derive(Debug, Clone, Copy)]
pub struct PageView<'a> {
    /// Position of the first token.
    pub first: usize,
    /// Tokens that the page has room for, a multiple of 16, at most [`PAGE_TOKENS`].
    pub tokens: usize,
    /// The record.
    pub record: &'a [u8],
    /// Its layout.
    pub layout: PageLayout,
}

/// Query rows of one key/value head and their softmax state.
#[derive(Debug)]
pub struct Rows<'a> {
    /// Channels.
    pub head_dim: usize,
    /// `[rows, head_dim]`, multiplied by the attention scale.
    pub q: &'a [f32],
    /// Positions that each row sees, half open.
    pub visible: &'a [(usize, usize)],
    /// Largest score so far; minus infinity at first.
    pub max: &'a mut [f32],
    /// Sum of the weights so far.
    pub sum: &'a mut [f32],
    /// `[rows, head_dim]`: weighted sum of V so far.
    pub acc: &'a mut [f32],
}

/// Memory that a kernel needs beside its rows.
#[derive(Debug)]
pub struct Scratch {
    weights: [f32; MAX_ROWS * PAGE_TOKENS],
    scaled: [f32; MAX_ROWS * MAX_HEAD_DIM],
}

impl Default for Scratch {
    fn default() -> Self {
        Self { weights: [0.0; MAX_ROWS * PAGE_TOKENS], scaled: [0.0; MAX_ROWS * MAX_HEAD_DIM] }
    }
}

/// Takes one page into the state of `rows`.
///
/// # Safety
/// The machine has `S`'s instructions.
#[inline(always)]
pub unsafe fn attend_page<S: Simd>(
    page_view: &PageView<'_>,
    rows: &mut Rows<'_>,
    softcap: Option<f32>,
    scratch: &mut Scratch,
) {
    let record = page_view.record;
    // SAFETY: passed on.
    unsafe {
        match page_view.layout {
            PageLayout::Raw(page) => match page.dtype {
                Dtype::F32 => sweep::<S, _>(&RawKernel::new(page, record, F32), page_view, rows, softcap, scratch),
                Dtype::F16 => sweep::<S, _>(&RawKernel::new(page, record, F16), page_view, rows, softcap, scratch),
                Dtype::Bf16 => sweep::<S, _>(&RawKernel::new(page, record, Bf16), page_view, rows, softcap, scratch),
            },
            PageLayout::Int8(page) => sweep::<S, _>(&Int8Kernel { page, record }, page_view, rows, softcap, scratch),
        }
    }
}

#[inline(always)]
unsafe fn sweep<S: Simd, P: PageKernel<S>>(
    page: &P,
    page_view: &PageView<'_>,
    rows: &mut Rows<'_>,
    softcap: Option<f32>,
    scratch: &mut Scratch,
) {
    let num_rows = rows.visible.len();
    assert!(
        rows.q.len() >= num_rows * rows.head_dim
            && rows.acc.len() >= num_rows * rows.head_dim
            && rows.max.len() >= num_rows
            && rows.sum.len() >= num_rows
            && rows.head_dim <= MAX_HEAD_DIM
            && page_view.tokens <= PAGE_TOKENS
    );
    let mut row = 0;
    while row < num_rows {
        let count = (num_rows - row).min(P::ROWS);
        // SAFETY: the rows exist (asserted above).
        unsafe {
            match count {
                1 => attend_rows::<S, P, 1>(page, page_view, rows, row, softcap, scratch),
                2 => attend_rows::<S, P, 2>(page, page_view, rows, row, softcap, scratch),
                3 => attend_rows::<S, P, 3>(page, page_view, rows, row, softcap, scratch),
                4 => attend_rows::<S, P, 4>(page, page_view, rows, row, softcap, scratch),
                5 => attend_rows::<S, P, 5>(page, page_view, rows, row, softcap, scratch),
                _ => attend_rows::<S, P, MAX_ROWS>(page, page_view, rows, row, softcap, scratch),
            }
        }
        row += count;
    }
}

#[inline(always)]
unsafe fn attend_rows<S: Simd, P: PageKernel<S>, const R: usize>(
    page: &P,
    page_view: &PageView<'_>,
    rows: &mut Rows<'_>,
    first_row: usize,
    softcap: Option<f32>,
    scratch: &mut Scratch,
) {
    let mut ranges = [(0, 0); R];
    let (mut low, mut high) = (usize::MAX, 0);
    for r in 0..R {
        let (start, end) = rows.visible[first_row + r];
        let start = start.saturating_sub(page_view.first);
        let end = end.saturating_sub(page_view.first).min(page_view.tokens);
        if start < end {
            ranges[r] = (start, end);
            (low, high) = (low.min(start), high.max(end));
        }
    }
    if low >= high {
        return;
    }
    let (first, end) = (low / LANES, high.div_ceil(LANES));
    let weights = scratch.weights.as_mut_ptr();
    let scaled = scratch.scaled.as_mut_ptr();
    // SAFETY: `first..end` are panels of the page; `sweep` checked the rows; the scratch holds MAX_ROWS rows.
    unsafe {
        let q = rows.q.as_ptr().add(first_row * rows.head_dim);
        let common = page.prepare::<R>(q, scaled);
        for panel in first..end {
            let scores = page.scores::<R>(panel, scaled);
            for r in 0..R {
                let mut score = S::add(scores[r], S::splat(common[r]));
                if let Some(cap) = softcap {
                    score = S::mul(S::splat(cap), S::tanh(S::mul(score, S::splat(1.0 / cap))));
                }
                S::store(weights.add(r * PAGE_TOKENS + panel * LANES), score);
            }
        }
        for r in 0..R {
            let row_weights = &mut scratch.weights[r * PAGE_TOKENS..(r + 1) * PAGE_TOKENS];
            softmax_row::<S>(row_weights, ranges[r], (first, end), first_row + r, rows);
        }
        let acc = rows.acc.as_mut_ptr().add(first_row * rows.head_dim);
        page.accumulate::<R>(first, end, scratch.weights.as_mut_ptr(), acc);
    }
}

/// Scores become weights, in panels `first..end`; the row's state is rescaled to its new maximum.
#[inline(always)]
unsafe fn softmax_row<S: Simd>(
    weights: &mut [f32],
    (start, stop): (usize, usize),
    (first, end): (usize, usize),
    row: usize,
    rows: &mut Rows<'_>,
) {
    if start >= stop {
        weights[first * LANES..end * LANES].fill(0.0);
        return;
    }
    weights[first * LANES..start.max(first * LANES)].fill(f32::NEG_INFINITY);
    weights[stop.min(end * LANES)..end * LANES].fill(f32::NEG_INFINITY);
    // SAFETY: panels of the row's weights, and the row's own state.
    unsafe {
        let weights = weights.as_mut_ptr();
        let mut largest = S::load(weights.add(first * LANES));
        for panel in first + 1..end {
            largest = S::max(largest, S::load(weights.add(panel * LANES)));
        }
        let before = rows.max[row];
        let max = before.max(S::max_lane(largest));
        let mut sums = S::splat(0.0);
        for panel in first..end {
            let at = weights.add(panel * LANES);
            let weight = S::exp(S::sub(S::load(at), S::splat(max)));
            sums = S::add(sums, weight);
            S::store(at, weight);
        }
        rows.max[row] = max;
        if max > before {
            let rescale = (before - max).exp();
            rows.sum[row] *= rescale;
            let acc = rows.acc[row * rows.head_dim..].as_mut_ptr();
            for d in (0..rows.head_dim).step_by(LANES) {
                S::store(acc.add(d), S::mul(S::load(acc.add(d)), S::splat(rescale)));
            }
        }
        rows.sum[row] += S::sum(sums);
    }
}

/// Decodes an INT8 page into an f32 `raw` page of the same size, for rows that are many.
///
/// # Safety
/// The machine has `S`'s instructions.
#[inline(always)]
pub unsafe fn unpack<S: Simd>(page: TokenPage, record: &[u8], out: &mut [f32]) {
    let TokenPage { head_dim, block_size } = page;
    assert!(record.len() >= page.bytes() && out.len() >= 2 * head_dim * block_size);
    let halves = |offset: usize| record[offset..].as_ptr().cast::<u16>();
    // SAFETY: `[block_size, head_dim]` codes and their parameters are read and written, both lengths asserted above.
    unsafe {
        let mean = widen::<S, MAX_HEAD_DIM>(halves(page.k_channel_mean()), head_dim);
        let scale = widen::<S, MAX_HEAD_DIM>(halves(page.k_channel_scale()), head_dim);
        let v_token_scale = widen::<S, PAGE_TOKENS>(halves(page.v_token_scale()), block_size);
        let zero_point = widen::<S, PAGE_TOKENS>(halves(page.v_token_zero_point()), block_size);
        let (k_codes, v_codes) = (record.as_ptr().add(page.k_codes()), record.as_ptr().add(page.v_codes()));
        let (k, v) = (out.as_mut_ptr(), out.as_mut_ptr().add(head_dim * block_size));
        for token in (0..block_size).step_by(LANES) {
            let token_scale = S::load_f16(halves(page.k_token_scale()).add(token));
            for d in (0..head_dim).step_by(DEPTH) {
                let codes = S::load_i8x4(k_codes.add(token * head_dim + d * LANES));
                for j in 0..DEPTH {
                    let scale = S::mul(S::splat(scale[d + j]), token_scale);
                    let value = S::mul_add(scale, codes[j], S::splat(mean[d + j]));
                    S::store(k.add(token * head_dim + (d + j) * LANES), value);
                }
            }
        }
        for channel in (0..head_dim).step_by(LANES) {
            for token in (0..block_size).step_by(DEPTH) {
                let codes = S::load_u8x4(v_codes.add(channel * block_size + token * LANES));
                for j in 0..DEPTH {
                    let scale = S::splat(v_token_scale[token + j]);
                    let value = S::mul_add(scale, codes[j], S::splat(zero_point[token + j]));
                    S::store(v.add(channel * block_size + (token + j) * LANES), value);
                }
            }
        }
    }
}

/// The first `count` f16 behind `from`, a multiple of 16 and at most `N`.
#[inline(always)]
unsafe fn widen<S: Simd, const N: usize>(from: *const u16, count: usize) -> [f32; N] {
    let mut out = [0.0; N];
    assert!(count <= N);
    for i in (0..count).step_by(LANES) {
        // SAFETY: the caller has `count` of them, and `out` has room.
        unsafe { S::store(out.as_mut_ptr().add(i), S::load_f16(from.add(i))) };
    }
    out
}
