//! Where does each token live? Integers only: block ids, counts and lengths.
//!
//! Token `p` of a sequence is at offset `p % block_size` of block `blocks[p / block_size]`. Sequences may share blocks
//! (after [`fork`](Paging::fork) or [`match_prefix`](Paging::match_prefix)); a block is written by one. A step goes
//!
//! ```text
//! begin   release what left the window, copy the shared open page, take blocks for the new tokens: all or nothing
//!         the backend copies, then writes
//! commit  len += pending, and what the step sealed loses its page   or   abort   the blocks taken for new tokens return, len as before
//! ```
//!
//! Invariants, besides those of the block pool, the prefix index and each sequence:
//!
//! ```text
//! refcount[b]                       =  entries equal to b in all block tables
//! blocks[len / block_size ..]       of a sequence with pending > 0 have refcount 1 and are not published
//! blocks[len / block_size]          is open where len % block_size > 0
//! ```
//!
//! In a pool that seals ([`Paging::sealing`]) a block is *open*, with a page of its own, or *sealed*, without.
//!
//! A *published* block is named by the tokens up to its end ([`publish_prefix`](Paging::publish_prefix)) and is found
//! by them until it is written again. Free blocks stay published until reused. They are reused oldest first, and a
//! table is given back last block first: tails go before heads, which are what makes a prefix findable.

mod block_pool;
mod ids;
mod open_pages;
mod prefix;
mod sequence;
mod step;
mod tables;

use std::collections::{HashMap, HashSet};

use self::block_pool::{BlockPool, MAX_BLOCKS};
use self::open_pages::{OpenPages, PagePool};
use self::prefix::PrefixIndex;
use crate::error::{Error, Result};

pub use ids::{BlockId, PageId, SequenceId};
pub use sequence::Sequence;
pub use step::StepRequest;
pub use tables::{Table, Tables, UsedBlock};

/// The block pool, the sequences over it, and the prefixes found in it.
#[derive(Debug, Clone)]
pub struct Paging {
    block_size: usize,
    pool: BlockPool,
    pages: OpenPages,
    prefix: PrefixIndex,
    sequences: HashMap<SequenceId, Sequence>,
    next_id: u64,
    cow_copies: usize,
}

impl Paging {
    /// An empty pool of blocks of `block_size` tokens: of `num_blocks` blocks, or one that grows as needed.
    ///
    /// Prefixes are found only by a pool with the same `salt`.
    ///
    /// # Errors
    /// [`Error::Config`] when `block_size` is 0 or `num_blocks` is more than ids can name.
    pub fn new(block_size: usize, num_blocks: Option<usize>, salt: &[u8]) -> Result<Self> {
        if block_size == 0 {
            return Err(Error::Config("block_size must be at least 1, got 0".into()));
        }
        if let Some(num_blocks) = num_blocks.filter(|&num_blocks| num_blocks > MAX_BLOCKS) {
            return Err(Error::Config(format!("num_blocks must be at most {MAX_BLOCKS}, got {num_blocks}")));
        }
        Ok(Self {
            block_size,
            pool: BlockPool::new(num_blocks),
            pages: OpenPages::OfEveryBlock,
            prefix: PrefixIndex::new(block_size, salt),
            sequences: HashMap::new(),
            next_id: 0,
            cow_copies: 0,
        })
    }

    /// An empty pool whose blocks seal. Open ones take pages out of `num_open_pages`, or as many as needed.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn sealing(
        block_size: usize,
        num_blocks: Option<usize>,
        num_open_pages: Option<usize>,
        salt: &[u8],
    ) -> Result<Self> {
        if num_open_pages.is_some_and(|pages| pages == 0 || pages > MAX_BLOCKS) {
            let given = num_open_pages.unwrap_or_default();
            return Err(Error::Config(format!("num_open_pages must be in 1..={MAX_BLOCKS}, got {given}")));
        }
        let paging = Self::new(block_size, num_blocks, salt)?;
        Ok(Self { pages: OpenPages::Pool(PagePool::new(num_open_pages)), ..paging })
    }

    /// A sequence of no tokens.
    pub fn new_sequence(&mut self) -> SequenceId {
        let root = self.prefix.root();
        self.insert(Sequence::from_chain(self.block_size, Vec::new(), root))
    }

    fn insert(&mut self, sequence: Sequence) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, sequence);
        id
    }

    /// A second sequence over the same blocks, of the same length and first held token. Takes no block.
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        let sequence = self.settled(id)?.clone();
        for &block in held(&sequence) {
            self.pool.retain(block);
        }
        Ok(self.insert(sequence))
    }

    /// Forgets a sequence; blocks that no other one holds become free.
    pub fn free(&mut self, id: SequenceId) -> Result<()> {
        self.settled(id)?;
        if let Some(sequence) = self.sequences.remove(&id) {
            held(&sequence).iter().rev().for_each(|&block| self.release(block));
        }
        Ok(())
    }

    /// Forgets every sequence, open steps and the prefix index included, and the peak; ids of sequences are not given
    /// out again.
    pub fn clear(&mut self) {
        self.sequences.clear();
        self.pool = BlockPool::new(self.pool.bound());
        self.pages = self.pages.emptied();
        self.prefix.clear();
    }

    /// Rolls a sequence back to its first `len` tokens.
    ///
    /// # Errors
    /// [`Error::RollbackTooFar`] when it has fewer, or when the next query, at position `len`, would see a token
    /// already released: it sees `window` tokens, its own included, or all (`None`). [`Error::Sealed`] when `len` is
    /// within a sealed block. `len` as it is changes nothing.
    pub fn truncate(&mut self, id: SequenceId, len: usize, window: Option<usize>) -> Result<()> {
        self.check_rollback(id, len, window)?;
        if self.sealed_within(id, len)?.is_some() {
            let start = len - len % self.block_size;
            return Err(Error::Sealed { id: id.0, requested: len, start, end: start + self.block_size });
        }
        self.cut(id, len)
    }

    /// The sealed block that position `len` of a sequence lies in the middle of, if there is one.
    pub fn sealed_within(&self, id: SequenceId, len: usize) -> Result<Option<BlockId>> {
        let sequence = self.sequence(id)?;
        if len >= sequence.len || len.is_multiple_of(self.block_size) {
            return Ok(None);
        }
        let block = sequence.blocks[len / self.block_size];
        Ok((block != BlockId::RELEASED && self.pages.page_of(block).is_none()).then_some(block))
    }

    /// Like [`truncate`](Self::truncate) to `len`, and then back to the beginning of the block that `len` is within:
    /// the caller writes the tokens between the two again.
    pub fn reopen(&mut self, id: SequenceId, len: usize, window: Option<usize>) -> Result<()> {
        self.check_rollback(id, len, window)?;
        self.cut(id, len - len % self.block_size)
    }

    fn check_rollback(&self, id: SequenceId, len: usize, window: Option<usize>) -> Result<()> {
        let Sequence { len: committed, first_held: floor, .. } = *self.settled(id)?;
        let first_seen = window.map_or(0, |window| (len.saturating_add(1)).saturating_sub(window)).min(len);
        if len > committed || len < committed && first_seen < floor {
            return Err(Error::RollbackTooFar { id: id.0, requested: len, floor, len: committed });
        }
        Ok(())
    }

    fn cut(&mut self, id: SequenceId, len: usize) -> Result<()> {
        let (block_size, root) = (self.block_size, self.prefix.root());
        let sequence = known(&mut self.sequences, id)?;
        if len == sequence.len {
            return Ok(());
        }
        sequence.len = len;
        if sequence.chained > len / block_size {
            (sequence.chained, sequence.chain) = (0, root);
        }
        self.shrink(id)
    }

    /// Gives back the blocks past the committed tokens, last first.
    fn shrink(&mut self, id: SequenceId) -> Result<()> {
        let sequence = known(&mut self.sequences, id)?;
        let keep = sequence.len.div_ceil(self.block_size);
        let dropped = sequence.blocks.split_off(keep);
        dropped.into_iter().rev().for_each(|block| self.release(block));
        Ok(())
    }

    /// One holder less. A block that nobody holds has no page, so an open one is not found any more.
    fn release(&mut self, block: BlockId) {
        self.pool.release(block);
        if self.pool.refcount(block) == 0 && self.pages.close(block) {
            self.prefix.forget(block);
        }
    }

    /// A new sequence that shares the longest published chain of full blocks of `token_ids`, at most
    /// `token_ids.len() - 1` tokens: a step needs a query. Its length says how many were found.
    pub fn match_prefix(&mut self, token_ids: &[u32]) -> SequenceId {
        let (mut blocks, mut chain) = (Vec::new(), self.prefix.root());
        let candidates = &token_ids[..token_ids.len().saturating_sub(1)];
        for ids in candidates.chunks_exact(self.block_size) {
            let next = PrefixIndex::extend(chain, ids);
            let Some(block) = self.prefix.find(next) else { break };
            self.pool.retain(block);
            blocks.push(block);
            chain = next;
        }
        self.insert(Sequence::from_chain(self.block_size, blocks, chain))
    }

    /// Makes the full committed blocks of a sequence findable by its `token_ids`, and returns how many newly are. A
    /// prefix that is already published keeps its block. Nothing is published of a sequence that released tokens.
    ///
    /// `token_ids` are the ids of the committed tokens; those after them are ignored, and those of blocks matched or
    /// published before are not read again.
    ///
    /// # Errors
    /// [`Error::Config`] when there are fewer ids than committed tokens.
    pub fn publish_prefix(&mut self, id: SequenceId, token_ids: &[u32]) -> Result<usize> {
        let sequence = known(&mut self.sequences, id)?;
        if token_ids.len() < sequence.len {
            return Err(Error::Config(format!(
                "publishing sequence {id} needs the ids of its {} committed tokens, got {}",
                sequence.len,
                token_ids.len()
            )));
        }
        if sequence.first_held > 0 {
            return Ok(0);
        }
        let mut num_published = 0;
        let full = &token_ids[..sequence.len - sequence.len % self.block_size];
        for ids in full.chunks_exact(self.block_size).skip(sequence.chained) {
            sequence.chain = PrefixIndex::extend(sequence.chain, ids);
            let block = sequence.blocks[sequence.chained];
            num_published += usize::from(self.prefix.register(sequence.chain, block));
            sequence.chained += 1;
        }
        Ok(num_published)
    }

    /// The page of each block of a sequence, [`PageId::SEALED`] for tiles and where a window released the block.
    pub fn pages(&self, id: SequenceId) -> Result<Vec<PageId>> {
        let page_of = |&block: &BlockId| match block {
            BlockId::RELEASED => PageId::SEALED,
            block => self.pages.page_of(block).unwrap_or(PageId::SEALED),
        };
        Ok(self.sequence(id)?.blocks.iter().map(page_of).collect())
    }

    /// Where a sequence lives.
    pub fn sequence(&self, id: SequenceId) -> Result<&Sequence> {
        self.sequences.get(&id).ok_or(Error::UnknownSequence { id: id.0 })
    }

    /// A sequence that no step is open on.
    fn settled(&self, id: SequenceId) -> Result<&Sequence> {
        let sequence = self.sequence(id)?;
        if sequence.pending.is_some() { Err(Error::OpenStep { id: id.0 }) } else { Ok(sequence) }
    }

    /// Tokens of a block.
    #[must_use]
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks that the backend must have room for: every id handed out is below it. The size of a bounded pool; of a
    /// growing one, the blocks it has grown to.
    #[must_use]
    pub fn num_blocks(&self) -> usize {
        self.pool.bound().unwrap_or(self.pool.num_known())
    }

    /// Blocks that some sequence holds.
    #[must_use]
    pub fn blocks_in_use(&self) -> usize {
        self.pool.num_held()
    }

    /// The most blocks that were in use at once.
    #[must_use]
    pub fn peak_blocks(&self) -> usize {
        self.pool.peak()
    }

    /// Blocks that a step can take, cached prefixes included; `None` when the pool grows.
    #[must_use]
    pub fn num_free(&self) -> Option<usize> {
        self.pool.bound().map(|bound| bound - self.pool.num_held())
    }

    /// Do blocks seal?
    #[must_use]
    pub fn seals(&self) -> bool {
        self.pages.seals()
    }

    /// Pages of open blocks, and the most that there were at once; `None` where blocks do not seal.
    #[must_use]
    pub fn open_pages(&self) -> Option<(usize, usize)> {
        self.pages.num_open()
    }

    /// Sequences not yet freed.
    #[must_use]
    pub fn num_sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Blocks that are the open page of some sequence. Visits every sequence.
    #[must_use]
    pub fn open_blocks(&self) -> usize {
        self.ends_within().len()
    }

    /// The blocks that some sequence ends within: the next token of it goes there, so they cannot be sealed, though
    /// another sequence may have filled them. Visits every sequence.
    #[must_use]
    pub fn ends_within(&self) -> HashSet<BlockId> {
        self.sequences.values().filter_map(|sequence| sequence.open_page(self.block_size)).collect()
    }

    /// Copy-on-write copies ordered so far.
    #[must_use]
    pub fn cow_copies(&self) -> usize {
        self.cow_copies
    }

    /// Do all invariants hold? Visits everything.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.check().is_ok()
    }

    /// Like [`is_valid`](Self::is_valid), naming an equation that does not hold.
    #[doc(hidden)]
    pub fn check(&self) -> std::result::Result<(), String> {
        let mut holders = vec![0_u32; self.pool.num_known()];
        for (id, sequence) in &self.sequences {
            sequence.check(self.block_size).map_err(|broken| format!("sequence {id}: {broken}"))?;
            for block in held(sequence) {
                let count = holders.get_mut(block.0 as usize);
                *count.ok_or_else(|| format!("sequence {id}: block {block} was never handed out"))? += 1;
            }
        }
        self.pool.check(&holders)?;
        self.pages.check(&holders)?;
        self.prefix.check(self.pool.num_known())?;
        for (id, sequence) in &self.sequences {
            if let Some(block) =
                sequence.open_page(self.block_size).filter(|&block| self.pages.page_of(block).is_none())
            {
                return Err(format!("sequence {id}: block {block} is partly filled and sealed"));
            }
        }
        for (id, sequence) in self.sequences.iter().filter(|(_, s)| s.pending > Some(0)) {
            for &block in &sequence.blocks[sequence.len / self.block_size..] {
                if self.pool.refcount(block) != 1 || self.prefix.contains(block) {
                    return Err(format!("sequence {id} writes block {block}, which is shared or published"));
                }
            }
        }
        Ok(())
    }
}

fn known(sequences: &mut HashMap<SequenceId, Sequence>, id: SequenceId) -> Result<&mut Sequence> {
    sequences.get_mut(&id).ok_or(Error::UnknownSequence { id: id.0 })
}

/// The blocks that a sequence holds, in order.
fn held(sequence: &Sequence) -> &[BlockId] {
    let released = sequence.blocks.iter().take_while(|&&block| block == BlockId::RELEASED).count();
    &sequence.blocks[released..]
}

#[cfg(test)]
mod tests;
