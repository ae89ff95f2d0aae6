//! The contents of a calibration file.

use super::file::{Field, KIND};
use crate::archive::Contents;
use crate::format::FORMAT_VERSION;
use crate::quant::{Feedback, LayerCalibration, ModelChannels};
use std::io::Write;
use std::sync::Arc;

/// Layers by their index in the model, ascending.
pub(super) type Layers = [(usize, Arc<LayerCalibration>)];

/// The contents of a file of `layers`, at least one, each frozen after at least `query_tokens` tokens.
pub(super) fn contents<'a>(layers: &'a Layers, query_tokens: usize, fingerprint: &str, model: &str) -> Contents<'a> {
    let mut contents = Contents::new(&KIND);
    contents.entry("format_version", FORMAT_VERSION);
    contents.entry("fingerprint", fingerprint);
    contents.entry("model", model);
    contents.entry("query_tokens", query_tokens);
    for (layer, calibration) in layers {
        let shape = [calibration.heads().len(), calibration.head_dim()];
        for field in Field::ALL {
            let write = move |out: &mut dyn Write| out.write_all(&field_bytes(calibration, field));
            contents.tensor(field.tensor_name(*layer), field.element(), &field.shape(shape), write);
        }
    }
    contents
}

fn field_bytes(calibration: &LayerCalibration, field: Field) -> Vec<u8> {
    let frames = calibration.heads().iter().flat_map(|head| [&head.feedback.plain, &head.feedback.rotated]);
    let channels = calibration.heads().iter().map(|head| &head.channels);
    match field {
        Field::Feedback => floats(frames.flat_map(|frame: &Feedback| &frame.matrix)),
        Field::Order => frames.flat_map(|frame| &frame.order).flat_map(|p| p.to_le_bytes()).collect(),
        Field::ErrorScale => floats(frames.flat_map(|frame| &frame.error_scale)),
        Field::LossScale => floats(frames.map(|frame| &frame.loss_scale)),
        Field::KChannelMean => floats(channels.flat_map(|channels: &ModelChannels| &channels.mean)),
        Field::KChannelDeviation => floats(channels.flat_map(|channels| &channels.deviation)),
        Field::QueryRms => floats(channels.flat_map(|channels| &channels.query_rms)),
    }
}

fn floats<'a>(values: impl Iterator<Item = &'a f32>) -> Vec<u8> {
    values.flat_map(|value| value.to_le_bytes()).collect()
}
