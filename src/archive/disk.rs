//! Files on disk.

use super::{Header, Kind};
use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{BufWriter, Error as IoError, Read, Result as IoResult, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// The start of a file, in which its kind is named if it is one of ours: of the weights of a model, say, no more is read
/// to refuse them.
const START_BYTES: u64 = 1 << 16;

impl Kind {
    /// Its error, naming the file.
    #[must_use]
    pub fn named(&self, path: &Path, why: &str) -> Error {
        (self.error)(format!("{}: {why}", path.display()))
    }
}

/// Opens what may be a file of this kind.
///
/// # Errors
/// The kind's, naming the file: it cannot be read, or is surely none.
pub fn open(path: &Path, kind: &Kind) -> Result<File> {
    let (file, start) = open_start(path).map_err(|why| kind.named(path, &why))?;
    if names(&start, kind) { Ok(file) } else { Err(kind.named(path, &format!("not a file of kind {:?}", kind.name))) }
}

/// Which of `kinds` a file says it is of.
///
/// # Errors
/// [`Error::Config`], naming the file: it cannot be read, or is of none of them.
pub fn kind_of(path: &Path, kinds: &[&'static Kind]) -> Result<&'static Kind> {
    let refuse = |why: &str| Error::Config(format!("{}: {why}", path.display()));
    let (_, start) = open_start(path).map_err(|why| refuse(&why))?;
    // The one that is named first: what a cache is of may be named in its text.
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
    // Before it is opened: that of a pipe waits for a writer.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err("not a file".to_owned());
    }
    let file = File::open(path).map_err(unreadable)?;
    let mut start = Vec::new();
    Read::by_ref(&mut &file).take(START_BYTES).read_to_end(&mut start).map_err(unreadable)?;
    Ok((file, start))
}

/// Writes a file, whole or not at all; `fill` writes the tensors' bytes in order.
///
/// # Errors
/// The kind's, naming the file: it cannot be written.
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

/// Beside `path` first, then under its name: no reader ever sees half of it.
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
        let _ = fs::remove_file(&beside); // of an error that is reported already
    }
    written
}
