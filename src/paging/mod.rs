//! Where does each token live? Integers only: block ids, counts and lengths.
//!
//! Token `p` of a sequence is at offset `p % block_size` of block `blocks[p / block_size]`. Sequences may share blocks
//! (after [`fork`](Paging::fork) or [`match_prefix`](Paging::match_prefix)); a block is written by one. A step goes
//!
//! ```text
//! room     count what the step needs; nothing has changed if it is not there
//! begin    release what left the window, copy shared blocks that will be written, take blocks for the new tokens
//!          the backend copies and grows, then seals and writes
//! commit   len += pending; blocks that the step has sealed lose their pages
//! abort    the blocks taken for new tokens return; len as before
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
mod check;
mod ids;
mod open_pages;
mod partial;
mod place;
mod prefix;
mod rollback;
mod room;
mod sequence;
mod sequences;
mod step;
mod tables;

use self::block_pool::{BlockPool, max_blocks};
use self::open_pages::{OpenPages, PagePool};
use self::partial::PartialBlocks;
use self::place::PlaceTable;
use self::prefix::PrefixIndex;
use self::sequences::Sequences;
use crate::error::{Error, Result};

pub use ids::{BlockId, PageId, SequenceId};
pub use place::{Place, PlaceChange, PlaceChanges, PlaceKind, Places};
pub use rollback::Rollback;
pub use room::{Room, StepRequest};
pub use sequence::Sequence;
pub use tables::{Table, Tables, UsedBlock};

/// The block pool, the sequences over it, and the prefixes found in it.
#[derive(Debug, Clone)]
pub struct Paging {
    block_size: usize,
    pool: BlockPool,
    pages: OpenPages,
    prefix: PrefixIndex,
    partial: PartialBlocks,
    sequences: Sequences,
    places: PlaceTable,
    next_id: u64,
    cow_copies: usize,
}

impl Paging {
    /// An empty pool of blocks of `block_size` tokens: of `num_blocks` blocks, or one that grows as needed.
    ///
    /// Prefixes are found only by a pool with the same `salt`.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] when `block_size` is 0 or `num_blocks` is more than ids can name.
    pub fn new(block_size: usize, num_blocks: Option<usize>, salt: &[u8]) -> Result<Self> {
        if block_size == 0 {
            return Err(Error::setting("block_size", "at least 1", &block_size));
        }
        let most = max_blocks(block_size);
        if let Some(num_blocks) = num_blocks.filter(|&num_blocks| num_blocks > most) {
            return Err(Error::setting("num_blocks", format!("at most {most}"), &num_blocks));
        }
        Ok(Self {
            block_size,
            pool: BlockPool::new(num_blocks, most),
            pages: OpenPages::OfEveryBlock,
            prefix: PrefixIndex::new(block_size, salt),
            partial: PartialBlocks::default(),
            sequences: Sequences::default(),
            places: PlaceTable::default(),
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
        let paging = Self::new(block_size, num_blocks, salt)?;
        let most = max_blocks(block_size);
        if let Some(given) = num_open_pages.filter(|&pages| pages == 0 || pages > most) {
            return Err(Error::setting("num_open_pages", format!("in 1..={most}"), &given));
        }
        Ok(Self { pages: OpenPages::Pool(PagePool::new(num_open_pages, most)), ..paging })
    }

    /// A sequence of no tokens.
    pub fn new_sequence(&mut self) -> SequenceId {
        let root = self.prefix.root();
        self.insert(Sequence::from_chain(self.block_size, Vec::new(), root))
    }

    fn insert(&mut self, sequence: Sequence) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.insert_as(id, sequence);
        id
    }

    fn insert_as(&mut self, id: SequenceId, sequence: Sequence) {
        self.partial.add(sequence.partial_block(self.block_size));
        let row = self.sequences.insert(id, sequence);
        let num_rows = self.sequences.rows().len();
        let sequence = self.sequences.at_mut(row);
        self.places.reserve(num_rows, sequence.blocks.len());
        for index in sequence.first_held / self.block_size..sequence.blocks.len() {
            self.places.set(row, index, self.pages.place_of(sequence.blocks[index]));
        }
        sequence.pass_tiles(self.block_size, &self.pages);
    }

    /// A second sequence over the same blocks, of the same length and first held token. Takes no block.
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        let sequence = Sequence { owns_partial_block: false, ..self.settled(id)?.clone() };
        for &block in held(&sequence) {
            self.pool.retain(block);
        }
        let row = self.sequences.row(id)?;
        self.sequences.at_mut(row).owns_partial_block = false;
        Ok(self.insert(sequence))
    }

    /// Forgets a sequence; blocks that no other one holds become free.
    pub fn free(&mut self, id: SequenceId) -> Result<()> {
        self.settled(id)?;
        let sequence = self.sequences.remove(id)?;
        self.partial.remove(sequence.partial_block(self.block_size));
        held(&sequence).iter().rev().for_each(|&block| self.release(block));
        Ok(())
    }

    /// Forgets every sequence, open steps and the prefix index included, and the peak; ids of sequences are not given
    /// out again.
    pub fn clear(&mut self) {
        self.sequences = Sequences::default();
        self.partial = PartialBlocks::default();
        self.pool = self.pool.emptied();
        self.pages = self.pages.emptied();
        self.prefix.clear();
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
        let row = self.sequences.row(id)?;
        let sequence = self.sequences.at_mut(row);
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

    /// The table of places: the row of a sequence, [`row`](Self::row), says where each block that it holds is read.
    ///
    /// A full block that a sequence's open step seals is its tile there; everywhere else it is its page until the step
    /// is committed.
    #[must_use]
    pub fn places(&self) -> Places<'_> {
        self.places.view()
    }

    /// What has changed in the table of places since the last call.
    pub fn take_place_changes(&mut self) -> PlaceChanges {
        self.places.take_changes()
    }

    /// A sequence's row in the table of places, from its creation until it is freed.
    pub fn row(&self, id: SequenceId) -> Result<usize> {
        self.sequences.row(id)
    }

    /// The sequence of a row; an empty one if the row is nobody's.
    ///
    /// # Panics
    /// For a row that no sequence ever had.
    #[must_use]
    pub fn at(&self, row: usize) -> &Sequence {
        self.sequences.at(row)
    }

    /// Where each block of a sequence is once the open steps have been aborted; entries of released blocks are stale.
    pub fn committed_places(&self, id: SequenceId) -> Result<Vec<Place>> {
        let row = self.sequences.row(id)?;
        let sequence = self.sequences.at(row);
        let mut places = self.places.view().row(row)[..sequence.blocks.len()].to_vec();
        for &index in &sequence.sealing {
            places[index] = self.pages.place_of(sequence.blocks[index]);
        }
        Ok(places)
    }

    /// Where a sequence lives.
    pub fn sequence(&self, id: SequenceId) -> Result<&Sequence> {
        Ok(self.sequences.at(self.sequences.row(id)?))
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

    /// Blocks that some sequence ends within.
    #[must_use]
    pub fn partial_blocks(&self) -> usize {
        self.partial.len()
    }

    /// Does a sequence end within the block? Its next token goes there, so the block cannot be sealed, though another
    /// sequence may have filled it.
    #[must_use]
    pub fn is_partial(&self, block: BlockId) -> bool {
        self.partial.contains(block)
    }

    /// Copy-on-write copies ordered so far.
    #[must_use]
    pub fn cow_copies(&self) -> usize {
        self.cow_copies
    }
}

/// The blocks that a sequence holds, in order.
fn held(sequence: &Sequence) -> &[BlockId] {
    let released = sequence.blocks.iter().take_while(|&&block| block == BlockId::RELEASED).count();
    &sequence.blocks[released..]
}

#[cfg(test)]
mod tests;
