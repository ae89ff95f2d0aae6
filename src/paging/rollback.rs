//! Rollback: sequences cut back to fewer tokens, and what that would take.

use std::collections::HashMap;

use super::room::Demand;
use super::{BlockId, Paging, Sequence, SequenceId};
use crate::error::{Error, Result};

/// A sequence to be cut back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rollback {
    /// The sequence.
    pub sequence: SequenceId,
    /// Its tokens afterwards.
    pub len: usize,
    /// First token that the next query sees, at position `len`.
    pub first_seen: usize,
}

/// A sequence as rollbacks would leave it.
#[derive(Clone, Copy)]
struct Cut {
    len: usize,
    /// Blocks of its table that it still holds.
    num_kept: usize,
    /// Is there a new block after them, with a page, for tokens of a sealed one?
    has_new: bool,
}

impl Paging {
    /// Rolls a sequence back to its first `len` tokens. `len` as it is changes nothing.
    ///
    /// # Errors
    /// [`Error::RollbackTooFar`] when it has fewer, or when the next query would see a token already released.
    /// [`Error::Sealed`] when `len` is within a sealed block.
    pub fn truncate(&mut self, rollback: Rollback) -> Result<()> {
        let Rollback { sequence: id, len, .. } = rollback;
        self.check_rollback(rollback, self.settled(id)?.len)?;
        if self.sealed_within(id, len)?.is_some() {
            let start = len - len % self.block_size;
            return Err(Error::Sealed { id: id.0, requested: len, start, end: start + self.block_size });
        }
        self.cut(id, len)
    }

    /// The sealed block that position `len` of a sequence lies in the middle of, if there is one.
    pub fn sealed_within(&self, id: SequenceId, len: usize) -> Result<Option<BlockId>> {
        let sequence = self.sequence(id)?;
        let block = self.block_within(sequence, len, sequence.len);
        Ok(block.filter(|&block| self.pages.page_of(block).is_none()))
    }

    /// Like [`truncate`](Self::truncate), and then back to the beginning of the block that `len` is within: the caller
    /// writes the tokens between the two again.
    pub fn reopen(&mut self, rollback: Rollback) -> Result<()> {
        let Rollback { sequence: id, len, .. } = rollback;
        self.check_rollback(rollback, self.settled(id)?.len)?;
        self.cut(id, len - len % self.block_size)
    }

    /// Whether these rollbacks can be made one after the other, where one into a sealed block takes a new block and a
    /// page for the tokens of it that remain. Gives the numbers of blocks and of pages that the backend must have room
    /// for then. Changes nothing, and visits only blocks that would be given up.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::OpenStep`], [`Error::RollbackTooFar`], [`Error::OutOfBlocks`],
    /// [`Error::OutOfOpenPages`]: the first that one of them would meet.
    pub fn check_rollbacks(&self, rollbacks: &[Rollback]) -> Result<(usize, usize)> {
        let mut cuts: HashMap<SequenceId, Cut> = HashMap::new();
        let mut demand = Demand::default();
        for &rollback in rollbacks {
            let Rollback { sequence: id, len, .. } = rollback;
            let sequence = self.settled(id)?;
            let whole = Cut { len: sequence.len, num_kept: sequence.blocks.len(), has_new: false };
            let cut = cuts.get(&id).copied().unwrap_or(whole);
            self.check_rollback(rollback, cut.len)?;
            let is_in_new =
                cut.has_new && len / self.block_size == cut.num_kept && !len.is_multiple_of(self.block_size);
            let sealed = self
                .block_within(sequence, len, cut.len)
                .is_some_and(|block| !is_in_new && self.pages.page_of(block).is_none());
            let num_kept = if sealed { len / self.block_size } else { len.div_ceil(self.block_size) }.min(cut.num_kept);
            for &block in &sequence.blocks[num_kept.max(sequence.first_held / self.block_size)..cut.num_kept] {
                demand.drop_holder(self, block);
            }
            if cut.has_new && !is_in_new {
                demand.freed += 1;
                demand.freed_pages += usize::from(self.pages.seals());
            }
            if sealed {
                demand.take_block(self)?;
            }
            cuts.insert(id, Cut { len, num_kept, has_new: sealed || is_in_new });
        }
        Ok(self.room_for(&demand))
    }

    /// The block that holds tokens on both sides of `len`, of a sequence of `end` tokens.
    fn block_within(&self, sequence: &Sequence, len: usize, end: usize) -> Option<BlockId> {
        let is_within = len < end && !len.is_multiple_of(self.block_size);
        let block = is_within.then(|| sequence.blocks[len / self.block_size]);
        block.filter(|&block| block != BlockId::RELEASED)
    }

    fn check_rollback(&self, rollback: Rollback, committed: usize) -> Result<()> {
        let Rollback { sequence: id, len, first_seen } = rollback;
        let floor = self.sequence(id)?.first_held;
        if len > committed || len < committed && first_seen.min(len) < floor {
            return Err(Error::RollbackTooFar { id: id.0, requested: len, floor, len: committed });
        }
        Ok(())
    }

    fn cut(&mut self, id: SequenceId, len: usize) -> Result<()> {
        let (row, block_size, root) = (self.sequences.row(id)?, self.block_size, self.prefix.root());
        let sequence = self.sequences.at_mut(row);
        if len == sequence.len {
            return Ok(());
        }
        self.partial.remove(sequence.partial_block(block_size));
        (sequence.len, sequence.owns_partial_block) = (len, false);
        self.partial.add(sequence.partial_block(block_size));
        sequence.num_tiles = sequence.num_tiles.min(len / block_size);
        if sequence.chained > len / block_size {
            (sequence.chained, sequence.chain) = (0, root);
        }
        self.shrink(row);
        Ok(())
    }

    /// Gives back the blocks past the committed tokens, last first.
    pub(super) fn shrink(&mut self, row: usize) {
        let sequence = self.sequences.at_mut(row);
        let keep = sequence.len.div_ceil(self.block_size);
        let dropped = sequence.blocks.split_off(keep);
        dropped.into_iter().rev().for_each(|block| self.release(block));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paging::{Room, StepRequest};

    /// A sequence of `len` tokens in blocks of 2, all but the last full one sealed.
    fn sealed(paging: &mut Paging, len: usize) -> SequenceId {
        let sequence = paging.new_sequence();
        let step = StepRequest { sequence, num_new: len, keep_from: 0, sealed_to: (len / 2).saturating_sub(1) };
        paging.room(&[step]).map(Room::begin).unwrap();
        paging.commit(&[sequence]).unwrap();
        sequence
    }

    fn to(sequence: SequenceId, len: usize) -> Rollback {
        Rollback { sequence, len, first_seen: 0 }
    }

    #[test]
    fn rollbacks_are_foreseen_one_after_the_other() {
        let mut paging = Paging::sealing(2, Some(6), Some(2), b"").unwrap();
        let a = sealed(&mut paging, 8);
        let fork = paging.fork(a).unwrap();
        assert_eq!(paging.check_rollbacks(&[to(a, 3), to(a, 2), to(fork, 3)]), Ok((6, 2)));
        // Of the block that is rewritten first nothing is left, so the second rewrite has a page.
        assert_eq!(paging.check_rollbacks(&[to(a, 3), to(fork, 1)]), Ok((6, 2)));
        let short = Error::RollbackTooFar { id: a.0, requested: 4, floor: 0, len: 3 };
        assert_eq!(paging.check_rollbacks(&[to(a, 3), to(a, 4)]), Err(short));
        let other = sealed(&mut paging, 4);
        assert_eq!(paging.check_rollbacks(&[to(a, 3)]), Err(Error::OutOfBlocks { needed: 1, free: 0 }));
        assert_eq!(paging.check_rollbacks(&[to(other, 0), to(a, 3)]), Ok((6, 2)));
        paging.truncate(to(other, 2)).unwrap();
        assert_eq!(paging.check_rollbacks(&[to(a, 3)]), Ok((6, 2)));
        assert_eq!(paging.check(), Ok(()));
    }

    #[test]
    fn a_rollback_that_finds_no_page_says_so() {
        let mut paging = Paging::sealing(2, None, Some(1), b"").unwrap();
        let a = sealed(&mut paging, 6);
        let fork = paging.fork(a).unwrap();
        assert_eq!(paging.check_rollbacks(&[to(a, 3)]), Err(Error::OutOfOpenPages { needed: 1, free: 0 }));
        assert_eq!(paging.check_rollbacks(&[to(fork, 4), to(a, 3)]), Ok((3, 1)));
    }
}
