//! The Python class `PagedKvCache`: a cache behind a mutex, which releases the interpreter while kernels run.

use super::calibration::Calibration;
use super::numbers::Whole;
use super::process::check_process;
use super::shared::{Shared, lock};
use super::step::Step;
use super::tensor::Tensor;
use super::{parse_codec, parse_dtype, parse_format};
use crate::config::CacheConfig;
use crate::paging::SequenceId;
use crate::plan::Rows;
use crate::{Error, Result, cache};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

/// The cache of one group of layers of the same shape; `_core.pyi` documents shapes and errors.
#[pyclass(frozen, module = "kvarn_rs._core")]
pub struct PagedKvCache {
    inner: Shared,
    config: CacheConfig,
}

impl PagedKvCache {
    pub(super) fn wrap(cache: cache::PagedKvCache) -> Self {
        let config = cache.config().clone();
        Self { inner: Arc::new(Mutex::new(cache)), config }
    }

    /// Another handle to the cache.
    pub(super) fn shared(&self) -> Shared {
        Arc::clone(&self.inner)
    }
}

#[pymethods]
impl PagedKvCache {
    #[new]
    #[pyo3(signature = (*, num_layers, num_kv_heads, head_dim, format = "int4", block_size = Whole(128), num_blocks = None,
                        num_open_pages = None, dtype = "float32", window = None, calibration = None, layers = None,
                        codec = None),
           text_signature = "(*, num_layers, num_kv_heads, head_dim, format='int4', block_size=128, num_blocks=None, \
                             num_open_pages=None, dtype='float32', window=None, calibration=None, layers=None, codec=None)")]
    #[allow(clippy::too_many_arguments)] // keywords
    fn new(
        num_layers: Whole,
        num_kv_heads: Whole,
        head_dim: Whole,
        format: &str,
        block_size: Whole,
        num_blocks: Option<Whole>,
        num_open_pages: Option<Whole>,
        dtype: &str,
        window: Option<Whole>,
        calibration: Option<PyRef<'_, Calibration>>,
        layers: Option<Vec<Whole>>,
        codec: Option<&str>,
    ) -> Result<Self> {
        let config = CacheConfig {
            format: parse_format(format)?,
            dtype: parse_dtype(dtype)?,
            num_layers: num_layers.count(),
            num_kv_heads: num_kv_heads.count(),
            head_dim: head_dim.count(),
            block_size: block_size.count(),
            num_blocks: num_blocks.map(Whole::count),
            num_open_pages: num_open_pages.map(Whole::count),
            window: window.map(Whole::count),
        };
        let cache = Self::wrap(match codec {
            Some(name) => cache::PagedKvCache::with_codec(config, parse_codec(name)?)?,
            None => cache::PagedKvCache::new(config)?,
        });
        if let Some(calibration) = calibration {
            cache.set_calibration(calibration, layers)?;
        }
        Ok(cache)
    }

    #[getter]
    fn format(&self) -> &'static str {
        self.config.format.name()
    }
    #[getter]
    fn dtype(&self) -> &'static str {
        self.config.dtype.name()
    }
    #[getter]
    fn num_layers(&self) -> usize {
        self.config.num_layers
    }
    #[getter]
    fn num_kv_heads(&self) -> usize {
        self.config.num_kv_heads
    }
    #[getter]
    fn head_dim(&self) -> usize {
        self.config.head_dim
    }
    #[getter]
    fn block_size(&self) -> usize {
        self.config.block_size
    }
    #[getter]
    fn num_blocks(&self) -> Option<usize> {
        self.config.num_blocks
    }
    #[getter]
    fn num_open_pages(&self) -> Option<usize> {
        self.config.num_open_pages
    }
    #[getter]
    fn window(&self) -> Option<usize> {
        self.config.window
    }

    #[pyo3(signature = (calibration, layers = None))]
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn set_calibration(&self, calibration: PyRef<'_, Calibration>, layers: Option<Vec<Whole>>) -> Result<()> {
        let layers = layers.map_or_else(
            || (0..self.config.num_layers).collect(),
            |layers| layers.iter().map(|layer| layer.count()).collect(),
        );
        lock(&self.inner).set_calibration(calibration.shared(), layers)
    }

    fn sequences(&self) -> Vec<u64> {
        lock(&self.inner).sequences().iter().map(|id| id.0).collect()
    }
    fn new_sequence(&self) -> u64 {
        lock(&self.inner).new_sequence().0
    }
    fn fork(&self, sequence: Whole) -> Result<u64> {
        Ok(lock(&self.inner).fork(SequenceId(sequence.0))?.0)
    }
    fn free(&self, sequence: Whole) -> Result<()> {
        lock(&self.inner).free(SequenceId(sequence.0))
    }
    #[pyo3(signature = (sequence, length, *, unseal = false))]
    fn truncate(&self, py: Python<'_>, sequence: Whole, length: Whole, unseal: bool) -> Result<()> {
        if unseal {
            check_process()?;
        }
        let (sequence, length) = (SequenceId(sequence.0), length.count());
        py.detach(|| {
            let mut cache = lock(&self.inner);
            if unseal { cache.truncate_unsealing(sequence, length) } else { cache.truncate(sequence, length) }
        })
    }
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn check_truncate(&self, sequences: Vec<Whole>, lengths: Vec<Whole>) -> Result<()> {
        if sequences.len() != lengths.len() {
            let (num_sequences, num_lengths) = (sequences.len(), lengths.len());
            return Err(Error::Config(format!("{num_sequences} sequences, but {num_lengths} lengths")));
        }
        let targets = sequences.iter().zip(&lengths).map(|(id, length)| (SequenceId(id.0), length.count()));
        lock(&self.inner).check_truncate(&targets.collect::<Vec<_>>())
    }
    fn seq_len(&self, sequence: Whole) -> Result<usize> {
        Ok(lock(&self.inner).sequence(SequenceId(sequence.0))?.len())
    }
    fn first_held(&self, sequence: Whole) -> Result<usize> {
        Ok(lock(&self.inner).sequence(SequenceId(sequence.0))?.first_held())
    }
    fn block_table(&self, sequence: Whole) -> Result<Vec<u32>> {
        Ok(lock(&self.inner).block_table(SequenceId(sequence.0))?.iter().map(|block| block.0).collect())
    }
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn match_prefix(&self, token_ids: Vec<Whole>) -> Result<u64> {
        Ok(lock(&self.inner).match_prefix(&token_ids_of(&token_ids)?).0)
    }
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn publish_prefix(&self, sequence: Whole, token_ids: Vec<Whole>) -> Result<usize> {
        lock(&self.inner).publish_prefix(SequenceId(sequence.0), &token_ids_of(&token_ids)?)
    }

    #[pyo3(signature = (sequences, num_new = None, *, mask = None, retain = false))]
    fn begin_step(
        &self,
        py: Python<'_>,
        sequences: Vec<Whole>,
        num_new: Option<&Bound<'_, PyAny>>,
        mask: Option<&Bound<'_, PyAny>>,
        retain: bool,
    ) -> PyResult<Step> {
        check_process()?;
        let masks = match mask {
            // SAFETY: `mask` is borrowed for the call, and the interpreter is held.
            Some(mask) => unsafe { Tensor::new("mask", mask)?.to_bool_rows()? },
            None => Vec::new(),
        };
        let rows: Vec<Rows<'_>> = match (num_new, mask) {
            (None, Some(_)) => masks.iter().map(|mask| Rows::Masked(mask)).collect(),
            (Some(num_new), None) if num_new.hasattr("__index__")? => {
                vec![Rows::All(num_new.extract::<Whole>()?.count()); sequences.len()]
            }
            (Some(num_new), None) => {
                num_new.extract::<Vec<Whole>>()?.into_iter().map(|count| Rows::All(count.count())).collect()
            }
            _ => return Err(Error::Config("begin_step takes either num_new or mask".to_owned()).into()),
        };
        if rows.len() != sequences.len() {
            let (num_sequences, num_rows) = (sequences.len(), rows.len());
            return Err(Error::Config(format!("{num_sequences} sequences, but rows for {num_rows}")).into());
        }
        let requests: Vec<_> = sequences.into_iter().map(|id| SequenceId(id.0)).zip(rows).collect();
        let open = py.detach(|| lock(&self.inner).begin_step(&requests, retain))?;
        Ok(Step::new(self.shared(), open))
    }

    #[pyo3(signature = (layer, sequence, k, v, *, start = Whole(0)),
           text_signature = "($self, layer, sequence, k, v, *, start=0)")]
    fn dequantize(
        &self,
        py: Python<'_>,
        layer: Whole,
        sequence: Whole,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
        start: Whole,
    ) -> PyResult<()> {
        let (k, v) = (Tensor::new("k", k)?, Tensor::new("v", v)?);
        v.check_apart(&k)?;
        // SAFETY: the caller's references keep both alive during the call, and they do not overlap.
        let (k, v) = unsafe { (k.view_mut()?, v.view_mut()?) };
        Ok(py.detach(|| lock(&self.inner).dequantize(layer.count(), SequenceId(sequence.0), start.count(), k, v))?)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = lock(&self.inner).stats()?;
        let out = PyDict::new(py);
        out.set_item("blocks_in_use", stats.blocks_in_use)?;
        out.set_item("peak_blocks", stats.peak_blocks)?;
        out.set_item("free_blocks", stats.free_blocks)?;
        out.set_item("partial_blocks", stats.partial_blocks)?;
        out.set_item("open_pages", stats.open_pages)?;
        out.set_item("peak_open_pages", stats.peak_open_pages)?;
        out.set_item("bytes_in_use", stats.bytes_in_use)?;
        out.set_item("peak_bytes", stats.peak_bytes)?;
        out.set_item("allocated_bytes", stats.allocated_bytes)?;
        out.set_item("bytes_per_block", stats.bytes_per_block)?;
        out.set_item("bytes_per_open_page", stats.bytes_per_open_page)?;
        out.set_item("bytes_per_token", stats.bytes_per_token)?;
        out.set_item("num_sequences", stats.num_sequences)?;
        out.set_item("cow_copies", stats.cow_copies)?;
        out.set_item("sealed", stats.sealed)?;
        out.set_item("unsealed", stats.unsealed)?;
        out.set_item("first_page_tokens", stats.first_page_tokens)?;
        out.set_item("calibrated", stats.calibrated.name())?;
        out.set_item("saturation", stats.layers.iter().map(|layer| layer.saturation).collect::<Vec<_>>())?;
        out.set_item("drift", stats.layers.iter().map(|layer| layer.drift).collect::<Vec<_>>())?;
        let out_of_range: Vec<u64> = stats.layers.iter().map(|layer| layer.out_of_range_tokens).collect();
        out.set_item("out_of_range_tokens", out_of_range)?;
        Ok(out)
    }

    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn save(&self, py: Python<'_>, path: PathBuf) -> Result<()> {
        py.detach(|| lock(&self.inner).save(&path))
    }
    #[staticmethod]
    #[pyo3(signature = (path, *, calibration = None, layers = None))]
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn load(
        py: Python<'_>,
        path: PathBuf,
        calibration: Option<PyRef<'_, Calibration>>,
        layers: Option<Vec<Whole>>,
    ) -> Result<Self> {
        let cache = Self::wrap(py.detach(|| cache::PagedKvCache::load(&path))?);
        if let Some(calibration) = calibration {
            cache.set_calibration(calibration, layers)?;
        }
        Ok(cache)
    }
    fn to_bytes<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &py.detach(|| lock(&self.inner).to_bytes())?))
    }
    #[staticmethod]
    fn from_bytes(py: Python<'_>, data: &[u8]) -> Result<Self> {
        Ok(Self::wrap(py.detach(|| cache::PagedKvCache::from_bytes(data))?))
    }
    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        Ok((py.get_type::<Self>().getattr("from_bytes")?, (self.to_bytes(py)?,)))
    }

    fn reset(&self) -> Result<()> {
        lock(&self.inner).reset()
    }
    fn copy(&self, py: Python<'_>) -> Result<Self> {
        py.detach(|| Ok(Self::wrap(lock(&self.inner).try_clone()?)))
    }
    fn __copy__(&self, py: Python<'_>) -> Result<Self> {
        self.copy(py)
    }
    fn __deepcopy__(&self, py: Python<'_>, _memo: &Bound<'_, PyAny>) -> Result<Self> {
        self.copy(py)
    }
    fn __repr__(&self) -> String {
        let CacheConfig { format, num_layers, num_kv_heads, head_dim, block_size, .. } = &self.config;
        let format = format.name();
        format!(
            "PagedKvCache(format={format:?}, num_layers={num_layers}, num_kv_heads={num_kv_heads}, \
             head_dim={head_dim}, block_size={block_size})"
        )
    }
}

fn token_ids_of(token_ids: &[Whole]) -> Result<Vec<u32>> {
    let narrow =
        |id: &Whole| u32::try_from(id.0).map_err(|_| Error::Config(format!("token ids are in 0..2^32, got {}", id.0)));
    token_ids.iter().map(narrow).collect()
}
