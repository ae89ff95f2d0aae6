//! What will the next step do? A pure function from block tables and lengths to integers.
//!
//! A *step* appends some tokens to some sequences, in every layer, and lets their queries attend. Its tensors have
//! `num_rows` token rows; a row is a token or padding. For each sequence `s`, with `c = context_lens[s]`:
//!
//! ```text
//! rows of s            query_start_loc[s] .. query_start_loc[s+1]
//! position of a token  c, c+1, .. c+num_new[s]-1 in row order; -1 for padding
//! slot of a token      block_table[position / block_size] * block_size + position % block_size; -1 for padding
//! a query sees         positions max(first_held, position + 1 - window) ..= position
//! ```
//!
//! The same plan serves every layer. Backends execute it and decide nothing: they seal what [`Seal`] names, then write
//! the tokens, then seal the rest, and read each block where [`SequencePlan::page`] says. At commit, they refit what
//! [`PageRefit`] names.

mod open;
mod seal;
mod split;

pub use open::{PageOpen, PageRefit};
pub use seal::{Seal, SealSource, sealed_to};
use seal::{Sealing, check_pages};
pub use split::{SPLIT_TOKENS, Split, splits};

use crate::error::{Error, Result};
use crate::format::first_page_tokens;
use crate::paging::{BlockId, PageId};
use std::collections::HashSet;

/// Most new tokens of a sequence in decode, and in the verification of drafts.
pub const DECODE_TOKENS: usize = 16;

/// Is a step of `num_new` tokens after `context_len` a prefill, whose tokens attend to each other unquantized? In decode
/// they are read from pages like all others, but not from a first page whose statistics are still taken anew.
#[must_use]
pub const fn is_prefill(block_size: usize, context_len: usize, num_new: usize) -> bool {
    num_new > DECODE_TOKENS || context_len < first_page_tokens(block_size)
}

/// One sequence of a step, as its owner's tables say.
#[derive(Debug, Clone, Copy)]
pub struct SequenceInput<'a> {
    /// Blocks of the sequence, those of the new tokens included; entries before `first_held` are not read.
    pub block_table: &'a [BlockId],
    /// The page of each block, [`PageId::SEALED`] for tiles, those of new blocks that the step seals itself included
    /// ([`sealed_to`]). `None` where blocks do not seal: each is the page of its number.
    pub pages: Option<&'a [PageId]>,
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

    fn is_token(self, row: usize) -> bool {
        match self {
            Self::All(_) => true,
            Self::Masked(mask) => mask[row],
        }
    }
}

/// One sequence of a planned step.
#[derive(Debug, Clone)]
pub struct SequencePlan {
    /// Its blocks, those of the new tokens included.
    pub(crate) block_table: Vec<BlockId>,
    /// The page of each block once the step has sealed, [`PageId::SEALED`] for tiles; as long as the block table.
    pub(crate) pages: Vec<PageId>,
    /// Tokens before this step.
    pub(crate) context_len: usize,
    /// First token still held.
    pub(crate) first_held: usize,
    /// Row of each new token, in order.
    pub(crate) token_rows: Vec<u32>,
    is_prefill: bool,
}

impl SequencePlan {
    /// Its blocks, those of the new tokens included.
    #[must_use]
    pub fn block_table(&self) -> &[BlockId] {
        &self.block_table
    }

    /// The page of each block, [`PageId::SEALED`] for tiles.
    #[must_use]
    pub fn pages(&self) -> &[PageId] {
        &self.pages
    }

    /// The page of a block of its table, `None` for a tile.
    #[must_use]
    pub fn page(&self, block: usize) -> Option<PageId> {
        self.pages.get(block).copied().filter(|&page| page != PageId::SEALED)
    }

    /// New tokens of this step.
    #[must_use]
    pub fn num_new(&self) -> usize {
        self.token_rows.len()
    }

    /// Tokens after this step.
    #[must_use]
    pub fn seq_len(&self) -> usize {
        self.context_len + self.num_new()
    }

    /// Is this step a prefill of the sequence ([`is_prefill`])?
    #[must_use]
    pub fn is_prefill(&self) -> bool {
        self.is_prefill
    }

    /// The positions that the query at `position` sees, as a half-open range.
    #[must_use]
    pub fn visible(&self, position: usize, window: Option<usize>) -> (usize, usize) {
        let end = position + 1;
        let start = window.map_or(0, |window| end.saturating_sub(window));
        (start.max(self.first_held), end)
    }
}

/// The integers of one step. Made by [`StepPlan::new`] only, whose checks backends rely on.
#[derive(Debug, Clone)]
pub struct StepPlan {
    /// Tokens of a block.
    pub(crate) block_size: usize,
    /// Token rows of the step's tensors, padding included.
    pub(crate) num_rows: usize,
    /// First row of each sequence, and `num_rows` last.
    pub(crate) query_start_loc: Vec<usize>,
    /// Slot of each row; -1 for padding.
    pub(crate) slot_mapping: Vec<i64>,
    /// The sequences.
    pub(crate) sequences: Vec<SequencePlan>,
    /// The pages that this step opens, and where their statistics come from.
    pub(crate) opens: Vec<PageOpen>,
    /// The first pages whose statistics are taken anew when the step is committed.
    pub(crate) refits: Vec<PageRefit>,
    /// The blocks that this step seals: those of committed tokens, then those of its own, sequence by sequence.
    pub(crate) seals: Vec<Seal>,
    /// The largest block id that the step reads or writes.
    pub(crate) max_block: Option<BlockId>,
    /// The largest page that the step reads or writes.
    pub(crate) max_page: Option<PageId>,
}

impl StepPlan {
    /// Plans a step over `inputs`.
    ///
    /// # Errors
    /// [`Error::Config`] when a block table is too short for its tokens, when `first_held` is no block boundary before
    /// the step, when pages are missing or too many, or when two sequences would write the same block.
    pub fn new(block_size: usize, inputs: &[SequenceInput<'_>]) -> Result<Self> {
        Self::keeping_open(block_size, inputs, HashSet::new())
    }

    /// Like [`new`](Self::new), but the blocks `partly_used` are not sealed: sequences outside the step end within them.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn keeping_open(
        block_size: usize,
        inputs: &[SequenceInput<'_>],
        partly_used: HashSet<BlockId>,
    ) -> Result<Self> {
        if block_size == 0 {
            return Err(Error::Config("a block holds at least one token, got block_size 0".to_owned()));
        }
        let mut plan = Self {
            block_size,
            num_rows: 0,
            query_start_loc: vec![0],
            slot_mapping: Vec::new(),
            sequences: Vec::with_capacity(inputs.len()),
            opens: Vec::new(),
            refits: Vec::new(),
            seals: Vec::new(),
            max_block: None,
            max_page: None,
        };
        let mut sealing = Sealing { partly_used, taken: HashSet::new() };
        for input in inputs {
            let (context_len, first_held) = (input.context_len, input.first_held);
            if first_held > context_len || !first_held.is_multiple_of(block_size) {
                return Err(Error::Config(format!(
                    "first_held {first_held} is no block boundary within the {context_len} tokens before the step"
                )));
            }
            let seq_len = context_len.saturating_add(input.rows.num_tokens());
            let needed = seq_len.div_ceil(block_size);
            if input.block_table.len() < needed {
                return Err(Error::Config(format!(
                    "a block table of {} blocks cannot hold {seq_len} tokens in blocks of {block_size}",
                    input.block_table.len()
                )));
            }
            if let Some(pages) = input.pages {
                check_pages(block_size, input, pages, seq_len)?;
            }
            plan.push(input, &mut sealing);
        }
        plan.check_written_blocks()?;
        Ok(plan)
    }

    /// Token rows of the step's tensors, padding included.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// First row of each sequence, and `num_rows` last.
    #[must_use]
    pub fn query_start_loc(&self) -> &[usize] {
        &self.query_start_loc
    }

    /// Slot of each row; -1 for padding.
    #[must_use]
    pub fn slot_mapping(&self) -> &[i64] {
        &self.slot_mapping
    }

    /// The sequences.
    #[must_use]
    pub fn sequences(&self) -> &[SequencePlan] {
        &self.sequences
    }

    /// The blocks that the step seals.
    #[must_use]
    pub fn seals(&self) -> &[Seal] {
        &self.seals
    }

    fn push(&mut self, input: &SequenceInput<'_>, sealing: &mut Sealing) {
        let mut token_rows = Vec::with_capacity(input.rows.num_tokens());
        for row in 0..input.rows.num_rows() {
            if !input.rows.is_token(row) {
                self.slot_mapping.push(-1);
                continue;
            }
            let position = input.context_len + token_rows.len();
            let block = input.block_table[position / self.block_size].0 as usize;
            self.slot_mapping.push((block * self.block_size + position % self.block_size) as i64);
            token_rows.push((self.num_rows + row) as u32);
        }
        let seq_len = input.context_len + token_rows.len();
        let held = input.first_held / self.block_size..seq_len.div_ceil(self.block_size);
        let own_page = |block: &BlockId| PageId(block.0);
        let pages = input.pages.map_or_else(|| input.block_table.iter().map(own_page).collect(), <[PageId]>::to_vec);
        let pages_held = pages.get(held.clone()).unwrap_or_default().iter().filter(|&&page| page != PageId::SEALED);
        self.max_page = self.max_page.max(pages_held.max().copied());
        self.max_block = self.max_block.max(input.block_table.get(held).and_then(|held| held.iter().copied().max()));
        self.num_rows += input.rows.num_rows();
        self.query_start_loc.push(self.num_rows);
        let mut sequence = SequencePlan {
            block_table: input.block_table.to_vec(),
            pages,
            context_len: input.context_len,
            first_held: input.first_held,
            is_prefill: is_prefill(self.block_size, input.context_len, token_rows.len()),
            token_rows,
        };
        let index = self.sequences.len();
        if input.pages.is_some() {
            seal::plan_seals(self.block_size, index, &mut sequence, sealing, &mut self.seals);
        }
        open::plan_opens(self.block_size, index, &sequence, &mut self.opens);
        self.refits.extend(open::plan_refit(self.block_size, index, &sequence));
        self.sequences.push(sequence);
    }

    /// (sequence, index in its block table) of every block that this step writes.
    pub fn written_blocks(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.sequences.iter().enumerate().flat_map(move |(index, sequence)| {
            let first = sequence.context_len / self.block_size;
            let end = if sequence.num_new() == 0 { first } else { sequence.seq_len().div_ceil(self.block_size) };
            (first..end).map(move |block| (index, block))
        })
    }

    /// Each written block is written through one sequence, and each written page is of one block: what lets backends
    /// write blocks in parallel.
    fn check_written_blocks(&self) -> Result<()> {
        let mut written: Vec<BlockId> =
            self.written_blocks().map(|(s, block)| self.sequences[s].block_table[block]).collect();
        written.sort_unstable();
        if let Some(block) = repeated(&written) {
            return Err(Error::Config(format!("block {block} would be written through two sequences")));
        }
        let page_of = |(sequence, block): (usize, usize)| self.sequences[sequence].page(block);
        let mut pages: Vec<PageId> = self.written_blocks().filter_map(page_of).collect();
        pages.sort_unstable();
        match repeated(&pages) {
            Some(PageId(page)) => Err(Error::Config(format!("page {page} would be written for two blocks"))),
            None => Ok(()),
        }
    }
}

/// The first that is there twice, of those in order.
fn repeated<T: PartialEq>(sorted: &[T]) -> Option<&T> {
    sorted.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| &pair[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ids: &[u32]) -> Vec<BlockId> {
        ids.iter().copied().map(BlockId).collect()
    }

    #[test]
    fn padding_has_no_slot_and_takes_no_position() {
        let table = ids(&[7, 2]);
        let mask = [false, true, true];
        let input = SequenceInput {
            block_table: &table,
            pages: None,
            context_len: 15,
            first_held: 0,
            rows: Rows::Masked(&mask),
        };
        let plan = StepPlan::new(16, &[input]).unwrap();
        assert_eq!(plan.slot_mapping, [-1, 7 * 16 + 15, 2 * 16]);
        assert_eq!((plan.num_rows, plan.sequences[0].num_new()), (3, 2));
    }

    #[test]
    fn a_query_sees_its_window_and_nothing_released() {
        let table = ids(&[0, 1, 2]);
        let input =
            SequenceInput { block_table: &table, pages: None, context_len: 40, first_held: 16, rows: Rows::All(1) };
        let sequence = &StepPlan::new(16, &[input]).unwrap().sequences[0];
        assert_eq!(sequence.visible(40, None), (16, 41));
        assert_eq!(sequence.visible(40, Some(8)), (33, 41));
    }

    #[test]
    fn two_sequences_cannot_write_one_block() {
        let table = ids(&[3]);
        let input =
            SequenceInput { block_table: &table, pages: None, context_len: 0, first_held: 0, rows: Rows::All(1) };
        assert!(matches!(StepPlan::new(16, &[input, input]), Err(Error::Config(_))));
    }

    #[test]
    fn two_blocks_cannot_write_one_page() {
        let (first, second) = (ids(&[0]), ids(&[1]));
        let pages = [PageId(0)];
        let input = |block_table, pages| SequenceInput {
            block_table,
            pages: Some(pages),
            context_len: 0,
            first_held: 0,
            rows: Rows::All(1),
        };
        let inputs = [input(&first[..], &pages[..]), input(&second[..], &pages[..])];
        assert!(matches!(StepPlan::new(16, &inputs), Err(Error::Config(_))));
        let (table, pages) = (ids(&[0, 1]), [PageId(0), PageId(0)]);
        let one = SequenceInput { rows: Rows::All(17), context_len: 15, ..input(&table, &pages) };
        assert!(matches!(StepPlan::new(16, &[one]), Err(Error::Config(_))));
    }

    #[test]
    fn a_short_block_table_is_refused() {
        let table = ids(&[3]);
        let input =
            SequenceInput { block_table: &table, pages: None, context_len: 10, first_held: 0, rows: Rows::All(7) };
        assert!(matches!(StepPlan::new(16, &[input]), Err(Error::Config(_))));
    }
}
