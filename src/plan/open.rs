//! Which pages does a step open, and over which tokens are their channel statistics taken?
//!
//! A page is opened by the step that writes its first token, and its statistics are frozen then. Positions of the
//! window that are older than the step are read back from their pages; those of the step itself are taken as given,
//! so that no page waits for another one to be written.

use super::SequencePlan;
use crate::format::CALIBRATION_WINDOW_TOKENS;

/// A first write of at least this many tokens describes its own page when nothing comes before it.
pub const OWN_STATISTICS_TOKENS: usize = 32;

/// A page opened by a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageOpen {
    /// Index of the sequence in the step.
    pub sequence: usize,
    /// Index in its block table.
    pub block: usize,
    /// What its channel statistics are taken over.
    pub statistics: Statistics,
}

/// What a page's channel statistics are taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statistics {
    /// Nothing is known of the sequence: those of the model's calibration, or mean 0 and scale 1.
    Model,
    /// Positions `start..end` of the sequence.
    Positions {
        /// First position.
        start: usize,
        /// One past the last.
        end: usize,
    },
}

/// A block that the step seals itself has no page to open.
pub(super) fn plan_opens(block_size: usize, index: usize, sequence: &SequencePlan, opens: &mut Vec<PageOpen>) {
    let (context_len, seq_len) = (sequence.context_len, sequence.seq_len());
    let new = context_len.div_ceil(block_size)..seq_len.div_ceil(block_size);
    for block in new.filter(|&block| sequence.page(block).is_some()) {
        let start = block * block_size;
        let end = seq_len.min(start + block_size);
        let window_start = start.saturating_sub(CALIBRATION_WINDOW_TOKENS).max(sequence.first_held.min(start));
        let statistics = if end - start == block_size {
            Statistics::Positions { start, end }
        } else if window_start < start {
            Statistics::Positions { start: window_start, end: start }
        } else if end - start >= OWN_STATISTICS_TOKENS {
            Statistics::Positions { start, end }
        } else {
            Statistics::Model
        };
        opens.push(PageOpen { sequence: index, block, statistics });
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Rows, SequenceInput, StepPlan};
    use super::*;
    use crate::paging::BlockId;

    fn opens(block_size: usize, context_len: usize, first_held: usize, num_new: usize) -> Vec<(usize, Statistics)> {
        let block_table: Vec<BlockId> = (0..100).map(BlockId).collect();
        let rows = Rows::All(num_new);
        let input = SequenceInput { block_table: &block_table, pages: None, context_len, first_held, rows };
        StepPlan::new(block_size, &[input]).unwrap().opens.iter().map(|open| (open.block, open.statistics)).collect()
    }

    fn over(start: usize, end: usize) -> Statistics {
        Statistics::Positions { start, end }
    }

    #[test]
    fn a_page_that_a_step_writes_whole_uses_its_own_rows() {
        assert_eq!(opens(128, 0, 0, 256), [(0, over(0, 128)), (1, over(128, 256))]);
        assert_eq!(opens(16, 1000, 0, 24), [(63, over(1008, 1024))]);
    }

    #[test]
    fn a_page_opened_by_decode_uses_the_last_512_tokens() {
        assert_eq!(opens(128, 128, 0, 1), [(1, over(0, 128))]);
        assert_eq!(opens(128, 1280, 0, 1), [(10, over(768, 1280))]);
    }

    #[test]
    fn the_rest_of_a_prefill_uses_the_tokens_before_it() {
        assert_eq!(opens(128, 100, 0, 60), [(1, over(0, 128))]);
        assert_eq!(opens(128, 0, 0, 130), [(0, over(0, 128)), (1, over(0, 128))]);
    }

    #[test]
    fn the_first_page_uses_its_first_write_from_32_tokens_on() {
        assert_eq!(opens(128, 0, 0, 32), [(0, over(0, 32))]);
        assert_eq!(opens(128, 0, 0, 31), [(0, Statistics::Model)]);
    }

    #[test]
    fn released_tokens_are_not_read() {
        assert_eq!(opens(16, 64, 48, 1), [(4, over(48, 64))]);
        assert_eq!(opens(16, 64, 64, 1), [(4, Statistics::Model)]);
    }

    #[test]
    fn an_append_to_an_open_page_opens_nothing() {
        assert_eq!(opens(128, 5, 0, 20), []);
    }
}
