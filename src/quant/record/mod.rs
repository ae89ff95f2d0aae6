//! Records: the bytes of pages and tiles, in any [`Arrangement`]. Values become bytes here and come back, whatever the
//! device: every backend's records are those that this module writes, byte for byte.
//!
//! [`raw`] and [`int8`] write pages token by token, [`tile`] writes tiles; [`read_k`] and [`read_v`] decode any record.
//! Files hold records in [`Arrangement::Canonical`]: [`reorder`](fn@reorder) copies a record from one arrangement into
//! another, [`clear_rows`] zeroes what no sequence holds, and [`check`](fn@check) says whether bytes are a record.
//!
//! A backend names one arrangement in all its calls. What is called for each token is inlined, so that the places of
//! codes are those of that arrangement alone: asking at run time which it is makes appending a fifth slower.

mod check;
mod element;
pub mod int8;
mod planes;
pub mod raw;
mod reorder;
pub mod tile;

pub use check::check;
#[cfg(feature = "cuda")]
pub(crate) use element::read as read_element;
pub use reorder::{clear_rows, reorder};

use super::tile::{decode_tile_k, decode_tile_v};
use crate::format::{Arrangement, RecordLayout};

/// Decodes the K of a record's tokens, `[block_size, head_dim]`.
pub fn read_k(layout: RecordLayout, order: Arrangement, record: &[u8], k: &mut [f32]) {
    match layout {
        RecordLayout::Raw(page) => raw::read_k(page, order, record, k),
        RecordLayout::Int8(page) => int8::read_k(page, order, record, k),
        RecordLayout::Tile(layout) => decode_tile_k(&tile::read(layout, order, record), k),
    }
}

/// Decodes the V of a record's tokens as it is stored, rotated in formats that seal, `[block_size, head_dim]`.
pub fn read_v(layout: RecordLayout, order: Arrangement, record: &[u8], v: &mut [f32]) {
    match layout {
        RecordLayout::Raw(page) => raw::read_v(page, order, record, v),
        RecordLayout::Int8(page) => int8::read_v(page, order, record, v),
        RecordLayout::Tile(layout) => decode_tile_v(&tile::read(layout, order, record), v),
    }
}
