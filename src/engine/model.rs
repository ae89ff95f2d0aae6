//! What a group of layers learns for its model's calibration, and takes from it.

use crate::backend::Model;
use crate::calibration::{Calibration, HeadShape, State};
use crate::config::Shape;
use crate::error::{Error, Result};
use std::sync::Arc;

/// The calibration of a model, and which of its layers a group's are.
#[derive(Debug, Clone)]
pub struct ModelCalibration {
    shared: Arc<Calibration>,
    layers: Vec<usize>,
}

impl ModelCalibration {
    /// A calibration for layers of this shape; `layers[i]` is the model's number of layer `i`.
    ///
    /// # Errors
    /// [`Error::Config`] for another number of layers than the shape has, or the same layer twice;
    /// [`Error::Calibration`] when it knows one of them by another shape.
    pub fn new(shape: &Shape, shared: Arc<Calibration>, layers: Vec<usize>) -> Result<Self> {
        if layers.len() != shape.num_layers {
            let (given, num_layers) = (layers.len(), shape.num_layers);
            return Err(Error::Config(format!("{given} layer numbers for a cache of {num_layers} layers")));
        }
        for (index, &layer) in layers.iter().enumerate() {
            if layers[..index].contains(&layer) {
                return Err(Error::Config(format!("layer {layer} of the model is given for two layers of the cache")));
            }
            let of_another = |error: Error| Error::Calibration(error.to_string());
            shared.check(layer, shape.num_kv_heads, shape.head_dim).map_err(of_another)?;
        }
        Ok(Self { shared, layers })
    }

    /// The least of the layers.
    #[must_use]
    pub fn state(&self) -> State {
        let known = self.shared.layers();
        let of_layer = |layer: &usize| {
            known.iter().find(|summary| summary.layer == *layer).map_or(State::No, |summary| summary.state)
        };
        self.layers.iter().map(of_layer).min().unwrap_or(State::No)
    }

    /// Tokens that a layer still learns from.
    pub(super) fn wanted(&self, layer: usize) -> usize {
        self.shared.wanted(self.layers[layer])
    }

    /// Does one of the layers still learn?
    pub(super) fn is_learning(&self) -> bool {
        self.layers.iter().any(|&layer| self.shared.wanted(layer) > 0)
    }

    /// Learns from rows of queries and keys, `[rows, heads, head_dim]` each.
    pub(super) fn observe(&self, layer: usize, shape: HeadShape, q: &[f32], k: &[f32]) -> Result<()> {
        self.shared.observe(self.layers[layer], shape, q, k)
    }

    /// What tiles are made with: factored now if it has to be.
    pub(super) fn for_seal(&self, layer: usize) -> Result<Model> {
        self.shared.for_seal(self.layers[layer])
    }

    /// What is known so far.
    pub(super) fn model(&self, layer: usize) -> Model {
        self.shared.layer(self.layers[layer])
    }
}
