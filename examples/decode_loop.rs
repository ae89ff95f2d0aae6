//! A decode loop over the paged cache from Rust, without Python: prefill, a shared prefix, decode steps in a batch.
//!
//! The "model" is one attention layer with random projections, so that the example shows only the cache.
//! Run: `cargo run --release --example decode_loop`

use kvarn::backend::{AttendOptions, Fresh, TensorView, TensorViewMut};
use kvarn::paging::SequenceId;
use kvarn::plan::Rows;
use kvarn::{CacheConfig, Error, PagedKvCache, Result};

const KV_HEADS: usize = 2;
const Q_HEADS: usize = 8;
const HEAD_DIM: usize = 64;

/// Keys, values and queries of a token, from its id: `[heads, rows, head_dim]`.
fn project(token_ids: &[u32], heads: usize, seed: u32) -> Vec<f32> {
    let mut out = Vec::with_capacity(heads * token_ids.len() * HEAD_DIM);
    for head in 0..heads {
        for &token in token_ids {
            let phase = (token.wrapping_mul(2_654_435_761).wrapping_add(seed + head as u32) % 6283) as f32 / 1000.0;
            out.extend((0..HEAD_DIM).map(|d| (phase * (1.0 + d as f32 / 8.0)).sin()));
        }
    }
    out
}

/// Runs one step of `counts[i]` rows for `sequences[i]` and returns the attention output `[Q_HEADS, rows, HEAD_DIM]`.
fn step(cache: &mut PagedKvCache, sequences: &[SequenceId], counts: &[usize], tokens: &[u32]) -> Result<Vec<f32>> {
    let rows = tokens.len();
    let (k, v) = (project(tokens, KV_HEADS, 1), project(tokens, KV_HEADS, 2));
    let q = project(tokens, Q_HEADS, 3);
    let mut out = vec![0.0; q.len()];
    let fresh = Fresh {
        k: TensorView::from_slice("k", &k, [1, KV_HEADS, rows, HEAD_DIM])?,
        v: TensorView::from_slice("v", &v, [1, KV_HEADS, rows, HEAD_DIM])?,
    };
    let requests: Vec<_> = sequences.iter().zip(counts).map(|(id, count)| (*id, Rows::All(*count))).collect();
    let step = cache.begin_step(&requests, false)?;
    let layers = cache.config().num_layers;
    for layer in 0..layers {
        let view_q = TensorView::from_slice("q", &q, [1, Q_HEADS, rows, HEAD_DIM])?;
        let view_out = TensorViewMut::from_slice("out", &mut out, [1, Q_HEADS, rows, HEAD_DIM])?;
        cache.append(&step, layer, fresh, None)?;
        cache.attend(&step, layer, view_q, Some(fresh), AttendOptions::PLAIN, view_out)?;
    }
    cache.commit(&step)?;
    Ok(out)
}

fn main() -> Result<()> {
    let config = CacheConfig { num_blocks: Some(12), ..CacheConfig::new(1, KV_HEADS, HEAD_DIM) };
    let mut cache = PagedKvCache::new(config)?;

    // A system prompt of 300 tokens, computed once and published.
    let prompt: Vec<u32> = (0..300).collect();
    let first = cache.new_sequence();
    step(&mut cache, &[first], &[prompt.len()], &prompt)?;
    let published = cache.publish_prefix(first, &prompt)?;
    println!("prefill: {} tokens, {published} full blocks published", prompt.len());

    // A second request with the same prompt finds its full blocks and computes the rest.
    let second = cache.match_prefix(&prompt);
    let found = cache.sequence(second)?.len();
    step(&mut cache, &[second], &[prompt.len() - found], &prompt[found..])?;
    println!("second request: {found} tokens found, {} computed", prompt.len() - found);

    // Both decode together, one token each a step.
    for turn in 0..200 {
        step(&mut cache, &[first, second], &[1, 1], &[1000 + turn, 2000 + turn])?;
    }
    let stats = cache.stats().unwrap();
    println!(
        "decoded: {} and {} tokens in {} blocks, {} bytes ({:.0} a token)",
        cache.sequence(first)?.len(),
        cache.sequence(second)?.len(),
        stats.blocks_in_use,
        stats.bytes_in_use,
        stats.bytes_per_token,
    );

    // A prompt that does not fit is refused with the numbers, and nothing has changed.
    let third = cache.new_sequence();
    match cache.begin_step(&[(third, Rows::All(4000))], false) {
        Err(Error::OutOfBlocks { needed, free }) => println!("4,000 tokens: needed {needed} blocks, {free} free"),
        other => println!("unexpected: {other:?}"),
    }
    cache.free(second)?;
    println!("after freeing one: {} blocks in use", cache.stats().unwrap().blocks_in_use);
    Ok(())
}
