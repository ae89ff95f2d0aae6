//! How is a row summed so that scalar and vector code agree to the bit? In sixteen running sums, whatever the width of
//! the machine's registers; the sixteen are then added in order.

/// Running sums of a row.
pub const LANES: usize = 16;

/// The sum of `f(x)` over a row, in f32.
#[inline(always)]
pub fn sum(row: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let chunks = row.chunks_exact(LANES);
    for (lane, &x) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += f(x);
    }
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += f(chunk[i]);
        }
    }
    lanes.iter().sum()
}

/// The sum of `f(x)` squared over a row, in f64: no value of f32 overflows it.
#[inline(always)]
pub fn sum_of_squares(row: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let square = |x: f32| f64::from(f(x)) * f64::from(f(x));
    let mut lanes = [0f64; LANES];
    let chunks = row.chunks_exact(LANES);
    for (lane, &x) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += square(x);
    }
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += square(chunk[i]);
        }
    }
    lanes.iter().sum()
}

/// The smallest and the largest value of a row; infinities the wrong way round where it has none.
#[inline(always)]
pub fn bounds(row: &[f32]) -> (f32, f32) {
    let (mut lo, mut hi) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let chunks = row.chunks_exact(LANES);
    for (i, &x) in chunks.remainder().iter().enumerate() {
        (lo[i], hi[i]) = (if x < lo[i] { x } else { lo[i] }, if x > hi[i] { x } else { hi[i] });
    }
    for chunk in chunks {
        for i in 0..LANES {
            let x = chunk[i];
            lo[i] = if x < lo[i] { x } else { lo[i] };
            hi[i] = if x > hi[i] { x } else { hi[i] };
        }
    }
    (lo.into_iter().fold(f32::INFINITY, f32::min), hi.into_iter().fold(f32::NEG_INFINITY, f32::max))
}

/// The largest of 0 and `f` of each place of `rows`, which are of one length.
#[inline(always)]
pub fn largest<const N: usize>(rows: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let end = rows[0].len();
    for first in (0..end).step_by(LANES) {
        let rows = rows.map(|row| &row[first..end.min(first + LANES)]);
        for i in 0..rows[0].len() {
            let x = f(rows.map(|row| row[i]));
            lanes[i] = if x > lanes[i] { x } else { lanes[i] };
        }
    }
    lanes.into_iter().fold(0.0, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_of_a_row_counts_once() {
        for n in [0usize, 1, 3, 15, 16, 17, 129] {
            let row: Vec<f32> = (1..=n).map(|i| i as f32).collect();
            let n = n as f32;
            assert_eq!(sum(&row, |x| 2.0 * x), n * (n + 1.0));
            assert_eq!(sum_of_squares(&row, |x| x), f64::from(n * (n + 1.0) * (2.0 * n + 1.0) / 6.0));
            let expected = if n == 0.0 { (f32::INFINITY, f32::NEG_INFINITY) } else { (1.0, n) };
            assert_eq!(bounds(&row), expected);
            assert_eq!(largest([&row, &row], |[a, b]| a.min(b)), n);
        }
    }

    #[test]
    fn squares_of_any_value_have_a_finite_sum() {
        assert!(sum_of_squares(&[f32::MAX; 256], |x| x).is_finite());
        assert!(sum_of_squares(&[f32::MIN_POSITIVE; 256], |x| x) > 0.0);
    }
}
