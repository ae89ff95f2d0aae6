//! Making a cache, empty or out of another one.

use super::PagedKvCache;
use crate::backend::cpu::{Cpu, Level};
use crate::backend::{Coded, Executor};
use crate::config::CacheConfig;
use crate::engine::Layers;
use crate::error::{Error, Result};
use crate::format::FORMAT_VERSION;
use crate::paging::Paging;
use crate::quant::Codec;
use std::collections::HashMap;

impl PagedKvCache {
    /// An empty cache, at the machine's fastest SIMD level unless `KVARN_SIMD` names another.
    ///
    /// # Errors
    /// What [`CacheConfig::validate`] refuses; a `KVARN_SIMD` that does not exist or that the machine lacks.
    pub fn new(config: CacheConfig) -> Result<Self> {
        Self::with_level(config, Level::chosen()?)
    }

    /// An empty cache at a SIMD level that this machine has.
    ///
    /// # Errors
    /// What [`CacheConfig::validate`] refuses; a level that the machine lacks.
    pub fn with_level(config: CacheConfig, level: Level) -> Result<Self> {
        Self::build(config, level, None)
    }

    /// An empty cache of `raw` pages that a codec quantizes in place, to compare formats by: it takes no less memory.
    ///
    /// # Errors
    /// What [`CacheConfig::validate`] refuses, and any format but `raw`.
    pub fn with_codec(config: CacheConfig, codec: Codec) -> Result<Self> {
        Self::build(config, Level::chosen()?, Some(codec))
    }

    fn build(config: CacheConfig, level: Level, codec: Option<Codec>) -> Result<Self> {
        let mut cache = Self::without_memory(config, level, codec)?;
        let room = cache.paging.room(&[])?;
        cache.layers.executor.grow(room.num_blocks(), room.num_pages())?;
        Ok(cache)
    }

    /// An empty cache that takes the memory of its blocks, a bounded pool's too, when a step first needs them.
    pub(super) fn without_memory(config: CacheConfig, level: Level, codec: Option<Codec>) -> Result<Self> {
        config.validate()?;
        let level = Level::parse(level.name())?;
        let (block_size, num_blocks, salt) = (config.block_size, config.num_blocks, fingerprint(&config, codec));
        let executor = match codec {
            Some(codec) => Executor::new(Coded::new(config.shape(), level, codec)?),
            None => Executor::new(Cpu::new(config.shape(), level)?),
        };
        let paging = if executor.backend().seals() {
            Paging::sealing(block_size, num_blocks, config.num_open_pages, &salt)?
        } else {
            Paging::new(block_size, num_blocks, &salt)?
        };
        Ok(Self {
            paging,
            layers: Layers::new(executor),
            codec,
            steps: HashMap::new(),
            next_step: 0,
            sealed: 0,
            unsealed: 0,
            first_page_tokens: None,
            config,
        })
    }

    /// A cache with the same sequences and pages, of its own memory.
    ///
    /// # Errors
    /// [`Error::OpenStep`] while a step is open, [`Error::OutOfMemory`].
    pub fn try_clone(&self) -> Result<Self> {
        if let Some(id) = self.steps.values().flat_map(|open| open.sequences.iter()).next() {
            return Err(Error::OpenStep { id: id.0 });
        }
        Ok(Self {
            config: self.config.clone(),
            paging: self.paging.clone(),
            layers: Layers {
                executor: self.layers.executor.try_clone()?,
                calibration: self.layers.calibration.clone(),
                stream: self.layers.stream,
            },
            codec: self.codec,
            steps: HashMap::new(),
            next_step: self.next_step,
            sealed: self.sealed,
            unsealed: self.unsealed,
            first_page_tokens: self.first_page_tokens,
        })
    }
}

/// What two caches must have in common for their blocks to mean the same: seeds the prefix index.
fn fingerprint(config: &CacheConfig, codec: Option<Codec>) -> Vec<u8> {
    let &CacheConfig { format, dtype, num_layers, num_kv_heads, head_dim, block_size, .. } = config;
    let (format, dtype, codec) = (format.name(), dtype.name(), codec.map_or("", Codec::name));
    format!("kvarn {FORMAT_VERSION} {format} {codec} {dtype} {num_layers} {num_kv_heads} {head_dim} {block_size}")
        .into_bytes()
}
