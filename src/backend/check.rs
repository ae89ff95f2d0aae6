//! Shapes, options and bounds of a call, checked once for every device.

use super::{AttendOptions, Backend, Fresh, Launch, Model, Output, Plan, TensorView};
use crate::config::check_window;
use crate::error::{Error, Result};
use crate::format::{Dtype, Format, PlanArray};
use crate::plan::Bounds;
use std::ops::Range;

/// Is this a plan, and are these layers, of the backend's shape and within its memory?
pub(super) fn launch(backend: &dyn Backend, launch: Launch<'_>, layers: &Range<usize>) -> Result<()> {
    let shape = backend.shape();
    if layers.start > layers.end || layers.end > shape.num_layers {
        let last = layers.end.saturating_sub(1);
        return Err(Error::Config(format!("layer {last}: the backend has {} layers", shape.num_layers)));
    }
    let plan = launch.plan;
    if plan.block_size() != shape.block_size {
        let (planned, size) = (plan.block_size(), shape.block_size);
        return Err(Error::Config(format!("a plan for blocks of {planned} tokens, pages of {size}")));
    }
    // A plan on the host is loaded where another device needs it; what is loaded is of one device.
    if let Plan::Device(plan) = plan
        && plan.device != backend.device()
    {
        let (expected, got) = (backend.device().to_string(), plan.device.to_string());
        return Err(Error::Device { name: "plan", expected, got });
    }
    bounds(backend, plan.bounds())?;
    let num_seals = plan.layout().count(PlanArray::Seals);
    if num_seals > 0 && !backend.seals() {
        return Err(Error::Config(format!("a plan that seals {num_seals} blocks, pages that never do")));
    }
    Ok(())
}

/// Is there memory for the pages and tiles?
pub(super) fn bounds(backend: &dyn Backend, bounds: Bounds) -> Result<()> {
    let capacity = backend.capacity();
    for (bound, num_blocks) in [(bounds.num_tiles, capacity.num_tiles), (bounds.num_pages, capacity.num_pages)] {
        if bound > num_blocks {
            return Err(Error::UnknownBlock { id: (bound - 1) as u32, num_blocks });
        }
    }
    Ok(())
}

/// Are these what is known of layers of this shape?
pub(super) fn models(backend: &dyn Backend, layers: &Range<usize>, models: &[Model]) -> Result<()> {
    let shape = backend.shape();
    if models.len() != layers.len() {
        return Err(Error::Config(format!("calibrations of {} layers for {}", models.len(), layers.len())));
    }
    for model in models.iter().flatten() {
        let (heads, channels) = (model.heads().len(), model.head_dim());
        if (heads, channels) != (shape.num_kv_heads, shape.head_dim) {
            return Err(Error::Config(format!(
                "a calibration of {heads} heads of {channels} channels for a layer of {} heads of {}",
                shape.num_kv_heads, shape.head_dim
            )));
        }
    }
    Ok(())
}

/// Are these the step's keys and values, as the pages take them?
pub(super) fn new_tokens(backend: &dyn Backend, plan: &Plan<'_>, new: Fresh<'_>) -> Result<()> {
    let shape = backend.shape();
    for (name, view) in [("k", new.k), ("v", new.v)] {
        view.check_device(name, backend.device())?;
        view.check(name, shape.num_kv_heads, plan.num_rows(), shape.head_dim)?;
    }
    Ok(())
}

/// Are they of the dtype of `raw` pages, which store them as they are?
pub(super) fn dtype(backend: &dyn Backend, new: Fresh<'_>) -> Result<()> {
    let shape = backend.shape();
    if shape.format == Format::Raw {
        new.k.check_dtype("k", shape.dtype)?;
        new.v.check_dtype("v", shape.dtype)?;
    }
    Ok(())
}

/// Are these queries of the step; how many heads have they?
pub(super) fn queries(backend: &dyn Backend, plan: &Plan<'_>, q: TensorView<'_>) -> Result<usize> {
    let shape = backend.shape();
    q.check_device("q", backend.device())?;
    q.check_queries(shape.num_kv_heads, plan.num_rows(), shape.head_dim)
}

/// Can attention be asked for this?
pub(super) fn attention(
    backend: &dyn Backend,
    plan: &Plan<'_>,
    q: TensorView<'_>,
    new: Option<Fresh<'_>>,
    options: AttendOptions<'_>,
    output: &Output<'_>,
) -> Result<()> {
    let num_q_heads = queries(backend, plan, q)?;
    output.out.check_device("out", backend.device())?;
    output.out.check("out", num_q_heads, plan.num_rows(), backend.shape().head_dim)?;
    if let Some(lse) = &output.lse {
        lse.check_device("lse", backend.device())?;
        lse.check_dtype("lse", Dtype::F32)?;
        lse.check("lse", num_q_heads, plan.num_rows(), 1)?;
    }
    if let Some(new) = new {
        new_tokens(backend, plan, new)?;
    }
    if let Some(scale) = options.scale.filter(|scale| !scale.is_finite()) {
        return Err(Error::setting("scale", "finite", &scale));
    }
    if let Some(cap) = options.softcap.filter(|cap| !cap.is_finite() || *cap <= 0.0) {
        return Err(Error::setting("softcap", "positive and finite", &cap));
    }
    check_window(options.window)?;
    if let Some(sinks) = options.sinks {
        if sinks.len() != num_q_heads {
            let expected = format!("[{num_q_heads}]");
            return Err(Error::Shape { name: "sinks", expected, got: vec![sinks.len()] });
        }
        if let Some(sink) = sinks.iter().find(|sink| sink.is_nan() || **sink == f32::INFINITY) {
            return Err(Error::setting("sinks", "logits below infinity", sink));
        }
    }
    Ok(())
}
