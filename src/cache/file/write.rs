//! The contents of a cache file.

use super::{KIND, PagedKvCache, name_of};
use crate::archive::{Contents, Element};
use crate::error::{Error, Result};
use crate::format::FORMAT_VERSION;
use crate::paging::{PageId, Place, Tables, UsedBlock};
use std::io::{Error as IoError, Result as IoResult, Write};

/// A cache that can be saved.
pub(super) struct Saved<'a> {
    cache: &'a PagedKvCache,
    tables: Tables,
    /// The blocks of the tables, and their pages.
    blocks: Vec<(UsedBlock, Option<PageId>)>,
}

pub(super) fn all<'a>(caches: &[&'a PagedKvCache]) -> Result<Vec<Saved<'a>>> {
    caches.iter().map(|cache| Saved::new(cache)).collect()
}

impl<'a> Saved<'a> {
    fn new(cache: &'a PagedKvCache) -> Result<Self> {
        if let Some(codec) = cache.codec {
            let name = codec.name();
            return Err(Error::Unsupported(format!("pages that codec {name} quantizes in place cannot be saved")));
        }
        let (tables, of) = cache.paging.tables()?;
        let blocks = of.into_iter().map(|block| (block, cache.paging.page_of(block.id))).collect();
        Ok(Self { cache, tables, blocks })
    }

    /// Calls `entry` with each of the cache's settings and its value.
    fn settings(&self, mut entry: impl FnMut(&str, String)) {
        let config = &self.cache.config;
        entry("format", config.format.name().to_owned());
        entry("dtype", config.dtype.name().to_owned());
        for (key, value) in [
            ("num_layers", Some(config.num_layers)),
            ("num_kv_heads", Some(config.num_kv_heads)),
            ("head_dim", Some(config.head_dim)),
            ("block_size", Some(config.block_size)),
            ("num_blocks", config.num_blocks),
            ("num_open_pages", config.num_open_pages),
            ("window", config.window),
        ] {
            if let Some(value) = value {
                entry(key, value.to_string());
            }
        }
        entry("next_sequence", self.tables.next_id.to_string());
    }

    /// Shape of a layer's tiles or pages.
    fn records(&self, open: bool) -> [usize; 3] {
        let num_blocks = self.tables.open.iter().filter(|&&of_block| of_block == open).count();
        [num_blocks, self.cache.config.num_kv_heads, self.cache.layers.executor.layout(open).bytes()]
    }

    /// Writes a layer's tiles or pages.
    fn write_records(&self, layer: usize, open: bool, out: &mut dyn Write) -> IoResult<()> {
        for (block, page) in self.blocks.iter().filter(|(_, page)| page.is_some() == open) {
            let place = page.map_or(Place::tile(block.id), Place::page);
            let saved = self.cache.layers.executor.save(layer, place, block).map_err(IoError::other)?;
            out.write_all(&saved)?;
        }
        Ok(())
    }
}

/// What a file of these caches holds. Small integers of all caches come before the records of any: they are aligned.
pub(super) fn contents<'a>(saved: &'a [Saved<'_>], note: &str) -> Contents<'a> {
    let mut contents = Contents::new(&KIND);
    contents.entry("format_version", FORMAT_VERSION);
    contents.entry("caches", saved.len());
    contents.entry("note", note);
    for (index, one) in saved.iter().enumerate() {
        one.settings(|key, value| contents.entry(&name_of(index, key), value));
    }
    for (index, Saved { tables, .. }) in saved.iter().enumerate() {
        let shape = [tables.sequences.len(), 3];
        contents.tensor(name_of(index, "sequences"), Element::U64, &shape, |out| write_sequences(tables, out));
    }
    for (index, Saved { tables, .. }) in saved.iter().enumerate() {
        let num_entries = tables.sequences.iter().map(|table| table.blocks.len()).sum();
        let name = name_of(index, "block_tables");
        contents.tensor(name, Element::U32, &[num_entries], |out| write_block_tables(tables, out));
    }
    for (index, Saved { tables, .. }) in saved.iter().enumerate().filter(|(_, one)| one.cache.paging.seals()) {
        contents.tensor(name_of(index, "open"), Element::U8, &[tables.open.len()], |out| {
            out.write_all(&tables.open.iter().map(|&open| u8::from(open)).collect::<Vec<u8>>())
        });
    }
    for (index, one) in saved.iter().enumerate() {
        let kinds: &[_] =
            if one.cache.paging.seals() { &[("tiles", false), ("pages", true)] } else { &[("pages", true)] };
        for layer in 0..one.cache.config.num_layers {
            for &(kind, open) in kinds {
                let name = name_of(index, &format!("layers.{layer}.{kind}"));
                let write = move |out: &mut dyn Write| one.write_records(layer, open, out);
                contents.tensor(name, Element::U8, &one.records(open), write);
            }
        }
    }
    contents
}

fn write_sequences(tables: &Tables, out: &mut dyn Write) -> IoResult<()> {
    let numbers = tables.sequences.iter().flat_map(|table| [table.id.0, table.len as u64, table.first_held as u64]);
    numbers.into_iter().try_for_each(|number| out.write_all(&number.to_le_bytes()))
}

fn write_block_tables(tables: &Tables, out: &mut dyn Write) -> IoResult<()> {
    let mut blocks = tables.sequences.iter().flat_map(|table| &table.blocks);
    blocks.try_for_each(|block| out.write_all(&block.0.to_le_bytes()))
}
