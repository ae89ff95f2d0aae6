//! What is a sealed tile? One block of one key/value head in `bits` bits a value, K in the better of two frames.
//!
//! ```text
//! K^'[d,t] = (code * k_channel_scale[d] + k_channel_zero_point[d]) * k_token_scale[t]      K^' = K or K H, by k_frame
//! V^'[t,d] =  code * v_token_scale[t] + v_token_zero_point[t]                              V' = V H, always
//! ```
//!
//! The row of V of a sequence's first token, which most of the attention looks at, is kept with 8 bits beside the tile
//! that holds it; there its codes, scale and zero point are zero.
//!
//! A tile is a function of its own rows and the frozen feedback alone: nothing else in a batch changes a bit of it.

use super::feedback::HeadFeedback;
use super::hadamard::{rotate, rotate_channels};
use super::int8_page::{decode_v, encode_v};
use super::lanes::LANES;
use super::round::{LARGEST_VALUE, round_k, round_v};
use half::f16;

/// The basis that a K tile is rounded in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Frame {
    /// K as it is.
    Plain,
    /// `K H`.
    Rotated,
}

/// The rotated V of a sequence's first token, as in a token page.
#[derive(Debug, Clone, PartialEq)]
pub struct FirstV {
    /// Its row in the tile.
    pub row: usize,
    /// 8-bit codes, `[head_dim]`.
    pub codes: Vec<u8>,
    /// Scale of the codes.
    pub scale: f16,
    /// Zero point of the codes.
    pub zero_point: f16,
}

/// A sealed tile, unpacked, in canonical order.
#[derive(Debug, Clone, PartialEq)]
pub struct Tile {
    /// Bits of a code: 4, 3 or 2.
    pub bits: u32,
    /// Channels.
    pub head_dim: usize,
    /// Tokens.
    pub block_size: usize,
    /// K codes, `[head_dim, block_size]`.
    pub k_codes: Vec<u8>,
    /// V codes, `[block_size, head_dim]`.
    pub v_codes: Vec<u8>,
    /// `[head_dim]`.
    pub k_channel_scale: Vec<f16>,
    /// `[head_dim]`.
    pub k_channel_zero_point: Vec<f16>,
    /// `[block_size]`.
    pub k_token_scale: Vec<f16>,
    /// `[block_size]`.
    pub v_token_scale: Vec<f16>,
    /// `[block_size]`.
    pub v_token_zero_point: Vec<f16>,
    /// The first token's V, in the tile that holds it.
    pub first_v: Option<FirstV>,
    /// The basis of K.
    pub k_frame: Frame,
    /// K codes that were clamped, for statistics; no part of the bytes.
    pub num_clamped: usize,
}

/// Seals one block of one head in `bits` bits (4, 3 or 2).
///
/// `k` and `v_rotated` are `[block_size, head_dim]`, finite; V is rotated already. `first_row` is the row of the
/// sequence's first token, if this block holds it.
#[inline(always)]
#[must_use]
pub fn encode_tile(
    k: &[f32],
    v_rotated: &[f32],
    head_dim: usize,
    bits: u32,
    feedback: &HeadFeedback,
    first_row: Option<usize>,
) -> Tile {
    let block_size = k.len() / head_dim;
    let mut m = transposed(k, head_dim);
    for x in &mut m {
        *x = x.clamp(-LARGEST_VALUE, LARGEST_VALUE);
    }
    let plain = round_k(&m, block_size, bits, &feedback.plain);
    rotate_channels(&mut m, block_size);
    let rotated = round_k(&m, block_size, bits, &feedback.rotated);
    let (k_frame, k) = if rotated.loss <= plain.loss { (Frame::Rotated, rotated) } else { (Frame::Plain, plain) };

    let mut v_codes = vec![0u8; v_rotated.len()];
    let mut v_token_scale = vec![f16::ZERO; block_size];
    let mut v_token_zero_point = vec![f16::ZERO; block_size];
    let mut first_v = None;
    for (t, (row, codes)) in v_rotated.chunks_exact(head_dim).zip(v_codes.chunks_exact_mut(head_dim)).enumerate() {
        if first_row == Some(t) {
            let mut codes = vec![0u8; head_dim];
            let (scale, zero_point) = encode_v(row, &mut codes);
            first_v = Some(FirstV { row: t, codes, scale, zero_point });
        } else {
            (v_token_scale[t], v_token_zero_point[t]) = round_v(row, bits, codes);
        }
    }
    Tile {
        bits,
        head_dim,
        block_size,
        k_codes: k.codes,
        v_codes,
        k_channel_scale: k.channel_scale,
        k_channel_zero_point: k.channel_zero_point,
        k_token_scale: k.token_scale,
        v_token_scale,
        v_token_zero_point,
        first_v,
        k_frame,
        num_clamped: k.num_clamped,
    }
}

/// A row of V as formats that seal keep it: rotated in place.
#[inline(always)]
pub fn rotate_v(row: &mut [f32]) {
    for x in row.iter_mut() {
        *x = x.clamp(-LARGEST_VALUE, LARGEST_VALUE);
    }
    rotate(row);
}

/// `[rows, columns]` to `[columns, rows]`.
#[inline(always)]
pub(super) fn transposed(m: &[f32], columns: usize) -> Vec<f32> {
    let rows = m.len() / columns;
    let mut out = vec![0f32; m.len()];
    // A few rows of the result at a time: they stay in cache from one value to the next.
    for first in (0..columns).step_by(LANES) {
        for (r, row) in m.chunks_exact(columns).enumerate() {
            for (c, &x) in (first..).zip(&row[first..columns.min(first + LANES)]) {
                out[c * rows + r] = x;
            }
        }
    }
    out
}

/// Decodes K, `[block_size, head_dim]`, in the plain frame.
#[inline(always)]
pub fn decode_tile_k(tile: &Tile, k: &mut [f32]) {
    let (head_dim, block_size) = (tile.head_dim, tile.block_size);
    let token_scale: Vec<f32> = tile.k_token_scale.iter().map(|scale| scale.to_f32()).collect();
    let mut m = vec![0f32; head_dim * block_size];
    for (d, (row, codes)) in m.chunks_exact_mut(block_size).zip(tile.k_codes.chunks_exact(block_size)).enumerate() {
        let (scale, zero_point) = (tile.k_channel_scale[d].to_f32(), tile.k_channel_zero_point[d].to_f32());
        for ((x, &code), token_scale) in row.iter_mut().zip(codes).zip(&token_scale) {
            *x = (f32::from(code) * scale + zero_point) * token_scale;
        }
    }
    k.copy_from_slice(&transposed(&m, block_size));
    if tile.k_frame == Frame::Rotated {
        for row in k.chunks_exact_mut(head_dim) {
            rotate(row);
        }
    }
}

/// Decodes V, `[block_size, head_dim]`, still rotated.
#[inline(always)]
pub fn decode_tile_v(tile: &Tile, v_rotated: &mut [f32]) {
    for (t, row) in v_rotated.chunks_exact_mut(tile.head_dim).enumerate() {
        match &tile.first_v {
            Some(first) if first.row == t => decode_v(&first.codes, first.scale, first.zero_point, row),
            _ => {
                let codes = &tile.v_codes[t * tile.head_dim..][..tile.head_dim];
                decode_v(codes, tile.v_token_scale[t], tile.v_token_zero_point[t], row);
            }
        }
    }
}
