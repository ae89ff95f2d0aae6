//! The arrays of a step's plan: one buffer of `i32` words, so that a device copies it in one piece and a kernel's
//! parameters point into it.
//!
//! ```text
//! array a, record i, word j   at   starts[a] + i * width(a) + j
//! ```

/// One array of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum PlanArray {
    /// Of each sequence: its row in the table of places.
    Rows,
    /// Of each sequence: tokens before the step.
    ContextLens,
    /// Of each sequence: first token that it still holds.
    FirstHeld,
    /// Of each sequence: 1 for a prefill, 0 for decode.
    IsPrefill,
    /// First token row of each sequence, and the number of all rows last.
    QueryStartLoc,
    /// First entry of each sequence in [`PlanArray::TokenRows`], and the number of all entries last.
    TokenStartLoc,
    /// Of each row: the position of its token, -1 for padding.
    Positions,
    /// Of each row: `page * block_size + position % block_size`, -1 where no page is written.
    Slots,
    /// Row of each new token.
    TokenRows,
    /// Pages that are opened: sequence, block, the positions `start..end` of the statistics, and the sequence of those.
    Opens,
    /// First pages whose statistics are taken anew at commit: sequence, tokens of the page.
    Refits,
    /// Blocks that are sealed: sequence, block, the page or -1 for the step's own rows, the first row or -1.
    Seals,
    /// First split of each sequence's history, and the number of all splits last; a prefill has none. Split `j` of a
    /// sequence is what the step sees of positions `(first + j) * SPLIT_TOKENS ..`, where `first` is that of the first
    /// position seen.
    SplitStartLoc,
    /// Entries of the table of places that have changed: row, block, place.
    Changes,
}

impl PlanArray {
    /// All arrays, in the order in which they are stored.
    pub const ALL: [Self; 14] = [
        Self::Rows,
        Self::ContextLens,
        Self::FirstHeld,
        Self::IsPrefill,
        Self::QueryStartLoc,
        Self::TokenStartLoc,
        Self::Positions,
        Self::Slots,
        Self::TokenRows,
        Self::Opens,
        Self::Refits,
        Self::Seals,
        Self::SplitStartLoc,
        Self::Changes,
    ];

    /// Its name in kernels and in the picture.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rows => "rows",
            Self::ContextLens => "context_lens",
            Self::FirstHeld => "first_held",
            Self::IsPrefill => "is_prefill",
            Self::QueryStartLoc => "query_start_loc",
            Self::TokenStartLoc => "token_start_loc",
            Self::Positions => "positions",
            Self::Slots => "slots",
            Self::TokenRows => "token_rows",
            Self::Opens => "opens",
            Self::Refits => "refits",
            Self::Seals => "seals",
            Self::SplitStartLoc => "split_start_loc",
            Self::Changes => "changes",
        }
    }

    /// Words of a record.
    #[must_use]
    pub const fn width(self) -> usize {
        match self {
            Self::Opens => 5,
            Self::Seals => 4,
            Self::Changes => 3,
            Self::Refits => 2,
            _ => 1,
        }
    }
}

/// Where each array of a plan begins, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanLayout {
    starts: [usize; PlanArray::ALL.len() + 1],
}

impl PlanLayout {
    /// The layout of arrays of so many words, in the order of [`PlanArray::ALL`].
    #[must_use]
    pub const fn of_words(words: [usize; PlanArray::ALL.len()]) -> Self {
        let mut starts = [0; PlanArray::ALL.len() + 1];
        let mut array = 0;
        while array < words.len() {
            starts[array + 1] = starts[array] + words[array];
            array += 1;
        }
        Self { starts }
    }

    /// The words of an array.
    #[must_use]
    pub const fn range(&self, array: PlanArray) -> core::ops::Range<usize> {
        self.starts[array as usize]..self.starts[array as usize + 1]
    }

    /// Records of an array.
    #[must_use]
    pub const fn count(&self, array: PlanArray) -> usize {
        let words = self.range(array);
        (words.end - words.start) / array.width()
    }

    /// Words of all arrays.
    #[must_use]
    pub const fn words(&self) -> usize {
        self.starts[PlanArray::ALL.len()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_follow_each_other_in_the_order_of_their_numbers() {
        let mut words = [0; PlanArray::ALL.len()];
        for (number, array) in PlanArray::ALL.into_iter().enumerate() {
            assert_eq!(array as usize, number);
            words[number] = (number + 1) * array.width();
        }
        let layout = PlanLayout::of_words(words);
        let mut end = 0;
        for (number, array) in PlanArray::ALL.into_iter().enumerate() {
            assert_eq!((layout.range(array).start, layout.count(array)), (end, number + 1));
            end = layout.range(array).end;
        }
        assert_eq!(layout.words(), end);
    }
}
