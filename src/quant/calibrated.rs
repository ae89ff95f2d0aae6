//! What a calibrated model knows of one key/value head: backends take it from here, and know nothing of calibrations.

use super::{ChannelStatistics, Feedback, HeadFeedback};

/// What sealing and opening pages take from a model's calibration, of one key/value head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadCalibration {
    /// How errors of K are passed on, in both frames.
    pub feedback: HeadFeedback,
    /// The model's mean and deviation of each K channel, plain frame: page 0 opens with them.
    pub channels: ChannelStatistics,
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
        let channels = [self.channels.mean.len(), self.channels.scale.len()];
        channels == [head_dim; 2] && frame(&self.feedback.plain) && frame(&self.feedback.rotated)
    }
}
