//! Whether tables that a plan is made from are whole.

use super::{SequenceInput, sealed_to};
use crate::error::{Error, Result};
use crate::paging::{BlockId, PageId, Place, PlaceKind};

/// Are the tables of a sequence long enough, and do its blocks have pages where tokens are written and only there?
pub(super) fn check(block_size: usize, input: &SequenceInput<'_>, seals: bool) -> Result<()> {
    let &SequenceInput { context_len, first_held, blocks, places, .. } = input;
    let num_new = input.rows.num_tokens();
    if first_held > context_len || !first_held.is_multiple_of(block_size) {
        return Err(Error::Config(format!(
            "first_held {first_held} is no block boundary within the {context_len} tokens before the step"
        )));
    }
    let seq_len = context_len.saturating_add(num_new);
    if i32::try_from(seq_len).is_err() {
        return Err(Error::Config(format!("a sequence cannot be {seq_len} tokens long")));
    }
    let end = seq_len.div_ceil(block_size);
    if blocks.len() < end || places.len() < blocks.len() {
        return Err(Error::Config(format!(
            "{} places for a block table of {} blocks, which has to hold {seq_len} tokens in blocks of {block_size}",
            places.len(),
            blocks.len()
        )));
    }
    let first = if num_new == 0 { end } else { context_len / block_size };
    let at_once =
        if seals { context_len.div_ceil(block_size)..sealed_to(block_size, context_len, num_new) } else { 0..0 };
    for block in first..end {
        let is_tile = places[block].as_page().is_none();
        if is_tile != at_once.contains(&block) {
            let what = if is_tile { "is written and has no page" } else { "is sealed by the step and has a page" };
            return Err(Error::Config(format!("block {block} of a sequence of {seq_len} tokens {what}")));
        }
    }
    for block in first_held / block_size..end {
        if let PlaceKind::Tile(tile) = places[block].kind()
            && tile != blocks[block]
        {
            return Err(Error::Config(format!(
                "block {}, entry {block}, is at the tile of block {tile}",
                blocks[block]
            )));
        }
    }
    Ok(())
}

/// Each written block is written through one sequence, and each written page is of one block: what lets backends write
/// blocks in parallel.
pub(super) fn check_written(block_size: usize, inputs: &[SequenceInput<'_>]) -> Result<()> {
    let written = inputs.iter().filter(|input| input.rows.num_tokens() > 0).flat_map(|input| {
        let first = input.context_len / block_size;
        let end = (input.context_len + input.rows.num_tokens()).div_ceil(block_size);
        input.blocks[first..end].iter().copied().zip(input.places[first..end].iter().copied())
    });
    let (mut blocks, places): (Vec<BlockId>, Vec<Place>) = written.unzip();
    blocks.sort_unstable();
    if let Some(block) = repeated(&blocks) {
        return Err(Error::Config(format!("block {block} would be written through two sequences")));
    }
    let mut pages: Vec<PageId> = places.into_iter().filter_map(Place::as_page).collect();
    pages.sort_unstable();
    match repeated(&pages) {
        Some(PageId(page)) => Err(Error::Config(format!("page {page} would be written for two blocks"))),
        None => Ok(()),
    }
}

/// The first element that is there twice, of a sorted slice.
fn repeated<T: PartialEq>(sorted: &[T]) -> Option<&T> {
    sorted.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| &pair[0])
}
