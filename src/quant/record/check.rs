//! What a valid record is: bytes that a backend could have written.

use super::element::read_f16;
use crate::format::tile::{K_ROTATED, NO_FIRST_ROW, TILE_VERSION};
use crate::format::{Dtype, Int8Page, Int8Parameter, LOW_BYTES, RecordLayout, SealedTile, TileParameter};
use half::bf16;

/// Are these bytes, in canonical order, a record of this layout?
///
/// # Errors
/// Why not, by field.
pub fn check(layout: RecordLayout, record: &[u8]) -> Result<(), String> {
    match layout {
        RecordLayout::Raw(page) => {
            let elements = page.block_size * page.head_dim;
            check_elements(record, page.dtype, "k", page.k(), elements)?;
            check_elements(record, page.dtype, "v", page.v(), elements)
        }
        RecordLayout::Int8(page) => check_page(page, record),
        RecordLayout::Tile(layout) => check_tile(layout, record),
    }
}

fn check_page(page: Int8Page, record: &[u8]) -> Result<(), String> {
    if let Some(at) = record[page.k_codes()..page.v_codes()].iter().position(|&code| code == 0x80) {
        return Err(format!("k_codes: code {at} is -128"));
    }
    for field in Int8Parameter::ALL {
        check_elements(record, Dtype::F16, field.name(), field.offset(page), field.count(page))?;
    }
    let half = |row: usize| read_f16(record, page.k_token_scale() + 2 * row);
    let is_low = |row: usize| half(row) == LOW_BYTES && row >= page.block_size / 2;
    if let Some(row) = (0..page.block_size).find(|&row| half(row).to_f32() < 0.0 && !is_low(row)) {
        return Err(format!("k_token_scale: {} at token {row}", half(row)));
    }
    let scale = |d: usize| read_f16(record, page.k_channel_scale() + 2 * d).to_f32();
    match (0..page.head_dim).find(|&d| scale(d) <= 0.0) {
        Some(d) => Err(format!("k_channel_scale: {} at channel {d}", scale(d))),
        None => Ok(()),
    }
}

fn check_tile(layout: SealedTile, record: &[u8]) -> Result<(), String> {
    for field in TileParameter::ALL {
        check_elements(record, Dtype::F16, field.name(), field.offset(layout), field.count(layout))?;
    }
    let block_size = layout.block_size;
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
        for field in [TileParameter::VTokenScale, TileParameter::VTokenZeroPoint] {
            let value = read_f16(record, field.offset(layout) + 2 * first_row);
            if value.to_bits() != 0 {
                return Err(format!("{}: element {first_row}, of the first row, is {value}, not 0", field.name()));
            }
        }
    }
    if after.iter().any(|&byte| byte != 0) {
        return Err("the bytes after the header are not 0".to_owned());
    }
    Ok(())
}

/// Are the elements of a field finite?
fn check_elements(record: &[u8], dtype: Dtype, name: &str, offset: usize, count: usize) -> Result<(), String> {
    let bytes = &record[offset..offset + count * dtype.bytes()];
    let odd = match dtype {
        Dtype::F32 => bytes.chunks_exact(4).position(|x| !f32::from_le_bytes([x[0], x[1], x[2], x[3]]).is_finite()),
        Dtype::F16 => (0..count).find(|&index| !read_f16(bytes, 2 * index).is_finite()),
        Dtype::Bf16 => bytes.chunks_exact(2).position(|x| !bf16::from_le_bytes([x[0], x[1]]).is_finite()),
    };
    match odd {
        Some(at) => Err(format!("{name}: element {at} is not finite")),
        None => Ok(()),
    }
}
