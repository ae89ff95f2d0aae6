//! The inputs of the golden tiles and matrices, by the formulas in `make_sealed_tiles.py`.

#![allow(dead_code, reason = "each test file takes what it needs")]

use kvarn::quant::{rotate, rotate_moment};

fn to_1024ths(x: f64) -> f32 {
    ((x * 1024.0).round_ties_even() / 1024.0) as f32
}

/// K, `[tokens, head_dim]`.
pub fn keys(head_dim: usize, tokens: usize) -> Vec<f32> {
    keys_with(head_dim, tokens, |_| 1.0)
}

/// K whose every 16th channel is 24 times as loud.
pub fn loud_keys(head_dim: usize, tokens: usize) -> Vec<f32> {
    keys_with(head_dim, tokens, |d| if d.is_multiple_of(16) { 24.0 } else { 1.0 })
}

fn keys_with(head_dim: usize, tokens: usize, gain: impl Fn(usize) -> f64) -> Vec<f32> {
    let mut k = Vec::with_capacity(tokens * head_dim);
    for t in 0..tokens {
        for d in 0..head_dim {
            let (time, channel) = (t as f64, d as f64);
            let bias = if d.is_multiple_of(4) { (channel - head_dim as f64 / 2.0) / 4.0 } else { 0.0 };
            let x = (0.37 * time + 1.3 * channel).sin() * (1 + d % 5) as f64
                + (1.9 * time * (1 + d % 3) as f64 + 0.7 * channel).sin()
                + bias;
            k.push(to_1024ths(x * gain(d)));
        }
    }
    k
}

/// V, `[tokens, head_dim]`, taken as rotated.
pub fn values(head_dim: usize, tokens: usize) -> Vec<f32> {
    let mut v = Vec::with_capacity(tokens * head_dim);
    for t in 0..tokens {
        for d in 0..head_dim {
            let (time, channel) = (t as f64, d as f64);
            v.push(to_1024ths((0.11 * time * (1 + d % 7) as f64 + 0.2 * channel).cos() * (0.5 + time / 64.0)));
        }
    }
    v
}

/// S, `[head_dim, head_dim]`: `4 / rank * Q' Q + 0.3 I`.
pub fn query_moment(head_dim: usize, rank: usize) -> Vec<f64> {
    let q = |r: usize, d: usize| {
        let i = r * head_dim + d;
        ((31 * i * i + 7 * i) % 1009) as f64 / 1009.0 * 2.0 - 1.0
    };
    let mut moment = vec![0.0; head_dim * head_dim];
    for a in 0..head_dim {
        for b in 0..head_dim {
            let product: f64 = (0..rank).map(|r| q(r, a) * q(r, b)).sum();
            moment[a * head_dim + b] = 4.0 / rank as f64 * product + if a == b { 0.3 } else { 0.0 };
        }
    }
    moment
}

/// `H S H`.
pub fn turned_moment(head_dim: usize, rank: usize) -> Vec<f64> {
    let mut moment = query_moment(head_dim, rank);
    rotate_moment(&mut moment, head_dim);
    moment
}

/// `K H`.
pub fn turned(k: &[f32], head_dim: usize) -> Vec<f32> {
    let mut k = k.to_vec();
    k.chunks_exact_mut(head_dim).for_each(rotate);
    k
}

/// `[rows, columns]` to `[columns, rows]`.
pub fn transposed(m: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|c| m.iter().skip(c).step_by(columns).copied()).collect()
}

/// The deviation (n - 1) of each row of `m`.
pub fn deviation(m: &[f32], columns: usize) -> Vec<f64> {
    m.chunks_exact(columns)
        .map(|row| {
            let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / columns as f64;
            let squares: f64 = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum();
            (squares / (columns - 1) as f64).sqrt()
        })
        .collect()
}
