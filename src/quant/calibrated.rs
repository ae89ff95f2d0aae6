//! What a calibrated model knows of one key/value head: backends take it from here, and know nothing of calibrations.

use super::{Feedback, HeadFeedback};

/// What sealing and opening pages take from a model's calibration, of one key/value head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadCalibration {
    /// How errors of K are passed on, in both frames.
    pub feedback: HeadFeedback,
    /// What pages are opened with, plain frame.
    pub channels: ModelChannels,
}

/// What the model's first tokens say of each channel of a head, `[head_dim]` each.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelChannels {
    /// Mean of K.
    pub mean: Vec<f32>,
    /// Standard deviation of K, never zero.
    pub deviation: Vec<f32>,
    /// Root of the queries' mean square, that of all channels added with the weight of [`super::feedback::DAMPING`]
    /// and so never zero.
    pub query_rms: Vec<f32>,
}

impl HeadCalibration {
    /// Is everything of a head of so many channels?
    #[must_use]
    pub fn fits(&self, head_dim: usize) -> bool {
        let frame = |frame: &Feedback| {
            let mut order = frame.order.clone();
            order.sort_unstable();
            order.iter().map(|&channel| usize::from(channel)).eq(0..head_dim)
                && frame.matrix.len() == head_dim * head_dim
                && frame.error_scale.len() == head_dim
        };
        let ModelChannels { mean, deviation, query_rms } = &self.channels;
        let channels = [mean, deviation, query_rms].map(Vec::len);
        channels == [head_dim; 3] && frame(&self.feedback.plain) && frame(&self.feedback.rotated)
    }
}
