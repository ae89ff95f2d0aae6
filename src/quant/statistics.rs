//! The channel statistics of a page: what K is centred and scaled by before its tokens are rounded.
//!
//! They are taken over n rows of K (the 512 tokens before the page, or the page's own first rows), and over what is known
//! besides. In f64, for each channel d:
//!
//! ```text
//! with a calibration     its mean mu and deviation sigma count as w rows, 8 in the first page, 32 in later ones:
//!     mean      = f16((w mu + sum x) / (w + n))
//!     squares   = sum (x - mean)^2 + w (sigma^2 + (mu - mean)^2)
//! without                the mean square deviation of all channels counts as w = 4 / n rows:
//!     mean      = f16(sum x / n)
//!     squares   = sum (x - mean)^2 + w mean_d(sum (x - mean)^2 / (n - 1))        one row: mean_d(x^2)
//! deviation     = sqrt(squares / (w + n - 1)), at least 1e-6 of the largest channel's and 6e-8
//! scale         first page:   deviation
//!               later pages:  ~ (deviation^3 / q)^(1/4)     q = rms of the queries in d (calibration), else 1
//! ```
//!
//! In later pages `scale` is normalized so that the mean of `(deviation / scale)^2` over the channels is 1. A token's
//! steps are set by its largest channel in units of `scale`, and cost `sum (q scale)^2`: loud channels, and those where
//! the queries look, get finer steps than their deviation asks for. Not in the first page: it holds the first token,
//! which most of the attention looks at and whose K is far off the others' in just those channels. Exponents are
//! multiples of 1/4 because square roots are exact to the last bit everywhere. Measured in
//! `docs/design/20261128-page-statistics.md`.

use super::{ModelChannels, to_f16_clamped};

/// Smallest deviation, as a share of the page's largest.
pub const RELATIVE_FLOOR: f32 = 1e-6;
/// Smallest deviation and scale: the smallest positive f16.
pub const ABSOLUTE_FLOOR: f32 = 6e-8;
/// Rows that the model's statistics count as in the first page.
const MODEL_ROWS_FIRST_PAGE: f64 = 8.0;
/// Rows that they count as in later pages.
const MODEL_ROWS: f64 = 32.0;
/// Without a model, the deviation of all channels counts as this many rows over the number of rows.
const POOLED_ROWS: f64 = 4.0;

/// `k_channel_mean` and `k_channel_scale` of a page, as stored (f16 values, widened), `[head_dim]` each.
#[derive(Debug, Clone, PartialEq)]
pub struct ChannelStatistics {
    /// Mean of each channel.
    pub mean: Vec<f32>,
    /// Scale of each channel, never zero.
    pub scale: Vec<f32>,
}

impl ChannelStatistics {
    /// Statistics of `rows`, `[num_rows, head_dim]` in order and at least one, and of what the model's calibration says.
    /// `is_first_page`: of the page that holds its sequence's first token.
    ///
    /// Deviations (n - 1) are taken about the mean *as stored*: a nearly constant channel whose large mean f16 cannot
    /// hold would otherwise have a residual of thousands of deviations, and the token scale would follow it.
    #[must_use]
    pub fn of_rows(rows: &[f32], head_dim: usize, model: Option<&ModelChannels>, is_first_page: bool) -> Self {
        let model_rows = if is_first_page { MODEL_ROWS_FIRST_PAGE } else { MODEL_ROWS };
        let num_rows = (rows.len() / head_dim) as f64;
        let mut mean = vec![0f64; head_dim];
        for row in rows.chunks_exact(head_dim) {
            mean.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
        }
        for (d, mean) in mean.iter_mut().enumerate() {
            let known = model.map_or((0.0, 0.0), |model| (model_rows, f64::from(model.mean[d])));
            *mean = stored((known.0 * known.1 + *mean) / (known.0 + num_rows));
        }
        let mut squares = vec![0f64; head_dim];
        for row in rows.chunks_exact(head_dim) {
            for ((squares, &x), mean) in squares.iter_mut().zip(row).zip(&mean) {
                *squares += (f64::from(x) - mean) * (f64::from(x) - mean);
            }
        }
        let weight = if let Some(model) = model {
            for (d, squares) in squares.iter_mut().enumerate() {
                let (deviation, by) = (f64::from(model.deviation[d]), f64::from(model.mean[d]) - mean[d]);
                *squares += model_rows * (deviation * deviation + by * by);
            }
            model_rows
        } else {
            let weight = POOLED_ROWS / num_rows;
            let pooled = if num_rows > 1.0 {
                squares.iter().sum::<f64>() / ((num_rows - 1.0) * head_dim as f64)
            } else {
                rows.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / head_dim as f64
            };
            squares.iter_mut().for_each(|squares| *squares += weight * pooled);
            weight
        };
        let deviations = squares.iter().map(|squares| (squares / (weight + num_rows - 1.0)).sqrt());
        let deviations = floored(deviations.collect());
        let scale =
            if is_first_page { deviations } else { finer(&deviations, model.map(|model| &model.query_rms[..])) };
        let stored = |&scale: &f64| to_f16_clamped((scale as f32).max(ABSOLUTE_FLOOR)).to_f32();
        Self { mean: mean.iter().map(|&mean| mean as f32).collect(), scale: scale.iter().map(stored).collect() }
    }
}

fn stored(mean: f64) -> f64 {
    to_f16_clamped(mean as f32).to_f64()
}

/// No deviation is below the floors.
fn floored(mut deviations: Vec<f64>) -> Vec<f64> {
    let largest = deviations.iter().copied().fold(0.0, f64::max);
    let floor = (f64::from(RELATIVE_FLOOR) * largest).max(f64::from(ABSOLUTE_FLOOR));
    deviations.iter_mut().for_each(|deviation| *deviation = deviation.max(floor));
    deviations
}

/// `(deviation^3 / q)^(1/4)`, normalized.
fn finer(deviations: &[f64], query_rms: Option<&[f32]>) -> Vec<f64> {
    let head_dim = deviations.len() as f64;
    let raw: Vec<f64> = deviations
        .iter()
        .enumerate()
        .map(|(d, deviation)| {
            let cubed = deviation * deviation * deviation;
            let q = query_rms.map_or(1.0, |query_rms| f64::from(query_rms[d]));
            (cubed / q).sqrt().sqrt()
        })
        .collect();
    let ratios = deviations.iter().zip(&raw).map(|(deviation, scale)| (deviation / scale) * (deviation / scale));
    let factor = (ratios.sum::<f64>() / head_dim).sqrt();
    raw.iter().map(|scale| scale * factor).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{decode_k, encode_k};
    use super::*;

    /// The stored f16 of a scale is within 2^-11 of it, and 4 / 512 rows of a pooled deviation add a thousandth.
    const CLOSE: f32 = 2.0 / 1024.0;

    fn assert_close(actual: &[f32], expected: &[f32]) {
        for (x, y) in actual.iter().zip(expected) {
            assert!((x - y).abs() <= CLOSE * y.abs(), "{actual:?}, expected {expected:?}");
        }
    }

    fn largest_error(rows: &[f32], statistics: &ChannelStatistics, channels: std::ops::Range<usize>) -> f32 {
        let head_dim = statistics.mean.len();
        let (mut codes, mut back) = (vec![0i8; head_dim], vec![0f32; head_dim]);
        let mut largest = 0f32;
        for row in rows.chunks_exact(head_dim) {
            let scale = encode_k(row, statistics, &mut codes);
            decode_k(&codes, scale, statistics, &mut back);
            largest = channels.clone().map(|d| (row[d] - back[d]).abs()).fold(largest, f32::max);
        }
        largest
    }

    #[test]
    fn a_page_weighs_loud_channels_and_the_first_page_does_not() {
        // Deviations 1 and 16: to the power of 3/4, 1 and 8; times sqrt((1 + 16^2 / 8^2) / 2).
        let rows: Vec<f32> = (0..512).flat_map(|t| [[1.0, 10.0], [3.0, 42.0]][t % 2]).collect();
        let statistics = ChannelStatistics::of_rows(&rows, 2, None, false);
        assert_eq!(statistics.mean, [2.0, 26.0]);
        let by_n_less_1 = (512f32 / 511.0).sqrt();
        let factor = 2.5f32.sqrt() * by_n_less_1;
        assert_close(&statistics.scale, &[factor, 8.0 * factor]);
        let first = ChannelStatistics::of_rows(&rows, 2, None, true);
        assert_close(&first.scale, &[by_n_less_1, 16.0 * by_n_less_1]);
    }

    #[test]
    fn one_row_scales_every_channel_alike() {
        let statistics = ChannelStatistics::of_rows(&[3.0, -300.0, 0.0, 1.0], 4, None, true);
        assert_eq!(statistics.mean, [3.0, -300.0, 0.0, 1.0]);
        assert_close(&statistics.scale, &[150.0; 4].map(|x: f32| (x * x + 2.5).sqrt()));
    }

    #[test]
    fn few_rows_lean_on_the_deviation_of_all_channels() {
        let rows = [1.0, 0.0, 1.0, 4.0]; // the first channel is the same twice, by chance or not
        let statistics = ChannelStatistics::of_rows(&rows, 2, None, true);
        assert_eq!(statistics.mean, [1.0, 2.0]);
        // squares 0 and 8, and twice their mean 4
        assert_close(&statistics.scale, &[(8f32 / 3.0).sqrt(), (16f32 / 3.0).sqrt()]);
    }

    #[test]
    fn the_model_counts_as_rows_and_its_queries_make_finer_steps() {
        let model = ModelChannels { mean: vec![8.0; 2], deviation: vec![2.0; 2], query_rms: vec![16.0, 1.0] };
        let rows = [0.0; 64]; // 32 rows
        let statistics = ChannelStatistics::of_rows(&rows, 2, Some(&model), false);
        assert_eq!(statistics.mean, [4.0; 2]);
        // squares 32 * 16 + 32 * (4 + 16), over 63; scales 1 : 2, whose ratios' mean square is 1
        let deviation = (1152f32 / 63.0).sqrt();
        assert_close(&statistics.scale, &[deviation * 0.625f32.sqrt(), deviation * 2.5f32.sqrt()]);
        let first = ChannelStatistics::of_rows(&rows[..16], 2, Some(&model), true);
        assert_eq!(first.mean, [4.0; 2]);
        assert_close(&first.scale, &[(288f32 / 15.0).sqrt(); 2]);
    }

    #[test]
    fn a_silent_page_is_floored_at_the_smallest_f16() {
        for (rows, is_first_page) in [(&[0.0; 16][..], true), (&[0.0; 64], false)] {
            let statistics = ChannelStatistics::of_rows(rows, 16, None, is_first_page);
            assert!(statistics.scale.iter().all(|&s| s > 0.0 && s < 1e-7), "{statistics:?}");
        }
    }

    #[test]
    fn a_constant_channel_with_a_large_mean_does_not_blind_the_others() {
        // 360.1 is not an f16: its neighbours are 0.25 apart.
        let rows: Vec<f32> = (0..64).flat_map(|t| [360.1, (t as f32 * 0.7).sin()]).collect();
        for (num_rows, is_first_page) in [(2, true), (5, true), (31, true), (64, true), (64, false)] {
            let statistics = ChannelStatistics::of_rows(&rows[..2 * num_rows], 2, None, is_first_page);
            assert!(largest_error(&rows, &statistics, 0..1) < 0.02, "{num_rows}");
            assert!(largest_error(&rows, &statistics, 1..2) < 0.02, "{num_rows}");
        }
    }
}
