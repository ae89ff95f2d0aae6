//! The channel statistics of a calibration, which the statistics of pages use.

mod common;

use common::Random;
use kvarn::calibration::{Calibration, HeadShape};
use kvarn::quant::ModelChannels;

const SHAPE: HeadShape = HeadShape { num_q_heads: 6, num_kv_heads: 2, head_dim: 16 };
const TOKENS: usize = 400;

/// Of an f32 that was computed in f64.
const F32: f64 = 1e-6;

/// Channel `d` of kv head `head`, of every row of its group of `heads` heads.
fn channel(values: &[f32], heads: usize, head: usize, d: usize) -> Vec<f64> {
    let group = heads / SHAPE.num_kv_heads;
    let of_group = |row: &[f32]| -> Vec<f64> {
        (head * group..(head + 1) * group).map(|head| f64::from(row[head * SHAPE.head_dim + d])).collect()
    };
    values.chunks_exact(heads * SHAPE.head_dim).flat_map(of_group).collect()
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

#[test]
fn channels_are_the_mean_and_deviation_of_k_and_the_damped_rms_of_the_queries() {
    let mut random = Random(7);
    let mut q = random.normals(TOKENS * SHAPE.num_q_heads * SHAPE.head_dim);
    q.iter_mut().enumerate().for_each(|(i, x)| *x *= (i % 16) as f32);
    let mut k = random.normals(TOKENS * SHAPE.num_kv_heads * SHAPE.head_dim);
    for row in k.chunks_exact_mut(SHAPE.head_dim) {
        row[3] = row[3].mul_add(0.01, 360.1); // f32 sums would lose its deviation
        row[5] = 0.0;
    }
    let calibration = Calibration::new();
    calibration.observe(0, SHAPE, &q, &k).expect("rows of the shape");
    let found = calibration.for_seal(0).expect("factors").expect("400 tokens");
    for (head, found) in found.heads().iter().enumerate() {
        let square = |d: usize| mean(channel(&q, SHAPE.num_q_heads, head, d).iter().map(|x| x * x));
        let damping = 0.05 * mean((0..SHAPE.head_dim).map(square));
        for d in 0..SHAPE.head_dim {
            let keys = channel(&k, SHAPE.num_kv_heads, head, d);
            let center = mean(keys.iter().copied());
            let squares: f64 = keys.iter().map(|x| (x - center) * (x - center)).sum();
            let ModelChannels { mean: means, deviation, query_rms } = &found.channels;
            for (what, found, expected) in [
                ("mean", means[d], center),
                ("deviation", deviation[d], (squares / (TOKENS - 1) as f64).sqrt()),
                ("query_rms", query_rms[d], (square(d) + damping).sqrt()),
            ] {
                let off = (f64::from(found) - expected).abs();
                let bound = expected.abs() * F32 + f64::from(f32::MIN_POSITIVE);
                assert!(off <= bound, "{what} {d}: {found}, not {expected}");
            }
        }
    }
}
