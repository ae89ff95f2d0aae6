//! What does a step need before it may write, and what is left of it afterwards?
//!
//! `begin` counts first, over the step's own sequences, and changes something only when that many blocks can be had:
//!
//! ```text
//! needed     =  sum of ceil((len + num_new) / block_size) - ceil(len / block_size)  +  copies of shared open pages
//! available  =  free blocks  +  blocks whose every holder is of this step and releases them
//! ```
//!
//! and so for pages, which new blocks need that the step does not seal itself.
//!
//! An open page is shared if another holder is left when its sequence's turn comes: where all its holders are of the
//! step, all but the last copy.

use std::collections::{HashMap, HashSet};

use super::block_pool::BlockPool;
use super::open_pages::OpenPages;
use super::prefix::PrefixIndex;
use super::{BlockId, PageId, Paging, Sequence, SequenceId, known};
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

/// What a step would take, and holders that it would remove.
#[derive(Default)]
struct Demand {
    needed: usize,
    freed: usize,
    needed_pages: usize,
    freed_pages: usize,
    dropped: HashMap<BlockId, u32>,
}

impl Paging {
    /// Opens a step: afterwards each block that it writes is held by its sequence alone, and is not published.
    ///
    /// Returns the copy-on-write copies of pages (source, destination). They are independent of each other, come before the
    /// step's writes, and must be made even if the step is then aborted: the copy stays in the block table.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::OpenStep`]; [`Error::Config`] when a sequence is named twice;
    /// [`Error::OutOfBlocks`]; [`Error::OutOfOpenPages`]. None changes anything.
    pub fn begin(&mut self, requests: &[StepRequest]) -> Result<Vec<(PageId, PageId)>> {
        self.checked_demand(requests)?;
        for request in requests {
            self.release_before(request)?;
        }
        let mut copies = Vec::new();
        for request in requests {
            self.reserve(request, &mut copies)?;
        }
        self.cow_copies += copies.len();
        Ok(copies)
    }

    /// Blocks and pages that the backend must have room for once `requests` have begun: what
    /// [`num_blocks`](Self::num_blocks) will be, and as many pages where blocks do not seal. Errors are those of
    /// [`begin`](Self::begin).
    pub fn room_after(&self, requests: &[StepRequest]) -> Result<(usize, usize)> {
        let demand = self.checked_demand(requests)?;
        let grown = demand.needed.saturating_sub(self.pool.num_listed() + demand.freed);
        let num_blocks = self.pool.bound().unwrap_or(self.pool.num_known() + grown);
        let num_pages = self.pages.num_known_after(demand.needed_pages, demand.freed_pages);
        Ok((num_blocks, num_pages.unwrap_or(num_blocks)))
    }

    fn checked_demand(&self, requests: &[StepRequest]) -> Result<Demand> {
        self.check_distinct(requests.iter().map(|request| request.sequence))?;
        let demand = self.demand(requests)?;
        let free = self.pool.num_available() + demand.freed;
        if demand.needed > free {
            return Err(Error::OutOfBlocks { needed: demand.needed, free });
        }
        let free = self.pages.num_available().saturating_add(demand.freed_pages);
        if demand.needed_pages > free {
            return Err(Error::OutOfOpenPages { needed: demand.needed_pages, free });
        }
        Ok(demand)
    }

    /// Closes a step, as to `ids`: their new tokens are part of the sequences, and the full blocks `sealed` are tiles
    /// from now on, but those that a sequence ends within ([`ends_within`](Self::ends_within)). Gives the number of them.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::StaleStep`] when no step is open on one; [`Error::Config`] when one is
    /// named twice. None changes anything.
    pub fn commit(&mut self, ids: &[SequenceId], sealed: &[BlockId]) -> Result<usize> {
        self.check_open(ids)?;
        let partly_used = if sealed.is_empty() { HashSet::new() } else { self.ends_within() };
        let sealed = sealed.iter().filter(|&block| !partly_used.contains(block));
        let num_sealed = sealed.filter(|&&block| self.pages.close(block)).count();
        for &id in ids {
            let sequence = known(&mut self.sequences, id)?;
            sequence.len += sequence.pending.take().unwrap_or(0);
        }
        Ok(num_sealed)
    }

    /// Closes a step, as to `ids`, without its new tokens: their blocks return. Errors are those of
    /// [`commit`](Self::commit).
    pub fn abort(&mut self, ids: &[SequenceId]) -> Result<()> {
        self.check_open(ids)?;
        for &id in ids {
            let sequence = known(&mut self.sequences, id)?;
            sequence.pending = None;
            self.shrink(id)?;
        }
        Ok(())
    }

    fn check_distinct(&self, ids: impl Iterator<Item = SequenceId>) -> Result<()> {
        let mut seen = HashSet::with_capacity(ids.size_hint().0);
        for id in ids {
            self.sequence(id)?;
            if !seen.insert(id) {
                return Err(Error::Config(format!("sequence {id} is named twice in one step")));
            }
        }
        Ok(())
    }

    fn check_open(&self, ids: &[SequenceId]) -> Result<()> {
        self.check_distinct(ids.iter().copied())?;
        match ids.iter().find(|id| self.sequences[id].pending.is_none()) {
            Some(id) => Err(Error::StaleStep(format!("sequence {id} has no open step"))),
            None => Ok(()),
        }
    }

    fn demand(&self, requests: &[StepRequest]) -> Result<Demand> {
        let mut demand = Demand::default();
        for request in requests {
            let sequence = self.settled(request.sequence)?;
            for &block in &sequence.blocks[self.leaving(sequence, request)] {
                let dropped = demand.dropped.entry(block).or_default();
                *dropped += 1;
                if *dropped == self.pool.refcount(block) {
                    demand.freed += 1;
                    demand.freed_pages += usize::from(self.pages.seals() && self.pages.page_of(block).is_some());
                }
            }
        }
        for request in requests {
            let sequence = self.settled(request.sequence)?;
            let end = sequence.len.checked_add(request.num_new).ok_or_else(|| {
                let (id, len, num_new) = (request.sequence, sequence.len, request.num_new);
                Error::Config(format!("sequence {id} of {len} tokens cannot take {num_new} more"))
            })?;
            let num_blocks = end.div_ceil(self.block_size);
            demand.needed = demand.needed.saturating_add(num_blocks - sequence.blocks.len());
            let first_open = request.sealed_to.max(sequence.blocks.len());
            demand.needed_pages = demand.needed_pages.saturating_add(num_blocks.saturating_sub(first_open));
            let Some(page) = written_page(sequence, request, self.block_size) else { continue };
            let holders = self.pool.refcount(page);
            if holders == 1 {
                continue;
            }
            let dropped = demand.dropped.entry(page).or_default();
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

    fn release_before(&mut self, request: &StepRequest) -> Result<()> {
        let leaving = self.leaving(self.sequence(request.sequence)?, request);
        let sequence = known(&mut self.sequences, request.sequence)?;
        sequence.first_held = leaving.end * self.block_size;
        let released: Vec<BlockId> = sequence.blocks[leaving]
            .iter_mut()
            .rev()
            .map(|entry| std::mem::replace(entry, BlockId::RELEASED))
            .collect();
        released.into_iter().for_each(|block| self.release(block));
        Ok(())
    }

    fn reserve(&mut self, request: &StepRequest, copies: &mut Vec<(PageId, PageId)>) -> Result<()> {
        let (block_size, pool, pages, prefix) = (self.block_size, &mut self.pool, &mut self.pages, &mut self.prefix);
        let sequence = known(&mut self.sequences, request.sequence)?;
        if let Some(shared) = written_page(sequence, request, block_size) {
            if pool.refcount(shared) > 1 {
                let copy = take(pool, prefix)?;
                let page = open(pages, copy)?;
                pool.release(shared);
                sequence.blocks[sequence.len / block_size] = copy;
                copies.extend(pages.page_of(shared).map(|source| (source, page)));
            } else {
                prefix.forget(shared);
            }
        }
        let num_blocks = (sequence.len + request.num_new).div_ceil(block_size);
        while sequence.blocks.len() < num_blocks {
            let block = take(pool, prefix)?;
            if sequence.blocks.len() >= request.sealed_to {
                open(pages, block)?;
            }
            sequence.blocks.push(block);
        }
        sequence.pending = Some(request.num_new);
        Ok(())
    }
}

fn open(pages: &mut OpenPages, block: BlockId) -> Result<PageId> {
    pages.open(block).ok_or(Error::OutOfOpenPages { needed: 1, free: 0 })
}

/// The open page, if the request writes into it.
fn written_page(sequence: &Sequence, request: &StepRequest, block_size: usize) -> Option<BlockId> {
    if request.num_new == 0 { None } else { sequence.open_page(block_size) }
}

/// A block to be written: its old content is no longer found.
fn take(pool: &mut BlockPool, prefix: &mut PrefixIndex) -> Result<BlockId> {
    let block = pool.take().ok_or(Error::OutOfBlocks { needed: 1, free: 0 })?;
    prefix.forget(block);
    Ok(block)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(sequence: SequenceId, num_new: usize) -> StepRequest {
        StepRequest { sequence, num_new, keep_from: 0, sealed_to: 0 }
    }

    fn append(paging: &mut Paging, sequence: SequenceId, num_new: usize) {
        paging.begin(&[request(sequence, num_new)]).unwrap();
        paging.commit(&[sequence], &[]).unwrap();
    }

    #[test]
    fn all_but_the_last_holder_copy_a_shared_open_page() {
        let mut paging = Paging::new(4, Some(3), b"").unwrap();
        let a = paging.new_sequence();
        append(&mut paging, a, 3);
        let (b, c) = (paging.fork(a).unwrap(), paging.fork(a).unwrap());
        let first = |paging: &Paging, id| PageId(paging.sequence(id).unwrap().blocks()[0].0);
        let page = first(&paging, a);
        let copies = paging.begin(&[request(b, 1), request(a, 1), request(c, 1)]).unwrap();
        let first = |id| first(&paging, id);
        assert_eq!(copies, [(page, first(b)), (page, first(a))]);
        assert_eq!((first(c), paging.cow_copies(), paging.num_free()), (page, 2, Some(0)));
    }

    #[test]
    fn a_step_that_does_not_fit_says_what_it_needed_and_changes_nothing() {
        let mut paging = Paging::new(4, Some(3), b"").unwrap();
        let (a, b) = (paging.new_sequence(), paging.new_sequence());
        append(&mut paging, a, 6);
        let fork = paging.fork(a).unwrap();
        let before = format!("{paging:?}");
        let requests = [request(b, 1), request(a, 3), request(fork, 1)];
        assert_eq!(paging.begin(&requests), Err(Error::OutOfBlocks { needed: 3, free: 1 }));
        assert_eq!(format!("{paging:?}"), before);
    }

    #[test]
    fn what_leaves_the_window_pays_for_what_enters() {
        let mut paging = Paging::new(2, Some(2), b"").unwrap();
        let a = paging.new_sequence();
        append(&mut paging, a, 4);
        let step = StepRequest { sequence: a, num_new: 2, keep_from: 3, sealed_to: 0 };
        assert_eq!(paging.begin(&[step]), Ok(vec![]));
        let sequence = paging.sequence(a).unwrap();
        assert_eq!((sequence.first_held(), sequence.len(), sequence.pending()), (2, 4, Some(2)));
        assert_eq!(sequence.blocks(), [BlockId::RELEASED, BlockId(1), BlockId(0)]);
    }

    #[test]
    fn a_block_that_all_its_holders_release_pays_once() {
        let mut paging = Paging::new(2, Some(2), b"").unwrap();
        let a = paging.new_sequence();
        append(&mut paging, a, 4);
        let b = paging.fork(a).unwrap();
        let step = |sequence, num_new| StepRequest { sequence, num_new, keep_from: 4, sealed_to: 0 };
        assert_eq!(paging.begin(&[step(a, 1)]), Err(Error::OutOfBlocks { needed: 1, free: 0 }));
        assert_eq!(paging.begin(&[step(a, 5), step(b, 1)]), Err(Error::OutOfBlocks { needed: 4, free: 2 }));
        assert_eq!(paging.begin(&[step(a, 1), step(b, 1)]), Ok(vec![]));
        paging.check().unwrap();
    }

    #[test]
    fn an_aborted_step_leaves_the_length_and_the_copy() {
        let mut paging = Paging::new(2, None, b"").unwrap();
        let a = paging.new_sequence();
        append(&mut paging, a, 3);
        let b = paging.fork(a).unwrap();
        let copies = paging.begin(&[request(b, 4)]).unwrap();
        assert_eq!((copies.len(), paging.blocks_in_use()), (1, 5));
        paging.abort(&[b]).unwrap();
        let sequence = paging.sequence(b).unwrap();
        assert_eq!((sequence.len(), sequence.pending(), sequence.blocks()[1].0), (3, None, copies[0].1.0));
        assert_eq!((paging.blocks_in_use(), paging.peak_blocks(), paging.check()), (3, 5, Ok(())));
    }

    #[test]
    fn a_step_must_be_closed_before_its_sequences_change() {
        let mut paging = Paging::new(2, None, b"").unwrap();
        let a = paging.new_sequence();
        assert!(matches!(paging.commit(&[a], &[]), Err(Error::StaleStep(_))));
        paging.begin(&[request(a, 1)]).unwrap();
        let open = Error::OpenStep { id: a.0 };
        assert_eq!(paging.fork(a), Err(open.clone()));
        assert_eq!(paging.free(a), Err(open.clone()));
        assert_eq!(paging.truncate(a, 0, None), Err(open.clone()));
        assert_eq!(paging.begin(&[request(a, 1)]), Err(open));
        assert!(matches!(paging.abort(&[a, a]), Err(Error::Config(_))));
        paging.abort(&[a]).unwrap();
        assert!(matches!(paging.abort(&[a]), Err(Error::StaleStep(_))));
    }

    #[test]
    fn a_step_names_each_sequence_once_and_only_known_ones() {
        let mut paging = Paging::new(2, Some(8), b"").unwrap();
        let a = paging.new_sequence();
        assert!(matches!(paging.begin(&[request(a, 1), request(a, 1)]), Err(Error::Config(_))));
        let unknown = request(SequenceId(9), 1);
        assert_eq!(paging.begin(&[request(a, 1), unknown]), Err(Error::UnknownSequence { id: 9 }));
        append(&mut paging, a, 1);
        assert!(matches!(paging.begin(&[request(a, usize::MAX)]), Err(Error::Config(_))));
        assert!(matches!(paging.begin(&[request(a, usize::MAX - 1)]), Err(Error::OutOfBlocks { free: 7, .. })));
        assert_eq!(paging.sequence(a).unwrap().pending(), None);
    }
}
