//! Which scale per channel and which per token make a K tile even? Dual scaling (`VarN`, of `KVarN`, arXiv:2606.03458).
//!
//! For M, `[channels, tokens]`, in f32:
//!
//! ```text
//! g = sqrt(mean(M^2)) / 4  (1 if M = 0);  M = M / g;  r = 1, c = 1
//! repeat:
//!   c <- clamp(c * clamp(std over channels of M/(r c), 1e-3, 1e3), e^-0.3, e^10)
//!   r <- clamp(r * clamp(std over tokens of M/(r c), 1e-3, 1e3), e^-0.3, e^10)
//!   keep the (r, c) of the lowest I = max/min of the std over channels + max/min of the std over tokens
//! ```
//!
//! `std` subtracts the mean and divides by n - 1. A perfect I is 2; ties go to the newer iterate, and the start counts.
//! The logarithms of the paper are left out: their sums are these products, and no library's `exp` is in the bytes.
//! Without the division by g (the reference codec) the floor e^-0.3 switches the method off where K is small.

use super::lanes;

/// Deviations are held within this and its inverse, here and in I.
const SMALLEST_DEVIATION: f32 = 1e-3;
/// Deviations are held within this and its inverse, here and in I.
const LARGEST_DEVIATION: f32 = 1e3;
/// e^-0.3.
const SMALLEST_SCALE: f32 = 0.740_818_2;
/// e^10.
const LARGEST_SCALE: f32 = 22_026.465;

/// The scales of a tile; `channel[d] * token[t]` is what M is divided by.
#[derive(Debug, Clone, PartialEq)]
pub struct DualScale {
    /// r, of each channel (row of M), with g folded in.
    pub channel: Vec<f32>,
    /// c, of each token (column of M), from e^-0.3 to e^10.
    pub token: Vec<f32>,
    /// I of `M / (r c)`.
    pub imbalance: f32,
}

/// How scales are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DualScaleOptions {
    /// T, how often both scales are refined.
    pub iterations: usize,
    /// Is M divided by g first?
    pub rms_step: bool,
}

impl DualScaleOptions {
    /// Of sealed tiles.
    pub const SEALED: Self = Self { iterations: 2, rms_step: true };
    /// Of the reference codec.
    pub const REFERENCE: Self = Self { iterations: 8, rms_step: false };
}

/// Finds the scales of `m`, `[channels, tokens]` row-major. (A V tile of the reference has its tokens as rows and its
/// channels as columns.)
#[inline(always)]
#[must_use]
pub fn dual_scale(m: &[f32], tokens: usize, options: DualScaleOptions) -> DualScale {
    let unit = if options.rms_step { unit_of(m) } else { 1.0 };
    let inverse = 1.0 / unit;
    let m: Vec<f32> = m.iter().map(|&x| (f64::from(x) * inverse) as f32).collect();
    let mut scales =
        DualScale { channel: vec![1.0; m.len() / tokens], token: vec![1.0; tokens], imbalance: f32::INFINITY };
    let mut balanced = m.clone();
    let mut over_tokens = vec![0.0; scales.channel.len()];
    let mut over_channels = vec![0.0; tokens];
    deviations_over_channels(&balanced, &mut over_channels);
    deviations_over_tokens(&balanced, tokens, &mut over_tokens);
    scales.imbalance = spread(&over_channels) + spread(&over_tokens);
    let mut best = scales.clone();
    for _ in 0..options.iterations {
        refine(&mut scales.token, &over_channels);
        divide(&m, &scales, &mut balanced);
        deviations_over_tokens(&balanced, tokens, &mut over_tokens);
        refine(&mut scales.channel, &over_tokens);
        divide(&m, &scales, &mut balanced);
        deviations_over_channels(&balanced, &mut over_channels);
        deviations_over_tokens(&balanced, tokens, &mut over_tokens);
        scales.imbalance = spread(&over_channels) + spread(&over_tokens);
        if scales.imbalance <= best.imbalance {
            best.clone_from(&scales);
        }
    }
    for r in &mut best.channel {
        *r = (f64::from(*r) * unit) as f32;
    }
    best
}

/// g: a quarter of the root mean square, 1 for a tile of zeros.
#[inline(always)]
fn unit_of(m: &[f32]) -> f64 {
    let unit = (lanes::sum_of_squares(m, |x| x) / m.len() as f64).sqrt() / 4.0;
    if unit > 0.0 { unit } else { 1.0 }
}

#[inline(always)]
fn refine(scale: &mut [f32], deviation: &[f32]) {
    for (scale, &deviation) in scale.iter_mut().zip(deviation) {
        *scale = (*scale * bounded(deviation)).clamp(SMALLEST_SCALE, LARGEST_SCALE);
    }
}

#[inline(always)]
fn bounded(deviation: f32) -> f32 {
    deviation.clamp(SMALLEST_DEVIATION, LARGEST_DEVIATION)
}

/// Largest over smallest deviation, each bounded.
#[inline(always)]
fn spread(deviation: &[f32]) -> f32 {
    let (lo, hi) = lanes::bounds(deviation);
    bounded(hi) / bounded(lo)
}

/// `balanced = m / (r c)`.
#[inline(always)]
fn divide(m: &[f32], scales: &DualScale, balanced: &mut [f32]) {
    let tokens = scales.token.len();
    for ((out, row), &r) in balanced.chunks_exact_mut(tokens).zip(m.chunks_exact(tokens)).zip(&scales.channel) {
        for ((out, &x), &c) in out.iter_mut().zip(row).zip(&scales.token) {
            *out = x / (r * c);
        }
    }
}

/// The deviation of each row, over its tokens.
#[inline(always)]
fn deviations_over_tokens(m: &[f32], tokens: usize, out: &mut [f32]) {
    let degrees = tokens.saturating_sub(1).max(1) as f32;
    for (out, row) in out.iter_mut().zip(m.chunks_exact(tokens)) {
        let mean = lanes::sum(row, |x| x) / tokens as f32;
        *out = (lanes::sum(row, |x| (x - mean) * (x - mean)) / degrees).sqrt();
    }
}

/// The deviation of each column, over the channels.
#[inline(always)]
fn deviations_over_channels(m: &[f32], out: &mut [f32]) {
    let tokens = out.len();
    let channels = m.len() / tokens;
    let mut mean = vec![0f32; tokens];
    for row in m.chunks_exact(tokens) {
        for (sum, &x) in mean.iter_mut().zip(row) {
            *sum += x;
        }
    }
    for sum in &mut mean {
        *sum /= channels as f32;
    }
    out.fill(0.0);
    for row in m.chunks_exact(tokens) {
        for ((sum, &x), &mean) in out.iter_mut().zip(row).zip(&mean) {
            *sum += (x - mean) * (x - mean);
        }
    }
    let degrees = channels.saturating_sub(1).max(1) as f32;
    for sum in out {
        *sum = (*sum / degrees).sqrt();
    }
}
