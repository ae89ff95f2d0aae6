//! Rows of a caller's tensors, read by the host.

use super::driver::Context;
use super::records::copy_rows;
use crate::backend::TensorView;
use crate::error::Result;
use crate::quant::record::read_element;

/// Rows of a tensor, `[rows, heads, head_dim]`: runs of neighbouring rows are copied at once, head by head.
pub(super) fn read_rows(context: &Context, view: TensorView<'_>, rows: &[usize]) -> Result<Vec<f32>> {
    let ([_, heads, rows_per_batch, head_dim], dtype) = (view.shape(), view.dtype());
    let [of_batch, of_head, of_row, _] = view.strides().map(|stride| stride * dtype.bytes() as i64);
    let width = head_dim * dtype.bytes();
    let mut values = vec![0f32; rows.len() * heads * head_dim];
    context.wait()?;
    let _entered = context.enter()?;
    let mut bytes = vec![0; rows_per_batch * width];
    let mut first = 0;
    while first < rows.len() {
        let row = rows[first];
        let follows = |(index, next): &(usize, &usize)| **next == row + index && **next % rows_per_batch != 0;
        // A pitch has to be as wide as a row.
        let most = if of_row >= width as i64 { rows.len() } else { 1 };
        let run = 1 + rows[first..].iter().enumerate().skip(1).take_while(follows).take(most - 1).count();
        let (b, t) = (row / rows_per_batch, row % rows_per_batch);
        for head in 0..heads {
            let offset = b as i64 * of_batch + head as i64 * of_head + t as i64 * of_row;
            let device = (view.address().wrapping_add_signed(offset), if run > 1 { of_row as usize } else { width });
            // SAFETY: the rows are elements of the view; `bytes` holds a batch of them.
            unsafe { copy_rows(bytes.as_mut_ptr(), device, width, run, false) }?;
            for (index, row) in bytes.chunks_exact(width).take(run).enumerate() {
                let at = ((first + index) * heads + head) * head_dim;
                for (channel, value) in values[at..at + head_dim].iter_mut().enumerate() {
                    *value = read_element(row, dtype, channel * dtype.bytes());
                }
            }
        }
        first += run;
    }
    Ok(values)
}
