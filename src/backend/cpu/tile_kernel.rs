//! Scores and sums over a sealed tile.
//!
//! ```text
//! q . K^[t] = k_token_scale[t] * (q . k_channel_zero_point + sum_d (q_d * k_channel_scale[d]) * code[d,t])
//! sum_t p[t] V^[t,d] = sum_t (p[t] * v_token_scale[t]) * code[t,d] + sum_t p[t] * v_token_zero_point[t] + p[f] * first_v[d]
//! ```
//!
//! with `q` in the frame of K, V in its own, and row `f` the sequence's first token, whose other parameters are 0.

use super::ORDER;
use super::record_kernel::{BLOCK_TOKENS, MAX_CHAINS, RecordKernel, chain, scale_queries, scale_weights, total};
use super::simd::Simd;
use crate::format::order::{DEPTH, LANES};
use crate::format::{MAX_HEAD_DIM, SealedTile};
use crate::quant::record::tile::first_row;
use half::f16;

/// Values of a lane that are unpacked at once.
pub const DEEP: usize = 16;

/// A sealed tile in [`crate::format::Arrangement::Cpu`].
pub struct TileKernel<'a, const BITS: u32> {
    layout: SealedTile,
    record: &'a [u8],
    /// Row of the sequence's first token.
    pub first_row: Option<usize>,
    first_scale: f32,
    first_zero_point: f32,
}

impl<'a, const BITS: u32> TileKernel<'a, BITS> {
    pub fn new(layout: SealedTile, record: &'a [u8]) -> Self {
        assert!(layout.bits == BITS && record.len() >= layout.bytes());
        let half = |at: usize| f16::from_le_bytes([record[at], record[at + 1]]).to_f32();
        Self {
            layout,
            record,
            first_row: first_row(layout, ORDER, record).filter(|&row| row < layout.block_size),
            first_scale: half(layout.first_v_scale()),
            first_zero_point: half(layout.first_v_zero_point()),
        }
    }

    #[inline(always)]
    fn halves(&self, offset: usize) -> *const u16 {
        self.record[offset..].as_ptr().cast()
    }

    /// Codes of sixteen tokens and sixteen channels: four words of four channels each.
    ///
    /// # Safety
    /// The panel and the channels are of the tile; the machine has `S`'s instructions.
    #[inline(always)]
    pub unsafe fn k_words<S: Simd>(&self, panel: usize, deep: usize) -> [S::W; 4] {
        // SAFETY: passed on.
        unsafe { self.words::<S>(self.layout.k_codes(), panel * (self.layout.head_dim / DEEP) + deep) }
    }

    /// Codes of sixteen channels and sixteen tokens: four words of four tokens each.
    ///
    /// # Safety
    /// As above.
    #[inline(always)]
    pub unsafe fn v_words<S: Simd>(&self, lanes: usize, deep: usize) -> [S::W; 4] {
        // SAFETY: passed on.
        unsafe { self.words::<S>(self.layout.v_codes(), lanes * (self.layout.block_size / DEEP) + deep) }
    }

    /// The first token's V, sixteen channels of it.
    ///
    /// # Safety
    /// As above.
    #[inline(always)]
    pub unsafe fn first_v<S: Simd>(&self, channel: usize) -> S::F {
        let mut codes = [0f32; LANES];
        let bytes = &self.record[self.layout.first_v() + channel..][..LANES];
        codes.iter_mut().zip(bytes).for_each(|(code, &byte)| *code = f32::from(byte));
        // SAFETY: sixteen values of the array.
        unsafe {
            let codes = S::load(codes.as_ptr());
            S::mul_add(S::splat(self.first_scale), codes, S::splat(self.first_zero_point))
        }
    }

    /// # Safety
    /// Group `index` of sixteen lanes and sixteen values lies in the codes at `field`.
    #[inline(always)]
    unsafe fn words<S: Simd>(&self, field: usize, index: usize) -> [S::W; 4] {
        let group = LANES * DEEP;
        let codes = self.record.as_ptr().wrapping_add(field);
        // SAFETY: `new` checked the record's length, the caller the group.
        unsafe {
            if BITS == 4 {
                let at = codes.add(index * group / 2);
                let (a, b) = (S::load_words(at), S::load_words(at.add(group / 4)));
                let low = 0x0f0f_0f0f;
                return [
                    S::and(a, low),
                    S::and(S::shift_right::<4>(a), low),
                    S::and(b, low),
                    S::and(S::shift_right::<4>(b), low),
                ];
            }
            let pairs = S::load_words(codes.add(index * group / 4));
            let low = 0x0303_0303;
            let pairs = [
                S::and(pairs, low),
                S::and(S::shift_right::<2>(pairs), low),
                S::and(S::shift_right::<4>(pairs), low),
                S::and(S::shift_right::<6>(pairs), low),
            ];
            if BITS == 2 {
                return pairs;
            }
            // Sixteen bits, a nibble a byte; each nibble's bits are those of the four words, to stand above the pairs.
            let bits = S::load_half_words(codes.add(self.layout.high_plane() + index * group / 8));
            let bytes = S::and(S::or(bits, S::shift_left::<8>(bits)), 0x00ff_00ff);
            let nibbles = S::and(S::or(bytes, S::shift_left::<4>(bytes)), 0x0f0f_0f0f);
            let high = 0x0404_0404;
            [
                S::or(pairs[0], S::and(S::shift_left::<2>(nibbles), high)),
                S::or(pairs[1], S::and(S::shift_left::<1>(nibbles), high)),
                S::or(pairs[2], S::and(nibbles, high)),
                S::or(pairs[3], S::and(S::shift_right::<1>(nibbles), high)),
            ]
        }
    }
}

// SAFETY: reads stay within the record, by its layout and the caller's panels.
unsafe impl<S: Simd, const BITS: u32> RecordKernel<S> for TileKernel<'_, BITS> {
    const ROWS: usize = 4;

    #[inline(always)]
    unsafe fn prepare<const R: usize>(&self, q: *const f32, scaled: *mut f32) -> [f32; R] {
        let head_dim = self.layout.head_dim;
        let scale = self.halves(self.layout.k_channel_scale());
        let zero_point = self.halves(self.layout.k_channel_zero_point());
        // SAFETY: see the trait.
        unsafe { scale_queries::<S, R>(head_dim, q, scale, zero_point, scaled) }
    }

    #[inline(always)]
    unsafe fn scores<const R: usize>(&self, panel: usize, scaled: *const f32, common: &[f32; R]) -> [S::F; R] {
        // SAFETY: see the trait.
        unsafe {
            let mut sums = [[S::splat(0.0); R]; MAX_CHAINS];
            for r in 0..R {
                sums[0][r] = S::splat(common[r]);
            }
            for d in (0..self.layout.head_dim).step_by(DEEP) {
                let words = self.k_words::<S>(panel, d / DEEP);
                for m in 0..DEEP / DEPTH {
                    let k = S::u8x4(words[m]);
                    for j in 0..DEPTH {
                        let sums = &mut sums[chain::<S>(R, j)];
                        for r in 0..R {
                            let q = S::splat(*scaled.add(r * MAX_HEAD_DIM + d + m * DEPTH + j));
                            sums[r] = S::mul_add(q, k[j], sums[r]);
                        }
                    }
                }
            }
            let mut sums = total::<S, R>(sums);
            let token_scale = S::load_f16(self.halves(self.layout.k_token_scale()).add(panel * LANES));
            for r in 0..R {
                sums[r] = S::mul(sums[r], token_scale);
            }
            sums
        }
    }

    #[inline(always)]
    unsafe fn accumulate<const R: usize>(&self, first: usize, end: usize, weights: *mut f32, acc: *mut f32) {
        let SealedTile { head_dim, .. } = self.layout;
        let scale = self.halves(self.layout.v_token_scale());
        let zero_point = self.halves(self.layout.v_token_zero_point());
        let first_row = self.first_row.filter(|row| (first * LANES..end * LANES).contains(row));
        // SAFETY: see the trait.
        unsafe {
            let mut first_weight = [0.0; R];
            if let Some(row) = first_row {
                for r in 0..R {
                    first_weight[r] = *weights.add(r * BLOCK_TOKENS + row);
                }
            }
            let common = scale_weights::<S, R>(first, end, scale, zero_point, weights);
            for channel in (0..head_dim).step_by(LANES) {
                let mut sums = [[S::splat(0.0); R]; MAX_CHAINS];
                for r in 0..R {
                    sums[0][r] = S::add(S::load(acc.add(r * head_dim + channel)), S::splat(common[r]));
                }
                if first_row.is_some() {
                    let first_v = self.first_v::<S>(channel);
                    for r in 0..R {
                        sums[0][r] = S::mul_add(S::splat(first_weight[r]), first_v, sums[0][r]);
                    }
                }
                for t in (first * LANES..end * LANES).step_by(DEEP) {
                    let words = self.v_words::<S>(channel / LANES, t / DEEP);
                    for m in 0..DEEP / DEPTH {
                        let v = S::u8x4(words[m]);
                        for j in 0..DEPTH {
                            let sums = &mut sums[chain::<S>(R, j)];
                            for r in 0..R {
                                let weight = S::splat(*weights.add(r * BLOCK_TOKENS + t + m * DEPTH + j));
                                sums[r] = S::mul_add(weight, v[j], sums[r]);
                            }
                        }
                    }
                }
                let sums = total::<S, R>(sums);
                for r in 0..R {
                    S::store(acc.add(r * head_dim + channel), sums[r]);
                }
            }
        }
    }
}
