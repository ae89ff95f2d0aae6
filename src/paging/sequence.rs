//! Which blocks hold the tokens of one sequence?
//!
//! ```text
//! end               =  len + pending (0 outside a step)
//! blocks.len()      =  ceil(end / block_size)
//! first_held        =  0 mod block_size,  first_held <= len
//! blocks[i]         =  RELEASED  <=>  i < first_held / block_size
//! chained           <= len / block_size
//! num_tiles         <= len / block_size,  blocks[i] is sealed for first_held / block_size <= i < num_tiles
//! sealing           indices of full blocks that still have a page
//! ```
//!
//! The *partial block* of a sequence is its last one where `len % block_size > 0`: the one block that the next step
//! writes into without taking it first.

use super::BlockId;
use super::open_pages::OpenPages;
use super::prefix::Chain;

/// Where one sequence lives.
#[derive(Debug, Clone)]
pub struct Sequence {
    pub(super) len: usize,
    pub(super) first_held: usize,
    pub(super) blocks: Vec<BlockId>,
    pub(super) pending: Option<usize>,
    /// Blocks before this index have been sealed: the search for blocks to seal starts here.
    pub(super) num_tiles: usize,
    /// The blocks that the open step seals from their pages.
    pub(super) sealing: Vec<usize>,
    /// No other sequence holds the partial block, and it is not published, as far as is known: where this is set a step does
    /// not look it up.
    pub(super) owns_partial_block: bool,
    /// The full blocks whose chain hash is known, and the last of those hashes: publishing goes on from there.
    pub(super) chained: usize,
    pub(super) chain: Chain,
}

impl Sequence {
    /// A sequence that holds `blocks`, all full and all hashed into `chain`.
    pub(super) fn from_chain(block_size: usize, blocks: Vec<BlockId>, chain: Chain) -> Self {
        Self {
            len: blocks.len() * block_size,
            first_held: 0,
            chained: blocks.len(),
            blocks,
            pending: None,
            num_tiles: 0,
            sealing: Vec::new(),
            owns_partial_block: false,
            chain,
        }
    }

    /// Committed tokens, those that a window released included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Has nothing been committed?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// First token still held: earlier blocks were released. A multiple of the block size.
    #[must_use]
    pub fn first_held(&self) -> usize {
        self.first_held
    }

    /// The block table, those of an open step's tokens included; [`BlockId::RELEASED`] before
    /// [`first_held`](Self::first_held).
    #[must_use]
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Tokens of the open step, `None` outside a step.
    #[must_use]
    pub fn pending(&self) -> Option<usize> {
        self.pending
    }

    /// Blocks before this index are sealed; whether later ones are, the table of places says.
    #[must_use]
    pub fn num_tiles(&self) -> usize {
        self.num_tiles
    }

    /// The partly filled block of committed tokens.
    pub(super) fn partial_block(&self, block_size: usize) -> Option<BlockId> {
        (!self.len.is_multiple_of(block_size)).then(|| self.blocks[self.len / block_size])
    }

    /// Counts the sealed blocks on, as far as they go.
    pub(super) fn pass_tiles(&mut self, block_size: usize, pages: &OpenPages) {
        self.num_tiles = self.num_tiles.max(self.first_held / block_size);
        let full = &self.blocks[..self.len / block_size];
        self.num_tiles += full[self.num_tiles..].iter().take_while(|&&block| pages.page_of(block).is_none()).count();
    }

    /// The first token held once those before `keep_from` may go: whole blocks of committed tokens only.
    pub(super) fn first_held_from(&self, block_size: usize, keep_from: usize) -> usize {
        let keep_from = keep_from.min(self.len);
        self.first_held.max(keep_from - keep_from % block_size)
    }

    /// Names the broken equation of the module documentation.
    pub(super) fn check(&self, block_size: usize) -> Result<(), String> {
        let end = self.len + self.pending.unwrap_or(0);
        if self.blocks.len() != end.div_ceil(block_size) {
            return Err(format!("{} blocks of {block_size} for {end} tokens", self.blocks.len()));
        }
        if !self.first_held.is_multiple_of(block_size) || self.first_held > self.len {
            return Err(format!("first_held {} of {} tokens", self.first_held, self.len));
        }
        let released = self.first_held / block_size;
        if let Some(i) = (0..self.blocks.len()).find(|&i| (self.blocks[i] == BlockId::RELEASED) != (i < released)) {
            return Err(format!("table entry {i} is {}, first_held {}", self.blocks[i], self.first_held));
        }
        if self.chained > self.len / block_size {
            return Err(format!("{} hashed blocks for {} tokens", self.chained, self.len));
        }
        let num_full = self.len / block_size;
        if self.num_tiles > num_full || self.sealing.iter().any(|&index| index >= num_full || index < released) {
            return Err(format!("{} tiles, {:?} being sealed, {num_full} full blocks", self.num_tiles, self.sealing));
        }
        Ok(())
    }
}
