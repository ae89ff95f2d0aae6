//! Closing a step: which blocks it has sealed, and what is left of it.

use std::collections::HashSet;

use super::{BlockId, Paging, Place, Sequence, SequenceId};
use crate::error::{Error, Result};

impl Paging {
    /// Says that the open step of the sequence in `row` seals the full block `block` of it from its page: the sequence
    /// reads its tile until the step is aborted, or committed while the block may not be sealed.
    ///
    /// # Panics
    /// Without an open step, or for a block that is not one of committed tokens only, with a page.
    pub fn seal(&mut self, row: usize, block: usize) {
        let sequence = self.sequences.at_mut(row);
        assert!(sequence.pending.is_some(), "row {row} has no open step");
        assert!(block < sequence.len / self.block_size, "block {block} of {} tokens", sequence.len);
        let id = sequence.blocks[block];
        assert!(self.pages.seals() && self.pages.page_of(id).is_some(), "block {id} has no page to seal");
        sequence.sealing.push(block);
        self.places.set(row, block, Place::tile(id));
    }

    /// Closes a step, as to `ids`: their new tokens are part of the sequences, and the blocks that it
    /// [seals](Self::seal) are tiles from now on. Gives the number of them.
    ///
    /// A block stays a page, to be sealed by a later step, while a sequence ends within it or another open step reads it.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::StaleStep`] when no step is open on one; [`Error::Config`] when one is
    /// named twice. None changes anything.
    pub fn commit(&mut self, ids: &[SequenceId]) -> Result<usize> {
        let rows = self.open_rows(ids)?;
        let mut num_sealed = 0;
        let mut of_step = None;
        for &row in &rows {
            for index in std::mem::take(&mut self.sequences.at_mut(row).sealing) {
                let block = self.sequences.at(row).blocks[index];
                if self.pages.page_of(block).is_none() {
                    continue; // sealed through another sequence of the step
                }
                let is_shared = self.pool.refcount(block) > 1;
                let rows_of_step = || rows.iter().copied().collect::<HashSet<usize>>();
                if self.is_partial(block)
                    || is_shared && self.is_in_another_step(block, index, of_step.get_or_insert_with(rows_of_step))
                {
                    self.places.set(row, index, self.pages.place_of(block));
                    continue;
                }
                self.pages.close(block);
                num_sealed += 1;
                if is_shared {
                    self.place_everywhere(block, index);
                }
            }
        }
        for row in rows {
            let sequence = self.sequences.at_mut(row);
            let before = sequence.partial_block(self.block_size);
            sequence.len += sequence.pending.take().unwrap_or(0);
            let after = sequence.partial_block(self.block_size);
            if before != after {
                self.partial.remove(before);
                self.partial.add(after);
            }
            if self.pages.seals() {
                sequence.pass_tiles(self.block_size, &self.pages);
            }
        }
        Ok(num_sealed)
    }

    /// Closes a step, as to `ids`, without its new tokens: their blocks return. Errors are those of
    /// [`commit`](Self::commit).
    pub fn abort(&mut self, ids: &[SequenceId]) -> Result<()> {
        for row in self.open_rows(ids)? {
            let sequence = self.sequences.at_mut(row);
            sequence.pending = None;
            for index in std::mem::take(&mut sequence.sealing) {
                self.places.set(row, index, self.pages.place_of(sequence.blocks[index]));
            }
            self.shrink(row);
        }
        Ok(())
    }

    /// Does a sequence whose step is open, and that is not one of `of_step`, hold the block, which is entry `index`?
    fn is_in_another_step(&self, block: BlockId, index: usize, of_step: &HashSet<usize>) -> bool {
        let holds = |sequence: &Sequence| sequence.pending.is_some() && sequence.blocks.get(index) == Some(&block);
        self.sequences.rows().iter().enumerate().any(|(row, sequence)| holds(sequence) && !of_step.contains(&row))
    }

    /// Sets the place of a shared block in the rows of all its holders. A block is the same entry in all their tables.
    fn place_everywhere(&mut self, block: BlockId, index: usize) {
        for (row, sequence) in self.sequences.rows().iter().enumerate() {
            if sequence.blocks.get(index) == Some(&block) {
                self.places.set(row, index, self.pages.place_of(block));
            }
        }
    }

    /// Rows of sequences, each of them another one.
    pub(super) fn distinct_rows(&self, ids: impl ExactSizeIterator<Item = SequenceId> + Clone) -> Result<Vec<usize>> {
        let rows = ids.clone().map(|id| self.sequences.row(id)).collect::<Result<Vec<usize>>>()?;
        let mut sorted = rows.clone();
        sorted.sort_unstable();
        let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) else { return Ok(rows) };
        let id = ids.zip(&rows).find(|(_, row)| **row == twice[0]).map_or(0, |(id, _)| id.0);
        Err(Error::Config(format!("sequence {id} is named twice in one step")))
    }

    fn open_rows(&self, ids: &[SequenceId]) -> Result<Vec<usize>> {
        let rows = self.distinct_rows(ids.iter().copied())?;
        match ids.iter().zip(&rows).find(|(_, row)| self.sequences.at(**row).pending.is_none()) {
            Some((id, _)) => Err(Error::StaleStep(format!("sequence {id} has no open step"))),
            None => Ok(rows),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paging::{PageId, Rollback, Room, StepRequest};

    fn begin(paging: &mut Paging, requests: &[StepRequest]) -> Result<Vec<(PageId, PageId)>> {
        paging.room(requests).map(Room::begin)
    }

    fn request(sequence: SequenceId, num_new: usize) -> StepRequest {
        StepRequest { sequence, num_new, keep_from: 0, sealed_to: 0 }
    }

    fn append(paging: &mut Paging, sequence: SequenceId, num_new: usize) {
        begin(paging, &[request(sequence, num_new)]).unwrap();
        paging.commit(&[sequence]).unwrap();
    }

    #[test]
    fn all_but_the_last_holder_copy_a_shared_open_page() {
        let mut paging = Paging::new(4, Some(3), b"").unwrap();
        let a = paging.new_sequence();
        append(&mut paging, a, 3);
        let (b, c) = (paging.fork(a).unwrap(), paging.fork(a).unwrap());
        let first = |paging: &Paging, id| PageId(paging.sequence(id).unwrap().blocks()[0].0);
        let page = first(&paging, a);
        let copies = begin(&mut paging, &[request(b, 1), request(a, 1), request(c, 1)]).unwrap();
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
        assert_eq!(begin(&mut paging, &requests), Err(Error::OutOfBlocks { needed: 3, free: 1 }));
        assert_eq!(format!("{paging:?}"), before);
    }

    #[test]
    fn what_leaves_the_window_pays_for_what_enters() {
        let mut paging = Paging::new(2, Some(2), b"").unwrap();
        let a = paging.new_sequence();
        append(&mut paging, a, 4);
        let step = StepRequest { sequence: a, num_new: 2, keep_from: 3, sealed_to: 0 };
        assert_eq!(begin(&mut paging, &[step]), Ok(vec![]));
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
        assert_eq!(begin(&mut paging, &[step(a, 1)]), Err(Error::OutOfBlocks { needed: 1, free: 0 }));
        assert_eq!(begin(&mut paging, &[step(a, 5), step(b, 1)]), Err(Error::OutOfBlocks { needed: 4, free: 2 }));
        assert_eq!(begin(&mut paging, &[step(a, 1), step(b, 1)]), Ok(vec![]));
        paging.check().unwrap();
    }

    #[test]
    fn an_aborted_step_leaves_the_length_and_the_copy() {
        let mut paging = Paging::new(2, None, b"").unwrap();
        let a = paging.new_sequence();
        append(&mut paging, a, 3);
        let b = paging.fork(a).unwrap();
        let copies = begin(&mut paging, &[request(b, 4)]).unwrap();
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
        assert!(matches!(paging.commit(&[a]), Err(Error::StaleStep(_))));
        begin(&mut paging, &[request(a, 1)]).unwrap();
        let open = Error::OpenStep { id: a.0 };
        assert_eq!(paging.fork(a), Err(open.clone()));
        assert_eq!(paging.free(a), Err(open.clone()));
        assert_eq!(paging.truncate(Rollback { sequence: a, len: 0, first_seen: 0 }), Err(open.clone()));
        assert_eq!(begin(&mut paging, &[request(a, 1)]), Err(open));
        assert!(matches!(paging.abort(&[a, a]), Err(Error::Config(_))));
        paging.abort(&[a]).unwrap();
        assert!(matches!(paging.abort(&[a]), Err(Error::StaleStep(_))));
    }

    #[test]
    fn a_step_names_each_sequence_once_and_only_known_ones() {
        let mut paging = Paging::new(2, Some(8), b"").unwrap();
        let a = paging.new_sequence();
        assert!(matches!(begin(&mut paging, &[request(a, 1), request(a, 1)]), Err(Error::Config(_))));
        let unknown = request(SequenceId(9), 1);
        assert_eq!(begin(&mut paging, &[request(a, 1), unknown]), Err(Error::UnknownSequence { id: 9 }));
        append(&mut paging, a, 1);
        assert!(matches!(begin(&mut paging, &[request(a, usize::MAX)]), Err(Error::Config(_))));
        assert!(matches!(begin(&mut paging, &[request(a, usize::MAX - 1)]), Err(Error::OutOfBlocks { free: 7, .. })));
        assert_eq!(paging.sequence(a).unwrap().pending(), None);
    }
}
