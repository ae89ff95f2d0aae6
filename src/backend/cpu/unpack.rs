//! Decoding a whole record at once, for query rows that are many.

use super::record_kernel::BLOCK_TOKENS;
use super::simd::Simd;
use super::tile_kernel::{DEEP, TileKernel};
use crate::format::order::{DEPTH, LANES};
use crate::format::{Int8Page, MAX_HEAD_DIM, RecordLayout, SealedTile};

/// Decodes a quantized record into an f32 `raw` page of the same size, K and V in the frames that they are kept in.
///
/// # Safety
/// The machine has `S`'s instructions.
#[inline(always)]
pub unsafe fn unpack<S: Simd>(layout: RecordLayout, record: &[u8], out: &mut [f32]) {
    // SAFETY: passed on.
    unsafe {
        match layout {
            RecordLayout::Raw(_) => unreachable!("a raw page is read as it is"),
            RecordLayout::Int8(page) => int8::<S>(page, record, out),
            RecordLayout::Tile(layout) => match layout.bits {
                4 => tile::<S, 4>(layout, record, out),
                3 => tile::<S, 3>(layout, record, out),
                _ => tile::<S, 2>(layout, record, out),
            },
        }
    }
}

#[inline(always)]
unsafe fn int8<S: Simd>(page: Int8Page, record: &[u8], out: &mut [f32]) {
    let Int8Page { head_dim, block_size } = page;
    assert!(record.len() >= page.bytes() && out.len() >= 2 * head_dim * block_size);
    let halves = |offset: usize| record[offset..].as_ptr().cast::<u16>();
    // SAFETY: `[block_size, head_dim]` codes and their parameters are read and written, both lengths asserted above.
    unsafe {
        let mean = widen::<S, MAX_HEAD_DIM>(halves(page.k_channel_mean()), head_dim);
        let scale = widen::<S, MAX_HEAD_DIM>(halves(page.k_channel_scale()), head_dim);
        let v_token_scale = widen::<S, BLOCK_TOKENS>(halves(page.v_token_scale()), block_size);
        let zero_point = widen::<S, BLOCK_TOKENS>(halves(page.v_token_zero_point()), block_size);
        let (k_codes, v_codes) = (record.as_ptr().add(page.k_codes()), record.as_ptr().add(page.v_codes()));
        let (k, v) = (out.as_mut_ptr(), out.as_mut_ptr().add(head_dim * block_size));
        for token in (0..block_size).step_by(LANES) {
            let token_scale = S::load_f16(halves(page.k_token_scale()).add(token));
            for d in (0..head_dim).step_by(DEPTH) {
                let codes = S::i8x4(S::load_words(k_codes.add(token * head_dim + d * LANES)));
                for j in 0..DEPTH {
                    let scale = S::mul(S::splat(scale[d + j]), token_scale);
                    let value = S::mul_add(scale, codes[j], S::splat(mean[d + j]));
                    S::store(k.add(token * head_dim + (d + j) * LANES), value);
                }
            }
        }
        for channel in (0..head_dim).step_by(LANES) {
            for token in (0..block_size).step_by(DEPTH) {
                let codes = S::u8x4(S::load_words(v_codes.add(channel * block_size + token * LANES)));
                for j in 0..DEPTH {
                    let scale = S::splat(v_token_scale[token + j]);
                    let value = S::mul_add(scale, codes[j], S::splat(zero_point[token + j]));
                    S::store(v.add(channel * block_size + (token + j) * LANES), value);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, const BITS: u32>(layout: SealedTile, record: &[u8], out: &mut [f32]) {
    let SealedTile { head_dim, block_size, .. } = layout;
    assert!(record.len() >= layout.bytes() && out.len() >= 2 * head_dim * block_size);
    let kernel = TileKernel::<BITS>::new(layout, record);
    let halves = |offset: usize| record[offset..].as_ptr().cast::<u16>();
    // SAFETY: the codes and parameters of one tile are read and written, both lengths asserted above.
    unsafe {
        let scale = widen::<S, MAX_HEAD_DIM>(halves(layout.k_channel_scale()), head_dim);
        let zero_point = widen::<S, MAX_HEAD_DIM>(halves(layout.k_channel_zero_point()), head_dim);
        let k = out.as_mut_ptr();
        for token in (0..block_size).step_by(LANES) {
            let token_scale = S::load_f16(halves(layout.k_token_scale()).add(token));
            for d in (0..head_dim).step_by(DEEP) {
                let words = kernel.k_words::<S>(token / LANES, d / DEEP);
                for m in 0..DEEP / DEPTH {
                    let codes = S::u8x4(words[m]);
                    for j in 0..DEPTH {
                        let channel = d + m * DEPTH + j;
                        let value = S::mul_add(S::splat(scale[channel]), codes[j], S::splat(zero_point[channel]));
                        S::store(k.add(token * head_dim + channel * LANES), S::mul(value, token_scale));
                    }
                }
            }
        }
        let v_token_scale = widen::<S, BLOCK_TOKENS>(halves(layout.v_token_scale()), block_size);
        let zero_point = widen::<S, BLOCK_TOKENS>(halves(layout.v_token_zero_point()), block_size);
        let v = out.as_mut_ptr().add(head_dim * block_size);
        for channel in (0..head_dim).step_by(LANES) {
            for t in (0..block_size).step_by(DEEP) {
                let words = kernel.v_words::<S>(channel / LANES, t / DEEP);
                for m in 0..DEEP / DEPTH {
                    let codes = S::u8x4(words[m]);
                    for j in 0..DEPTH {
                        let token = t + m * DEPTH + j;
                        let value = S::mul_add(S::splat(v_token_scale[token]), codes[j], S::splat(zero_point[token]));
                        S::store(v.add(channel * block_size + token * LANES), value);
                    }
                }
            }
            if let Some(row) = kernel.first_row {
                S::store(v.add(channel * block_size + row * LANES), kernel.first_v::<S>(channel));
            }
        }
    }
}

/// The first `count` f16 behind `from`, a multiple of 16 and at most `N`.
#[inline(always)]
unsafe fn widen<S: Simd, const N: usize>(from: *const u16, count: usize) -> [f32; N] {
    let mut out = [0.0; N];
    assert!(count <= N);
    for i in (0..count).step_by(LANES) {
        // SAFETY: the caller has `count` of them, and `out` has room.
        unsafe { S::store(out.as_mut_ptr().add(i), S::load_f16(from.add(i))) };
    }
    out
}
