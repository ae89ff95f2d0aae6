//! Write: the tokens of a step into their pages.

use super::{Cpu, ORDER};
use crate::backend::Fresh;
use crate::format::{MAX_HEAD_DIM, RecordLayout};
use crate::paging::PageId;
use crate::plan::StepView;
use crate::quant;
use crate::quant::range::TokenSet;
use crate::quant::record::{int8, raw};

/// What was written of one block and head.
struct Written {
    rows: usize,
    /// The sum of [`int8::WrittenK::squares`].
    squares: f64,
    out_of_range: TokenSet,
}

impl Cpu {
    pub(super) fn write_tokens(&mut self, layer: usize, step: StepView<'_>, new: Fresh<'_>) {
        let num_kv_heads = self.shape.num_kv_heads;
        let page = |(sequence, block)| step.place(sequence, block).as_page().map(|page| (sequence, block, page));
        let blocks: Vec<(usize, usize, PageId)> = step.written_blocks().filter_map(page).collect();
        let jobs = 0..blocks.len() * num_kv_heads;
        let write = |job: usize| self.write_block(layer, step, new, blocks[job / num_kv_heads], job % num_kv_heads);
        let written: Vec<Written> = if self.is_worth_threads(step.num_tokens()) {
            self.threads.map(jobs.len(), write)
        } else {
            jobs.map(write).collect()
        };
        if self.page.is_raw() || written.is_empty() {
            return;
        }
        let rows: usize = written.iter().map(|job| job.rows).sum();
        let squares: f64 = written.iter().map(|job| job.squares).sum();
        let health = &mut self.layers[layer].health;
        health.wrote(rows / num_kv_heads, squares / (rows * self.shape.head_dim) as f64);
        for heads in written.chunks_exact(num_kv_heads) {
            health.out_of_range(heads.iter().map(|job| job.out_of_range));
        }
    }

    /// Writes the tokens of one block and head.
    fn write_block(
        &self,
        layer: usize,
        step: StepView<'_>,
        new: Fresh<'_>,
        (index, block, page): (usize, usize, PageId),
        head: usize,
    ) -> Written {
        let (head_dim, block_size) = (self.shape.head_dim, self.shape.block_size);
        let sequence = step.sequence(index);
        // SAFETY: `&mut self` of `write_tokens` holds the memory exclusively, and the plan writes each page for one block
        // (`plan::check`), so each record is asked for by one job.
        let record = unsafe { self.layers[layer].pages.record_mut(page.0, head) };
        let statistics = match self.page {
            RecordLayout::Int8(page) => Some(int8::read_statistics(page, ORDER, record)),
            _ => None,
        };
        let (mut k, mut v) = ([0f32; MAX_HEAD_DIM], [0f32; MAX_HEAD_DIM]);
        let (k, v) = (&mut k[..head_dim], &mut v[..head_dim]);
        let start = sequence.context_len.max(block * block_size);
        let end = sequence.seq_len().min((block + 1) * block_size);
        let mut written = Written { rows: end - start, squares: 0.0, out_of_range: 0 };
        for position in start..end {
            let row = sequence.token_rows[position - sequence.context_len] as usize;
            new.k.read_row(row, head, k);
            new.v.read_row(row, head, v);
            let token = step.slots()[row] as usize % block_size;
            match (self.page, &statistics) {
                (RecordLayout::Int8(page), Some(statistics)) => {
                    if self.rotates_v() {
                        quant::rotate_v(v);
                    }
                    let low = block == 0 && page.has_low_bytes(token, end);
                    // SAFETY: the kernels' level is available.
                    let (of_k, v_is_out) =
                        unsafe { (self.kernels.write_token)(page, record, token, (statistics, k, v, low)) };
                    written.squares += of_k.squares;
                    written.out_of_range |= TokenSet::from(of_k.out_of_range || v_is_out) << token;
                }
                (RecordLayout::Raw(page), _) => raw::write_token(page, ORDER, record, token, k, v),
                _ => unreachable!("a page is raw, or INT8 with statistics"),
            }
        }
        written
    }
}
