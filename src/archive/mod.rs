//! Files of tensors and metadata: written whole, and checked when they are read.
//!
//! A file is safetensors: the length of its header, the header (JSON), the bytes of its tensors one after the other. Its
//! metadata names the [`Kind`] and the version of that kind, and its last tensor is the `checksum` of all before it.
//! Everything else in it is its owner's.
//!
//! ```text
//! written   the same header and the same tensors make the same bytes; on disk whole or not at all, and tensors are
//!           passed on as they are made: what is saved is never held twice
//! read      tensors lie one after the other, fill the file, and have the bytes of their shape; every byte is summed, a
//!           piece at a time, before any is used; tensors are read where they are asked for, and memory is taken for
//!           what the file holds, never for what it says
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

/// Bytes of the length that a file starts with.
const LENGTH_BYTES: usize = size_of::<u64>();

/// A kind of file.
#[derive(Debug)]
pub struct Kind {
    /// What the metadata calls it.
    pub name: &'static str,
    /// Version of its tensors and of what they mean.
    pub version: u32,
    /// Makes the error of a file that cannot be read or written, of why.
    pub error: fn(String) -> Error,
}

/// Type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// One byte.
    U8,
    /// Two bytes, little-endian as all.
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

    /// Bytes of one.
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
