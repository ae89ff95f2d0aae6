//! The Python class `Step`: append and attend for the rows of one step.

use super::attention::{Attention, Keywords, Layout};
use super::numbers::Whole;
use super::process::check_process;
use super::shared::{Shared, lock};
use super::tensor::Tensor;
use crate::backend::Fresh;
use crate::{Result, cache};
use pyo3::prelude::*;

/// A step that is open until it is committed or aborted.
#[pyclass(frozen, module = "kvarn_rs._core")]
pub struct Step {
    inner: Shared,
    open: cache::Step,
    num_rows: usize,
}

impl Step {
    pub(super) fn new(inner: Shared, open: cache::Step) -> Self {
        let num_rows = open.plan().num_rows();
        Self { inner, open, num_rows }
    }
}

#[pymethods]
impl Step {
    #[getter]
    fn num_rows(&self) -> usize {
        self.num_rows
    }
    #[getter]
    fn is_open(&self) -> bool {
        lock(&self.inner).is_open(&self.open)
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
        let (k, v) = (Tensor::new("k", k)?, Tensor::new("v", v)?);
        // SAFETY: the caller's references keep both alive during the call.
        let fresh = unsafe { Fresh { k: k.view()?, v: v.view()? } };
        let q = match q {
            // SAFETY: as above.
            Some(q) => Some(unsafe { Tensor::new("q", q)?.view()? }),
            None => None,
        };
        Ok(py.detach(|| lock(&self.inner).append(&self.open, layer.count(), fresh, q))?)
    }

    #[pyo3(signature = (layer, q, k, v, out = None, *, scale = None, window = None, softcap = None, sinks = None, lse = None,
                        history_only = false))]
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
    ) -> PyResult<Bound<'py, PyAny>> {
        check_process()?;
        let keywords = Keywords { scale, window, softcap, sinks, lse, history_only, max_query_len: None };
        let (attention, out) = Attention::new(py, Layout::Heads, q, Layout::Heads.new_tokens(k, v)?, out, &keywords)?;
        let layer = layer.count();
        // SAFETY: the caller's references keep the tensors alive; it must not use what is written elsewhere.
        py.detach(|| unsafe {
            attention
                .run(|q, new, options, output| lock(&self.inner).attend(&self.open, layer, q, new, options, output))
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
        let (attention, out) =
            Attention::new(py, Layout::Heads, q, Layout::Heads.new_tokens(Some(k), Some(v))?, out, &keywords)?;
        let layer = layer.count();
        // SAFETY: as above.
        py.detach(|| unsafe {
            attention.run(|q, new, options, output| {
                let Some(new) = new else { unreachable!("k and v are required") };
                lock(&self.inner).forward(&self.open, layer, q, new, options, output)
            })
        })?;
        Ok(out)
    }

    fn commit(&self) -> Result<()> {
        check_process()?;
        lock(&self.inner).commit(&self.open)
    }
    fn abort(&self) -> Result<()> {
        lock(&self.inner).abort(&self.open)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }
    #[pyo3(signature = (exc_type, _exc_value, _traceback))]
    fn __exit__(
        &self,
        exc_type: &Bound<'_, PyAny>,
        _exc_value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> Result<bool> {
        if self.is_open() {
            let settled = if exc_type.is_none() { self.commit() } else { self.abort() };
            if settled.is_err() && self.is_open() {
                self.abort()?;
            }
            settled?;
        }
        Ok(false)
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        let mut cache = lock(&self.inner);
        if cache.is_open(&self.open) {
            // Nobody can commit the step any more. It is open, as checked above, so aborting it cannot fail.
            let _ = cache.abort(&self.open);
        }
    }
}
