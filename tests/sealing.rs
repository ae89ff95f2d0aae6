//! Sealed blocks through the cache: they hold, to the bit, what the specification in `kvarn::quant` makes of the same
//! rows and the frozen calibration, whatever else is in the batch and however many threads work.

mod common;

use common::Random;
use kvarn::backend::{AttendOptions, Device, Fresh, TensorView, TensorViewMut};
use kvarn::calibration::Calibration;
use kvarn::format::{Dtype, Format};
use kvarn::paging::SequenceId;
use kvarn::plan::{DECODE_TOKENS, Rows};
use kvarn::quant::LayerCalibration;
use kvarn::quant::{Codec, HeadFeedback, Tile, decode_tile_k, decode_tile_v, encode_tile, rotate};
use kvarn::{CacheConfig, Error, PagedKvCache};
use std::sync::Arc;

const SEALED: [(Format, u32); 3] = [(Format::Int4, 4), (Format::Int3, 3), (Format::Int2, 2)];
const KV_HEADS: usize = 2;
const GROUP: usize = 2;
/// Rows of V come back from a page un-rotated: turned again, their last bits differ, and now and then a code.
const TURNED_TWICE: f64 = 1.01;

/// Rows of one step, `[heads, n, head_dim]` each: K with means and sizes of its channels, V, and Q of low rank.
#[derive(Clone)]
struct Tokens {
    head_dim: usize,
    n: usize,
    k: Vec<f32>,
    v: Vec<f32>,
    q: Vec<f32>,
}

impl Tokens {
    fn new(head_dim: usize, n: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let channel: Vec<(f32, f32)> = (0..head_dim)
            .map(|d| ((d % 7) as f32 - 3.0, if d % 16 == 5 { 8.0 } else { 1.0 + (d % 3) as f32 }))
            .collect();
        let k = (0..KV_HEADS * n)
            .flat_map(|_| channel.iter().map(|(mean, size)| mean + size * random.normal()).collect::<Vec<_>>())
            .collect();
        let v = random.normals(KV_HEADS * n * head_dim);
        let q = (0..KV_HEADS * GROUP * n)
            .flat_map(|_| {
                let (a, b) = (random.normal(), random.normal());
                (0..head_dim).map(|d| a * (d as f32).sin() + b * (0.3 * d as f32).cos()).collect::<Vec<_>>()
            })
            .collect();
        Self { head_dim, n, k, v, q }
    }

    /// Rows `from..to` of one head.
    fn rows<'a>(&self, of: &'a [f32], head: usize, from: usize, to: usize) -> &'a [f32] {
        &of[(head * self.n + from) * self.head_dim..(head * self.n + to) * self.head_dim]
    }

    /// Tokens `from..to`, as a step of their own.
    fn part(&self, from: usize, to: usize) -> Self {
        let cut = |of: &[f32], heads: usize| (0..heads).flat_map(|h| self.rows(of, h, from, to).to_vec()).collect();
        let (k, v, q) = (cut(&self.k, KV_HEADS), cut(&self.v, KV_HEADS), cut(&self.q, KV_HEADS * GROUP));
        Self { head_dim: self.head_dim, n: to - from, k, v, q }
    }
}

fn cache(format: Format, head_dim: usize, block_size: usize, calibration: Option<&Arc<Calibration>>) -> PagedKvCache {
    let config = CacheConfig { format, block_size, ..CacheConfig::new(1, KV_HEADS, head_dim) };
    let mut cache = PagedKvCache::new(config).unwrap();
    if let Some(calibration) = calibration {
        cache.set_calibration(Arc::clone(calibration), vec![0]).unwrap();
    }
    cache
}

/// One committed step; gives what attention reads.
fn extend(cache: &mut PagedKvCache, sequence: SequenceId, tokens: &Tokens) -> Vec<f32> {
    let Tokens { head_dim, n, .. } = *tokens;
    let step = cache.begin_step(&[(sequence, Rows::All(n))], false).unwrap();
    let shape = |heads: usize| [1, heads, n, head_dim];
    let view = |name, of, heads| TensorView::from_slice(name, of, shape(heads)).unwrap();
    let (k, v) = (view("k", tokens.k.as_slice(), KV_HEADS), view("v", tokens.v.as_slice(), KV_HEADS));
    let q = view("q", tokens.q.as_slice(), KV_HEADS * GROUP);
    cache.append(&step, 0, Fresh { k, v }, Some(q)).unwrap();
    let mut out = vec![f32::NAN; tokens.q.len()];
    let view_out = TensorViewMut::from_slice("out", &mut out, shape(KV_HEADS * GROUP)).unwrap();
    cache.attend(&step, 0, q, Some(Fresh { k, v }), AttendOptions::PLAIN, view_out).unwrap();
    cache.commit(&step).unwrap();
    out
}

/// K and V of tokens `from..to`, `[heads, to - from, head_dim]`.
fn stored(cache: &PagedKvCache, sequence: SequenceId, from: usize, to: usize) -> (Vec<f32>, Vec<f32>) {
    let head_dim = cache.config().head_dim;
    let shape = [1, KV_HEADS, to - from, head_dim];
    let (mut k, mut v) = (vec![f32::NAN; shape.iter().product()], vec![f32::NAN; shape.iter().product()]);
    let views = (
        TensorViewMut::from_slice("k", &mut k, shape).unwrap(),
        TensorViewMut::from_slice("v", &mut v, shape).unwrap(),
    );
    cache.dequantize(0, sequence, from, views.0, views.1).unwrap();
    (k, v)
}

/// A calibration that has seen 300 tokens and takes no more.
fn calibrated(head_dim: usize) -> Arc<Calibration> {
    let calibration = Arc::new(Calibration::new());
    let mut other = cache(Format::Int8, head_dim, 128, Some(&calibration));
    let sequence = other.new_sequence();
    extend(&mut other, sequence, &Tokens::new(head_dim, 300, 99));
    calibration.freeze().unwrap();
    calibration
}

fn feedback(of: Option<&LayerCalibration>, head: usize, head_dim: usize) -> HeadFeedback {
    of.map_or_else(|| HeadFeedback::none(head_dim), |layer| layer.heads()[head].feedback.clone())
}

/// What a tile decodes to, V turned back.
fn decoded(tile: &Tile) -> (Vec<f32>, Vec<f32>) {
    let (mut k, mut v) = (vec![0.0; tile.k_codes.len()], vec![0.0; tile.v_codes.len()]);
    decode_tile_k(tile, &mut k);
    decode_tile_v(tile, &mut v);
    v.chunks_exact_mut(tile.head_dim).for_each(rotate);
    (k, v)
}

fn turned(rows: &[f32], head_dim: usize) -> Vec<f32> {
    let mut rows = rows.to_vec();
    rows.chunks_exact_mut(head_dim).for_each(rotate);
    rows
}

fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}

#[test]
fn a_block_that_a_prefill_writes_whole_is_the_tile_of_its_rows() {
    for (head_dim, block_size) in [(16, 16), (64, 32), (80, 128), (96, 16), (128, 128), (256, 64)] {
        for calibration in [None, Some(calibrated(head_dim))] {
            let layer = calibration.as_ref().map(|calibration| calibration.layer(0).unwrap());
            for (format, bits) in SEALED {
                let tokens = Tokens::new(head_dim, 3 * block_size + 5, u64::from(bits));
                let mut cache = cache(format, head_dim, block_size, calibration.as_ref());
                let sequence = cache.new_sequence();
                extend(&mut cache, sequence, &tokens);
                assert_eq!(cache.stats().unwrap().sealed, 2, "the last full block stays a page");
                for block in 0..2 {
                    let (from, to) = (block * block_size, (block + 1) * block_size);
                    let (k, v) = stored(&cache, sequence, from, to);
                    for head in 0..KV_HEADS {
                        let tile = encode_tile(
                            tokens.rows(&tokens.k, head, from, to),
                            &turned(tokens.rows(&tokens.v, head, from, to), head_dim),
                            head_dim,
                            bits,
                            &feedback(layer.as_deref(), head, head_dim),
                            (block == 0).then_some(0),
                        );
                        let (expected_k, expected_v) = decoded(&tile);
                        let own = head * block_size * head_dim..(head + 1) * block_size * head_dim;
                        assert!(k[own.clone()] == expected_k, "K of {format:?} {head_dim} {block_size} block {block}");
                        assert!(v[own] == expected_v, "V of {format:?} {head_dim} {block_size} block {block}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_block_that_decode_fills_is_the_tile_of_its_page() {
    for (head_dim, block_size) in [(16, 16), (64, 128), (96, 32)] {
        for calibration in [None, Some(calibrated(head_dim))] {
            let layer = calibration.as_ref().map(|calibration| calibration.layer(0).unwrap());
            for (format, bits) in SEALED {
                let tokens = Tokens::new(head_dim, 2 * block_size + 1, 7);
                let mut cache = cache(format, head_dim, block_size, calibration.as_ref());
                let sequence = cache.new_sequence();
                for block in 0..2 {
                    let (from, to) = (block * block_size, (block + 1) * block_size);
                    for at in (from..to).step_by(DECODE_TOKENS) {
                        extend(&mut cache, sequence, &tokens.part(at, at + DECODE_TOKENS));
                    }
                    let (page_k, page_v) = stored(&cache, sequence, from, to);
                    assert_eq!(cache.stats().unwrap().sealed, block, "not before the next step");
                    // Writes no token, and is the next step all the same.
                    extend(&mut cache, sequence, &tokens.part(to, to));
                    assert_eq!(cache.stats().unwrap().sealed, block + 1);
                    let (k, v) = stored(&cache, sequence, from, to);
                    for head in 0..KV_HEADS {
                        let own = head * block_size * head_dim..(head + 1) * block_size * head_dim;
                        let (page_k, page_v) = (&page_k[own.clone()], &page_v[own.clone()]);
                        let feedback = feedback(layer.as_deref(), head, head_dim);
                        let first_row = (block == 0).then_some(0);
                        let tile = encode_tile(page_k, &turned(page_v, head_dim), head_dim, bits, &feedback, first_row);
                        let (expected_k, expected_v) = decoded(&tile);
                        assert!(k[own.clone()] == expected_k, "K of {format:?} {head_dim} {block_size} block {block}");
                        let (error, best) = (squared_distance(&v[own], page_v), squared_distance(&expected_v, page_v));
                        assert!(error <= TURNED_TWICE * best, "V of {format:?}: {error} for {best}");
                    }
                }
            }
        }
    }
}

/// Everything that comes of a prefill, two decodes and another prefill of the watched sequence: outputs and contents.
fn life(format: Format, calibration: Option<&Arc<Calibration>>, others: &[usize]) -> Vec<f32> {
    const HEAD_DIM: usize = 64;
    let mut cache = cache(format, HEAD_DIM, 64, calibration);
    let ids: Vec<SequenceId> = (0..=others.len()).map(|_| cache.new_sequence()).collect();
    let watched = ids[others.len()];
    let mut seen = Vec::new();
    for (index, n) in [600, 1, 16, 200, 1].into_iter().enumerate() {
        let own = Tokens::new(HEAD_DIM, n, index as u64);
        let parts: Vec<Tokens> = others
            .iter()
            .enumerate()
            .map(|(other, &n)| Tokens::new(HEAD_DIM, n, 1000 + 10 * other as u64 + index as u64))
            .chain([own])
            .collect();
        let rows: usize = parts.iter().map(|part| part.n).sum();
        let pack = |of: fn(&Tokens) -> &[f32], heads: usize| -> Vec<f32> {
            (0..heads)
                .flat_map(|h| parts.iter().flat_map(move |part| part.rows(of(part), h, 0, part.n).to_vec()))
                .collect()
        };
        let packed = Tokens {
            head_dim: HEAD_DIM,
            n: rows,
            k: pack(|part| &part.k, KV_HEADS),
            v: pack(|part| &part.v, KV_HEADS),
            q: pack(|part| &part.q, KV_HEADS * GROUP),
        };
        let requests: Vec<_> = ids.iter().zip(&parts).map(|(id, part)| (*id, Rows::All(part.n))).collect();
        let step = cache.begin_step(&requests, false).unwrap();
        let shape = |heads: usize| [1, heads, rows, HEAD_DIM];
        let view = |name, of, heads| TensorView::from_slice(name, of, shape(heads)).unwrap();
        let fresh = Fresh { k: view("k", packed.k.as_slice(), KV_HEADS), v: view("v", packed.v.as_slice(), KV_HEADS) };
        cache.append(&step, 0, fresh, None).unwrap();
        let mut out = vec![0.0; packed.q.len()];
        let view_out = TensorViewMut::from_slice("out", &mut out, shape(KV_HEADS * GROUP)).unwrap();
        let q = view("q", packed.q.as_slice(), KV_HEADS * GROUP);
        cache.attend(&step, 0, q, Some(fresh), AttendOptions::PLAIN, view_out).unwrap();
        cache.commit(&step).unwrap();
        (0..KV_HEADS * GROUP).for_each(|h| seen.extend_from_slice(packed.rows(&out, h, rows - n, rows)));
    }
    let (k, v) = stored(&cache, watched, 0, cache.sequence(watched).unwrap().len());
    [seen, k, v].concat()
}

#[test]
fn neither_threads_nor_the_batch_change_a_bit() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    for calibration in [None, Some(calibrated(64))] {
        let calibration = calibration.as_ref();
        for (format, _) in SEALED {
            let alone = pool(1).install(|| life(format, calibration, &[]));
            assert!(pool(3).install(|| life(format, calibration, &[])) == alone, "{format:?}: threads");
            assert!(life(format, calibration, &[130, 1, 0]) == alone, "{format:?}: the batch");
        }
    }
}

#[test]
fn only_a_calibration_of_its_shape_is_taken() {
    let calibration = Arc::new(Calibration::new());
    let config = CacheConfig { block_size: 16, ..CacheConfig::new(1, 2 * KV_HEADS, 16) };
    let mut wide = PagedKvCache::new(config).unwrap();
    wide.set_calibration(Arc::clone(&calibration), vec![0]).unwrap();
    let sequence = wide.new_sequence();
    let step = wide.begin_step(&[(sequence, Rows::All(200))], false).unwrap();
    let rows = Random(1).normals(2 * KV_HEADS * 200 * 16);
    let k = TensorView::from_slice("k", &rows, [1, 2 * KV_HEADS, 200, 16]).unwrap();
    wide.append(&step, 0, Fresh { k, v: k }, Some(k)).unwrap();
    calibration.freeze().unwrap();

    let mut narrow = cache(Format::Int4, 16, 16, None);
    let refused = narrow.set_calibration(Arc::clone(&calibration), vec![0]);
    assert!(matches!(refused, Err(Error::Calibration(_))), "{refused:?}");
    narrow.set_calibration(Arc::clone(&calibration), vec![1]).unwrap();
    let sequence = narrow.new_sequence();
    let step = narrow.begin_step(&[(sequence, Rows::All(40))], false).unwrap();
    let k = TensorView::from_slice("k", &rows[..KV_HEADS * 40 * 16], [1, KV_HEADS, 40, 16]).unwrap();
    narrow.append(&step, 0, Fresh { k, v: k }, None).unwrap();
    assert_eq!(calibration.layers()[0].num_kv_heads, 2 * KV_HEADS);
}

#[test]
fn a_block_that_a_codec_has_sealed_opens_again_in_the_dtype_of_its_pages() {
    for dtype in Dtype::ALL {
        let config = CacheConfig { format: Format::Raw, dtype, block_size: 16, ..CacheConfig::new(2, KV_HEADS, 16) };
        let mut cache = PagedKvCache::with_codec(config, Codec::Kivi4).unwrap();
        let sequence = cache.new_sequence();
        let step = cache.begin_step(&[(sequence, Rows::All(60))], false).unwrap();
        let bytes: Vec<u8> = (0..KV_HEADS * 60 * 16 * dtype.bytes()).map(|i| (i % 60) as u8).collect();
        let strides = [0, 60 * 16, 16, 1];
        // SAFETY: `bytes` holds the rows in the dtype, and outlives the view; any bits below are finite numbers.
        let k =
            unsafe { TensorView::from_raw("k", Device::Cpu, bytes.as_ptr(), dtype, [1, KV_HEADS, 60, 16], strides) }
                .unwrap();
        for layer in 0..2 {
            cache.append(&step, layer, Fresh { k, v: k }, None).unwrap();
        }
        cache.commit(&step).unwrap();
        let before = stored(&cache, sequence, 16, 25);
        assert_eq!(cache.stats().unwrap().sealed, 2);
        cache.truncate_unsealing(sequence, 25).unwrap();
        assert_eq!((cache.stats().unwrap().unsealed, cache.sequence(sequence).unwrap().len()), (1, 25));
        assert!(stored(&cache, sequence, 16, 25) == before, "{dtype:?} pages keep what they are given");
    }
}
