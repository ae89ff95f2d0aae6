//! Caches out of a file.

use super::{KIND, PagedKvCache, name_of};
use crate::archive::{Archive, Element, Source, Tensor};
use crate::backend::cpu::Level;
use crate::config::CacheConfig;
use crate::error::{Error, Result};
use crate::format::{Dtype, FORMAT_VERSION, Format};
use crate::paging::{BlockId, Place, SequenceId, Table, Tables};
use std::collections::HashSet;

/// The caches and the note of a file. Those that are not to `keep` their blocks have no memory for any: they are good for
/// their settings and their tables alone.
pub(super) fn caches(source: &dyn Source, keep: bool) -> Result<(Vec<PagedKvCache>, String)> {
    let archive = Archive::read(source, &KIND)?;
    let version = archive.number("format_version")?;
    if version != u64::from(FORMAT_VERSION) {
        return archive.refuse(format!("a cache of format version {version}, this release reads {FORMAT_VERSION}"));
    }
    let mut known = HashSet::new();
    let mut caches = Vec::new();
    for index in 0..archive.number("caches")? {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        caches.push(File { archive: &archive, index, known: &mut known }.cache(keep)?);
    }
    if let Some(odd) = archive.names().into_iter().find(|name| !known.contains(name)) {
        return archive.refuse(format!("an unknown tensor {odd:?}"));
    }
    Ok((caches, archive.entry("note")?.to_owned()))
}

/// What a file holds of one cache.
struct File<'a> {
    archive: &'a Archive<'a>,
    index: usize,
    /// Tensors that were asked for.
    known: &'a mut HashSet<String>,
}

impl<'a> File<'a> {
    fn name(&self, what: &str) -> String {
        name_of(self.index, what)
    }

    fn refuse<T>(&self, why: &str) -> Result<T> {
        self.archive.refuse(format!("cache {}: {why}", self.index))
    }

    fn entry(&self, key: &str) -> Result<&'a str> {
        self.archive.entry(&self.name(key))
    }

    fn count(&self, key: &str) -> Result<usize> {
        Ok(usize::try_from(self.archive.number(&self.name(key))?).unwrap_or(usize::MAX)) // beyond what is allowed
    }

    fn optional(&self, key: &str) -> Result<Option<usize>> {
        self.archive.find(&self.name(key)).map(|_| self.count(key)).transpose()
    }

    fn tensor(&mut self, what: &str, element: Element) -> Result<Tensor<'a>> {
        let name = self.name(what);
        let tensor = self.archive.tensor(&name, element)?;
        self.known.insert(name);
        Ok(tensor)
    }

    fn shaped(&mut self, what: &str, element: Element, shape: &[usize]) -> Result<Tensor<'a>> {
        self.tensor(what, element)?;
        self.archive.shaped(&self.name(what), element, shape)
    }

    fn config(&self) -> Result<CacheConfig> {
        let (format, dtype) = (self.entry("format")?, self.entry("dtype")?);
        let (Some(format), Some(dtype)) = (Format::parse(format), Dtype::parse(dtype)) else {
            return self.refuse(&format!("format {format:?}, dtype {dtype:?}"));
        };
        let config = CacheConfig {
            format,
            dtype,
            num_layers: self.count("num_layers")?,
            num_kv_heads: self.count("num_kv_heads")?,
            head_dim: self.count("head_dim")?,
            block_size: self.count("block_size")?,
            num_blocks: self.optional("num_blocks")?,
            num_open_pages: self.optional("num_open_pages")?,
            window: self.optional("window")?,
        };
        match config.validate() {
            Ok(()) => Ok(config),
            Err(error) => self.refuse(&error.to_string()),
        }
    }

    fn tables(&mut self, config: &CacheConfig) -> Result<Tables> {
        let tensor = self.tensor("sequences", Element::U64)?;
        if !matches!(tensor.shape(), [_, 3]) {
            let (name, shape) = (tensor.name(), tensor.shape());
            return self.archive.refuse(format!("{name}: shape {shape:?} is not [sequences, 3]"));
        }
        let numbers: Vec<u64> = words(&tensor.read()?).map(u64::from_le_bytes).collect();
        let tensor = self.tensor("block_tables", Element::U32)?;
        let entries: Vec<BlockId> = words(&tensor.read()?).map(|id| BlockId(u32::from_le_bytes(id))).collect();
        let (mut sequences, mut rest) = (Vec::new(), &entries[..]);
        for numbers in numbers.chunks_exact(3) {
            let [len, first_held] = [numbers[1], numbers[2]].map(|n| usize::try_from(n).unwrap_or(usize::MAX));
            let Some((blocks, after)) = rest.split_at_checked(len.div_ceil(config.block_size)) else {
                let (id, left) = (numbers[0], rest.len());
                return self.refuse(&format!("sequence {id} of {len} tokens, and {left} entries left of block tables"));
            };
            rest = after;
            sequences.push(Table { id: SequenceId(numbers[0]), len, first_held, blocks: blocks.to_vec() });
        }
        if !rest.is_empty() {
            return self.refuse(&format!("{} entries of block tables are no sequence's", rest.len()));
        }
        let open = if config.format.tile_bits().is_some() {
            self.open_blocks()?
        } else {
            // The highest block that is named: whether all below are is checked with the tables.
            let named = entries.iter().filter(|&&block| block != BlockId::RELEASED).max();
            let num_blocks = named.map_or(0, |block| block.0 as usize + 1);
            if num_blocks > entries.len() {
                return self.refuse(&format!("block {} in tables of {} entries", num_blocks - 1, entries.len()));
            }
            vec![true; num_blocks]
        };
        Ok(Tables { next_id: self.archive.number(&self.name("next_sequence"))?, sequences, open })
    }

    fn open_blocks(&mut self) -> Result<Vec<bool>> {
        let tensor = self.tensor("open", Element::U8)?;
        let bytes = tensor.read()?;
        if tensor.shape().len() != 1 {
            let (name, shape) = (tensor.name(), tensor.shape());
            return self.archive.refuse(format!("{name}: shape {shape:?} is not [blocks]"));
        }
        match bytes.iter().position(|&byte| byte > 1) {
            None => Ok(bytes.iter().map(|&byte| byte == 1).collect()),
            Some(block) => self.refuse(&format!("open: block {block} is {}, not 0 or 1", bytes[block])),
        }
    }

    fn cache(&mut self, keep: bool) -> Result<PagedKvCache> {
        let config = self.config()?;
        let tables = self.tables(&config)?;
        let (num_layers, num_kv_heads) = (config.num_layers, config.num_kv_heads);
        let blocks_of = |open: bool| {
            let of_kind = tables.open.iter().enumerate().filter(move |(_, of_block)| **of_block == open);
            of_kind.map(|(block, _)| BlockId(block as u32)).collect::<Vec<_>>()
        };
        let mut kinds = vec![("pages", true, blocks_of(true))];
        if config.format.tile_bits().is_some() {
            kinds.insert(0, ("tiles", false, blocks_of(false)));
        }
        // Each layer's tensors are seen before memory is taken for a number of layers.
        for layer in 0..num_layers {
            for (what, ..) in &kinds {
                self.tensor(&format!("layers.{layer}.{what}"), Element::U8)?;
            }
        }
        let num_open = kinds.last().map_or(0, |(.., blocks)| blocks.len());
        let num_blocks = tables.open.len();
        let mut cache = PagedKvCache::without_memory(config, Level::chosen()?, None)?;
        cache.paging = match cache.paging.with_tables(tables) {
            Err(Error::CacheFile(why)) => return self.refuse(&why),
            other => other?,
        };
        if keep {
            cache.layers.executor.grow(num_blocks, num_open)?;
        }
        for layer in 0..num_layers {
            for (what, open, blocks) in &kinds {
                let record_bytes = cache.layers.executor.layout(*open).bytes();
                let shape = [blocks.len(), num_kv_heads, record_bytes];
                let tensor = self.shaped(&format!("layers.{layer}.{what}"), Element::U8, &shape)?;
                let mut bytes = vec![0; if blocks.is_empty() { 0 } else { num_kv_heads * record_bytes }];
                for (index, &block) in blocks.iter().enumerate() {
                    tensor.read_at(index * bytes.len(), &mut bytes)?;
                    if let Err(why) = cache.layers.executor.check_saved(*open, &bytes) {
                        return self.archive.refuse(format!("{}: block {block}, {why}", tensor.name()));
                    }
                    if keep {
                        let place = cache.paging.page_of(block).map_or(Place::tile(block), Place::page);
                        cache.layers.executor.restore(layer, place, &bytes)?;
                    }
                }
            }
        }
        Ok(cache)
    }
}

/// Numbers of `N` bytes.
fn words<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> {
    bytes.as_chunks().0.iter().copied()
}
