//! A backend behind its checks: every call is checked here, and the verbs come in their order.

use super::{
    AttendOptions, Backend, DevicePlan, Fresh, Launch, LayerHealth, Model, Output, Source, Stream, TensorView,
    TensorViewMut, check,
};
use crate::config::Shape;
use crate::error::{Error, Result};
use crate::paging::{PageId, Place};
use crate::plan::{Bounds, StepView};
use std::ops::Range;

/// A backend behind its checks.
#[derive(Debug)]
pub struct Executor {
    backend: Box<dyn Backend>,
}

impl Executor {
    /// An executor of a backend's verbs.
    #[must_use]
    pub fn new(backend: impl Backend + 'static) -> Self {
        Self { backend: Box::new(backend) }
    }

    /// The backend.
    #[must_use]
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// The shape of the records.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        self.backend.shape()
    }

    /// An executor over a copy of the records.
    ///
    /// # Errors
    /// Those of [`Backend::try_clone`].
    pub fn try_clone(&self) -> Result<Self> {
        Ok(Self { backend: self.backend.try_clone()? })
    }

    /// See [`Backend::grow`].
    ///
    /// # Errors
    /// Those of [`Backend::grow`].
    pub fn grow(&mut self, num_blocks: usize, num_pages: usize) -> Result<()> {
        self.backend.grow(num_blocks, num_pages)
    }

    /// See [`Backend::copy_pages`].
    ///
    /// # Errors
    /// [`Error::UnknownBlock`] for a page without memory.
    pub fn copy_pages(&mut self, copies: &[(PageId, PageId)], stream: Stream) -> Result<()> {
        if copies.is_empty() {
            return Ok(());
        }
        let num_pages = copies.iter().map(|copy| copy.0.max(copy.1).0 as usize + 1).max().unwrap_or(0);
        check::bounds(&*self.backend, Bounds { num_pages, num_tiles: 0 })?;
        self.backend.copy_pages(copies, stream)
    }

    /// See [`Backend::load`].
    ///
    /// # Errors
    /// Those of [`Backend::load`].
    pub fn load(&mut self, step: StepView<'_>, stream: Stream) -> Result<Option<DevicePlan>> {
        self.backend.load(step, stream)
    }

    /// See [`Backend::unload`].
    pub fn unload(&mut self, plan: DevicePlan) {
        self.backend.unload(plan);
    }

    /// What a step does in these layers before its own tokens are there: full pages of committed tokens are sealed, and
    /// the pages opened whose statistics are taken over committed tokens. `models[i]` is what is known of layer
    /// `layers.start + i`.
    ///
    /// # Errors
    /// [`Error::Config`] for a plan, layers or calibrations of another shape, [`Error::UnknownBlock`] for places without
    /// memory, [`Error::Device`]; nothing is written then.
    pub fn begin(&mut self, launch: Launch<'_>, layers: Range<usize>, models: &[Model]) -> Result<()> {
        check::launch(&*self.backend, launch, &layers)?;
        check::models(&*self.backend, &layers, models)?;
        self.backend.seal(launch, layers.clone(), Source::Stored, models)?;
        self.backend.open(launch, layers, Source::Stored, models)
    }

    /// Are keys and values of the dtype of `raw` pages, which store them as they are? Other pages take every dtype.
    ///
    /// # Errors
    /// [`Error::Dtype`].
    pub fn check_dtype(&self, new: Fresh<'_>) -> Result<()> {
        check::dtype(&*self.backend, new)
    }

    /// What [`append`](Self::append) would refuse. Changes nothing.
    ///
    /// # Errors
    /// Those of [`append`](Self::append).
    pub fn check_append(&self, launch: Launch<'_>, layer: usize, new: Fresh<'_>) -> Result<()> {
        self.check_layer(layer)?;
        check::launch(&*self.backend, launch, &(layer..layer + 1))?;
        check::new_tokens(&*self.backend, &launch.plan, new)?;
        self.backend.check_finite(launch, new)
    }

    /// Writes the step's keys and values into the pages of a layer in which the step has [begun](Self::begin), and seals
    /// the blocks that they fill.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Device`], [`Error::NonFinite`] for a NaN or infinity at a row that is a token, and those
    /// of [`begin`](Self::begin). Nothing is written then.
    pub fn append(&mut self, launch: Launch<'_>, layer: usize, new: Fresh<'_>, model: &Model) -> Result<()> {
        self.check_append(launch, layer, new)?;
        let (layers, models) = (layer..layer + 1, std::slice::from_ref(model));
        check::models(&*self.backend, &layers, models)?;
        self.backend.open(launch, layers.clone(), Source::New(new), models)?;
        self.backend.write(launch, layer, new)?;
        self.backend.seal(launch, layers, Source::New(new), models)
    }

    /// What [`attend`](Self::attend) would refuse. Changes nothing.
    ///
    /// # Errors
    /// Those of [`attend`](Self::attend).
    pub fn check_attend(
        &self,
        launch: Launch<'_>,
        layer: usize,
        q: TensorView<'_>,
        new: Option<Fresh<'_>>,
        options: AttendOptions<'_>,
        output: &Output<'_>,
    ) -> Result<()> {
        self.check_layer(layer)?;
        check::launch(&*self.backend, launch, &(layer..layer + 1))?;
        check::attention(&*self.backend, &launch.plan, q, new, options, output)
    }

    /// Attends in a layer to which the step's tokens were [appended](Self::append); see [`Backend::attend`].
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`], [`Error::Device`], [`Error::InvalidSetting`] for options that cannot be,
    /// [`Error::UnknownBlock`], [`Error::OutOfMemory`].
    pub fn attend(
        &self,
        launch: Launch<'_>,
        layer: usize,
        q: TensorView<'_>,
        new: Option<Fresh<'_>>,
        options: AttendOptions<'_>,
        output: &Output<'_>,
    ) -> Result<()> {
        self.check_attend(launch, layer, q, new, options, output)?;
        let new = new.filter(|_| self.backend.is_lossy());
        self.backend.attend(launch, layer, q, new, options, output)
    }

    /// What a step does in these layers once its tokens are committed: see [`Backend::refit`].
    ///
    /// # Errors
    /// Those of [`begin`](Self::begin).
    pub fn refit(&mut self, launch: Launch<'_>, layers: Range<usize>, models: &[Model]) -> Result<()> {
        check::launch(&*self.backend, launch, &layers)?;
        check::models(&*self.backend, &layers, models)?;
        self.backend.refit(launch, layers, models)
    }

    /// See [`Backend::dequantize`].
    ///
    /// # Errors
    /// [`Error::Config`] for a layer that does not exist, [`Error::Shape`] for tensors that differ or more tokens than
    /// `places` hold, [`Error::Device`], [`Error::UnknownBlock`].
    pub fn dequantize(
        &self,
        layer: usize,
        places: &[Place],
        start: usize,
        k: &TensorViewMut<'_>,
        v: &TensorViewMut<'_>,
        stream: Stream,
    ) -> Result<()> {
        let shape = self.backend.shape();
        self.check_layer(layer)?;
        let count = k.shape()[0].saturating_mul(k.shape()[2]);
        for (name, view) in [("k", k), ("v", v)] {
            view.check_device(name, self.backend.device())?;
            view.check(name, shape.num_kv_heads, count, shape.head_dim)?;
        }
        let num_tokens = places.len() * shape.block_size;
        let end = start.saturating_add(count);
        if end > num_tokens {
            let expected = format!("at most {num_tokens} tokens from {start} on");
            return Err(Error::Shape { name: "k", expected, got: k.shape().to_vec() });
        }
        let read = &places[start / shape.block_size..end.div_ceil(shape.block_size)];
        check::bounds(&*self.backend, Bounds::of(read))?;
        self.backend.dequantize(layer, places, start, k, v, stream)
    }

    /// Are these the step's queries; how many heads have they?
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Device`].
    pub fn check_queries(&self, launch: Launch<'_>, q: TensorView<'_>) -> Result<usize> {
        check::queries(&*self.backend, &launch.plan, q)
    }

    /// See [`Backend::read_records`].
    ///
    /// # Errors
    /// [`Error::Config`] for a layer that does not exist, [`Error::UnknownBlock`] for a place without memory.
    pub fn read_records(&self, layer: usize, place: Place) -> Result<Vec<u8>> {
        self.check_layer(layer)?;
        check::bounds(&*self.backend, Bounds::of(&[place]))?;
        self.backend.read_records(layer, place)
    }

    /// See [`Backend::write_records`].
    ///
    /// # Errors
    /// [`Error::Config`] for a layer that does not exist or another number of bytes, [`Error::UnknownBlock`] for a place
    /// without memory.
    pub fn write_records(&mut self, layer: usize, place: Place, records: &[u8]) -> Result<()> {
        let shape = self.backend.shape();
        self.check_layer(layer)?;
        check::bounds(&*self.backend, Bounds::of(&[place]))?;
        let layout = if place.as_page().is_some() { shape.page() } else { shape.at_rest() };
        let bytes = shape.num_kv_heads * layout.bytes();
        if records.len() != bytes {
            return Err(Error::Config(format!("{} bytes for records of {bytes}", records.len())));
        }
        self.backend.write_records(layer, place, records)
    }

    /// See [`Backend::health`].
    ///
    /// # Errors
    /// [`Error::Config`] for a layer that does not exist.
    pub fn health(&self, layer: usize) -> Result<LayerHealth> {
        self.check_layer(layer)?;
        self.backend.health(layer)
    }

    /// See [`Backend::forget_health`].
    ///
    /// # Errors
    /// Those of [`Backend::forget_health`].
    pub fn forget_health(&mut self) -> Result<()> {
        self.backend.forget_health()
    }

    fn check_layer(&self, layer: usize) -> Result<()> {
        let num_layers = self.backend.shape().num_layers;
        if layer < num_layers {
            return Ok(());
        }
        Err(Error::Config(format!("layer {layer}: the backend has {num_layers} layers")))
    }
}
