//! Safetensors files with a kind, a version and a checksum: the container of cache and calibration files.
//!
//! A file is the length of its header, the header (JSON), and the bytes of its tensors one after the other. The metadata
//! names the [`Kind`] and its version; the last tensor, `checksum`, covers every byte before it. The other entries and
//! tensors are defined by whoever writes the kind.
//!
//! ```text
//! writing   is deterministic (same header and tensors, same bytes), atomic on disk, and streams: each tensor is written
//!           as it is produced, never buffered
//! reading   checks that the tensors are contiguous, fill the file and match their shapes, then verifies the checksum
//!           before any value is used; tensors are read on demand, and memory is allocated for bytes that are in the
//!           file, never for a size that its header claims
//! ```

mod checksum;
mod disk;
mod read;
mod source;
mod write;

pub use disk::{kind_of, open, save};
pub use read::{Archive, Tensor};
pub use source::Source;
pub use write::{Contents, to_bytes};

use crate::error::Error;

/// Bytes of the header's length, which a file starts with.
const LENGTH_BYTES: usize = size_of::<u64>();

/// A kind of file.
#[derive(Debug)]
pub struct Kind {
    /// Its name in the metadata.
    pub name: &'static str,
    /// Version of its tensors and their meaning.
    pub version: u32,
    /// Makes the error of a file that cannot be read or written, from the reason.
    pub error: fn(String) -> Error,
}

/// Type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// One byte.
    U8,
    /// Two bytes, little-endian like every element.
    U16,
    /// Four bytes.
    U32,
    /// Eight bytes.
    U64,
    /// IEEE binary32.
    F32,
}

impl Element {
    /// The name that safetensors uses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::U8 => "U8",
            Self::U16 => "U16",
            Self::U32 => "U32",
            Self::U64 => "U64",
            Self::F32 => "F32",
        }
    }

    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 => 2,
            Self::U32 | Self::F32 => 4,
            Self::U64 => 8,
        }
    }
}
