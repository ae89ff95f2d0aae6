//! What a calibrated model knows of a layer's key/value heads: backends take it from here, and know nothing of
//! calibrations.

use super::{Feedback, HeadFeedback};

/// The calibration of one layer, as sealing and opening pages use it. It does not change: a backend that keeps a copy in
/// a device's memory may know it by the address of its `Arc`.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerCalibration {
    heads: Vec<HeadCalibration>,
}

impl LayerCalibration {
    /// The calibration of these key/value heads.
    ///
    /// # Panics
    /// When there is none, or one is not wholly of the `head_dim` of the first.
    #[must_use]
    pub fn new(heads: Vec<HeadCalibration>) -> Self {
        let calibration = Self { heads };
        let head_dim = calibration.head_dim();
        assert!(calibration.heads.iter().all(|head| head.fits(head_dim)), "a head that is not of {head_dim} channels");
        calibration
    }

    /// One entry for each key/value head, in order; at least one.
    #[must_use]
    pub fn heads(&self) -> &[HeadCalibration] {
        &self.heads
    }

    /// Channels of each head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.heads[0].channels.mean.len()
    }

    /// Heads whose loss scale is smaller in the rotated frame.
    #[must_use]
    pub fn rotated_heads(&self) -> usize {
        self.heads.iter().filter(|head| head.feedback.rotated.loss_scale < head.feedback.plain.loss_scale).count()
    }
}

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
    fn fits(&self, head_dim: usize) -> bool {
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
