//! The reader: checks a file's header and checksum at once, and reads each tensor on demand.

use super::{Element, Kind, LENGTH_BYTES, Source, checksum};
use crate::error::Result;
use safetensors::tensor::Metadata;
use std::fmt::Display;
use std::io::Error as IoError;

/// The largest header that safetensors allows.
const MAX_HEADER_BYTES: usize = 100_000_000;

/// A checked file of one kind: its tensors are contiguous and fill it, and its checksum is right.
pub struct Archive<'a> {
    kind: &'static Kind,
    header: Metadata,
    source: &'a dyn Source,
    /// Offset of the first tensor.
    data: u64,
}

impl<'a> Archive<'a> {
    /// Reads the header and verifies the checksum of the file.
    ///
    /// # Errors
    /// `kind.error` if the file is not safetensors, has another kind or version, or is damaged.
    pub fn read(source: &'a dyn Source, kind: &'static Kind) -> Result<Self> {
        let FileHeader { metadata, data, .. } = read_header(source, &[kind]).map_err(kind.error)?;
        let archive = Self { kind, header: metadata, source, data };
        let version = archive.number("version")?;
        if version != u64::from(kind.version) {
            let (name, supported) = (kind.name, kind.version);
            return archive.refuse(format!("a {name} of version {version}, this release reads version {supported}"));
        }
        archive.verify_checksum()?;
        Ok(archive)
    }

    fn verify_checksum(&self) -> Result<()> {
        let tensor = self.shaped(checksum::NAME, checksum::ELEMENT, &[checksum::BYTES])?;
        if tensor.start + tensor.bytes != self.header.data_len() {
            return self.refuse(format!("{} is not the last tensor", checksum::NAME));
        }
        let num_bytes = self.data + self.header.data_len() as u64;
        checksum::check(self.source, num_bytes).map_err(self.kind.error)
    }

    /// Fails with the error of the file's kind.
    ///
    /// # Errors
    /// `kind.error(why)`, always.
    pub fn refuse<T>(&self, why: String) -> Result<T> {
        Err((self.kind.error)(why))
    }

    /// The value of a metadata key, if present.
    #[must_use]
    pub fn find(&self, key: &str) -> Option<&str> {
        self.header.metadata().as_ref().and_then(|entries| entries.get(key)).map(String::as_str)
    }

    /// The value of a metadata key that must be present.
    pub fn entry(&self, key: &str) -> Result<&str> {
        self.find(key).map_or_else(|| self.refuse(format!("the metadata has no {key:?}")), Ok)
    }

    /// The value of a metadata key that must be present and a number.
    pub fn number(&self, key: &str) -> Result<u64> {
        let value = self.entry(key)?;
        value.parse().or_else(|_| self.refuse(format!("the metadata's {key} is {value:?}, not a number")))
    }

    /// The names of the tensors in file order, without the checksum.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.header.offset_keys().into_iter().filter(|name| name != checksum::NAME).collect()
    }

    /// A tensor, which must have this element type.
    pub fn tensor(&self, name: &str, element: Element) -> Result<Tensor<'_>> {
        let Some(info) = self.header.info(name) else {
            return self.refuse(format!("{name} is missing"));
        };
        let (dtype, expected) = (info.dtype.to_string(), element.name());
        if dtype != expected {
            return self.refuse(format!("{name}: expected dtype {expected}, got {dtype}"));
        }
        let (start, end) = info.data_offsets;
        Ok(Tensor { archive: self, name: name.to_owned(), shape: &info.shape, start, bytes: end - start })
    }

    /// A tensor, which must have this element type and shape.
    pub fn shaped(&self, name: &str, element: Element, expected: &[usize]) -> Result<Tensor<'_>> {
        let tensor = self.tensor(name, element)?;
        if tensor.shape != expected {
            return self.refuse(format!("{name}: expected shape {expected:?}, got {:?}", tensor.shape));
        }
        Ok(tensor)
    }
}

/// A tensor whose bytes lie within the file.
pub struct Tensor<'a> {
    archive: &'a Archive<'a>,
    name: String,
    shape: &'a [usize],
    start: usize,
    bytes: usize,
}

impl Tensor<'_> {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        self.shape
    }

    /// Fills `out` with the tensor's bytes from `offset` on.
    pub fn read_at(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        if offset.checked_add(out.len()).is_none_or(|end| end > self.bytes) {
            let (len, total) = (out.len(), self.bytes);
            return self.archive.refuse(format!("{}: {len} bytes from {offset} on, of {total}", self.name));
        }
        let unreadable = |error: IoError| (self.archive.kind.error)(format!("{}: cannot be read: {error}", self.name));
        self.archive.source.read_at(self.archive.data + (self.start + offset) as u64, out).map_err(unreadable)
    }

    /// The tensor's bytes.
    pub fn read(&self) -> Result<Vec<u8>> {
        let mut out = vec![0; self.bytes];
        self.read_at(0, &mut out)?;
        Ok(out)
    }
}

/// A parsed header, whose kind is one of those asked for.
pub(super) struct FileHeader {
    pub kind: &'static Kind,
    metadata: Metadata,
    /// Offset of the first tensor.
    data: u64,
}

/// Reads the header of a file of one of `kinds`.
///
/// # Errors
/// The reason: not a safetensors file, or of no or another kind.
pub(super) fn read_header(source: &dyn Source, kinds: &[&'static Kind]) -> std::result::Result<FileHeader, String> {
    let unreadable = |error: IoError| format!("cannot be read: {error}");
    let total = source.num_bytes().map_err(unreadable)?;
    let names = || kinds.iter().map(|kind| format!("{:?}", kind.name)).collect::<Vec<_>>().join(" or ");
    let other = |why: &dyn Display| format!("not a file of kind {}: {why}", names());
    let odd = |why: &dyn Display| other(&format_args!("not a safetensors file of {total} bytes: {why}"));
    let mut length = [0; LENGTH_BYTES];
    let Some(after) = total.checked_sub(LENGTH_BYTES as u64) else {
        return Err(odd(&"too short for the length of a header"));
    };
    source.read_at(0, &mut length).map_err(unreadable)?;
    let length = u64::from_le_bytes(length);
    if length > after || length > MAX_HEADER_BYTES as u64 {
        return Err(odd(&format_args!("a header of {length} bytes")));
    }
    let mut text = vec![0; length as usize];
    source.read_at(LENGTH_BYTES as u64, &mut text).map_err(unreadable)?;
    let metadata: Metadata = serde_json::from_slice(&text).map_err(|error| odd(&error))?;
    let (expected, found) = (metadata.data_len(), after - length);
    if expected as u64 != found {
        return Err(odd(&format_args!("tensors of {expected} bytes, {found} are there")));
    }
    let Some(name) = metadata.metadata().as_ref().and_then(|entries| entries.get("kind")) else {
        return Err(other(&"a safetensors file without a kind"));
    };
    let Some(kind) = kinds.iter().find(|kind| kind.name == name) else {
        return Err(other(&format_args!("its kind is {name:?}")));
    };
    Ok(FileHeader { kind, metadata, data: LENGTH_BYTES as u64 + length })
}
