//! Pages that a step opens, and the tokens that their channel statistics are taken over.
//!
//! A page is opened by the step that writes its first token, with the statistics of its own rows where the step writes
//! them all, else of the `STATISTICS_TOKENS` before it, else (the first page that is held) of as many of its own rows as
//! the step brings. Positions older than the step are read back from their pages; those of the step itself are taken
//! as given, so that no page waits for another one to be written.
//!
//! Of a prefix that the step itself writes, for another sequence, the statistics are that sequence's.
//!
//! The statistics stay, but in a sequence's first page until half of it is written. A step that ends within the first
//! half has the page refitted at commit, from the low bytes of K's codes. One that ends beyond, and would write over low
//! bytes, opens the page anew. Both depend on the lengths before and after the step only.

use super::{SequenceInput, StepPlan};
use crate::format::{STATISTICS_TOKENS, first_page_tokens};
use crate::paging::BlockId;
use std::collections::HashMap;

/// A page opened by a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageOpen {
    /// Index of the sequence in the step.
    pub sequence: usize,
    /// Index in its block table.
    pub block: usize,
    /// First position that its channel statistics are taken over.
    pub start: usize,
    /// One past the last of them; there is at least one.
    pub end: usize,
    /// The sequence whose tokens these are: another one, if the step writes them for it and this one reads them as its
    /// prefix.
    pub of: usize,
}

impl PageOpen {
    /// Are the statistics taken over tokens from before the step alone?
    #[must_use]
    pub const fn is_of_stored(&self, context_len: usize) -> bool {
        self.end <= context_len
    }

    /// Has the page tokens already, `context_len` in its sequence, whose K is encoded anew?
    #[must_use]
    pub const fn is_again(&self, context_len: usize) -> bool {
        self.block == 0 && context_len > 0
    }
}

/// The first page of a sequence, whose statistics are taken anew when the step is committed: those of so few rows as it
/// was opened with say little of the rows that follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRefit {
    /// Index of the sequence in the step; the page is that of its first block.
    pub sequence: usize,
    /// Tokens of the page by then: what the statistics are taken over.
    pub num_tokens: usize,
}

/// Refits of more than this many tokens are due every [`REFIT_STRIDE`] tokens, of fewer at each.
const REFIT_EACH: usize = 8;
const REFIT_STRIDE: usize = 4;

impl PageOpen {
    pub(super) fn from_words(words: [i32; 5]) -> Self {
        let [sequence, block, start, end, of] = words.map(|word| word as usize);
        Self { sequence, block, start, end, of }
    }

    pub(super) fn words(self) -> [i32; 5] {
        [self.sequence, self.block, self.start, self.end, self.of].map(|word| word as i32)
    }
}

impl PageRefit {
    pub(super) fn from_words([sequence, num_tokens]: [i32; 2]) -> Self {
        Self { sequence: sequence as usize, num_tokens: num_tokens as usize }
    }

    pub(super) fn words(self) -> [i32; 2] {
        [self.sequence as i32, self.num_tokens as i32]
    }
}

/// Does the first page have tokens, and fewer than half of it?
fn is_short(block_size: usize, input: &SequenceInput<'_>) -> bool {
    (1..first_page_tokens(block_size)).contains(&input.context_len)
        && input.first_held == 0
        && input.places[0].as_page().is_some()
}

pub(super) fn plan_refit(
    block_size: usize,
    index: usize,
    input: &SequenceInput<'_>,
    num_new: usize,
) -> Option<PageRefit> {
    let (context_len, num_tokens) = (input.context_len, input.context_len + num_new);
    let is_due = if num_tokens <= REFIT_EACH {
        num_tokens > context_len
    } else {
        num_tokens / REFIT_STRIDE > context_len / REFIT_STRIDE
    };
    let is_within = num_tokens <= first_page_tokens(block_size);
    (is_due && is_within && is_short(block_size, input)).then_some(PageRefit { sequence: index, num_tokens })
}

/// A block that the step seals itself has no page to open.
pub(super) fn plan_opens<'a>(
    block_size: usize,
    index: usize,
    input: &'a SequenceInput<'_>,
    num_new: usize,
) -> impl Iterator<Item = PageOpen> + 'a {
    let (context_len, seq_len) = (input.context_len, input.context_len + num_new);
    let new = context_len.div_ceil(block_size)..seq_len.div_ceil(block_size);
    let crosses = seq_len > first_page_tokens(block_size) && is_short(block_size, input);
    let again =
        crosses.then_some(PageOpen { sequence: index, block: 0, start: 0, end: seq_len.min(block_size), of: index });
    let new = new.filter(|&block| input.places[block].as_page().is_some()).map(move |block| {
        let first = block * block_size;
        let own_end = seq_len.min(first + block_size);
        let window_start = first.saturating_sub(STATISTICS_TOKENS).max(input.first_held.min(first));
        let is_written_whole = own_end - first == block_size;
        let (start, end) =
            if is_written_whole || window_start == first { (first, own_end) } else { (window_start, first) };
        PageOpen { sequence: index, block, start, end, of: index }
    });
    again.into_iter().chain(new)
}

/// The blocks that a step writes, and for which of its sequences.
#[derive(Default)]
pub(super) struct Writers<'a> {
    inputs: &'a [SequenceInput<'a>],
    of_block: HashMap<BlockId, usize>,
}

impl<'a> Writers<'a> {
    pub(super) fn new(block_size: usize, inputs: &'a [SequenceInput<'a>]) -> Self {
        let written = |(index, input): (usize, &'a SequenceInput<'a>)| {
            let (context_len, seq_len) = (input.context_len, input.context_len + input.rows.num_tokens());
            let blocks =
                if seq_len > context_len { context_len / block_size..seq_len.div_ceil(block_size) } else { 0..0 };
            input.blocks[blocks].iter().map(move |&block| (block, index))
        };
        Self { inputs, of_block: inputs.iter().enumerate().flat_map(written).collect() }
    }

    /// The same page, with the statistics of tokens that another sequence of the step writes, where they are.
    pub(super) fn redirect(&self, block_size: usize, open: PageOpen) -> PageOpen {
        let Some(reader) = self.inputs.get(open.sequence).filter(|reader| open.end <= reader.context_len) else {
            return open;
        };
        let last = (open.end - 1) / block_size;
        let Some(&of) = self.of_block.get(&reader.blocks[last]) else { return open };
        let writer = &self.inputs[of];
        if writer.context_len + writer.rows.num_tokens() < open.end || writer.blocks[last] != reader.blocks[last] {
            return open;
        }
        // What that one reads as its prefix may be written in this step, too.
        let before = writer.context_len.div_ceil(block_size).min(last + 1);
        let before = writer.blocks.get(open.start / block_size..before).unwrap_or_default();
        let is_stored = before.iter().all(|block| self.of_block.get(block).is_none_or(|&writer| writer == of));
        let start = if is_stored { open.start } else { open.start.max(writer.context_len) };
        PageOpen { start, of, ..open }
    }
}

impl StepPlan {
    /// Tokens that the statistics of a first page are taken over which the step opens or refits: of the last of them.
    #[must_use]
    pub fn first_page_tokens(&self) -> Option<usize> {
        let opened = self.opens().filter(|open| open.block == 0).map(|open| open.end - open.start);
        opened.chain(self.refits().map(|refit| refit.num_tokens)).last()
    }
}

#[cfg(test)]
mod tests {
    use super::super::StepPlan;
    use super::super::tests::pages_of_blocks;

    fn plan(block_size: usize, context_len: usize, first_held: usize, num_new: usize) -> StepPlan {
        pages_of_blocks(block_size, &(0..100).collect::<Vec<_>>(), context_len, first_held, num_new).unwrap()
    }

    fn opens(block_size: usize, context_len: usize, first_held: usize, num_new: usize) -> Vec<(usize, (usize, usize))> {
        plan(block_size, context_len, first_held, num_new)
            .opens()
            .map(|open| (open.block, (open.start, open.end)))
            .collect()
    }

    #[test]
    fn a_page_that_a_step_writes_whole_uses_its_own_rows() {
        assert_eq!(opens(128, 0, 0, 256), [(0, (0, 128)), (1, (128, 256))]);
        assert_eq!(opens(16, 1000, 0, 24), [(63, (1008, 1024))]);
    }

    #[test]
    fn a_page_opened_by_decode_uses_the_last_512_tokens() {
        assert_eq!(opens(128, 128, 0, 1), [(1, (0, 128))]);
        assert_eq!(opens(128, 1280, 0, 1), [(10, (768, 1280))]);
    }

    #[test]
    fn the_rest_of_a_prefill_uses_the_tokens_before_it() {
        assert_eq!(opens(128, 100, 0, 60), [(1, (0, 128))]);
        assert_eq!(opens(128, 0, 0, 130), [(0, (0, 128)), (1, (0, 128))]);
    }

    #[test]
    fn the_first_page_uses_its_first_write() {
        assert_eq!(opens(128, 0, 0, 32), [(0, (0, 32))]);
        assert_eq!(opens(128, 0, 0, 1), [(0, (0, 1))]);
    }

    #[test]
    fn released_tokens_are_not_read() {
        assert_eq!(opens(16, 64, 48, 1), [(4, (48, 64))]);
        assert_eq!(opens(16, 64, 64, 1), [(4, (64, 65))]);
    }

    #[test]
    fn the_first_page_is_refitted_until_half_of_it_is_written() {
        let refit = |context_len, num_new| {
            plan(128, context_len, 0, num_new).refits().map(|refit| refit.num_tokens).collect::<Vec<_>>()
        };
        let one_by_one: Vec<usize> = (0..200).flat_map(|context_len| refit(context_len, 1)).collect();
        let expected: Vec<usize> = (2..8).chain((8..=64).step_by(4)).collect();
        assert_eq!(one_by_one, expected);
        assert!(refit(0, 5).is_empty());
        assert!(refit(9, 2).is_empty());
        assert!(refit(31, 300).is_empty());
        assert_eq!(refit(63, 1), [64]);
        assert!(refit(64, 1).is_empty());
        assert!(refit(5, 0).is_empty());
    }

    #[test]
    fn an_append_to_an_open_page_opens_nothing() {
        assert_eq!(opens(128, 5, 0, 20), []);
        assert_eq!(opens(128, 133, 0, 100), []);
    }

    #[test]
    fn a_first_page_is_opened_again_by_a_step_that_crosses_its_middle() {
        assert_eq!(opens(128, 5, 0, 59), []);
        assert_eq!(opens(128, 5, 0, 60), [(0, (0, 65))]);
        assert_eq!(opens(128, 5, 0, 200), [(0, (0, 128)), (1, (0, 128))]);
        assert_eq!(opens(128, 64, 0, 20), []);
    }
}
