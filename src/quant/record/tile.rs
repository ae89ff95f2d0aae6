//! Sealed tiles: the codes and parameters of a [`Tile`].

use super::element::{read_f16, write_f16};
use super::planes::Places;
use crate::format::tile::{K_ROTATED, NO_FIRST_ROW, TILE_VERSION};
use crate::format::{Arrangement, SealedTile, TileParameter};
use crate::quant::tile::{FirstV, Frame, Tile};
use half::f16;

/// Is the K of this record rotated?
#[must_use]
pub fn k_is_rotated(layout: SealedTile, order: Arrangement, record: &[u8]) -> bool {
    record[order.header(layout) + 1] & K_ROTATED != 0
}

/// The row of the sequence's first token, if the tile holds it.
#[must_use]
pub fn first_row(layout: SealedTile, order: Arrangement, record: &[u8]) -> Option<usize> {
    let row = record[order.header(layout) + 2];
    (row != NO_FIRST_ROW).then_some(row as usize)
}

/// Writes a tile of this layout.
pub fn write(layout: SealedTile, order: Arrangement, record: &mut [u8], tile: &Tile) {
    record.fill(0);
    for &plane in layout.planes() {
        Places::k(layout, order, plane).pack(&tile.k_codes, record);
        Places::v(layout, order, plane).pack(&tile.v_codes, record);
    }
    let mut halves = |parameter: TileParameter, values: &[f16]| {
        for (index, &value) in values.iter().enumerate() {
            write_f16(record, order.tile_parameter(layout, parameter, index), value);
        }
    };
    halves(TileParameter::KChannelScale, &tile.k_channel_scale);
    halves(TileParameter::KChannelZeroPoint, &tile.k_channel_zero_point);
    halves(TileParameter::KTokenScale, &tile.k_token_scale);
    halves(TileParameter::VTokenScale, &tile.v_token_scale);
    halves(TileParameter::VTokenZeroPoint, &tile.v_token_zero_point);
    let mut first_row = NO_FIRST_ROW;
    if let Some(first) = &tile.first_v {
        halves(TileParameter::FirstVScale, &[first.scale]);
        halves(TileParameter::FirstVZeroPoint, &[first.zero_point]);
        first.codes.iter().enumerate().for_each(|(d, &code)| record[order.first_v(layout, d)] = code);
        first_row = first.row as u8;
    }
    let flags = if tile.k_frame == Frame::Rotated { K_ROTATED } else { 0 };
    record[order.header(layout)..][..4].copy_from_slice(&[TILE_VERSION, flags, first_row, 0]);
}

/// Reads a tile of this layout.
#[must_use]
pub fn read(layout: SealedTile, order: Arrangement, record: &[u8]) -> Tile {
    let SealedTile { head_dim, block_size, bits } = layout;
    let (mut k_codes, mut v_codes) = (vec![0; block_size * head_dim], vec![0; block_size * head_dim]);
    for &plane in layout.planes() {
        Places::k(layout, order, plane).unpack(record, &mut k_codes);
        Places::v(layout, order, plane).unpack(record, &mut v_codes);
    }
    let half = |parameter, index| read_f16(record, order.tile_parameter(layout, parameter, index));
    let halves = |parameter: TileParameter| (0..parameter.count(layout)).map(|index| half(parameter, index)).collect();
    Tile {
        bits,
        head_dim,
        block_size,
        k_codes,
        v_codes,
        k_channel_scale: halves(TileParameter::KChannelScale),
        k_channel_zero_point: halves(TileParameter::KChannelZeroPoint),
        k_token_scale: halves(TileParameter::KTokenScale),
        v_token_scale: halves(TileParameter::VTokenScale),
        v_token_zero_point: halves(TileParameter::VTokenZeroPoint),
        first_v: first_row(layout, order, record).map(|row| FirstV {
            row,
            codes: (0..head_dim).map(|d| record[order.first_v(layout, d)]).collect(),
            scale: half(TileParameter::FirstVScale, 0),
            zero_point: half(TileParameter::FirstVZeroPoint, 0),
        }),
        k_frame: if k_is_rotated(layout, order, record) { Frame::Rotated } else { Frame::Plain },
        num_clamped: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{HeadFeedback, encode_tile};

    #[test]
    fn a_record_holds_the_tile_that_was_written() {
        for (bits, head_dim, block_size, first_row) in [(4, 64, 128, None), (3, 48, 16, Some(3)), (2, 80, 32, Some(0))]
        {
            let wave = |i: usize, f: f32| (i as f32 * f).sin() * (1.0 + (i % 7) as f32);
            let k: Vec<f32> = (0..block_size * head_dim).map(|i| wave(i, 0.7)).collect();
            let v: Vec<f32> = (0..block_size * head_dim).map(|i| wave(i, 0.3)).collect();
            let tile = encode_tile(&k, &v, head_dim, bits, &HeadFeedback::none(head_dim), first_row);
            let layout = SealedTile { head_dim, block_size, bits };
            for order in Arrangement::ALL {
                let mut record = vec![0xa5; layout.bytes()];
                write(layout, order, &mut record, &tile);
                assert_eq!(read(layout, order, &record), Tile { num_clamped: 0, ..tile.clone() });
                assert_eq!(record[layout.header() + 4..], vec![0; layout.bytes() - layout.header() - 4]);
                for &plane in layout.planes() {
                    let (token, channel) = (block_size - 3, head_dim - 2);
                    let (bit, mask) = (order.tile_k(layout, plane, token, channel), (1 << plane.bits) - 1);
                    let stored = record[bit / 8] >> (bit % 8) & mask;
                    assert_eq!(stored, tile.k_codes[channel * block_size + token] >> plane.shift & mask);
                }
            }
        }
    }
}
