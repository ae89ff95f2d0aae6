//! What a plan is made from.

use crate::error::{Error, Result};
use crate::paging::{BlockId, Place};

/// One sequence of a step, as its owner's tables say.
#[derive(Debug, Clone, Copy)]
pub struct SequenceInput<'a> {
    /// Its row in the table of places.
    pub row: usize,
    /// Its blocks, those of the new tokens included; entries before `first_held` are not read.
    pub blocks: &'a [BlockId],
    /// The row, at least as long as `blocks`: the page of each block, or its tile, those of new blocks that the step
    /// seals itself included ([`sealed_to`](super::sealed_to)).
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

/// Token rows of a step, padding included.
///
/// # Errors
/// [`Error::Config`] for more than rows can be counted by, 2^31 - 1.
pub fn num_rows<'a>(rows: impl Iterator<Item = Rows<'a>>) -> Result<usize> {
    let num_rows = rows.fold(0, |sum: usize, rows| sum.saturating_add(rows.num_rows()));
    match i32::try_from(num_rows) {
        Ok(_) => Ok(num_rows),
        Err(_) => Err(Error::Config(format!("a step of {num_rows} token rows: there can be {}", i32::MAX))),
    }
}
