//! `raw` pages: elements as they came, rounded to the page's type.

use super::element;
use crate::format::{Arrangement, RawPage};

/// Writes one token's K and V, `[head_dim]` each.
#[inline(always)]
pub fn write_token(page: RawPage, order: Arrangement, record: &mut [u8], token: usize, k: &[f32], v: &[f32]) {
    for d in 0..page.head_dim {
        element::write(record, page.dtype, order.raw_k(page, token, d), k[d]);
        element::write(record, page.dtype, order.raw_v(page, token, d), v[d]);
    }
}

/// Reads K, `[block_size, head_dim]`.
pub fn read_k(page: RawPage, order: Arrangement, record: &[u8], k: &mut [f32]) {
    read(page, record, |token, channel| order.raw_k(page, token, channel), k);
}

/// Reads V, `[block_size, head_dim]`.
pub fn read_v(page: RawPage, order: Arrangement, record: &[u8], v: &mut [f32]) {
    read(page, record, |token, channel| order.raw_v(page, token, channel), v);
}

#[inline(always)]
fn read(page: RawPage, record: &[u8], at: impl Fn(usize, usize) -> usize, out: &mut [f32]) {
    for (t, row) in out.chunks_exact_mut(page.head_dim).enumerate() {
        for (d, x) in row.iter_mut().enumerate() {
            *x = element::read(record, page.dtype, at(t, d));
        }
    }
}
