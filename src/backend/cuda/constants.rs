//! What the seal kernels read of a factored frame: one block of bytes for each (key/value head, frame), made when the
//! calibration is and copied to the device once.
//!
//! ```text
//! channel    u32 [D]            p: the channel of each position
//! staged     u32 [D]            where the code of a position is staged in its token's row: p, the middle two of four swapped
//! weight     f32 [D]            m / (s U)^2: what a squared error of a position counts
//! diagonal   f32 [D / 16][120]  F within blocks of 16 positions, rows of the upper triangle one after the other
//! links      bf16               -F from block a to block b > a, as operands B of mma.m16n8k16: for b, for a < b, for each
//!                               lane four words; word r of lane l has rows 2 (l % 4) + 8 (r % 2) + 0 and 1 of block a,
//!                               column 8 (r / 2) + l / 4 of block b
//! ```

use crate::quant::Feedback;
use half::bf16;

/// Positions of a block of the recursion.
const BLOCK: usize = 16;

/// Bytes of [`of_frame`] for heads of so many channels, a multiple of 16.
#[must_use]
pub const fn frame_bytes(head_dim: usize) -> usize {
    let blocks = head_dim / BLOCK;
    12 * head_dim + 4 * blocks * (BLOCK * (BLOCK - 1) / 2) + blocks * (blocks - 1) / 2 * 32 * 16
}

/// The constants of one frame.
#[must_use]
pub fn of_frame(feedback: &Feedback) -> Vec<u8> {
    let head_dim = feedback.order.len();
    let blocks = head_dim / BLOCK;
    let factor = |d: usize, j: usize| feedback.matrix[d * head_dim + j];
    let mut bytes = Vec::with_capacity(frame_bytes(head_dim));
    for &channel in &feedback.order {
        bytes.extend(u32::from(channel).to_le_bytes());
    }
    for &channel in &feedback.order {
        bytes.extend(staged(u32::from(channel)).to_le_bytes());
    }
    for &scale in &feedback.error_scale {
        let scale = f64::from(scale);
        bytes.extend(((f64::from(feedback.loss_scale) / (scale * scale)) as f32).to_le_bytes());
    }
    for block in 0..blocks {
        let of = BLOCK * block;
        let pairs = (0..BLOCK).flat_map(|i| (i + 1..BLOCK).map(move |j| (i, j)));
        pairs.for_each(|(i, j)| bytes.extend(factor(of + i, of + j).to_le_bytes()));
    }
    for (b, a) in (1..blocks).flat_map(|b| (0..b).map(move |a| (b, a))) {
        for (lane, register) in (0..32).flat_map(|lane| (0..4).map(move |register| (lane, register))) {
            let column = BLOCK * b + 8 * (register / 2) + lane / 4;
            let row = BLOCK * a + 2 * (lane % 4) + 8 * (register % 2);
            bytes.extend(bf16::from_f32(-factor(row, column)).to_le_bytes());
            bytes.extend(bf16::from_f32(-factor(row + 1, column)).to_le_bytes());
        }
    }
    bytes
}

const fn staged(channel: u32) -> u32 {
    channel & !3 | (channel & 1) << 1 | channel >> 1 & 1
}
