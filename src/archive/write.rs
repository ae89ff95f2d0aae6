//! The writer: the contents of a file, its header, and its bytes.
//!
//! The `safetensors` crate only reads headers here; when it writes one, the metadata come in the order of a hash map.

use super::checksum::{self, Summed};
use super::{Element, Kind};
use crate::error::{Error, Result};
use std::fmt::{Display, Write as _};
use std::io::{Error as IoError, Result as IoResult, Write};

/// The header is padded to a multiple of this many bytes. A tensor is then aligned to its element, if the tensors before
/// it are multiples of that element's size.
const HEADER_ALIGNMENT: usize = 8;

/// The contents of a file to write: metadata and tensors, in insertion order.
pub struct Contents<'a> {
    kind: &'static Kind,
    /// The entries as JSON, without braces.
    metadata: String,
    tensors: Vec<Tensor<'a>>,
}

type WriteBytes<'a> = dyn Fn(&mut dyn Write) -> IoResult<()> + 'a;

/// A tensor to write, and the function that writes its bytes.
struct Tensor<'a> {
    name: String,
    element: Element,
    shape: Vec<usize>,
    write: Box<WriteBytes<'a>>,
}

impl Tensor<'_> {
    fn num_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.element.bytes()
    }
}

impl<'a> Contents<'a> {
    /// The contents of an empty file of this kind.
    #[must_use]
    pub fn new(kind: &'static Kind) -> Self {
        let mut contents = Self { kind, metadata: String::new(), tensors: Vec::new() };
        contents.entry("kind", kind.name);
        contents.entry("version", kind.version);
        contents
    }

    pub(super) fn kind(&self) -> &'static Kind {
        self.kind
    }

    /// Adds a metadata entry. Keys must be distinct.
    pub fn entry(&mut self, key: &str, value: impl Display) {
        let comma = if self.metadata.is_empty() { "" } else { "," };
        // Writing to a `String` cannot fail.
        let _ = write!(self.metadata, "{comma}{}:{}", quoted(key), quoted(&value.to_string()));
    }

    /// Adds a tensor, whose bytes `write` writes. Names must be distinct.
    pub fn tensor(
        &mut self,
        name: String,
        element: Element,
        shape: &[usize],
        write: impl Fn(&mut dyn Write) -> IoResult<()> + 'a,
    ) {
        self.tensors.push(Tensor { name, element, shape: shape.to_vec(), write: Box::new(write) });
    }

    /// Writes the header's length, the header, the tensors and the checksum. Fails if the number of bytes written for a
    /// tensor does not match its shape.
    pub(super) fn write(&self, out: &mut dyn Write) -> IoResult<()> {
        let text = self.header();
        let mut summed = Summed::new(out);
        summed.write_all(&(text.len() as u64).to_le_bytes())?;
        summed.write_all(text.as_bytes())?;
        for tensor in &self.tensors {
            let start = summed.bytes;
            (tensor.write)(&mut summed)?;
            let (written, expected) = (summed.bytes - start, tensor.num_bytes());
            if written != expected {
                let Tensor { name, shape, .. } = tensor;
                return Err(IoError::other(format!("{name}: {written} bytes, its shape {shape:?} takes {expected}")));
            }
        }
        summed.finish()
    }

    fn data_bytes(&self) -> usize {
        self.tensors.iter().map(Tensor::num_bytes).sum()
    }

    fn header(&self) -> String {
        let mut text = format!("{{\"__metadata__\":{{{}}}", self.metadata);
        let mut end = 0;
        for tensor in &self.tensors {
            let start = end;
            end += tensor.num_bytes();
            text += &described(&tensor.name, tensor.element, &tensor.shape, [start, end]);
        }
        text += &described(checksum::NAME, checksum::ELEMENT, &[checksum::BYTES], [end, end + checksum::BYTES]);
        text.push('}');
        while !text.len().is_multiple_of(HEADER_ALIGNMENT) {
            text.push(' ');
        }
        text
    }
}

/// A tensor's entry in the header, with a leading comma. Its bytes are `start..end` of the data.
fn described(name: &str, element: Element, shape: &[usize], [start, end]: [usize; 2]) -> String {
    let (name, dtype) = (quoted(name), element.name());
    format!(",{name}:{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}")
}

/// Writes a file in memory.
///
/// # Errors
/// [`Error::OutOfMemory`]; `kind.error` for a tensor whose bytes cannot be written.
pub fn to_bytes(contents: &Contents<'_>) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let bytes = super::LENGTH_BYTES + contents.header().len() + contents.data_bytes() + checksum::BYTES;
    if out.try_reserve_exact(bytes).is_err() {
        return Err(Error::OutOfMemory { bytes, what: "a file in memory" });
    }
    match contents.write(&mut out) {
        Ok(()) => Ok(out),
        Err(error) => Err((contents.kind.error)(error.to_string())),
    }
}

/// A string as JSON.
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

#[cfg(test)]
mod tests {
    use super::{Contents, Element, Kind, quoted, to_bytes};
    use crate::error::Error;

    const KIND: Kind = Kind { name: "test", version: 1, error: Error::CacheFile };

    #[test]
    fn a_tensor_whose_bytes_do_not_match_its_shape_is_an_error() {
        for (len, expected) in [(6, None), (5, Some("x: 5 bytes, its shape [3] takes 6")), (7, Some("x: 7 bytes"))] {
            let mut contents = Contents::new(&KIND);
            contents.tensor("x".to_owned(), Element::U16, &[3], |out| out.write_all(&vec![0; len]));
            match (to_bytes(&contents), expected) {
                (Ok(_), None) => {}
                (Err(Error::CacheFile(why)), Some(expected)) => assert!(why.contains(expected), "{why}"),
                (other, _) => panic!("{len} bytes: {other:?}"),
            }
        }
    }

    #[test]
    fn a_quoted_string_is_json() {
        for text in ["", "plain", "a \"quote\" and a \\ and\nlines\t\u{1}", "日本語 é 🦀", "\u{7f}\u{2028}"] {
            assert_eq!(serde_json::from_str::<String>(&quoted(text)).expect("JSON"), text);
        }
    }
}
