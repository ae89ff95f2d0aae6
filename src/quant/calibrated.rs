//! What a calibrated model knows of one key/value head: backends take it from here, and know nothing of calibrations.

use super::{ChannelStatistics, HeadFeedback};

/// What sealing and opening pages take from a model's calibration, of one key/value head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadCalibration {
    /// How errors of K are passed on, in both frames.
    pub feedback: HeadFeedback,
    /// The model's mean and deviation of each K channel, plain frame: page 0 opens with them.
    pub channels: ChannelStatistics,
}
