//! Benchmark of paging with 256 sequences: a decode step of all, a fork, and a prefix match.

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use kvarn::paging::{Paging, Room, SequenceId, StepRequest};
use std::hint::black_box;

const BLOCK_SIZE: usize = 128;
const NUM_SEQUENCES: usize = 256;

fn request(sequence: SequenceId, num_new: usize) -> StepRequest {
    StepRequest { sequence, num_new, keep_from: 0, sealed_to: 0 }
}

fn filled(num_tokens: usize) -> (Paging, Vec<SequenceId>) {
    let mut paging = Paging::new(BLOCK_SIZE, None, b"bench").expect("a block size");
    let ids: Vec<SequenceId> = (0..NUM_SEQUENCES).map(|_| paging.new_sequence()).collect();
    let requests: Vec<StepRequest> = ids.iter().map(|&id| request(id, num_tokens)).collect();
    paging.room(&requests).map(Room::begin).expect("a pool that grows");
    paging.commit(&ids).expect("an open step");
    (paging, ids)
}

fn paging(c: &mut Criterion) {
    for num_tokens in [4_096, 32_768] {
        let (mut paging, ids) = filled(num_tokens);
        let requests: Vec<StepRequest> = ids.iter().map(|&id| request(id, 1)).collect();
        c.bench_function(&format!("paging/decode step, {NUM_SEQUENCES} x {num_tokens}"), |b| {
            b.iter(|| {
                black_box(paging.room(&requests).map(Room::begin).expect("a pool that grows"));
                paging.commit(&ids).expect("an open step");
            });
        });
        c.bench_function(&format!("paging/fork and free, {num_tokens}"), |b| {
            b.iter(|| {
                let fork = paging.fork(ids[0]).expect("settled");
                paging.free(black_box(fork)).expect("settled");
            });
        });
    }
    let tokens: Vec<u32> = (0..32_768).collect();
    let (mut paging, ids) = filled(tokens.len());
    paging.publish_prefix(ids[0], &tokens).expect("as many ids as tokens");
    c.bench_function("paging/match a prefix of 32768", |b| {
        b.iter_batched(|| paging.clone(), |mut paging| black_box(paging.match_prefix(&tokens)), BatchSize::LargeInput);
    });
}

criterion_group!(benches, paging);
criterion_main!(benches);
