//! The arguments of one call of attention.

use super::numbers::Whole;
use super::tensor::Tensor;
use crate::backend::{AttendOptions, Fresh, Output, Over, TensorView};
use crate::{Error, Result};
use pyo3::prelude::*;

/// The order of a tensor's dimensions.
#[derive(Clone, Copy)]
pub(super) enum Layout {
    /// `[B, heads, T, head_dim]`.
    Heads,
    /// `[num_tokens, heads, head_dim]`.
    Tokens,
}

impl Layout {
    /// The tensor, as `[B, heads, T, head_dim]`.
    pub(super) fn tensor(self, name: &'static str, tensor: &Bound<'_, PyAny>) -> PyResult<Tensor> {
        Ok(self.order(Tensor::new(name, tensor)?)?)
    }

    fn order(self, tensor: Tensor) -> Result<Tensor> {
        match self {
            Self::Heads => Ok(tensor),
            Self::Tokens => tensor.by_tokens(),
        }
    }

    /// Keys and values, both or neither.
    pub(super) fn new_tokens(
        self,
        k: Option<&Bound<'_, PyAny>>,
        v: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Option<(Tensor, Tensor)>> {
        match (k, v) {
            (None, None) => Ok(None),
            (Some(k), Some(v)) => Ok(Some((self.tensor("k", k)?, self.tensor("v", v)?))),
            _ => Err(Error::Config("attend takes both k and v, or neither".to_owned()).into()),
        }
    }
}

/// Keyword arguments that every call of attention takes.
pub(super) struct Keywords<'a, 'py> {
    pub scale: Option<f32>,
    pub window: Option<Whole>,
    pub softcap: Option<f32>,
    pub sinks: Option<&'a Bound<'py, PyAny>>,
    pub lse: Option<&'a Bound<'py, PyAny>>,
    pub history_only: bool,
    pub max_query_len: Option<Whole>,
}

/// Tensors and options, checked as far as Python's objects say.
pub(super) struct Attention {
    q: Tensor,
    new: Option<(Tensor, Tensor)>,
    out: Tensor,
    lse: Option<Tensor>,
    scale: Option<f32>,
    window: Option<usize>,
    softcap: Option<f32>,
    sinks: Option<Vec<f32>>,
    over: Over,
    max_query_len: Option<usize>,
}

impl Attention {
    /// The arguments, and the object that is written: `out`, or a new one like `q`.
    pub(super) fn new<'py>(
        py: Python<'py>,
        layout: Layout,
        q: &Bound<'py, PyAny>,
        new: Option<(Tensor, Tensor)>,
        out: Option<&Bound<'py, PyAny>>,
        keywords: &Keywords<'_, 'py>,
    ) -> PyResult<(Self, Bound<'py, PyAny>)> {
        let given = Tensor::new("q", q)?;
        let object = match out {
            Some(out) => out.clone(),
            None if q.hasattr("new_empty")? => q.call_method1("new_empty", (given.shape(),))?,
            None => py.import("numpy")?.call_method1("empty", (given.shape(), q.getattr("dtype")?))?,
        };
        let tensor = layout.order(given)?;
        let out = layout.tensor("out", &object)?;
        let lse = match keywords.lse {
            Some(lse) => Some(layout.order(Tensor::new("lse", lse)?.with_last_dimension())?),
            None => None,
        };
        let read =
            || [Some(&tensor), new.as_ref().map(|new| &new.0), new.as_ref().map(|new| &new.1)].into_iter().flatten();
        for one in [Some(&out), lse.as_ref()].into_iter().flatten() {
            read().try_for_each(|other| one.check_apart(other))?;
        }
        if let Some(lse) = &lse {
            lse.check_apart(&out)?;
        }
        let sinks = match keywords.sinks {
            // SAFETY: the caller's reference keeps the tensor alive during the call.
            Some(sinks) => Some(unsafe { Tensor::new("sinks", sinks)?.to_vec()? }),
            None => None,
        };
        let &Keywords { scale, softcap, history_only, .. } = keywords;
        let [window, max_query_len] = [keywords.window, keywords.max_query_len].map(|number| number.map(Whole::count));
        let over = if history_only { Over::History } else { Over::All };
        Ok((Self { q: tensor, new, out, lse, scale, window, softcap, sinks, over, max_query_len }, object))
    }

    /// Checks that nothing is written to this memory.
    pub(super) fn check_apart(&self, memory: &[Tensor]) -> Result<()> {
        let written = [Some(&self.out), self.lse.as_ref()].into_iter().flatten();
        let mut pairs = written.flat_map(|one| memory.iter().map(move |other| (one, other)));
        pairs.try_for_each(|(one, other)| one.check_apart(other))
    }

    /// Calls `attend` with what the arguments come to.
    ///
    /// # Safety
    /// The Python objects live, and are not used elsewhere, during the call.
    pub(super) unsafe fn run(
        &self,
        attend: impl FnOnce(TensorView<'_>, Option<Fresh<'_>>, AttendOptions<'_>, Output<'_>) -> Result<()>,
    ) -> Result<()> {
        // SAFETY: the caller's word.
        let (q, new, output) = unsafe {
            let new = match &self.new {
                Some((k, v)) => Some(Fresh { k: k.view()?, v: v.view()? }),
                None => None,
            };
            let lse = self.lse.as_ref().map(|lse| lse.view_mut()).transpose()?;
            (self.q.view()?, new, Output { out: self.out.view_mut()?, lse })
        };
        let &Self { scale, window, softcap, over, max_query_len, .. } = self;
        let options = AttendOptions { scale, window, softcap, sinks: self.sinks.as_deref(), over, max_query_len };
        attend(q, new, options, output)
    }
}
