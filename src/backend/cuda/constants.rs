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

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD_DIM: usize = 48;

    fn words(bytes: &[u8]) -> Vec<u32> {
        bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect()
    }

    /// Factors that tell their row and column, exact in bf16.
    fn frame() -> Feedback {
        let mut frame = Feedback::none(HEAD_DIM);
        for (d, j) in (0..HEAD_DIM).flat_map(|d| (d + 1..HEAD_DIM).map(move |j| (d, j))) {
            frame.matrix[d * HEAD_DIM + j] = if (d + j) % 2 == 0 { d as f32 } else { -(j as f32) };
        }
        frame.order.reverse();
        (frame.error_scale[5], frame.loss_scale) = (2.0, 3.0);
        frame
    }

    #[test]
    fn a_frame_takes_the_bytes_that_its_length_says() {
        for head_dim in [16, 64, 128, 256] {
            assert_eq!(of_frame(&Feedback::none(head_dim)).len(), frame_bytes(head_dim));
        }
    }

    #[test]
    fn channels_their_places_and_weights_are_by_position() {
        let words = words(&of_frame(&frame()));
        assert_eq!(words[..4], [47, 46, 45, 44]);
        assert_eq!(words[HEAD_DIM..][..4], [47, 45, 46, 44], "the middle two of four are swapped");
        assert_eq!(words[2 * HEAD_DIM..][4..6], [3f32.to_bits(), 0.75f32.to_bits()]);
    }

    #[test]
    fn each_factor_is_in_its_triangle_or_in_its_operand() {
        let frame = frame();
        let words = words(&of_frame(&frame));
        let factor = |d: usize, j: usize| frame.matrix[d * HEAD_DIM + j];
        let triangles = &words[3 * HEAD_DIM..];
        assert_eq!(triangles[0], factor(0, 1).to_bits());
        assert_eq!(triangles[15], factor(1, 2).to_bits(), "after the fifteen of the first row");
        assert_eq!(triangles[2 * 120 + 119], factor(46, 47).to_bits());
        let links = &triangles[3 * 120..];
        // Blocks (1, 0), (2, 0), (2, 1); lane 6 is g = 1, q = 2.
        for (pair, b, a) in [(0, 1, 0), (1, 2, 0), (2, 2, 1)] {
            for (register, row, column) in [(0, 4, 1), (1, 12, 1), (2, 4, 9), (3, 12, 9)] {
                let word = links[(pair * 32 + 6) * 4 + register];
                let halves = [word as u16, (word >> 16) as u16].map(|half| -bf16::from_bits(half).to_f32());
                let (row, column) = (16 * a + row, 16 * b + column);
                assert_eq!(halves, [factor(row, column), factor(row + 1, column)]);
            }
        }
    }
}
