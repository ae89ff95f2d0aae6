//! Running second moments of a layer's queries, and mean and variance of its K channels.
//!
//! Sums are in f64 and add one token after the other, so the result does not depend on how tokens were split into calls,
//! to the bit.

use super::HeadShape;
use super::parallel::for_each;
use crate::quant::feedback::DAMPING;
use crate::quant::{HeadCalibration, HeadFeedback, ModelChannels, rotate};

/// Rows with a larger magnitude are skipped like non-finite ones: 256 such values, summed by a rotation, still fit an f32.
const LARGEST: f32 = 1e36;

/// Multiplications (a few milliseconds) from which the heads of a layer are split among threads.
const WORTH_THREADS: usize = 1 << 23;

/// Query rows whose products are added in one pass over the sums.
const AT_ONCE: usize = 4;

/// Running sums of one key/value head.
#[derive(Debug, Clone)]
struct HeadMoments {
    /// Query rows in `products`.
    num_queries: usize,
    /// Sum of q q' over the query rows of the head's group, `[head_dim, head_dim]`: the upper triangle.
    products: Vec<f64>,
    keys: ChannelMoments,
    rotated_keys: ChannelMoments,
}

/// Mean and sum of squared deviations of each channel, by Welford's algorithm: no cancellation under a large mean.
#[derive(Debug, Clone)]
struct ChannelMoments {
    mean: Vec<f64>,
    squares: Vec<f64>,
}

/// Running sums of a layer.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    heads: Vec<HeadMoments>,
    head_dim: usize,
    num_tokens: usize,
}

impl Moments {
    pub(super) fn new(num_kv_heads: usize, head_dim: usize) -> Self {
        let channels = ChannelMoments { mean: vec![0.0; head_dim], squares: vec![0.0; head_dim] };
        let products = vec![0.0; head_dim * head_dim];
        let head = HeadMoments { num_queries: 0, products, keys: channels.clone(), rotated_keys: channels };
        Self { heads: vec![head; num_kv_heads], head_dim, num_tokens: 0 }
    }

    /// Tokens accumulated.
    pub(super) fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Accumulates the first `wanted` token rows without non-finite or huge values.
    ///
    /// q `[n, num_q_heads, head_dim]` and k `[n, num_kv_heads, head_dim]` have this layer's `shape`.
    pub(super) fn add(&mut self, shape: HeadShape, q: &[f32], k: &[f32], wanted: usize) {
        let rows: Vec<(&[f32], &[f32])> = q
            .chunks_exact(shape.num_q_heads * shape.head_dim)
            .zip(k.chunks_exact(shape.num_kv_heads * shape.head_dim))
            .filter(|(q, k)| q.iter().chain(*k).all(|x| x.abs() <= LARGEST))
            .take(wanted)
            .collect();
        let group = shape.num_q_heads / shape.num_kv_heads * shape.head_dim;
        let head_dim = self.head_dim;
        let already = self.num_tokens;
        let worth_threads = rows.len() * shape.num_q_heads * head_dim * head_dim > WORTH_THREADS;
        for_each(&mut self.heads, worth_threads, |head, moments| {
            let queries = rows.iter().flat_map(|(q, _)| q[head * group..][..group].chunks_exact(head_dim));
            moments.add_queries(queries, head_dim);
            let mut rotated = vec![0f32; head_dim];
            for (count, (_, k)) in (already + 1..).zip(&rows) {
                let k = &k[head * head_dim..][..head_dim];
                rotated.copy_from_slice(k);
                rotate(&mut rotated);
                moments.keys.add(k, count);
                moments.rotated_keys.add(&rotated, count);
            }
        });
        self.num_tokens += rows.len();
    }

    /// The feedback and channel statistics of every head. Needs at least two tokens.
    pub(super) fn factor(&self) -> Vec<HeadCalibration> {
        let mut factored = vec![None; self.heads.len()];
        for_each(&mut factored, true, |head, slot| {
            *slot = Some(self.heads[head].factor(self.head_dim, self.num_tokens));
        });
        factored.into_iter().flatten().collect()
    }
}

impl HeadMoments {
    fn add_queries<'a>(&mut self, mut rows: impl Iterator<Item = &'a [f32]>, head_dim: usize) {
        let mut wide = vec![0f64; AT_ONCE * head_dim];
        loop {
            let mut num_rows = 0;
            for (into, row) in wide.chunks_exact_mut(head_dim).zip(rows.by_ref()) {
                into.iter_mut().zip(row).for_each(|(wide, &x)| *wide = f64::from(x));
                num_rows += 1;
            }
            if num_rows == 0 {
                return;
            }
            self.num_queries += num_rows;
            wide[num_rows * head_dim..].fill(0.0); // adds nothing
            add_products(&mut self.products, &wide, head_dim);
        }
    }

    /// A head whose factors overflow or underflow f32 gets no feedback, so that it is rounded to nearest.
    fn factor(&self, head_dim: usize, num_tokens: usize) -> HeadCalibration {
        let mut moment = self.products.clone();
        for i in 0..head_dim {
            for j in i..head_dim {
                let mean = self.products[i * head_dim + j] / self.num_queries as f64;
                moment[i * head_dim + j] = mean;
                moment[j * head_dim + i] = mean;
            }
        }
        let feedback =
            HeadFeedback::factor(&moment, &self.keys.deviations(num_tokens), &self.rotated_keys.deviations(num_tokens))
                .unwrap_or_else(|_| HeadFeedback::none(head_dim));
        let mean = self.keys.mean.iter().map(|&mean| mean as f32).collect();
        let deviation = self.keys.deviations(num_tokens).iter().map(|&deviation| positive(deviation)).collect();
        let squares = || (0..head_dim).map(|d| moment[d * head_dim + d]);
        let damping = DAMPING * squares().sum::<f64>() / head_dim as f64;
        let query_rms = squares().map(|square| positive((square + damping).sqrt())).collect();
        HeadCalibration { feedback, channels: ModelChannels { mean, deviation, query_rms } }
    }
}

/// Converts to f32, at least the smallest positive normal number, since it is divided by.
fn positive(x: f64) -> f32 {
    (x as f32).max(f32::MIN_POSITIVE)
}

/// Adds x x' of rows `[AT_ONCE, head_dim]` to the upper triangle of `products`, row by row.
fn add_products(products: &mut [f64], rows: &[f64], head_dim: usize) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has AVX2.
        return unsafe { add_products_avx2(products, rows, head_dim) };
    }
    add_products_inline(products, rows, head_dim);
}

/// The same sums to the bit, in wider vectors: without FMA, each product is rounded.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn add_products_avx2(products: &mut [f64], rows: &[f64], head_dim: usize) {
    add_products_inline(products, rows, head_dim);
}

#[inline(always)]
fn add_products_inline(products: &mut [f64], rows: &[f64], head_dim: usize) {
    let rows: [&[f64]; AT_ONCE] = std::array::from_fn(|r| &rows[r * head_dim..][..head_dim]);
    for i in 0..head_dim {
        let first = i & !7; // whole vectors; elements left of the diagonal are never read
        let sums = &mut products[i * head_dim + first..(i + 1) * head_dim];
        let [a, b, c, d] = rows.map(|row| row[i]);
        let [row_a, row_b, row_c, row_d] = rows.map(|row| &row[first..]);
        for ((((sum, x), y), z), w) in sums.iter_mut().zip(row_a).zip(row_b).zip(row_c).zip(row_d) {
            *sum = *sum + a * x + b * y + c * z + d * w;
        }
    }
}

impl ChannelMoments {
    /// Adds a row, the `count`th (from 1).
    fn add(&mut self, row: &[f32], count: usize) {
        let share = 1.0 / count as f64;
        for ((mean, squares), &x) in self.mean.iter_mut().zip(&mut self.squares).zip(row) {
            let before = f64::from(x) - *mean;
            *mean += before * share;
            *squares += before * (f64::from(x) - *mean);
        }
    }

    /// Standard deviations (n - 1), not yet floored.
    fn deviations(&self, num_rows: usize) -> Vec<f64> {
        let degrees = (num_rows - 1) as f64;
        self.squares.iter().map(|squares| (squares / degrees).sqrt()).collect()
    }
}
