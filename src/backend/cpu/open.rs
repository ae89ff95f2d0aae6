//! Open: pages get the statistics that their tokens are encoded under; refit: first pages of few tokens get others.

use super::{Cpu, ORDER};
use crate::backend::{Model, Source};
use crate::format::RecordLayout;
use crate::paging::PageId;
use crate::plan::{PageOpen, PageRefit, StepView};
use crate::quant::record::{self, int8};
use crate::quant::{ChannelStatistics, ModelChannels};
use std::ops::Range;

impl Cpu {
    /// Opens the plan's pages whose statistics are taken over tokens in `from`.
    pub(super) fn open_pages(&mut self, layers: Range<usize>, step: StepView<'_>, from: Source<'_>, models: &[Model]) {
        let of_stored = matches!(from, Source::Stored);
        let is_from = |open: &PageOpen| open.is_of_stored(step.context_len(open.of)) == of_stored;
        let opens: Vec<PageOpen> = step.opens().filter(is_from).collect();
        let heads = self.shape.num_kv_heads;
        let jobs = || 0..layers.len() * opens.len() * heads;
        let at =
            |job: usize| (layers.start + job / heads / opens.len(), &opens[job / heads % opens.len()], job % heads);
        let statistics_of = |job: usize| {
            let (layer, open, head) = at(job);
            self.statistics_of(layer, step, from, open, (head, channels(models, layer - layers.start, head)))
        };
        let num_tokens: usize = opens.iter().map(|open| open.end - open.start).sum();
        let parallel = self.is_worth_threads(num_tokens * layers.len());
        // All statistics before any page is written: they are read from pages that others of the step may change.
        let statistics: Vec<Option<ChannelStatistics>> =
            if parallel { self.threads.map(jobs().len(), statistics_of) } else { jobs().map(statistics_of).collect() };
        for (job, statistics) in statistics.into_iter().enumerate() {
            let (layer, open, head) = at(job);
            self.open_page(layer, step, open, head, statistics);
        }
    }

    /// The statistics of a page over the tokens `start..end`; `None` where pages are `raw`.
    fn statistics_of(
        &self,
        layer: usize,
        step: StepView<'_>,
        from: Source<'_>,
        open: &PageOpen,
        (head, model): (usize, Option<&ModelChannels>),
    ) -> Option<ChannelStatistics> {
        if self.page.is_raw() {
            return None;
        }
        let &PageOpen { start, end, .. } = open;
        let sequence = step.sequence(open.of);
        let (head_dim, block_size) = (self.shape.head_dim, self.shape.block_size);
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
        if let Source::New(new) = from {
            for position in start.max(sequence.context_len)..end {
                let row = sequence.token_rows[position - sequence.context_len] as usize;
                new.k.read_row(row, head, &mut rows[(position - start) * head_dim..][..head_dim]);
            }
        }
        Some(ChannelStatistics::of_rows(&rows, head_dim, model, open.block == 0))
    }

    /// Stores the statistics of a page; clears it where the step does not write it whole, or encodes the K that it has.
    fn open_page(
        &mut self,
        layer: usize,
        step: StepView<'_>,
        open: &PageOpen,
        head: usize,
        statistics: Option<ChannelStatistics>,
    ) {
        let (head_dim, block_size) = (self.shape.head_dim, self.shape.block_size);
        let sequence = step.sequence(open.sequence);
        let Some(id) = sequence.page(open.block) else { unreachable!("a plan opens pages") };
        let num_tokens = (sequence.seq_len() - open.block * block_size).min(block_size);
        let num_stored = sequence.context_len.saturating_sub(open.block * block_size);
        // SAFETY: `&mut self` holds the memory exclusively, and one record at a time is asked for.
        let record = unsafe { self.layers[layer].pages.record_mut(id.0, head) };
        if num_stored == 0 && num_tokens < block_size {
            record.fill(0);
        }
        if let (RecordLayout::Int8(page), Some(statistics)) = (self.page, statistics) {
            let mut stored = vec![0f32; num_stored * head_dim];
            int8::read_first_k(page, ORDER, record, &mut stored);
            int8::rewrite_first_k(page, ORDER, record, &statistics, &stored, num_tokens);
        }
    }

    /// Takes the statistics of first pages anew, and encodes their K under them.
    pub(super) fn refit_pages(&mut self, layers: Range<usize>, step: StepView<'_>, models: &[Model]) {
        let RecordLayout::Int8(page) = self.page else { return };
        let page_of = |refit: PageRefit| step.place(refit.sequence, 0).as_page().map(|id| (id, refit.num_tokens));
        let refits: Vec<(PageId, usize)> = step.refits().filter_map(page_of).collect();
        let heads = self.shape.num_kv_heads;
        let refit = |job: usize| {
            let (layer, (id, num_tokens)) =
                (layers.start + job / heads / refits.len(), refits[job / heads % refits.len()]);
            let head = job % heads;
            // SAFETY: `&mut self` holds the memory exclusively; a page is written for one sequence, so each record is
            // asked for by one job.
            let record = unsafe { self.layers[layer].pages.record_mut(id.0, head) };
            int8::refit_k(page, ORDER, record, num_tokens, channels(models, layer - layers.start, head));
        };
        let jobs = 0..layers.len() * refits.len() * heads;
        let num_tokens: usize = refits.iter().map(|refit| refit.1).sum();
        if self.is_worth_threads(num_tokens * layers.len()) {
            self.threads.map(jobs.len(), refit);
        } else {
            jobs.for_each(refit);
        }
    }
}

fn channels(models: &[Model], layer: usize, head: usize) -> Option<&ModelChannels> {
    models[layer].as_ref().map(|model| &model.heads()[head].channels)
}
