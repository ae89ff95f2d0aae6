//! Room for a step, and its begin.
//!
//! [`Paging::room`] counts what a step takes, over its sequences, and refuses it before anything has changed:
//!
//! ```text
//! needed     =  sum of ceil((len + num_new) / block_size) - ceil(len / block_size)  +  copies of shared partial blocks
//! available  =  free blocks  +  blocks whose every holder is of this step and releases them
//! ```
//!
//! and so for pages, which new blocks need that the step does not seal itself.
//!
//! A partial block is shared if another holder is left when its sequence's turn comes: where all its holders are of the
//! step, all but the last copy.

use std::collections::HashMap;

use super::{BlockId, PageId, Paging, Place, Sequence, SequenceId};
use crate::error::{Error, Result};

/// What one sequence does in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepRequest {
    /// The sequence.
    pub sequence: SequenceId,
    /// Tokens that it appends.
    pub num_new: usize,
    /// First token that this and later steps see; whole blocks of committed tokens before it are released, for good,
    /// whether the step is committed or aborted. 0 keeps everything.
    pub keep_from: usize,
    /// New blocks before this index of the block table are sealed by the step itself, and take no page.
    pub sealed_to: usize,
}

/// A step whose blocks and pages have been found; it has not begun.
#[derive(Debug)]
pub struct Room<'a> {
    paging: &'a mut Paging,
    /// With the rows of their sequences.
    requests: Vec<(usize, StepRequest)>,
    num_blocks: usize,
    num_pages: usize,
}

/// Blocks and pages that would be taken, and those that become free before.
#[derive(Default)]
pub(super) struct Demand {
    pub(super) needed: usize,
    pub(super) freed: usize,
    pub(super) needed_pages: usize,
    pub(super) freed_pages: usize,
    /// Holders that each block would lose.
    dropped: HashMap<BlockId, u32>,
}

impl Demand {
    /// A holder gives the block up.
    pub(super) fn drop_holder(&mut self, paging: &Paging, block: BlockId) {
        let dropped = self.dropped.entry(block).or_default();
        *dropped += 1;
        if *dropped == paging.pool.refcount(block) {
            self.freed += 1;
            self.freed_pages += usize::from(paging.pages.seals() && paging.pages.page_of(block).is_some());
        }
    }

    /// One more block, with a page, of those that are left.
    pub(super) fn take_block(&mut self, paging: &Paging) -> Result<()> {
        let free = paging.pool.num_available() + self.freed - self.needed;
        if free == 0 {
            return Err(Error::OutOfBlocks { needed: 1, free });
        }
        let free = paging.pages.num_available().saturating_add(self.freed_pages) - self.needed_pages;
        if free == 0 {
            return Err(Error::OutOfOpenPages { needed: 1, free });
        }
        self.needed += 1;
        self.needed_pages += 1;
        Ok(())
    }
}

impl Room<'_> {
    /// Blocks that the backend must have room for: every id of the step is below.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Pages that the backend must have room for; as many as blocks where these do not seal.
    #[must_use]
    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    /// Do blocks seal?
    #[must_use]
    pub fn seals(&self) -> bool {
        self.paging.seals()
    }

    /// Opens the step: afterwards each block that it writes is held by its sequence alone, and is not published.
    ///
    /// Returns the copy-on-write copies of pages (source, destination). They are independent of each other, come before
    /// the step's writes, and must be made even if the step is then aborted: the copy stays in the block table.
    #[must_use]
    pub fn begin(self) -> Vec<(PageId, PageId)> {
        let Self { paging, requests, .. } = self;
        for (row, request) in &requests {
            paging.release_before(*row, request);
        }
        let mut copies = Vec::new();
        for (row, request) in &requests {
            paging.reserve(*row, request, &mut copies);
        }
        paging.cow_copies += copies.len();
        copies
    }
}

impl Paging {
    /// Finds the blocks and pages of a step.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::OpenStep`]; [`Error::Config`] when a sequence is named twice or would be
    /// longer than positions can count (2^31 - 1); [`Error::OutOfBlocks`]; [`Error::OutOfOpenPages`]. Nothing has changed.
    pub fn room(&mut self, requests: &[StepRequest]) -> Result<Room<'_>> {
        let rows = self.distinct_rows(requests.iter().map(|request| request.sequence))?;
        let requests: Vec<(usize, StepRequest)> = rows.into_iter().zip(requests.iter().copied()).collect();
        let demand = self.demand(&requests)?;
        let free = self.pool.num_available() + demand.freed;
        if demand.needed > free {
            return Err(Error::OutOfBlocks { needed: demand.needed, free });
        }
        let free = self.pages.num_available().saturating_add(demand.freed_pages);
        if demand.needed_pages > free {
            return Err(Error::OutOfOpenPages { needed: demand.needed_pages, free });
        }
        for (row, request) in &requests {
            let end = self.sequences.at(*row).len + request.num_new;
            if i32::try_from(end).is_err() {
                return Err(Error::Config(format!("sequence {} cannot be {end} tokens long", request.sequence)));
            }
        }
        let (num_blocks, num_pages) = self.room_for(&demand);
        Ok(Room { paging: self, requests, num_blocks, num_pages })
    }

    /// Blocks and pages that there are once the demand has been met.
    pub(super) fn room_for(&self, demand: &Demand) -> (usize, usize) {
        let grown = demand.needed.saturating_sub(self.pool.num_listed() + demand.freed);
        let num_blocks = self.pool.bound().unwrap_or(self.pool.num_known() + grown);
        let num_pages = self.pages.num_known_after(demand.needed_pages, demand.freed_pages);
        (num_blocks, num_pages.unwrap_or(num_blocks))
    }

    fn demand(&self, requests: &[(usize, StepRequest)]) -> Result<Demand> {
        let mut demand = Demand::default();
        for (row, request) in requests {
            let sequence = self.sequences.at(*row);
            if sequence.pending.is_some() {
                return Err(Error::OpenStep { id: request.sequence.0 });
            }
            for &block in &sequence.blocks[self.leaving(sequence, request)] {
                demand.drop_holder(self, block);
            }
        }
        for (row, request) in requests {
            let sequence = self.sequences.at(*row);
            let end = sequence.len.checked_add(request.num_new).ok_or_else(|| {
                let (id, len, num_new) = (request.sequence, sequence.len, request.num_new);
                Error::Config(format!("sequence {id} of {len} tokens cannot take {num_new} more"))
            })?;
            let num_blocks = end.div_ceil(self.block_size);
            demand.needed = demand.needed.saturating_add(num_blocks - sequence.blocks.len());
            let first_open = request.sealed_to.max(sequence.blocks.len());
            demand.needed_pages = demand.needed_pages.saturating_add(num_blocks.saturating_sub(first_open));
            let Some(block) = unsure_block(sequence, request, self.block_size) else { continue };
            let holders = self.pool.refcount(block);
            if holders == 1 {
                continue;
            }
            let dropped = demand.dropped.entry(block).or_default();
            if holders - *dropped > 1 {
                *dropped += 1;
                demand.needed = demand.needed.saturating_add(1);
                demand.needed_pages = demand.needed_pages.saturating_add(1);
            }
        }
        Ok(demand)
    }

    /// Indices of the blocks that the request releases.
    fn leaving(&self, sequence: &Sequence, request: &StepRequest) -> std::ops::Range<usize> {
        let first_held = sequence.first_held_from(self.block_size, request.keep_from);
        sequence.first_held / self.block_size..first_held / self.block_size
    }

    fn release_before(&mut self, row: usize, request: &StepRequest) {
        let leaving = self.leaving(self.sequences.at(row), request);
        if leaving.is_empty() {
            return;
        }
        let sequence = self.sequences.at_mut(row);
        sequence.first_held = leaving.end * self.block_size;
        let released: Vec<BlockId> = sequence.blocks[leaving]
            .iter_mut()
            .rev()
            .map(|entry| std::mem::replace(entry, BlockId::RELEASED))
            .collect();
        released.into_iter().for_each(|block| self.release(block));
    }

    fn reserve(&mut self, row: usize, request: &StepRequest, copies: &mut Vec<(PageId, PageId)>) {
        let (block_size, num_rows) = (self.block_size, self.sequences.rows().len());
        let sequence = self.sequences.at(row);
        if let Some(shared) = unsure_block(sequence, request, block_size) {
            if self.pool.refcount(shared) > 1 {
                let index = sequence.len / block_size;
                let copy = self.take();
                let page = self.open(copy);
                copies.extend(self.pages.page_of(shared).map(|source| (source, page)));
                self.pool.release(shared);
                self.sequences.at_mut(row).blocks[index] = copy;
                self.partial.remove(Some(shared));
                self.partial.add(Some(copy));
                self.places.set(row, index, Place::page(page));
            } else {
                self.prefix.forget(shared);
            }
        }
        let (first, end) = {
            let sequence = self.sequences.at(row);
            (sequence.blocks.len(), (sequence.len + request.num_new).div_ceil(block_size))
        };
        self.places.reserve(num_rows, end);
        for index in first..end {
            let block = self.take();
            if index >= request.sealed_to {
                self.open(block);
            }
            self.places.set(row, index, self.pages.place_of(block));
            self.sequences.at_mut(row).blocks.push(block);
        }
        let sequence = self.sequences.at_mut(row);
        sequence.pending = Some(request.num_new);
        sequence.owns_partial_block |= request.num_new > 0;
    }

    /// A block to be written: its old content is no longer found.
    fn take(&mut self) -> BlockId {
        let block = self.pool.take().expect("`room` has found the blocks");
        self.prefix.forget(block);
        block
    }

    fn open(&mut self, block: BlockId) -> PageId {
        self.pages.open(block).expect("`room` has found the pages")
    }
}

/// The partial block, if the request writes into it and others may hold it, or find it.
fn unsure_block(sequence: &Sequence, request: &StepRequest, block_size: usize) -> Option<BlockId> {
    if request.num_new == 0 || sequence.owns_partial_block { None } else { sequence.partial_block(block_size) }
}
