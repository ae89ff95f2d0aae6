//! The Python class `Step`: append and attend for the rows of one step.

use super::cache::{Shared, lock};
use super::numbers::Whole;
use super::tensor::HostTensor;
use crate::backend::{AttendOptions, Fresh};
use crate::{Error, Result, cache};
use pyo3::prelude::*;
use std::sync::OnceLock;

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

/// The id of the process whose kernel threads exist: the one that first called this, which every use of them does.
pub(super) fn kernel_process() -> u32 {
    static FIRST: OnceLock<u32> = OnceLock::new();
    *FIRST.get_or_init(std::process::id)
}

/// Refuses a forked child: kernel threads do not survive `fork`, and a child that used them would block forever.
pub(super) fn check_process() -> Result<()> {
    let (parent, current) = (kernel_process(), std::process::id());
    if parent == current {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "process {current} was forked from {parent}, whose kernel threads it does not have: start processes by \"spawn\""
    )))
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
        let (k, v) = (HostTensor::new("k", k)?, HostTensor::new("v", v)?);
        // SAFETY: the caller's references keep both alive during the call.
        let fresh = unsafe { Fresh { k: k.view()?, v: v.view()? } };
        let q = match q {
            // SAFETY: as above.
            Some(q) => Some(unsafe { HostTensor::new("q", q)?.view()? }),
            None => None,
        };
        Ok(py.detach(|| lock(&self.inner).append(&self.open, layer.count(), fresh, q))?)
    }

    #[pyo3(signature = (layer, q, k, v, out = None, *, scale = None, window = None, softcap = None, sinks = None))]
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
    ) -> PyResult<Bound<'py, PyAny>> {
        check_process()?;
        let host_q = HostTensor::new("q", q)?;
        // SAFETY: the caller's reference keeps the tensor alive during the call.
        let q_view = unsafe { host_q.view()? };
        let out = match out {
            Some(out) => out.clone(),
            None if q.hasattr("new_empty")? => q.call_method1("new_empty", (host_q.shape(),))?,
            None => py.import("numpy")?.call_method1("empty", (host_q.shape(), q.getattr("dtype")?))?,
        };
        let host_out = HostTensor::new("out", &out)?;
        host_out.check_apart(&host_q)?;
        let fresh = match (k, v) {
            (None, None) => None,
            (Some(k), Some(v)) => {
                let (k, v) = (HostTensor::new("k", k)?, HostTensor::new("v", v)?);
                host_out.check_apart(&k)?;
                host_out.check_apart(&v)?;
                // SAFETY: as above.
                Some(unsafe { Fresh { k: k.view()?, v: v.view()? } })
            }
            _ => return Err(Error::Config("attend takes both k and v, or neither".to_owned()).into()),
        };
        let sinks = match sinks {
            // SAFETY: as above.
            Some(sinks) => Some(unsafe { HostTensor::new("sinks", sinks)?.to_vec()? }),
            None => None,
        };
        // SAFETY: as above; the caller must not use `out` elsewhere during the call.
        let out_view = unsafe { host_out.view_mut()? };
        let options = AttendOptions { scale, window: window.map(Whole::count), softcap, sinks: sinks.as_deref() };
        py.detach(|| lock(&self.inner).attend(&self.open, layer.count(), q_view, fresh, options, out_view))?;
        Ok(out)
    }

    fn commit(&self) -> Result<()> {
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
