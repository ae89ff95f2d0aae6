//! The writer: a header of metadata and tensors, and the bytes of a file.
//!
//! The `safetensors` crate only reads headers here; when it writes one, the metadata come in the order of a hash map.

use super::checksum::{self, Summed};
use super::{Element, Kind};
use crate::error::{Error, Result};
use std::fmt::{Display, Write as _};
use std::io::{Result as IoResult, Write};

/// The header is padded to a multiple of this many bytes. A tensor is then aligned to its element, if the tensors before
/// it are multiples of that element's size.
const HEADER_ALIGNMENT: usize = 8;

/// The header of a file: metadata and tensors, in insertion order.
#[derive(Debug)]
pub struct Header {
    /// The entries as JSON, without braces.
    metadata: String,
    tensors: String,
    data_bytes: usize,
}

impl Header {
    /// The header of an empty file of this kind.
    #[must_use]
    pub fn new(kind: &Kind) -> Self {
        let mut header = Self { metadata: String::new(), tensors: String::new(), data_bytes: 0 };
        header.entry("kind", kind.name);
        header.entry("version", kind.version);
        header
    }

    /// Adds a metadata entry. Keys must be distinct.
    pub fn entry(&mut self, key: &str, value: impl Display) {
        let comma = if self.metadata.is_empty() { "" } else { "," };
        // Writing to a `String` cannot fail.
        let _ = write!(self.metadata, "{comma}{}:{}", quoted(key), quoted(&value.to_string()));
    }

    /// Adds a tensor after those already added. Names must be distinct.
    pub fn tensor(&mut self, name: &str, element: Element, shape: &[usize]) {
        let start = self.data_bytes;
        self.data_bytes += shape.iter().product::<usize>() * element.bytes();
        self.tensors += &described(name, element, shape, [start, self.data_bytes]);
    }

    /// Writes the header's length, the header, the tensors' bytes (which `fill` writes in order) and the checksum.
    pub(super) fn write(&self, out: &mut dyn Write, fill: impl FnOnce(&mut dyn Write) -> IoResult<()>) -> IoResult<()> {
        let text = self.text();
        let mut summed = Summed::new(out);
        summed.write_all(&(text.len() as u64).to_le_bytes())?;
        summed.write_all(text.as_bytes())?;
        let start = summed.bytes;
        fill(&mut summed)?;
        debug_assert_eq!(summed.bytes - start, self.data_bytes, "the tensors' bytes are those of their shapes");
        summed.finish()
    }

    fn text(&self) -> String {
        let place = [self.data_bytes, self.data_bytes + checksum::BYTES];
        let last = described(checksum::NAME, checksum::ELEMENT, &[checksum::BYTES], place);
        let mut text = format!("{{\"__metadata__\":{{{}}}{}{last}}}", self.metadata, self.tensors);
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

/// A file in memory; `fill` writes the tensors' bytes in order.
///
/// # Errors
/// [`Error::OutOfMemory`].
pub fn to_bytes(header: &Header, fill: impl FnOnce(&mut dyn Write) -> IoResult<()>) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let bytes = super::LENGTH_BYTES + header.text().len() + header.data_bytes + checksum::BYTES;
    let refused = Error::OutOfMemory { bytes, what: "a file in memory" };
    if out.try_reserve_exact(bytes).is_err() {
        return Err(refused);
    }
    match header.write(&mut out, fill) {
        Ok(()) => Ok(out),
        Err(_) => Err(refused), // writing to a vector fails only for lack of memory
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
    use super::quoted;

    #[test]
    fn a_quoted_string_is_json() {
        for text in ["", "plain", "a \"quote\" and a \\ and\nlines\t\u{1}", "日本語 é 🦀", "\u{7f}\u{2028}"] {
            assert_eq!(serde_json::from_str::<String>(&quoted(text)).expect("JSON"), text);
        }
    }
}
