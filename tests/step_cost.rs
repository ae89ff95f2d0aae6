//! What a step costs on the host: `begin_step` and `commit` of one decode token for each of many sequences.
//!
//! `cargo test --release --test step_cost -- --ignored --nocapture`

use kvarn::backend::{Fresh, TensorView};
use kvarn::format::Format;
use kvarn::paging::SequenceId;
use kvarn::plan::Rows;
use kvarn::{CacheConfig, PagedKvCache};
use std::time::{Duration, Instant};

const HEAD_DIM: usize = 16;
const NUM_SEQUENCES: usize = 256;
/// Two blocks of every sequence are opened, filled and sealed meanwhile.
const NUM_STEPS: usize = 256;

/// One token for each sequence but as many for the first as `num_new` says; keys and values are all alike.
fn step(cache: &mut PagedKvCache, requests: &[(SequenceId, Rows<'_>)], values: &[f32]) -> [Duration; 2] {
    let num_rows = requests.iter().map(|request| request.1.num_rows()).sum();
    let view = |name| TensorView::from_slice(name, &values[..num_rows * HEAD_DIM], [1, 1, num_rows, HEAD_DIM]).unwrap();
    let start = Instant::now();
    let step = cache.begin_step(requests, false).unwrap();
    let begun = start.elapsed();
    cache.append(&step, 0, Fresh { k: view("k"), v: view("v") }, None).unwrap();
    let start = Instant::now();
    cache.commit(&step).unwrap();
    [begun, start.elapsed()]
}

/// Microseconds of `begin_step` and of `commit`: medians, then means.
fn cost(format: Format, num_tokens: usize) -> [f64; 4] {
    let mut cache = PagedKvCache::new(CacheConfig { format, ..CacheConfig::new(1, 1, HEAD_DIM) }).unwrap();
    let values: Vec<f32> = (0..(num_tokens + 128) * HEAD_DIM).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
    let sequences: Vec<SequenceId> = (0..NUM_SEQUENCES).map(|_| cache.new_sequence()).collect();
    for (index, &sequence) in sequences.iter().enumerate() {
        // Not all of them reach the end of a block in the same step.
        step(&mut cache, &[(sequence, Rows::All(num_tokens - 128 + index % 128))], &values);
    }
    let requests: Vec<_> = sequences.iter().map(|&sequence| (sequence, Rows::All(1))).collect();
    let times: Vec<[Duration; 2]> = (0..NUM_STEPS).map(|_| step(&mut cache, &requests, &values)).collect();
    let micros = |part: usize| {
        let mut sorted: Vec<f64> = times.iter().map(|time| time[part].as_secs_f64() * 1e6).collect();
        sorted.sort_by(f64::total_cmp);
        [sorted[sorted.len() / 2], sorted.iter().sum::<f64>() / sorted.len() as f64]
    };
    let ([begin, begin_mean], [commit, commit_mean]) = (micros(0), micros(1));
    [begin, commit, begin_mean, commit_mean]
}

#[test]
#[ignore = "prints figures"]
fn cost_of_a_step_on_the_host() {
    for format in [Format::Int8, Format::Int4] {
        for num_tokens in [4096, 8192, 32768] {
            let [begin, commit, begin_mean, commit_mean] = cost(format, num_tokens);
            println!(
                "{} {NUM_SEQUENCES} x {num_tokens}: begin_step {begin:.0} us + commit {commit:.0} us \
                 (means {begin_mean:.0} + {commit_mean:.0})",
                format.name()
            );
        }
    }
}
