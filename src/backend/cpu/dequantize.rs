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
        let mut rows = vec![0f32; block_size * head_dim];
        for block in start / block_size..end.div_ceil(block_size) {
            let (first, last) = (start.max(block * block_size), end.min((block + 1) * block_size));
            for head in 0..self.shape.num_kv_heads {
                let (layout, record) = self.record(layer, places[block], head);
                let tokens = |rows: &[f32], view: &TensorViewMut<'_>| {
                    for position in first..last {
                        let row = &rows[position % block_size * head_dim..][..head_dim];
                        // SAFETY: the view is borrowed for the call, and this thread alone writes it.
                        unsafe { view.write_row(position - start, head, row) };
                    }
                };
                record::read_k(layout, ORDER, record, &mut rows);
                tokens(&rows, k);
                record::read_v(layout, ORDER, record, &mut rows);
                if self.rotates_v() {
                    rows.chunks_exact_mut(head_dim).for_each(quant::hadamard::rotate);
                }
                tokens(&rows, v);
            }
        }
    }
}
