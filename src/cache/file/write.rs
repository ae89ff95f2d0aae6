//! Caches into a file.

use super::{KIND, PagedKvCache, name_of};
use crate::archive::{Element, Header};
use crate::config::CacheConfig;
use crate::error::{Error, Result};
use crate::format::FORMAT_VERSION;
use crate::paging::{PageId, Tables, UsedBlock};
use std::io::{Result as IoResult, Write};

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
        if let Some(codec) = cache.backend.codec() {
            let name = codec.name();
            return Err(Error::Unsupported(format!("pages that codec {name} quantizes in place cannot be saved")));
        }
        let (tables, of) = cache.paging.tables()?;
        let blocks = of.into_iter().map(|block| (block, cache.paging.page_of(block.id))).collect();
        Ok(Self { cache, tables, blocks })
    }

    /// Shape of a layer's tiles or pages.
    fn records(&self, open: bool) -> [usize; 3] {
        let num_blocks = self.tables.open.iter().filter(|&&of_block| of_block == open).count();
        [num_blocks, self.cache.config.num_kv_heads, self.cache.backend.record_bytes(open)]
    }

    /// Writes a layer's tiles or pages.
    fn write_records(&self, layer: usize, open: bool, out: &mut dyn Write) -> IoResult<()> {
        let [_, heads, record_bytes] = self.records(open);
        let mut bytes = vec![0; heads * record_bytes];
        for (block, page) in self.blocks.iter().filter(|(_, page)| page.is_some() == open) {
            self.cache.backend.save(layer, block, *page, &mut bytes);
            out.write_all(&bytes)?;
        }
        Ok(())
    }
}

/// Small integers of all caches come before the records of any: they are aligned.
pub(super) fn header(saved: &[Saved], note: &str) -> Header {
    let mut header = Header::new(&KIND);
    header.entry("format_version", FORMAT_VERSION);
    header.entry("caches", saved.len());
    header.entry("note", note);
    for (index, Saved { cache, tables, .. }) in saved.iter().enumerate() {
        let mut entry = |key: &str, value: String| header.entry(&name_of(index, key), value);
        let CacheConfig { num_layers, num_kv_heads, head_dim, block_size, .. } = cache.config;
        entry("format", cache.config.format.name().to_owned());
        entry("dtype", cache.config.dtype.name().to_owned());
        let CacheConfig { num_blocks, num_open_pages, window, .. } = cache.config;
        for (key, value) in [
            ("num_layers", Some(num_layers)),
            ("num_kv_heads", Some(num_kv_heads)),
            ("head_dim", Some(head_dim)),
            ("block_size", Some(block_size)),
            ("num_blocks", num_blocks),
            ("num_open_pages", num_open_pages),
            ("window", window),
        ] {
            if let Some(value) = value {
                entry(key, value.to_string());
            }
        }
        entry("next_sequence", tables.next_id.to_string());
    }
    for (index, Saved { tables, .. }) in saved.iter().enumerate() {
        header.tensor(&name_of(index, "sequences"), Element::U64, &[tables.sequences.len(), 3]);
    }
    for (index, Saved { tables, .. }) in saved.iter().enumerate() {
        let num_entries = tables.sequences.iter().map(|table| table.blocks.len()).sum();
        header.tensor(&name_of(index, "block_tables"), Element::U32, &[num_entries]);
    }
    for (index, one) in saved.iter().enumerate().filter(|(_, one)| one.cache.paging.seals()) {
        header.tensor(&name_of(index, "open"), Element::U8, &[one.tables.open.len()]);
    }
    for (index, one) in saved.iter().enumerate() {
        for layer in 0..one.cache.config.num_layers {
            if one.cache.paging.seals() {
                header.tensor(&name_of(index, &format!("layers.{layer}.tiles")), Element::U8, &one.records(false));
            }
            header.tensor(&name_of(index, &format!("layers.{layer}.pages")), Element::U8, &one.records(true));
        }
    }
    header
}

/// The tensors of the header.
pub(super) fn tensors(saved: &[Saved], out: &mut dyn Write) -> IoResult<()> {
    for table in saved.iter().flat_map(|one| &one.tables.sequences) {
        for number in [table.id.0, table.len as u64, table.first_held as u64] {
            out.write_all(&number.to_le_bytes())?;
        }
    }
    for block in saved.iter().flat_map(|one| &one.tables.sequences).flat_map(|table| &table.blocks) {
        out.write_all(&block.0.to_le_bytes())?;
    }
    for one in saved.iter().filter(|one| one.cache.paging.seals()) {
        out.write_all(&one.tables.open.iter().map(|&open| u8::from(open)).collect::<Vec<u8>>())?;
    }
    for one in saved {
        for layer in 0..one.cache.config.num_layers {
            if one.cache.paging.seals() {
                one.write_records(layer, false, out)?;
            }
            one.write_records(layer, true, out)?;
        }
    }
    Ok(())
}
