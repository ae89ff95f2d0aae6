//! Benchmark of sealing a block of 128 tokens, and of learning the calibration that it uses.

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/golden/inputs.rs"]
mod inputs;

use common::Random;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use inputs::{deviation, keys, query_moment, transposed, turned, values};
use kvarn::calibration::{Calibration, HeadShape};
use kvarn::quant::{HeadFeedback, Tile, encode_tile};
use std::hint::black_box;

const TOKENS: usize = 128;
/// Tokens that are shown to a calibration before it is frozen.
const SHOWN: usize = 512;

fn head_feedback(k: &[f32], head_dim: usize, rank: usize) -> HeadFeedback {
    let plain = deviation(&transposed(k, head_dim), TOKENS);
    let rotated = deviation(&transposed(&turned(k, head_dim), head_dim), TOKENS);
    HeadFeedback::factor(&query_moment(head_dim, rank), &plain, &rotated).expect("a moment")
}

type Encode = unsafe fn(&[f32], &[f32], usize, u32, &HeadFeedback) -> Tile;

fn scalar(k: &[f32], v: &[f32], head_dim: usize, bits: u32, feedback: &HeadFeedback) -> Tile {
    encode_tile(k, v, head_dim, bits, feedback, None)
}

/// The same body under the instructions that the CPU backend compiles it with.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2(k: &[f32], v: &[f32], head_dim: usize, bits: u32, feedback: &HeadFeedback) -> Tile {
    encode_tile(k, v, head_dim, bits, feedback, None)
}

fn levels() -> Vec<(&'static str, Encode)> {
    let mut levels: Vec<(&'static str, Encode)> = vec![("scalar", scalar)];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        levels.push(("avx2", avx2));
    }
    levels
}

fn seal(c: &mut Criterion) {
    let mut group = c.benchmark_group("seal");
    for head_dim in [64, 128, 256] {
        let (k, v) = (keys(head_dim, TOKENS), values(head_dim, TOKENS));
        let feedback = head_feedback(&k, head_dim, head_dim / 4);
        for (name, feedback) in [("feedback", feedback), ("plain", HeadFeedback::none(head_dim))] {
            for bits in [4, 3, 2] {
                for (level, encode) in levels() {
                    group.bench_function(format!("{head_dim} channels, {bits} bits, {name}, {level}"), |b| {
                        // SAFETY: the machine has the level: `levels` looked.
                        b.iter(|| unsafe { encode(black_box(&k), black_box(&v), head_dim, bits, &feedback) });
                    });
                }
            }
        }
    }
}

fn learn(c: &mut Criterion) {
    let mut group = c.benchmark_group("learn");
    for (num_q_heads, num_kv_heads, head_dim) in [(9, 3, 64), (32, 8, 128)] {
        let shape = HeadShape { num_q_heads, num_kv_heads, head_dim };
        let mut random = Random(14);
        let q = random.normals(SHOWN * num_q_heads * head_dim);
        let k = random.normals(SHOWN * num_kv_heads * head_dim);
        let shown = || {
            let calibration = Calibration::new();
            calibration.observe(0, shape, &q, &k).expect("rows");
            calibration
        };
        group.throughput(Throughput::Elements(SHOWN as u64));
        group.bench_function(format!("tokens, {num_q_heads} to {num_kv_heads} heads of {head_dim}"), |b| b.iter(shown));
        group.throughput(Throughput::Elements(num_kv_heads as u64));
        group.bench_function(format!("factor, {num_kv_heads} heads of {head_dim}"), |b| {
            b.iter_batched(shown, |learned| learned.freeze().expect("512 tokens"), BatchSize::LargeInput);
        });
    }
}

criterion_group!(benches, seal, learn);
criterion_main!(benches);
