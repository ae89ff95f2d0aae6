//! Capacity planning: how many tokens and sequences fit in a given memory.
//!
//! A *layer group* is the layers of a model with the same heads, window and storage. A sequence of `context` tokens takes
//! whole blocks in each layer: `ceil(context / block_size)` of them, or, under a sliding window, at most
//! `ceil((window - 1) / block_size) + 1` (the window may begin inside a block). A block takes one record for each kv head
//! on this device: a tile in formats that seal, else a page. In formats that seal, a running sequence also has
//! [`OPEN_PAGES`] pages in every layer and kv head, however short it is. All arithmetic is on integers; the bytes of a
//! record come from [`crate::format`].
//!
//! ```text
//! open_page_bytes = sum over groups of num_layers * num_kv_heads * OPEN_PAGES * page_bytes       (0 where nothing seals)
//! sequence_bytes  = sum over groups of num_layers * num_kv_heads * blocks_held * record_bytes    + open_page_bytes
//! open_bytes      = sequence_bytes - bytes at rest of the visible tokens, without rounding up to blocks
//! tokens          = whole blocks of the memory that the open pages of the running sequences leave
//! ```

use super::check_block_size;
use crate::error::{Error, Result};
use crate::format::{Dtype, Format, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM, page_bytes, record_bytes, supports_head_dim};

/// Pages of a running sequence in every layer and kv head, in formats that seal. Two: a page that has just filled is
/// sealed by the next step, which already writes to the page after it. Short sequences, which have one, are counted with
/// two; a step that appends a later chunk of a prompt may use two more, which are not counted.
pub const OPEN_PAGES: usize = 2;

/// How the keys and values of a layer are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// Blocks of this crate. The dtype is that of `raw` pages, ignored in other formats.
    Pages(Format, Dtype),
    /// An engine's unquantized cache: K and V elements and nothing else.
    Dense {
        /// Bytes of one element.
        element_bytes: usize,
    },
}

impl Storage {
    /// Parses a name: a cache format (`raw` in bf16), or `bf16` or `fp8` for an engine's unquantized cache.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "bf16" => Ok(Self::Dense { element_bytes: 2 }),
            "fp8" => Ok(Self::Dense { element_bytes: 1 }),
            _ => Format::parse(name).map(|format| Self::Pages(format, Dtype::Bf16)).ok_or_else(|| {
                let known = Format::ALL.iter().map(|format| format.name()).chain(["bf16", "fp8"]);
                Error::UnknownFormat { given: name.to_owned(), known: known.collect::<Vec<_>>().join(", ") }
            }),
        }
    }

    /// Bytes of one block at rest, for one layer and kv head.
    pub fn record_bytes(self, head_dim: usize, block_size: usize) -> Result<u128> {
        match self {
            Self::Pages(format, dtype) => {
                if !supports_head_dim(head_dim) {
                    return Err(Error::Unsupported(format!(
                        "head_dim {head_dim}: {} pages take multiples of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}",
                        format.name()
                    )));
                }
                Ok(record_bytes(format, dtype, head_dim, block_size) as u128)
            }
            Self::Dense { element_bytes } => Ok(2 * product([block_size, head_dim, element_bytes])?),
        }
    }

    /// Bytes of the open pages of one sequence, for one layer and kv head; 0 in formats that never seal.
    fn open_page_bytes(self, head_dim: usize, block_size: usize) -> u128 {
        match self {
            Self::Pages(format, dtype) if format.tile_bits().is_some() => {
                (OPEN_PAGES * page_bytes(format, dtype, head_dim, block_size)) as u128
            }
            _ => 0,
        }
    }
}

/// Layers with the same heads, window and storage, as one device stores them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerGroup {
    /// Number of layers.
    pub num_layers: usize,
    /// Key/value heads of one layer on this device.
    pub num_kv_heads: usize,
    /// Channels of one head.
    pub head_dim: usize,
    /// Sliding window in tokens, the query itself included; `None`: full attention.
    pub window: Option<usize>,
    /// How keys and values are stored.
    pub storage: Storage,
}

impl LayerGroup {
    /// Bytes of one block, over all layers and kv heads of the group.
    fn block_bytes(&self, block_size: usize) -> Result<u128> {
        let records = product([self.num_layers, self.num_kv_heads])?;
        multiply(records, self.storage.record_bytes(self.head_dim, block_size)?)
    }

    /// Bytes of a sequence's open pages, over all layers and kv heads of the group. `head_dim` must be a supported one.
    fn open_page_bytes(&self, block_size: usize) -> Result<u128> {
        let records = product([self.num_layers, self.num_kv_heads])?;
        multiply(records, self.storage.open_page_bytes(self.head_dim, block_size))
    }
}

/// The result of [`capacity`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Bytes of one running sequence of `context` tokens: whole blocks and open pages.
    pub sequence_bytes: u64,
    /// The part of `sequence_bytes` beyond the visible tokens at rest: open pages, and the unused part of blocks that are
    /// partly filled or partly outside the window.
    pub open_bytes: u64,
    /// The part of `open_bytes` that is open pages.
    pub open_page_bytes: u64,
    /// Tokens that fit beside the open pages of `sequences` (of one sequence if none fits): whole blocks if every layer
    /// has full attention, else `memory_bytes * context / sequence_bytes`.
    pub tokens: u64,
    /// Sequences of `context` tokens that fit, at most `max_sequences`.
    pub sequences: u64,
}

/// Blocks of one layer allocated to a sequence of `context` tokens after a step has begun. Blocks outside the window are
/// released as a step begins, so a prompt appended by one step stays allocated in full until the next step.
#[must_use]
pub fn blocks_held(context: usize, block_size: usize, window: Option<usize>) -> usize {
    let all = context.div_ceil(block_size);
    window.map_or(all, |window| all.min(window.saturating_sub(1).div_ceil(block_size) + 1))
}

/// Bytes of one running sequence of `context` tokens, over all `groups`.
pub fn sequence_bytes(groups: &[LayerGroup], block_size: usize, context: usize) -> Result<u64> {
    check(groups, block_size, context)?;
    narrow(add(at_rest(groups, block_size, context)?, open_pages(groups, block_size)?)?)
}

/// Computes what fits in `memory_bytes` if every sequence is `context` tokens long and at most `max_sequences` run at once.
pub fn capacity(
    groups: &[LayerGroup],
    block_size: usize,
    context: usize,
    memory_bytes: u64,
    max_sequences: Option<u64>,
) -> Result<Capacity> {
    check(groups, block_size, context)?;
    let at_rest = at_rest(groups, block_size, context)?;
    let open_page_bytes = open_pages(groups, block_size)?;
    let sequence_bytes = add(at_rest, open_page_bytes)?;
    let mut used = 0_u128;
    let mut block_bytes = 0_u128;
    for group in groups {
        let block = group.block_bytes(block_size)?;
        let read = group.window.map_or(context, |window| window.min(context));
        block_bytes = add(block_bytes, block)?;
        used = add(used, multiply(block, read as u128)?.div_ceil(block_size as u128))?;
    }
    let memory = u128::from(memory_bytes);
    let sequences = (memory / sequence_bytes).min(max_sequences.map_or(u128::MAX, u128::from));
    let tokens = if groups.iter().all(|group| group.window.is_none()) {
        let left = memory.saturating_sub(multiply(open_page_bytes, sequences.max(1))?);
        multiply(left / block_bytes, block_size as u128)?
    } else {
        multiply(memory, context as u128)? / sequence_bytes
    };
    Ok(Capacity {
        sequence_bytes: narrow(sequence_bytes)?,
        open_bytes: narrow(sequence_bytes - used)?,
        open_page_bytes: narrow(open_page_bytes)?,
        tokens: narrow(tokens)?,
        sequences: narrow(sequences)?,
    })
}

/// Bytes of a sequence's blocks at rest.
fn at_rest(groups: &[LayerGroup], block_size: usize, context: usize) -> Result<u128> {
    groups.iter().try_fold(0, |total, group| {
        let blocks = blocks_held(context, block_size, group.window) as u128;
        add(total, multiply(group.block_bytes(block_size)?, blocks)?)
    })
}

/// Bytes of a sequence's open pages. Call [`at_rest`] first, which refuses an unsupported `head_dim`.
fn open_pages(groups: &[LayerGroup], block_size: usize) -> Result<u128> {
    groups.iter().try_fold(0, |total, group| add(total, group.open_page_bytes(block_size)?))
}

fn check(groups: &[LayerGroup], block_size: usize, context: usize) -> Result<()> {
    check_block_size(block_size)?;
    if context == 0 {
        return Err(Error::setting("context", "at least 1 token", &context));
    }
    if groups.is_empty() {
        return Err(Error::Config("no layer stores keys and values: nothing to plan".into()));
    }
    for group in groups {
        if group.num_layers == 0 || group.num_kv_heads == 0 || group.head_dim == 0 || group.window == Some(0) {
            return Err(Error::Config(format!(
                "a layer group of {} layers, {} kv heads, head_dim {} and window {:?}: each must be at least 1",
                group.num_layers, group.num_kv_heads, group.head_dim, group.window
            )));
        }
    }
    Ok(())
}

fn overflow() -> Error {
    Error::Config("the sizes multiply to more bytes than a 64-bit number holds".into())
}

fn add(a: u128, b: u128) -> Result<u128> {
    a.checked_add(b).ok_or_else(overflow)
}

fn multiply(a: u128, b: u128) -> Result<u128> {
    a.checked_mul(b).ok_or_else(overflow)
}

fn product<const N: usize>(factors: [usize; N]) -> Result<u128> {
    factors.into_iter().try_fold(1, |product, factor| multiply(product, factor as u128))
}

fn narrow(value: u128) -> Result<u64> {
    u64::try_from(value).map_err(|_| overflow())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const INT8: Storage = Storage::Pages(Format::Int8, Dtype::Bf16);
    const INT4: Storage = Storage::Pages(Format::Int4, Dtype::Bf16);

    fn llama_3_8b(storage: Storage) -> LayerGroup {
        LayerGroup { num_layers: 32, num_kv_heads: 8, head_dim: 128, window: None, storage }
    }

    #[test]
    fn llama_3_8b_takes_68096_bytes_per_token_in_int8_and_131072_in_bf16() {
        let bytes = |name| sequence_bytes(&[llama_3_8b(Storage::parse(name).unwrap())], 128, 32_768).unwrap();
        assert_eq!(bytes("int8"), 68_096 * 32_768);
        assert_eq!(bytes("bf16"), 131_072 * 32_768);
        assert_eq!(bytes("raw"), bytes("bf16"));
        assert_eq!(bytes("fp8"), 65_536 * 32_768);
    }

    #[test]
    fn capacity_rounds_down_to_whole_blocks_and_whole_sequences() {
        let fits = capacity(&[llama_3_8b(INT8)], 128, 32_768, 64 * GIB, None).unwrap();
        assert_eq!(fits.tokens, (64 * GIB / (68_096 * 128)) * 128);
        assert_eq!(fits.sequences, 64 * GIB / (68_096 * 32_768));
        assert_eq!(fits.open_bytes, 0);
    }

    #[test]
    fn a_partly_filled_block_counts_in_full_and_its_rest_is_open_bytes() {
        let fits = capacity(&[llama_3_8b(INT8)], 128, 129, GIB, None).unwrap();
        assert_eq!(fits.sequence_bytes, 2 * 128 * 68_096);
        assert_eq!(fits.open_bytes, 127 * 68_096);
    }

    #[test]
    fn record_bytes_of_tiles_match_the_published_bytes_per_token() {
        let at_rest = |name, head_dim| {
            let storage = Storage::parse(name).unwrap();
            storage.record_bytes(head_dim, 128).unwrap() as f64 / 128.0
        };
        assert_eq!(["int4", "int3", "int2"].map(|name| at_rest(name, 128)), [139.125, 107.125, 75.125]);
        assert_eq!(["int4", "int3", "int2"].map(|name| at_rest(name, 64)), [72.625, 56.625, 40.625]);
    }

    #[test]
    fn a_running_sequence_has_two_open_pages_beside_its_tiles() {
        // 32 layers x 8 kv heads: tiles of 17,808 bytes, pages of 34,048.
        let fits = capacity(&[llama_3_8b(INT4)], 128, 32_768, 64 * GIB, None).unwrap();
        assert_eq!(fits.open_page_bytes, 256 * 2 * 34_048);
        assert_eq!(fits.open_bytes, fits.open_page_bytes);
        assert_eq!(fits.sequence_bytes, 256 * (256 * 17_808 + 2 * 34_048));
        assert_eq!(fits.sequence_bytes, sequence_bytes(&[llama_3_8b(INT4)], 128, 32_768).unwrap());
        assert_eq!(fits.sequences, 58); // 64 GiB / 1,184,497,664 = 58.01
        assert_eq!(fits.tokens, (64 * GIB - 58 * 256 * 2 * 34_048) / (256 * 17_808) * 128);
    }

    #[test]
    fn tokens_fill_the_memory_left_by_the_open_pages_of_running_sequences() {
        let tokens = |memory, max| capacity(&[llama_3_8b(INT4)], 128, 32_768, memory, max).unwrap().tokens;
        let (block, pages) = (256 * 17_808, 256 * 2 * 34_048);
        assert_eq!(tokens(64 * GIB, Some(1)), (64 * GIB - pages) / block * 128);
        assert_eq!(tokens(64 * GIB, Some(1000)), tokens(64 * GIB, None));
        assert_eq!(tokens(pages + 3 * block, None), 3 * 128, "one sequence runs, shorter than the context");
        assert_eq!(tokens(pages - 1, None), 0);
        let int8 = |max| capacity(&[llama_3_8b(INT8)], 128, 32_768, 64 * GIB, max).unwrap();
        assert_eq!(int8(Some(5)), Capacity { sequences: 5, ..int8(None) });
    }

    #[test]
    fn sliding_groups_have_open_pages_too() {
        let full = LayerGroup { num_layers: 4, num_kv_heads: 1, head_dim: 256, window: None, storage: INT4 };
        let sliding = LayerGroup { num_layers: 14, window: Some(512), ..full };
        let (tile, page) = (34_832, 2 * 128 * 256 + 6 * 128 + 4 * 256);
        let fits = capacity(&[full, sliding], 128, 8192, GIB, None).unwrap();
        assert_eq!(fits.open_page_bytes, 18 * 2 * page);
        assert_eq!(fits.sequence_bytes, (4 * 64 + 14 * 5) * tile + 18 * 2 * page);
        assert_eq!(fits.open_bytes, 14 * tile + 18 * 2 * page);
        assert_eq!(fits.tokens, GIB * 8192 / fits.sequence_bytes);
    }

    #[test]
    fn a_sliding_layer_takes_its_window_and_at_most_one_block_more() {
        assert_eq!(blocks_held(10_000, 128, Some(1024)), 9);
        assert_eq!(blocks_held(1024, 128, Some(1024)), 8);
        assert_eq!(blocks_held(1025, 128, Some(1024)), 9);
        assert_eq!(blocks_held(10_000, 128, Some(1)), 1);
        assert_eq!(blocks_held(0, 128, None), 0);
    }

    #[test]
    fn mixed_groups_add_up_and_tokens_scale_with_the_context() {
        let full = LayerGroup { num_layers: 4, num_kv_heads: 1, head_dim: 256, window: None, storage: INT8 };
        let sliding = LayerGroup { num_layers: 14, window: Some(512), ..full };
        let record = 2 * 128 * 256 + 6 * 128 + 4 * 256;
        let expected = (4 * 64 + 14 * 5) * record;
        let fits = capacity(&[full, sliding], 128, 8192, GIB, None).unwrap();
        assert_eq!(fits.sequence_bytes, expected);
        assert_eq!(fits.open_bytes, 14 * record);
        assert_eq!(fits.tokens, GIB * 8192 / expected);
    }

    #[test]
    fn an_unsupported_head_dim_is_refused_unless_the_layer_is_dense() {
        let wide = LayerGroup { head_dim: 512, ..llama_3_8b(INT8) };
        assert!(matches!(sequence_bytes(&[wide], 128, 1), Err(Error::Unsupported(_))));
        let dense = LayerGroup { storage: Storage::Dense { element_bytes: 2 }, ..wide };
        assert_eq!(sequence_bytes(&[dense], 128, 128).unwrap(), 32 * 8 * 128 * 512 * 4);
    }

    #[test]
    fn invalid_settings_are_typed_errors() {
        let good = llama_3_8b(INT8);
        assert!(matches!(sequence_bytes(&[good], 100, 1), Err(Error::InvalidSetting { name: "block_size", .. })));
        assert!(matches!(sequence_bytes(&[good], 128, 0), Err(Error::InvalidSetting { name: "context", .. })));
        assert!(matches!(sequence_bytes(&[], 128, 1), Err(Error::Config(_))));
        assert!(matches!(sequence_bytes(&[LayerGroup { window: Some(0), ..good }], 128, 1), Err(Error::Config(_))));
        assert!(matches!(sequence_bytes(&[good], 128, usize::MAX), Err(Error::Config(_))));
        assert!(matches!(Storage::parse("int5"), Err(Error::UnknownFormat { .. })));
    }
}
