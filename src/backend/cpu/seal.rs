//! Seal: full blocks into tiles, from their pages or from the rows of the step.

use super::{Cpu, ORDER};
use crate::backend::{Model, Source};
use crate::format::{RawPage, RecordLayout};
use crate::paging::{Place, PlaceKind};
use crate::plan::{Seal, StepView};
use crate::quant::range::{TokenSet, out_of_range_tokens};
use crate::quant::record::{self, raw, tile};
use crate::quant::{self, HeadFeedback};
use std::ops::Range;

/// One tile: K and V of its rows, `[block_size, head_dim]` each, and what they become.
struct Job<'a> {
    layer: usize,
    seal: &'a Seal,
    head: usize,
    feedback: &'a HeadFeedback,
}

impl Cpu {
    /// Seals the plan's blocks whose tokens are in `from`.
    pub(super) fn seal_blocks(&mut self, layers: Range<usize>, step: StepView<'_>, from: Source<'_>, models: &[Model]) {
        let from_rows = matches!(from, Source::New(_));
        let seals: Vec<Seal> = step.seals().filter(|seal| seal.page.is_none() == from_rows).collect();
        if seals.is_empty() {
            return;
        }
        let heads = self.shape.num_kv_heads;
        let none = HeadFeedback::none(self.shape.head_dim);
        let job = |index: usize| {
            let (layer, seal, head) = (index / heads / seals.len(), &seals[index / heads % seals.len()], index % heads);
            let feedback = models[layer].as_ref().map_or(&none, |model| &model.heads()[head].feedback);
            Job { layer: layers.start + layer, seal, head, feedback }
        };
        let seal = |index: usize| self.seal_block(&job(index), step, from);
        let sealed: Vec<(usize, TokenSet)> = self.threads.map(layers.len() * seals.len() * heads, seal);
        let num_codes = seals.len() * heads * self.shape.block_size * self.shape.head_dim;
        for (layer, sealed) in layers.zip(sealed.chunks_exact(seals.len() * heads)) {
            let health = &mut self.layers[layer].health;
            health.sealed(num_codes, sealed.iter().map(|job| job.0).sum());
            for heads in sealed.chunks_exact(heads) {
                health.out_of_range(heads.iter().map(|job| job.1));
            }
        }
    }

    /// Writes one tile; gives how many of its K codes were clamped, and which of its tokens are out of range.
    fn seal_block(&self, job: &Job<'_>, step: StepView<'_>, from: Source<'_>) -> (usize, TokenSet) {
        let &Job { layer, seal, head, feedback } = job;
        let (k, v) = self.rows_of(job, step, from);
        let PlaceKind::Tile(block) = step.place(seal.sequence, seal.block).kind() else {
            unreachable!("the place of a block that a step seals is its tile")
        };
        // SAFETY: `&mut self` of `seal_blocks` holds the memory exclusively, and a plan seals a block once, so each record
        // is asked for by one job.
        let record = unsafe { self.layers[layer].tiles.record_mut(block.0, head) };
        match self.tile {
            Some(RecordLayout::Tile(layout)) => {
                let encode = self.kernels.encode_tile;
                // SAFETY: the kernels' level is available.
                let sealed = unsafe { encode(&k, &v, layout.head_dim, layout.bits, feedback, seal.first_row) };
                tile::write(layout, ORDER, record, &sealed);
                (sealed.num_clamped, out_of_range_tokens(&sealed, &k, &v))
            }
            Some(RecordLayout::Raw(page)) => {
                write_raw_block(page, record, &k, &v);
                (0, 0)
            }
            _ => unreachable!("a plan that seals is made for blocks that do"),
        }
    }

    /// K and V of a block of the seal, V rotated where it is stored so.
    fn rows_of(&self, job: &Job<'_>, step: StepView<'_>, from: Source<'_>) -> (Vec<f32>, Vec<f32>) {
        let (head_dim, block_size) = (self.shape.head_dim, self.shape.block_size);
        let &Job { layer, seal, head, .. } = job;
        let mut k = vec![0f32; block_size * head_dim];
        let mut v = k.clone();
        match (seal.page, from) {
            (Some(page), _) => {
                let (layout, record) = self.record(layer, Place::page(page), head);
                record::read_k(layout, ORDER, record, &mut k);
                record::read_v(layout, ORDER, record, &mut v);
            }
            (None, Source::New(new)) => {
                let sequence = step.sequence(seal.sequence);
                let first = seal.block * block_size - sequence.context_len;
                let rows = &sequence.token_rows[first..first + block_size];
                let out = k.chunks_exact_mut(head_dim).zip(v.chunks_exact_mut(head_dim));
                for (&row, (k, v)) in rows.iter().zip(out) {
                    new.k.read_row(row as usize, head, k);
                    new.v.read_row(row as usize, head, v);
                    if self.rotates_v() {
                        quant::rotate_v(v);
                    }
                }
            }
            (None, Source::Stored) => unreachable!("the caller took the seals of pages"),
        }
        (k, v)
    }
}

fn write_raw_block(page: RawPage, record: &mut [u8], k: &[f32], v: &[f32]) {
    let rows = k.chunks_exact(page.head_dim).zip(v.chunks_exact(page.head_dim));
    rows.enumerate().for_each(|(token, (k, v))| raw::write_token(page, ORDER, record, token, k, v));
}
