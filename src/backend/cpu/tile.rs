//! A sealed tile as a record: the oracle's codes and parameters, placed in a code order.

use super::record::{read_f16, write_f16};
use crate::format::order::word_codes;
use crate::format::tile::{K_ROTATED, NO_FIRST_ROW, TILE_VERSION};
use crate::format::{CodeOrder, SealedTile};
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

impl Plane {
    fn mask(&self) -> u8 {
        (1 << self.bits) - 1
    }

    /// Bytes of a lane's word.
    fn word_bytes(&self) -> usize {
        word_codes(self.bits) * self.bits as usize / 8
    }

    /// Visits every word of `[lanes, depth]` codes with where it is, its lane, the first of its values, and the bits that
    /// each of them begins at; `index` is the order.
    fn words(
        &self,
        [lanes, depth]: [usize; 2],
        index: impl Fn(usize, usize) -> usize,
        mut visit: impl FnMut(usize, usize, usize, &[u32]),
    ) {
        let count = word_codes(self.bits);
        let starts: Vec<u32> = (0..count).map(|value| index(0, value) as u32 * self.bits).collect();
        for lane in 0..lanes {
            for first in (0..depth).step_by(count) {
                visit(self.offset + index(lane, first) * self.bits as usize / 8, lane, first, &starts);
            }
        }
    }
}

/// Writes codes that are given in canonical order, `[depth, lanes]`; `index` is the CPU's.
fn pack(
    record: &mut [u8],
    plane: &Plane,
    order: CodeOrder,
    [lanes, depth]: [usize; 2],
    index: impl Fn(usize, usize) -> usize,
    codes: &[u8],
) {
    let (mask, bytes) = (plane.mask(), plane.word_bytes());
    match order {
        CodeOrder::Canonical => {
            let bytes = record[plane.offset..].iter_mut().zip(codes.chunks_exact(8 / plane.bits as usize));
            for (byte, codes) in bytes {
                *byte = codes.iter().rev().fold(0, |byte, code| byte << plane.bits | code >> plane.shift & mask);
            }
        }
        CodeOrder::Cpu => plane.words([lanes, depth], index, |at, lane, first, starts| {
            let code = |value: usize| codes[(first + value) * lanes + lane] >> plane.shift & mask;
            let bits = |(value, start): (usize, &u32)| u32::from(code(value)) << start;
            let word = starts.iter().enumerate().map(bits).fold(0, |word, bits| word | bits);
            record[at..at + bytes].copy_from_slice(&word.to_le_bytes()[..bytes]);
        }),
    }
}

/// Reads codes into canonical order, `[depth, lanes]`, in which they are 0 before the first plane.
fn unpack(
    record: &[u8],
    plane: &Plane,
    order: CodeOrder,
    [lanes, depth]: [usize; 2],
    index: impl Fn(usize, usize) -> usize,
    codes: &mut [u8],
) {
    let (mask, bytes) = (plane.mask(), plane.word_bytes());
    match order {
        CodeOrder::Canonical => {
            let bytes = record[plane.offset..].iter().zip(codes.chunks_exact_mut(8 / plane.bits as usize));
            for (byte, codes) in bytes {
                for (value, code) in codes.iter_mut().enumerate() {
                    *code |= (byte >> (value as u32 * plane.bits) & mask) << plane.shift;
                }
            }
        }
        CodeOrder::Cpu => plane.words([lanes, depth], index, |at, lane, first, starts| {
            let mut word = [0; 4];
            word[..bytes].copy_from_slice(&record[at..at + bytes]);
            let word = u32::from_le_bytes(word);
            for (value, start) in starts.iter().enumerate() {
                codes[(first + value) * lanes + lane] |= ((word >> start) as u8 & mask) << plane.shift;
            }
        }),
    }
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
pub fn write(layout: SealedTile, order: CodeOrder, record: &mut [u8], tile: &Tile) {
    let SealedTile { head_dim, block_size, .. } = layout;
    let shape = [block_size, head_dim];
    record[layout.header()..].fill(0);
    for plane in planes(layout, layout.k_codes()) {
        let index = |token, channel| order.tile_k(shape, plane.bits, token, channel);
        pack(record, &plane, order, shape, index, &tile.k_codes);
    }
    for plane in planes(layout, layout.v_codes()) {
        let index = |channel, token| order.tile_v(shape, plane.bits, token, channel);
        pack(record, &plane, order, [head_dim, block_size], index, &tile.v_codes);
    }
    let mut halves = |offset: usize, values: &[f16]| {
        values.iter().enumerate().for_each(|(index, &value)| write_f16(record, offset, index, value));
    };
    halves(layout.k_channel_scale(), &tile.k_channel_scale);
    halves(layout.k_channel_zero_point(), &tile.k_channel_zero_point);
    halves(layout.k_token_scale(), &tile.k_token_scale);
    halves(layout.v_token_scale(), &tile.v_token_scale);
    halves(layout.v_token_zero_point(), &tile.v_token_zero_point);
    record[layout.first_v()..layout.header()].fill(0);
    let mut halves = |offset: usize, values: &[f16]| {
        values.iter().enumerate().for_each(|(index, &value)| write_f16(record, offset, index, value));
    };
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
pub fn read(layout: SealedTile, order: CodeOrder, record: &[u8]) -> Tile {
    let SealedTile { head_dim, block_size, bits } = layout;
    let shape = [block_size, head_dim];
    let (mut k_codes, mut v_codes) = (vec![0; block_size * head_dim], vec![0; block_size * head_dim]);
    for plane in planes(layout, layout.k_codes()) {
        let index = |token, channel| order.tile_k(shape, plane.bits, token, channel);
        unpack(record, &plane, order, shape, index, &mut k_codes);
    }
    for plane in planes(layout, layout.v_codes()) {
        let index = |channel, token| order.tile_v(shape, plane.bits, token, channel);
        unpack(record, &plane, order, [head_dim, block_size], index, &mut v_codes);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{HeadFeedback, encode_tile};

    #[test]
    fn a_record_holds_what_was_written() {
        for (bits, head_dim, block_size, first_row) in [(4, 64, 128, None), (3, 48, 16, Some(3)), (2, 80, 32, Some(0))]
        {
            let wave = |i: usize, f: f32| (i as f32 * f).sin() * (1.0 + (i % 7) as f32);
            let k: Vec<f32> = (0..block_size * head_dim).map(|i| wave(i, 0.7)).collect();
            let v: Vec<f32> = (0..block_size * head_dim).map(|i| wave(i, 0.3)).collect();
            let tile = encode_tile(&k, &v, head_dim, bits, &HeadFeedback::none(head_dim), first_row);
            let layout = SealedTile { head_dim, block_size, bits };
            for order in CodeOrder::ALL {
                let mut record = vec![0xa5; layout.bytes()];
                write(layout, order, &mut record, &tile);
                assert_eq!(read(layout, order, &record), Tile { num_clamped: 0, ..tile.clone() });
                assert_eq!(record[layout.header() + 4..], vec![0; layout.bytes() - layout.header() - 4]);
                for plane in planes(layout, layout.k_codes()) {
                    let (token, channel) = (block_size - 3, head_dim - 2);
                    let bit = order.tile_k([block_size, head_dim], plane.bits, token, channel) * plane.bits as usize;
                    let stored = record[plane.offset + bit / 8] >> (bit % 8) & plane.mask();
                    assert_eq!(stored, tile.k_codes[channel * block_size + token] >> plane.shift & plane.mask());
                }
            }
        }
    }
}
