//! Benchmark of append and attention of one layer, in every format: a decode step after 4,096 tokens, a prefill of 1,024.

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use kvarn::backend::{AttendOptions, Fresh, TensorView, TensorViewMut};
use kvarn::format::Format;
use kvarn::plan::Rows;
use kvarn::{CacheConfig, PagedKvCache};

const KV_HEADS: usize = 8;
const Q_HEADS: usize = 32;
const HEAD_DIM: usize = 128;
const CONTEXT: usize = 4_096;
const PREFILL: usize = 1_024;

/// Keys, values, queries and room for a result of some tokens.
struct Tensors {
    num_tokens: usize,
    rows: Vec<f32>,
    out: Vec<f32>,
}

impl Tensors {
    fn new(num_tokens: usize) -> Self {
        let rows: Vec<f32> = (0..num_tokens * Q_HEADS * HEAD_DIM).map(|i| (i as f32 * 0.37).sin()).collect();
        Self { num_tokens, out: rows.clone(), rows }
    }

    fn view(&self, name: &'static str, heads: usize) -> TensorView<'_> {
        let len = heads * self.num_tokens * HEAD_DIM;
        TensorView::from_slice(name, &self.rows[..len], [1, heads, self.num_tokens, HEAD_DIM]).expect("a shape")
    }

    /// A step of one sequence.
    fn step(&mut self, cache: &mut PagedKvCache, commit: bool) {
        let sequence = cache.sequences()[0];
        let step = cache.begin_step(&[(sequence, Rows::All(self.num_tokens))], false).expect("a pool that grows");
        let mut out = std::mem::take(&mut self.out);
        let fresh = Fresh { k: self.view("k", KV_HEADS), v: self.view("v", KV_HEADS) };
        let shape = [1, Q_HEADS, self.num_tokens, HEAD_DIM];
        let out_view = TensorViewMut::from_slice("out", &mut out, shape).expect("a shape");
        cache.append(&step, 0, fresh, None).expect("rows");
        let q = self.view("q", Q_HEADS);
        cache.attend(&step, 0, q, Some(fresh), AttendOptions::PLAIN, out_view).expect("a layer that has come");
        if commit { cache.commit(&step) } else { cache.abort(&step) }.expect("an open step");
        self.out = out;
    }
}

fn empty(format: Format) -> PagedKvCache {
    let config = CacheConfig { format, ..CacheConfig::new(1, KV_HEADS, HEAD_DIM) };
    let mut cache = PagedKvCache::new(config).expect("settings");
    cache.new_sequence();
    cache
}

fn attend(c: &mut Criterion) {
    let mut group = c.benchmark_group("attend");
    for format in Format::ALL {
        let (mut cache, mut token) = (empty(format), Tensors::new(1));
        Tensors::new(CONTEXT).step(&mut cache, true);
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("decode after {CONTEXT}, {}", format.name()), |b| {
            b.iter(|| token.step(&mut cache, false));
        });
        let mut prompt = Tensors::new(PREFILL);
        group.sample_size(10).throughput(Throughput::Elements(PREFILL as u64));
        group.bench_function(format!("prefill of {PREFILL}, {}", format.name()), |b| {
            b.iter_batched(|| empty(format), |mut cache| prompt.step(&mut cache, true), BatchSize::LargeInput);
        });
    }
}

criterion_group!(benches, attend);
criterion_main!(benches);
