//! Calibration files on disk.

use super::Calibration;
use super::file::KIND;
use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{Error as IoError, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// The start of a file, in which its kind is named if it is one of ours: the weights of a model, say, are not read whole
/// to be refused.
const START_BYTES: u64 = 1 << 16;

impl Calibration {
    /// The calibration in a file. See [`Calibration::from_bytes`].
    ///
    /// # Errors
    /// [`Error::Calibration`], which names the file.
    pub fn load(path: &Path, fingerprint: Option<&str>) -> Result<Self> {
        let bytes = read(path)?;
        Self::from_bytes(&bytes, fingerprint).map_err(|error| named(path, &error.to_string()))
    }

    /// Writes the frozen layers to a file, whole or not at all. See [`Calibration::to_bytes`].
    ///
    /// # Errors
    /// [`Error::Config`]: no layer is frozen. [`Error::Calibration`]: the file cannot be written.
    pub fn save(&self, path: &Path, fingerprint: &str, model: &str) -> Result<()> {
        let bytes = self.to_bytes(fingerprint, model)?;
        write(path, &bytes).map_err(|error| named(path, &format!("cannot be written: {error}")))
    }
}

fn named(path: &Path, why: &str) -> Error {
    Error::Calibration(format!("{}: {why}", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let unreadable = |error: IoError| named(path, &format!("cannot be read: {error}"));
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(named(path, "not a file"));
    }
    let mut file = File::open(path).map_err(unreadable)?;
    let mut bytes = Vec::new();
    Read::by_ref(&mut file).take(START_BYTES).read_to_end(&mut bytes).map_err(unreadable)?;
    if !bytes.windows(KIND.len()).any(|window| window == KIND.as_bytes()) {
        return Err(named(path, &format!("not a file of kind {KIND:?}")));
    }
    file.read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(bytes)
}

/// Beside `path` first, then under its name: no reader ever sees half of it.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let Some(name) = path.file_name() else { return Err(IoError::other("not a file name")) };
    let unique = format!(".{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let mut beside = name.to_owned();
    beside.push(unique);
    let beside = path.with_file_name(beside);
    let written = File::create_new(&beside).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    });
    if written.is_err() {
        let _ = fs::remove_file(&beside); // of an error that is reported already
    }
    written
}
