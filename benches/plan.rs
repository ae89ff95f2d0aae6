//! Benchmark of a step without its kernels: `begin_step` and `commit` of one decode token each for 256 sequences.

use criterion::{Criterion, criterion_group, criterion_main};
use kvarn::backend::{Fresh, TensorView};
use kvarn::cache::Step;
use kvarn::paging::SequenceId;
use kvarn::plan::Rows;
use kvarn::{CacheConfig, PagedKvCache};
use std::time::{Duration, Instant};

const NUM_SEQUENCES: usize = 256;
/// The fewest channels: the bench is of tables, and its memory and its prefill stay small.
const HEAD_DIM: usize = 16;

fn append(cache: &mut PagedKvCache, step: &Step, num_rows: usize) {
    let rows: Vec<f32> = (0..num_rows * HEAD_DIM).map(|i| (i as f32 * 0.37).sin()).collect();
    let view = |name| TensorView::from_slice(name, &rows, [1, 1, num_rows, HEAD_DIM]).expect("a shape");
    cache.append(step, 0, Fresh { k: view("k"), v: view("v") }, None).expect("rows");
}

fn filled(num_tokens: usize) -> (PagedKvCache, Vec<SequenceId>) {
    let mut cache = PagedKvCache::new(CacheConfig::new(1, 1, HEAD_DIM)).expect("settings");
    let ids: Vec<SequenceId> = (0..NUM_SEQUENCES).map(|_| cache.new_sequence()).collect();
    for &id in &ids {
        let step = cache.begin_step(&[(id, Rows::All(num_tokens))], false).expect("a pool that grows");
        append(&mut cache, &step, num_tokens);
        cache.commit(&step).expect("every layer has come");
    }
    (cache, ids)
}

fn plan(c: &mut Criterion) {
    for num_tokens in [4_096, 32_768] {
        let (mut cache, ids) = filled(num_tokens);
        let requests: Vec<_> = ids.iter().map(|&id| (id, Rows::All(1))).collect();
        c.bench_function(&format!("plan/begin_step and commit, {NUM_SEQUENCES} x {num_tokens}"), |b| {
            b.iter_custom(|times| {
                let mut total = Duration::ZERO;
                for _ in 0..times {
                    let start = Instant::now();
                    let step = cache.begin_step(&requests, false).expect("a pool that grows");
                    total += start.elapsed();
                    append(&mut cache, &step, NUM_SEQUENCES);
                    let start = Instant::now();
                    cache.commit(&step).expect("every layer has come");
                    total += start.elapsed();
                }
                total
            });
        });
    }
}

criterion_group!(benches, plan);
criterion_main!(benches);
