//! A sealed tile as a record: the oracle's codes and parameters, placed in the CPU's code order.

use super::record::{ORDER, read_f16, write_f16};
use crate::format::SealedTile;
use crate::format::tile::{K_ROTATED, NO_FIRST_ROW, TILE_VERSION};
use crate::quant::tile::{FirstV, Frame, Tile};
use half::f16;

/// A plane of codes: its offset in the record, the width of its codes, and the lowest bit of the code that it holds.
struct Plane {
    offset: usize,
    bits: u32,
    shift: u32,
}

fn planes(layout: SealedTile, offset: usize) -> impl Iterator<Item = Plane> {
    let low = Plane { offset, bits: layout.bits & !1, shift: 0 };
    let high = (layout.bits == 3).then_some(Plane { offset: offset + layout.high_plane(), bits: 1, shift: 2 });
    std::iter::once(low).chain(high)
}

/// Is the K of this record rotated?
pub fn k_is_rotated(layout: SealedTile, record: &[u8]) -> bool {
    record[layout.header() + 1] & K_ROTATED != 0
}

/// The row of the sequence's first token, if the tile holds it.
pub fn first_row(layout: SealedTile, record: &[u8]) -> Option<usize> {
    let row = record[layout.header() + 2];
    (row != NO_FIRST_ROW).then_some(row as usize)
}

/// Writes a tile of this layout.
pub fn write(layout: SealedTile, record: &mut [u8], tile: &Tile) {
    let shape = [layout.block_size, layout.head_dim];
    record.fill(0);
    for t in 0..layout.block_size {
        for d in 0..layout.head_dim {
            let k = tile.k_codes[d * layout.block_size + t];
            let v = tile.v_codes[t * layout.head_dim + d];
            for plane in planes(layout, layout.k_codes()) {
                put(record, &plane, ORDER.tile_k(shape, plane.bits, t, d), k);
            }
            for plane in planes(layout, layout.v_codes()) {
                put(record, &plane, ORDER.tile_v(shape, plane.bits, t, d), v);
            }
        }
    }
    let mut halves = |offset: usize, values: &[f16]| {
        values.iter().enumerate().for_each(|(index, &value)| write_f16(record, offset, index, value));
    };
    halves(layout.k_channel_scale(), &tile.k_channel_scale);
    halves(layout.k_channel_zero_point(), &tile.k_channel_zero_point);
    halves(layout.k_token_scale(), &tile.k_token_scale);
    halves(layout.v_token_scale(), &tile.v_token_scale);
    halves(layout.v_token_zero_point(), &tile.v_token_zero_point);
    let mut first_row = NO_FIRST_ROW;
    if let Some(first) = &tile.first_v {
        halves(layout.first_v_scale(), &[first.scale]);
        halves(layout.first_v_zero_point(), &[first.zero_point]);
        record[layout.first_v()..][..layout.head_dim].copy_from_slice(&first.codes);
        first_row = first.row as u8;
    }
    let flags = if tile.k_frame == Frame::Rotated { K_ROTATED } else { 0 };
    record[layout.header()..][..4].copy_from_slice(&[TILE_VERSION, flags, first_row, 0]);
}

/// Reads a tile of this layout.
pub fn read(layout: SealedTile, record: &[u8]) -> Tile {
    let SealedTile { head_dim, block_size, bits } = layout;
    let shape = [block_size, head_dim];
    let (mut k_codes, mut v_codes) = (vec![0; block_size * head_dim], vec![0; block_size * head_dim]);
    for t in 0..block_size {
        for d in 0..head_dim {
            for plane in planes(layout, layout.k_codes()) {
                k_codes[d * block_size + t] |= get(record, &plane, ORDER.tile_k(shape, plane.bits, t, d));
            }
            for plane in planes(layout, layout.v_codes()) {
                v_codes[t * head_dim + d] |= get(record, &plane, ORDER.tile_v(shape, plane.bits, t, d));
            }
        }
    }
    let halves = |offset: usize, count: usize| (0..count).map(|index| read_f16(record, offset, index)).collect();
    Tile {
        bits,
        head_dim,
        block_size,
        k_codes,
        v_codes,
        k_channel_scale: halves(layout.k_channel_scale(), head_dim),
        k_channel_zero_point: halves(layout.k_channel_zero_point(), head_dim),
        k_token_scale: halves(layout.k_token_scale(), block_size),
        v_token_scale: halves(layout.v_token_scale(), block_size),
        v_token_zero_point: halves(layout.v_token_zero_point(), block_size),
        first_v: first_row(layout, record).map(|row| FirstV {
            row,
            codes: record[layout.first_v()..][..head_dim].to_vec(),
            scale: read_f16(record, layout.first_v_scale(), 0),
            zero_point: read_f16(record, layout.first_v_zero_point(), 0),
        }),
        k_frame: if k_is_rotated(layout, record) { Frame::Rotated } else { Frame::Plain },
        num_clamped: 0,
    }
}

fn put(record: &mut [u8], plane: &Plane, index: usize, code: u8) {
    let bit = index * plane.bits as usize;
    let mask = (1u8 << plane.bits) - 1;
    record[plane.offset + bit / 8] |= (code >> plane.shift & mask) << (bit % 8);
}

fn get(record: &[u8], plane: &Plane, index: usize) -> u8 {
    let bit = index * plane.bits as usize;
    let mask = (1u8 << plane.bits) - 1;
    (record[plane.offset + bit / 8] >> (bit % 8) & mask) << plane.shift
}
