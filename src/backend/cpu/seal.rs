//! Seal: full blocks into tiles, from their pages or from the rows of the step.

use super::{Cpu, ORDER};
use crate::backend::Fresh;
use crate::format::{RawPage, RecordLayout};
use crate::paging::{Place, PlaceKind};
use crate::plan::{Seal, StepView};
use crate::quant::range::{TokenSet, out_of_range_tokens};
use crate::quant::record::{self, raw, tile};
use crate::quant::{self, HeadCalibration, HeadFeedback};
use rayon::prelude::*;

impl Cpu {
    /// Seals those of the plan's blocks that come from pages, or those that come from the step's own rows.
    pub(super) fn seal(
        &mut self,
        layer: usize,
        step: StepView<'_>,
        fresh: Option<Fresh<'_>>,
        heads: &[HeadCalibration],
    ) {
        let of_step = fresh.is_some();
        let seals: Vec<Seal> = step.seals().filter(|seal| seal.page.is_none() == of_step).collect();
        if seals.is_empty() {
            return;
        }
        let jobs = seals.len() * self.num_kv_heads;
        let none = heads.is_empty().then(|| HeadFeedback::none(self.head_dim));
        let sealed: Vec<(usize, TokenSet)> = (0..jobs)
            .into_par_iter()
            .map(|job| {
                let (seal, head) = (&seals[job / self.num_kv_heads], job % self.num_kv_heads);
                let (k, v) = self.rows_of(layer, step, fresh, seal, head);
                let feedback = none.as_ref().unwrap_or_else(|| &heads[head].feedback);
                self.write_tile(layer, step, seal, head, feedback, k, v)
            })
            .collect();
        let num_codes = jobs * self.block_size * self.head_dim;
        let health = &mut self.layers[layer].health;
        health.sealed(num_codes, sealed.iter().map(|job| job.0).sum());
        for heads in sealed.chunks_exact(self.num_kv_heads) {
            health.out_of_range(heads.iter().map(|job| job.1));
        }
    }

    /// K and V of a block of the seal, `[block_size, head_dim]` each, V rotated where it is kept so.
    fn rows_of(
        &self,
        layer: usize,
        step: StepView<'_>,
        fresh: Option<Fresh<'_>>,
        seal: &Seal,
        head: usize,
    ) -> (Vec<f32>, Vec<f32>) {
        let mut k = vec![0f32; self.block_size * self.head_dim];
        let mut v = k.clone();
        match (seal.page, fresh) {
            (Some(page), _) => {
                let (layout, record) = self.record(layer, Place::page(page), head);
                record::read_k(layout, ORDER, record, &mut k);
                record::read_v(layout, ORDER, record, &mut v);
            }
            (None, Some(fresh)) => {
                let sequence = step.sequence(seal.sequence);
                let first = seal.block * self.block_size - sequence.context_len;
                let rows = &sequence.token_rows[first..first + self.block_size];
                let out = k.chunks_exact_mut(self.head_dim).zip(v.chunks_exact_mut(self.head_dim));
                for (&row, (k, v)) in rows.iter().zip(out) {
                    fresh.k.read_row(row as usize, head, k);
                    fresh.v.read_row(row as usize, head, v);
                    if self.rotates_v() {
                        quant::rotate_v(v);
                    }
                }
            }
            (None, None) => unreachable!("the caller took the seals of the step's rows"),
        }
        (k, v)
    }

    /// Writes one tile; gives how many of its K codes were clamped, and which of its tokens are out of range.
    #[allow(clippy::too_many_arguments)] // the coordinates of one record, and what goes into it
    fn write_tile(
        &self,
        layer: usize,
        step: StepView<'_>,
        seal: &Seal,
        head: usize,
        feedback: &HeadFeedback,
        mut k: Vec<f32>,
        mut v: Vec<f32>,
    ) -> (usize, TokenSet) {
        let PlaceKind::Tile(block) = step.place(seal.sequence, seal.block).kind() else {
            unreachable!("the place of a block that a step seals is its tile")
        };
        // SAFETY: `append_step` holds the arena exclusively, and a plan seals a block once, so each record is asked for
        // by one job.
        let record = unsafe { self.layers[layer].tiles.record_mut(block.0, head) };
        match self.tile {
            Some(RecordLayout::Tile(layout)) => {
                let encode = self.kernels.encode_tile;
                // SAFETY: the kernels' level is available.
                let sealed = unsafe { encode(&k, &v, self.head_dim, layout.bits, feedback, seal.first_row) };
                tile::write(layout, ORDER, record, &sealed);
                (sealed.num_clamped, out_of_range_tokens(&sealed, &k, &v))
            }
            Some(RecordLayout::Raw(page)) => {
                // The schemes that code blocks keep the first 128 tokens as they are.
                if let Some(codec) = self.codec.filter(|_| seal.block * self.block_size >= 128) {
                    codec.apply_block(&mut k, &mut v, self.head_dim);
                }
                write_raw_block(page, record, &k, &v);
                (0, 0)
            }
            _ => unreachable!("a plan that seals is made for blocks that do"),
        }
    }
}

fn write_raw_block(page: RawPage, record: &mut [u8], k: &[f32], v: &[f32]) {
    let rows = k.chunks_exact(page.head_dim).zip(v.chunks_exact(page.head_dim));
    rows.enumerate().for_each(|(token, (k, v))| raw::write_token(page, ORDER, record, token, k, v));
}
