//! Archive files on disk: opened by kind, and written atomically.

use super::{Header, Kind};
use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{BufWriter, Error as IoError, Read, Result as IoResult, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes at the start of a file that are searched for its kind. A large file of another program, such as a model's
/// weights, is refused without being read further.
const START_BYTES: u64 = 1 << 16;

impl Kind {
    /// The error of this kind, with the file's path before the reason.
    #[must_use]
    pub fn named(&self, path: &Path, why: &str) -> Error {
        (self.error)(format!("{}: {why}", path.display()))
    }
}

/// Opens a file whose start names this kind. Nothing else is checked yet.
///
/// # Errors
/// `kind.error`, naming the file: it cannot be read, or does not name this kind.
pub fn open(path: &Path, kind: &Kind) -> Result<File> {
    let (file, start) = open_start(path).map_err(|why| kind.named(path, &why))?;
    if names(&start, kind) { Ok(file) } else { Err(kind.named(path, &format!("not a file of kind {:?}", kind.name))) }
}

/// The kind, one of `kinds`, that a file names.
///
/// # Errors
/// [`Error::Config`], naming the file: it cannot be read, or names none of them.
pub fn kind_of(path: &Path, kinds: &[&'static Kind]) -> Result<&'static Kind> {
    let refuse = |why: &str| Error::Config(format!("{}: {why}", path.display()));
    let (_, start) = open_start(path).map_err(|why| refuse(&why))?;
    // The first one named: the other kind may appear in the note of a cache file.
    let place = |kind: &Kind| start.windows(kind.name.len()).position(|window| window == kind.name.as_bytes());
    let found = kinds.iter().filter_map(|kind| Some((place(kind)?, *kind))).min_by_key(|(place, _)| *place);
    found.map(|(_, kind)| kind).ok_or_else(|| {
        let names: Vec<String> = kinds.iter().map(|kind| format!("{:?}", kind.name)).collect();
        refuse(&format!("not a file of kind {}", names.join(" or ")))
    })
}

fn names(start: &[u8], kind: &Kind) -> bool {
    start.windows(kind.name.len()).any(|window| window == kind.name.as_bytes())
}

fn open_start(path: &Path) -> std::result::Result<(File, Vec<u8>), String> {
    let unreadable = |error: IoError| format!("cannot be read: {error}");
    // Checked before opening: opening a pipe blocks until it has a writer.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err("not a file".to_owned());
    }
    let file = File::open(path).map_err(unreadable)?;
    let mut start = Vec::new();
    Read::by_ref(&mut &file).take(START_BYTES).read_to_end(&mut start).map_err(unreadable)?;
    Ok((file, start))
}

/// Writes a file atomically; `fill` writes the tensors' bytes in order.
///
/// # Errors
/// `kind.error`, naming the file: it cannot be written.
pub fn save(
    path: &Path,
    kind: &Kind,
    header: &Header,
    fill: impl FnOnce(&mut dyn Write) -> IoResult<()>,
) -> Result<()> {
    let write = |file: &File| {
        let mut out = BufWriter::new(file);
        header.write(&mut out, fill)?;
        out.flush()
    };
    replace(path, write).map_err(|error| kind.named(path, &format!("cannot be written: {error}")))
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
