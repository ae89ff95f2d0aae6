//! What is a rotated row? `x H`, with H the Sylvester-Hadamard matrix over the root of its size.
//!
//! ```text
//! H_1 = [1]      H_2n = [H_n  H_n; H_n  -H_n] / sqrt(2)
//! ```
//!
//! H is symmetric, orthonormal and its own inverse; there are no random signs. Where `head_dim` is not a power of two,
//! H is block-diagonal, of blocks of its largest power-of-two divisor (96 = 3 x 32).
//!
//! The butterflies run in one order, from neighbours to halves, on one row or on all columns of a matrix: the same
//! value comes out to the bit.

use std::ops::{Add, Mul, Sub};

/// Size of the blocks of H: the largest power of two that divides `head_dim`.
const fn block_of(head_dim: usize) -> usize {
    1 << head_dim.trailing_zeros()
}

/// One level of butterflies, between neighbours of `span` values.
#[inline(always)]
fn level<T>(m: &mut [T], span: usize)
where
    T: Copy + Add<Output = T> + Sub<Output = T>,
{
    for pair in m.chunks_exact_mut(2 * span) {
        let (low, high) = pair.split_at_mut(span);
        for (a, b) in low.iter_mut().zip(high) {
            let (x, y) = (*a, *b);
            *a = x + y;
            *b = x - y;
        }
    }
}

/// `H M` for M `[channels, columns]`, row-major: butterflies on whole rows.
#[inline(always)]
fn butterflies<T>(m: &mut [T], columns: usize, block: usize, norm: T)
where
    T: Copy + Add<Output = T> + Sub<Output = T> + Mul<Output = T>,
{
    let mut half = 1;
    while half < block {
        // Of short spans, the compiler is told the length: the rows of V are rotated one by one.
        match half * columns {
            1 => level(m, 1),
            2 => level(m, 2),
            4 => level(m, 4),
            span => level(m, span),
        }
        half *= 2;
    }
    for x in m {
        *x = *x * norm;
    }
}

/// Rotates one row, `[head_dim]`, in place: `x H`. Twice is the identity, up to rounding.
#[inline(always)]
pub fn rotate(row: &mut [f32]) {
    rotate_channels(row, 1);
}

/// Rotates every column of M, `[channels, tokens]` row-major, in place: `H M`. Each column becomes, to the bit, what
/// [`rotate`] makes of it.
#[inline(always)]
pub fn rotate_channels(m: &mut [f32], tokens: usize) {
    if m.is_empty() || tokens == 0 {
        return;
    }
    let block = block_of(m.len() / tokens);
    butterflies(m, tokens, block, 1.0 / (block as f32).sqrt());
}

/// A second moment in the rotated frame: S, `[head_dim, head_dim]`, becomes `H S H`.
pub fn rotate_moment(moment: &mut [f64], head_dim: usize) {
    if moment.is_empty() || head_dim == 0 {
        return;
    }
    let block = block_of(head_dim);
    let norm = 1.0 / (block as f64).sqrt();
    butterflies(moment, head_dim, block, norm);
    for row in moment.chunks_exact_mut(head_dim) {
        butterflies(row, 1, block, norm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    /// Entry (i, j) of H: the sign is the parity of the ones that i and j share, within a block.
    fn entry(i: usize, j: usize, head_dim: usize) -> f64 {
        let block = block_of(head_dim);
        if i / block != j / block {
            return 0.0;
        }
        let sign = if ((i % block) & (j % block)).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
        sign / (block as f64).sqrt()
    }

    fn wave(n: usize) -> Vec<f32> {
        (0..n).map(|i| (0.7 * i as f32).sin() + 0.25).collect()
    }

    #[test]
    fn a_row_is_multiplied_by_the_matrix() {
        for head_dim in [16, 48, 64, 80, 96, 128, 256] {
            let row = wave(head_dim);
            let mut rotated = row.clone();
            rotate(&mut rotated);
            for j in 0..head_dim {
                let expected: f64 = (0..head_dim).map(|i| f64::from(row[i]) * entry(i, j, head_dim)).sum();
                assert!((f64::from(rotated[j]) - expected).abs() < 1e-5, "{head_dim}: {} for {expected}", rotated[j]);
            }
        }
    }

    #[test]
    fn ninety_six_channels_are_three_blocks_of_thirty_two() {
        let row = wave(96);
        let mut whole = row.clone();
        rotate(&mut whole);
        for block in 0..3 {
            let mut part = row[32 * block..][..32].to_vec();
            rotate(&mut part);
            assert_eq!(whole[32 * block..][..32], part);
        }
    }

    #[test]
    fn columns_rotate_as_rows_do_to_the_bit() {
        for (channels, tokens) in [(64, 128), (96, 16), (128, 3)] {
            let mut m = wave(channels * tokens);
            let columns: Vec<Vec<f32>> =
                (0..tokens).map(|t| (0..channels).map(|d| m[d * tokens + t]).collect()).collect();
            rotate_channels(&mut m, tokens);
            for (t, mut column) in columns.into_iter().enumerate() {
                rotate(&mut column);
                assert!((0..channels).all(|d| m[d * tokens + t].to_bits() == column[d].to_bits()));
            }
        }
    }

    #[test]
    fn a_moment_rotates_on_both_sides() {
        let head_dim = 48;
        let moment: Vec<f64> = (0..head_dim * head_dim).map(|i| (0.3 * i as f64).cos()).collect();
        let mut rotated = moment.clone();
        rotate_moment(&mut rotated, head_dim);
        let (i, j) = (17, 40);
        let mut expected = 0.0;
        for a in 0..head_dim {
            for b in 0..head_dim {
                expected += entry(i, a, head_dim) * moment[a * head_dim + b] * entry(b, j, head_dim);
            }
        }
        assert!((rotated[i * head_dim + j] - expected).abs() < 1e-12);
    }

    #[test]
    fn nothing_rotates_to_nothing() {
        rotate(&mut []);
        rotate_channels(&mut [], 0);
        rotate_moment(&mut [], 0);
    }

    proptest! {
        #[test]
        fn rotating_twice_is_the_identity(row in vec(-50f32..50.0, 96)) {
            let mut twice = row.clone();
            rotate(&mut twice);
            rotate(&mut twice);
            for d in 0..96 {
                prop_assert!((row[d] - twice[d]).abs() < 1e-4);
            }
        }

        #[test]
        fn rotation_keeps_the_length(row in vec(-50f32..50.0, 128)) {
            let length = |xs: &[f32]| xs.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
            let mut rotated = row.clone();
            rotate(&mut rotated);
            prop_assert!((length(&row) - length(&rotated)).abs() <= 1e-5 * length(&row));
        }
    }
}
