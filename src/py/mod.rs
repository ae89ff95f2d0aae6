//! The Python module `kvarn_rs._core`.

mod attention;
mod cache;
mod calibration;
mod engine;
mod errors;
mod file;
mod numbers;
mod process;
mod shared;
mod step;
mod tensor;

use crate::backend::cpu::Level;
use crate::config::{capacity as planner, check_block_size, check_head_dim};
use crate::format::{Dtype, Format, record_bytes};
use crate::parallel::Threads;
use crate::quant::Codec;
use crate::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Quantized, paged key/value cache: the Rust core of `kvarn_rs`.
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::cache::PagedKvCache;
    #[pymodule_export]
    use super::calibration::Calibration;
    #[pymodule_export]
    use super::engine::Engine;
    #[pymodule_export]
    use super::file::{caches_from_bytes, caches_to_bytes, file_kind, inspect_caches, load_caches, save_caches};
    #[pymodule_export]
    use super::step::Step;
    #[pymodule_export]
    use super::{
        block_bytes, capacity, codec_bytes_per_token, codecs, first_seen, formats, is_prefill, num_threads, simd_level,
    };

    /// Remembers the process whose OpenMP threads may be used.
    #[pymodule_init]
    #[allow(clippy::unnecessary_wraps)] // what pyo3 asks for
    fn init(_module: &super::Bound<'_, super::PyModule>) -> super::PyResult<()> {
        let _ = super::Threads::of_process();
        Ok(())
    }

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_export]
    const DECODE_TOKENS: usize = crate::plan::DECODE_TOKENS;

    #[pymodule_export]
    const FIRST_TOKENS: usize = crate::calibration::FIRST_TOKENS;

    #[pymodule_export]
    const QUERY_TOKENS: usize = crate::calibration::QUERY_TOKENS;
}

#[pyfunction]
fn is_prefill(block_size: usize, context_len: usize, num_new: usize) -> bool {
    crate::plan::is_prefill(block_size, context_len, num_new)
}

#[pyfunction]
fn first_seen(position: usize, window: Option<usize>) -> usize {
    crate::plan::first_seen(position, window)
}

fn parse_format(name: &str) -> Result<Format> {
    Format::parse(name)
        .ok_or_else(|| Error::UnknownFormat { given: name.to_owned(), known: Format::ALL.map(Format::name).join(", ") })
}

fn parse_codec(name: &str) -> Result<Codec> {
    Codec::parse(name).ok_or_else(|| {
        let known = Codec::ALL.map(Codec::name).join(", ");
        Error::UnknownFormat { given: name.to_owned(), known }
    })
}

fn parse_dtype(name: &str) -> Result<Dtype> {
    Dtype::parse(name).ok_or_else(|| Error::Dtype {
        name: "dtype",
        expected: Dtype::ALL.map(Dtype::name).join(", "),
        got: name.to_owned(),
    })
}

/// Names of the cache formats, from the largest to the smallest.
#[pyfunction]
fn formats() -> Vec<&'static str> {
    Format::ALL.map(Format::name).to_vec()
}

/// Names of the codecs, which quantize `raw` pages in place to evaluate other schemes.
#[pyfunction]
fn codecs() -> Vec<&'static str> {
    Codec::ALL.map(Codec::name).to_vec()
}

/// Bytes per token and kv head of a codec's scheme, if it were stored packed.
#[pyfunction]
#[pyo3(signature = (codec, head_dim, block_size = 128))]
fn codec_bytes_per_token(codec: &str, head_dim: usize, block_size: usize) -> Result<f64> {
    let codec = parse_codec(codec)?;
    check_shape(head_dim, block_size)?;
    Ok(codec.bytes_per_token(head_dim, block_size))
}

/// The SIMD level of new caches: the fastest of this machine, or the one named by `KVARN_SIMD`.
#[pyfunction]
fn simd_level() -> Result<&'static str> {
    Ok(Level::chosen()?.name())
}

/// Number of kernel threads: torch's where it has OpenMP, else `RAYON_NUM_THREADS`, or one per core.
#[pyfunction]
fn num_threads() -> usize {
    process::kernel_process(); // the next line starts the threads
    Threads::of_process().count()
}

/// Bytes of one block of one layer and key/value head at rest: of a tile in formats that seal, else of a page.
#[pyfunction]
#[pyo3(signature = (format, head_dim, block_size = 128, dtype = "bfloat16"))]
fn block_bytes(format: &str, head_dim: usize, block_size: usize, dtype: &str) -> Result<usize> {
    let (format, dtype) = (parse_format(format)?, parse_dtype(dtype)?);
    check_shape(head_dim, block_size)?;
    Ok(record_bytes(format, dtype, head_dim, block_size))
}

fn check_shape(head_dim: usize, block_size: usize) -> Result<()> {
    check_head_dim(head_dim)?;
    check_block_size(block_size)
}

/// Computes what fits in `memory_bytes` if every sequence is `context` tokens long. `storage` is a cache format, or `bf16`
/// or `fp8` for an engine's unquantized cache.
#[pyfunction]
#[pyo3(signature = (storage, groups, block_size, context, memory_bytes, max_sequences = None))]
#[allow(clippy::needless_pass_by_value)] // extracted from Python
fn capacity<'py>(
    py: Python<'py>,
    storage: &str,
    groups: Vec<(usize, usize, usize, Option<usize>)>,
    block_size: usize,
    context: usize,
    memory_bytes: u64,
    max_sequences: Option<u64>,
) -> PyResult<Bound<'py, PyDict>> {
    let storage = planner::Storage::parse(storage)?;
    let groups: Vec<planner::LayerGroup> = groups
        .iter()
        .map(|&(num_layers, num_kv_heads, head_dim, window)| planner::LayerGroup {
            num_layers,
            num_kv_heads,
            head_dim,
            window,
            storage,
        })
        .collect();
    let fits = planner::capacity(&groups, block_size, context, memory_bytes, max_sequences)?;
    let out = PyDict::new(py);
    out.set_item("sequence_bytes", fits.sequence_bytes)?;
    out.set_item("open_bytes", fits.open_bytes)?;
    out.set_item("open_page_bytes", fits.open_page_bytes)?;
    out.set_item("tokens", fits.tokens)?;
    out.set_item("sequences", fits.sequences)?;
    Ok(out)
}
