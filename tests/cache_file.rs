//! Cache files: the same sequences in the same blocks are restored bit for bit, and invalid files are refused.

mod common;
#[path = "cache_file/damaged.rs"]
mod damaged;
#[path = "cache_file/golden.rs"]
mod golden;
#[path = "cache_file/refused.rs"]
mod refused;

use common::{Random, folder};
use kvarn::backend::cpu::Level;
use kvarn::backend::{AttendOptions, Device, Fresh, TensorView, TensorViewMut};
use kvarn::cache::file;
use kvarn::format::{BLOCK_SIZES, Dtype, Format};
use kvarn::paging::SequenceId;
use kvarn::plan::Rows;
use kvarn::quant::Codec;
use kvarn::{CacheConfig, Error, PagedKvCache};
use std::fs;
use std::path::PathBuf;

const LAYERS: usize = 2;
const KV_HEADS: usize = 2;
const Q_HEADS: usize = 4;

fn config(format: Format, head_dim: usize, block_size: usize) -> CacheConfig {
    CacheConfig { format, block_size, ..CacheConfig::new(LAYERS, KV_HEADS, head_dim) }
}

/// Values that every dtype holds.
fn values(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| (random.normal() * 16.0).round() / 16.0).collect()
}

/// One committed step of tokens from a seed; gives what the layers' attention reads.
fn step(cache: &mut PagedKvCache, sequence: SequenceId, count: usize, seed: u64) -> Vec<Vec<f32>> {
    let CacheConfig { num_layers, num_kv_heads, head_dim, dtype, .. } = *cache.config();
    let mut random = Random(seed);
    let open = cache.begin_step(&[(sequence, Rows::All(count))], false).expect("room");
    let shape = |heads: usize| [1, heads, count, head_dim];
    let mut outs = Vec::new();
    for layer in 0..num_layers {
        let [k, v] = [(); 2].map(|()| values(&mut random, num_kv_heads * count * head_dim));
        let q = values(&mut random, Q_HEADS * count * head_dim);
        let [k, v] = [k, v].map(|rows| stored(dtype, &rows));
        let fresh =
            Fresh { k: view("k", dtype, &k, shape(num_kv_heads)), v: view("v", dtype, &v, shape(num_kv_heads)) };
        let q = TensorView::from_slice("q", &q, shape(Q_HEADS)).expect("a shape");
        cache.append(&open, layer, fresh, None).expect("rows");
        let mut out = vec![f32::NAN; Q_HEADS * count * head_dim];
        let view_out = TensorViewMut::from_slice("out", &mut out, shape(Q_HEADS)).expect("a shape");
        cache.attend(&open, layer, q, Some(fresh), AttendOptions::PLAIN, view_out).expect("a layer that has come");
        outs.push(out);
    }
    cache.commit(&open).expect("every layer has come");
    outs
}

/// Elements of a dtype, aligned.
fn stored(dtype: Dtype, values: &[f32]) -> Vec<u32> {
    let halves = |bits: Vec<u16>| bits.chunks(2).map(|two| u32::from(two[0]) | u32::from(two[1]) << 16).collect();
    match dtype {
        Dtype::F32 => values.iter().map(|x| x.to_bits()).collect(),
        Dtype::F16 => halves(values.iter().map(|&x| half::f16::from_f32(x).to_bits()).collect()),
        Dtype::Bf16 => halves(values.iter().map(|&x| half::bf16::from_f32(x).to_bits()).collect()),
    }
}

fn view<'a>(name: &'static str, dtype: Dtype, values: &'a [u32], shape: [usize; 4]) -> TensorView<'a> {
    let [_, heads, count, head_dim] = shape.map(|n| n as isize);
    let strides = [heads * count * head_dim, count * head_dim, head_dim, 1];
    // SAFETY: `values` has an element for each place of `shape`, and is borrowed as long as the view.
    unsafe { TensorView::from_raw(name, Device::Cpu, values.as_ptr().cast(), dtype, shape, strides) }
        .expect("contiguous")
}

/// K and V of all tokens held, of all layers.
fn contents(cache: &PagedKvCache, sequence: SequenceId) -> Vec<f32> {
    let CacheConfig { num_layers, num_kv_heads, head_dim, .. } = *cache.config();
    let held = cache.sequence(sequence).expect("a sequence");
    let (start, count) = (held.first_held(), held.len() - held.first_held());
    let shape = [1, num_kv_heads, count, head_dim];
    let mut all = Vec::new();
    for layer in 0..num_layers {
        let [mut k, mut v] = [(); 2].map(|()| vec![f32::NAN; num_kv_heads * count * head_dim]);
        let k_out = TensorViewMut::from_slice("k", &mut k, shape).expect("a shape");
        let v_out = TensorViewMut::from_slice("v", &mut v, shape).expect("a shape");
        cache.dequantize(layer, sequence, start, k_out, v_out).expect("tokens that are held");
        all.extend([k, v].concat());
    }
    all
}

/// Three sequences after some others: one long, a fork of it that has gone on, and one of a few tokens.
fn filled(config: CacheConfig) -> PagedKvCache {
    let mut cache = PagedKvCache::new(config).expect("settings");
    let block_size = cache.config().block_size;
    let gone = cache.new_sequence();
    step(&mut cache, gone, 2 * block_size + 3, 1);
    let long = cache.new_sequence();
    step(&mut cache, long, 3 * block_size - 2, 2);
    step(&mut cache, long, 3, 3);
    let fork = cache.fork(long).expect("settled");
    step(&mut cache, fork, 2, 4);
    step(&mut cache, long, 1, 5);
    cache.free(gone).expect("settled");
    let short = cache.new_sequence();
    step(&mut cache, short, 3, 6);
    cache
}

fn to_bytes(cache: &PagedKvCache) -> Vec<u8> {
    cache.to_bytes().expect("nothing is open")
}

fn assert_same(a: &PagedKvCache, b: &PagedKvCache) {
    assert_eq!((a.config(), a.sequences()), (b.config(), b.sequences()));
    for id in a.sequences() {
        let (x, y) = (a.sequence(id).expect("one"), b.sequence(id).expect("one"));
        assert_eq!((x.len(), x.first_held()), (y.len(), y.first_held()));
        assert!(contents(a, id) == contents(b, id), "sequence {id}");
    }
    let (a, b) = (a.stats().unwrap(), b.stats().unwrap());
    let counts = |stats: &kvarn::cache::CacheStats| {
        (stats.blocks_in_use, stats.partial_blocks, stats.open_pages, stats.bytes_in_use, stats.free_blocks)
    };
    assert_eq!(counts(&a), counts(&b));
}

/// Goes on in both, and looks whether they part.
fn assert_go_on_alike(mut a: PagedKvCache, mut b: PagedKvCache) {
    for (seed, id) in a.sequences().into_iter().enumerate() {
        for (count, seed) in [(1, seed), (20, 10 + seed), (a.config().block_size, 20 + seed)] {
            assert!(step(&mut a, id, count, seed as u64) == step(&mut b, id, count, seed as u64), "sequence {id}");
        }
    }
    assert_eq!(a.new_sequence(), b.new_sequence());
    assert_same(&a, &b);
    assert!(to_bytes(&a) == to_bytes(&b));
}

fn assert_comes_back(config: CacheConfig) {
    let cache = filled(config);
    let bytes = to_bytes(&cache);
    let read = PagedKvCache::from_bytes(&bytes).expect("what was written");
    assert_same(&cache, &read);
    assert!(to_bytes(&read) == bytes, "and so the next time");
    assert_go_on_alike(cache, read);
}

#[test]
fn every_format_is_restored_and_continues_identically() {
    for format in Format::ALL {
        for (head_dim, block_size) in BLOCK_SIZES.into_iter().enumerate().map(|(i, size)| ([16, 48, 96, 128][i], size))
        {
            assert_comes_back(config(format, head_dim, block_size));
        }
        assert_comes_back(config(format, 256, 16));
    }
}

#[test]
fn raw_pages_of_every_dtype_are_restored() {
    for dtype in Dtype::ALL {
        assert_comes_back(CacheConfig { dtype, ..config(Format::Raw, 80, 32) });
    }
}

#[test]
fn blocks_released_by_a_window_stay_released() {
    for format in [Format::Raw, Format::Int8, Format::Int4] {
        let config = CacheConfig { window: Some(20), ..config(format, 32, 16) };
        let cache = filled(config.clone());
        let long = cache.sequences()[0];
        assert!(cache.sequence(long).expect("one").first_held() > 0);
        assert_comes_back(config);
    }
}

#[test]
fn bounded_pools_are_restored_bounded() {
    let config = CacheConfig { num_blocks: Some(24), num_open_pages: Some(12), ..config(Format::Int4, 32, 16) };
    assert_comes_back(config.clone());
    let mut read = PagedKvCache::from_bytes(&to_bytes(&filled(config))).expect("what was written");
    let free = read.stats().unwrap().free_blocks.expect("bounded");
    let new = read.new_sequence();
    let refused = read.begin_step(&[(new, Rows::All(16 * (free + 1)))], false).expect_err("no room");
    assert_eq!(refused, Error::OutOfBlocks { needed: free + 1, free });
    step(&mut read, new, 16 * free, 1);
}

#[test]
fn a_bound_takes_no_memory_before_a_step_needs_it() {
    let config = CacheConfig { num_blocks: Some(4096), ..config(Format::Int8, 128, 128) };
    let cache = filled(config);
    let mut read = PagedKvCache::from_bytes(&to_bytes(&cache)).expect("what was written");
    assert!(read.stats().unwrap().allocated_bytes < cache.stats().unwrap().allocated_bytes / 100);
    let sequence = read.sequences()[0];
    step(&mut read, sequence, 1, 1);
    assert_eq!(read.stats().unwrap().allocated_bytes, cache.stats().unwrap().allocated_bytes);
}

#[test]
fn sharing_is_restored_and_shared_pages_are_copied_on_write() {
    for format in [Format::Int8, Format::Int4] {
        let mut cache = PagedKvCache::new(config(format, 32, 16)).expect("settings");
        let first = cache.new_sequence();
        step(&mut cache, first, 40, 1);
        let second = cache.fork(first).expect("settled");
        let mut read = PagedKvCache::from_bytes(&to_bytes(&cache)).expect("what was written");
        assert_eq!((read.stats().unwrap().blocks_in_use, read.block_table(first)), (3, read.block_table(second)));
        step(&mut read, first, 1, 2);
        assert_eq!((read.stats().unwrap().cow_copies, read.stats().unwrap().blocks_in_use), (1, 4));
        step(&mut cache, first, 1, 2);
        assert!(contents(&read, second) == contents(&cache, second));
    }
}

#[test]
fn files_have_no_bytes_of_freed_tokens() {
    for format in [Format::Raw, Format::Int8, Format::Int4] {
        let lone = |gone: Option<u64>| {
            let mut cache = PagedKvCache::new(config(format, 32, 16)).expect("settings");
            let other = cache.new_sequence();
            if let Some(seed) = gone {
                step(&mut cache, other, 100, seed);
            }
            let kept = cache.new_sequence();
            cache.free(other).expect("settled");
            step(&mut cache, kept, 21, 5);
            cache.truncate(kept, 19).expect("an open page");
            to_bytes(&cache)
        };
        assert!(lone(None) == lone(Some(7)), "{format:?}: pages and blocks that others had");
    }
}

#[test]
fn files_do_not_depend_on_the_simd_level() {
    let [scalar, best] = [Level::Scalar, Level::best()].map(|level| {
        let mut cache = PagedKvCache::with_level(config(Format::Int3, 64, 32), level).expect("settings");
        let sequence = cache.new_sequence();
        step(&mut cache, sequence, 70, 1);
        to_bytes(&cache)
    });
    assert!(scalar == best);
}

#[test]
fn a_cache_that_cannot_be_saved_is_refused() {
    let mut cache = filled(config(Format::Int4, 32, 16));
    let sequence = cache.sequences()[1];
    let open = cache.begin_step(&[(sequence, Rows::All(1))], false).expect("room");
    assert_eq!(cache.to_bytes(), Err(Error::OpenStep { id: sequence.0 }));
    cache.abort(&open).expect("open");
    assert!(cache.to_bytes().is_ok());
    let coded = PagedKvCache::with_codec(config(Format::Raw, 32, 16), Codec::Fp8).expect("a codec");
    assert!(matches!(coded.to_bytes(), Err(Error::Unsupported(why)) if why.contains("fp8")));
}

#[test]
fn a_file_holds_any_number_of_caches_and_a_note() {
    let note = "{\"of\": \"some \\u00fc model\"}\n";
    let wide = filled(config(Format::Int8, 64, 32));
    let sliding = filled(CacheConfig { window: Some(16), num_layers: 1, ..config(Format::Int2, 48, 16) });
    let bytes = file::to_bytes(&[&wide, &sliding], note).expect("nothing is open");
    let (read, said) = file::from_bytes(&bytes).expect("what was written");
    assert_eq!((read.len(), said.as_str()), (2, note));
    assert_same(&read[0], &wide);
    assert_same(&read[1], &sliding);
    assert!(matches!(PagedKvCache::from_bytes(&bytes), Err(Error::CacheFile(why)) if why.contains("2 caches")));
    let (none, said) = file::from_bytes(&file::to_bytes(&[], "x").expect("none")).expect("none");
    assert_eq!((none.len(), said.as_str()), (0, "x"));
    assert!(matches!(
        PagedKvCache::from_bytes(&file::to_bytes(&[], "x").expect("none")),
        Err(Error::CacheFile(why)) if why.contains("no cache")
    ));
}

#[test]
fn an_empty_cache_is_restored() {
    for format in Format::ALL {
        let mut cache = PagedKvCache::new(config(format, 32, 16)).expect("settings");
        let (gone, kept) = (cache.new_sequence(), cache.new_sequence());
        cache.free(gone).expect("settled");
        let mut read = PagedKvCache::from_bytes(&to_bytes(&cache)).expect("what was written");
        assert_eq!((read.sequences(), read.stats().unwrap().blocks_in_use), (vec![kept], 0));
        assert_eq!(read.new_sequence(), SequenceId(2));
        step(&mut read, kept, 17, 1);
    }
}

#[test]
fn files_are_written_atomically() {
    let folder = folder("cache_saved");
    let path = folder.join("prompt.kvarn");
    fs::write(&path, "what was there before").expect("a file");
    let mut cache = filled(config(Format::Int4, 32, 16));
    let sequence = cache.sequences()[0];
    let open = cache.begin_step(&[(sequence, Rows::All(1))], false).expect("room");
    assert!(cache.save(&path).is_err(), "a step is open");
    assert_eq!(fs::read(&path).expect("a file"), b"what was there before");
    cache.abort(&open).expect("open");
    cache.save(&path).expect("a folder to write to");
    assert!(fs::read(&path).expect("a file") == to_bytes(&cache));
    assert_eq!(fs::read_dir(&folder).expect("a folder").count(), 1, "nothing is left beside it");
    assert_same(&PagedKvCache::load(&path).expect("a valid file"), &cache);
    assert_eq!(file::kind_of(&path), Ok("kvarn cache"));
}

/// A safetensors file of no tensors.
fn safetensors(header: &str) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()
}

#[test]
fn the_kind_of_a_file_is_what_its_header_says() {
    let path = folder("cache_kind").join("x");
    let note = "a cache made with the kvarn calibration of some model";
    file::save(&path, &[&filled(config(Format::Int4, 32, 16))], note).expect("a folder to write to");
    assert_eq!(file::kind_of(&path), Ok("kvarn cache"));
    for (bytes, expected) in [
        (&b"no such text"[..], "not a file of kind \"kvarn calibration\" or"),
        (b"", "not a file of"),
        (&safetensors("{\"__metadata__\":{\"about\":\"kvarn cache\"}}"), "without a kind"),
        (&safetensors("{\"__metadata__\":{\"about\":\"kvarn cache\",\"kind\":\"other\"}}"), "its kind is \"other\""),
    ] {
        fs::write(&path, bytes).expect("a file");
        assert!(matches!(file::kind_of(&path), Err(Error::Config(why)) if why.contains(expected)));
    }
    let gone = path.with_file_name("gone");
    assert!(matches!(file::kind_of(&gone), Err(Error::Config(why)) if why.contains("cannot be read")));
}

#[test]
fn inspect_summarizes_a_file_without_allocating_blocks() {
    let path = folder("cache_inspected").join("x");
    let cache = filled(config(Format::Int4, 32, 16));
    file::save(&path, &[&cache], "a note").expect("a folder to write to");
    let (found, note) = file::inspect(&path).expect("a valid file");
    let [summary] = &found[..] else { panic!("one cache") };
    assert_eq!((note.as_str(), &summary.config), ("a note", cache.config()));
    let lengths: Vec<usize> = summary.sequences.iter().map(|table| table.len).collect();
    assert_eq!(lengths, [50, 51, 3]);
    let stats = cache.stats().unwrap();
    assert_eq!(
        (summary.open_blocks, summary.sealed_blocks + summary.open_blocks),
        (stats.open_pages, stats.blocks_in_use)
    );
    assert_eq!(summary.tile_bytes, summary.sealed_blocks * stats.bytes_per_block);
    assert_eq!(summary.page_bytes, summary.open_blocks * stats.bytes_per_open_page);
}

#[test]
fn io_errors_name_the_file() {
    let folder = folder("cache_unread");
    let refused = |path: &PathBuf, expected: &str| {
        for error in [PagedKvCache::load(path).map(drop), file::inspect(path).map(drop)] {
            let error = error.expect_err("no such file");
            assert!(matches!(error, Error::CacheFile(_)));
            let message = error.to_string();
            assert!(message.starts_with(&path.display().to_string()) && message.contains(expected), "{message}");
        }
    };
    refused(&folder.join("none"), "cannot be read");
    refused(&folder, "not a file");
    let valid = to_bytes(&filled(config(Format::Int4, 32, 16)));
    for (name, bytes, expected) in [
        ("empty", &b""[..], "not a file of kind \"kvarn cache\""),
        ("text", &b"some text"[..], "not a file of kind"),
        ("named", &b"a text about a kvarn cache"[..], "not a safetensors file"),
        ("cut", &valid[..valid.len() - 1], "tensors of"),
    ] {
        fs::write(folder.join(name), bytes).expect("a file");
        refused(&folder.join(name), expected);
    }
    for path in [folder.join("no/such/folder/x"), folder.join("..")] {
        let message = filled(config(Format::Int8, 16, 16)).save(&path).expect_err("no such folder").to_string();
        assert!(message.contains("cannot be written"), "{message}");
    }
}
