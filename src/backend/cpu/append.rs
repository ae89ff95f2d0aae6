//! Append: fresh keys and values into pages. First everything is checked, then what was full before is sealed, then
//! statistics are taken, then the tokens are written, then the blocks that a prefill fills are sealed.

use super::{Cpu, ORDER, PARALLEL_VALUES};
use crate::backend::{Fresh, TensorView};
use crate::error::{Error, Result};
use crate::format::{MAX_HEAD_DIM, RecordLayout};
use crate::plan::{PageOpen, SequencePlan, StepPlan};
use crate::quant::range::TokenSet;
use crate::quant::record::{self, int8, raw};
use crate::quant::{self, ChannelStatistics, HeadCalibration};
use rayon::prelude::*;

/// What was written of one block and head.
struct Written {
    rows: usize,
    /// The sum of [`int8::WrittenK::squares`].
    squares: f64,
    out_of_range: TokenSet,
}

impl Cpu {
    pub(super) fn append_step(
        &mut self,
        layer: usize,
        plan: &StepPlan,
        fresh: Fresh<'_>,
        heads: &[HeadCalibration],
    ) -> Result<()> {
        let (num_kv_heads, head_dim) = (self.num_kv_heads, self.head_dim);
        self.check_fresh(plan, fresh)?;
        let parallel = self.is_worth_threads(plan);
        if !plan.seals.is_empty() && self.tile.is_none() {
            return Err(Error::Config(format!("a plan that seals {} blocks, pages that never do", plan.seals.len())));
        }
        // Most steps neither seal nor open a page: they do not look at the heads.
        let used = !plan.seals.is_empty() || !plan.opens.is_empty();
        let fit = || heads.len() == num_kv_heads && heads.iter().all(|head| head.fits(head_dim));
        if used && !heads.is_empty() && !fit() {
            let (own, channels) = (heads.len(), heads[0].channels.mean.len());
            return Err(Error::Config(format!(
                "a calibration of {own} heads of {channels} channels for a layer of {num_kv_heads} heads of {head_dim}"
            )));
        }

        self.seal(layer, plan, None, heads);
        let statistics = self.open_statistics(layer, plan, fresh.k, heads, parallel);
        let has_page = |&(sequence, block): &(usize, usize)| plan.sequences[sequence].page(block).is_some();
        let blocks: Vec<(usize, usize)> = plan.written_blocks().filter(has_page).collect();
        let jobs = blocks.len() * num_kv_heads;
        let write = |job: usize| {
            let ((sequence, block), head) = (blocks[job / num_kv_heads], job % num_kv_heads);
            self.write_block(layer, plan, fresh, sequence, block, head, &statistics)
        };
        let written: Vec<Written> =
            if parallel { (0..jobs).into_par_iter().map(write).collect() } else { (0..jobs).map(write).collect() };
        if matches!(self.page, RecordLayout::Int8(_)) && !written.is_empty() {
            let rows: usize = written.iter().map(|job| job.rows).sum();
            let squares: f64 = written.iter().map(|job| job.squares).sum();
            let health = &mut self.layers[layer].health;
            health.wrote(rows / num_kv_heads, squares / (rows * head_dim) as f64);
            for heads in written.chunks_exact(num_kv_heads) {
                health.out_of_range(heads.iter().map(|job| job.out_of_range));
            }
        }
        self.seal(layer, plan, Some(fresh), heads);
        Ok(())
    }

    fn is_worth_threads(&self, plan: &StepPlan) -> bool {
        let num_tokens: usize = plan.sequences.iter().map(SequencePlan::num_new).sum();
        num_tokens * self.num_kv_heads * self.head_dim >= PARALLEL_VALUES
    }

    /// Are these the step's keys and values, all of them finite?
    pub(super) fn check_fresh(&self, plan: &StepPlan, fresh: Fresh<'_>) -> Result<()> {
        fresh.k.check("k", self.num_kv_heads, plan.num_rows, self.head_dim)?;
        fresh.v.check("v", self.num_kv_heads, plan.num_rows, self.head_dim)?;
        let parallel = self.is_worth_threads(plan);
        self.check_finite("k", plan, fresh.k, parallel)?;
        self.check_finite("v", plan, fresh.v, parallel)
    }

    fn check_finite(&self, name: &'static str, plan: &StepPlan, view: TensorView<'_>, parallel: bool) -> Result<()> {
        let check = |&row: &u32| -> Result<()> {
            let mut values = [0f32; MAX_HEAD_DIM];
            let values = &mut values[..self.head_dim];
            for head in 0..self.num_kv_heads {
                view.read_row(row as usize, head, values);
                if let Some(channel) = values.iter().position(|x| !x.is_finite()) {
                    return Err(Error::NonFinite { name, row: row as usize, head, channel, value: values[channel] });
                }
            }
            Ok(())
        };
        let mut rows = plan.sequences.iter().map(|sequence| &sequence.token_rows);
        if parallel {
            rows.try_for_each(|rows| rows.par_iter().try_for_each(check))
        } else {
            rows.try_for_each(|rows| rows.iter().try_for_each(check))
        }
    }

    /// Statistics of every page that the step opens, `[opens, num_kv_heads]`.
    fn open_statistics(
        &self,
        layer: usize,
        plan: &StepPlan,
        k: TensorView<'_>,
        heads: &[HeadCalibration],
        parallel: bool,
    ) -> Vec<ChannelStatistics> {
        if self.page.is_raw() {
            return Vec::new();
        }
        let statistics = |job: usize| {
            let (open, head) = (&plan.opens[job / self.num_kv_heads], job % self.num_kv_heads);
            self.statistics_of(layer, plan, k, open, (head, heads.get(head)))
        };
        let jobs = plan.opens.len() * self.num_kv_heads;
        if parallel { (0..jobs).into_par_iter().map(statistics).collect() } else { (0..jobs).map(statistics).collect() }
    }

    fn statistics_of(
        &self,
        layer: usize,
        plan: &StepPlan,
        k: TensorView<'_>,
        open: &PageOpen,
        (head, calibration): (usize, Option<&HeadCalibration>),
    ) -> ChannelStatistics {
        let &PageOpen { start, end, .. } = open;
        let sequence = &plan.sequences[open.sequence];
        let (head_dim, block_size) = (self.head_dim, self.block_size);
        let mut rows = vec![0f32; (end - start) * head_dim];
        let stored = end.min(sequence.context_len);
        let mut block_rows = vec![0f32; block_size * head_dim];
        for block in start / block_size..stored.div_ceil(block_size) {
            let (layout, record) = self.record(layer, sequence.block_table[block], sequence.page(block), head);
            record::read_k(layout, ORDER, record, &mut block_rows);
            let (first, last) = (start.max(block * block_size), stored.min((block + 1) * block_size));
            let from = &block_rows[first % block_size * head_dim..][..(last - first) * head_dim];
            rows[(first - start) * head_dim..][..from.len()].copy_from_slice(from);
        }
        for position in start.max(sequence.context_len)..end {
            let row = sequence.token_rows[position - sequence.context_len] as usize;
            k.read_row(row, head, &mut rows[(position - start) * head_dim..][..head_dim]);
        }
        ChannelStatistics::of_rows(&rows, head_dim, calibration.map(|head| &head.channels), open.block == 0)
    }

    /// Takes the statistics of first pages anew, and rounds their K by them.
    pub(super) fn refit_pages(&mut self, layer: usize, plan: &StepPlan, heads: &[HeadCalibration]) {
        let RecordLayout::Int8(page) = self.page else { return };
        for refit in &plan.refits {
            let Some(id) = plan.sequences[refit.sequence].page(0) else { continue };
            for head in 0..self.num_kv_heads {
                let model = heads.get(head).map(|head| &head.channels);
                // SAFETY: `&mut self` holds the arena exclusively, and one record at a time is asked for.
                let record = unsafe { self.layers[layer].pages.record_mut(id.0, head) };
                int8::refit_k(page, ORDER, record, refit.num_tokens, model);
            }
        }
    }

    /// Writes the tokens of one block and head.
    #[allow(clippy::too_many_arguments)] // the coordinates of one record in one step
    fn write_block(
        &self,
        layer: usize,
        plan: &StepPlan,
        fresh: Fresh<'_>,
        index: usize,
        block: usize,
        head: usize,
        statistics: &[ChannelStatistics],
    ) -> Written {
        let sequence = &plan.sequences[index];
        let page = sequence.pages[block];
        // SAFETY: `append_step` holds the arena exclusively, and the plan writes each page for one block
        // (`StepPlan::check_written_blocks`), so each record is asked for by one job.
        let record = unsafe { self.layers[layer].pages.record_mut(page.0, head) };
        let opened = plan.opens.binary_search_by_key(&(index, block), |open| (open.sequence, open.block));
        let frozen = match (self.page, opened) {
            (RecordLayout::Int8(page), Ok(open)) => {
                let statistics = statistics[open * self.num_kv_heads + head].clone();
                int8::write_statistics(page, ORDER, record, &statistics);
                Some(statistics)
            }
            (RecordLayout::Int8(page), Err(_)) => Some(int8::read_statistics(page, ORDER, record)),
            _ => None,
        };
        let (mut k, mut v) = ([0f32; MAX_HEAD_DIM], [0f32; MAX_HEAD_DIM]);
        let (k, v) = (&mut k[..self.head_dim], &mut v[..self.head_dim]);
        let start = sequence.context_len.max(block * plan.block_size);
        let end = sequence.seq_len().min((block + 1) * plan.block_size);
        let mut written = Written { rows: end - start, squares: 0.0, out_of_range: 0 };
        for position in start..end {
            let row = sequence.token_rows[position - sequence.context_len] as usize;
            fresh.k.read_row(row, head, k);
            fresh.v.read_row(row, head, v);
            let token = position % plan.block_size;
            match (self.page, &frozen) {
                (RecordLayout::Int8(page), Some(frozen)) => {
                    if self.rotates_v() {
                        quant::rotate_v(v);
                    }
                    let low = block == 0 && page.has_low_bytes(token, end);
                    let of_k = int8::write_k(page, ORDER, record, token, frozen, k, low);
                    let v_is_out = int8::write_v(page, ORDER, record, token, v);
                    written.squares += of_k.squares;
                    written.out_of_range |= TokenSet::from(of_k.out_of_range || v_is_out) << token;
                }
                (RecordLayout::Raw(page), _) => {
                    if let Some(codec) = self.codec.filter(|codec| codec.is_per_token()) {
                        codec.apply_token(k, v);
                    }
                    raw::write_token(page, ORDER, record, token, k, v);
                }
                _ => unreachable!("a page is raw, or INT8 with statistics"),
            }
        }
        written
    }
}
