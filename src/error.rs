//! The error type of the crate. Messages include the numbers involved; an operation that returns an error has changed
//! nothing.

/// The error of every fallible function of this crate.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A cache format name that is not one of [`crate::format::Format::ALL`].
    #[error("unknown format {given:?}; known formats: {known}")]
    UnknownFormat {
        /// The name as given.
        given: String,
        /// The known names, comma-separated.
        known: String,
    },
    /// Arguments that do not fit each other, or the object that they are given to.
    #[error("{0}")]
    Config(String),
    /// A setting out of its range.
    #[error("{name} must be {expected}, got {got}")]
    InvalidSetting {
        /// The setting's name in the signature.
        name: &'static str,
        /// The valid values, as text.
        expected: String,
        /// The value given, as text.
        got: String,
    },
    /// A calibration file that cannot be written or used: not a calibration, damaged, or of another version or model.
    #[error("{0}")]
    Calibration(String),
    /// A cache file that cannot be written or used: not a cache, damaged, or of another version.
    #[error("{0}")]
    CacheFile(String),
    /// A well-formed request that this build, format or device does not support.
    #[error("{0}")]
    Unsupported(String),
    /// The pool has fewer free blocks than the operation needs.
    #[error("out of blocks: needed {needed}, free {free}")]
    OutOfBlocks {
        /// Blocks that the operation would have allocated.
        needed: usize,
        /// Blocks that were free, cached prefix blocks included.
        free: usize,
    },
    /// The pool has fewer free pages for open blocks than the operation needs.
    #[error("out of open pages: needed {needed}, free {free} (num_open_pages bounds them)")]
    OutOfOpenPages {
        /// Pages that the operation would have allocated.
        needed: usize,
        /// Pages that were free.
        free: usize,
    },
    /// A sequence id that was never allocated, or was freed.
    #[error("unknown sequence {id}")]
    UnknownSequence {
        /// The unknown id.
        id: u64,
    },
    /// A block or page id beyond the backend's memory.
    #[error("unknown block or page {id}: there is memory for {num_blocks}")]
    UnknownBlock {
        /// The id out of range.
        id: u32,
        /// Blocks, or pages, in the backend's memory.
        num_blocks: usize,
    },
    /// A truncation to more tokens than the sequence has, or to where the window has released tokens.
    #[error("cannot roll sequence {id} back to {requested} tokens: it holds tokens {floor}..{len}")]
    RollbackTooFar {
        /// The sequence.
        id: u64,
        /// The requested length.
        requested: usize,
        /// The first token not released by the sliding window.
        floor: usize,
        /// The committed length.
        len: usize,
    },
    /// A truncation into a sealed block, whose tokens cannot be overwritten one by one.
    #[error("cannot roll sequence {id} back to {requested} tokens: tokens {start}..{end} are sealed")]
    Sealed {
        /// The sequence.
        id: u64,
        /// The requested length.
        requested: usize,
        /// First token of the sealed block.
        start: usize,
        /// One past its last token.
        end: usize,
    },
    /// An operation on a sequence that is part of an open step.
    #[error("sequence {id} is part of an open step: commit or abort it first")]
    OpenStep {
        /// The sequence.
        id: u64,
    },
    /// A step that is not open: it was committed or aborted, belongs to another cache, or its sequences have changed since.
    #[error("{0}")]
    StaleStep(String),
    /// A step committed, or a layer attended to, before its keys and values were appended.
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
        /// The expected shape, as text.
        expected: String,
        /// The actual shape.
        got: Vec<usize>,
    },
    /// A tensor whose element type is not accepted.
    #[error("{name}: expected dtype {expected}, got {got}")]
    Dtype {
        /// The tensor's name in the signature.
        name: &'static str,
        /// The accepted dtypes, as text.
        expected: String,
        /// The actual dtype.
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
    /// A tensor to write to whose memory overlaps another tensor's, or whose elements overlap each other.
    #[error("{name}: its memory overlaps {other}")]
    Overlap {
        /// The tensor that is written.
        name: &'static str,
        /// What it overlaps, as text.
        other: String,
    },
    /// A failed allocation.
    #[error("out of memory: {bytes} bytes for {what}")]
    OutOfMemory {
        /// Bytes requested, in total.
        bytes: usize,
        /// Their purpose.
        what: &'static str,
    },
    /// A tensor on another device than the cache's.
    #[error("{name}: expected a tensor on {expected}, got one on {got}")]
    Device {
        /// The tensor's name in the signature.
        name: &'static str,
        /// The cache's device.
        expected: String,
        /// The tensor's device.
        got: String,
    },
    /// A call of a device's driver that failed, by itself or because work launched before it did.
    #[error("{call} failed: {reason}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// The driver's code and text.
        reason: String,
    },
    /// A NaN or infinity in appended keys or values.
    #[error("{name}: non-finite value {value} at token row {row}, head {head}, channel {channel}")]
    NonFinite {
        /// The tensor's name in the signature.
        name: &'static str,
        /// Row of the step, counting padding rows.
        row: usize,
        /// Key/value head.
        head: usize,
        /// Channel.
        channel: usize,
        /// The non-finite value.
        value: f32,
    },
}

impl Error {
    /// An [`InvalidSetting`](Self::InvalidSetting) of these.
    pub(crate) fn setting(name: &'static str, expected: impl Into<String>, got: &impl ToString) -> Self {
        Self::InvalidSetting { name, expected: expected.into(), got: got.to_string() }
    }
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;
