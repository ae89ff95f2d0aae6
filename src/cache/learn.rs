//! What a cache learns for its model's calibration, and takes from it.

use super::PagedKvCache;
use crate::backend::TensorView;
use crate::calibration::{Calibration, HeadShape, LayerCalibration, State};
use crate::config::CacheConfig;
use crate::error::{Error, Result};
use crate::plan::StepPlan;
use crate::quant::HeadCalibration;
use std::sync::Arc;

/// The calibration of a model, and which of its layers the cache's are.
#[derive(Debug, Clone)]
pub(super) struct ModelCalibration {
    shared: Arc<Calibration>,
    layers: Vec<usize>,
}

impl ModelCalibration {
    /// The least of the cache's layers.
    pub(super) fn state(&self) -> State {
        let known = self.shared.layers();
        let of_layer = |layer: &usize| {
            known.iter().find(|summary| summary.layer == *layer).map_or(State::No, |summary| summary.state)
        };
        self.layers.iter().map(of_layer).min().unwrap_or(State::No)
    }
}

/// What a backend is told of a layer's heads.
pub(super) fn heads(calibrated: Option<&LayerCalibration>) -> &[HeadCalibration] {
    calibrated.map_or(&[], |layer| &layer.heads)
}

impl PagedKvCache {
    /// Uses a model's calibration, and goes on with it until it is frozen; `layers[i]` is the model's number of layer `i`.
    ///
    /// # Errors
    /// [`Error::Config`] for another number of layers than the cache has, or the same layer twice;
    /// [`Error::Calibration`] when it knows one of them by another shape.
    pub fn set_calibration(&mut self, shared: Arc<Calibration>, layers: Vec<usize>) -> Result<()> {
        let &CacheConfig { num_layers, num_kv_heads, head_dim, .. } = &self.config;
        if layers.len() != num_layers {
            let given = layers.len();
            return Err(Error::Config(format!("{given} layer numbers for a cache of {num_layers} layers")));
        }
        for (index, &layer) in layers.iter().enumerate() {
            if layers[..index].contains(&layer) {
                return Err(Error::Config(format!("layer {layer} of the model is given for two layers of the cache")));
            }
            let of_another = |error: Error| Error::Calibration(error.to_string());
            shared.check(layer, num_kv_heads, head_dim).map_err(of_another)?;
        }
        self.calibration = Some(ModelCalibration { shared, layers });
        Ok(())
    }

    /// The rows of the step that the calibration still wants, after a look at the queries.
    pub(super) fn wanted_rows(&self, plan: &StepPlan, layer: usize, q: TensorView<'_>) -> Result<Vec<usize>> {
        let &CacheConfig { num_kv_heads, head_dim, .. } = &self.config;
        q.check_queries(num_kv_heads, plan.num_rows(), head_dim)?;
        let wanted = self.calibration.as_ref().map_or(0, |model| model.shared.wanted(model.layers[layer]));
        Ok(plan.token_rows().iter().map(|&row| row as usize).take(wanted).collect())
    }

    /// Shows the calibration these rows of the step.
    pub(super) fn observe(&self, rows: &[usize], layer: usize, k: TensorView<'_>, q: TensorView<'_>) -> Result<()> {
        let Some(ModelCalibration { shared, layers }) = &self.calibration else { return Ok(()) };
        let &CacheConfig { num_kv_heads, head_dim, .. } = &self.config;
        let num_q_heads = q.shape()[1];
        let gather = |view: TensorView<'_>, heads: usize| {
            let mut values = vec![0f32; rows.len() * heads * head_dim];
            for (out, &row) in values.chunks_exact_mut(heads * head_dim).zip(rows) {
                for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
                    view.read_row(row, head, out);
                }
            }
            values
        };
        let shape = HeadShape { num_q_heads, num_kv_heads, head_dim };
        shared.observe(layers[layer], shape, &gather(q, num_q_heads), &gather(k, num_kv_heads))
    }

    /// What a layer's pages and tiles are made with: factored now if it has to be.
    pub(super) fn calibrated_for(&self, plan: &StepPlan, layer: usize) -> Result<Option<Arc<LayerCalibration>>> {
        match &self.calibration {
            Some(model) if plan.seals().len() > 0 => model.shared.for_seal(model.layers[layer]),
            _ => Ok(self.calibrated(layer)),
        }
    }

    pub(super) fn calibrated(&self, layer: usize) -> Option<Arc<LayerCalibration>> {
        self.calibration.as_ref().and_then(|model| model.shared.layer(model.layers[layer]))
    }
}
