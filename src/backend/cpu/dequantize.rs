//! Dequantize: tokens of a sequence as values.

use super::{Cpu, ORDER};
use crate::backend::TensorViewMut;
use crate::paging::Place;
use crate::quant::{self, record};

impl Cpu {
    pub(super) fn dequantize_tokens(
        &self,
        layer: usize,
        places: &[Place],
        start: usize,
        k: &TensorViewMut<'_>,
        v: &TensorViewMut<'_>,
    ) {
        let (head_dim, block_size) = (self.shape.head_dim, self.shape.block_size);
        let end = start + k.shape()[0] * k.shape()[2];
        let blocks = start / block_size..end.div_ceil(block_size);
        let heads = |block| (0..self.shape.num_kv_heads).map(move |head| (block, head));
        let mut jobs: Vec<(usize, usize)> = blocks.flat_map(heads).collect();
        let decode = |rows: &mut Vec<f32>, (block, head): (usize, usize)| {
            let (first, last) = (start.max(block * block_size), end.min((block + 1) * block_size));
            let (layout, record) = self.record(layer, places[block], head);
            let tokens = |rows: &[f32], view: &TensorViewMut<'_>| {
                for position in first..last {
                    let row = &rows[position % block_size * head_dim..][..head_dim];
                    // SAFETY: the view is borrowed for the call, and each (row, head) is of one job.
                    unsafe { view.write_row(position - start, head, row) };
                }
            };
            rows.resize(block_size * head_dim, 0.0);
            record::read_k(layout, ORDER, record, rows);
            tokens(rows, k);
            record::read_v(layout, ORDER, record, rows);
            if self.rotates_v() {
                rows.chunks_exact_mut(head_dim).for_each(quant::hadamard::rotate);
            }
            tokens(rows, v);
        };
        if self.is_worth_threads(end - start) {
            self.threads.for_each(&mut jobs, Vec::new, |rows, _, job| decode(rows, *job));
        } else {
            let mut rows = Vec::new();
            jobs.into_iter().for_each(|job| decode(&mut rows, job));
        }
    }
}
