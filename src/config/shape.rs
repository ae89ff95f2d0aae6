//! What the records of a cache look like.

use crate::error::{Error, Result};
use crate::format::{self, BLOCK_SIZES, Dtype, Format, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM, RecordLayout};

/// The shape of a group of layers and of their records: what a backend is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// How blocks store their tokens.
    pub format: Format,
    /// Element type of `raw` pages.
    pub dtype: Dtype,
    /// Layers that share the block tables.
    pub num_layers: usize,
    /// Key/value heads of a layer.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Tokens of a block.
    pub block_size: usize,
}

impl Shape {
    /// Checks every number.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] or [`Error::Unsupported`], naming the number and its valid values; [`Error::Config`] for
    /// blocks of more bytes than can be counted.
    pub fn validate(&self) -> Result<()> {
        let &Self { num_layers, num_kv_heads, head_dim, block_size, .. } = self;
        for (name, number) in [("num_layers", num_layers), ("num_kv_heads", num_kv_heads)] {
            if number == 0 {
                return Err(Error::setting(name, "at least 1", &number));
            }
        }
        check_head_dim(head_dim)?;
        check_block_size(block_size)?;
        // A page is never smaller than the tile that it becomes.
        let records = num_layers.checked_mul(num_kv_heads);
        let bytes = records.and_then(|records| records.checked_mul(self.page().bytes()));
        if bytes.is_none_or(|bytes| bytes > isize::MAX as usize / 2) {
            return Err(Error::Config(format!(
                "{num_layers} layers of {num_kv_heads} heads: the bytes of a block are beyond what this machine can count"
            )));
        }
        Ok(())
    }

    /// The record that tokens are written to.
    #[must_use]
    pub const fn page(&self) -> RecordLayout {
        RecordLayout::page(self.format, self.dtype, self.head_dim, self.block_size)
    }

    /// The record that full blocks become, if they are sealed.
    #[must_use]
    pub const fn tile(&self) -> Option<RecordLayout> {
        RecordLayout::tile(self.format, self.head_dim, self.block_size)
    }

    /// The record of a block at rest: a tile, or a page where blocks are not sealed.
    #[must_use]
    pub const fn at_rest(&self) -> RecordLayout {
        match self.tile() {
            Some(tile) => tile,
            None => self.page(),
        }
    }

    /// Records of one (block or page), over all layers and heads.
    #[must_use]
    pub const fn num_records(&self) -> usize {
        self.num_layers * self.num_kv_heads
    }
}

/// Checks the channels of a head.
///
/// # Errors
/// [`Error::Unsupported`].
pub fn check_head_dim(head_dim: usize) -> Result<()> {
    if format::supports_head_dim(head_dim) {
        return Ok(());
    }
    let what = format!("head_dim {head_dim}: pages hold multiples of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}");
    Err(Error::Unsupported(what))
}

/// Checks the tokens of a block.
///
/// # Errors
/// [`Error::InvalidSetting`].
pub fn check_block_size(block_size: usize) -> Result<()> {
    if format::supports_block_size(block_size) {
        return Ok(());
    }
    Err(Error::setting("block_size", format!("one of {BLOCK_SIZES:?}"), &block_size))
}
