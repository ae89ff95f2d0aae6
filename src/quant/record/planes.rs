//! Codes of a tile in its planes of bits.

use crate::format::{Arrangement, Plane, SealedTile};

/// Where a matrix of codes lies in one plane of a record, in units of the plane's width from its first byte on: a code is
/// at the sum of what its row and its column have here, as in every [`Arrangement`]. Where it
/// [`wraps`](Arrangement::wraps), sums count words of twice their width, whose upper half stands for the lower.
pub(super) struct Places {
    plane: Plane,
    wraps: bool,
    first_byte: usize,
    rows: Vec<usize>,
    columns: Vec<usize>,
}

impl Places {
    /// The K codes, `[head_dim, block_size]`.
    pub fn k(tile: SealedTile, order: Arrangement, plane: Plane) -> Self {
        let wraps = order.wraps(tile, plane);
        let bit = |channel, token| order.tile_k(tile, plane, token, channel);
        Self::new(plane, wraps, [tile.head_dim, tile.block_size], bit)
    }

    /// The V codes, `[block_size, head_dim]`.
    pub fn v(tile: SealedTile, order: Arrangement, plane: Plane) -> Self {
        let wraps = order.wraps(tile, plane);
        let bit = |token, channel| order.tile_v(tile, plane, token, channel);
        Self::new(plane, wraps, [tile.block_size, tile.head_dim], bit)
    }

    fn new(plane: Plane, wraps: bool, [rows, columns]: [usize; 2], bit: impl Fn(usize, usize) -> usize) -> Self {
        let first_byte = (0..rows).map(|row| bit(row, 0)).min().unwrap_or(0) / 32 * 4;
        let place = |row, column| {
            let bit = bit(row, column) - 8 * first_byte;
            (if wraps { bit / 32 * 64 + bit % 32 } else { bit }) / plane.bits as usize
        };
        Self {
            plane,
            wraps,
            first_byte,
            rows: (0..rows).map(|row| place(row, 0)).collect(),
            columns: (0..columns).map(|column| place(0, column) - place(0, 0)).collect(),
        }
    }

    /// One byte for each code's width of the plane's bytes, or of as many words of twice the width.
    fn spread(&self) -> Vec<u8> {
        let last = |places: &[usize]| places.iter().copied().max().unwrap_or(0);
        vec![0; (last(&self.rows) + last(&self.columns) + 1).next_multiple_of(64)]
    }

    /// Writes what the plane has of `codes`, into bits that are 0.
    pub fn pack(&self, codes: &[u8], record: &mut [u8]) {
        let Plane { bits, shift } = self.plane;
        let mut spread = self.spread();
        for (codes, row) in codes.chunks_exact(self.columns.len()).zip(&self.rows) {
            for (code, column) in codes.iter().zip(&self.columns) {
                spread[row + column] = code >> shift & ((1 << bits) - 1);
            }
        }
        if self.wraps {
            fold(&mut spread);
        }
        let bytes = &mut record[self.first_byte..];
        match bits {
            4 => join::<2>(&spread, bytes),
            2 => join::<4>(&spread, bytes),
            _ => join::<8>(&spread, bytes),
        }
    }

    /// Adds what the plane has to `codes`, in which its bits are 0.
    pub fn unpack(&self, record: &[u8], codes: &mut [u8]) {
        let mut spread = self.spread();
        let bytes = &record[self.first_byte..];
        match self.plane.bits {
            4 => split::<2>(bytes, &mut spread),
            2 => split::<4>(bytes, &mut spread),
            _ => split::<8>(bytes, &mut spread),
        }
        if self.wraps {
            unfold(&mut spread);
        }
        for (codes, row) in codes.chunks_exact_mut(self.columns.len()).zip(&self.rows) {
            for (code, column) in codes.iter_mut().zip(&self.columns) {
                *code |= spread[row + column] << self.plane.shift;
            }
        }
    }
}

/// Adds codes, `PER_BYTE` to a byte from its low bits up.
fn join<const PER_BYTE: usize>(spread: &[u8], bytes: &mut [u8]) {
    for (byte, codes) in bytes.iter_mut().zip(spread.as_chunks::<PER_BYTE>().0) {
        *byte |= codes.iter().rev().fold(0, |byte, code| byte << (8 / PER_BYTE) | code);
    }
}

/// The codes of bytes, `PER_BYTE` to a byte from its low bits up.
fn split<const PER_BYTE: usize>(bytes: &[u8], spread: &mut [u8]) {
    let width = 8 / PER_BYTE;
    for (byte, codes) in bytes.iter().zip(spread.as_chunks_mut::<PER_BYTE>().0) {
        for (index, code) in codes.iter_mut().enumerate() {
            *code = byte >> (width * index) & ((1u16 << width) - 1) as u8;
        }
    }
}

/// Words of 32 codes from words of twice as many, each of which is 0 in one of the halves.
fn fold(spread: &mut Vec<u8>) {
    let words = spread.as_chunks::<64>().0.iter();
    *spread = words.flat_map(|word| (0..32).map(|at| word[at] | word[at + 32])).collect();
}

/// Words of twice 32 codes, the same ones twice; as many codes as there were.
fn unfold(spread: &mut [u8]) {
    for word in (0..spread.len() / 64).rev() {
        let mut codes = [0; 32];
        codes.copy_from_slice(&spread[word * 32..][..32]);
        spread[word * 64..][..32].copy_from_slice(&codes);
        spread[word * 64 + 32..][..32].copy_from_slice(&codes);
    }
}
