//! The Python class `Calibration`; `_core.pyi` documents its errors.

use super::numbers::Whole;
use crate::Result;
use crate::calibration::{self, LayerSummary};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::path::PathBuf;
use std::sync::Arc;

/// The calibration of one model, shared by its caches.
#[pyclass(frozen, module = "kvarn_rs._core")]
pub struct Calibration {
    inner: Arc<calibration::Calibration>,
}

impl Calibration {
    /// Another handle to the calibration, for a cache.
    pub(super) fn shared(&self) -> Arc<calibration::Calibration> {
        Arc::clone(&self.inner)
    }
}

#[pymethods]
impl Calibration {
    #[new]
    fn new() -> Self {
        Self { inner: Arc::default() }
    }

    #[staticmethod]
    #[pyo3(signature = (path, fingerprint = None))]
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn load(py: Python<'_>, path: PathBuf, fingerprint: Option<&str>) -> Result<Self> {
        let inner = py.detach(|| calibration::Calibration::load(&path, fingerprint))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    #[pyo3(signature = (path, fingerprint, model = ""))]
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn save(&self, py: Python<'_>, path: PathBuf, fingerprint: &str, model: &str) -> Result<()> {
        py.detach(|| self.inner.save(&path, fingerprint, model))
    }

    #[getter]
    fn state(&self) -> &'static str {
        self.inner.state().name()
    }
    #[getter]
    fn fingerprint(&self) -> Option<&str> {
        self.inner.origin().map(|origin| origin.fingerprint.as_str())
    }
    #[getter]
    fn model(&self) -> Option<&str> {
        self.inner.origin().map(|origin| origin.model.as_str())
    }

    fn layers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let out = PyList::empty(py);
        for summary in self.inner.layers() {
            let LayerSummary { layer, num_kv_heads, head_dim, query_tokens, state, rotated_heads } = summary;
            let entry = PyDict::new(py);
            entry.set_item("layer", layer)?;
            entry.set_item("num_kv_heads", num_kv_heads)?;
            entry.set_item("head_dim", head_dim)?;
            entry.set_item("query_tokens", query_tokens)?;
            entry.set_item("state", state.name())?;
            entry.set_item("rotated_heads", rotated_heads)?;
            out.append(entry)?;
        }
        Ok(out)
    }

    fn shard(&self, rank: Whole, num_ranks: Whole) -> Result<Self> {
        Ok(Self { inner: Arc::new(self.inner.shard(rank.count(), num_ranks.count())?) })
    }
    fn wanted(&self, layer: Whole) -> usize {
        self.inner.wanted(layer.count())
    }
    fn freeze(&self, py: Python<'_>) -> Result<()> {
        py.detach(|| self.inner.freeze())
    }

    /// Copies of a cache share its calibration.
    fn __copy__(slf: Py<Self>) -> Py<Self> {
        slf
    }
    fn __deepcopy__(slf: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        slf
    }
    fn __repr__(&self) -> String {
        let (state, layers) = (self.state(), self.inner.layers().len());
        format!("Calibration(state={state:?}, layers={layers})")
    }
}
