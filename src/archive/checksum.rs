//! The checksum that ends a file.
//!
//! The last tensor of a file is the checksum of every byte before it: the length of the header, the header with its
//! padding, and the other tensors. It is the CRC-32 of zlib and PNG (polynomial 0x04C11DB7, reflected), which misses no
//! single bit and no run of up to 32 bits, and one in 2^32 of all other damage; most languages have it in their library.

use super::{Element, Source};
use std::io::{Error as IoError, Result as IoResult, Write};

/// The tensor's name. Bytes, so that it is aligned wherever the tensors before it end.
pub const NAME: &str = "checksum";
/// Its type.
pub const ELEMENT: Element = Element::U8;
/// Its bytes: the sum, little-endian.
pub const BYTES: usize = size_of::<u32>();

/// Bytes read at a time to compute the checksum: few enough to stay in the processor's cache.
const PIECE_BYTES: usize = 1 << 18;

/// A writer that forwards to another one and computes the checksum of what it forwards.
pub struct Summed<'a> {
    out: &'a mut dyn Write,
    sum: crc32fast::Hasher,
    /// Bytes written so far.
    pub bytes: usize,
}

impl<'a> Summed<'a> {
    /// A writer to `out` that has written nothing yet.
    pub fn new(out: &'a mut dyn Write) -> Self {
        Self { out, sum: crc32fast::Hasher::new(), bytes: 0 }
    }

    /// Writes the checksum of everything written so far.
    pub fn finish(self) -> IoResult<()> {
        self.out.write_all(&self.sum.finalize().to_le_bytes())
    }
}

impl Write for Summed<'_> {
    fn write(&mut self, bytes: &[u8]) -> IoResult<usize> {
        let count = self.out.write(bytes)?;
        self.sum.update(&bytes[..count]);
        self.bytes += count;
        Ok(count)
    }

    fn flush(&mut self) -> IoResult<()> {
        self.out.flush()
    }
}

/// Checks that a file of `num_bytes`, at least [`BYTES`], ends with the checksum of everything before it.
///
/// # Errors
/// The reason, with both checksums: the file cannot be read, or is damaged.
pub fn check(source: &dyn Source, num_bytes: u64) -> Result<(), String> {
    let unreadable = |error: IoError| format!("cannot be read: {error}");
    let end = num_bytes - BYTES as u64;
    let mut piece = vec![0; PIECE_BYTES];
    let mut sum = crc32fast::Hasher::new();
    let mut offset = 0;
    while offset < end {
        let piece = &mut piece[..(end - offset).min(PIECE_BYTES as u64) as usize];
        source.read_at(offset, piece).map_err(unreadable)?;
        sum.update(piece);
        offset += piece.len() as u64;
    }
    let mut stored = [0; BYTES];
    source.read_at(end, &mut stored).map_err(unreadable)?;
    let (stored, actual) = (u32::from_le_bytes(stored), sum.finalize());
    if stored == actual {
        return Ok(());
    }
    Err(format!("damaged: the checksum of its bytes is {actual:08x}, the one written with them {stored:08x}"))
}
