//! Archive files on disk: opened by kind, and written atomically.

use super::read::read_header;
use super::{Contents, Kind};
use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{BufWriter, Error as IoError, Result as IoResult, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

impl Kind {
    /// The error of this kind, with the file's path before the reason.
    #[must_use]
    pub fn named(&self, path: &Path, why: &str) -> Error {
        (self.error)(format!("{}: {why}", path.display()))
    }
}

/// Opens a file for [`super::Archive::read`]. Its content is not checked yet.
///
/// # Errors
/// `kind.error`, naming the file: it cannot be read, or is not a file.
pub fn open(path: &Path, kind: &Kind) -> Result<File> {
    open_file(path).map_err(|why| kind.named(path, &why))
}

/// The kind, one of `kinds`, that a file's header names. Only the header is read.
///
/// # Errors
/// [`Error::Config`], naming the file: it cannot be read, or names none of them.
pub fn kind_of(path: &Path, kinds: &[&'static Kind]) -> Result<&'static Kind> {
    let found = open_file(path).and_then(|file| read_header(&file, kinds));
    found.map(|header| header.kind).map_err(|why| Error::Config(format!("{}: {why}", path.display())))
}

fn open_file(path: &Path) -> std::result::Result<File, String> {
    let unreadable = |error: IoError| format!("cannot be read: {error}");
    // Checked before opening: opening a pipe blocks until it has a writer.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err("not a file".to_owned());
    }
    File::open(path).map_err(unreadable)
}

/// Writes a file atomically.
///
/// # Errors
/// The error of the file's kind, naming the file: it cannot be written.
pub fn save(path: &Path, contents: &Contents<'_>) -> Result<()> {
    let write = |file: &File| {
        let mut out = BufWriter::new(file);
        contents.write(&mut out)?;
        out.flush()
    };
    replace(path, write).map_err(|error| contents.kind().named(path, &format!("cannot be written: {error}")))
}

/// Writes a temporary file beside `path` and renames it, so that no reader sees a partial file.
fn replace(path: &Path, write: impl FnOnce(&File) -> IoResult<()>) -> IoResult<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let Some(name) = path.file_name() else { return Err(IoError::other("not a file name")) };
    let unique = format!(".{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let mut beside = name.to_owned();
    beside.push(unique);
    let beside = path.with_file_name(beside);
    let file = File::create_new(&beside)?;
    let written = write(&file).and_then(|()| {
        file.sync_all()?;
        fs::rename(&beside, path)
    });
    if written.is_err() {
        let _ = fs::remove_file(&beside); // the first error is the one to report
    }
    written
}
