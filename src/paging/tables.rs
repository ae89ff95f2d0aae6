//! What must be kept of the places so that they can be had again?
//!
//! Block tables, lengths, and which blocks have a page. Blocks are numbered anew, from 0 in the order in which the
//! sequences, by id, name them first: the same sequences make the same tables, whatever became of the pool before. Free
//! blocks, and the prefixes found in them, are not kept.

use std::collections::HashMap;

use super::{BlockId, PageId, Paging, Sequence, SequenceId};
use crate::error::{Error, Result};

/// Ids of sequences are below this, so that there are always more.
const MAX_SEQUENCES: u64 = 1 << 63;
/// Entries of all block tables together are fewer, so that holders can be counted.
const MAX_ENTRIES: usize = u32::MAX as usize;

/// The block table of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// The sequence.
    pub id: SequenceId,
    /// Its committed tokens.
    pub len: usize,
    /// First token that it holds.
    pub first_held: usize,
    /// Its blocks; [`BlockId::RELEASED`] before the first token held.
    pub blocks: Vec<BlockId>,
}

/// The sequences of a pool outside a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// The id of the next new sequence.
    pub next_id: u64,
    /// By ascending id.
    pub sequences: Vec<Table>,
    /// Is a block open, with a page of its own, or sealed? Where blocks do not seal all are open.
    pub open: Vec<bool>,
}

/// A block of some table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsedBlock {
    /// Its id in the pool.
    pub id: BlockId,
    /// Its tokens: those of the sequence that holds most of them.
    pub used: usize,
    /// Does it hold the first tokens of its sequences?
    pub is_first: bool,
}

impl Paging {
    /// The sequences not yet freed, by ascending id.
    #[must_use]
    pub fn ids(&self) -> Vec<SequenceId> {
        let mut ids: Vec<SequenceId> = self.sequences.ids().collect();
        ids.sort_unstable();
        ids
    }

    /// The page of a block, `None` if it is sealed.
    #[must_use]
    pub fn page_of(&self, block: BlockId) -> Option<PageId> {
        self.pages.page_of(block)
    }

    /// Its tables, and what each block of them was.
    ///
    /// # Errors
    /// [`Error::OpenStep`].
    pub fn tables(&self) -> Result<(Tables, Vec<UsedBlock>)> {
        let (mut sequences, mut of): (Vec<Table>, Vec<UsedBlock>) = Default::default();
        let mut number: HashMap<BlockId, BlockId> = HashMap::new();
        for id in self.ids() {
            let sequence = self.settled(id)?;
            let mut blocks = sequence.blocks.clone();
            for (index, block) in blocks.iter_mut().enumerate().filter(|(_, block)| **block != BlockId::RELEASED) {
                let new = BlockId(number.len() as u32);
                let used = (sequence.len - index * self.block_size).min(self.block_size);
                let (id, number) = (*block, *number.entry(*block).or_insert(new));
                match of.get_mut(number.0 as usize) {
                    None => of.push(UsedBlock { id, used, is_first: index == 0 }),
                    Some(block) => block.used = used.max(block.used),
                }
                *block = number;
            }
            sequences.push(Table { id, len: sequence.len, first_held: sequence.first_held, blocks });
        }
        let open = of.iter().map(|block| self.page_of(block.id).is_some()).collect();
        Ok((Tables { next_id: self.next_id, sequences, open }, of))
    }

    /// A pool of the sequences of `tables` out of this one, which must be new: block `b` of the tables is block `b`, and
    /// open blocks have the pages 0, 1, ... in order.
    ///
    /// # Errors
    /// [`Error::CacheFile`], naming what no pool has.
    pub fn with_tables(self, tables: Tables) -> Result<Self> {
        self.try_with_tables(tables).map_err(Error::CacheFile)
    }

    fn try_with_tables(mut self, tables: Tables) -> std::result::Result<Self, String> {
        let num_blocks = tables.open.len();
        let num_open = tables.open.iter().filter(|&&open| open).count();
        let bound = self.pool.limit();
        if num_blocks > bound {
            return Err(format!("{num_blocks} blocks in a pool of {bound}"));
        }
        if num_open > self.pages.num_available() {
            return Err(format!("{num_open} open blocks, pages for {}", self.pages.num_available()));
        }
        if tables.next_id > MAX_SEQUENCES {
            return Err(format!("the next sequence would be {}, ids are below {MAX_SEQUENCES}", tables.next_id));
        }
        let num_entries: usize = tables.sequences.iter().map(|table| table.blocks.len()).sum();
        if num_entries >= MAX_ENTRIES {
            return Err(format!("block tables of {num_entries} entries"));
        }
        let mut pool = self.pool.emptied();
        for block in 0..num_blocks as u32 {
            pool.take();
            if tables.open[block as usize] {
                self.pages.open(BlockId(block));
            } else if !self.pages.seals() {
                return Err(format!("block {block} is sealed, in a format that does not seal"));
            }
        }
        for Table { id, len, first_held, blocks } in tables.sequences {
            for &block in blocks.iter().filter(|&&block| block != BlockId::RELEASED) {
                if block.0 as usize >= num_blocks {
                    return Err(format!("sequence {id}: block {block} of {num_blocks}"));
                }
                pool.retain(block);
            }
            let root = self.prefix.root();
            let sequence = Sequence { len, first_held, blocks, ..Sequence::from_chain(1, Vec::new(), root) };
            if id.0 >= tables.next_id {
                return Err(format!("sequence {id}, of which the next would be {}", tables.next_id));
            }
            if self.sequences.contains(id) {
                return Err(format!("sequence {id} a second time"));
            }
            sequence.check(self.block_size).map_err(|broken| format!("sequence {id}: {broken}"))?;
            self.insert_as(id, sequence);
        }
        for block in 0..num_blocks as u32 {
            if pool.refcount(BlockId(block)) == 1 {
                return Err(format!("block {block} is held by no sequence"));
            }
            pool.release(BlockId(block)); // the hold of `take`
        }
        (self.pool, self.next_id) = (pool, tables.next_id);
        self.check()?;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paging::{Rollback, Room, StepRequest};

    /// New blocks that are full are sealed.
    fn step(paging: &mut Paging, sequence: SequenceId, num_new: usize, keep_from: usize) {
        let full = (paging.sequence(sequence).unwrap().len() + num_new) / paging.block_size();
        let sealed_to = if paging.seals() { full } else { 0 };
        paging.room(&[StepRequest { sequence, num_new, keep_from, sealed_to }]).map(Room::begin).unwrap();
        paging.commit(&[sequence]).unwrap();
    }

    /// Two sequences that share a block, after a third that is gone and a window that released one.
    fn shared(empty: Paging) -> Paging {
        let mut paging = empty;
        let gone = paging.new_sequence();
        step(&mut paging, gone, 7, 0);
        let a = paging.new_sequence();
        step(&mut paging, a, 6, 0);
        step(&mut paging, a, 1, 3);
        let b = paging.fork(a).unwrap();
        step(&mut paging, b, 1, 0);
        paging.free(gone).unwrap();
        paging.check().unwrap();
        paging
    }

    #[test]
    fn what_is_kept_is_had_again() {
        let pools = [
            Paging::new(2, None, b""),
            Paging::new(2, Some(12), b""),
            Paging::sealing(2, None, None, b""),
            Paging::sealing(2, Some(12), Some(9), b""),
        ];
        for empty in pools.map(|pool| pool.unwrap()) {
            let before = shared(empty.clone());
            let (tables, of) = before.tables().unwrap();
            let mut after = empty.with_tables(tables.clone()).unwrap();
            assert_eq!(after.tables().unwrap().0, tables, "and so the next time");
            assert_eq!((after.num_sequences(), after.blocks_in_use()), (2, before.blocks_in_use()));
            assert_eq!(after.open_pages().map(|pages| pages.0), before.open_pages().map(|pages| pages.0));
            for (block, was) in of.iter().enumerate() {
                assert_eq!(after.pool.refcount(BlockId(block as u32)), before.pool.refcount(was.id));
            }
            let (a, b) = (SequenceId(1), SequenceId(2));
            assert_eq!(after.sequence(a).unwrap().blocks()[0], BlockId::RELEASED);
            assert_eq!((after.sequence(a).unwrap().len(), after.sequence(b).unwrap().len()), (7, 8));
            assert_eq!(after.new_sequence(), SequenceId(3));
            after.free(a).unwrap();
            after.free(b).unwrap();
            assert_eq!((after.blocks_in_use(), after.check()), (0, Ok(())));
        }
    }

    #[test]
    fn tables_do_not_depend_on_what_became_of_the_pool() {
        let mut fresh = Paging::new(2, None, b"").unwrap();
        let (_, a) = (fresh.new_sequence(), fresh.new_sequence());
        step(&mut fresh, a, 6, 0);
        step(&mut fresh, a, 1, 3);
        let b = fresh.fork(a).unwrap();
        step(&mut fresh, b, 1, 0);
        fresh.free(SequenceId(0)).unwrap();
        let recycled = shared(Paging::new(2, None, b"").unwrap());
        assert_ne!(recycled.sequence(a).unwrap().blocks(), fresh.sequence(a).unwrap().blocks());
        assert_eq!(recycled.tables().unwrap().0, fresh.tables().unwrap().0);
    }

    #[test]
    fn the_tokens_of_a_block_are_those_of_the_holder_with_most() {
        let mut paging = Paging::new(4, None, b"").unwrap();
        let a = paging.new_sequence();
        step(&mut paging, a, 7, 0);
        let b = paging.fork(a).unwrap();
        paging.truncate(Rollback { sequence: a, len: 5, first_seen: 0 }).unwrap();
        assert_eq!(paging.tables().unwrap().1.iter().map(|block| block.used).collect::<Vec<_>>(), [4, 3]);
        paging.free(b).unwrap();
        assert_eq!(paging.tables().unwrap().1[1].used, 1);
    }

    /// A change to tables that are well.
    type Alter = fn(&mut Tables);

    #[test]
    fn what_no_pool_has_is_refused_by_name() {
        let empty = || Paging::sealing(2, Some(12), Some(2), b"").unwrap();
        let (good, _) = shared(Paging::sealing(2, None, None, b"").unwrap()).tables().unwrap();
        empty().with_tables(good.clone()).unwrap();
        let altered: [(Alter, &str); 12] = [
            (|tables| tables.next_id = 2, "sequence 2, of which the next would be 2"),
            (|tables| tables.next_id = u64::MAX, "ids are below"),
            (|tables| tables.sequences[1].id = SequenceId(1), "sequence 1 a second time"),
            (|tables| tables.sequences[0].blocks[1] = BlockId(99), "block 99 of"),
            (|tables| tables.sequences[0].blocks[2] = BlockId::RELEASED, "table entry 2 is released"),
            (|tables| tables.sequences[0].first_held = 0, "first_held 0"),
            (|tables| tables.sequences[0].first_held = 1, "first_held 1"),
            (|tables| tables.sequences[0].len = usize::MAX, "4 blocks of 2 for"),
            (|tables| tables.open[2] = false, "partly filled and sealed"),
            (|tables| tables.open.push(false), "is held by no sequence"),
            (|tables| tables.open.resize(13, false), "13 blocks in a pool of 12"),
            (|tables| tables.open.fill(true), "open blocks, pages for 2"),
        ];
        for (alter, expected) in altered {
            let mut tables = good.clone();
            alter(&mut tables);
            let refused = empty().with_tables(tables).expect_err(expected).to_string();
            assert!(refused.contains(expected), "{refused:?} does not say {expected:?}");
        }
        let unsealed = Paging::new(2, None, b"").unwrap().with_tables(good).expect_err("sealed");
        assert!(unsealed.to_string().contains("a format that does not seal"));
    }
}
