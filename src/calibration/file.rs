//! What is a calibration file, and what is not?
//!
//! safetensors with the metadata `kind` = [`KIND`], `version` = [`VERSION`], `format_version` (of the crate that wrote
//! it), `fingerprint`, `model`, `query_tokens`, and the tensors of [`Field`] for each layer. Frames are plain, rotated.
//! Everything is checked: what comes out is what [`super::Calibration`] could have made. Memory is taken for what the
//! file holds, never for what it says.

use super::layer::Layer;
use super::{FIRST_TOKENS, LayerCalibration, Origin, QUERY_TOKENS};
use crate::error::{Error, Result};
use crate::format::supports_head_dim;
use crate::quant::{ChannelStatistics, Feedback, HeadCalibration, HeadFeedback, to_f16_clamped};
use safetensors::SafeTensors;
use safetensors::tensor::Metadata;
use std::collections::BTreeSet;

/// What the metadata calls such a file.
pub(super) const KIND: &str = "kvarn calibration";

/// Version of the file: of its tensors and of what they mean.
pub(super) const VERSION: u32 = 1;

/// Bytes of the length that a safetensors file starts with.
const LENGTH_BYTES: usize = size_of::<u64>();

/// The tensors of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Field {
    Feedback,
    Order,
    ErrorScale,
    LossScale,
    KChannelMean,
    KChannelScale,
}

impl Field {
    pub(super) const ALL: [Self; 6] =
        [Self::Feedback, Self::Order, Self::ErrorScale, Self::LossScale, Self::KChannelMean, Self::KChannelScale];

    const fn name(self) -> &'static str {
        match self {
            Self::Feedback => "feedback",
            Self::Order => "order",
            Self::ErrorScale => "error_scale",
            Self::LossScale => "loss_scale",
            Self::KChannelMean => "k_channel_mean",
            Self::KChannelScale => "k_channel_scale",
        }
    }

    pub(super) fn tensor_name(self, layer: usize) -> String {
        format!("layers.{layer}.{}", self.name())
    }

    /// The layer and the field of a tensor's name.
    fn parse(tensor: &str) -> Option<(usize, Self)> {
        let layer: usize = tensor.split('.').nth(1)?.parse().ok()?;
        let field = Self::ALL.into_iter().find(|field| field.tensor_name(layer) == tensor)?;
        Some((layer, field))
    }

    /// Element type, as safetensors calls it.
    pub(super) const fn dtype(self) -> &'static str {
        if matches!(self, Self::Order) { "U16" } else { "F32" }
    }

    pub(super) fn shape(self, [heads, head_dim]: [usize; 2]) -> Vec<usize> {
        match self {
            Self::Feedback => vec![heads, 2, head_dim, head_dim],
            Self::Order | Self::ErrorScale => vec![heads, 2, head_dim],
            Self::LossScale => vec![heads, 2],
            Self::KChannelMean | Self::KChannelScale => vec![heads, head_dim],
        }
    }
}

fn refuse<T>(why: String) -> Result<T> {
    Err(Error::Calibration(why))
}

/// What a file says of its model, and its layers.
pub(super) fn from_bytes(bytes: &[u8], fingerprint: Option<&str>) -> Result<(Origin, Vec<(usize, Layer)>)> {
    let (header_bytes, header) = SafeTensors::read_metadata(bytes)
        .map_err(|error| Error::Calibration(format!("not a safetensors file of {} bytes: {error}", bytes.len())))?;
    let file = File { header, data: &bytes[LENGTH_BYTES + header_bytes..] };
    file.check_kind()?;
    let query_tokens = file.query_tokens()?;
    let origin = Origin { fingerprint: file.entry("fingerprint")?.to_owned(), model: file.entry("model")?.to_owned() };
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

/// A well-formed safetensors file: its tensors lie one after the other in `data`.
struct File<'a> {
    header: Metadata,
    data: &'a [u8],
}

impl File<'_> {
    fn entry(&self, key: &str) -> Result<&str> {
        let found = self.header.metadata().as_ref().and_then(|entries| entries.get(key));
        found.map_or_else(|| refuse(format!("the metadata has no {key:?}")), |value| Ok(value.as_str()))
    }

    fn check_kind(&self) -> Result<()> {
        match self.entry("kind") {
            Ok(KIND) => {}
            Ok(other) => return refuse(format!("a file of kind {other:?}, not {KIND:?}")),
            Err(_) => return refuse(format!("a safetensors file, but no {KIND:?}")),
        }
        let version = self.number("version")?;
        if version != VERSION as usize {
            return refuse(format!("a calibration of version {version}, this release reads version {VERSION}"));
        }
        self.number("format_version").map(drop) // for people: tiles of any version take the same feedback
    }

    fn number(&self, key: &str) -> Result<usize> {
        let value = self.entry(key)?;
        value.parse().or_else(|_| refuse(format!("the metadata's {key} is {value:?}, not a number")))
    }

    fn query_tokens(&self) -> Result<usize> {
        let query_tokens = self.number("query_tokens")?;
        if (FIRST_TOKENS..=QUERY_TOKENS).contains(&query_tokens) {
            return Ok(query_tokens);
        }
        refuse(format!("query_tokens is {query_tokens}, not one of {FIRST_TOKENS} to {QUERY_TOKENS}"))
    }

    fn layer_indices(&self) -> Result<BTreeSet<usize>> {
        let mut layers = BTreeSet::new();
        for name in self.header.offset_keys() {
            let Some((layer, _)) = Field::parse(&name) else {
                return refuse(format!("an unknown tensor {name:?}"));
            };
            layers.insert(layer);
        }
        if layers.is_empty() { refuse("it holds no layer".to_owned()) } else { Ok(layers) }
    }

    /// Shape and bytes of a tensor of the field's element type.
    fn tensor(&self, layer: usize, field: Field) -> Result<(&[usize], &[u8])> {
        let name = field.tensor_name(layer);
        let Some(info) = self.header.info(&name) else {
            return refuse(format!("{name} is missing"));
        };
        let (dtype, expected) = (info.dtype.to_string(), field.dtype());
        if dtype != expected {
            return refuse(format!("{name}: expected dtype {expected}, got {dtype}"));
        }
        Ok((&info.shape, &self.data[info.data_offsets.0..info.data_offsets.1]))
    }

    /// The bytes of a tensor of the shape that the layer's `[heads, head_dim]` asks for.
    fn bytes(&self, layer: usize, field: Field, shape: [usize; 2]) -> Result<&[u8]> {
        let (found, bytes) = self.tensor(layer, field)?;
        let expected = field.shape(shape);
        if found != expected {
            return refuse(format!("{}: expected shape {expected:?}, got {found:?}", field.tensor_name(layer)));
        }
        Ok(bytes)
    }

    /// The values of a float tensor, all of which are `good`, in words `what`.
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
        let (found, _) = self.tensor(layer, Field::Feedback)?;
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
        let means = floats(Field::KChannelMean, F16)?;
        let scales = floats(Field::KChannelScale, POSITIVE_F16)?;
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
            channels: ChannelStatistics {
                mean: means[head * head_dim..][..head_dim].to_vec(),
                scale: scales[head * head_dim..][..head_dim].to_vec(),
            },
        };
        let heads = (0..shape[0]).map(head).collect();
        Ok((layer, Layer::loaded(LayerCalibration { heads }, head_dim, query_tokens)))
    }
}

type Check = (&'static str, fn(f32) -> bool);
const FINITE: Check = ("finite", f32::is_finite);
const POSITIVE: Check = ("finite and positive", |x| x.is_finite() && x > 0.0);
const F16: Check = ("an f16", is_f16);
const POSITIVE_F16: Check = ("a positive f16", |x| is_f16(x) && x > 0.0);

fn is_f16(x: f32) -> bool {
    to_f16_clamped(x).to_f32() == x
}

/// Row d of a matrix passes the error of position d on to later positions only.
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
