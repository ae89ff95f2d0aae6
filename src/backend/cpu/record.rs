//! What is a record made of, and what does it hold? Decoding is the oracle's, in the CPU's code order.

use super::tile;
use crate::format::{CodeOrder, Dtype, Format, Int8Page, LOW_BYTES, MAX_HEAD_DIM, RawPage, SealedTile};
use crate::quant::range::{k_is_out_of_range, v_is_out_of_range};
use crate::quant::{self, ChannelStatistics, ModelChannels};
use half::{bf16, f16};

pub(super) const ORDER: CodeOrder = CodeOrder::Cpu;

/// The layout of a record.
#[derive(Debug, Clone, Copy)]
pub enum RecordLayout {
    /// Unquantized.
    Raw(RawPage),
    /// An INT8 page.
    Int8(Int8Page),
    /// A sealed tile.
    Tile(SealedTile),
}

impl RecordLayout {
    /// The page of a format: what tokens are written to.
    pub const fn page(format: Format, dtype: Dtype, head_dim: usize, block_size: usize) -> Self {
        match format {
            Format::Raw => Self::Raw(RawPage { head_dim, block_size, dtype }),
            _ => Self::Int8(Int8Page { head_dim, block_size }),
        }
    }

    /// The tile of a format, if it seals.
    pub const fn tile(format: Format, head_dim: usize, block_size: usize) -> Option<Self> {
        match format.tile_bits() {
            Some(bits) => Some(Self::Tile(SealedTile { head_dim, block_size, bits })),
            None => None,
        }
    }

    pub const fn bytes(self) -> usize {
        match self {
            Self::Raw(page) => page.bytes(),
            Self::Int8(page) => page.bytes(),
            Self::Tile(tile) => tile.bytes(),
        }
    }

    pub const fn is_raw(self) -> bool {
        matches!(self, Self::Raw(_))
    }
}

pub(super) fn read_f16(record: &[u8], offset: usize, index: usize) -> f16 {
    let at = offset + 2 * index;
    f16::from_le_bytes([record[at], record[at + 1]])
}

pub(super) fn write_f16(record: &mut [u8], offset: usize, index: usize, value: f16) {
    let at = offset + 2 * index;
    record[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn read_element(record: &[u8], dtype: Dtype, offset: usize, index: usize) -> f32 {
    let at = offset + dtype.bytes() * index;
    match dtype {
        Dtype::F32 => f32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]),
        Dtype::F16 => read_f16(record, offset, index).to_f32(),
        Dtype::Bf16 => bf16::from_le_bytes([record[at], record[at + 1]]).to_f32(),
    }
}

fn write_element(record: &mut [u8], dtype: Dtype, offset: usize, index: usize, value: f32) {
    let at = offset + dtype.bytes() * index;
    match dtype {
        Dtype::F32 => record[at..at + 4].copy_from_slice(&value.to_le_bytes()),
        Dtype::F16 => write_f16(record, offset, index, f16::from_f32(value)),
        Dtype::Bf16 => record[at..at + 2].copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
    }
}

/// Freezes the statistics of a page that is being opened.
pub fn write_statistics(page: Int8Page, record: &mut [u8], statistics: &ChannelStatistics) {
    for d in 0..page.head_dim {
        write_f16(record, page.k_channel_mean(), d, f16::from_f32(statistics.mean[d]));
        write_f16(record, page.k_channel_scale(), d, f16::from_f32(statistics.scale[d]));
    }
}

/// The statistics that a page was opened with.
pub fn read_statistics(page: Int8Page, record: &[u8]) -> ChannelStatistics {
    let channels = |offset: usize| (0..page.head_dim).map(|d| read_f16(record, offset, d).to_f32()).collect();
    ChannelStatistics { mean: channels(page.k_channel_mean()), scale: channels(page.k_channel_scale()) }
}

/// Writes one token of a `raw` page.
pub fn write_raw(page: RawPage, record: &mut [u8], token: usize, k: &[f32], v: &[f32]) {
    let shape = [page.block_size, page.head_dim];
    for d in 0..page.head_dim {
        write_element(record, page.dtype, page.k(), ORDER.raw_k(shape, token, d), k[d]);
        write_element(record, page.dtype, page.v(), ORDER.raw_v(shape, token, d), v[d]);
    }
}

/// Encodes one token into an INT8 page opened with `statistics`, with the low bytes of K if `low`. Gives the sum of its
/// squared K in units of the frozen deviations (`head_dim` where they fit), and whether K or V is out of range.
pub fn write_int8(
    page: Int8Page,
    record: &mut [u8],
    token: usize,
    statistics: &ChannelStatistics,
    k: &[f32],
    v: &[f32],
    low: bool,
) -> (f64, bool) {
    let shape = [page.block_size, page.head_dim];
    let (k_token_scale, squares) = write_k(page, record, token, statistics, k, low);
    let mut v_codes = [0u8; MAX_HEAD_DIM];
    let (v_token_scale, v_token_zero_point) = quant::encode_v(v, &mut v_codes[..page.head_dim]);
    for d in 0..page.head_dim {
        record[page.v_codes() + ORDER.v_code(shape, token, d)] = v_codes[d];
    }
    write_f16(record, page.v_token_scale(), token, v_token_scale);
    write_f16(record, page.v_token_zero_point(), token, v_token_zero_point);
    let out_of_range = k_is_out_of_range(k_token_scale) || v_is_out_of_range(v, v_token_scale, v_token_zero_point);
    (f64::from(squares) * k_token_scale.to_f64().powi(2), out_of_range)
}

/// Encodes one token's K, with its low bytes if `low`; gives its scale, and the sum of its squared codes.
fn write_k(
    page: Int8Page,
    record: &mut [u8],
    token: usize,
    statistics: &ChannelStatistics,
    k: &[f32],
    low: bool,
) -> (f16, u32) {
    let mut codes = [0i8; MAX_HEAD_DIM];
    let codes = &mut codes[..page.head_dim];
    let scale = quant::encode_k(k, statistics, codes);
    write_k_row(page, record, token, codes, scale);
    if low {
        let mut low = [0i8; MAX_HEAD_DIM];
        quant::encode_k_low(k, statistics, scale, codes, &mut low[..page.head_dim]);
        write_k_row(page, record, page.low_row(token), &low[..page.head_dim], LOW_BYTES);
    }
    (scale, codes.iter().map(|code| u32::from(code.unsigned_abs()).pow(2)).sum())
}

fn write_k_row(page: Int8Page, record: &mut [u8], row: usize, codes: &[i8], scale: f16) {
    for (d, code) in codes.iter().enumerate() {
        let at = ORDER.k_code([page.block_size, page.head_dim], row, d);
        record[page.k_codes() + at] = code.cast_unsigned();
    }
    write_f16(record, page.k_token_scale(), row, scale);
}

fn read_k_row(page: Int8Page, record: &[u8], row: usize, codes: &mut [i8]) -> f16 {
    for (d, code) in codes.iter_mut().enumerate() {
        let at = ORDER.k_code([page.block_size, page.head_dim], row, d);
        *code = record[page.k_codes() + at].cast_signed();
    }
    read_f16(record, page.k_token_scale(), row)
}

/// Takes the statistics of a first page anew over its first `num_tokens` tokens as stored, low bytes included where the
/// page has them, and encodes their K again.
pub fn refit_k(page: Int8Page, record: &mut [u8], num_tokens: usize, model: Option<&ModelChannels>) {
    let head_dim = page.head_dim;
    let statistics = read_statistics(page, record);
    let (mut codes, mut low) = ([0i8; MAX_HEAD_DIM], [0i8; MAX_HEAD_DIM]);
    let (codes, low) = (&mut codes[..head_dim], &mut low[..head_dim]);
    let mut rows = vec![0f32; num_tokens * head_dim];
    for (token, k) in rows.chunks_exact_mut(head_dim).enumerate() {
        let scale = read_k_row(page, record, token, codes);
        let has_low = page.has_low_bytes(token, num_tokens);
        if has_low && read_k_row(page, record, page.low_row(token), low) == LOW_BYTES {
            quant::decode_k_low(codes, low, scale, &statistics, k);
        } else {
            quant::decode_k(codes, scale, &statistics, k);
        }
    }
    let statistics = ChannelStatistics::of_rows(&rows, head_dim, model, true);
    write_statistics(page, record, &statistics);
    for (token, k) in rows.chunks_exact(head_dim).enumerate() {
        write_k(page, record, token, &statistics, k, page.has_low_bytes(token, num_tokens));
    }
}

/// Decodes the K of a record's tokens, `[block_size, head_dim]`.
pub fn read_k(layout: RecordLayout, record: &[u8], k: &mut [f32]) {
    match layout {
        RecordLayout::Raw(page) => {
            let index = |t, d| ORDER.raw_k([page.block_size, page.head_dim], t, d);
            read_raw(page, record, page.k(), index, k);
        }
        RecordLayout::Int8(page) => {
            let statistics = read_statistics(page, record);
            let mut codes = [0i8; MAX_HEAD_DIM];
            let codes = &mut codes[..page.head_dim];
            for (t, row) in k.chunks_exact_mut(page.head_dim).enumerate() {
                let scale = read_k_row(page, record, t, codes);
                quant::decode_k(codes, scale, &statistics, row);
            }
        }
        RecordLayout::Tile(layout) => quant::decode_tile_k(&tile::read(layout, ORDER, record), k),
    }
}

/// Decodes the V of a record's tokens as it is stored, rotated in formats that seal, `[block_size, head_dim]`.
pub fn read_v(layout: RecordLayout, record: &[u8], v: &mut [f32]) {
    match layout {
        RecordLayout::Raw(page) => {
            let index = |t, d| ORDER.raw_v([page.block_size, page.head_dim], t, d);
            read_raw(page, record, page.v(), index, v);
        }
        RecordLayout::Int8(page) => {
            let mut codes = [0u8; MAX_HEAD_DIM];
            let codes = &mut codes[..page.head_dim];
            for (t, row) in v.chunks_exact_mut(page.head_dim).enumerate() {
                for (d, code) in codes.iter_mut().enumerate() {
                    *code = record[page.v_codes() + ORDER.v_code([page.block_size, page.head_dim], t, d)];
                }
                let scale = read_f16(record, page.v_token_scale(), t);
                quant::decode_v(codes, scale, read_f16(record, page.v_token_zero_point(), t), row);
            }
        }
        RecordLayout::Tile(layout) => quant::decode_tile_v(&tile::read(layout, ORDER, record), v),
    }
}

fn read_raw(page: RawPage, record: &[u8], offset: usize, index: impl Fn(usize, usize) -> usize, out: &mut [f32]) {
    for (t, row) in out.chunks_exact_mut(page.head_dim).enumerate() {
        for (d, x) in row.iter_mut().enumerate() {
            *x = read_element(record, page.dtype, offset, index(t, d));
        }
    }
}
