//! One token of one record, written and read by the oracle in the CPU's code order.

use crate::format::{CodeOrder, Dtype, Format, RawPage, TokenPage};
use crate::quant::{self, ChannelStatistics};
use half::{bf16, f16};

const ORDER: CodeOrder = CodeOrder::Cpu;

/// The layout of a record.
#[derive(Debug, Clone, Copy)]
pub enum PageLayout {
    /// Unquantized.
    Raw(RawPage),
    /// INT8.
    Int8(TokenPage),
}

impl PageLayout {
    pub const fn new(format: Format, dtype: Dtype, head_dim: usize, block_size: usize) -> Self {
        match format {
            Format::Raw => Self::Raw(RawPage { head_dim, block_size, dtype }),
            Format::Int8 => Self::Int8(TokenPage { head_dim, block_size }),
        }
    }

    pub const fn bytes(self) -> usize {
        match self {
            Self::Raw(page) => page.bytes(),
            Self::Int8(page) => page.bytes(),
        }
    }

    pub const fn is_raw(self) -> bool {
        matches!(self, Self::Raw(_))
    }
}

fn read_f16(record: &[u8], offset: usize, index: usize) -> f16 {
    let at = offset + 2 * index;
    f16::from_le_bytes([record[at], record[at + 1]])
}

fn write_f16(record: &mut [u8], offset: usize, index: usize, value: f16) {
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
pub fn write_statistics(page: TokenPage, record: &mut [u8], statistics: &ChannelStatistics) {
    for d in 0..page.head_dim {
        write_f16(record, page.k_channel_mean(), d, f16::from_f32(statistics.mean[d]));
        write_f16(record, page.k_channel_scale(), d, f16::from_f32(statistics.scale[d]));
    }
}

/// The statistics that a page was opened with.
pub fn read_statistics(page: TokenPage, record: &[u8]) -> ChannelStatistics {
    let channels = |offset: usize| (0..page.head_dim).map(|d| read_f16(record, offset, d).to_f32()).collect();
    ChannelStatistics { mean: channels(page.k_channel_mean()), scale: channels(page.k_channel_scale()) }
}

/// Writes one token of a `raw` page.
pub fn write_raw(page: RawPage, record: &mut [u8], token: usize, k: &[f32], v: &[f32]) {
    for d in 0..page.head_dim {
        write_element(record, page.dtype, page.k(), ORDER.raw_k([page.block_size, page.head_dim], token, d), k[d]);
        write_element(record, page.dtype, page.v(), ORDER.raw_v([page.block_size, page.head_dim], token, d), v[d]);
    }
}

/// Encodes one token into an INT8 page opened with `statistics`.
pub fn write_int8(
    page: TokenPage,
    record: &mut [u8],
    token: usize,
    statistics: &ChannelStatistics,
    k: &[f32],
    v: &[f32],
) {
    let head_dim = page.head_dim;
    let mut k_codes = [0i8; crate::format::MAX_HEAD_DIM];
    let mut v_codes = [0u8; crate::format::MAX_HEAD_DIM];
    let k_token_scale = quant::encode_k(k, statistics, &mut k_codes[..head_dim]);
    let (v_token_scale, v_token_zero_point) = quant::encode_v(v, &mut v_codes[..head_dim]);
    for d in 0..head_dim {
        record[page.k_codes() + ORDER.k_code([page.block_size, page.head_dim], token, d)] = k_codes[d].cast_unsigned();
        record[page.v_codes() + ORDER.v_code([page.block_size, page.head_dim], token, d)] = v_codes[d];
    }
    write_f16(record, page.k_token_scale(), token, k_token_scale);
    write_f16(record, page.v_token_scale(), token, v_token_scale);
    write_f16(record, page.v_token_zero_point(), token, v_token_zero_point);
}

/// Decodes one token's K.
pub fn read_k(layout: PageLayout, record: &[u8], token: usize, k: &mut [f32]) {
    match layout {
        PageLayout::Raw(page) => {
            for (d, x) in k.iter_mut().enumerate() {
                *x =
                    read_element(record, page.dtype, page.k(), ORDER.raw_k([page.block_size, page.head_dim], token, d));
            }
        }
        PageLayout::Int8(page) => {
            let mut codes = [0i8; crate::format::MAX_HEAD_DIM];
            for (d, code) in codes[..page.head_dim].iter_mut().enumerate() {
                *code = record[page.k_codes() + ORDER.k_code([page.block_size, page.head_dim], token, d)].cast_signed();
            }
            let token_scale = read_f16(record, page.k_token_scale(), token);
            quant::decode_k(&codes[..page.head_dim], token_scale, &read_statistics(page, record), k);
        }
    }
}

/// Decodes one token's V.
pub fn read_v(layout: PageLayout, record: &[u8], token: usize, v: &mut [f32]) {
    match layout {
        PageLayout::Raw(page) => {
            for (d, x) in v.iter_mut().enumerate() {
                *x =
                    read_element(record, page.dtype, page.v(), ORDER.raw_v([page.block_size, page.head_dim], token, d));
            }
        }
        PageLayout::Int8(page) => {
            let mut codes = [0u8; crate::format::MAX_HEAD_DIM];
            for (d, code) in codes[..page.head_dim].iter_mut().enumerate() {
                *code = record[page.v_codes() + ORDER.v_code([page.block_size, page.head_dim], token, d)];
            }
            let scale = read_f16(record, page.v_token_scale(), token);
            let zero_point = read_f16(record, page.v_token_zero_point(), token);
            quant::decode_v(&codes[..page.head_dim], scale, zero_point, v);
        }
    }
}
