//! Split-KV: a decode's history is cut into pieces that run side by side and merge by their log-sum-exp.
//!
//! Cuts are at fixed positions, so that neither the batch nor the number of threads can change a result.

/// Tokens of one split.
pub const SPLIT_TOKENS: usize = 512;

/// A piece of a sequence's visible history, as positions `start..end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Index of the sequence in the step.
    pub sequence: usize,
    /// First position.
    pub start: usize,
    /// One past the last.
    pub end: usize,
}

/// Cuts positions `start..end` at the multiples of [`SPLIT_TOKENS`], into pieces `(start, end)`.
#[must_use]
pub fn splits(start: usize, end: usize) -> impl ExactSizeIterator<Item = (usize, usize)> {
    let first = start / SPLIT_TOKENS;
    let last = if start < end { end.div_ceil(SPLIT_TOKENS) } else { first };
    (first..last).map(move |index| (start.max(index * SPLIT_TOKENS), end.min((index + 1) * SPLIT_TOKENS)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_do_not_move_with_the_range() {
        let cut: Vec<_> = splits(500, 1030).collect();
        assert_eq!(cut, [(500, 512), (512, 1024), (1024, 1030)]);
        assert_eq!(splits(7, 7).count(), 0);
        assert_eq!(splits(0, 512).count(), 1);
    }
}
