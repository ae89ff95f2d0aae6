//! The Python class `Engine`: records in a caller's tensors, with the caller's block tables.

use super::attention::{Attention, Keywords, Layout};
use super::calibration::Calibration;
use super::numbers::Whole;
use super::process::check_process;
use super::tensor::Tensor;
use super::{parse_dtype, parse_format};
use crate::backend::cpu::{Cpu, Level};
use crate::backend::memory::LayerMemory;
use crate::backend::{Executor, Fresh, LayerHealth};
use crate::config::Shape;
use crate::engine::{self, Tables};
use crate::format::RecordLayout;
use crate::paging::BlockId;
use crate::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Quantized attention over the memory of a serving engine; `_core.pyi` documents shapes and errors.
#[pyclass(frozen, module = "kvarn_rs._core")]
pub struct Engine {
    inner: Mutex<engine::Engine>,
    shape: Shape,
    /// What the records are in, and the objects that keep it.
    memory: Vec<Tensor>,
    _objects: Vec<Py<PyAny>>,
}

impl Engine {
    fn lock(&self) -> MutexGuard<'_, engine::Engine> {
        // A panic under the lock is a bug that was already reported.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (*, num_kv_heads, head_dim, pages, tiles = None, format = "int4", block_size = Whole(128),
                        dtype = "float32", window = None, calibration = None, layers = None),
           text_signature = "(*, num_kv_heads, head_dim, pages, tiles=None, format='int4', block_size=128, \
                             dtype='float32', window=None, calibration=None, layers=None)")]
    #[allow(clippy::too_many_arguments)] // keywords
    fn new(
        num_kv_heads: Whole,
        head_dim: Whole,
        pages: Vec<Bound<'_, PyAny>>,
        tiles: Option<Vec<Bound<'_, PyAny>>>,
        format: &str,
        block_size: Whole,
        dtype: &str,
        window: Option<Whole>,
        calibration: Option<PyRef<'_, Calibration>>,
        layers: Option<Vec<Whole>>,
    ) -> PyResult<Self> {
        let shape = Shape {
            format: parse_format(format)?,
            dtype: parse_dtype(dtype)?,
            num_layers: pages.len(),
            num_kv_heads: num_kv_heads.count(),
            head_dim: head_dim.count(),
            block_size: block_size.count(),
        };
        shape.validate()?;
        let records = |name, tensor: &Bound<'_, PyAny>, layout: Option<RecordLayout>| {
            Tensor::new(name, tensor)?
                .records(shape.num_kv_heads, layout.map_or(0, RecordLayout::bytes))
                .map_err(PyErr::from)
        };
        if tiles.as_ref().is_some_and(|tiles| tiles.len() != pages.len()) {
            let (num_tiles, num_pages) = (tiles.map_or(0, |tiles| tiles.len()), pages.len());
            return Err(Error::Config(format!("tiles of {num_tiles} layers, pages of {num_pages}")).into());
        }
        let mut memory = Vec::new();
        for (layer, page) in pages.iter().enumerate() {
            let tiles = tiles.as_ref().map(|tiles| records("tiles", &tiles[layer], shape.tile())).transpose()?;
            memory.push(LayerMemory { pages: records("pages", page, Some(shape.page()))?, tiles });
        }
        let level = Level::chosen()?;
        // SAFETY: the tensors are kept; that nobody else writes their records is the caller's word.
        let backend = unsafe { Cpu::lent(shape, level, &memory)? };
        let mut inner = engine::Engine::new(Executor::new(backend), window.map(Whole::count))?;
        if let Some(calibration) = calibration {
            let layers = layers.map_or_else(
                || (0..shape.num_layers).collect(),
                |layers| layers.iter().map(|layer| layer.count()).collect(),
            );
            inner.set_calibration(calibration.shared(), layers)?;
        }
        let objects: Vec<Bound<'_, PyAny>> = pages.into_iter().chain(tiles.into_iter().flatten()).collect();
        let memory = objects.iter().map(|object| Tensor::new("pages and tiles", object)).collect::<PyResult<_>>()?;
        let objects = objects.into_iter().map(Bound::unbind).collect();
        Ok(Self { inner: Mutex::new(inner), shape, memory, _objects: objects })
    }

    #[getter]
    fn format(&self) -> &'static str {
        self.shape.format.name()
    }
    #[getter]
    fn num_layers(&self) -> usize {
        self.shape.num_layers
    }
    #[getter]
    fn num_kv_heads(&self) -> usize {
        self.shape.num_kv_heads
    }
    #[getter]
    fn head_dim(&self) -> usize {
        self.shape.head_dim
    }
    #[getter]
    fn block_size(&self) -> usize {
        self.shape.block_size
    }
    #[getter]
    fn is_open(&self) -> bool {
        self.lock().plan().is_some()
    }

    #[pyo3(signature = (block_tables, context_lens, query_start_loc, *, seal = true))]
    fn begin(
        &self,
        py: Python<'_>,
        block_tables: &Bound<'_, PyAny>,
        context_lens: &Bound<'_, PyAny>,
        query_start_loc: &Bound<'_, PyAny>,
        seal: bool,
    ) -> PyResult<()> {
        check_process()?;
        let block_tables = Tensor::new("block_tables", block_tables)?;
        let (context_lens, query_start_loc) =
            (Tensor::new("context_lens", context_lens)?, Tensor::new("query_start_loc", query_start_loc)?);
        // SAFETY: the caller's references keep the tensors alive during the call, and it does not write them.
        let (tables, width, stride) = unsafe { block_tables.int_rows()? };
        // SAFETY: as above.
        let (context_lens, query_start_loc) = unsafe { (context_lens.ints()?, query_start_loc.ints()?) };
        let tables = Tables { block_tables: tables, width, stride, context_lens, query_start_loc, seals: seal };
        Ok(py.detach(|| self.lock().begin(&tables))?)
    }

    #[pyo3(signature = (layer, k, v, q = None))]
    fn append(
        &self,
        py: Python<'_>,
        layer: Whole,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
        q: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        check_process()?;
        let (k, v) = (Layout::Tokens.tensor("k", k)?, Layout::Tokens.tensor("v", v)?);
        // SAFETY: the caller's references keep both alive during the call.
        let new = unsafe { Fresh { k: k.view()?, v: v.view()? } };
        let q = match q {
            // SAFETY: as above.
            Some(q) => Some(unsafe { Layout::Tokens.tensor("q", q)?.view()? }),
            None => None,
        };
        Ok(py.detach(|| self.lock().append(layer.count(), new, q))?)
    }

    #[pyo3(signature = (layer, q, k, v, out = None, *, scale = None, window = None, softcap = None, sinks = None, lse = None,
                        history_only = false, max_query_len = None))]
    #[allow(clippy::too_many_arguments)] // keywords
    fn attend<'py>(
        &self,
        py: Python<'py>,
        layer: Whole,
        q: &Bound<'py, PyAny>,
        k: Option<&Bound<'py, PyAny>>,
        v: Option<&Bound<'py, PyAny>>,
        out: Option<&Bound<'py, PyAny>>,
        scale: Option<f32>,
        window: Option<Whole>,
        softcap: Option<f32>,
        sinks: Option<&Bound<'py, PyAny>>,
        lse: Option<&Bound<'py, PyAny>>,
        history_only: bool,
        max_query_len: Option<Whole>,
    ) -> PyResult<Bound<'py, PyAny>> {
        check_process()?;
        let keywords = Keywords { scale, window, softcap, sinks, lse, history_only, max_query_len };
        let new = Layout::Tokens.new_tokens(k, v)?;
        let (attention, out) = Attention::new(py, Layout::Tokens, q, new, out, &keywords)?;
        attention.check_apart(&self.memory)?;
        let layer = layer.count();
        // SAFETY: the caller's references keep the tensors alive; it must not use what is written elsewhere.
        py.detach(|| unsafe {
            attention.run(|q, new, options, output| self.lock().attend(layer, q, new, options, output))
        })?;
        Ok(out)
    }

    #[pyo3(signature = (layer, q, k, v, out = None, *, scale = None, window = None, softcap = None, sinks = None, lse = None))]
    #[allow(clippy::too_many_arguments)] // keywords
    fn forward<'py>(
        &self,
        py: Python<'py>,
        layer: Whole,
        q: &Bound<'py, PyAny>,
        k: &Bound<'py, PyAny>,
        v: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
        scale: Option<f32>,
        window: Option<Whole>,
        softcap: Option<f32>,
        sinks: Option<&Bound<'py, PyAny>>,
        lse: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        check_process()?;
        let keywords = Keywords { scale, window, softcap, sinks, lse, history_only: false, max_query_len: None };
        let new = Layout::Tokens.new_tokens(Some(k), Some(v))?;
        let (attention, out) = Attention::new(py, Layout::Tokens, q, new, out, &keywords)?;
        attention.check_apart(&self.memory)?;
        let layer = layer.count();
        // SAFETY: as above.
        py.detach(|| unsafe {
            attention.run(|q, new, options, output| {
                let Some(new) = new else { unreachable!("k and v are required") };
                self.lock().forward(layer, q, new, options, output)
            })
        })?;
        Ok(out)
    }

    #[pyo3(signature = (layer, sequence, k, v, *, start = Whole(0)), text_signature = "($self, layer, sequence, k, v, *, start=0)")]
    fn dequantize(
        &self,
        py: Python<'_>,
        layer: Whole,
        sequence: Whole,
        k: &Bound<'_, PyAny>,
        v: &Bound<'_, PyAny>,
        start: Whole,
    ) -> PyResult<()> {
        check_process()?;
        let (k, v) = (Layout::Tokens.tensor("k", k)?, Layout::Tokens.tensor("v", v)?);
        v.check_apart(&k)?;
        self.memory.iter().try_for_each(|records| k.check_apart(records).and_then(|()| v.check_apart(records)))?;
        // SAFETY: the caller's references keep both alive during the call, and they do not overlap.
        let (k, v) = unsafe { (k.view_mut()?, v.view_mut()?) };
        Ok(py.detach(|| self.lock().dequantize(layer.count(), sequence.count(), start.count(), &k, &v))?)
    }

    #[pyo3(signature = (num_accepted = None))]
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn commit(&self, py: Python<'_>, num_accepted: Option<Vec<Whole>>) -> Result<()> {
        check_process()?;
        let counts = num_accepted.map(|counts| counts.iter().map(|count| count.count()).collect::<Vec<_>>());
        py.detach(|| self.lock().commit(counts.as_deref()))
    }
    fn abort(&self) -> Result<()> {
        check_process()?;
        self.lock().abort()
    }
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn release(&self, blocks: Vec<Whole>) -> Result<()> {
        check_process()?;
        self.lock().release(&blocks.iter().map(|&block| id(block)).collect::<Result<Vec<_>>>()?)
    }
    fn has_page(&self, block: Whole) -> Result<bool> {
        self.lock().has_page(id(block)?)
    }
    fn copy_block(&self, source: Whole, destination: Whole) -> Result<()> {
        check_process()?;
        self.lock().copy_block(id(source)?, id(destination)?)
    }

    #[pyo3(signature = (layer, block, num_tokens, *, is_first))]
    fn records<'py>(
        &self,
        py: Python<'py>,
        layer: Whole,
        block: Whole,
        num_tokens: Whole,
        is_first: bool,
    ) -> Result<Bound<'py, PyBytes>> {
        let records = self.lock().records(layer.count(), id(block)?, num_tokens.count(), is_first)?;
        Ok(PyBytes::new(py, &records))
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.lock().stats()?;
        let out = PyDict::new(py);
        out.set_item("open_pages", stats.open_pages)?;
        out.set_item("peak_open_pages", stats.peak_open_pages)?;
        out.set_item("sealed", stats.sealed)?;
        out.set_item("calibrated", stats.calibrated.name())?;
        out.set_item("saturation", stats.layers.iter().map(LayerHealth::saturation).collect::<Vec<_>>())?;
        out.set_item("drift", stats.layers.iter().map(LayerHealth::drift).collect::<Vec<_>>())?;
        let out_of_range: Vec<u64> = stats.layers.iter().map(LayerHealth::out_of_range_tokens).collect();
        out.set_item("out_of_range_tokens", out_of_range)?;
        Ok(out)
    }
}

fn id(block: Whole) -> Result<BlockId> {
    let beyond = |_| Error::Config(format!("block ids are in 0..2^32, got {}", block.0));
    u32::try_from(block.0).map(BlockId).map_err(beyond)
}
