//! What can go wrong, in one type. Every message carries its numbers; an operation that returns an error has changed nothing.

/// The error of every fallible function of this crate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A cache format name that is not one of [`crate::format::Format::ALL`].
    #[error("unknown format {given:?}; known formats: {known}")]
    UnknownFormat {
        /// The name as given.
        given: String,
        /// The known names, comma separated.
        known: String,
    },
    /// A setting, or two settings together, that cannot work.
    #[error("{0}")]
    Config(String),
    /// A calibration that cannot be used: not one, damaged, of another version, or of another model.
    #[error("{0}")]
    Calibration(String),
    /// A cache file that cannot be used: not one, damaged, or of another version.
    #[error("{0}")]
    CacheFile(String),
    /// Something that is well formed but that this build or format does not do.
    #[error("{0}")]
    Unsupported(String),
    /// The pool has fewer free blocks than the operation needs.
    #[error("out of blocks: needed {needed}, free {free}")]
    OutOfBlocks {
        /// Blocks the operation would have taken.
        needed: usize,
        /// Blocks that were free (cached prefix blocks count as free).
        free: usize,
    },
    /// The pool has fewer free pages for open blocks than the operation needs.
    #[error("out of open pages: needed {needed}, free {free} (num_open_pages bounds them)")]
    OutOfOpenPages {
        /// Pages the operation would have taken.
        needed: usize,
        /// Pages that were free.
        free: usize,
    },
    /// A sequence id that was never given out, or was freed.
    #[error("unknown sequence {id}")]
    UnknownSequence {
        /// The id as given.
        id: u64,
    },
    /// The id of a block, or of a page, that the backend has no memory for.
    #[error("unknown block or page {id}: there is memory for {num_blocks}")]
    UnknownBlock {
        /// The id as given.
        id: u32,
        /// Blocks, or pages, that there is memory for.
        num_blocks: usize,
    },
    /// A truncation to a length that the sequence does not have, or whose tokens were released.
    #[error("cannot roll sequence {id} back to {requested} tokens: it holds tokens {floor}..{len}")]
    RollbackTooFar {
        /// The sequence.
        id: u64,
        /// The length asked for.
        requested: usize,
        /// The first token still held (earlier ones left the sliding window).
        floor: usize,
        /// The committed length.
        len: usize,
    },
    /// A truncation into a block that is sealed: its tokens cannot be written over one by one.
    #[error("cannot roll sequence {id} back to {requested} tokens: tokens {start}..{end} are sealed")]
    Sealed {
        /// The sequence.
        id: u64,
        /// The length asked for.
        requested: usize,
        /// First token of the sealed block.
        start: usize,
        /// One past its last token.
        end: usize,
    },
    /// A sequence that is part of an open step, where only a settled one will do.
    #[error("sequence {id} is part of an open step: commit or abort it first")]
    OpenStep {
        /// The sequence.
        id: u64,
    },
    /// A step that is not, or no longer, open: committed, aborted, of another cache, or its sequences have moved on.
    #[error("{0}")]
    StaleStep(String),
    /// A step that is committed, or a layer attended to, before its keys and values are there.
    #[error("the step is not complete: no keys and values yet for layers {missing:?}")]
    IncompleteStep {
        /// Layers without an append.
        missing: Vec<usize>,
    },
    /// A tensor whose shape is not the one the operation needs.
    #[error("{name}: expected shape {expected}, got {got:?}")]
    Shape {
        /// The tensor's name in the signature.
        name: &'static str,
        /// The shape it must have, in words.
        expected: String,
        /// Its shape.
        got: Vec<usize>,
    },
    /// A tensor whose element type is not accepted.
    #[error("{name}: expected dtype {expected}, got {got}")]
    Dtype {
        /// The tensor's name in the signature.
        name: &'static str,
        /// The accepted dtypes, in words.
        expected: String,
        /// Its dtype.
        got: String,
    },
    /// A tensor whose strides cannot be read without a copy.
    #[error("{name}: the last dimension must be contiguous (stride 1), got strides {strides:?}")]
    Stride {
        /// The tensor's name in the signature.
        name: &'static str,
        /// Its strides, in elements.
        strides: Vec<isize>,
    },
    /// Two tensors, or two elements of one, that share memory where one of them is written.
    #[error("{name}: its memory overlaps {other}")]
    Overlap {
        /// The tensor that is written.
        name: &'static str,
        /// What it overlaps, in words.
        other: String,
    },
    /// Memory that the machine does not give.
    #[error("out of memory: {bytes} bytes for {what}")]
    OutOfMemory {
        /// Bytes asked for, all together.
        bytes: usize,
        /// What they are for.
        what: &'static str,
    },
    /// A tensor on a device that this cache does not live on.
    #[error("{name}: expected a tensor on {expected}, got one on {got}")]
    Device {
        /// The tensor's name in the signature.
        name: &'static str,
        /// The cache's device.
        expected: String,
        /// The tensor's device.
        got: String,
    },
    /// A NaN or an infinity where keys and values are taken in.
    #[error("{name}: non-finite value {value} at token row {row}, head {head}, channel {channel}")]
    NonFinite {
        /// The tensor's name in the signature.
        name: &'static str,
        /// Row of the step (padding rows included).
        row: usize,
        /// Key/value head.
        head: usize,
        /// Channel.
        channel: usize,
        /// The value found.
        value: f32,
    },
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
