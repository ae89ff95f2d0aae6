//! A calibration as a safetensors file. Written here and not by the crate that reads it: that one keeps the metadata in
//! the order of a hash, and the same calibration must make the same bytes.

use super::file::{Field, KIND, VERSION};
use super::{LayerCalibration, Origin};
use crate::format::FORMAT_VERSION;
use crate::quant::{ChannelStatistics, Feedback};
use std::fmt::Write;
use std::sync::Arc;

/// The header is padded to a multiple of this, so that every tensor lies on its element's alignment.
const HEADER_ALIGNMENT: usize = 8;

/// The file of `layers`, which are not empty and were frozen after at least `query_tokens` tokens each.
pub(super) fn to_bytes(
    layers: &[(usize, Arc<LayerCalibration>)],
    query_tokens: usize,
    fingerprint: &str,
    model: &str,
) -> Vec<u8> {
    let origin = Origin { fingerprint: fingerprint.to_owned(), model: model.to_owned() };
    let mut header = metadata(query_tokens, &origin);
    let mut data = Vec::new();
    for (layer, calibration) in layers {
        let shape = [calibration.heads.len(), calibration.heads.first().map_or(0, |head| head.channels.mean.len())];
        for field in Field::ALL {
            let start = data.len();
            put(&mut data, calibration, field);
            let (name, dtype, shape) = (field.tensor_name(*layer), field.dtype(), field.shape(shape));
            let end = data.len();
            // Writing to a `String` cannot fail.
            let _ = write!(
                header,
                ",\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}"
            );
        }
    }
    header.push('}');
    while !header.len().is_multiple_of(HEADER_ALIGNMENT) {
        header.push(' ');
    }
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.into_bytes());
    bytes.append(&mut data);
    bytes
}

/// The header up to its first tensor.
fn metadata(query_tokens: usize, origin: &Origin) -> String {
    let entries = [
        ("kind", KIND.to_owned()),
        ("version", VERSION.to_string()),
        ("format_version", FORMAT_VERSION.to_string()),
        ("fingerprint", origin.fingerprint.clone()),
        ("model", origin.model.clone()),
        ("query_tokens", query_tokens.to_string()),
    ];
    let entries: Vec<String> = entries.iter().map(|(key, value)| format!("\"{key}\":{}", quoted(value))).collect();
    format!("{{\"__metadata__\":{{{}}}", entries.join(","))
}

/// A JSON string.
fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            '\0'..='\x1f' => {
                let _ = write!(out, "\\u{:04x}", u32::from(c)); // as above
            }
            _ => out.push(c),
        }
    }
    out.push('"');
    out
}

fn put(data: &mut Vec<u8>, calibration: &LayerCalibration, field: Field) {
    let frames = calibration.heads.iter().flat_map(|head| [&head.feedback.plain, &head.feedback.rotated]);
    let channels = calibration.heads.iter().map(|head| &head.channels);
    match field {
        Field::Feedback => put_floats(data, frames.flat_map(|frame: &Feedback| &frame.matrix)),
        Field::Order => data.extend(frames.flat_map(|frame| &frame.order).flat_map(|p| p.to_le_bytes())),
        Field::ErrorScale => put_floats(data, frames.flat_map(|frame| &frame.error_scale)),
        Field::LossScale => put_floats(data, frames.map(|frame| &frame.loss_scale)),
        Field::KChannelMean => put_floats(data, channels.flat_map(|channels: &ChannelStatistics| &channels.mean)),
        Field::KChannelScale => put_floats(data, channels.flat_map(|channels| &channels.scale)),
    }
}

fn put_floats<'a>(data: &mut Vec<u8>, values: impl Iterator<Item = &'a f32>) {
    data.extend(values.flat_map(|value| value.to_le_bytes()));
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn a_quoted_string_is_json() {
        for text in ["", "plain", "a \"quote\" and a \\ and\nlines\t\u{1}", "日本語 é 🦀", "\u{7f}\u{2028}"] {
            assert_eq!(serde_json::from_str::<String>(&quoted(text)).expect("JSON"), text);
        }
    }
}
