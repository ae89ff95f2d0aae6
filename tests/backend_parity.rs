//! Attention at every SIMD level against f64 on what the pages hold: one body, a table of cases and random ones.

mod common;

use common::{Random, Reference};
use kvarn::backend::cpu::Level;
use kvarn::backend::{AttendOptions, Device, Fresh, TensorView, TensorViewMut};
use kvarn::format::{Dtype, Format};
use kvarn::paging::SequenceId;
use kvarn::plan::{Rows, is_prefill};
use kvarn::{CacheConfig, PagedKvCache};

/// Relative error of one output row: f32 sums of a few thousand terms against f64.
const TOLERANCE: f64 = 2e-5;

#[derive(Debug, Clone)]
struct Case {
    format: Format,
    dtype: Dtype,
    head_dim: usize,
    num_kv_heads: usize,
    group: usize,
    block_size: usize,
    window: Option<usize>,
    softcap: Option<f32>,
    sinks: bool,
    /// New tokens of each step, a sequence each.
    steps: Vec<Vec<usize>>,
}

impl Case {
    fn plain(format: Format, steps: Vec<Vec<usize>>) -> Self {
        Self {
            format,
            dtype: Dtype::F32,
            head_dim: 64,
            num_kv_heads: 2,
            group: 3,
            block_size: 16,
            window: None,
            softcap: None,
            sinks: false,
            steps,
        }
    }
}

/// Every token row `[num_kv_heads][tokens, head_dim]` that a sequence was given, as a page keeps it or unrounded.
#[derive(Default, Clone)]
struct History {
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
}

fn round(dtype: Dtype, x: f32) -> f32 {
    match dtype {
        Dtype::F32 => x,
        Dtype::F16 => half::f16::from_f32(x).to_f32(),
        Dtype::Bf16 => half::bf16::from_f32(x).to_f32(),
    }
}

/// Tokens `first..end` of a sequence as stored, `[num_kv_heads][tokens, head_dim]`, zeros before `first`.
fn stored(cache: &PagedKvCache, sequence: SequenceId, end: usize) -> History {
    let config = cache.config();
    let (heads, head_dim) = (config.num_kv_heads, config.head_dim);
    let first = cache.sequence(sequence).unwrap().first_held();
    let count = end - first;
    let (mut k, mut v) = (vec![0.0; heads * count * head_dim], vec![0.0; heads * count * head_dim]);
    let shape = [1, heads, count, head_dim];
    let (view_k, view_v) = (
        TensorViewMut::from_slice("k", &mut k, shape).unwrap(),
        TensorViewMut::from_slice("v", &mut v, shape).unwrap(),
    );
    cache.dequantize(0, sequence, first, view_k, view_v).unwrap();
    let own = count * head_dim;
    let heads_of = |values: &[f32]| {
        (0..heads).map(|h| [&vec![0.0; first * head_dim], &values[h * own..(h + 1) * own]].concat()).collect()
    };
    History { k: heads_of(&k), v: heads_of(&v) }
}

/// Runs a case at `level`; gives every output, so that levels and thread counts can be compared.
fn run(case: &Case, level: Level, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    let Case { head_dim, num_kv_heads, group, .. } = *case;
    let num_q_heads = num_kv_heads * group;
    let config = CacheConfig {
        format: case.format,
        dtype: case.dtype,
        block_size: case.block_size,
        window: case.window,
        ..CacheConfig::new(1, num_kv_heads, head_dim)
    };
    let mut cache = PagedKvCache::with_level(config, level).unwrap();
    let num_sequences = case.steps[0].len();
    let sequences: Vec<SequenceId> = (0..num_sequences).map(|_| cache.new_sequence()).collect();
    let offset = random.normals(num_kv_heads * head_dim);
    let sinks = random.normals(num_q_heads);
    let mut outputs = Vec::new();
    for counts in &case.steps {
        let num_rows: usize = counts.iter().sum();
        let mut rows = |heads: usize, spread: f32, offset: Option<&[f32]>| -> Vec<f32> {
            let mut values = random.normals(heads * num_rows * head_dim);
            for (i, x) in values.iter_mut().enumerate() {
                let (head, d) = (i / (num_rows * head_dim), i % head_dim);
                *x = round(case.dtype, *x * spread + offset.map_or(0.0, |offset| 3.0 * offset[head * head_dim + d]));
            }
            values
        };
        let (k, v) = (rows(num_kv_heads, 1.0, Some(&offset)), rows(num_kv_heads, 1.0, None));
        let q = rows(num_q_heads, 1.0, None);
        let mut out = vec![f32::NAN; q.len()];

        let requests: Vec<_> = sequences.iter().zip(counts).map(|(s, n)| (*s, Rows::All(*n))).collect();
        let step = cache.begin_step(&requests, false).unwrap();
        let shape = |heads: usize| [1, heads, num_rows, head_dim];
        let (bytes_k, bytes_v) = (to_bytes(case.dtype, &k), to_bytes(case.dtype, &v));
        let strides = [0, (num_rows * head_dim) as isize, head_dim as isize, 1];
        // SAFETY: the vectors hold `shape` elements of the dtype, and outlive the views.
        let fresh = unsafe {
            let view = |name, bytes: &[u8]| {
                TensorView::from_raw(name, Device::Cpu, bytes.as_ptr(), case.dtype, shape(num_kv_heads), strides)
            };
            Fresh { k: view("k", &bytes_k).unwrap(), v: view("v", &bytes_v).unwrap() }
        };
        cache.append(&step, 0, fresh, None).unwrap();
        let options = AttendOptions {
            scale: Some(0.2),
            softcap: case.softcap,
            sinks: case.sinks.then_some(sinks.as_slice()),
            ..AttendOptions::PLAIN
        };
        let view_q = TensorView::from_slice("q", &q, shape(num_q_heads)).unwrap();
        let view_out = TensorViewMut::from_slice("out", &mut out, shape(num_q_heads)).unwrap();
        cache.attend(&step, 0, view_q, Some(fresh), options, view_out).unwrap();

        let mut first_row = 0;
        for (&sequence, &count) in sequences.iter().zip(counts) {
            let context_len = cache.sequence(sequence).unwrap().len();
            let first_held = cache.sequence(sequence).unwrap().first_held();
            let mut seen = stored(&cache, sequence, context_len + count);
            if is_prefill(cache.config().block_size, context_len, count) {
                for head in 0..num_kv_heads {
                    let own =
                        (head * num_rows + first_row) * head_dim..(head * num_rows + first_row + count) * head_dim;
                    seen.k[head][context_len * head_dim..].copy_from_slice(&k[own.clone()]);
                    seen.v[head][context_len * head_dim..].copy_from_slice(&v[own]);
                }
            }
            for head in 0..num_q_heads {
                let reference = Reference {
                    k: &seen.k[head / group],
                    v: &seen.v[head / group],
                    scale: 0.2,
                    softcap: case.softcap,
                    sink: case.sinks.then(|| sinks[head]),
                };
                for token in 0..count {
                    let end = context_len + token + 1;
                    let start = case.window.map_or(0, |window| end.saturating_sub(window)).max(first_held);
                    let at = (head * num_rows + first_row + token) * head_dim;
                    let want = reference.attend(&q[at..at + head_dim], start, end);
                    let error: f64 =
                        want.iter().zip(&out[at..]).map(|(a, b)| (a - f64::from(*b)).powi(2)).sum::<f64>().sqrt();
                    let norm = want.iter().map(|x| x * x).sum::<f64>().sqrt() + 1e-6;
                    assert!(
                        error <= TOLERANCE * norm,
                        "{level:?} {case:?}: head {head}, position {}: relative error {:e}",
                        end - 1,
                        error / norm
                    );
                }
            }
            first_row += count;
        }
        cache.commit(&step).unwrap();
        outputs.extend(out);
    }
    outputs
}

fn to_bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|&x| match dtype {
            Dtype::F32 => x.to_le_bytes().to_vec(),
            Dtype::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
            Dtype::Bf16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
        })
        .collect()
}

/// Runs a case at every level that this machine has; says which it lacks.
fn at_every_level(case: &Case, seed: u64) {
    static MISSING: std::sync::Once = std::sync::Once::new();
    MISSING.call_once(|| {
        for level in Level::ALL.into_iter().filter(|level| !level.is_available()) {
            eprintln!("SKIPPED: this machine does not have SIMD level {}", level.name());
        }
    });
    for level in Level::ALL.into_iter().filter(|level| level.is_available()) {
        run(case, level, seed);
    }
}

#[test]
fn lengths_around_a_block_attend_to_what_the_pages_hold() {
    for format in Format::ALL {
        for length in [1, 15, 16, 17, 32, 33, 256] {
            at_every_level(&Case::plain(format, vec![vec![length], vec![1]]), length as u64);
            at_every_level(&Case::plain(format, vec![vec![1]; length.min(34)]), length as u64);
        }
    }
}

#[test]
fn one_to_seventeen_queries_at_once_attend_causally() {
    for format in Format::ALL {
        for q_len in 1..=17 {
            at_every_level(&Case::plain(format, vec![vec![40], vec![q_len], vec![q_len]]), q_len as u64);
        }
    }
}

#[test]
fn groups_of_one_to_sixteen_query_heads_share_a_key_head() {
    for format in Format::ALL {
        for group in 1..=16 {
            let case = Case { group, num_kv_heads: 1, ..Case::plain(format, vec![vec![20], vec![1], vec![2]]) };
            at_every_level(&case, group as u64);
        }
    }
}

#[test]
fn long_histories_are_split_and_merged() {
    for format in Format::ALL {
        let case = Case { block_size: 128, ..Case::plain(format, vec![vec![1500, 700], vec![1, 3]]) };
        at_every_level(&case, 5);
    }
}

#[test]
fn random_cases_agree_with_f64() {
    let mut random = Random(11);
    for seed in 0..80 {
        let num_sequences = 1 + random.below(3);
        let case = Case {
            format: random.pick(&Format::ALL),
            dtype: random.pick(&Dtype::ALL),
            head_dim: random.pick(&[16, 32, 48, 64, 80, 96, 112, 128, 192, 256]),
            num_kv_heads: 1 + random.below(3),
            group: 1 + random.below(5),
            block_size: random.pick(&[16, 32, 64, 128]),
            window: random.pick(&[None, Some(1), Some(17), Some(40)]),
            softcap: random.pick(&[None, None, Some(30.0)]),
            sinks: random.pick(&[false, true]),
            steps: (0..4)
                .map(|_| (0..num_sequences).map(|_| random.pick(&[0, 1, 1, 2, 5, 16, 17, 60, 130])).collect())
                .collect(),
        };
        at_every_level(&case, seed);
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let alone = Case { block_size: 128, ..Case::plain(Format::Int8, vec![vec![2000], vec![1]]) };
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let one = pool(1).install(|| run(&alone, Level::best(), 3));
    let three = pool(3).install(|| run(&alone, Level::best(), 3));
    assert!(one == three);
}

#[test]
fn the_rest_of_the_batch_changes_no_bit() {
    const HEADS: usize = 2;
    const HEAD_DIM: usize = 64;
    for format in Format::ALL {
        for others in [vec![], vec![3], vec![700, 1]] {
            // The watched sequence comes last; its rows are drawn from a seed of their own.
            let attend = |others: &[usize]| -> Vec<Vec<f32>> {
                let config = CacheConfig { format, ..CacheConfig::new(1, HEADS, HEAD_DIM) };
                let mut cache = PagedKvCache::new(config).unwrap();
                let ids: Vec<SequenceId> = (0..=others.len()).map(|_| cache.new_sequence()).collect();
                let (mut own, mut rest) = (Random(1), Random(2));
                [600, 1, 5].map(|count| step_of(&mut cache, &ids, others, count, &mut own, &mut rest)).to_vec()
            };
            assert!(attend(&others) == attend(&[]), "{format:?} beside {others:?}");
        }
    }
}

/// One step of `others` and the watched sequence, packed; gives the watched one's output.
fn step_of(
    cache: &mut PagedKvCache,
    ids: &[SequenceId],
    others: &[usize],
    count: usize,
    own: &mut Random,
    rest: &mut Random,
) -> Vec<f32> {
    let (heads, head_dim) = (cache.config().num_kv_heads, cache.config().head_dim);
    let before: usize = others.iter().sum();
    let rows = before + count;
    let mut draw = |heads: usize| -> Vec<f32> {
        (0..heads).flat_map(|_| [rest.normals(before * head_dim), own.normals(count * head_dim)].concat()).collect()
    };
    let (k, v, q) = (draw(heads), draw(heads), draw(2 * heads));
    let mut out = vec![0.0; q.len()];
    let counts = others.iter().copied().chain([count]);
    let requests: Vec<_> = ids.iter().zip(counts).map(|(id, n)| (*id, Rows::All(n))).collect();
    let step = cache.begin_step(&requests, false).unwrap();
    let shape = |heads: usize| [1, heads, rows, head_dim];
    let fresh = Fresh {
        k: TensorView::from_slice("k", &k, shape(heads)).unwrap(),
        v: TensorView::from_slice("v", &v, shape(heads)).unwrap(),
    };
    cache.append(&step, 0, fresh, None).unwrap();
    let q = TensorView::from_slice("q", &q, shape(2 * heads)).unwrap();
    let view = TensorViewMut::from_slice("out", &mut out, shape(2 * heads)).unwrap();
    cache.attend(&step, 0, q, Some(fresh), AttendOptions::PLAIN, view).unwrap();
    cache.commit(&step).unwrap();
    out.chunks_exact(rows * head_dim).flat_map(|head| head[before * head_dim..].to_vec()).collect()
}
