//! Writes the files of `corpus/` that a mutation starts from: the smallest caches and calibrations there are, one of each
//! format and one of several things at once.

use kvarn::backend::{Fresh, TensorView};
use kvarn::cache::file;
use kvarn::calibration::{Calibration, HeadShape};
use kvarn::format::Format;
use kvarn::plan::Rows;
use kvarn::{CacheConfig, PagedKvCache, Result};
use std::path::Path;

/// Channels of a head, and tokens of a block: the fewest.
const LEAST: usize = 16;

fn main() -> Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let write = |target: &str, name: &str, bytes: &[u8]| {
        let folder = corpus.join(target);
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join(name), bytes).expect("a file");
    };
    for format in Format::ALL {
        let bytes = file::to_bytes(&[&cache(format, 1, None)?], "")?;
        write("cache_file", format.name(), &bytes);
    }
    let both = file::to_bytes(&[&cache(Format::Int3, 2, Some(20))?, &cache(Format::Int8, 1, None)?], "a \"note\"")?;
    write("cache_file", "two_caches", &both);
    let none = file::to_bytes(&[], "")?;
    write("cache_file", "no_cache", &none);
    write("archive_header", "no_cache", &none);
    write("archive_header", "int4", &file::to_bytes(&[&cache(Format::Int4, 1, None)?], "")?);
    write("calibration_file", "one_layer", &calibration(&[0])?);
    write("calibration_file", "two_layers", &calibration(&[3, 11])?);
    for name in ["raw", "int4", "bfloat16", "avx2", "scalar", "kivi-k2v2", "fp8", "bf16"] {
        write("names_and_sizes", name, &[&[0; 64][..], name.as_bytes()].concat());
    }
    let bytes: Vec<u8> = (0..200_u32).map(|i| (i * i * 37 >> 3) as u8).collect();
    write("paging_operations", "squares", &bytes);
    Ok(())
}

/// A sequence of a sealed block and some tokens, and a fork of it.
fn cache(format: Format, num_layers: usize, window: Option<usize>) -> Result<PagedKvCache> {
    let config = CacheConfig { format, block_size: LEAST, window, ..CacheConfig::new(num_layers, 1, LEAST) };
    let mut cache = PagedKvCache::new(config)?;
    let sequence = cache.new_sequence();
    for count in [LEAST + 1, 1] {
        append(&mut cache, sequence, count)?;
    }
    let fork = cache.fork(sequence)?;
    append(&mut cache, fork, 1)?;
    Ok(cache)
}

fn append(cache: &mut PagedKvCache, sequence: kvarn::paging::SequenceId, count: usize) -> Result<()> {
    let open = cache.begin_step(&[(sequence, Rows::All(count))], false)?;
    let rows: Vec<f32> = (0..count * LEAST).map(|i| (i as f32).sin()).collect();
    for layer in 0..cache.config().num_layers {
        let [k, v] = ["k", "v"].map(|name| TensorView::from_slice(name, &rows, [1, 1, count, LEAST]));
        cache.append(&open, layer, Fresh { k: k?, v: v? }, None)?;
    }
    cache.commit(&open)
}

fn calibration(layers: &[usize]) -> Result<Vec<u8>> {
    let calibration = Calibration::new();
    let shape = HeadShape { num_q_heads: 1, num_kv_heads: 1, head_dim: LEAST };
    let rows: Vec<f32> = (0..128 * LEAST).map(|i| (i as f32 * 0.37).sin() + (i % 5) as f32).collect();
    for &layer in layers {
        calibration.observe(layer, shape, &rows, &rows)?;
    }
    calibration.freeze()?;
    calibration.to_bytes("fingerprint", "model")
}
