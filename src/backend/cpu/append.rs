//! Append: fresh keys and values into pages. First everything is checked, then statistics are taken, then it is written.

use super::page::{self, PageLayout};
use super::{Cpu, PARALLEL_VALUES};
use crate::backend::{Fresh, TensorView};
use crate::error::{Error, Result};
use crate::format::MAX_HEAD_DIM;
use crate::plan::{PageOpen, SequencePlan, Statistics, StepPlan};
use crate::quant::ChannelStatistics;
use rayon::prelude::*;

impl Cpu {
    pub(super) fn append_step(&mut self, layer: usize, plan: &StepPlan, fresh: Fresh<'_>) -> Result<()> {
        let (num_kv_heads, head_dim) = (self.num_kv_heads, self.head_dim);
        fresh.k.check("k", num_kv_heads, plan.num_rows, head_dim)?;
        fresh.v.check("v", num_kv_heads, plan.num_rows, head_dim)?;
        if let PageLayout::Raw(page) = self.layout {
            fresh.k.check_dtype("k", page.dtype)?;
            fresh.v.check_dtype("v", page.dtype)?;
        }
        let num_tokens: usize = plan.sequences.iter().map(SequencePlan::num_new).sum();
        let parallel = num_tokens * num_kv_heads * head_dim >= PARALLEL_VALUES;
        self.check_finite("k", plan, fresh.k, parallel)?;
        self.check_finite("v", plan, fresh.v, parallel)?;

        let statistics = self.open_statistics(layer, plan, fresh.k, parallel);
        let blocks: Vec<(usize, usize)> = plan.written_blocks().collect();
        let jobs = blocks.len() * num_kv_heads;
        let write = |job: usize| {
            let ((sequence, block), head) = (blocks[job / num_kv_heads], job % num_kv_heads);
            self.write_block(layer, plan, fresh, sequence, block, head, &statistics);
        };
        if parallel {
            (0..jobs).into_par_iter().for_each(write);
        } else {
            (0..jobs).for_each(write);
        }
        Ok(())
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
        parallel: bool,
    ) -> Vec<ChannelStatistics> {
        if self.layout.is_raw() {
            return Vec::new();
        }
        let statistics = |job: usize| {
            let (open, head) = (&plan.opens[job / self.num_kv_heads], job % self.num_kv_heads);
            self.statistics_of(layer, plan, k, open, head)
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
        head: usize,
    ) -> ChannelStatistics {
        let Statistics::Positions { start, end } = open.statistics else {
            return ChannelStatistics::identity(self.head_dim);
        };
        let sequence = &plan.sequences[open.sequence];
        let mut rows = vec![0f32; (end - start) * self.head_dim];
        for (position, row) in (start..end).zip(rows.chunks_exact_mut(self.head_dim)) {
            if position < sequence.context_len {
                let block = sequence.block_table[position / plan.block_size];
                let record = self.layers[layer].record(block, head);
                page::read_k(self.layout, record, position % plan.block_size, row);
            } else {
                k.read_row(sequence.token_rows[position - sequence.context_len] as usize, head, row);
            }
        }
        ChannelStatistics::of_rows(&rows, self.head_dim)
    }

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
    ) {
        let sequence = &plan.sequences[index];
        // SAFETY: `append_step` holds the arena exclusively, and the plan writes each block through one sequence
        // (`StepPlan::check_written_blocks`), so each record is asked for by one job.
        let record = unsafe { self.layers[layer].record_mut(sequence.block_table[block], head) };
        let opened = plan.opens.binary_search_by_key(&(index, block), |open| (open.sequence, open.block));
        let frozen = match (self.layout, opened) {
            (PageLayout::Raw(_), _) => None,
            (PageLayout::Int8(page), Ok(open)) => {
                let statistics = statistics[open * self.num_kv_heads + head].clone();
                page::write_statistics(page, record, &statistics);
                Some(statistics)
            }
            (PageLayout::Int8(page), Err(_)) => Some(page::read_statistics(page, record)),
        };
        let (mut k, mut v) = ([0f32; MAX_HEAD_DIM], [0f32; MAX_HEAD_DIM]);
        let (k, v) = (&mut k[..self.head_dim], &mut v[..self.head_dim]);
        let start = sequence.context_len.max(block * plan.block_size);
        let end = sequence.seq_len().min((block + 1) * plan.block_size);
        for position in start..end {
            let row = sequence.token_rows[position - sequence.context_len] as usize;
            fresh.k.read_row(row, head, k);
            fresh.v.read_row(row, head, v);
            let token = position % plan.block_size;
            match (self.layout, &frozen) {
                (PageLayout::Int8(page), Some(frozen)) => page::write_int8(page, record, token, frozen, k, v),
                (PageLayout::Raw(page), _) => page::write_raw(page, record, token, k, v),
                (PageLayout::Int8(_), None) => unreachable!("an INT8 page has statistics"),
            }
        }
    }
}
