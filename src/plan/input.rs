//! What a plan is made from.

use super::seal::sealed_to;
use crate::error::{Error, Result};
use crate::paging::{BlockId, Place, PlaceKind};

/// One sequence of a step, as its owner's tables say.
#[derive(Debug, Clone, Copy)]
pub struct SequenceInput<'a> {
    /// Its row in the table of places.
    pub row: usize,
    /// Its blocks, those of the new tokens included; entries before `first_held` are not read.
    pub blocks: &'a [BlockId],
    /// The row, at least as long as `blocks`: the page of each block, or its tile, those of new blocks that the step
    /// seals itself included ([`sealed_to`]).
    pub places: &'a [Place],
    /// Blocks before this index are tiles: the search for blocks to seal starts here.
    pub num_tiles: usize,
    /// Tokens before this step.
    pub context_len: usize,
    /// First token still held: 0 unless a sliding window released blocks. A multiple of the block size.
    pub first_held: usize,
    /// One entry a row: is it a token (`true`) or padding?
    pub rows: Rows<'a>,
}

/// Which of a sequence's rows are tokens.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// All of this many.
    All(usize),
    /// Those marked `true`.
    Masked(&'a [bool]),
}

/// Which full blocks of committed tokens a step seals.
#[derive(Clone, Copy)]
pub enum Sealing<'a> {
    /// None: blocks stay pages.
    Never,
    /// Those but the partial ones, that a sequence outside the step ends within.
    FullBlocks {
        /// Is a block partial?
        is_partial: &'a dyn Fn(BlockId) -> bool,
    },
}

impl Rows<'_> {
    /// Rows, padding included.
    #[must_use]
    pub fn num_rows(self) -> usize {
        match self {
            Self::All(count) => count,
            Self::Masked(mask) => mask.len(),
        }
    }

    /// Tokens.
    #[must_use]
    pub fn num_tokens(self) -> usize {
        match self {
            Self::All(count) => count,
            Self::Masked(mask) => mask.iter().filter(|&&real| real).count(),
        }
    }

    pub(super) fn is_token(self, row: usize) -> bool {
        match self {
            Self::All(_) => true,
            Self::Masked(mask) => mask[row],
        }
    }
}

/// Are the tables of a sequence long enough, and do its blocks have pages where tokens are written and only there?
pub(super) fn check(block_size: usize, input: &SequenceInput<'_>, seals: bool) -> Result<()> {
    let &SequenceInput { context_len, first_held, blocks, places, .. } = input;
    let num_new = input.rows.num_tokens();
    if first_held > context_len || !first_held.is_multiple_of(block_size) {
        return Err(Error::Config(format!(
            "first_held {first_held} is no block boundary within the {context_len} tokens before the step"
        )));
    }
    let seq_len = context_len.saturating_add(num_new);
    if i32::try_from(seq_len).is_err() {
        return Err(Error::Config(format!("a sequence cannot be {seq_len} tokens long")));
    }
    let end = seq_len.div_ceil(block_size);
    if blocks.len() < end || places.len() < blocks.len() {
        return Err(Error::Config(format!(
            "{} places for a block table of {} blocks, which has to hold {seq_len} tokens in blocks of {block_size}",
            places.len(),
            blocks.len()
        )));
    }
    let first = if num_new == 0 { end } else { context_len / block_size };
    let at_once =
        if seals { context_len.div_ceil(block_size)..sealed_to(block_size, context_len, num_new) } else { 0..0 };
    for block in first..end {
        let is_tile = places[block].as_page().is_none();
        if is_tile != at_once.contains(&block) {
            let what = if is_tile { "is written and has no page" } else { "is sealed by the step and has a page" };
            return Err(Error::Config(format!("block {block} of a sequence of {seq_len} tokens {what}")));
        }
    }
    for block in first_held / block_size..end {
        if let PlaceKind::Tile(tile) = places[block].kind()
            && tile != blocks[block]
        {
            return Err(Error::Config(format!(
                "block {}, entry {block}, is at the tile of block {tile}",
                blocks[block]
            )));
        }
    }
    Ok(())
}
