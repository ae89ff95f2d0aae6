//! What is a cache file?
//!
//! An [`archive`] of the kind [`KIND`] that holds some caches: those of the layer groups of one model, say. Its metadata:
//!
//! | key | |
//! |---|---|
//! | `format_version` | [`crate::format::FORMAT_VERSION`] |
//! | `caches` | how many |
//! | `note` | of whoever keeps them together, who alone reads it |
//! | `caches.{i}.format`, `.dtype`, `.num_layers`, `.num_kv_heads`, `.head_dim`, `.block_size` | the settings |
//! | `caches.{i}.num_blocks`, `.num_open_pages`, `.window` | the settings; not there where they are `None` |
//! | `caches.{i}.next_sequence` | the id of the next new sequence |
//!
//! and the tensors of each cache, `caches.{i}.` and
//!
//! | name | type | shape | |
//! |---|---|---|---|
//! | `sequences` | U64 | `[sequences, 3]` | by ascending id: id, tokens, first token held |
//! | `block_tables` | U32 | `[entries]` | table after table: a block, or 2^32 - 1 where the window released it |
//! | `open` | U8 | `[blocks]` | 1: open, the next of the pages; 0: sealed, the next of the tiles |
//! | `layers.{l}.tiles` | U8 | `[sealed blocks, num_kv_heads, record bytes]` | in formats that seal |
//! | `layers.{l}.pages` | U8 | `[open blocks, num_kv_heads, record bytes]` | |
//!
//! Records are those of [`mod@crate::format`] with codes in canonical order; rows that no sequence holds are zero. Blocks
//! are numbered in the order in which the tables name them first, so the same tokens written alike make the same bytes.
//! What is read is checked, every byte of it: that it is what was written, by the checksum, and that it is what a cache
//! could have held.
//!
//! Not kept: free blocks, the prefix index, figures of how well things fit, and the calibration, which is the model's.

mod read;
mod write;

use super::PagedKvCache;
use crate::archive::{self, Kind};
use crate::calibration;
use crate::config::CacheConfig;
use crate::error::{Error, Result};
use crate::paging::Table;
use std::path::Path;

/// Such a file.
pub const KIND: Kind = Kind { name: "kvarn cache", version: 2, error: Error::CacheFile };

/// The name of what belongs to a cache of a file.
fn name_of(cache: usize, what: &str) -> String {
    format!("caches.{cache}.{what}")
}

/// What a file holds of a cache.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Its settings.
    pub config: CacheConfig,
    /// Its sequences, by ascending id.
    pub sequences: Vec<Table>,
    /// Blocks that are tiles.
    pub sealed_blocks: usize,
    /// Blocks that are pages.
    pub open_blocks: usize,
    /// Bytes of the tiles of all layers.
    pub tile_bytes: usize,
    /// Bytes of the pages of all layers.
    pub page_bytes: usize,
}

/// Writes caches and a note into a file, whole or not at all.
///
/// # Errors
/// [`Error::OpenStep`] while a step is open on a sequence, [`Error::Unsupported`] for pages that a codec quantizes,
/// [`Error::CacheFile`] when the file cannot be written.
pub fn save(path: &Path, caches: &[&PagedKvCache], note: &str) -> Result<()> {
    let saved = write::all(caches)?;
    archive::save(path, &write::contents(&saved, note))
}

/// What [`save`] writes.
///
/// # Errors
/// [`Error::OpenStep`], [`Error::Unsupported`], [`Error::OutOfMemory`].
pub fn to_bytes(caches: &[&PagedKvCache], note: &str) -> Result<Vec<u8>> {
    let saved = write::all(caches)?;
    archive::to_bytes(&write::contents(&saved, note))
}

/// The caches and the note of a file: the same sequences under the same ids, in the same blocks shared alike, bit by bit.
/// A bounded pool takes the memory of its other blocks when a step first needs it.
///
/// # Errors
/// [`Error::CacheFile`], naming the file and what is wrong with it: not such a file, damaged, or of another version;
/// [`Error::OutOfMemory`]; a `KVARN_SIMD` that does not exist or that the machine lacks.
pub fn load(path: &Path) -> Result<(Vec<PagedKvCache>, String)> {
    let file = archive::open(path, &KIND)?;
    read::caches(&file, true).map_err(|error| about(path, error))
}

/// The caches and the note in a file's bytes. See [`load`].
///
/// # Errors
/// Those of [`load`].
pub fn from_bytes(bytes: &[u8]) -> Result<(Vec<PagedKvCache>, String)> {
    read::caches(&bytes, true)
}

/// Checks a file, every byte of it, and says what it holds of each cache, and its note.
///
/// # Errors
/// Those of [`load`].
pub fn inspect(path: &Path) -> Result<(Vec<Summary>, String)> {
    let file = archive::open(path, &KIND)?;
    let (caches, note) = read::caches(&file, false).map_err(|error| about(path, error))?;
    Ok((caches.iter().map(summary).collect::<Result<_>>()?, note))
}

/// The name of the kind that a file's header says: this one, or a calibration. Nothing but the header is read.
///
/// # Errors
/// [`Error::Config`], naming the file: it cannot be read, or is neither.
pub fn kind_of(path: &Path) -> Result<&'static str> {
    Ok(archive::kind_of(path, &[&calibration::KIND, &KIND])?.name)
}

fn about(path: &Path, error: Error) -> Error {
    match error {
        Error::CacheFile(why) => KIND.named(path, &why),
        other => other,
    }
}

fn summary(cache: &PagedKvCache) -> Result<Summary> {
    let (tables, _) = cache.paging.tables()?;
    let open_blocks = tables.open.iter().filter(|&&open| open).count();
    let sealed_blocks = tables.open.len() - open_blocks;
    Ok(Summary {
        config: cache.config.clone(),
        sequences: tables.sequences,
        sealed_blocks,
        open_blocks,
        tile_bytes: sealed_blocks * cache.config.block_bytes(),
        page_bytes: open_blocks * cache.config.open_page_bytes(),
    })
}

impl PagedKvCache {
    /// Writes the cache into a file, whole or not at all. See [`save`].
    ///
    /// # Errors
    /// Those of [`save`].
    pub fn save(&self, path: &Path) -> Result<()> {
        save(path, &[self], "")
    }

    /// What [`Self::save`] writes.
    ///
    /// # Errors
    /// Those of [`to_bytes`].
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        to_bytes(&[self], "")
    }

    /// The cache in a file of one. See [`load`].
    ///
    /// # Errors
    /// Those of [`load`]; [`Error::CacheFile`] for a file of any other number of caches.
    pub fn load(path: &Path) -> Result<Self> {
        let (caches, _) = load(path)?;
        only(caches).map_err(|error| about(path, error))
    }

    /// The cache in the bytes of a file of one. See [`load`].
    ///
    /// # Errors
    /// Those of [`Self::load`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        only(from_bytes(bytes)?.0)
    }
}

fn only(mut caches: Vec<PagedKvCache>) -> Result<PagedKvCache> {
    match caches.pop() {
        Some(cache) if caches.is_empty() => Ok(cache),
        None => Err(Error::CacheFile("it holds no cache".to_owned())),
        Some(_) => Err(Error::CacheFile(format!("it holds {} caches, not one", caches.len() + 1))),
    }
}
