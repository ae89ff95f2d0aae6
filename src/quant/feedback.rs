//! How does a rounding error of one channel of K move the channels after it, so that errors cancel in `q . k` where the
//! queries look? The recursion of GPTQ (arXiv:2210.17323; `QuIP`, 2307.13304), for keys, under the second moment of the
//! queries.
//!
//! For S, the mean of `q q'`, and s, the deviation of each channel of K, both in one frame:
//!
//! ```text
//! A = diag(s) S diag(s) / m + 0.05 I          m the mean of the diagonal of diag(s) S diag(s)
//! p = the channels by descending diagonal of A (ties: the lower first)
//! inverse(A[p,p]) = U' U, U upper triangular
//! F[d,j] = U[d,j] / U[d,d] * s[p_j] / s[p_d]          for j > d, else 0
//! loss = m * sum over d, t of (e[t] of channel p_d / (s[p_d] U[d,d]))^2 = e' (S + damping) e
//! ```
//!
//! All in f64; U is the inverse of the upper R of `A[p,p] = R R'`, so nothing is inverted but a triangle. The results
//! are constants of a model: see `round` for what is done with them.

use super::hadamard::rotate_moment;
use crate::error::{Error, Result};

/// Added to the diagonal of A, whose mean is 1.
pub const DAMPING: f64 = 0.05;
/// Smallest deviation of a channel, as a share of the largest.
const RELATIVE_FLOOR: f64 = 1e-6;

/// The feedback of one key/value head in one frame.
#[derive(Debug, Clone, PartialEq)]
pub struct Feedback {
    /// p: the channels in the order of rounding, `[head_dim]`.
    pub order: Vec<u16>,
    /// F, `[head_dim, head_dim]` row-major in the order of p; zero on and below the diagonal.
    pub matrix: Vec<f32>,
    /// `s[p_d] * U[d,d]`, `[head_dim]`, in the order of p: what a channel's error is divided by in the loss.
    pub error_scale: Vec<f32>,
    /// m, by which the losses of two frames compare.
    pub loss_scale: f32,
}

impl Feedback {
    /// Factors the moment S, `[head_dim, head_dim]`, under the deviations of K's channels, `[head_dim]` (floored here at
    /// 1e-6 of the largest), both in the frame.
    ///
    /// Without any moment (S, or K's deviation, is exactly zero) this is [`Feedback::none`].
    ///
    /// # Errors
    ///
    /// [`Error::Config`] when a value is not finite, a deviation is negative, the sizes differ or S is not positive
    /// semi-definite.
    pub fn factor(moment: &[f64], deviation: &[f64]) -> Result<Self> {
        let n = deviation.len();
        if moment.len() != n * n {
            return Err(Error::Config(format!("a moment of {} values for {n} channels", moment.len())));
        }
        if let Some(x) = moment.iter().chain(deviation).find(|x| !x.is_finite()) {
            return Err(Error::Config(format!("query moment: {x} is not finite")));
        }
        if let Some(x) = deviation.iter().find(|&&x| x < 0.0) {
            return Err(Error::Config(format!("query moment: a channel's deviation is {x}")));
        }
        let largest = deviation.iter().copied().fold(0.0, f64::max);
        let s: Vec<f64> = deviation.iter().map(|&s| s.max(RELATIVE_FLOOR * largest)).collect();
        let diagonal: Vec<f64> = (0..n).map(|d| s[d] * moment[d * n + d] * s[d]).collect();
        let mean = diagonal.iter().sum::<f64>() / n as f64;
        if mean == 0.0 && diagonal.iter().all(|&x| x == 0.0) {
            return Ok(Self::none(n));
        }
        if !(mean > 0.0 && (mean as f32) > 0.0 && (mean as f32).is_finite()) {
            return Err(Error::Config(format!("query moment: the mean of its scaled diagonal is {mean}")));
        }
        let mut order: Vec<u16> = (0..n as u16).collect();
        order.sort_by(|&a, &b| diagonal[usize::from(b)].total_cmp(&diagonal[usize::from(a)]));
        let channel = |d: usize| usize::from(order[d]);
        let mut a = vec![0f64; n * n];
        for i in 0..n {
            for j in 0..n {
                let (p, q) = (channel(i), channel(j));
                a[i * n + j] = s[p] * moment[p * n + q] * s[q] / mean;
            }
            a[i * n + i] += DAMPING;
        }
        upper_root(&mut a, n)?;
        let u = inverse_of_upper(&a, n);
        let mut matrix = vec![0f32; n * n];
        for d in 0..n {
            for j in d + 1..n {
                matrix[d * n + j] = (u[d * n + j] / u[d * n + d] * s[channel(j)] / s[channel(d)]) as f32;
            }
        }
        let error_scale: Vec<f32> = (0..n).map(|d| (s[channel(d)] * u[d * n + d]) as f32).collect();
        if error_scale.iter().any(|&x| !(x.is_normal() && x > 0.0)) || matrix.iter().any(|x| !x.is_finite()) {
            return Err(Error::Config("query moment: its factors are beyond f32".into()));
        }
        Ok(Self { order, matrix, error_scale, loss_scale: mean as f32 })
    }

    /// No feedback: channels in their own order, F = 0, and a loss that is the plain squared error.
    #[must_use]
    pub fn none(head_dim: usize) -> Self {
        Self {
            order: (0..head_dim as u16).collect(),
            matrix: vec![0.0; head_dim * head_dim],
            error_scale: vec![1.0; head_dim],
            loss_scale: 1.0,
        }
    }
}

/// The feedback of one key/value head in both frames.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadFeedback {
    /// For K as it is.
    pub plain: Feedback,
    /// For `K H`.
    pub rotated: Feedback,
}

impl HeadFeedback {
    /// Factors S for both frames; the rotated one's is `H S H`.
    ///
    /// # Errors
    ///
    /// Those of [`Feedback::factor`].
    pub fn factor(moment_plain: &[f64], deviation_plain: &[f64], deviation_rotated: &[f64]) -> Result<Self> {
        let plain = Feedback::factor(moment_plain, deviation_plain)?;
        let mut moment = moment_plain.to_vec();
        rotate_moment(&mut moment, deviation_plain.len());
        Ok(Self { plain, rotated: Feedback::factor(&moment, deviation_rotated)? })
    }

    /// No feedback in either frame.
    #[must_use]
    pub fn none(head_dim: usize) -> Self {
        Self { plain: Feedback::none(head_dim), rotated: Feedback::none(head_dim) }
    }
}

/// R, upper triangular with `a = R R'`, in the place of the upper triangle of `a`: Cholesky from the last row up.
fn upper_root(a: &mut [f64], n: usize) -> Result<()> {
    for j in (0..n).rev() {
        let tail = |a: &[f64], i: usize| (j + 1..n).map(|k| a[i * n + k] * a[j * n + k]).sum::<f64>();
        let pivot = a[j * n + j] - tail(a, j);
        if pivot.is_nan() || pivot <= 0.0 {
            return Err(Error::Config(format!("query moment: not positive definite (pivot {pivot} at position {j})")));
        }
        let root = pivot.sqrt();
        a[j * n + j] = root;
        for i in 0..j {
            a[i * n + j] = (a[i * n + j] - tail(a, i)) / root;
        }
    }
    Ok(())
}

/// The inverse of the upper triangle of `r`, which is upper triangular too.
fn inverse_of_upper(r: &[f64], n: usize) -> Vec<f64> {
    let mut u = vec![0f64; n * n];
    for i in (0..n).rev() {
        u[i * n + i] = 1.0 / r[i * n + i];
        for k in i + 1..n {
            let factor = r[i * n + k] * u[i * n + i];
            for j in k..n {
                u[i * n + j] -= factor * u[k * n + j];
            }
        }
    }
    u
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `Q' Q + 0.3 I` of `rank` rows of integers over 1009.
    fn moment(n: usize, rank: usize) -> Vec<f64> {
        let q = |r: usize, d: usize| {
            let i = r * n + d;
            ((31 * i * i + 7 * i) % 1009) as f64 / 1009.0 * 2.0 - 1.0
        };
        let mut s = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..n {
                s[i * n + j] = (0..rank).map(|r| q(r, i) * q(r, j)).sum::<f64>() + if i == j { 0.3 } else { 0.0 };
            }
        }
        s
    }

    fn deviation(n: usize) -> Vec<f64> {
        (0..n).map(|d| 1.0 + (d % 5) as f64).collect()
    }

    #[test]
    fn the_root_of_the_inverse_inverts() {
        let n = 24;
        let a = moment(n, 6);
        let mut r = a.clone();
        upper_root(&mut r, n).expect("a positive definite matrix");
        let u = inverse_of_upper(&r, n);
        for i in 0..n {
            for j in 0..n {
                // (U' U) A = I
                let product: f64 = (0..n)
                    .map(|k| {
                        let inverse: f64 = (0..=i.min(k)).map(|l| u[l * n + i] * u[l * n + k]).sum();
                        inverse * a[k * n + j]
                    })
                    .sum();
                assert!((product - f64::from(u8::from(i == j))).abs() < 1e-10);
            }
        }
    }

    #[test]
    fn independent_queries_give_no_feedback() {
        let n = 32;
        let identity: Vec<f64> = (0..n * n).map(|i| f64::from(u8::from(i % (n + 1) == 0))).collect();
        let feedback = Feedback::factor(&identity, &deviation(n)).expect("factors");
        assert!(feedback.matrix.iter().all(|&f| f == 0.0));
        let mut sorted: Vec<u16> = (0..n as u16).collect();
        sorted.sort_by_key(|&d| core::cmp::Reverse(d % 5));
        assert_eq!(feedback.order, sorted, "the loud first, equals in their own order");
    }

    #[test]
    fn the_matrix_is_zero_on_and_below_its_diagonal() {
        let n = 48;
        let feedback = Feedback::factor(&moment(n, 12), &deviation(n)).expect("factors");
        for d in 0..n {
            assert!(feedback.matrix[d * n..][..=d].iter().all(|&f| f == 0.0));
            assert!(d + 1 == n || feedback.matrix[d * n + d + 1..][..n - d - 1].iter().any(|&f| f != 0.0));
        }
        assert!(feedback.error_scale.iter().all(|&x| x > 0.0));
    }

    #[test]
    fn a_silent_channel_is_floored_at_a_millionth() {
        let n = 16;
        let mut s = deviation(n);
        s[3] = 0.0;
        let floored = Feedback::factor(&moment(n, 4), &s).expect("factors");
        s[3] = 5e-6;
        assert_eq!(floored, Feedback::factor(&moment(n, 4), &s).expect("factors"));
    }

    #[test]
    fn nothing_seen_is_no_feedback() {
        let n = 16;
        let none = Feedback::none(n);
        assert_eq!(Feedback::factor(&vec![0.0; n * n], &deviation(n)), Ok(none.clone()));
        assert_eq!(Feedback::factor(&moment(n, 4), &vec![0.0; n]), Ok(none));
    }

    #[test]
    fn what_is_no_moment_is_refused() {
        let n = 16;
        let refused = |moment: &[f64], deviation: &[f64], expected: &str| {
            let error = Feedback::factor(moment, deviation).expect_err("no moment").to_string();
            assert!(error.contains(expected), "{error}");
        };
        let mut bad = moment(n, 4);
        bad[5] = f64::NAN;
        refused(&bad, &deviation(n), "NaN is not finite");
        let mut bad = deviation(n);
        bad[2] = f64::INFINITY;
        refused(&moment(n, 4), &bad, "inf is not finite");
        bad[2] = -1.0;
        refused(&moment(n, 4), &bad, "deviation is -1");
        refused(&moment(n, 4), &deviation(8), "256 values for 8 channels");
        let mut bad = moment(n, 4);
        (bad[1], bad[n]) = (50.0, 50.0);
        refused(&bad, &deviation(n), "not positive definite");
        let negative: Vec<f64> = moment(n, 4).iter().map(|x| -x).collect();
        refused(&negative, &deviation(n), "the mean of its scaled diagonal is -");
    }

    #[test]
    fn both_frames_are_factored_from_one_moment() {
        let n = 48;
        let (plain, rotated) = (deviation(n), vec![2.0; n]);
        let head = HeadFeedback::factor(&moment(n, 12), &plain, &rotated).expect("factors");
        let mut turned = moment(n, 12);
        rotate_moment(&mut turned, n);
        assert_eq!(head.plain, Feedback::factor(&moment(n, 12), &plain).expect("factors"));
        assert_eq!(head.rotated, Feedback::factor(&turned, &rotated).expect("factors"));
    }
}
