//! How does the reference codec (`KVarN`, arXiv:2606.03458) code a tile? For comparison with ours.
//!
//! A tile has rows, each with a grid, and columns, each with a scale: K `[channels, tokens]`, V `[tokens, channels]`, both
//! rotated. Dual scaling with eight iterations and no RMS step; asymmetric round-to-nearest per row, codes from the
//! unrounded f32 scale and zero point, which are then stored as f16.
//!
//! ```text
//! x^[row,col] = (code * row_scale[row] + row_zero_point[row]) * column_scale[col]
//! ```

use super::dual_scale::{DualScaleOptions, dual_scale};
use super::{lanes, rint_even, to_f16_clamped};
use half::f16;

/// A tile of the reference codec.
#[derive(Debug, Clone, PartialEq)]
pub struct ReferenceTile {
    /// Codes, `[rows, columns]`.
    pub codes: Vec<u8>,
    /// `[rows]`.
    pub row_scale: Vec<f16>,
    /// `[rows]`.
    pub row_zero_point: Vec<f16>,
    /// `[columns]`.
    pub column_scale: Vec<f16>,
}

impl ReferenceTile {
    /// Codes `m`, `[rows, columns]`, in `bits` bits.
    #[must_use]
    pub fn encode(m: &[f32], columns: usize, bits: u32) -> Self {
        let code_max = ((1u32 << bits) - 1) as f32;
        let scales = dual_scale(m, columns, DualScaleOptions::REFERENCE);
        let mut codes = vec![0u8; m.len()];
        let (mut row_scale, mut row_zero_point) = (Vec::new(), Vec::new());
        let mut balanced = vec![0f32; columns];
        for ((row, codes), &r) in m.chunks_exact(columns).zip(codes.chunks_exact_mut(columns)).zip(&scales.channel) {
            for ((out, &x), &c) in balanced.iter_mut().zip(row).zip(&scales.token) {
                *out = x / (r * c);
            }
            let (lo, hi) = lanes::bounds(&balanced);
            let scale = (hi - lo) / code_max;
            for (code, &x) in codes.iter_mut().zip(&balanced) {
                let nearest = rint_even((x - lo) / scale).clamp(0.0, code_max);
                *code = if scale > 0.0 { nearest as u8 } else { 0 };
            }
            row_scale.push(to_f16_clamped(scale * r));
            row_zero_point.push(to_f16_clamped(lo * r));
        }
        let column_scale = scales.token.iter().map(|&c| to_f16_clamped(c)).collect();
        Self { codes, row_scale, row_zero_point, column_scale }
    }

    /// Decodes to `m`, `[rows, columns]`.
    pub fn decode(&self, m: &mut [f32]) {
        let columns = self.column_scale.len();
        for (row, (out, codes)) in m.chunks_exact_mut(columns).zip(self.codes.chunks_exact(columns)).enumerate() {
            let (scale, zero_point) = (self.row_scale[row].to_f32(), self.row_zero_point[row].to_f32());
            for ((x, &code), c) in out.iter_mut().zip(codes).zip(&self.column_scale) {
                *x = (f32::from(code) * scale + zero_point) * c.to_f32();
            }
        }
    }
}
