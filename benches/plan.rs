//! Benchmark of a step without its kernels: what `begin_step` and `commit` cost on the host, for one decode token each of
//! 256 sequences. Lengths are staggered, so that each step opens, seals and frees two blocks.

use criterion::{Criterion, criterion_group, criterion_main};
use kvarn::paging::{Paging, SequenceId};
use kvarn::plan::{Rows, StepPlan, bounds_of};
use std::time::{Duration, Instant};

const NUM_SEQUENCES: usize = 256;
const BLOCK_SIZE: usize = 128;
/// Steps after which the sequences begin anew: they stay about as long as their name says.
const NUM_STEPS: u64 = 512;
/// Steps before the clock starts: the first seals a block of every sequence, and finds the tables in no cache.
const WARM_UP: u64 = 64;

fn begin(paging: &mut Paging, rows: &[(SequenceId, Rows<'_>)]) -> StepPlan {
    let asked = StepPlan::requests(paging, None, rows, false).expect("known sequences");
    let room = paging.room(&asked).expect("a pool that grows");
    let bounds = bounds_of(&room);
    let _ = room.begin(); // nothing is forked: no copies
    StepPlan::begin(paging, None, rows, bounds)
}

fn filled(num_tokens: usize) -> (Paging, Vec<SequenceId>) {
    let mut paging = Paging::sealing(BLOCK_SIZE, None, None, b"").expect("settings");
    let ids: Vec<SequenceId> = (0..NUM_SEQUENCES).map(|_| paging.new_sequence()).collect();
    for (index, &id) in ids.iter().enumerate() {
        begin(&mut paging, &[(id, Rows::All(num_tokens - BLOCK_SIZE + index % BLOCK_SIZE))]);
        paging.commit(&[id]).expect("it has begun");
    }
    (paging, ids)
}

fn plan(c: &mut Criterion) {
    for num_tokens in [4_096, 32_768] {
        c.bench_function(&format!("plan/begin and commit, {NUM_SEQUENCES} x {num_tokens}"), |b| {
            b.iter_custom(|times| {
                (0..times).step_by(NUM_STEPS as usize).map(|from| steps(num_tokens, times - from)).sum()
            });
        });
    }
}

/// The time of so many steps, at most [`NUM_STEPS`].
fn steps(num_tokens: usize, times: u64) -> Duration {
    let (mut paging, ids) = filled(num_tokens);
    let rows: Vec<_> = ids.iter().map(|&id| (id, Rows::All(1))).collect();
    let mut total = Duration::ZERO;
    for step in 0..WARM_UP + times.min(NUM_STEPS) {
        let start = Instant::now();
        let plan = begin(&mut paging, &rows);
        paging.commit(&ids).expect("it has begun");
        if step >= WARM_UP {
            total += start.elapsed();
        }
        assert_eq!(plan.num_tokens(), NUM_SEQUENCES);
    }
    total
}

criterion_group!(benches, plan);
criterion_main!(benches);
