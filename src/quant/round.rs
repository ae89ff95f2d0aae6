//! Which code does a value get? Rounding of one K tile in one frame, and of one row of V.
//!
//! K, M `[head_dim, tokens]`, under one grid per channel of `M / c`, c the token scales of [`mod@super::dual_scale`] (its
//! channel scales have done their work once c is known: `r (hi - lo)` of `M / (r c)` is `hi - lo` of `M / c`):
//!
//! ```text
//! lo, hi of M / c, drawn in about their middle by the factor a: 1, 0.95, 0.85 for 4, 3, 2 bits
//! k_channel_scale = f16((hi - lo) / (2^b - 1)),  k_channel_zero_point = f16(lo),  k_token_scale = f16(c)
//! w = M;  for d = 0, 1, ..  with channel p_d:
//!   code = clamp(rint_even((w[p_d] / k_token_scale - k_channel_zero_point) / k_channel_scale), 0, 2^b - 1)
//!   e = w[p_d] - (code * k_channel_scale + k_channel_zero_point) * k_token_scale
//!   w[p_j] -= F[d,j] * e          for every j > d
//! ```
//!
//! The feedback makes up for what the narrower grid clamps (`docs/design/20261126-sealed-accuracy.md` has the figures).
//!
//! V, one rotated row: `lo` and `hi` over its channels, drawn in about their middle by the factor a;
//! `v_token_scale = f16((hi - lo) / (2^b - 1))`, `v_token_zero_point = f16(lo)`.
//!
//! A grid without width (a constant row, or a scale below f16) gives code 0.

use super::dual_scale::{DualScaleOptions, dual_scale};
use super::feedback::Feedback;
use super::lanes::{self, LANES};
use super::{rint_even, to_byte, to_f16_clamped};
use half::f16;

/// Larger values are taken for this one: rotated or subtracted, they would be infinite.
pub const LARGEST_VALUE: f32 = 1e30;

/// Channels of K whose errors are fed back to later ones in one pass over those.
const AT_ONCE: usize = 8;

/// The factor a of the grid of a channel of K.
const fn k_shrink(bits: u32) -> f32 {
    match bits {
        2 => 0.85,
        3 => 0.95,
        _ => 1.0,
    }
}

/// The factors a that are tried for a row of V after 1; of equals the first wins.
const fn v_shrinks(bits: u32) -> &'static [f32] {
    match bits {
        2 => &[0.9, 0.8, 0.7, 0.6, 0.5],
        3 => &[0.95, 0.9, 0.85, 0.8, 0.7],
        _ => &[],
    }
}

/// Bounds drawn in about their middle by the factor a; by 1 exactly as they were.
#[inline(always)]
fn drawn_in((lo, hi): (f32, f32), a: f32) -> (f32, f32) {
    let margin = (hi - lo) * ((1.0 - a) / 2.0);
    (lo + margin, hi - margin)
}

/// Largest code of `bits` bits.
const fn code_max(bits: u32) -> f32 {
    ((1u32 << bits) - 1) as f32
}

/// A K tile rounded in one frame.
#[derive(Debug, Clone, PartialEq)]
pub struct RoundedK {
    /// Codes, `[head_dim, tokens]`.
    pub codes: Vec<u8>,
    /// `k_channel_scale`, `[head_dim]`.
    pub channel_scale: Vec<f16>,
    /// `k_channel_zero_point`, `[head_dim]`.
    pub channel_zero_point: Vec<f16>,
    /// `k_token_scale`, `[tokens]`.
    pub token_scale: Vec<f16>,
    /// The feedback's running loss.
    pub loss: f64,
    /// Codes that were clamped: their value had moved off the grid.
    pub num_clamped: usize,
}

/// Rounds M, `[head_dim, tokens]` row-major, to codes of `bits` bits.
#[inline(always)]
#[must_use]
pub fn round_k(m: &[f32], tokens: usize, bits: u32, feedback: &Feedback) -> RoundedK {
    let mut rounded = grid_of(m, tokens, bits);
    let channels = feedback.order.len();
    let token_scale: Vec<f32> = rounded.token_scale.iter().map(|c| c.to_f32()).collect();
    let mut w = Vec::with_capacity(m.len());
    for &channel in &feedback.order {
        w.extend_from_slice(&m[usize::from(channel) * tokens..][..tokens]);
    }
    let mut errors = vec![0f32; AT_ONCE * tokens];
    for first in (0..channels).step_by(AT_ONCE) {
        let end = channels.min(first + AT_ONCE);
        let (rows, later) = w[first * tokens..].split_at_mut((end - first) * tokens);
        for d in first..end {
            let channel = usize::from(feedback.order[d]);
            let (row, rest) = rows[(d - first) * tokens..].split_at_mut(tokens);
            let grid = Grid {
                scale: rounded.channel_scale[channel].to_f32(),
                zero_point: rounded.channel_zero_point[channel].to_f32(),
                code_max: code_max(bits),
            };
            let codes = &mut rounded.codes[channel * tokens..][..tokens];
            let error = &mut errors[(d - first) * tokens..][..tokens];
            rounded.num_clamped += grid.round(row, &token_scale, codes, error);
            let weight = f64::from(feedback.error_scale[d]);
            rounded.loss += lanes::sum_of_squares(error, |e| e) / (weight * weight);
            for (j, row) in (d + 1..).zip(rest.chunks_exact_mut(tokens)) {
                subtract(row, feedback.matrix[d * channels + j], error);
            }
        }
        for (j, row) in (end..).zip(later.chunks_exact_mut(tokens)) {
            let factors = std::array::from_fn(|i| feedback.matrix[(first + i) * channels + j]);
            subtract_all(row, factors, &errors);
        }
    }
    rounded.loss *= f64::from(feedback.loss_scale);
    rounded
}

/// `row -= f * error`.
#[inline(always)]
fn subtract(row: &mut [f32], f: f32, error: &[f32]) {
    if f != 0.0 {
        for (w, &e) in row.iter_mut().zip(error) {
            *w -= f * e;
        }
    }
}

/// [`subtract`] for each factor and its row of `errors`, in this order, in one pass over `row`.
#[inline(always)]
fn subtract_all(row: &mut [f32], factors: [f32; AT_ONCE], errors: &[f32]) {
    let tokens = row.len();
    if factors.contains(&0.0) {
        // What is not finite times 0 is not 0.
        factors.into_iter().zip(errors.chunks_exact(tokens)).for_each(|(f, error)| subtract(row, f, error));
        return;
    }
    let rows: [&[f32]; AT_ONCE] = std::array::from_fn(|i| &errors[i * tokens..][..tokens]);
    let (chunks, rest) = row.as_chunks_mut::<LANES>();
    for (at, chunk) in chunks.iter_mut().enumerate() {
        let mut w = *chunk;
        for i in 0..AT_ONCE {
            let error = &rows[i].as_chunks::<LANES>().0[at];
            for t in 0..LANES {
                w[t] -= factors[i] * error[t];
            }
        }
        *chunk = w;
    }
    let end = tokens - rest.len();
    factors.into_iter().zip(rows).for_each(|(f, error)| subtract(rest, f, &error[end..]));
}

/// The parameters of M, without its codes.
#[inline(always)]
fn grid_of(m: &[f32], tokens: usize, bits: u32) -> RoundedK {
    let scales = dual_scale(m, tokens, DualScaleOptions::SEALED);
    let channels = m.len() / tokens;
    let mut channel_scale = Vec::with_capacity(channels);
    let mut channel_zero_point = Vec::with_capacity(channels);
    let mut balanced = vec![0f32; tokens];
    for row in m.chunks_exact(tokens) {
        for ((out, &x), &c) in balanced.iter_mut().zip(row).zip(&scales.token) {
            *out = x / c;
        }
        let (lo, hi) = drawn_in(lanes::bounds(&balanced), k_shrink(bits));
        channel_scale.push(to_f16_clamped((hi - lo) / code_max(bits)));
        channel_zero_point.push(to_f16_clamped(lo));
    }
    RoundedK {
        codes: vec![0; m.len()],
        channel_scale,
        channel_zero_point,
        token_scale: scales.token.iter().map(|&c| to_f16_clamped(c)).collect(),
        loss: 0.0,
        num_clamped: 0,
    }
}

/// The grid of one row, under its stored parameters.
#[derive(Clone, Copy)]
struct Grid {
    scale: f32,
    zero_point: f32,
    code_max: f32,
}

impl Grid {
    /// The code of a value of the row; a value beyond the grid, or a row without width, is clamped.
    #[inline(always)]
    fn code(self, x: f32) -> (f32, bool) {
        let nearest = rint_even((x - self.zero_point) / self.scale);
        let inside = nearest.clamp(0.0, self.code_max);
        (if self.scale > 0.0 { inside } else { 0.0 }, self.scale > 0.0 && inside != nearest)
    }

    #[inline(always)]
    fn decode(self, code: f32) -> f32 {
        code * self.scale + self.zero_point
    }

    /// Rounds one channel of K; writes what is left of each value to `error`, and counts the clamped.
    #[inline(always)]
    fn round(self, row: &[f32], token_scale: &[f32], codes: &mut [u8], error: &mut [f32]) -> usize {
        let tokens = row.len();
        let (token_scale, codes, error) = (&token_scale[..tokens], &mut codes[..tokens], &mut error[..tokens]);
        let mut num_clamped = 0u32;
        for t in 0..tokens {
            let c = token_scale[t];
            let (code, clamped) = self.code(row[t] / c);
            let code = if c > 0.0 { code } else { 0.0 };
            error[t] = row[t] - self.decode(code) * c;
            codes[t] = to_byte(code);
            num_clamped += u32::from(clamped && c > 0.0);
        }
        num_clamped as usize
    }
}

/// Rounds one row of V to codes of `bits` bits; gives its `v_token_scale` and `v_token_zero_point`.
#[inline(always)]
pub fn round_v(row: &[f32], bits: u32, codes: &mut [u8]) -> (f16, f16) {
    let (lo, hi) = lanes::bounds(row);
    let (lo, hi) = (lo.clamp(-LARGEST_VALUE, LARGEST_VALUE), hi.clamp(-LARGEST_VALUE, LARGEST_VALUE));
    let grid_of = |a: f32| {
        let (lo, hi) = drawn_in((lo, hi), a);
        (to_f16_clamped((hi - lo) / code_max(bits)), to_f16_clamped(lo))
    };
    let widen = |(scale, zero_point): (f16, f16)| Grid {
        scale: scale.to_f32(),
        zero_point: zero_point.to_f32(),
        code_max: code_max(bits),
    };
    let mut best = grid_of(1.0);
    if !v_shrinks(bits).is_empty() {
        let mut smallest = squared_error(row, widen(best));
        for a in v_shrinks(bits) {
            let tried = grid_of(*a);
            let error = squared_error(row, widen(tried));
            if error < smallest {
                (best, smallest) = (tried, error);
            }
        }
    }
    let grid = widen(best);
    for (code, &x) in codes.iter_mut().zip(row) {
        *code = to_byte(grid.code(x).0);
    }
    best
}

/// The squared error of a row under a grid.
#[inline(always)]
fn squared_error(row: &[f32], grid: Grid) -> f64 {
    lanes::sum_of_squares(row, |x| x - grid.decode(grid.code(x).0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_number_is_its_byte() {
        assert!((0..=255u8).all(|code| to_byte(f32::from(code)) == code));
    }

    #[test]
    fn a_row_without_width_has_codes_zero_and_keeps_its_error() {
        let grid = Grid { scale: 0.0, zero_point: 2.0, code_max: 15.0 };
        let (mut codes, mut error) = ([9u8; 3], [9f32; 3]);
        assert_eq!(grid.round(&[2.0, 3.0, -1.0], &[1.0, 1.0, 2.0], &mut codes, &mut error), 0);
        assert_eq!((codes, error), ([0; 3], [0.0, 1.0, -5.0]));
    }

    #[test]
    fn a_token_without_scale_has_code_zero_and_decodes_to_zero() {
        let grid = Grid { scale: 0.5, zero_point: 2.0, code_max: 15.0 };
        let (mut codes, mut error) = ([9u8; 2], [9f32; 2]);
        assert_eq!(grid.round(&[3.0, 0.0], &[0.0, 0.0], &mut codes, &mut error), 0);
        assert_eq!((codes, error), ([0; 2], [3.0, 0.0]));
    }

    #[test]
    fn a_value_off_the_grid_is_clamped_counted_and_its_error_kept() {
        let grid = Grid { scale: 0.5, zero_point: -1.0, code_max: 3.0 };
        let (mut codes, mut error) = ([9u8; 4], [9f32; 4]);
        assert_eq!(grid.round(&[2.0, -4.0, 0.5, 0.7], &[1.0; 4], &mut codes, &mut error), 2);
        assert_eq!((codes, error[0], error[1], error[2]), ([3, 0, 3, 3], 1.5, -3.0, 0.0));
    }

    #[test]
    fn an_error_moves_the_channels_after_it_and_no_other() {
        // p = (1, 0), F = -0.5 from channel 1 to channel 0, the error of channel 0 weighed half, m = 4
        let m = [0.0, 1.0, 2.0, 2.5, 0.0, 1.0, 2.25, 3.0];
        let feedback = Feedback {
            order: vec![1, 0],
            matrix: vec![0.0, -0.5, 0.0, 0.0],
            error_scale: vec![1.0, 2.0],
            loss_scale: 4.0,
        };
        let (with, none) = (round_k(&m, 4, 2, &feedback), round_k(&m, 4, 2, &Feedback::none(2)));
        assert_eq!(with.codes[4..], none.codes[4..], "the first in the order is rounded as it is");
        let decoded = |d: usize, t: usize| {
            let (a, z) = (with.channel_scale[d].to_f32(), with.channel_zero_point[d].to_f32());
            (f32::from(with.codes[d * 4 + t]) * a + z) * with.token_scale[t].to_f32()
        };
        let mut loss = 0.0;
        for t in 0..4 {
            let first = m[4 + t] - decoded(1, t);
            let second = m[t] + 0.5 * first - decoded(0, t);
            loss += 4.0 * (first * first + second * second / 4.0);
        }
        assert!(loss > 0.0 && (with.loss - f64::from(loss)).abs() < 1e-6, "{} for {loss}", with.loss);
    }
}
