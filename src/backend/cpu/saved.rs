//! What does a file hold of a block, and could this backend have written it?
//!
//! The records of its heads, one after the other, codes in canonical order. Rows that no sequence holds are zero: what a
//! page held before is nobody's to keep.

use super::record::{ORDER, RecordLayout, read_f16};
use super::{Cpu, tile};
use crate::format::tile::{K_ROTATED, NO_FIRST_ROW, TILE_VERSION};
use crate::format::{CodeOrder, Dtype, LOW_BYTES, RawPage, SealedTile, TokenPage};
use crate::paging::{BlockId, PageId, Place, UsedBlock};
use half::bf16;

/// Why a record is none.
type Refusal = String;

impl Cpu {
    fn layout(&self, open: bool) -> RecordLayout {
        self.tile.filter(|_| !open).unwrap_or(self.page)
    }

    /// Bytes of one record of a block, open or sealed.
    #[must_use]
    pub fn record_bytes(&self, open: bool) -> usize {
        self.layout(open).bytes()
    }

    /// Writes what a file holds of a block: of its page, or without one of its tile. `out` is as long as the records of
    /// all heads.
    pub fn save(&self, layer: usize, block: &UsedBlock, page: Option<PageId>, out: &mut [u8]) {
        for (head, out) in out.chunks_exact_mut(self.record_bytes(page.is_some())).enumerate() {
            let place = page.map_or(Place::tile(block.id), Place::page);
            let (layout, record) = self.record(layer, place, head);
            reorder(layout, [ORDER, CodeOrder::Canonical], record, out);
            clear_rows(layout, out, block.used, block.is_first);
        }
    }

    /// Is this what a file may hold of a block?
    ///
    /// # Errors
    /// What no backend writes, by head and field.
    pub fn check_saved(&self, open: bool, saved: &[u8]) -> Result<(), Refusal> {
        let layout = self.layout(open);
        for (head, record) in saved.chunks_exact(layout.bytes()).enumerate() {
            check(layout, record).map_err(|why| format!("head {head}: {why}"))?;
        }
        Ok(())
    }

    /// Takes in what a file holds of a block, there being room for it, and its page.
    ///
    /// # Errors
    /// Those of [`check_saved`](Self::check_saved).
    pub fn load(&mut self, layer: usize, block: BlockId, page: Option<PageId>, saved: &[u8]) -> Result<(), Refusal> {
        self.check_saved(page.is_some(), saved)?;
        let layout = self.layout(page.is_some());
        let layer = &self.layers[layer];
        let (arena, index) = match page {
            Some(page) => (&layer.pages, page.0),
            None => (&layer.tiles, block.0),
        };
        for (head, saved) in saved.chunks_exact(layout.bytes()).enumerate() {
            // SAFETY: `&mut self` holds the arena exclusively, and one record is had at a time.
            let record = unsafe { arena.record_mut(index, head) };
            reorder(layout, [CodeOrder::Canonical, ORDER], saved, record);
        }
        Ok(())
    }
}

/// Copies a record, its codes from one order into another.
fn reorder(layout: RecordLayout, [from, to]: [CodeOrder; 2], record: &[u8], out: &mut [u8]) {
    match layout {
        RecordLayout::Raw(page) => {
            let RawPage { head_dim, block_size, dtype } = page;
            let shape = [block_size, head_dim];
            let mut copy = |offset: usize, source: usize, destination: usize| {
                let bytes = dtype.bytes();
                let (source, destination) = (offset + source * bytes, offset + destination * bytes);
                out[destination..destination + bytes].copy_from_slice(&record[source..source + bytes]);
            };
            for (t, d) in places(shape) {
                copy(page.k(), from.raw_k(shape, t, d), to.raw_k(shape, t, d));
                copy(page.v(), from.raw_v(shape, t, d), to.raw_v(shape, t, d));
            }
        }
        RecordLayout::Int8(page) => {
            let shape = [page.block_size, page.head_dim];
            for (t, d) in places(shape) {
                out[page.k_codes() + to.k_code(shape, t, d)] = record[page.k_codes() + from.k_code(shape, t, d)];
                out[page.v_codes() + to.v_code(shape, t, d)] = record[page.v_codes() + from.v_code(shape, t, d)];
            }
            out[page.k_token_scale()..].copy_from_slice(&record[page.k_token_scale()..]);
        }
        RecordLayout::Tile(layout) => tile::write(layout, to, out, &tile::read(layout, from, record)),
    }
}

fn places([block_size, head_dim]: [usize; 2]) -> impl Iterator<Item = (usize, usize)> {
    (0..block_size).flat_map(move |t| (0..head_dim).map(move |d| (t, d)))
}

/// Zeroes the rows of a page in canonical order from `used` on, but those with the low bytes of a first page's tokens.
fn clear_rows(layout: RecordLayout, record: &mut [u8], used: usize, is_first_page: bool) {
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
                let token = page.block_size - 1 - row;
                let is_low = is_first_page
                    && token < used
                    && page.has_low_bytes(token, used)
                    && read_f16(record, page.k_token_scale(), row) == LOW_BYTES;
                if !is_low {
                    clear(record, page.k_codes(), row, page.head_dim);
                    clear(record, page.k_token_scale(), row, 2);
                }
            }
        }
        RecordLayout::Tile(_) => {}
    }
}

fn check(layout: RecordLayout, record: &[u8]) -> Result<(), Refusal> {
    match layout {
        RecordLayout::Raw(page) => {
            let elements = page.block_size * page.head_dim;
            check_elements(record, page.dtype, ("k", page.k(), elements))?;
            check_elements(record, page.dtype, ("v", page.v(), elements))
        }
        RecordLayout::Int8(page) => check_page(page, record),
        RecordLayout::Tile(layout) => check_tile(layout, record),
    }
}

fn check_page(page: TokenPage, record: &[u8]) -> Result<(), Refusal> {
    let TokenPage { head_dim, block_size } = page;
    if let Some(at) = record[page.k_codes()..page.v_codes()].iter().position(|&code| code == 0x80) {
        return Err(format!("k_codes: code {at} is -128"));
    }
    for field in [
        ("k_token_scale", page.k_token_scale(), block_size),
        ("v_token_scale", page.v_token_scale(), block_size),
        ("v_token_zero_point", page.v_token_zero_point(), block_size),
        ("k_channel_mean", page.k_channel_mean(), head_dim),
        ("k_channel_scale", page.k_channel_scale(), head_dim),
    ] {
        check_elements(record, Dtype::F16, field)?;
    }
    let scale = |d: usize| read_f16(record, page.k_channel_scale(), d).to_f32();
    match (0..head_dim).find(|&d| scale(d) <= 0.0) {
        Some(d) => Err(format!("k_channel_scale: {} at channel {d}", scale(d))),
        None => Ok(()),
    }
}

fn check_tile(layout: SealedTile, record: &[u8]) -> Result<(), Refusal> {
    let SealedTile { head_dim, block_size, .. } = layout;
    for field in [
        ("k_channel_scale", layout.k_channel_scale(), head_dim),
        ("k_channel_zero_point", layout.k_channel_zero_point(), head_dim),
        ("k_token_scale", layout.k_token_scale(), block_size),
        ("v_token_scale", layout.v_token_scale(), block_size),
        ("v_token_zero_point", layout.v_token_zero_point(), block_size),
        ("first_v scale", layout.first_v_scale(), 1),
        ("first_v zero point", layout.first_v_zero_point(), 1),
    ] {
        check_elements(record, Dtype::F16, field)?;
    }
    let (header, after) = record[layout.header()..].split_at(4);
    let first_row = usize::from(header[2]);
    let known = header[0] == TILE_VERSION && header[1] & !K_ROTATED == 0 && header[3] == 0;
    if !known || first_row >= block_size && header[2] != NO_FIRST_ROW {
        return Err(format!("header {header:?}: not one of version {TILE_VERSION} and {block_size} rows"));
    }
    let first_v = &record[layout.first_v()..layout.header()];
    if header[2] == NO_FIRST_ROW && first_v.iter().any(|&byte| byte != 0) {
        return Err("first_v: not zero, in a tile without the first row".to_owned());
    }
    if header[2] != NO_FIRST_ROW {
        for field in [("v_token_scale", layout.v_token_scale()), ("v_token_zero_point", layout.v_token_zero_point())] {
            let value = read_f16(record, field.1, first_row);
            if value.to_bits() != 0 {
                return Err(format!("{}: element {first_row}, of the first row, is {value}, not 0", field.0));
            }
        }
    }
    if after.iter().any(|&byte| byte != 0) {
        return Err("the bytes after the header are not 0".to_owned());
    }
    Ok(())
}

/// Are these elements, of one name, finite?
fn check_elements(record: &[u8], dtype: Dtype, (name, offset, count): (&str, usize, usize)) -> Result<(), Refusal> {
    let bytes = &record[offset..offset + count * dtype.bytes()];
    let odd = match dtype {
        Dtype::F32 => bytes.chunks_exact(4).position(|x| !f32::from_le_bytes([x[0], x[1], x[2], x[3]]).is_finite()),
        Dtype::F16 => (0..count).find(|&index| !read_f16(bytes, 0, index).is_finite()),
        Dtype::Bf16 => bytes.chunks_exact(2).position(|x| !bf16::from_le_bytes([x[0], x[1]]).is_finite()),
    };
    match odd {
        Some(at) => Err(format!("{name}: element {at} is not finite")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{BLOCK_SIZES, Format, HEAD_DIM_MULTIPLE, MAX_HEAD_DIM};

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

    #[test]
    fn a_record_comes_back_from_canonical_order_bit_by_bit() {
        for layout in layouts() {
            let own = record(layout);
            let (mut canonical, mut back) = (vec![0xa5; layout.bytes()], vec![0x5a; layout.bytes()]);
            reorder(layout, [ORDER, CodeOrder::Canonical], &own, &mut canonical);
            reorder(layout, [CodeOrder::Canonical, ORDER], &canonical, &mut back);
            assert!(back == own, "{layout:?}");
            assert!(canonical != own || layout.bytes() < 600, "{layout:?}");
        }
    }

    #[test]
    fn canonical_order_is_what_the_format_says() {
        for layout in layouts().step_by(5) {
            let own = record(layout);
            let mut canonical = vec![0; layout.bytes()];
            reorder(layout, [ORDER, CodeOrder::Canonical], &own, &mut canonical);
            let code = |record: &[u8], order: CodeOrder, t: usize, d: usize| -> Vec<u8> {
                match layout {
                    RecordLayout::Raw(page) => {
                        let at = page.v() + order.raw_v([page.block_size, d_of(layout)], t, d) * page.dtype.bytes();
                        record[at..at + page.dtype.bytes()].to_vec()
                    }
                    RecordLayout::Int8(page) => {
                        vec![record[page.k_codes() + order.k_code([page.block_size, d_of(layout)], t, d)]]
                    }
                    RecordLayout::Tile(tile) => {
                        let plane_bits = tile.bits & !1;
                        let shape = [tile.block_size, tile.head_dim];
                        let bit = order.tile_v(shape, plane_bits, t, d) * plane_bits as usize;
                        vec![record[tile.v_codes() + bit / 8] >> (bit % 8) & ((1 << plane_bits) - 1)]
                    }
                }
            };
            for (t, d) in [(0, 0), (1, 0), (0, 1), (15, 9), (7, 13)] {
                assert_eq!(
                    code(&own, ORDER, t, d),
                    code(&canonical, CodeOrder::Canonical, t, d),
                    "{layout:?} at token {t}, channel {d}"
                );
            }
        }
    }

    fn d_of(layout: RecordLayout) -> usize {
        match layout {
            RecordLayout::Raw(page) => page.head_dim,
            RecordLayout::Int8(page) => page.head_dim,
            RecordLayout::Tile(tile) => tile.head_dim,
        }
    }
}
