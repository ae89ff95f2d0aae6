//! INT8 pages: the statistics that a page is opened with, and its tokens.

use super::element::{read_f16, write_f16};
use crate::format::{Arrangement, HEAD_DIM_MULTIPLE, Int8Page, Int8Parameter, LOW_BYTES, MAX_HEAD_DIM};
use crate::quant::range::{k_is_out_of_range, v_is_out_of_range};
use crate::quant::{self, ChannelStatistics, ModelChannels};
use half::f16;

/// Stores the statistics of a page that is being opened.
#[inline(always)]
pub fn write_statistics(page: Int8Page, order: Arrangement, record: &mut [u8], statistics: &ChannelStatistics) {
    let ChannelStatistics { mean, scale } = statistics;
    for (parameter, values) in [(Int8Parameter::KChannelMean, mean), (Int8Parameter::KChannelScale, scale)] {
        for (d, &value) in values.iter().enumerate() {
            write_f16(record, order.parameter(page, parameter, d), f16::from_f32(value));
        }
    }
}

/// The statistics that a page was opened with.
#[must_use]
#[inline(always)]
pub fn read_statistics(page: Int8Page, order: Arrangement, record: &[u8]) -> ChannelStatistics {
    ChannelStatistics {
        mean: read_channels(page, order, record, Int8Parameter::KChannelMean),
        scale: read_channels(page, order, record, Int8Parameter::KChannelScale),
    }
}

#[inline(always)]
fn read_channels(page: Int8Page, order: Arrangement, record: &[u8], parameter: Int8Parameter) -> Vec<f32> {
    let mut channels = vec![0.0; page.head_dim];
    for (d, x) in channels.iter_mut().enumerate() {
        *x = read_f16(record, order.parameter(page, parameter, d)).to_f32();
    }
    channels
}

/// What encoding one token's K says of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WrittenK {
    /// The sum of its squares in units of the page's scales: `head_dim` where the statistics fit.
    pub squares: f64,
    /// See [`crate::quant::range`].
    pub out_of_range: bool,
}

/// Encodes one token's K under the page's statistics, with its low bytes if `low` (see [`Int8Page`]).
#[inline(always)]
pub fn write_k(
    page: Int8Page,
    order: Arrangement,
    record: &mut [u8],
    token: usize,
    statistics: &ChannelStatistics,
    k: &[f32],
    low: bool,
) -> WrittenK {
    let mut codes = [0i8; MAX_HEAD_DIM];
    let codes = &mut codes[..page.head_dim];
    let scale = quant::encode_k(k, statistics, codes);
    write_k_row(page, order, record, token, codes, scale);
    if low {
        let mut low = [0i8; MAX_HEAD_DIM];
        quant::encode_k_low(k, statistics, scale, codes, &mut low[..page.head_dim]);
        write_k_row(page, order, record, page.low_row(token), &low[..page.head_dim], LOW_BYTES);
    }
    let squares: u32 = codes.iter().map(|code| u32::from(code.unsigned_abs()).pow(2)).sum();
    WrittenK { squares: f64::from(squares) * scale.to_f64().powi(2), out_of_range: k_is_out_of_range(scale) }
}

/// Encodes one token's V; is it out of range? See [`crate::quant::range`].
#[inline(always)]
pub fn write_v(page: Int8Page, order: Arrangement, record: &mut [u8], token: usize, v: &[f32]) -> bool {
    let mut codes = [0u8; MAX_HEAD_DIM];
    let codes = &mut codes[..page.head_dim];
    let (scale, zero_point) = quant::encode_v(v, codes);
    for (group, codes) in codes.as_chunks::<HEAD_DIM_MULTIPLE>().0.iter().enumerate() {
        for d in 0..HEAD_DIM_MULTIPLE {
            record[order.v_code(page, token, group * HEAD_DIM_MULTIPLE + d)] = codes[d];
        }
    }
    write_f16(record, order.parameter(page, Int8Parameter::VTokenScale, token), scale);
    write_f16(record, order.parameter(page, Int8Parameter::VTokenZeroPoint, token), zero_point);
    v_is_out_of_range(v, scale, zero_point)
}

#[inline(always)]
fn write_k_row(page: Int8Page, order: Arrangement, record: &mut [u8], row: usize, codes: &[i8], scale: f16) {
    for (group, codes) in codes.as_chunks::<HEAD_DIM_MULTIPLE>().0.iter().enumerate() {
        for d in 0..HEAD_DIM_MULTIPLE {
            record[order.k_code(page, row, group * HEAD_DIM_MULTIPLE + d)] = codes[d].cast_unsigned();
        }
    }
    write_f16(record, order.parameter(page, Int8Parameter::KTokenScale, row), scale);
}

#[inline(always)]
fn read_k_row(page: Int8Page, order: Arrangement, record: &[u8], row: usize, codes: &mut [i8]) -> f16 {
    for (d, code) in codes.iter_mut().enumerate() {
        *code = record[order.k_code(page, row, d)].cast_signed();
    }
    read_f16(record, order.parameter(page, Int8Parameter::KTokenScale, row))
}

/// Decodes K of the first tokens of a first page, `[num_tokens, head_dim]`, low bytes included where the page has them.
#[inline(always)]
pub fn read_first_k(page: Int8Page, order: Arrangement, record: &[u8], k: &mut [f32]) {
    let head_dim = page.head_dim;
    let num_tokens = k.len() / head_dim;
    let statistics = read_statistics(page, order, record);
    let (mut codes, mut low) = ([0i8; MAX_HEAD_DIM], [0i8; MAX_HEAD_DIM]);
    let (codes, low) = (&mut codes[..head_dim], &mut low[..head_dim]);
    for (token, k) in k.chunks_exact_mut(head_dim).enumerate() {
        let scale = read_k_row(page, order, record, token, codes);
        let has_low = page.has_low_bytes(token, num_tokens);
        if has_low && read_k_row(page, order, record, page.low_row(token), low) == LOW_BYTES {
            quant::decode_k_low(codes, low, scale, &statistics, k);
        } else {
            quant::decode_k(codes, scale, &statistics, k);
        }
    }
}

/// Encodes K of the first tokens of a first page anew, `[num, head_dim]`, under these statistics, of `num_tokens` tokens
/// that the page is about to have.
#[inline(always)]
pub fn rewrite_first_k(
    page: Int8Page,
    order: Arrangement,
    record: &mut [u8],
    statistics: &ChannelStatistics,
    k: &[f32],
    num_tokens: usize,
) {
    write_statistics(page, order, record, statistics);
    for (token, k) in k.chunks_exact(page.head_dim).enumerate() {
        write_k(page, order, record, token, statistics, k, page.has_low_bytes(token, num_tokens));
    }
}

/// Takes the statistics of a first page anew over its first `num_tokens` tokens as stored, and encodes their K again.
#[inline(always)]
pub fn refit_k(
    page: Int8Page,
    order: Arrangement,
    record: &mut [u8],
    num_tokens: usize,
    model: Option<&ModelChannels>,
) {
    let mut rows = vec![0f32; num_tokens * page.head_dim];
    read_first_k(page, order, record, &mut rows);
    let statistics = ChannelStatistics::of_rows(&rows, page.head_dim, model, true);
    rewrite_first_k(page, order, record, &statistics, &rows, num_tokens);
}

/// Decodes K, `[block_size, head_dim]`.
#[inline(always)]
pub fn read_k(page: Int8Page, order: Arrangement, record: &[u8], k: &mut [f32]) {
    let statistics = read_statistics(page, order, record);
    let mut codes = [0i8; MAX_HEAD_DIM];
    let codes = &mut codes[..page.head_dim];
    for (t, row) in k.chunks_exact_mut(page.head_dim).enumerate() {
        let scale = read_k_row(page, order, record, t, codes);
        quant::decode_k(codes, scale, &statistics, row);
    }
}

/// Decodes V, `[block_size, head_dim]`, as it is stored: rotated in formats that seal.
#[inline(always)]
pub fn read_v(page: Int8Page, order: Arrangement, record: &[u8], v: &mut [f32]) {
    let mut codes = [0u8; MAX_HEAD_DIM];
    let codes = &mut codes[..page.head_dim];
    for (t, row) in v.chunks_exact_mut(page.head_dim).enumerate() {
        for (d, code) in codes.iter_mut().enumerate() {
            *code = record[order.v_code(page, t, d)];
        }
        let half = |parameter| read_f16(record, order.parameter(page, parameter, t));
        quant::decode_v(codes, half(Int8Parameter::VTokenScale), half(Int8Parameter::VTokenZeroPoint), row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: Int8Page = Int8Page { head_dim: 16, block_size: 32 };
    const NUM_TOKENS: usize = 9;

    fn k(token: usize, d: usize) -> f32 {
        ((token * 16 + d) as f32 * 0.7).sin() * (1 + d) as f32
    }

    fn page(num_tokens: usize) -> Vec<u8> {
        let rows: Vec<f32> = (0..num_tokens * 16).map(|i| k(i / 16, i % 16)).collect();
        let statistics = ChannelStatistics::of_rows(&rows, 16, None, true);
        let mut record = vec![0; PAGE.bytes()];
        rewrite_first_k(PAGE, Arrangement::Cpu, &mut record, &statistics, &rows, num_tokens);
        record
    }

    fn refitted(mut record: Vec<u8>) -> (Vec<f32>, f32) {
        refit_k(PAGE, Arrangement::Cpu, &mut record, NUM_TOKENS, None);
        let mut rows = vec![0f32; NUM_TOKENS * 16];
        read_first_k(PAGE, Arrangement::Cpu, &record, &mut rows);
        let error = rows.iter().enumerate().map(|(i, x)| (x - k(i / 16, i % 16)).abs()).fold(0.0, f32::max);
        (rows, error)
    }

    #[test]
    fn a_refit_reads_low_bytes_where_they_are_marked_and_nowhere_else() {
        let with = page(NUM_TOKENS);
        let mut without = with.clone();
        let mut overwritten = with.clone();
        for token in 0..NUM_TOKENS {
            let row = PAGE.low_row(token);
            write_k_row(PAGE, Arrangement::Cpu, &mut without, row, &[0; 16], f16::ZERO);
            write_k_row(PAGE, Arrangement::Cpu, &mut overwritten, row, &[127; 16], f16::ONE); // the K of some token
        }
        let (rows, error) = refitted(without);
        assert_eq!(refitted(overwritten).0, rows);
        assert!(refitted(with).1 < error / 50.0);
    }
}
