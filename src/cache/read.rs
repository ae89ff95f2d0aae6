//! Tokens and records of a sequence, read back.

use super::{OpenStep, PagedKvCache};
use crate::backend::TensorViewMut;
use crate::error::{Error, Result};
use crate::paging::{SequenceId, UsedBlock};

impl PagedKvCache {
    /// Decodes tokens `start..` of a sequence into `k` and `v`, `[B, num_kv_heads, T, head_dim]` each, `B * T` tokens.
    /// Tokens of an open step count once its `layer` has been appended.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Shape`] for tokens that the sequence does not hold, or tensors that differ.
    #[allow(clippy::needless_pass_by_value)] // exclusive borrows, handed over
    pub fn dequantize(
        &self,
        layer: usize,
        sequence: SequenceId,
        start: usize,
        k: TensorViewMut<'_>,
        v: TensorViewMut<'_>,
    ) -> Result<()> {
        self.layers.check_layer(layer)?;
        let held = self.paging.sequence(sequence)?;
        let of_sequence = |open: &&OpenStep| open.progress.is_appended(layer) && open.sequences.contains(&sequence);
        let open = self.steps.values().find(of_sequence);
        let tokens = held.first_held()..held.len() + held.pending().filter(|_| open.is_some()).unwrap_or(0);
        // What attention of the step reads: blocks that it has sealed are tiles already.
        if open.is_some() {
            let places = &self.paging.places().row(self.paging.row(sequence)?)[..held.blocks().len()];
            return self.layers.dequantize(layer, (places, tokens), start, &k, &v);
        }
        let places = self.paging.committed_places(sequence)?;
        self.layers.dequantize(layer, (&places, tokens), start, &k, &v)
    }

    /// The records of a block of a sequence in a layer, head by head, as [files](super::file) have them.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::OpenStep`]; [`Error::Config`] for a layer, or an `index` in the block table,
    /// that is not there.
    pub fn records(&self, layer: usize, sequence: SequenceId, index: usize) -> Result<Vec<u8>> {
        let places = self.paging.committed_places(sequence)?;
        let one = self.paging.sequence(sequence)?;
        if one.pending().is_some() {
            return Err(Error::OpenStep { id: sequence.0 });
        }
        let block_size = self.config.block_size;
        let blocks = one.first_held() / block_size..one.len().div_ceil(block_size);
        if !blocks.contains(&index) {
            return Err(Error::Config(format!("block {index} of a sequence that has blocks {blocks:?}")));
        }
        let used = (one.len() - index * block_size).min(block_size);
        let block = UsedBlock { id: one.blocks()[index], used, is_first: index == 0 };
        self.layers.executor.save(layer, places[index], &block)
    }
}
