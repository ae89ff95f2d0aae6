//! Attention of a prefill: many query rows a head, cut into chunks that run side by side.
//!
//! A page is decoded once for all rows of a chunk, into one page of scratch a worker; the step's own tokens, where
//! given, are read unquantized, from pages of f32 laid out like `raw` ones: a copy of the step's own keys and values,
//! 8 bytes a channel and token, for as long as one call attends.

use super::attend::{Attention, RowRange};
use super::generic::{PageView, Rows, Scratch};
use super::page::PageLayout;
use super::page_kernel::PAGE_TOKENS;
use crate::backend::Fresh;
use crate::error::{Error, Result};
use crate::format::{CodeOrder, Dtype, MAX_HEAD_DIM, RawPage};
use rayon::prelude::*;

/// Query rows of a chunk: enough to make decoding a page cheap, few enough for their state to stay in cache.
const CHUNK_ROWS: usize = 48;

/// One sequence's own tokens, unquantized: `[num_kv_heads, num_pages]` pages of f32.
struct FreshPages {
    page: RawPage,
    num_pages: usize,
    values: Vec<f32>,
}

#[derive(Default)]
struct Worker {
    scratch: Scratch,
    q: Vec<f32>,
    visible: Vec<(usize, usize)>,
    max: Vec<f32>,
    sum: Vec<f32>,
    acc: Vec<f32>,
    unpacked: Vec<f32>,
}

impl Attention<'_> {
    pub(super) fn prefill(&self, sequences: &[usize], fresh: Option<Fresh<'_>>) -> Result<()> {
        // `raw` pages hold the fresh tokens as they are.
        let fresh = if self.cpu.layout.is_raw() { None } else { fresh };
        for &index in sequences {
            let packed = fresh.map(|fresh| self.pack(index, fresh)).transpose()?;
            let num_rows = self.sequence(index).num_new() * self.group;
            let chunks = num_rows.div_ceil(CHUNK_ROWS);
            // The last chunks see the most: they go first.
            (0..chunks * self.cpu.num_kv_heads).into_par_iter().for_each_init(Worker::default, |worker, job| {
                let (chunk, head) = (chunks - 1 - job / self.cpu.num_kv_heads, job % self.cpu.num_kv_heads);
                let first = chunk * CHUNK_ROWS;
                let count = CHUNK_ROWS.min(num_rows - first);
                self.chunk(RowRange { sequence: index, head, first, count }, packed.as_ref(), worker);
            });
        }
        Ok(())
    }

    fn chunk(&self, range: RowRange, fresh: Option<&FreshPages>, worker: &mut Worker) {
        let (head_dim, block_size) = (self.cpu.head_dim, self.cpu.block_size);
        let sequence = self.sequence(range.sequence);
        let Worker { scratch, q, visible, max, sum, acc, unpacked } = worker;
        q.resize(range.count * head_dim, 0.0);
        self.gather(range, q, visible);
        let start = visible.iter().map(|range| range.0).min().unwrap_or(0);
        let end = visible.iter().map(|range| range.1).max().unwrap_or(0);
        max.clear();
        max.resize(range.count, f32::NEG_INFINITY);
        sum.clear();
        sum.resize(range.count, 0.0);
        acc.clear();
        acc.resize(range.count * head_dim, 0.0);

        let history_end = if fresh.is_some() { end.min(sequence.context_len) } else { end };
        // Pages end where the fresh tokens begin, though the first of them may share a block with the history.
        let seen: Vec<(usize, usize)> = visible.iter().map(|&(s, e)| (s, e.min(history_end))).collect();
        let mut rows = Rows { head_dim, q, visible: &seen, max, sum, acc };
        for block in start / block_size..history_end.div_ceil(block_size) {
            let mut page_view = self.page(sequence, block, range.head);
            if let PageLayout::Int8(page) = page_view.layout {
                let raw = RawPage { head_dim, block_size, dtype: Dtype::F32 };
                unpacked.resize(raw.bytes() / 4, 0.0);
                // SAFETY: the kernels' level is available.
                unsafe { (self.cpu.kernels.unpack)(page, page_view.record, unpacked) };
                page_view.record = as_bytes(unpacked);
                page_view.layout = PageLayout::Raw(raw);
            }
            self.attend_page(&page_view, &mut rows, scratch);
        }
        if let Some(fresh) = fresh {
            rows.visible = visible;
            let from = start.saturating_sub(sequence.context_len) / PAGE_TOKENS;
            for index in from..(end - sequence.context_len).div_ceil(PAGE_TOKENS) {
                self.attend_page(&fresh.page_view(range.head, index, sequence.context_len), &mut rows, scratch);
            }
        }
        for r in 0..range.count {
            let (max, sum) = (rows.max[r], rows.sum[r]);
            self.finish(range, r, max, sum, &mut rows.acc[r * head_dim..(r + 1) * head_dim]);
        }
    }

    fn pack(&self, index: usize, fresh: Fresh<'_>) -> Result<FreshPages> {
        let sequence = self.sequence(index);
        let head_dim = self.cpu.head_dim;
        let page = RawPage { head_dim, block_size: PAGE_TOKENS, dtype: Dtype::F32 };
        let num_pages = sequence.num_new().div_ceil(PAGE_TOKENS);
        let len = self.cpu.num_kv_heads * num_pages * page.bytes() / 4;
        let mut values = Vec::new();
        if values.try_reserve_exact(len).is_err() {
            return Err(Error::OutOfMemory { bytes: 4 * len, what: "the unquantized tokens of a prefill" });
        }
        values.resize(len, 0f32);
        values.par_chunks_exact_mut(page.bytes() / 4).enumerate().for_each(|(job, values)| {
            let (head, page_view) = (job / num_pages, job % num_pages);
            let (k, v) = values.split_at_mut(page.v() / 4);
            let rows = sequence.token_rows.chunks(PAGE_TOKENS).nth(page_view).unwrap_or_default();
            let mut row = [0f32; MAX_HEAD_DIM];
            let (shape, order) = ([PAGE_TOKENS, head_dim], CodeOrder::Cpu);
            for (token, &index) in rows.iter().enumerate() {
                fresh.k.read_row(index as usize, head, &mut row[..head_dim]);
                row[..head_dim].iter().enumerate().for_each(|(d, &x)| k[order.raw_k(shape, token, d)] = x);
                fresh.v.read_row(index as usize, head, &mut row[..head_dim]);
                row[..head_dim].iter().enumerate().for_each(|(d, &x)| v[order.raw_v(shape, token, d)] = x);
            }
        });
        Ok(FreshPages { page, num_pages, values })
    }
}

impl FreshPages {
    fn page_view(&self, head: usize, index: usize, context_len: usize) -> PageView<'_> {
        let page = self.page.bytes() / 4;
        PageView {
            first: context_len + index * PAGE_TOKENS,
            tokens: PAGE_TOKENS,
            record: as_bytes(&self.values[(head * self.num_pages + index) * page..][..page]),
            layout: PageLayout::Raw(self.page),
        }
    }
}

fn as_bytes(values: &[f32]) -> &[u8] {
    // SAFETY: any f32 is four initialized bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}
