//! The calibration file: its metadata, its tensors, and the reader that validates both.
//!
//! A file is an [`Archive`] of kind [`KIND`] with the metadata `format_version` (of the crate that wrote it),
//! `fingerprint`, `model` and `query_tokens`, and the tensors of [`Field`] for each layer. Frames are ordered plain,
//! rotated. Values are checked beyond the checksum: the reader returns only what [`super::Calibration`] could have written.

use super::layer::Layer;
use super::{FIRST_TOKENS, Origin, QUERY_TOKENS};
use crate::archive::{Archive, Element, Kind, Source, Tensor};
use crate::error::{Error, Result};
use crate::format::supports_head_dim;
use crate::quant::{Feedback, HeadCalibration, HeadFeedback, LayerCalibration, ModelChannels};
use std::collections::BTreeSet;

/// The archive kind of calibration files.
pub const KIND: Kind = Kind { name: "kvarn calibration", version: 2, error: Error::Calibration };

/// The tensors of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    Feedback,
    Order,
    ErrorScale,
    LossScale,
    KChannelMean,
    KChannelDeviation,
    QueryRms,
}

impl Field {
    pub(super) const ALL: [Self; 7] = [
        Self::Feedback,
        Self::Order,
        Self::ErrorScale,
        Self::LossScale,
        Self::KChannelMean,
        Self::KChannelDeviation,
        Self::QueryRms,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Feedback => "feedback",
            Self::Order => "order",
            Self::ErrorScale => "error_scale",
            Self::LossScale => "loss_scale",
            Self::KChannelMean => "k_channel_mean",
            Self::KChannelDeviation => "k_channel_deviation",
            Self::QueryRms => "query_rms",
        }
    }

    pub(super) fn tensor_name(self, layer: usize) -> String {
        format!("layers.{layer}.{}", self.name())
    }

    /// Splits a tensor's name into layer and field.
    fn parse(tensor: &str) -> Option<(usize, Self)> {
        let layer: usize = tensor.split('.').nth(1)?.parse().ok()?;
        let field = Self::ALL.into_iter().find(|field| field.tensor_name(layer) == tensor)?;
        Some((layer, field))
    }

    pub(super) const fn element(self) -> Element {
        if matches!(self, Self::Order) { Element::U16 } else { Element::F32 }
    }

    pub(super) fn shape(self, [heads, head_dim]: [usize; 2]) -> Vec<usize> {
        match self {
            Self::Feedback => vec![heads, 2, head_dim, head_dim],
            Self::Order | Self::ErrorScale => vec![heads, 2, head_dim],
            Self::LossScale => vec![heads, 2],
            Self::KChannelMean | Self::KChannelDeviation | Self::QueryRms => vec![heads, head_dim],
        }
    }
}

fn refuse<T>(why: String) -> Result<T> {
    Err(Error::Calibration(why))
}

/// Reads a file: its model, and its layers by index.
pub(super) fn read(source: &dyn Source, fingerprint: Option<&str>) -> Result<(Origin, Vec<(usize, Layer)>)> {
    let file = File { archive: Archive::read(source, &KIND)? };
    file.archive.number("format_version")?; // informational: feedback is the same for tiles of every version
    let query_tokens = file.query_tokens()?;
    let entry = |key| file.archive.entry(key).map(str::to_owned);
    let origin = Origin { fingerprint: entry("fingerprint")?, model: entry("model")? };
    if let Some(expected) = fingerprint
        && expected != origin.fingerprint
    {
        return refuse(format!(
            "a calibration of another model: {:?} of fingerprint {:?}, this model's is {expected:?}",
            origin.model, origin.fingerprint
        ));
    }
    let layers: Result<Vec<_>> =
        file.layer_indices()?.into_iter().map(|layer| file.layer(layer, query_tokens)).collect();
    Ok((origin, layers?))
}

struct File<'a> {
    archive: Archive<'a>,
}

impl File<'_> {
    fn query_tokens(&self) -> Result<usize> {
        let query_tokens = usize::try_from(self.archive.number("query_tokens")?).unwrap_or(usize::MAX);
        if (FIRST_TOKENS..=QUERY_TOKENS).contains(&query_tokens) {
            return Ok(query_tokens);
        }
        refuse(format!("query_tokens is {query_tokens}, not one of {FIRST_TOKENS} to {QUERY_TOKENS}"))
    }

    fn layer_indices(&self) -> Result<BTreeSet<usize>> {
        let mut layers = BTreeSet::new();
        for name in self.archive.names() {
            let Some((layer, _)) = Field::parse(&name) else {
                return refuse(format!("an unknown tensor {name:?}"));
            };
            layers.insert(layer);
        }
        if layers.is_empty() { refuse("the file has no layers".to_owned()) } else { Ok(layers) }
    }

    fn tensor(&self, layer: usize, field: Field) -> Result<Tensor<'_>> {
        self.archive.tensor(&field.tensor_name(layer), field.element())
    }

    /// The bytes of a tensor, which must have the shape of its field for `[heads, head_dim]`.
    fn bytes(&self, layer: usize, field: Field, shape: [usize; 2]) -> Result<Vec<u8>> {
        self.archive.shaped(&field.tensor_name(layer), field.element(), &field.shape(shape))?.read()
    }

    /// The values of a float tensor, all of which must be `good`; `what` describes that in the error.
    fn floats(
        &self,
        layer: usize,
        field: Field,
        shape: [usize; 2],
        (what, good): (&str, fn(f32) -> bool),
    ) -> Result<Vec<f32>> {
        let read = |four: &[u8]| f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        let values: Vec<f32> = self.bytes(layer, field, shape)?.chunks_exact(4).map(read).collect();
        match values.iter().position(|&value| !good(value)) {
            None => Ok(values),
            Some(at) => refuse(format!("{}: element {at} is {}, not {what}", field.tensor_name(layer), values[at])),
        }
    }

    fn orders(&self, layer: usize, shape: [usize; 2]) -> Result<Vec<u16>> {
        let head_dim = shape[1];
        let bytes = self.bytes(layer, Field::Order, shape)?;
        let order: Vec<u16> = bytes.chunks_exact(2).map(|two| u16::from_le_bytes([two[0], two[1]])).collect();
        for (row, order) in order.chunks_exact(head_dim).enumerate() {
            let mut seen = vec![false; head_dim];
            for &channel in order {
                if seen.get(usize::from(channel)) != Some(&false) {
                    return refuse(format!(
                        "{}: head {}, {} frame: channel {channel} of {head_dim} a second time or out of range",
                        Field::Order.tensor_name(layer),
                        row / 2,
                        ["plain", "rotated"][row % 2],
                    ));
                }
                seen[usize::from(channel)] = true;
            }
        }
        Ok(order)
    }

    fn layer(&self, layer: usize, query_tokens: usize) -> Result<(usize, Layer)> {
        let tensor = self.tensor(layer, Field::Feedback)?;
        let found = tensor.shape();
        let shape = match *found {
            [heads, 2, rows, columns] if heads > 0 && rows == columns && supports_head_dim(rows) => [heads, rows],
            _ => {
                return refuse(format!(
                    "{}: shape {found:?} is not [heads, 2, head_dim, head_dim] with a head_dim that pages hold",
                    Field::Feedback.tensor_name(layer)
                ));
            }
        };
        let floats = |field, good| self.floats(layer, field, shape, good);
        let matrices = floats(Field::Feedback, FINITE)?;
        let orders = self.orders(layer, shape)?;
        let error_scales = floats(Field::ErrorScale, POSITIVE)?;
        let loss_scales = floats(Field::LossScale, POSITIVE)?;
        let means = floats(Field::KChannelMean, FINITE)?;
        let deviations = floats(Field::KChannelDeviation, POSITIVE)?;
        let query_rms = floats(Field::QueryRms, POSITIVE)?;
        let head_dim = shape[1];
        check_triangles(&Field::Feedback.tensor_name(layer), &matrices, head_dim)?;
        let frame = |row: usize| Feedback {
            order: orders[row * head_dim..][..head_dim].to_vec(),
            matrix: matrices[row * head_dim * head_dim..][..head_dim * head_dim].to_vec(),
            error_scale: error_scales[row * head_dim..][..head_dim].to_vec(),
            loss_scale: loss_scales[row],
        };
        let head = |head: usize| HeadCalibration {
            feedback: HeadFeedback { plain: frame(2 * head), rotated: frame(2 * head + 1) },
            channels: ModelChannels {
                mean: means[head * head_dim..][..head_dim].to_vec(),
                deviation: deviations[head * head_dim..][..head_dim].to_vec(),
                query_rms: query_rms[head * head_dim..][..head_dim].to_vec(),
            },
        };
        let heads = (0..shape[0]).map(head).collect();
        Ok((layer, Layer::loaded(LayerCalibration::new(heads), head_dim, query_tokens)))
    }
}

type Check = (&'static str, fn(f32) -> bool);
const FINITE: Check = ("finite", f32::is_finite);
const POSITIVE: Check = ("finite and positive", |x| x.is_finite() && x > 0.0);

/// Checks that matrices are strictly upper triangular: row d passes the error of position d to later positions only.
fn check_triangles(name: &str, matrices: &[f32], head_dim: usize) -> Result<()> {
    for (row, values) in matrices.chunks_exact(head_dim).enumerate() {
        let d = row % head_dim;
        if let Some(j) = values[..=d].iter().position(|&value| value != 0.0) {
            let value = values[j];
            return refuse(format!("{name}: not strictly upper triangular: {value} at row {d}, column {j}"));
        }
    }
    Ok(())
}
