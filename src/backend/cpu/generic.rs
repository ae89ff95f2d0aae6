//! One body for every instruction set: query rows against one record, under an online softmax.
//!
//! For each row, with `m` the largest score so far, after any number of records:
//!
//! ```text
//! sum = sum_t exp(score[t] - m)        acc[d] = sum_t exp(score[t] - m) * V[t,d]
//! ```
//!
//! Everything here is inlined into the entry points of [`super::dispatch`], which turn the instructions on.

use super::record_kernel::{BLOCK_TOKENS, Bf16, F16, F32, Int8Kernel, MAX_ROWS, RawKernel, RecordKernel};
use super::simd::Simd;
use super::tile_kernel::TileKernel;
use crate::format::RecordLayout;
use crate::format::order::LANES;
use crate::format::{Dtype, MAX_HEAD_DIM};

/// Tokens that lie together: one block of one head, and where in the sequence it begins.
#[derive(Debug, Clone, Copy)]
pub struct RecordView<'a> {
    /// Position of the first token.
    pub first: usize,
    /// Tokens that the record has room for, a multiple of 16, at most [`BLOCK_TOKENS`].
    pub tokens: usize,
    /// The record.
    pub record: &'a [u8],
    /// Its layout.
    pub layout: RecordLayout,
    /// Is its K rotated?
    pub k_rotated: bool,
}

/// Query rows of one key/value head and their softmax state.
#[derive(Debug)]
pub struct Rows<'a> {
    /// Channels.
    pub head_dim: usize,
    /// `[rows, head_dim]`, multiplied by the attention scale.
    pub q: &'a [f32],
    /// The same, each row rotated; as long as `q` where a record may be.
    pub q_rotated: &'a [f32],
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
    weights: [f32; MAX_ROWS * BLOCK_TOKENS],
    scaled: [f32; MAX_ROWS * MAX_HEAD_DIM],
}

impl Default for Scratch {
    fn default() -> Self {
        Self { weights: [0.0; MAX_ROWS * BLOCK_TOKENS], scaled: [0.0; MAX_ROWS * MAX_HEAD_DIM] }
    }
}

/// Takes one record into the state of `rows`.
///
/// # Safety
/// The machine has `S`'s instructions.
#[inline(always)]
pub unsafe fn attend_record<S: Simd>(
    view: &RecordView<'_>,
    rows: &mut Rows<'_>,
    softcap: Option<f32>,
    scratch: &mut Scratch,
) {
    let record = view.record;
    // SAFETY: passed on.
    unsafe {
        match view.layout {
            RecordLayout::Raw(page) => match page.dtype {
                Dtype::F32 => sweep::<S, _>(&RawKernel::new(page, record, F32), view, rows, softcap, scratch),
                Dtype::F16 => sweep::<S, _>(&RawKernel::new(page, record, F16), view, rows, softcap, scratch),
                Dtype::Bf16 => sweep::<S, _>(&RawKernel::new(page, record, Bf16), view, rows, softcap, scratch),
            },
            RecordLayout::Int8(page) => sweep::<S, _>(&Int8Kernel { page, record }, view, rows, softcap, scratch),
            RecordLayout::Tile(tile) => match tile.bits {
                4 => sweep::<S, _>(&TileKernel::<4>::new(tile, record), view, rows, softcap, scratch),
                3 => sweep::<S, _>(&TileKernel::<3>::new(tile, record), view, rows, softcap, scratch),
                _ => sweep::<S, _>(&TileKernel::<2>::new(tile, record), view, rows, softcap, scratch),
            },
        }
    }
}

#[inline(always)]
unsafe fn sweep<S: Simd, P: RecordKernel<S>>(
    kernel: &P,
    view: &RecordView<'_>,
    rows: &mut Rows<'_>,
    softcap: Option<f32>,
    scratch: &mut Scratch,
) {
    let num_rows = rows.visible.len();
    let q = if view.k_rotated { rows.q_rotated } else { rows.q };
    assert!(
        q.len() >= num_rows * rows.head_dim
            && rows.acc.len() >= num_rows * rows.head_dim
            && rows.max.len() >= num_rows
            && rows.sum.len() >= num_rows
            && rows.head_dim <= MAX_HEAD_DIM
            && view.tokens <= BLOCK_TOKENS
    );
    let mut row = 0;
    while row < num_rows {
        let count = (num_rows - row).min(P::ROWS);
        // SAFETY: the rows exist (asserted above).
        unsafe {
            match count {
                1 => attend_rows::<S, P, 1>(kernel, view, rows, row, softcap, scratch),
                2 => attend_rows::<S, P, 2>(kernel, view, rows, row, softcap, scratch),
                3 => attend_rows::<S, P, 3>(kernel, view, rows, row, softcap, scratch),
                4 => attend_rows::<S, P, 4>(kernel, view, rows, row, softcap, scratch),
                5 => attend_rows::<S, P, 5>(kernel, view, rows, row, softcap, scratch),
                _ => attend_rows::<S, P, MAX_ROWS>(kernel, view, rows, row, softcap, scratch),
            }
        }
        row += count;
    }
}

#[inline(always)]
unsafe fn attend_rows<S: Simd, P: RecordKernel<S>, const R: usize>(
    kernel: &P,
    view: &RecordView<'_>,
    rows: &mut Rows<'_>,
    first_row: usize,
    softcap: Option<f32>,
    scratch: &mut Scratch,
) {
    let mut ranges = [(0, 0); R];
    let (mut low, mut high) = (usize::MAX, 0);
    for r in 0..R {
        let (start, end) = rows.visible[first_row + r];
        let start = start.saturating_sub(view.first);
        let end = end.saturating_sub(view.first).min(view.tokens);
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
    // SAFETY: `first..end` are panels of the record; `sweep` checked the rows; the scratch holds MAX_ROWS rows.
    unsafe {
        let q = if view.k_rotated { rows.q_rotated } else { rows.q }.as_ptr().add(first_row * rows.head_dim);
        let common = kernel.prepare::<R>(q, scaled);
        for panel in first..end {
            let scores = kernel.scores::<R>(panel, scaled, &common);
            for r in 0..R {
                let mut score = scores[r];
                if let Some(cap) = softcap {
                    score = S::mul(S::splat(cap), S::tanh(S::mul(score, S::splat(1.0 / cap))));
                }
                S::store(weights.add(r * BLOCK_TOKENS + panel * LANES), score);
            }
        }
        for r in 0..R {
            let row_weights = &mut scratch.weights[r * BLOCK_TOKENS..(r + 1) * BLOCK_TOKENS];
            softmax_row::<S>(row_weights, ranges[r], (first, end), first_row + r, rows);
        }
        let acc = rows.acc.as_mut_ptr().add(first_row * rows.head_dim);
        kernel.accumulate::<R>(first, end, scratch.weights.as_mut_ptr(), acc);
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
