//! Raw pages that a scheme of others quantizes in place, to compare formats by. For evaluation: it takes no less memory.

use super::cpu::{Cpu, Level};
use super::{
    AttendOptions, Backend, Device, DevicePlan, Fresh, Launch, LayerHealth, Model, Output, Source, Stream, TensorView,
    TensorViewMut,
};
use crate::config::Shape;
use crate::error::{Error, Result};
use crate::format::{Arrangement, RawPage, RecordLayout};
use crate::paging::{PageId, Place};
use crate::plan::{Bounds, StepView};
use crate::quant::Codec;
use crate::quant::record::raw;
use std::ops::Range;

/// Tokens that the schemes which code blocks leave as they are, at the beginning of a sequence.
const UNCODED_TOKENS: usize = 128;

/// A backend of `raw` pages with a codec behind it: what is written, or sealed, is read back, coded and decoded.
#[derive(Debug)]
pub struct Coded {
    inner: Box<dyn Backend>,
    page: RawPage,
    codec: Codec,
}

impl Coded {
    /// An empty backend on the CPU.
    ///
    /// # Errors
    /// [`Error::Config`] for another format than `raw`, and those of [`Cpu::new`].
    pub fn new(shape: Shape, level: Level, codec: Codec) -> Result<Self> {
        let RecordLayout::Raw(page) = shape.page() else {
            return Err(Error::Config(format!("a codec works on raw pages, not on {}", shape.format.name())));
        };

        let tile = (!codec.is_per_token()).then_some(shape.page());
        Ok(Self { inner: Box::new(Cpu::with_tile(shape, tile, level)?), page, codec })
    }

    /// Codes and decodes rows of the records of a place, `[tokens, head_dim]` of one head at a time.
    fn code(&mut self, layer: usize, place: Place, tokens: Range<usize>) -> Result<()> {
        let (page, order) = (self.page, self.inner.arrangement());
        let mut records = self.inner.read_records(layer, place)?;
        for record in records.chunks_exact_mut(page.bytes()) {
            let mut k = vec![0f32; page.block_size * page.head_dim];
            let mut v = k.clone();
            raw::read_k(page, order, record, &mut k);
            raw::read_v(page, order, record, &mut v);
            let values = tokens.start * page.head_dim..tokens.end * page.head_dim;
            if self.codec.is_per_token() {
                let rows = k[values.clone()].chunks_exact_mut(page.head_dim);
                rows.zip(v[values].chunks_exact_mut(page.head_dim)).for_each(|(k, v)| self.codec.apply_token(k, v));
            } else {
                self.codec.apply_block(&mut k[values.clone()], &mut v[values], page.head_dim);
            }
            for token in tokens.clone() {
                let row = token * page.head_dim..(token + 1) * page.head_dim;
                raw::write_token(page, order, record, token, &k[row.clone()], &v[row]);
            }
        }
        self.inner.write_records(layer, place, &records)
    }
}

impl Backend for Coded {
    fn is_lossy(&self) -> bool {
        true
    }

    fn write(&mut self, launch: Launch<'_>, layer: usize, new: Fresh<'_>) -> Result<()> {
        self.inner.write(launch, layer, new)?;
        if !self.codec.is_per_token() {
            return Ok(());
        }
        let step = launch.step();
        for (index, block) in step.written_blocks() {
            let (sequence, block_size) = (step.sequence(index), self.page.block_size);
            let start = sequence.context_len.max(block * block_size) - block * block_size;
            let end = sequence.seq_len().min((block + 1) * block_size) - block * block_size;
            self.code(layer, sequence.places[block], start..end)?;
        }
        Ok(())
    }

    fn seal(&mut self, launch: Launch<'_>, layers: Range<usize>, from: Source<'_>, models: &[Model]) -> Result<()> {
        self.inner.seal(launch, layers.clone(), from, models)?;
        let step = launch.step();
        let from_rows = matches!(from, Source::New(_));
        for seal in step.seals().filter(|seal| seal.page.is_none() == from_rows) {
            if seal.block * self.page.block_size < UNCODED_TOKENS {
                continue;
            }
            for layer in layers.clone() {
                self.code(layer, step.place(seal.sequence, seal.block), 0..self.page.block_size)?;
            }
        }
        Ok(())
    }

    fn try_clone(&self) -> Result<Box<dyn Backend>> {
        Ok(Box::new(Self { inner: self.inner.try_clone()?, ..*self }))
    }

    // What the codec does not change.

    fn shape(&self) -> &Shape {
        self.inner.shape()
    }

    fn device(&self) -> Device {
        self.inner.device()
    }

    fn arrangement(&self) -> Arrangement {
        self.inner.arrangement()
    }

    fn seals(&self) -> bool {
        self.inner.seals()
    }

    fn capacity(&self) -> Bounds {
        self.inner.capacity()
    }

    fn grow(&mut self, num_blocks: usize, num_pages: usize) -> Result<()> {
        self.inner.grow(num_blocks, num_pages)
    }

    fn copy_pages(&mut self, copies: &[(PageId, PageId)], stream: Stream) -> Result<()> {
        self.inner.copy_pages(copies, stream)
    }

    fn read_records(&self, layer: usize, place: Place) -> Result<Vec<u8>> {
        self.inner.read_records(layer, place)
    }

    fn write_records(&mut self, layer: usize, place: Place, records: &[u8]) -> Result<()> {
        self.inner.write_records(layer, place, records)
    }

    fn allocated_bytes(&self) -> usize {
        self.inner.allocated_bytes()
    }

    fn load(&mut self, step: StepView<'_>, stream: Stream) -> Result<Option<DevicePlan>> {
        self.inner.load(step, stream)
    }

    fn unload(&mut self, plan: DevicePlan) {
        self.inner.unload(plan);
    }

    fn open(&mut self, launch: Launch<'_>, layers: Range<usize>, from: Source<'_>, models: &[Model]) -> Result<()> {
        self.inner.open(launch, layers, from, models)
    }

    fn refit(&mut self, launch: Launch<'_>, layers: Range<usize>, models: &[Model]) -> Result<()> {
        self.inner.refit(launch, layers, models)
    }

    fn attend(
        &self,
        launch: Launch<'_>,
        layer: usize,
        q: TensorView<'_>,
        new: Option<Fresh<'_>>,
        options: AttendOptions<'_>,
        output: &Output<'_>,
    ) -> Result<()> {
        self.inner.attend(launch, layer, q, new, options, output)
    }

    fn dequantize(
        &self,
        layer: usize,
        places: &[Place],
        start: usize,
        k: &TensorViewMut<'_>,
        v: &TensorViewMut<'_>,
        stream: Stream,
    ) -> Result<()> {
        self.inner.dequantize(layer, places, start, k, v, stream)
    }

    fn check_finite(&self, launch: Launch<'_>, new: Fresh<'_>) -> Result<()> {
        self.inner.check_finite(launch, new)
    }

    fn read_rows(&self, view: TensorView<'_>, rows: &[usize], stream: Stream) -> Result<Vec<f32>> {
        self.inner.read_rows(view, rows, stream)
    }

    fn health(&self, layer: usize) -> Result<LayerHealth> {
        self.inner.health(layer)
    }

    fn forget_health(&mut self) -> Result<()> {
        self.inner.forget_health()
    }
}
