//! The records that a plan must leave, in canonical order: its verbs carried out with `kvarn::quant`, one value at a time.

use crate::values::Values;
use kvarn::backend::Model;
use kvarn::config::Shape;
use kvarn::format::{Arrangement, PlanArray, RecordLayout};
use kvarn::paging::{PageId, Place};
use kvarn::plan::{PageOpen, StepView};
use kvarn::quant::record::{self, int8, raw, tile};
use kvarn::quant::{ChannelStatistics, HeadFeedback, ModelChannels, encode_tile, rotate, rotate_v};
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

const ORDER: Arrangement = Arrangement::Canonical;
/// What a record holds that nothing was written to.
const GARBAGE: u8 = 0x5a;

/// A place that a verb wrote to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    pub layer: usize,
    pub place: Place,
    /// Rows that hold tokens.
    pub used: usize,
    pub is_first: bool,
    /// Are the other rows zero, whatever the memory held?
    pub is_clear: bool,
}

pub struct Oracle {
    shape: Shape,
    records: HashMap<(usize, Place), Vec<u8>>,
}

impl Oracle {
    pub fn new(shape: Shape) -> Self {
        Self { shape, records: HashMap::new() }
    }

    pub fn layout(&self, place: Place) -> RecordLayout {
        if place.as_page().is_some() { self.shape.page() } else { self.shape.at_rest() }
    }

    /// The records of all heads at a place.
    pub fn records(&self, layer: usize, place: Place) -> &[u8] {
        &self.records[&(layer, place)]
    }

    fn record(&self, layer: usize, place: Place, head: usize) -> &[u8] {
        let bytes = self.layout(place).bytes();
        &self.records(layer, place)[head * bytes..][..bytes]
    }

    fn record_mut(&mut self, layer: usize, place: Place, head: usize) -> &mut [u8] {
        let (bytes, heads) = (self.layout(place).bytes(), self.shape.num_kv_heads);
        let records = self.records.entry((layer, place)).or_insert_with(|| vec![GARBAGE; heads * bytes]);
        &mut records[head * bytes..][..bytes]
    }

    /// K and V of a block as they are stored, `[block_size, head_dim]` each.
    fn stored(&self, layer: usize, place: Place, head: usize) -> [Vec<f32>; 2] {
        let (layout, record) = (self.layout(place), self.record(layer, place, head));
        let mut rows = [(); 2].map(|()| vec![f32::NAN; self.shape.block_size * self.shape.head_dim]);
        record::read_k(layout, ORDER, record, &mut rows[0]);
        record::read_v(layout, ORDER, record, &mut rows[1]);
        rows
    }

    /// K and V of tokens of a sequence as values, `[num_kv_heads, tokens, head_dim]` each.
    pub fn values(&self, layer: usize, places: &[Place], tokens: &Range<usize>) -> [Vec<f32>; 2] {
        let Shape { head_dim, block_size, num_kv_heads, .. } = self.shape;
        let [mut k, mut v] = [Vec::new(), Vec::new()];
        for head in 0..num_kv_heads {
            for block in tokens.start / block_size..tokens.end.div_ceil(block_size) {
                let [of_k, mut of_v] = self.stored(layer, places[block], head);
                if self.shape.tile().is_some() {
                    of_v.chunks_exact_mut(head_dim).for_each(rotate);
                }
                let first = block * block_size;
                let rows = tokens.start.max(first) - first..tokens.end.min(first + block_size) - first;
                let range = rows.start * head_dim..rows.end * head_dim;
                k.extend_from_slice(&of_k[range.clone()]);
                v.extend_from_slice(&of_v[range]);
            }
        }
        [k, v]
    }

    /// One row of a head of K or V of the step: that of the token at `position` of a sequence.
    fn new_row<'a>(
        &self,
        step: StepView<'_>,
        sequence: usize,
        position: usize,
        head: usize,
        of: &'a [f32],
    ) -> &'a [f32] {
        let mut rows = rows_of(step, sequence);
        let row = rows.find(|&row| step.positions()[row] == position as i32).expect("a token of the step");
        let (heads, head_dim) = (self.shape.num_kv_heads, self.shape.head_dim);
        &of[(row * heads + head) * head_dim..][..head_dim]
    }

    pub fn copy_pages(&mut self, copies: &[(PageId, PageId)]) -> Vec<Written> {
        let mut written = Vec::new();
        for layer in 0..self.shape.num_layers {
            for &(from, to) in copies {
                let (from, place) = (Place::page(from), Place::page(to));
                let records = self.records(layer, from).to_vec();
                self.records.insert((layer, place), records);
                let used = self.shape.block_size; // rows without a token are copied too
                written.push(Written { layer, place, used, is_first: false, is_clear: false });
            }
        }
        written
    }

    /// Seals from pages, or from the step's tokens in one layer.
    pub fn seal(
        &mut self,
        step: StepView<'_>,
        layers: Range<usize>,
        new: Option<&Values>,
        models: &[Model],
    ) -> Vec<Written> {
        let Shape { head_dim, block_size, num_kv_heads, .. } = self.shape;
        let mut written = Vec::new();
        let Some(RecordLayout::Tile(layout)) = self.shape.tile() else { return written };
        for (layer, model) in layers.zip(models) {
            for seal in step.seals().filter(|seal| seal.page.is_some() == new.is_none()) {
                let place = step.place(seal.sequence, seal.block);
                for head in 0..num_kv_heads {
                    let [k, v] = match (seal.page, new) {
                        (Some(page), None) => self.stored(layer, Place::page(page), head),
                        (None, Some(new)) => {
                            let positions = seal.block * block_size..(seal.block + 1) * block_size;
                            let gather = |of: &[f32]| -> Vec<f32> {
                                let row = |position| self.new_row(step, seal.sequence, position, head, of);
                                positions.clone().flat_map(row).copied().collect()
                            };
                            let [k, mut v] = [gather(&new.k), gather(&new.v)];
                            v.chunks_exact_mut(head_dim).for_each(rotate_v);
                            [k, v]
                        }
                        _ => unreachable!("filtered"),
                    };
                    let none = HeadFeedback::none(head_dim);
                    let feedback = model.as_ref().map_or(&none, |model| &model.heads()[head].feedback);
                    let first_row = (seal.block == 0).then_some(0);
                    let tile = encode_tile(&k, &v, head_dim, layout.bits, feedback, first_row);
                    tile::write(layout, ORDER, self.record_mut(layer, place, head), &tile);
                }
                written.push(Written { layer, place, used: block_size, is_first: false, is_clear: false });
            }
        }
        written
    }

    /// Opens pages with the statistics of stored tokens, or of tokens of the step in one layer as well.
    pub fn open(
        &mut self,
        step: StepView<'_>,
        layers: Range<usize>,
        new: Option<&Values>,
        models: &[Model],
    ) -> Vec<Written> {
        let mut written = Vec::new();
        let is_from = |open: &PageOpen| (open.end <= step.context_len(open.sequence)) == new.is_none();
        let opens: Vec<PageOpen> = step.opens().filter(is_from).collect();
        for (layer, model) in layers.zip(models) {
            let mut records = Vec::new(); // as they are once all statistics are known
            for open in &opens {
                let context_len = step.context_len(open.sequence);
                let num_stored = if open.block == 0 { context_len } else { 0 };
                let used = num_tokens_of(step, open.sequence, open.block);
                let place = step.place(open.sequence, open.block);
                for head in 0..self.shape.num_kv_heads {
                    let mut record = vec![0; self.layout(place).bytes()];
                    if num_stored > 0 {
                        record.copy_from_slice(self.record(layer, place, head));
                    }
                    if let RecordLayout::Int8(page) = self.shape.page() {
                        let mut stored = vec![0.0; num_stored * page.head_dim];
                        int8::read_first_k(page, ORDER, &record, &mut stored);
                        let channels = channels(model, head);
                        let statistics = self.statistics(step, layer, open, head, (&stored, new, channels));
                        int8::rewrite_first_k(page, ORDER, &mut record, &statistics, &stored, used);
                    }
                    records.push((place, head, record));
                }
                let is_clear = num_stored == 0 && used < self.shape.block_size;
                written.push(Written { layer, place, used: num_stored, is_first: open.block == 0, is_clear });
            }
            for (place, head, record) in records {
                self.record_mut(layer, place, head).copy_from_slice(&record);
            }
        }
        written
    }

    /// The statistics of a page; `first` is the K of its own tokens where it is opened again.
    fn statistics(
        &self,
        step: StepView<'_>,
        layer: usize,
        open: &PageOpen,
        head: usize,
        (first, new, model): (&[f32], Option<&Values>, Option<&ModelChannels>),
    ) -> ChannelStatistics {
        let Shape { head_dim, block_size, .. } = self.shape;
        let context_len = step.context_len(open.sequence);
        let mut rows = Vec::new();
        let mut block_rows = (usize::MAX, Vec::new());
        for position in open.start..open.end {
            let block = position / block_size;
            if position >= context_len {
                let new = new.expect("tokens of the step");
                rows.extend_from_slice(self.new_row(step, open.sequence, position, head, &new.k));
            } else if open.block == 0 {
                rows.extend_from_slice(&first[position * head_dim..][..head_dim]);
            } else {
                if block_rows.0 != block {
                    let [k, _] = self.stored(layer, step.place(open.sequence, block), head);
                    block_rows = (block, k);
                }
                rows.extend_from_slice(&block_rows.1[position % block_size * head_dim..][..head_dim]);
            }
        }
        ChannelStatistics::of_rows(&rows, head_dim, model, open.block == 0)
    }

    /// Writes the step's tokens of one layer.
    pub fn write(&mut self, step: StepView<'_>, layer: usize, new: &Values) -> Vec<Written> {
        let Shape { head_dim, block_size, num_kv_heads, .. } = self.shape;
        let rotates_v = self.shape.tile().is_some();
        let mut blocks = BTreeSet::new();
        for sequence in 0..step.num_sequences() {
            for row in rows_of(step, sequence).filter(|&row| step.slots()[row] >= 0) {
                let (position, slot) = (step.positions()[row] as usize, step.slots()[row] as usize);
                let (place, token, block) = (page(slot / block_size), slot % block_size, position / block_size);
                blocks.insert((sequence, block, slot / block_size));
                for head in 0..num_kv_heads {
                    let at = (row * num_kv_heads + head) * head_dim;
                    let (k, mut v) = (&new.k[at..at + head_dim], new.v[at..at + head_dim].to_vec());
                    let layout = self.shape.page();
                    let record = self.record_mut(layer, place, head);
                    match layout {
                        RecordLayout::Raw(page) => raw::write_token(page, ORDER, record, token, k, &v),
                        RecordLayout::Int8(page) => {
                            if rotates_v {
                                rotate_v(&mut v);
                            }
                            let low = block == 0 && page.has_low_bytes(token, num_tokens_of(step, sequence, 0));
                            let statistics = int8::read_statistics(page, ORDER, record);
                            int8::write_k(page, ORDER, record, token, &statistics, k, low);
                            int8::write_v(page, ORDER, record, token, &v);
                        }
                        RecordLayout::Tile(_) => unreachable!("the record of a page"),
                    }
                }
            }
        }
        let written = |(sequence, block, at): (usize, usize, usize)| {
            let used = num_tokens_of(step, sequence, block);
            let is_new = step.context_len(sequence) <= block * block_size;
            let is_clear = is_new && used < block_size;
            Written { layer, place: page(at), used, is_first: block == 0, is_clear }
        };
        blocks.into_iter().map(written).collect()
    }

    /// Refits first pages.
    pub fn refit(&mut self, step: StepView<'_>, layers: Range<usize>, models: &[Model]) -> Vec<Written> {
        let mut written = Vec::new();
        let RecordLayout::Int8(page) = self.shape.page() else { return written };
        for (layer, model) in layers.zip(models) {
            for refit in step.refits() {
                let place = step.place(refit.sequence, 0);
                for head in 0..self.shape.num_kv_heads {
                    let record = self.record_mut(layer, place, head);
                    int8::refit_k(page, ORDER, record, refit.num_tokens, channels(model, head));
                }
                written.push(Written { layer, place, used: refit.num_tokens, is_first: true, is_clear: false });
            }
        }
        written
    }
}

fn page(id: usize) -> Place {
    Place::page(PageId(id as u32))
}

fn channels(model: &Model, head: usize) -> Option<&ModelChannels> {
    model.as_ref().map(|model| &model.heads()[head].channels)
}

/// The rows of a sequence, padding included.
fn rows_of(step: StepView<'_>, sequence: usize) -> Range<usize> {
    let starts = step.array(PlanArray::QueryStartLoc);
    starts[sequence] as usize..starts[sequence + 1] as usize
}

/// Tokens of a block once the step is written.
fn num_tokens_of(step: StepView<'_>, sequence: usize, block: usize) -> usize {
    let seq_len = step.context_len(sequence) + step.num_new(sequence);
    (seq_len - block * step.block_size()).min(step.block_size())
}
