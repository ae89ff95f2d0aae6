//! Attention of a prefill: many query rows a head, cut into chunks that run side by side.
//!
//! A record is decoded once for all rows of a chunk, into one page of scratch a worker; the step's own tokens, where
//! given, are read unquantized, from pages of f32 laid out like `raw` ones: a copy of the step's own keys and values,
//! 8 bytes a channel and token, for as long as one call attends.

use super::ORDER;
use super::attend::{Attention, RowRange};
use super::generic::{RecordView, Rows, Scratch};
use super::record_kernel::BLOCK_TOKENS;
use crate::backend::{Fresh, Over};
use crate::error::{Error, Result};
use crate::format::{Dtype, MAX_HEAD_DIM, RawPage, RecordLayout};
use crate::quant;

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
    q_rotated: Vec<f32>,
    visible: Vec<(usize, usize)>,
    max: Vec<f32>,
    sum: Vec<f32>,
    acc: Vec<f32>,
    unpacked: Vec<f32>,
}

impl Attention<'_> {
    pub(super) fn prefill(&self, new: Option<Fresh<'_>>) -> Result<()> {
        let new = new.filter(|_| self.options.over == Over::All);
        for index in self.sequences().filter(|&index| self.sequence(index).is_prefill) {
            let packed = new.map(|new| self.pack(index, new)).transpose()?;
            let num_rows = self.sequence(index).num_new() * self.group;
            let chunks = num_rows.div_ceil(CHUNK_ROWS);
            // The last chunks see the most: they go first.
            let mut jobs: Vec<RowRange> = (0..chunks * self.cpu.shape.num_kv_heads)
                .map(|job| {
                    let (chunk, head) =
                        (chunks - 1 - job / self.cpu.shape.num_kv_heads, job % self.cpu.shape.num_kv_heads);
                    let first = chunk * CHUNK_ROWS;
                    RowRange { sequence: index, head, first, count: CHUNK_ROWS.min(num_rows - first) }
                })
                .collect();
            let threads = self.cpu.threads;
            threads.for_each(&mut jobs, Worker::default, |worker, _, job| self.chunk(*job, packed.as_ref(), worker));
        }
        Ok(())
    }

    fn chunk(&self, range: RowRange, fresh: Option<&FreshPages>, worker: &mut Worker) {
        let (head_dim, block_size) = (self.cpu.shape.head_dim, self.cpu.shape.block_size);
        let sequence = self.sequence(range.sequence);
        let Worker { scratch, q, q_rotated, visible, max, sum, acc, unpacked } = worker;
        q.resize(range.count * head_dim, 0.0);
        self.gather(range, q, q_rotated, visible);
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
        let mut rows = Rows { head_dim, q, q_rotated, visible: &seen, max, sum, acc };
        for block in start / block_size..history_end.div_ceil(block_size) {
            let mut view = self.record(&sequence, block, range.head);
            if !view.layout.is_raw() {
                let raw = RawPage { head_dim, block_size, dtype: Dtype::F32 };
                unpacked.resize(raw.bytes() / 4, 0.0);
                // SAFETY: the kernels' level is available.
                unsafe { (self.cpu.kernels.unpack)(view.layout, view.record, unpacked) };
                view.record = as_bytes(unpacked);
                view.layout = RecordLayout::Raw(raw);
            }
            self.attend_record(&view, &mut rows, scratch);
        }
        if let Some(fresh) = fresh {
            rows.visible = visible;
            let from = start.saturating_sub(sequence.context_len) / BLOCK_TOKENS;
            for index in from..(end - sequence.context_len).div_ceil(BLOCK_TOKENS) {
                self.attend_record(&fresh.view(range.head, index, sequence.context_len), &mut rows, scratch);
            }
        }
        for r in 0..range.count {
            let (max, sum) = (rows.max[r], rows.sum[r]);
            self.finish(range, r, max, sum, &mut rows.acc[r * head_dim..(r + 1) * head_dim]);
        }
    }

    fn pack(&self, index: usize, fresh: Fresh<'_>) -> Result<FreshPages> {
        let sequence = self.sequence(index);
        let head_dim = self.cpu.shape.head_dim;
        let page = RawPage { head_dim, block_size: BLOCK_TOKENS, dtype: Dtype::F32 };
        let num_pages = sequence.num_new().div_ceil(BLOCK_TOKENS);
        let len = self.cpu.shape.num_kv_heads * num_pages * page.bytes() / 4;
        let mut values = Vec::new();
        if values.try_reserve_exact(len).is_err() {
            return Err(Error::OutOfMemory { bytes: 4 * len, what: "the unquantized tokens of a prefill" });
        }
        values.resize(len, 0f32);
        let mut pages: Vec<&mut [f32]> = values.chunks_exact_mut(page.bytes() / 4).collect();
        self.cpu.threads.for_each(
            &mut pages,
            || (),
            |(), job, values| {
                let (head, page_index) = (job / num_pages, job % num_pages);
                let rows = sequence.token_rows.chunks(BLOCK_TOKENS).nth(page_index).unwrap_or_default();
                let mut row = [0f32; MAX_HEAD_DIM];
                for (token, &index) in rows.iter().enumerate() {
                    fresh.k.read_row(index as usize, head, &mut row[..head_dim]);
                    row[..head_dim].iter().enumerate().for_each(|(d, &x)| values[ORDER.raw_k(page, token, d) / 4] = x);
                    fresh.v.read_row(index as usize, head, &mut row[..head_dim]);
                    if self.cpu.rotates_v() {
                        quant::rotate_v(&mut row[..head_dim]);
                    }
                    row[..head_dim].iter().enumerate().for_each(|(d, &x)| values[ORDER.raw_v(page, token, d) / 4] = x);
                }
            },
        );
        Ok(FreshPages { page, num_pages, values })
    }
}

impl FreshPages {
    fn view(&self, head: usize, index: usize, context_len: usize) -> RecordView<'_> {
        let page = self.page.bytes() / 4;
        RecordView {
            first: context_len + index * BLOCK_TOKENS,
            tokens: BLOCK_TOKENS,
            record: as_bytes(&self.values[(head * self.num_pages + index) * page..][..page]),
            layout: RecordLayout::Raw(self.page),
            k_rotated: false,
        }
    }
}

fn as_bytes(values: &[f32]) -> &[u8] {
    // SAFETY: any f32 is four initialized bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}
