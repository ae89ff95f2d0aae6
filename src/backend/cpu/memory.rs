//! The memory of the records: slabs of its own, zeroed and cache-line aligned, that never move; or what a caller lends.

use crate::backend::memory::Records;
use crate::error::{Error, Result};
use std::alloc::{Layout, alloc_zeroed, dealloc};

const ALIGNMENT: usize = 64;
/// Slabs are about this large: few allocations, and little held by a short sequence.
const SLAB_BYTES: usize = 1 << 20;

/// One layer's pages, or its tiles, by number: a record for each key/value head.
#[derive(Debug)]
pub struct Memory {
    source: Source,
    num_kv_heads: usize,
    record_bytes: usize,
}

#[derive(Debug)]
enum Source {
    /// The records of a number lie in a row, head by head.
    Owned {
        slabs: Vec<Slab>,
        per_slab: usize,
    },
    Lent(Records),
}

impl Memory {
    /// Memory of its own, without room for any record.
    pub fn new(num_kv_heads: usize, record_bytes: usize) -> Self {
        let per_slab = (SLAB_BYTES / (num_kv_heads * record_bytes)).max(1);
        Self { source: Source::Owned { slabs: Vec::new(), per_slab }, num_kv_heads, record_bytes }
    }

    /// A caller's memory.
    ///
    /// # Safety
    /// The records are memory that lives as long as this, nobody else reads or writes it meanwhile but between two calls
    /// of the backend, and [`crate::backend::memory::check`] has accepted them.
    pub unsafe fn lent(records: Records, num_kv_heads: usize, record_bytes: usize) -> Self {
        Self { source: Source::Lent(records), num_kv_heads, record_bytes }
    }

    /// Bytes of memory of its own.
    pub fn bytes(&self) -> usize {
        match &self.source {
            Source::Owned { slabs, .. } => slabs.iter().map(|slab| slab.bytes).sum(),
            Source::Lent(_) => 0,
        }
    }

    /// Numbers below this have records.
    pub fn num(&self) -> usize {
        match &self.source {
            Source::Owned { slabs, per_slab } => slabs.len() * per_slab,
            Source::Lent(records) => records.num,
        }
    }

    fn missing_slabs(&self, num: usize) -> usize {
        match &self.source {
            Source::Owned { per_slab, .. } => num.saturating_sub(self.num()).div_ceil(*per_slab),
            Source::Lent(_) => 0,
        }
    }

    fn slab_bytes(&self) -> usize {
        match &self.source {
            Source::Owned { per_slab, .. } => per_slab * self.num_kv_heads * self.record_bytes,
            Source::Lent(_) => 0,
        }
    }

    /// Bytes that [`Self::grow`] would allocate.
    pub fn missing_bytes(&self, num: usize) -> usize {
        self.missing_slabs(num).saturating_mul(self.slab_bytes())
    }

    /// Makes room for the numbers below `num`, or changes nothing.
    pub fn grow(&mut self, num: usize) -> Result<()> {
        let (missing, slab_bytes) = (self.missing_slabs(num), self.slab_bytes());
        let refused = Error::OutOfMemory { bytes: self.missing_bytes(num), what: "pages" };
        match &mut self.source {
            Source::Lent(records) if num > records.num => {
                let why = format!("records for {num} pages or blocks in lent memory of {}", records.num);
                Err(Error::Unsupported(why))
            }
            Source::Lent(_) => Ok(()),
            Source::Owned { .. } if missing == 0 => Ok(()),
            Source::Owned { slabs, .. } => {
                let mut new = Vec::new();
                if new.try_reserve(missing).is_err() || slabs.try_reserve(missing).is_err() {
                    return Err(refused);
                }
                for _ in 0..missing {
                    new.push(Slab::zeroed(slab_bytes).ok_or_else(|| refused.clone())?);
                }
                slabs.append(&mut new);
                Ok(())
            }
        }
    }

    /// A copy in memory of its own.
    pub fn try_clone(&self) -> Result<Self> {
        let mut copy = Self::new(self.num_kv_heads, self.record_bytes);
        copy.grow(self.num())?;
        match (&self.source, &copy.source) {
            (Source::Owned { slabs, .. }, Source::Owned { slabs: to, .. }) => {
                for (from, to) in slabs.iter().zip(to) {
                    // SAFETY: two allocations of the same size, one of them ours alone.
                    unsafe { std::ptr::copy_nonoverlapping(from.base, to.base, from.bytes) };
                }
                Ok(copy)
            }
            _ => Err(Error::Unsupported("lent memory cannot be copied into memory of its own".to_owned())),
        }
    }

    /// Copies the records of all heads.
    pub fn copy(&mut self, source: u32, destination: u32) {
        for head in 0..self.num_kv_heads {
            let (from, to) = (self.at(source, head), self.at(destination, head));
            // SAFETY: `at` found both records, `record_bytes` long; `copy` allows them to be the same.
            unsafe { std::ptr::copy(from, to, self.record_bytes) };
        }
    }

    /// The record of (number, head), to read.
    pub fn record(&self, index: u32, head: usize) -> &[u8] {
        // SAFETY: `at` checked that the record exists; `&self` keeps writers out but for `record_mut`'s callers, who hold
        // the memory exclusively.
        unsafe { std::slice::from_raw_parts(self.at(index, head), self.record_bytes) }
    }

    /// The record of (number, head), to write.
    ///
    /// # Safety
    /// The caller holds the memory exclusively and asks for each record once at a time.
    #[allow(clippy::mut_from_ref)] // exclusive by contract: records are written side by side
    pub unsafe fn record_mut(&self, index: u32, head: usize) -> &mut [u8] {
        // SAFETY: `at` checked that the record exists; the caller keeps records apart.
        unsafe { std::slice::from_raw_parts_mut(self.at(index, head), self.record_bytes) }
    }

    fn at(&self, index: u32, head: usize) -> *mut u8 {
        let index = index as usize;
        assert!(head < self.num_kv_heads);
        match &self.source {
            Source::Owned { slabs, per_slab } => {
                let slab = &slabs[index / per_slab];
                slab.base.wrapping_add((index % per_slab * self.num_kv_heads + head) * self.record_bytes)
            }
            Source::Lent(records) => {
                assert!(index < records.num);
                let base: *mut u8 = std::ptr::with_exposed_provenance_mut(records.base as usize);
                base.wrapping_add(index * records.stride + head * records.head_stride)
            }
        }
    }
}

#[derive(Debug)]
struct Slab {
    /// What was allocated: `bytes` and room to align them.
    memory: *mut u8,
    /// The first aligned byte of it.
    base: *mut u8,
    bytes: usize,
}

// SAFETY: a slab owns its memory; access follows the borrows of `Memory`.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Slab {
    /// Asks for the machine's own alignment only: zeroed memory of a stricter one is written to when it is allocated,
    /// while this is given, page by page, when it is first used.
    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes + ALIGNMENT, 16).expect("a block's bytes were checked with the settings")
    }

    fn zeroed(bytes: usize) -> Option<Self> {
        // SAFETY: the layout has a size.
        let memory = unsafe { alloc_zeroed(Self::layout(bytes)) };
        let base = memory.wrapping_add(memory.align_offset(ALIGNMENT));
        (!memory.is_null()).then_some(Self { memory, base, bytes })
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with the same layout.
        unsafe { dealloc(self.memory, Self::layout(self.bytes)) };
    }
}
