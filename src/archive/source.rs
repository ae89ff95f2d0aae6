//! Random access to the bytes of a file, in memory or on disk.

use std::fs::File;
use std::io::{Error as IoError, Read, Result as IoResult, Seek, SeekFrom};

/// Bytes that can be read at any offset.
pub trait Source {
    /// Length in bytes.
    fn num_bytes(&self) -> IoResult<u64>;

    /// Fills `out` from `offset` on; an error if the source ends before that.
    fn read_at(&self, offset: u64, out: &mut [u8]) -> IoResult<()>;
}

impl Source for &[u8] {
    fn num_bytes(&self) -> IoResult<u64> {
        Ok(self.len() as u64)
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> IoResult<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let found = self.get(start..).and_then(|rest| rest.get(..out.len()));
        out.copy_from_slice(found.ok_or_else(|| IoError::other("it ends before that"))?);
        Ok(())
    }
}

/// Seeks, so a file serves one reader at a time.
impl Source for File {
    fn num_bytes(&self) -> IoResult<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> IoResult<()> {
        let mut file = self;
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(out)
    }
}
