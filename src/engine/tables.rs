//! The tables of a step, as a serving engine has them.

use crate::error::{Error, Result};
use crate::paging::BlockId;

/// What a step does to which sequences: arrays of `i32` as vLLM has them.
#[derive(Debug, Clone, Copy)]
pub struct Tables<'a> {
    /// `[num_sequences, width]`, rows `stride` entries apart: the blocks of each sequence by position. Entries beyond its
    /// tokens are not read, nor those that a window hides.
    pub block_tables: &'a [i32],
    /// Blocks that a row has room for.
    pub width: usize,
    /// Entries from one row to the next.
    pub stride: usize,
    /// `[num_sequences]`: tokens before the step.
    pub context_lens: &'a [i32],
    /// `[num_sequences + 1]`: first row of each sequence's new tokens, and the number of all rows last.
    pub query_start_loc: &'a [i32],
    /// Are the tokens before the step final, so that their full blocks may be sealed? Not while some are drafts.
    pub seals: bool,
}

impl Tables<'_> {
    /// Sequences of the step.
    #[must_use]
    pub fn num_sequences(&self) -> usize {
        self.context_lens.len()
    }

    /// Do the arrays fit each other?
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Config`], naming the array and its numbers.
    pub fn check(&self) -> Result<()> {
        let num_sequences = self.num_sequences();
        let before_last = num_sequences.saturating_sub(1).checked_mul(self.stride);
        let len = before_last.and_then(|before| before.checked_add(if num_sequences > 0 { self.width } else { 0 }));
        if self.width > self.stride || len.is_none_or(|len| len > self.block_tables.len()) {
            let expected = format!("[{num_sequences}, {}] with rows {} apart", self.width, self.stride);
            return Err(Error::Shape { name: "block_tables", expected, got: vec![self.block_tables.len()] });
        }
        if self.query_start_loc.len() != num_sequences + 1 {
            let (expected, got) = (format!("[{}]", num_sequences + 1), vec![self.query_start_loc.len()]);
            return Err(Error::Shape { name: "query_start_loc", expected, got });
        }
        if let Some(sequence) = self.context_lens.iter().position(|&len| len < 0) {
            let len = self.context_lens[sequence];
            return Err(Error::Config(format!("context_lens: {len} tokens of sequence {sequence}")));
        }
        let falls = self.query_start_loc.windows(2).position(|pair| pair[0] > pair[1]);
        if self.query_start_loc[0] != 0 || falls.is_some() {
            let at = falls.unwrap_or_default();
            let found = &self.query_start_loc[at..(at + 2).min(self.query_start_loc.len())];
            return Err(Error::Config(format!("query_start_loc begins at 0 and does not fall, got {found:?} at {at}")));
        }
        Ok(())
    }

    pub(super) fn context_len(&self, sequence: usize) -> usize {
        self.context_lens[sequence] as usize
    }

    pub(super) fn num_new(&self, sequence: usize) -> usize {
        (self.query_start_loc[sequence + 1] - self.query_start_loc[sequence]) as usize
    }

    /// The blocks of a sequence from index `first` to `end`; those before are not looked at.
    pub(super) fn blocks(&self, sequence: usize, first: usize, end: usize, num_blocks: usize) -> Result<Vec<BlockId>> {
        if end > self.width {
            let width = self.width;
            return Err(Error::Config(format!("sequence {sequence} needs {end} blocks, its table has {width}")));
        }
        let row = &self.block_tables[sequence * self.stride..][..end];
        let block = |(index, &id): (usize, &i32)| match usize::try_from(id) {
            _ if index < first => Ok(BlockId::RELEASED),
            Ok(id) if id < num_blocks => Ok(BlockId(id as u32)),
            Ok(_) => Err(Error::UnknownBlock { id: id as u32, num_blocks }),
            Err(_) => Err(Error::Config(format!("block_tables: {id} for block {index} of sequence {sequence}"))),
        };
        row.iter().enumerate().map(block).collect()
    }
}
