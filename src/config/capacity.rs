//! How many tokens and sequences fit in so many bytes?
//!
//! A *layer group* is the layers of a model that store their tokens alike. A sequence of `context` tokens holds whole
//! blocks in each layer: `ceil(context / block_size)` of them, or, where a sliding window bounds what is read,
//! at most `ceil((window - 1) / block_size) + 1` (the window may begin inside a block). A block costs one record for each
//! kv head on this device: a page, or in formats that seal a tile. There, a sequence that runs also has [`OPEN_PAGES`]
//! pages in every layer and kv head, however short it is. All of it is integers; the bytes of a record come from
//! [`crate::format`].
//!
//! ```text
//! open_page_bytes = sum over groups of num_layers * num_kv_heads * OPEN_PAGES * page_bytes       (0 where nothing seals)
//! sequence_bytes  = sum over groups of num_layers * num_kv_heads * blocks_held * record_bytes    + open_page_bytes
//! open_bytes      = sequence_bytes - what the tokens that are read would take at rest, without rounding up to blocks
//! tokens          = whole blocks of what memory the open pages of the sequences that run leave
//! ```

use crate::error::{Error, Result};
use crate::format::{
    Dtype, Format, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM, page_bytes, record_bytes, supports_block_size, supports_head_dim,
};

/// Pages that a running sequence has in every layer and kv head of a format that seals. Two: a page that has just filled
/// is sealed by the next step, which writes to the page after it already. A sequence of a few tokens has one, and is
/// counted with two; while a later chunk of a prompt is written there may be two more for that step, which are not.
pub const OPEN_PAGES: usize = 2;

/// What a layer's keys and values are stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// Pages of this crate; the element type is that of `raw` pages and says nothing of other formats.
    Pages(Format, Dtype),
    /// An engine's own cache: K and V elements of so many bytes and nothing else.
    Dense {
        /// Bytes of one element.
        element_bytes: usize,
    },
}

impl Storage {
    /// The storage called `name`: a cache format (`raw` in bf16), or `bf16` or `fp8` for an engine's own cache.
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

    /// Bytes of one block of one kv head at rest.
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

    /// Bytes of the open pages of one sequence and kv head; 0 where blocks stay what they are.
    fn open_page_bytes(self, head_dim: usize, block_size: usize) -> u128 {
        match self {
            Self::Pages(format, dtype) if format.tile_bits().is_some() => {
                (OPEN_PAGES * page_bytes(format, dtype, head_dim, block_size)) as u128
            }
            _ => 0,
        }
    }
}

/// Layers that store their tokens alike, as seen by one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerGroup {
    /// Layers in the group.
    pub num_layers: usize,
    /// Key/value heads of one layer on this device.
    pub num_kv_heads: usize,
    /// Channels of one head.
    pub head_dim: usize,
    /// Tokens that a query reads, itself included; `None`: all.
    pub window: Option<usize>,
    /// What the keys and values are stored as.
    pub storage: Storage,
}

impl LayerGroup {
    /// Bytes of one block in every layer and kv head of the group.
    fn block_bytes(&self, block_size: usize) -> Result<u128> {
        let records = product([self.num_layers, self.num_kv_heads])?;
        multiply(records, self.storage.record_bytes(self.head_dim, block_size)?)
    }

    /// Bytes of a sequence's open pages in every layer and kv head of the group, whose `head_dim` pages take.
    fn open_page_bytes(&self, block_size: usize) -> Result<u128> {
        let records = product([self.num_layers, self.num_kv_heads])?;
        multiply(records, self.storage.open_page_bytes(self.head_dim, block_size))
    }
}

/// What fits; see [`capacity`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Bytes of one sequence of `context` tokens: whole blocks, and its open pages.
    pub sequence_bytes: u64,
    /// The part of `sequence_bytes` that no token in reach uses at rest: open pages, partly filled blocks, and blocks
    /// that a window left partly.
    pub open_bytes: u64,
    /// The part of `open_bytes` that is open pages.
    pub open_page_bytes: u64,
    /// Tokens that fit, beside the open pages of `sequences`, or of one if none fits: whole blocks where every layer
    /// reads everything, else `memory_bytes * context / sequence_bytes`.
    pub tokens: u64,
    /// Sequences of `context` tokens that fit and may run.
    pub sequences: u64,
}

/// Blocks of one layer that a sequence of `context` tokens holds once a step has begun: what left the window is released
/// then, so a prompt that one step writes whole is held whole until the next.
#[must_use]
pub fn blocks_held(context: usize, block_size: usize, window: Option<usize>) -> usize {
    let all = context.div_ceil(block_size);
    window.map_or(all, |window| all.min(window.saturating_sub(1).div_ceil(block_size) + 1))
}

/// Bytes of one running sequence of `context` tokens over all `groups`.
pub fn sequence_bytes(groups: &[LayerGroup], block_size: usize, context: usize) -> Result<u64> {
    check(groups, block_size, context)?;
    narrow(add(at_rest(groups, block_size, context)?, open_pages(groups, block_size)?)?)
}

/// What fits in `memory_bytes` when every sequence is `context` tokens long and at most `max_sequences` run at once.
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

/// Bytes of the blocks that a sequence holds.
fn at_rest(groups: &[LayerGroup], block_size: usize, context: usize) -> Result<u128> {
    groups.iter().try_fold(0, |total, group| {
        let blocks = blocks_held(context, block_size, group.window) as u128;
        add(total, multiply(group.block_bytes(block_size)?, blocks)?)
    })
}

/// Bytes of the open pages of a sequence; after [`at_rest`], which refuses a `head_dim` that pages do not take.
fn open_pages(groups: &[LayerGroup], block_size: usize) -> Result<u128> {
    groups.iter().try_fold(0, |total, group| add(total, group.open_page_bytes(block_size)?))
}

fn check(groups: &[LayerGroup], block_size: usize, context: usize) -> Result<()> {
    if !supports_block_size(block_size) {
        return Err(Error::Config(format!("block_size {block_size}: expected 16, 32, 64 or 128")));
    }
    if context == 0 {
        return Err(Error::Config("context 0: expected at least one token".into()));
    }
    if groups.is_empty() {
        return Err(Error::Config("no layer keeps keys and values: nothing to plan".into()));
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
    Error::Config("the sizes given multiply to more bytes than a 64-bit number holds".into())
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
    fn a_sequence_of_llama_3_8b_takes_68096_bytes_a_token_in_int8_and_131072_in_bf16() {
        let bytes = |name| sequence_bytes(&[llama_3_8b(Storage::parse(name).unwrap())], 128, 32_768).unwrap();
        assert_eq!(bytes("int8"), 68_096 * 32_768);
        assert_eq!(bytes("bf16"), 131_072 * 32_768);
        assert_eq!(bytes("raw"), bytes("bf16"));
        assert_eq!(bytes("fp8"), 65_536 * 32_768);
    }

    #[test]
    fn tokens_are_whole_blocks_and_sequences_whole_sequences() {
        let fits = capacity(&[llama_3_8b(INT8)], 128, 32_768, 64 * GIB, None).unwrap();
        assert_eq!(fits.tokens, (64 * GIB / (68_096 * 128)) * 128);
        assert_eq!(fits.sequences, 64 * GIB / (68_096 * 32_768));
        assert_eq!(fits.open_bytes, 0);
    }

    #[test]
    fn a_partly_filled_block_is_counted_whole_and_shown_apart() {
        let fits = capacity(&[llama_3_8b(INT8)], 128, 129, GIB, None).unwrap();
        assert_eq!(fits.sequence_bytes, 2 * 128 * 68_096);
        assert_eq!(fits.open_bytes, 127 * 68_096);
    }

    #[test]
    fn a_token_at_rest_takes_a_quarter_and_less_in_formats_that_seal() {
        let at_rest = |name, head_dim| {
            let storage = Storage::parse(name).unwrap();
            storage.record_bytes(head_dim, 128).unwrap() as f64 / 128.0
        };
        assert_eq!(["int4", "int3", "int2"].map(|name| at_rest(name, 128)), [139.125, 107.125, 75.125]);
        assert_eq!(["int4", "int3", "int2"].map(|name| at_rest(name, 64)), [72.625, 56.625, 40.625]);
    }

    #[test]
    fn a_running_sequence_of_a_format_that_seals_has_two_open_pages_beside_its_tiles() {
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
    fn tokens_are_what_the_open_pages_of_the_sequences_that_may_run_leave() {
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
    fn groups_that_slide_have_their_open_pages_too() {
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
    fn a_sliding_layer_holds_its_window_and_one_block() {
        assert_eq!(blocks_held(10_000, 128, Some(1024)), 9);
        assert_eq!(blocks_held(1024, 128, Some(1024)), 8);
        assert_eq!(blocks_held(1025, 128, Some(1024)), 9);
        assert_eq!(blocks_held(10_000, 128, Some(1)), 1);
        assert_eq!(blocks_held(0, 128, None), 0);
    }

    #[test]
    fn mixed_groups_add_up_and_tokens_follow_the_context() {
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
    fn a_head_dim_that_pages_do_not_take_is_refused_unless_the_layer_is_dense() {
        let wide = LayerGroup { head_dim: 512, ..llama_3_8b(INT8) };
        assert!(matches!(sequence_bytes(&[wide], 128, 1), Err(Error::Unsupported(_))));
        let dense = LayerGroup { storage: Storage::Dense { element_bytes: 2 }, ..wide };
        assert_eq!(sequence_bytes(&[dense], 128, 128).unwrap(), 32 * 8 * 128 * 512 * 4);
    }

    #[test]
    fn settings_that_cannot_work_are_typed_errors() {
        let good = llama_3_8b(INT8);
        assert!(matches!(sequence_bytes(&[good], 100, 1), Err(Error::Config(_))));
        assert!(matches!(sequence_bytes(&[good], 128, 0), Err(Error::Config(_))));
        assert!(matches!(sequence_bytes(&[], 128, 1), Err(Error::Config(_))));
        assert!(matches!(sequence_bytes(&[LayerGroup { window: Some(0), ..good }], 128, 1), Err(Error::Config(_))));
        assert!(matches!(sequence_bytes(&[good], 128, usize::MAX), Err(Error::Config(_))));
        assert!(matches!(Storage::parse("int5"), Err(Error::UnknownFormat { .. })));
    }
}
