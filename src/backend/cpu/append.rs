//! Append: fresh keys and values into pages. First everything is checked, then what was full before is sealed, then
//! statistics are taken, then the tokens are written, then the blocks that a prefill fills are sealed.

use super::{Cpu, ORDER, PARALLEL_VALUES};
use crate::backend::{Fresh, TensorView};
use crate::error::{Error, Result};
use crate::format::{MAX_HEAD_DIM, RecordLayout};
use crate::paging::PageId;
use crate::plan::{PageOpen, PageRefit, StepView};
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

/// The pages that a step opens.
struct Opened {
    pages: Vec<PageOpen>,
    /// `[pages, num_kv_heads]`.
    statistics: Vec<ChannelStatistics>,
}

impl Cpu {
    pub(super) fn append_step(
        &mut self,
        layer: usize,
        step: StepView<'_>,
        fresh: Fresh<'_>,
        heads: &[HeadCalibration],
    ) -> Result<()> {
        let (num_kv_heads, head_dim) = (self.num_kv_heads, self.head_dim);
        self.check_fresh(step, fresh)?;
        let parallel = self.is_worth_threads(step);
        let num_seals = step.seals().len();
        if num_seals > 0 && self.tile.is_none() {
            return Err(Error::Config(format!("a plan that seals {num_seals} blocks, pages that never do")));
        }
        // Most steps neither seal nor open a page: they do not look at the heads.
        let used = num_seals > 0 || step.opens().len() > 0;
        let fit = || heads.len() == num_kv_heads && heads.iter().all(|head| head.fits(head_dim));
        if used && !heads.is_empty() && !fit() {
            let (own, channels) = (heads.len(), heads[0].channels.mean.len());
            return Err(Error::Config(format!(
                "a calibration of {own} heads of {channels} channels for a layer of {num_kv_heads} heads of {head_dim}"
            )));
        }

        self.seal(layer, step, None, heads);
        let opened = self.open_statistics(layer, step, fresh.k, heads, parallel);
        let page = |(sequence, block)| step.place(sequence, block).as_page().map(|page| (sequence, block, page));
        let blocks: Vec<(usize, usize, PageId)> = step.written_blocks().filter_map(page).collect();
        let jobs = blocks.len() * num_kv_heads;
        let write =
            |job: usize| self.write_block(layer, step, fresh, blocks[job / num_kv_heads], job % num_kv_heads, &opened);
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
        self.seal(layer, step, Some(fresh), heads);
        Ok(())
    }

    fn is_worth_threads(&self, step: StepView<'_>) -> bool {
        step.num_tokens() * self.num_kv_heads * self.head_dim >= PARALLEL_VALUES
    }

    /// Are these the step's keys and values, all of them finite?
    pub(super) fn check_fresh(&self, step: StepView<'_>, fresh: Fresh<'_>) -> Result<()> {
        fresh.k.check("k", self.num_kv_heads, step.num_rows(), self.head_dim)?;
        fresh.v.check("v", self.num_kv_heads, step.num_rows(), self.head_dim)?;
        let parallel = self.is_worth_threads(step);
        self.check_finite("k", step, fresh.k, parallel)?;
        self.check_finite("v", step, fresh.v, parallel)
    }

    fn check_finite(&self, name: &'static str, step: StepView<'_>, view: TensorView<'_>, parallel: bool) -> Result<()> {
        let check = |&row: &i32| -> Result<()> {
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
        let rows = step.token_rows();
        if parallel { rows.par_iter().try_for_each(check) } else { rows.iter().try_for_each(check) }
    }

    /// The pages that the step opens, with their statistics; none where pages are `raw`.
    fn open_statistics(
        &self,
        layer: usize,
        step: StepView<'_>,
        k: TensorView<'_>,
        heads: &[HeadCalibration],
        parallel: bool,
    ) -> Opened {
        if self.page.is_raw() {
            return Opened { pages: Vec::new(), statistics: Vec::new() };
        }
        let pages: Vec<PageOpen> = step.opens().collect();
        let statistics = |job: usize| {
            let (open, head) = (&pages[job / self.num_kv_heads], job % self.num_kv_heads);
            self.statistics_of(layer, step, k, open, (head, heads.get(head)))
        };
        let jobs = 0..pages.len() * self.num_kv_heads;
        let statistics =
            if parallel { jobs.into_par_iter().map(statistics).collect() } else { jobs.map(statistics).collect() };
        Opened { pages, statistics }
    }

    fn statistics_of(
        &self,
        layer: usize,
        step: StepView<'_>,
        k: TensorView<'_>,
        open: &PageOpen,
        (head, calibration): (usize, Option<&HeadCalibration>),
    ) -> ChannelStatistics {
        let &PageOpen { start, end, .. } = open;
        let sequence = step.sequence(open.sequence);
        let (head_dim, block_size) = (self.head_dim, self.block_size);
        let mut rows = vec![0f32; (end - start) * head_dim];
        let stored = end.min(sequence.context_len);
        let mut block_rows = vec![0f32; block_size * head_dim];
        for block in start / block_size..stored.div_ceil(block_size) {
            let (layout, record) = self.record(layer, sequence.places[block], head);
            match layout {
                RecordLayout::Int8(page) if open.block == 0 => {
                    int8::read_first_k(page, ORDER, record, &mut block_rows[..stored * head_dim]);
                }
                _ => record::read_k(layout, ORDER, record, &mut block_rows),
            }
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
    pub(super) fn refit_pages(&mut self, layer: usize, step: StepView<'_>, heads: &[HeadCalibration]) {
        let RecordLayout::Int8(page) = self.page else { return };
        let page_of = |refit: PageRefit| step.place(refit.sequence, 0).as_page().map(|id| (id, refit.num_tokens));
        let refits: Vec<(PageId, usize)> = step.refits().filter_map(page_of).collect();
        let refit = |job: usize| {
            let ((id, num_tokens), head) = (refits[job / self.num_kv_heads], job % self.num_kv_heads);
            let model = heads.get(head).map(|head| &head.channels);
            // SAFETY: `&mut self` holds the arena exclusively; a page is written for one sequence, so each record is
            // asked for by one job.
            let record = unsafe { self.layers[layer].pages.record_mut(id.0, head) };
            int8::refit_k(page, ORDER, record, num_tokens, model);
        };
        let jobs = 0..refits.len() * self.num_kv_heads;
        let num_tokens: usize = refits.iter().map(|refit| refit.1).sum();
        if num_tokens * self.num_kv_heads * self.head_dim >= PARALLEL_VALUES {
            jobs.into_par_iter().for_each(refit);
        } else {
            jobs.for_each(refit);
        }
    }

    /// Writes the tokens of one block and head.
    fn write_block(
        &self,
        layer: usize,
        step: StepView<'_>,
        fresh: Fresh<'_>,
        (index, block, page): (usize, usize, PageId),
        head: usize,
        opened: &Opened,
    ) -> Written {
        let sequence = step.sequence(index);
        // SAFETY: `append_step` holds the arena exclusively, and the plan writes each page for one block
        // (`plan::check`), so each record is asked for by one job.
        let record = unsafe { self.layers[layer].pages.record_mut(page.0, head) };
        let open = opened.pages.binary_search_by_key(&(index, block), |open| (open.sequence, open.block));
        let frozen = match (self.page, open) {
            (RecordLayout::Int8(page), Ok(open)) => {
                let statistics = opened.statistics[open * self.num_kv_heads + head].clone();
                let num_stored = sequence.context_len.saturating_sub(block * self.block_size);
                let mut stored = vec![0f32; num_stored * self.head_dim];
                int8::read_first_k(page, ORDER, record, &mut stored);
                let num_tokens = sequence.seq_len().min(self.block_size);
                int8::rewrite_first_k(page, ORDER, record, &statistics, &stored, num_tokens);
                Some(statistics)
            }
            (RecordLayout::Int8(page), Err(_)) => Some(int8::read_statistics(page, ORDER, record)),
            _ => None,
        };
        let (mut k, mut v) = ([0f32; MAX_HEAD_DIM], [0f32; MAX_HEAD_DIM]);
        let (k, v) = (&mut k[..self.head_dim], &mut v[..self.head_dim]);
        let start = sequence.context_len.max(block * self.block_size);
        let end = sequence.seq_len().min((block + 1) * self.block_size);
        let mut written = Written { rows: end - start, squares: 0.0, out_of_range: 0 };
        for position in start..end {
            let row = sequence.token_rows[position - sequence.context_len] as usize;
            fresh.k.read_row(row, head, k);
            fresh.v.read_row(row, head, v);
            let token = step.slots()[row] as usize % self.block_size;
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
