//! What is done to paging and its model, and under which settings.

pub(super) const MAX_SEQUENCES: usize = 8;
pub(super) const NO_SEQUENCE: usize = 4 * MAX_SEQUENCES;

/// Do blocks seal, and out of how many pages?
#[derive(Debug, Clone, Copy)]
pub(super) enum Pages {
    OfEveryBlock,
    Growing,
    Bounded(usize),
}

impl Pages {
    pub(super) fn seals(self) -> bool {
        !matches!(self, Self::OfEveryBlock)
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Setup {
    pub(super) block_size: usize,
    pub(super) num_blocks: Option<usize>,
    pub(super) window: Option<usize>,
    pub(super) pages: Pages,
}

/// Sequences are picked by number, see `Model::pick`; `bits` are token ids, one a bit, so that prefixes often agree.
#[derive(Debug, Clone)]
pub(super) enum Operation {
    New,
    Clear,
    Fork {
        pick: usize,
    },
    Free {
        pick: usize,
    },
    Truncate {
        pick: usize,
        back: usize,
    },
    /// Requests (pick, `num_new`, bits); the same sequence again is left out unless `raw`.
    Begin {
        requests: Vec<(usize, usize, u32)>,
        raw: bool,
    },
    /// `None`: all that are open.
    Commit {
        picks: Option<Vec<usize>>,
    },
    Abort {
        picks: Option<Vec<usize>>,
    },
    Match {
        pick: Option<usize>,
        len: usize,
        bits: u32,
    },
    Publish {
        pick: usize,
        short: bool,
    },
}
