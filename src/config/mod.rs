//! Cache settings and their validation.

pub mod capacity;
pub mod env;
mod shape;

use crate::error::{Error, Result};
use crate::format::{Dtype, Format};

pub use shape::{Shape, check_block_size, check_head_dim};

/// The settings of one cache, which stores a group of layers of the same shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheConfig {
    /// How blocks store their tokens.
    pub format: Format,
    /// Element type of `raw` pages. Other formats accept keys and values of every dtype.
    pub dtype: Dtype,
    /// Layers that share the block tables.
    pub num_layers: usize,
    /// Key/value heads of a layer.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Blocks in the pool; `None`: the pool grows as needed.
    pub num_blocks: Option<usize>,
    /// Pages in the pool for open blocks, in formats that seal: two for each sequence that decodes one token per step,
    /// four for one that appends more. `None`: the pool grows as needed. Ignored in other formats.
    pub num_open_pages: Option<usize>,
    /// Sliding window in tokens, the query itself included; `None`: full attention.
    pub window: Option<usize>,
}

impl CacheConfig {
    /// The settings of an `int4` cache with growing pools, blocks of 128 tokens and no window.
    #[must_use]
    pub const fn new(num_layers: usize, num_kv_heads: usize, head_dim: usize) -> Self {
        Self {
            format: Format::Int4,
            dtype: Dtype::F32,
            num_layers,
            num_kv_heads,
            head_dim,
            block_size: 128,
            num_blocks: None,
            num_open_pages: None,
            window: None,
        }
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`], naming the setting and its valid values, and those of [`Shape::validate`].
    pub fn validate(&self) -> Result<()> {
        self.shape().validate()?;
        for (name, number) in [("num_blocks", self.num_blocks), ("num_open_pages", self.num_open_pages)] {
            if let Some(given) = number.filter(|&given| given == 0 || given >= u32::MAX as usize) {
                return Err(Error::setting(name, format!("in 1..{}", u32::MAX), &given));
            }
        }
        check_window(self.window)
    }

    /// What the cache's records look like.
    #[must_use]
    pub const fn shape(&self) -> Shape {
        let &Self { format, dtype, num_layers, num_kv_heads, head_dim, block_size, .. } = self;
        Shape { format, dtype, num_layers, num_kv_heads, head_dim, block_size }
    }

    /// Bytes of one open page, over all layers and heads.
    #[must_use]
    pub const fn open_page_bytes(&self) -> usize {
        self.shape().num_records() * self.shape().page().bytes()
    }

    /// Bytes of one block at rest, over all layers and heads.
    #[must_use]
    pub const fn block_bytes(&self) -> usize {
        self.shape().num_records() * self.shape().at_rest().bytes()
    }
}

/// Checks the tokens that a query sees at most.
///
/// # Errors
/// [`Error::InvalidSetting`] for none.
pub fn check_window(window: Option<usize>) -> Result<()> {
    if window == Some(0) { Err(Error::setting("window", "at least 1 token", &0)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validate_names_the_invalid_setting() {
        let good = CacheConfig::new(2, 4, 64);
        assert_eq!(good.validate(), Ok(()));
        for (bad, word) in [
            (CacheConfig { head_dim: 72, ..good.clone() }, "head_dim 72"),
            (CacheConfig { head_dim: 272, ..good.clone() }, "head_dim 272"),
            (CacheConfig { block_size: 48, ..good.clone() }, "block_size"),
            (CacheConfig { num_layers: 0, ..good.clone() }, "num_layers"),
            (CacheConfig { num_kv_heads: 1 << 60, ..good.clone() }, "1152921504606846976 heads"),
            (CacheConfig { num_blocks: Some(0), ..good.clone() }, "num_blocks"),
            (CacheConfig { num_open_pages: Some(0), ..good.clone() }, "num_open_pages"),
            (CacheConfig { window: Some(0), ..good.clone() }, "window"),
        ] {
            let message = bad.validate().unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }
}
