//! Functions that save, load and inspect files of several caches.

use super::cache::PagedKvCache;
use super::shared::{Shared, lock};
use crate::cache::file::{self, Summary};
use crate::config::CacheConfig;
use crate::{Error, Result, cache};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::path::PathBuf;
use std::sync::Arc;

/// The kind that a file written by kvarn names.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // extracted from Python
pub fn file_kind(py: Python<'_>, path: PathBuf) -> Result<&'static str> {
    py.detach(|| file::kind_of(&path))
}

/// Writes caches and a note into one file.
#[pyfunction]
#[pyo3(signature = (path, caches, note = ""))]
#[allow(clippy::needless_pass_by_value)] // extracted from Python
pub fn save_caches(py: Python<'_>, path: PathBuf, caches: Vec<PyRef<'_, PagedKvCache>>, note: &str) -> Result<()> {
    let caches = shared(&caches);
    py.detach(|| with_all(&caches, |caches| file::save(&path, caches, note)))
}

/// The bytes that `save_caches` writes.
#[pyfunction]
#[pyo3(signature = (caches, note = ""))]
#[allow(clippy::needless_pass_by_value)] // extracted from Python
pub fn caches_to_bytes<'py>(
    py: Python<'py>,
    caches: Vec<PyRef<'_, PagedKvCache>>,
    note: &str,
) -> Result<Bound<'py, PyBytes>> {
    let caches = shared(&caches);
    Ok(PyBytes::new(py, &py.detach(|| with_all(&caches, |caches| file::to_bytes(caches, note)))?))
}

/// Loads the caches and the note of a file.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // extracted from Python
pub fn load_caches(py: Python<'_>, path: PathBuf) -> Result<(Vec<PagedKvCache>, String)> {
    Ok(wrapped(py.detach(|| file::load(&path))?))
}

/// Loads the caches and the note from a file's bytes.
#[pyfunction]
pub fn caches_from_bytes(py: Python<'_>, data: &[u8]) -> Result<(Vec<PagedKvCache>, String)> {
    Ok(wrapped(py.detach(|| file::from_bytes(data))?))
}

/// Checks a file and summarizes its caches.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // extracted from Python
pub fn inspect_caches(py: Python<'_>, path: PathBuf) -> PyResult<(Vec<Bound<'_, PyDict>>, String)> {
    let (found, note) = py.detach(|| file::inspect(&path))?;
    Ok((found.iter().map(|summary| described(py, summary)).collect::<PyResult<_>>()?, note))
}

fn described<'py>(py: Python<'py>, summary: &Summary) -> PyResult<Bound<'py, PyDict>> {
    let config: &CacheConfig = &summary.config;
    let out = PyDict::new(py);
    out.set_item("format", config.format.name())?;
    out.set_item("dtype", config.dtype.name())?;
    out.set_item("num_layers", config.num_layers)?;
    out.set_item("num_kv_heads", config.num_kv_heads)?;
    out.set_item("head_dim", config.head_dim)?;
    out.set_item("block_size", config.block_size)?;
    out.set_item("num_blocks", config.num_blocks)?;
    out.set_item("num_open_pages", config.num_open_pages)?;
    out.set_item("window", config.window)?;
    let of = summary.sequences.iter().map(|table| (table.id.0, table.len, table.first_held));
    out.set_item("sequences", of.collect::<Vec<_>>())?;
    out.set_item("sealed_blocks", summary.sealed_blocks)?;
    out.set_item("open_blocks", summary.open_blocks)?;
    out.set_item("tile_bytes", summary.tile_bytes)?;
    out.set_item("page_bytes", summary.page_bytes)?;
    out.set_item("bytes_per_token", config.block_bytes() as f64 / config.block_size as f64)?;
    Ok(out)
}

fn shared(caches: &[PyRef<'_, PagedKvCache>]) -> Vec<Shared> {
    caches.iter().map(|cache| cache.shared()).collect()
}

fn wrapped((caches, note): (Vec<cache::PagedKvCache>, String)) -> (Vec<PagedKvCache>, String) {
    (caches.into_iter().map(PagedKvCache::wrap).collect(), note)
}

/// Runs `work` with all caches locked. They are locked in the order of their addresses, so that two threads which lock the
/// same caches cannot deadlock.
fn with_all<T>(caches: &[Shared], work: impl FnOnce(&[&cache::PagedKvCache]) -> Result<T>) -> Result<T> {
    let mut order: Vec<usize> = (0..caches.len()).collect();
    order.sort_by_key(|&index| Arc::as_ptr(&caches[index]));
    if order.windows(2).any(|pair| Arc::ptr_eq(&caches[pair[0]], &caches[pair[1]])) {
        return Err(Error::Config("a cache is named twice".to_owned()));
    }
    let mut locked: Vec<_> = order.into_iter().map(|index| (index, lock(&caches[index]))).collect();
    locked.sort_by_key(|(index, _)| *index);
    work(&locked.iter().map(|(_, cache)| &**cache).collect::<Vec<_>>())
}
