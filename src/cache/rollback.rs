//! Going back: to a length, also into a sealed block.

use super::learn::heads;
use super::{PagedKvCache, plan_step};
use crate::backend::{Backend, Fresh, TensorView, TensorViewMut};
use crate::config::CacheConfig;
use crate::error::Result;
use crate::paging::{BlockId, PageId, SequenceId, StepRequest};
use crate::plan::Rows;

impl PagedKvCache {
    /// Keeps the first `len` tokens.
    ///
    /// # Errors
    /// [`crate::Error::RollbackTooFar`] when it has fewer, or when the window has released what the next query would see;
    /// [`crate::Error::Sealed`] when `len` is within a sealed block.
    pub fn truncate(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        self.paging.truncate(sequence, len, self.config.window)
    }

    /// Like [`Self::truncate`], but a sealed block that `len` is within is decoded into a page, and counted: its tokens
    /// keep the error that sealing made.
    ///
    /// # Errors
    /// [`crate::Error::RollbackTooFar`]; [`crate::Error::OutOfBlocks`] or [`crate::Error::OutOfOpenPages`] when there is
    /// no room for the page.
    pub fn truncate_unsealing(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        match self.paging.sealed_within(sequence, len)? {
            Some(tile) => self.unseal(sequence, len, tile),
            None => self.truncate(sequence, len),
        }
    }

    /// What [`Self::truncate_unsealing`] of each, one after the other, would come to. Changes nothing.
    ///
    /// # Errors
    /// The first of theirs.
    pub fn check_truncate(&self, targets: &[(SequenceId, usize)]) -> Result<()> {
        let mut paging = self.paging.clone();
        for &(sequence, len) in targets {
            if paging.sealed_within(sequence, len)?.is_some() {
                paging.reopen(sequence, len, self.config.window)?;
                paging.begin(&[kept_again(sequence, len % self.config.block_size)])?;
                paging.commit(&[sequence], &[])?;
            } else {
                paging.truncate(sequence, len, self.config.window)?;
            }
        }
        Ok(())
    }

    fn unseal(&mut self, sequence: SequenceId, len: usize, tile: BlockId) -> Result<()> {
        let CacheConfig { num_layers, num_kv_heads, head_dim, block_size, window, .. } = self.config;
        let count = len % block_size;
        let shape = [1, num_kv_heads, count, head_dim];
        let zeros = || vec![0f32; num_kv_heads * count * head_dim];
        // On a copy of the tables first: what fails there has changed nothing.
        let mut paging = self.paging.clone();
        paging.reopen(sequence, len, window)?;
        let request = kept_again(sequence, count);
        let (num_blocks, num_pages) = paging.room_after(&[request])?;
        self.backend.grow(num_blocks, num_pages)?;
        let copies = paging.begin(&[request])?;
        debug_assert!(copies.is_empty(), "a block that begins is nobody else's");
        let plan = plan_step(&paging, block_size, &[(sequence, Rows::All(count))])?;
        for layer in 0..num_layers {
            let (mut k, mut v) = (zeros(), zeros());
            let (k_out, v_out) =
                (TensorViewMut::from_slice("k", &mut k, shape)?, TensorViewMut::from_slice("v", &mut v, shape)?);
            self.backend.dequantize(layer, &[tile], &[PageId::SEALED], 0, k_out, v_out)?;
            let fresh =
                Fresh { k: TensorView::from_slice("k", &k, shape)?, v: TensorView::from_slice("v", &v, shape)? };
            self.backend.append(layer, &plan, fresh, heads(self.calibrated(layer).as_deref()))?;
        }
        paging.commit(&[sequence], &[])?;
        self.paging = paging;
        self.unsealed += 1;
        Ok(())
    }
}

/// The step that writes the kept tokens of a block again.
fn kept_again(sequence: SequenceId, num_new: usize) -> StepRequest {
    StepRequest { sequence, num_new, keep_from: 0, sealed_to: 0 }
}
