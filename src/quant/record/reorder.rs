//! Records from one arrangement into another, and the rows that files do not keep.

use super::element::read_f16;
use super::tile;
use crate::format::{Arrangement, Int8Parameter, LOW_BYTES, RecordLayout};

/// Copies a record, of `from`, into `out`, of `to`.
pub fn reorder(layout: RecordLayout, [from, to]: [Arrangement; 2], record: &[u8], out: &mut [u8]) {
    match layout {
        RecordLayout::Raw(page) => {
            let mut copy = |from: usize, to: usize| {
                let bytes = page.dtype.bytes();
                out[to..to + bytes].copy_from_slice(&record[from..from + bytes]);
            };
            for (t, d) in places(page.block_size, page.head_dim) {
                copy(from.raw_k(page, t, d), to.raw_k(page, t, d));
                copy(from.raw_v(page, t, d), to.raw_v(page, t, d));
            }
        }
        RecordLayout::Int8(page) => {
            for (t, d) in places(page.block_size, page.head_dim) {
                out[to.k_code(page, t, d)] = record[from.k_code(page, t, d)];
                out[to.v_code(page, t, d)] = record[from.v_code(page, t, d)];
            }
            for parameter in Int8Parameter::ALL {
                for index in 0..parameter.count(page) {
                    let (source, at) = (from.parameter(page, parameter, index), to.parameter(page, parameter, index));
                    out[at..at + 2].copy_from_slice(&record[source..source + 2]);
                }
            }
        }
        RecordLayout::Tile(layout) => tile::write(layout, to, out, &tile::read(layout, from, record)),
    }
}

fn places(block_size: usize, head_dim: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..block_size).flat_map(move |t| (0..head_dim).map(move |d| (t, d)))
}

/// Zeroes the rows of a page in canonical order from `used` on, but those with the low bytes of a first page's tokens. A
/// tile has none.
pub fn clear_rows(layout: RecordLayout, record: &mut [u8], used: usize, is_first_page: bool) {
    let clear = |record: &mut [u8], offset: usize, row: usize, bytes: usize| {
        record[offset + row * bytes..][..bytes].fill(0);
    };
    match layout {
        RecordLayout::Raw(page) => {
            let bytes = page.head_dim * page.dtype.bytes();
            for row in used..page.block_size {
                clear(record, page.k(), row, bytes);
                clear(record, page.v(), row, bytes);
            }
        }
        RecordLayout::Int8(page) => {
            for row in used..page.block_size {
                clear(record, page.v_codes(), row, page.head_dim);
                clear(record, page.v_token_scale(), row, 2);
                clear(record, page.v_token_zero_point(), row, 2);
                let token = page.block_size - 1 - row; // whose low bytes the row has
                let is_low = is_first_page
                    && token < used
                    && page.has_low_bytes(token, used)
                    && read_f16(record, page.k_token_scale() + 2 * row) == LOW_BYTES;
                if !is_low {
                    clear(record, page.k_codes(), row, page.head_dim);
                    clear(record, page.k_token_scale(), row, 2);
                }
            }
        }
        RecordLayout::Tile(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::tile::{K_ROTATED, NO_FIRST_ROW, TILE_VERSION};
    use crate::format::{BLOCK_SIZES, Dtype, Format, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM, Plane};

    fn layouts() -> impl Iterator<Item = RecordLayout> {
        let shapes = BLOCK_SIZES
            .into_iter()
            .flat_map(|block| (HEAD_DIM_MULTIPLE..=MAX_HEAD_DIM).step_by(HEAD_DIM_MULTIPLE).map(move |d| (block, d)));
        shapes.flat_map(|(block_size, head_dim)| {
            let raw = Dtype::ALL.map(|dtype| RecordLayout::page(Format::Raw, dtype, head_dim, block_size));
            let tiles = Format::ALL.into_iter().filter_map(move |f| RecordLayout::tile(f, head_dim, block_size));
            let int8 = RecordLayout::page(Format::Int8, Dtype::F32, head_dim, block_size);
            raw.into_iter().chain(tiles).chain([int8])
        })
    }

    /// Bytes of a record that a backend could have written; the same for all codes.
    fn record(layout: RecordLayout) -> Vec<u8> {
        let mut state = 7u32;
        let mut record: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .take(layout.bytes())
        .collect();
        let tail = match layout {
            RecordLayout::Raw(_) => 0..0,
            RecordLayout::Int8(page) => page.k_token_scale()..page.bytes(),
            RecordLayout::Tile(tile) => tile.k_channel_scale()..tile.bytes(),
        };
        record[tail].fill(0x11); // finite
        if let RecordLayout::Tile(tile) = layout {
            record[tile.first_v()..].fill(0);
            record[tile.header()..][..4].copy_from_slice(&[TILE_VERSION, K_ROTATED, NO_FIRST_ROW, 0]);
        }
        record
    }

    const ORDERS: [Arrangement; 2] = [Arrangement::Cpu, Arrangement::Cuda];

    #[test]
    fn a_record_comes_back_from_canonical_order_bit_by_bit() {
        for (layout, order) in layouts().flat_map(|layout| ORDERS.map(|order| (layout, order))) {
            let canonical = record(layout);
            let (mut own, mut back) = (vec![0xa5; layout.bytes()], vec![0x5a; layout.bytes()]);
            reorder(layout, [Arrangement::Canonical, order], &canonical, &mut own);
            reorder(layout, [order, Arrangement::Canonical], &own, &mut back);
            assert!(back == canonical, "{layout:?}, {order:?}");
            assert!(canonical != own || layout.bytes() < 600, "{layout:?}, {order:?}");
        }
    }

    #[test]
    fn canonical_order_is_what_the_format_says() {
        for (layout, order) in layouts().step_by(5).flat_map(|layout| ORDERS.map(|order| (layout, order))) {
            let canonical = record(layout);
            let mut own = vec![0; layout.bytes()];
            reorder(layout, [Arrangement::Canonical, order], &canonical, &mut own);
            let code = |record: &[u8], order: Arrangement, t: usize, d: usize| -> Vec<u8> {
                match layout {
                    RecordLayout::Raw(page) => record[order.raw_v(page, t, d)..][..page.dtype.bytes()].to_vec(),
                    RecordLayout::Int8(page) => vec![record[order.k_code(page, t, d)]],
                    RecordLayout::Tile(tile) => {
                        let of_plane = |plane: &Plane| {
                            let bit = order.tile_v(tile, *plane, t, d);
                            record[bit / 8] >> (bit % 8) & ((1 << plane.bits) - 1)
                        };
                        tile.planes().iter().map(of_plane).collect()
                    }
                }
            };
            for (t, d) in [(0, 0), (1, 0), (0, 1), (15, 9), (7, 13)] {
                assert_eq!(
                    code(&own, order, t, d),
                    code(&canonical, Arrangement::Canonical, t, d),
                    "{layout:?} at token {t}, channel {d}, {order:?}"
                );
            }
        }
    }
}
