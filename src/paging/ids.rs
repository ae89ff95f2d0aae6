//! Which block, which sequence? Identities, never counts.

use std::fmt;

/// A block of the pool: `block_size` tokens, all key/value heads of every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockId(pub u32);

impl BlockId {
    /// What a block table holds where a sliding window has released the block. Never an id of the pool.
    pub const RELEASED: Self = Self(u32::MAX);
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::RELEASED { f.write_str("released") } else { self.0.fmt(f) }
    }
}

/// A page: where the tokens of an open block are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(pub u32);

impl PageId {
    /// What a list of pages holds where the block is sealed. Never an id of the pool.
    pub const SEALED: Self = Self(u32::MAX);
}

/// A sequence. Ids are given out in increasing order and never again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
