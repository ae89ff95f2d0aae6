//! Who holds each block, and which block is taken next?
//!
//! A *known* block has been handed out at least once; known ids are `0..num_known`. Each known block is *held* (by
//! `refcount` entries of block tables) or *free*, and then on the free list, oldest first:
//!
//! ```text
//! refcount[b] = 0          <=>  b is on the free list, once
//! num_held + num_listed     =   num_known
//! num_held                 <=   peak
//! num_known                <=   limit
//! ```
//!
//! A bounded pool takes blocks never used before free ones, so that what free blocks cache lives longest; a growing
//! pool takes free ones first, so that it grows only when it must.

use super::BlockId;

/// End of the free list.
const NONE: u32 = u32::MAX;

/// Most blocks, and most pages, of a pool: places, positions and slots are `i32`.
pub(super) const fn max_blocks(block_size: usize) -> usize {
    i32::MAX as usize / block_size
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    refcount: u32,
    /// Neighbours on the free list; meaningless while held.
    older: u32,
    newer: u32,
}

#[derive(Debug, Clone)]
pub(super) struct BlockPool {
    entries: Vec<Entry>,
    /// `None`: grows as needed.
    bound: Option<usize>,
    /// Most blocks that there can be, bounded or not.
    most: usize,
    oldest: u32,
    newest: u32,
    num_listed: usize,
    peak: usize,
}

impl BlockPool {
    pub(super) fn new(bound: Option<usize>, most: usize) -> Self {
        Self { entries: Vec::new(), bound, most, oldest: NONE, newest: NONE, num_listed: 0, peak: 0 }
    }

    /// An empty pool with the same bound.
    pub(super) fn emptied(&self) -> Self {
        Self::new(self.bound, self.most)
    }

    pub(super) fn bound(&self) -> Option<usize> {
        self.bound
    }

    pub(super) fn limit(&self) -> usize {
        self.bound.unwrap_or(self.most)
    }

    pub(super) fn num_known(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn num_held(&self) -> usize {
        self.entries.len() - self.num_listed
    }

    /// Known blocks that nobody holds.
    pub(super) fn num_listed(&self) -> usize {
        self.num_listed
    }

    pub(super) fn peak(&self) -> usize {
        self.peak
    }

    /// Blocks that [`Self::take`] could still hand out.
    pub(super) fn num_available(&self) -> usize {
        self.limit() - self.num_held()
    }

    pub(super) fn refcount(&self, id: BlockId) -> u32 {
        self.entries[id.0 as usize].refcount
    }

    /// A block with refcount 1, or `None` when all are held.
    pub(super) fn take(&mut self) -> Option<BlockId> {
        let fresh = self.entries.len() < self.limit() && (self.bound.is_some() || self.num_listed == 0);
        if fresh {
            self.entries.push(Entry { refcount: 1, older: NONE, newer: NONE });
            self.peak = self.peak.max(self.num_held());
            return Some(BlockId((self.entries.len() - 1) as u32));
        }
        let id = (self.oldest != NONE).then_some(BlockId(self.oldest))?;
        self.retain(id);
        Some(id)
    }

    /// One more holder; a free block is revived with its contents.
    pub(super) fn retain(&mut self, id: BlockId) {
        if self.refcount(id) == 0 {
            self.unlist(id);
        }
        self.entries[id.0 as usize].refcount += 1;
        self.peak = self.peak.max(self.num_held());
    }

    /// One holder less; the last one's block becomes the newest free one.
    pub(super) fn release(&mut self, id: BlockId) {
        let entry = &mut self.entries[id.0 as usize];
        entry.refcount -= 1;
        if entry.refcount > 0 {
            return;
        }
        (entry.older, entry.newer) = (self.newest, NONE);
        match self.newest {
            NONE => self.oldest = id.0,
            newest => self.entries[newest as usize].newer = id.0,
        }
        self.newest = id.0;
        self.num_listed += 1;
    }

    fn unlist(&mut self, id: BlockId) {
        let Entry { older, newer, .. } = self.entries[id.0 as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.entries[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.entries[newer as usize].older = older,
        }
        self.num_listed -= 1;
    }

    /// Names the equation of the module documentation that does not hold; `holders[b]` counts table entries.
    pub(super) fn check(&self, holders: &[u32]) -> Result<(), String> {
        for (id, (entry, &holders)) in self.entries.iter().zip(holders).enumerate() {
            if entry.refcount != holders {
                return Err(format!("block {id}: refcount {} != {holders} entries in block tables", entry.refcount));
            }
        }
        let (mut listed, mut older, mut id) = (0, NONE, self.oldest);
        while id != NONE {
            let entry = self.entries[id as usize];
            if entry.refcount != 0 || entry.older != older || listed == self.num_listed {
                return Err(format!("free list: block {id} (refcount {}) after {listed} blocks", entry.refcount));
            }
            (listed, older, id) = (listed + 1, id, entry.newer);
        }
        let num_zero = holders.iter().filter(|&&holders| holders == 0).count();
        if listed != self.num_listed || older != self.newest || listed != num_zero {
            return Err(format!(
                "free list: {listed} blocks to {older}, counted {} to {}, {num_zero} blocks have no holder",
                self.num_listed, self.newest
            ));
        }
        if self.num_held() > self.peak || self.num_known() > self.limit() {
            return Err(format!(
                "num_held {} <= peak {} or num_known {} <= limit {} is broken",
                self.num_held(),
                self.peak,
                self.num_known(),
                self.limit()
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_free_block_is_taken_first() {
        let mut pool = BlockPool::new(Some(3), 9);
        let ids: Vec<_> = (0..3).map(|_| pool.take().unwrap()).collect();
        assert_eq!(pool.take(), None);
        for id in [ids[1], ids[2], ids[0]] {
            pool.release(id);
        }
        assert_eq!([pool.take(), pool.take(), pool.take()], [Some(ids[1]), Some(ids[2]), Some(ids[0])]);
    }

    #[test]
    fn a_bounded_pool_takes_unused_blocks_before_free_ones() {
        let mut pool = BlockPool::new(Some(2), 9);
        let first = pool.take().unwrap();
        pool.release(first);
        assert_ne!(pool.take().unwrap(), first);
        assert_eq!(pool.take().unwrap(), first);
    }

    #[test]
    fn a_growing_pool_takes_free_blocks_before_it_grows() {
        let mut pool = BlockPool::new(None, 9);
        let first = pool.take().unwrap();
        pool.release(first);
        assert_eq!(pool.take().unwrap(), first);
        assert_eq!(pool.num_known(), 1);
        assert_ne!(pool.take().unwrap(), first);
    }

    #[test]
    fn a_free_block_is_revived_from_anywhere_on_the_list() {
        for revived in 0..3 {
            let mut pool = BlockPool::new(Some(3), 9);
            let ids: Vec<_> = (0..3).map(|_| pool.take().unwrap()).collect();
            for &id in &ids {
                pool.release(id);
            }
            pool.retain(ids[revived]);
            let mut holders = [0; 3];
            holders[revived] = 1;
            pool.check(&holders).unwrap();
            assert_eq!((pool.num_held(), pool.num_available()), (1, 2));
        }
    }

    #[test]
    fn a_block_is_free_only_after_its_last_holder() {
        let mut pool = BlockPool::new(Some(1), 9);
        let id = pool.take().unwrap();
        pool.retain(id);
        pool.release(id);
        assert_eq!(pool.take(), None);
        pool.release(id);
        assert_eq!(pool.take(), Some(id));
    }
}
