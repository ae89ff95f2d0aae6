//! Rows of the caller's tensors.

use super::Cpu;
use crate::backend::{Fresh, TensorView};
use crate::error::{Error, Result};
use crate::format::MAX_HEAD_DIM;
use crate::plan::StepView;

/// Rows that a thread checks at once.
const CHUNK_ROWS: usize = 64;

impl Cpu {
    /// Are the step's keys and values finite, where there are tokens?
    pub(super) fn check_finite_rows(&self, step: StepView<'_>, new: Fresh<'_>) -> Result<()> {
        let parallel = self.is_worth_threads(step.num_tokens());
        for (name, view) in [("k", new.k), ("v", new.v)] {
            let check = |&row: &i32| self.check_finite_row(name, row as usize, view);
            let rows = step.token_rows();
            if parallel {
                let chunks: Vec<&[i32]> = rows.chunks(CHUNK_ROWS).collect();
                let checked = self.threads.map(chunks.len(), |index| chunks[index].iter().try_for_each(check));
                checked.into_iter().collect::<Result<()>>()?;
            } else {
                rows.iter().try_for_each(check)?;
            }
        }
        Ok(())
    }

    fn check_finite_row(&self, name: &'static str, row: usize, view: TensorView<'_>) -> Result<()> {
        let mut values = [0f32; MAX_HEAD_DIM];
        let values = &mut values[..self.shape.head_dim];
        for head in 0..self.shape.num_kv_heads {
            view.read_row(row, head, values);
            if let Some(channel) = values.iter().position(|x| !x.is_finite()) {
                return Err(Error::NonFinite { name, row, head, channel, value: values[channel] });
            }
        }
        Ok(())
    }

    /// Rows of a tensor, `[rows, heads, head_dim]`.
    pub(super) fn gather_rows(&self, view: TensorView<'_>, rows: &[usize]) -> Vec<f32> {
        let (heads, head_dim) = (view.shape()[1], self.shape.head_dim);
        let mut values = vec![0f32; rows.len() * heads * head_dim];
        for (out, &row) in values.chunks_exact_mut(heads * head_dim).zip(rows) {
            for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
                view.read_row(row, head, out);
            }
        }
        values
    }
}
