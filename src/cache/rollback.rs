//! Going back: to a length, also into a sealed block.

use super::PagedKvCache;
use crate::backend::{Fresh, TensorView, TensorViewMut};
use crate::config::CacheConfig;
use crate::engine::Progress;
use crate::error::Result;
use crate::paging::{BlockId, Place, Rollback, SequenceId, StepRequest};
use crate::plan::{StepPlan, bounds_of, first_seen};
use std::sync::Arc;

impl PagedKvCache {
    /// Keeps the first `len` tokens.
    ///
    /// # Errors
    /// [`crate::Error::RollbackTooFar`] when it has fewer, or when the window has released what the next query would see;
    /// [`crate::Error::Sealed`] when `len` is within a sealed block.
    pub fn truncate(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        self.paging.truncate(self.to(sequence, len))
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
        let rollbacks: Vec<Rollback> = targets.iter().map(|&(sequence, len)| self.to(sequence, len)).collect();
        self.paging.check_rollbacks(&rollbacks).map(|_| ())
    }

    fn to(&self, sequence: SequenceId, len: usize) -> Rollback {
        Rollback { sequence, len, first_seen: first_seen(len, self.config.window) }
    }

    fn unseal(&mut self, sequence: SequenceId, len: usize, tile: BlockId) -> Result<()> {
        let count = len % self.config.block_size;
        let rollback = self.to(sequence, len);
        let (num_blocks, num_pages) = self.paging.check_rollbacks(&[rollback])?;
        self.layers.executor.grow(num_blocks, num_pages)?;
        // From here on nothing fails but a device: there is room, and what is written was decoded.
        self.paging.reopen(rollback)?;
        let request = StepRequest { sequence, num_new: count, keep_from: 0, sealed_to: 0 };
        let room = self.paging.room(&[request])?;
        let bounds = bounds_of(&room);
        let copies = room.begin();
        debug_assert!(copies.is_empty(), "a block that begins is nobody else's");
        let plan = Arc::new(StepPlan::begin_rewriting(&mut self.paging, sequence, count, bounds));
        if let Err(error) = self.rewrite(&plan, tile, count) {
            self.paging.abort(&[sequence])?;
            return Err(error);
        }
        self.first_page_tokens = plan.first_page_tokens().or(self.first_page_tokens);
        self.paging.commit(&[sequence])?;
        self.unsealed += 1;
        Ok(())
    }

    /// Writes the first `count` tokens of a tile by the plan.
    fn rewrite(&mut self, plan: &Arc<StepPlan>, tile: BlockId, count: usize) -> Result<()> {
        let mut progress = self.layers.begin(Arc::clone(plan), self.paging.places())?;
        let written =
            (0..self.config.num_layers).try_for_each(|layer| self.rewrite_layer(&mut progress, layer, tile, count));
        self.layers.end(&progress);
        written
    }

    fn rewrite_layer(&mut self, progress: &mut Progress, layer: usize, tile: BlockId, count: usize) -> Result<()> {
        let CacheConfig { num_kv_heads, head_dim, .. } = self.config;
        let shape = [1, num_kv_heads, count, head_dim];
        let (mut k, mut v) = (vec![0f32; shape.iter().product()], vec![0f32; shape.iter().product()]);
        let (k_out, v_out) =
            (TensorViewMut::from_slice("k", &mut k, shape)?, TensorViewMut::from_slice("v", &mut v, shape)?);
        let stream = self.layers.stream;
        self.layers.executor.dequantize(layer, &[Place::tile(tile)], 0, &k_out, &v_out, stream)?;
        let new = Fresh { k: TensorView::from_slice("k", &k, shape)?, v: TensorView::from_slice("v", &v, shape)? };
        self.layers.append(progress, self.paging.places(), layer, new, None)
    }
}
