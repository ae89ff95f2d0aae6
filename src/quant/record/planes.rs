//! Codes of a tile in its planes of bits.

use crate::format::{Arrangement, Plane, SealedTile};

/// Which bits of a record a matrix of codes takes in one plane: those of a code begin at the sum of what its row and its
/// column have here, as in every [`Arrangement`].
pub(super) struct Places {
    plane: Plane,
    rows: Vec<usize>,
    columns: Vec<usize>,
}

impl Places {
    /// The K codes, `[head_dim, block_size]`.
    pub fn k(tile: SealedTile, order: Arrangement, plane: Plane) -> Self {
        Self::new(plane, [tile.head_dim, tile.block_size], |channel, token| order.tile_k(tile, plane, token, channel))
    }

    /// The V codes, `[block_size, head_dim]`.
    pub fn v(tile: SealedTile, order: Arrangement, plane: Plane) -> Self {
        Self::new(plane, [tile.block_size, tile.head_dim], |token, channel| order.tile_v(tile, plane, token, channel))
    }

    fn new(plane: Plane, [rows, columns]: [usize; 2], bit: impl Fn(usize, usize) -> usize) -> Self {
        let first = bit(0, 0);
        let (rows, columns) = ((0..rows).map(|row| bit(row, 0)), (0..columns).map(|column| bit(0, column) - first));
        Self { plane, rows: rows.collect(), columns: columns.collect() }
    }

    fn mask(&self) -> u8 {
        (1 << self.plane.bits) - 1
    }

    /// Writes what the plane has of `codes`, into bits that are 0.
    pub fn pack(&self, codes: &[u8], record: &mut [u8]) {
        for (codes, row) in codes.chunks_exact(self.columns.len()).zip(&self.rows) {
            for (code, column) in codes.iter().zip(&self.columns) {
                let bit = row + column;
                record[bit / 8] |= (code >> self.plane.shift & self.mask()) << (bit % 8);
            }
        }
    }

    /// Adds what the plane has to `codes`, in which its bits are 0.
    pub fn unpack(&self, record: &[u8], codes: &mut [u8]) {
        for (codes, row) in codes.chunks_exact_mut(self.columns.len()).zip(&self.rows) {
            for (code, column) in codes.iter_mut().zip(&self.columns) {
                let bit = row + column;
                *code |= (record[bit / 8] >> (bit % 8) & self.mask()) << self.plane.shift;
            }
        }
    }
}
