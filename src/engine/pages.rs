//! The pages of open blocks, by block.

use crate::error::{Error, Result};
use crate::paging::{BlockId, PageId, Place};

/// A fixed number of pages, lent to the blocks that are not sealed.
#[derive(Debug)]
pub(super) struct OpenPages {
    /// Of each block, its page.
    page_of: Vec<Option<PageId>>,
    free: Vec<PageId>,
    num_pages: usize,
    peak: usize,
}

impl OpenPages {
    pub(super) fn new(num_blocks: usize, num_pages: usize) -> Self {
        let free = (0..num_pages as u32).rev().map(PageId).collect();
        Self { page_of: vec![None; num_blocks], free, num_pages, peak: 0 }
    }

    pub(super) fn num_blocks(&self) -> usize {
        self.page_of.len()
    }

    pub(super) fn in_use(&self) -> usize {
        self.num_pages - self.free.len()
    }

    pub(super) fn peak(&self) -> usize {
        self.peak
    }

    pub(super) fn page(&self, block: BlockId) -> Option<PageId> {
        self.page_of[block.0 as usize]
    }

    pub(super) fn place(&self, block: BlockId) -> Place {
        self.page(block).map_or(Place::tile(block), Place::page)
    }

    /// Gives each of these blocks a page that has none; gives those blocks.
    ///
    /// # Errors
    /// [`Error::OutOfOpenPages`]; nothing has changed.
    pub(super) fn allocate(&mut self, blocks: &[BlockId]) -> Result<Vec<BlockId>> {
        let mut new: Vec<BlockId> = blocks.iter().copied().filter(|&block| self.page(block).is_none()).collect();
        new.sort_unstable();
        new.dedup();
        if new.len() > self.free.len() {
            return Err(Error::OutOfOpenPages { needed: new.len(), free: self.free.len() });
        }
        for &block in &new {
            self.page_of[block.0 as usize] = self.free.pop();
        }
        Ok(new)
    }

    /// Takes the pages in use now into the most that ever were.
    pub(super) fn note_peak(&mut self) {
        self.peak = self.peak.max(self.in_use());
    }

    /// Takes the pages of these blocks back.
    pub(super) fn release(&mut self, blocks: impl IntoIterator<Item = BlockId>) {
        for block in blocks {
            self.free.extend(self.page_of[block.0 as usize].take());
        }
    }
}
