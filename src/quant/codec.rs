//! What would other schemes make of these rows? Quantize and dequantize in place, on unquantized pages: for evaluation,
//! never for storage.
//!
//! | codec | K | V |
//! |---|---|---|
//! | `fp8` | e4m3fn, unscaled, to nearest even, saturating at 448 | same |
//! | `int8_plain` | per token, symmetric, scale f16, codes -127 to 127 | same |
//! | `int4_plain` | per token, min-max, codes 0 to 15, integer zero point 0 to 15, scale f32 | same |
//! | `kivi4` | per channel, groups of 32 tokens, min-max, 4 bits, scale and zero point f16 | per token, groups of 32 channels |
//! | `kvarn_k4v4`, `kvarn_k4v2`, `kvarn_k2v2` | the reference codec ([`super::reference`]), rotated | same |
//!
//! `int4_plain` is the grid of vLLM's `int4_per_token_head`, which hides the zero point in the low bits of the scale,
//! without vLLM's rotation.

use super::hadamard::{rotate, rotate_channels};
use super::int8_page::decode_v;
use super::reference::ReferenceTile;
use super::round::round_v;
use super::tile::transposed;
use super::{lanes, rint_even, to_f16_clamped};

/// Tokens of a K group, and channels of a V group, of `kivi4`.
const KIVI_GROUP: usize = 32;

/// A scheme to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// FP8 e4m3, unscaled.
    Fp8,
    /// INT8 per token and head.
    Int8Plain,
    /// INT4 per token and head.
    Int4Plain,
    /// KIVI with 4 bits.
    Kivi4,
    /// The reference codec, 4 bits.
    KvarnK4v4,
    /// The reference codec, K 4 bits and V 2.
    KvarnK4v2,
    /// The reference codec, 2 bits.
    KvarnK2v2,
}

impl Codec {
    /// Every codec.
    pub const ALL: [Self; 7] =
        [Self::Fp8, Self::Int8Plain, Self::Int4Plain, Self::Kivi4, Self::KvarnK4v4, Self::KvarnK4v2, Self::KvarnK2v2];

    /// The name used in every interface.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp8 => "fp8",
            Self::Int8Plain => "int8_plain",
            Self::Int4Plain => "int4_plain",
            Self::Kivi4 => "kivi4",
            Self::KvarnK4v4 => "kvarn_k4v4",
            Self::KvarnK4v2 => "kvarn_k4v2",
            Self::KvarnK2v2 => "kvarn_k2v2",
        }
    }

    /// The codec called `name`, if there is one.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| codec.name() == name)
    }

    /// Does it code single tokens as they arrive? The others code full blocks, and keep the first block and the open page
    /// unquantized.
    #[must_use]
    pub const fn is_per_token(self) -> bool {
        matches!(self, Self::Fp8 | Self::Int8Plain | Self::Int4Plain)
    }

    /// Bytes of a coded token and kv head, K and V together: codes and parameters.
    #[must_use]
    pub fn bytes_per_token(self, head_dim: usize, block_size: usize) -> f64 {
        let (channels, tokens) = (head_dim as f64, block_size as f64);
        match self {
            Self::Fp8 => 2.0 * channels,
            Self::Int8Plain => 2.0 * (channels + 2.0),
            Self::Int4Plain => 2.0 * (channels / 2.0 + 4.0),
            Self::Kivi4 => {
                let k_groups = block_size.div_ceil(KIVI_GROUP) as f64 * channels / tokens;
                channels + 4.0 * (k_groups + head_dim.div_ceil(KIVI_GROUP) as f64)
            }
            Self::KvarnK4v4 | Self::KvarnK4v2 | Self::KvarnK2v2 => {
                let (k_bits, v_bits) = self.kvarn_bits();
                let k_parameters = (4.0 * channels + 2.0 * tokens) / tokens;
                let v_parameters = (4.0 * tokens + 2.0 * channels) / tokens;
                channels * f64::from(k_bits + v_bits) / 8.0 + k_parameters + v_parameters
            }
        }
    }

    /// Codes and decodes one token, `[head_dim]` each. Codecs of full blocks leave it as it is.
    pub fn apply_token(self, k: &mut [f32], v: &mut [f32]) {
        for row in [k, v] {
            match self {
                Self::Fp8 => row.iter_mut().for_each(|x| *x = to_e4m3(*x)),
                Self::Int8Plain => int8_row(row),
                Self::Int4Plain => int4_row(row),
                Self::Kivi4 | Self::KvarnK4v4 | Self::KvarnK4v2 | Self::KvarnK2v2 => {}
            }
        }
    }

    /// Codes and decodes one block of one head, `[block_size, head_dim]` each, in the plain frame.
    pub fn apply_block(self, k: &mut [f32], v: &mut [f32], head_dim: usize) {
        match self {
            Self::Fp8 | Self::Int8Plain | Self::Int4Plain => {
                for (k, v) in k.chunks_exact_mut(head_dim).zip(v.chunks_exact_mut(head_dim)) {
                    self.apply_token(k, v);
                }
            }
            Self::Kivi4 => {
                let mut m = transposed(k, head_dim);
                let tokens = k.len() / head_dim;
                m.chunks_exact_mut(tokens).for_each(kivi_row);
                k.copy_from_slice(&transposed(&m, tokens));
                v.chunks_exact_mut(head_dim).for_each(kivi_row);
            }
            Self::KvarnK4v4 | Self::KvarnK4v2 | Self::KvarnK2v2 => {
                let (k_bits, v_bits) = self.kvarn_bits();
                let tokens = k.len() / head_dim;
                let mut m = transposed(k, head_dim);
                rotate_channels(&mut m, tokens);
                ReferenceTile::encode(&m, tokens, k_bits).decode(&mut m);
                rotate_channels(&mut m, tokens);
                k.copy_from_slice(&transposed(&m, tokens));
                v.chunks_exact_mut(head_dim).for_each(rotate);
                ReferenceTile::encode(v, head_dim, v_bits).decode(v);
                v.chunks_exact_mut(head_dim).for_each(rotate);
            }
        }
    }

    /// Bits of K and of V of the reference codec.
    const fn kvarn_bits(self) -> (u32, u32) {
        match self {
            Self::KvarnK4v2 => (4, 2),
            Self::KvarnK2v2 => (2, 2),
            _ => (4, 4),
        }
    }
}

/// The nearest e4m3fn number (4 exponent bits, 3 mantissa bits, no infinities), ties to even; at most 448.
fn to_e4m3(x: f32) -> f32 {
    /// Exponent of the smallest normal number.
    const SMALLEST_EXPONENT: i32 = -6;
    let bounded = x.clamp(-448.0, 448.0);
    let exponent = (((bounded.to_bits() >> 23) & 0xff) as i32 - 127).max(SMALLEST_EXPONENT);
    let unit = f32::from_bits(((exponent - 3 + 127) as u32) << 23);
    rint_even(bounded / unit) * unit
}

/// Symmetric 8-bit codes under one scale.
fn int8_row(row: &mut [f32]) {
    let (lo, hi) = lanes::bounds(row);
    let scale = to_f16_clamped(hi.max(-lo) / 127.0).to_f32();
    for x in row {
        let code = rint_even(*x / scale).clamp(-127.0, 127.0);
        *x = if scale > 0.0 { code * scale } else { 0.0 };
    }
}

/// 4-bit codes of vLLM's `int4_per_token_head`: `(code - zero) * scale`, zero and code whole numbers from 0 to 15.
fn int4_row(row: &mut [f32]) {
    let (lo, hi) = lanes::bounds(row);
    let scale = ((hi - lo) / 15.0).max(1e-6);
    let zero = rint_even(-lo / scale).clamp(0.0, 15.0);
    for x in row {
        let code = rint_even(*x / scale + zero).clamp(0.0, 15.0);
        *x = (code - zero) * scale;
    }
}

/// 4-bit min-max codes in groups of [`KIVI_GROUP`], the last one perhaps smaller.
fn kivi_row(row: &mut [f32]) {
    let mut codes = [0u8; KIVI_GROUP];
    for group in row.chunks_mut(KIVI_GROUP) {
        let codes = &mut codes[..group.len()];
        let (scale, zero_point) = round_v(group, 4, codes);
        decode_v(codes, scale, zero_point, group);
    }
}
