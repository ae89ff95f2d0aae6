//! The calibration window: mean and deviation of each K channel over the tokens before a page.

use super::to_f16_clamped;

/// Smallest deviation, as a share of the page's largest.
pub const RELATIVE_FLOOR: f32 = 1e-6;
/// Smallest deviation: the smallest positive f16.
pub const ABSOLUTE_FLOOR: f32 = 6e-8;

/// `k_channel_mean` and `k_channel_scale` of a page, as stored (f16 values, widened), `[head_dim]` each.
#[derive(Debug, Clone, PartialEq)]
pub struct ChannelStatistics {
    /// Mean of each channel.
    pub mean: Vec<f32>,
    /// Deviation of each channel, never zero.
    pub scale: Vec<f32>,
}

impl ChannelStatistics {
    /// Mean 0 and scale 1: a page opened before anything is known.
    #[must_use]
    pub fn identity(head_dim: usize) -> Self {
        Self { mean: vec![0.0; head_dim], scale: vec![1.0; head_dim] }
    }

    /// Statistics of `rows`, `[num_rows, head_dim]` in order, at least two rows.
    ///
    /// The deviation (n - 1) is taken about the mean *as stored*: a nearly constant channel whose large mean f16 cannot
    /// hold would otherwise have a residual of thousands of deviations, and the token scale would follow it.
    #[must_use]
    pub fn of_rows(rows: &[f32], head_dim: usize) -> Self {
        let num_rows = rows.len() / head_dim;
        let mut sums = vec![0f64; head_dim];
        for row in rows.chunks_exact(head_dim) {
            for (sum, &x) in sums.iter_mut().zip(row) {
                *sum += f64::from(x);
            }
        }
        let mean: Vec<f32> = sums.iter().map(|sum| to_f16_clamped((sum / num_rows as f64) as f32).to_f32()).collect();
        sums.fill(0.0);
        for row in rows.chunks_exact(head_dim) {
            for ((sum, &x), &mean) in sums.iter_mut().zip(row).zip(&mean) {
                let deviation = f64::from(x - mean);
                *sum += deviation * deviation;
            }
        }
        let degrees = num_rows.saturating_sub(1).max(1) as f64;
        let deviations: Vec<f32> = sums.iter().map(|sum| (sum / degrees).sqrt() as f32).collect();
        let largest = deviations.iter().copied().fold(0.0, f32::max);
        let floor = (RELATIVE_FLOOR * largest).max(ABSOLUTE_FLOOR);
        let scale = deviations.iter().map(|&s| to_f16_clamped(s.max(floor)).to_f32()).collect();
        Self { mean, scale }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{decode_k, encode_k};
    use super::*;

    #[test]
    fn mean_and_deviation_of_two_channels() {
        let statistics = ChannelStatistics::of_rows(&[1.0, 10.0, 3.0, 10.0, 5.0, 13.0], 2);
        assert_eq!(statistics.mean, [3.0, 11.0]);
        assert_eq!(statistics.scale, [2.0, to_f16_clamped(3f32.sqrt()).to_f32()]);
    }

    #[test]
    fn a_silent_page_is_floored_at_the_smallest_f16() {
        let statistics = ChannelStatistics::of_rows(&[0.0; 64], 16);
        assert!(statistics.scale.iter().all(|&s| s > 0.0 && s < 1e-7));
    }

    #[test]
    fn a_constant_channel_with_a_large_mean_does_not_blind_the_others() {
        // 360.1 is not an f16: its neighbours are 0.25 apart.
        let rows: Vec<f32> = (0..64).flat_map(|t| [360.1, (t as f32 * 0.7).sin()]).collect();
        let statistics = ChannelStatistics::of_rows(&rows, 2);
        for row in rows.chunks_exact(2) {
            let (mut codes, mut back) = ([0i8; 2], [0f32; 2]);
            let scale = encode_k(row, &statistics, &mut codes);
            decode_k(&codes, scale, &statistics, &mut back);
            assert!((row[0] - back[0]).abs() < 0.01 && (row[1] - back[1]).abs() < 0.02, "{row:?} became {back:?}");
        }
    }
}
