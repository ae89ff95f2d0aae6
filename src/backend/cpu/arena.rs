//! The memory of the records: slabs of zeroed, cache-line aligned records that never move.

use crate::error::{Error, Result};
use std::alloc::{Layout, alloc_zeroed, dealloc};

const ALIGNMENT: usize = 64;
/// Slabs are about this large: few allocations, and little held by a short sequence.
const SLAB_BYTES: usize = 1 << 20;

/// One layer's pages, or its tiles, by number: each is `num_kv_heads` records in a row.
#[derive(Debug)]
pub struct Arena {
    slabs: Vec<Slab>,
    blocks_per_slab: usize,
    num_kv_heads: usize,
    record_bytes: usize,
}

impl Arena {
    pub fn new(num_kv_heads: usize, record_bytes: usize) -> Self {
        let blocks_per_slab = (SLAB_BYTES / (num_kv_heads * record_bytes)).max(1);
        Self { slabs: Vec::new(), blocks_per_slab, num_kv_heads, record_bytes }
    }

    pub fn block_bytes(&self) -> usize {
        self.num_kv_heads * self.record_bytes
    }

    pub fn bytes(&self) -> usize {
        self.slabs.iter().map(|slab| slab.bytes).sum()
    }

    pub fn num_records(&self) -> usize {
        self.slabs.len() * self.blocks_per_slab
    }

    fn missing_slabs(&self, num_blocks: usize) -> usize {
        num_blocks.saturating_sub(self.num_records()).div_ceil(self.blocks_per_slab)
    }

    fn slab_bytes(&self) -> usize {
        self.blocks_per_slab * self.block_bytes()
    }

    /// Bytes that [`Self::grow`] would allocate.
    pub fn missing_bytes(&self, num_blocks: usize) -> usize {
        self.missing_slabs(num_blocks).saturating_mul(self.slab_bytes())
    }

    /// Makes room for `num_blocks`, or changes nothing.
    pub fn grow(&mut self, num_blocks: usize) -> Result<()> {
        let (missing, slab_bytes) = (self.missing_slabs(num_blocks), self.slab_bytes());
        if missing == 0 {
            return Ok(());
        }
        let refused = Error::OutOfMemory { bytes: self.missing_bytes(num_blocks), what: "pages" };
        let mut slabs = Vec::new();
        if slabs.try_reserve(missing).is_err() || self.slabs.try_reserve(missing).is_err() {
            return Err(refused);
        }
        for _ in 0..missing {
            slabs.push(Slab::zeroed(slab_bytes).ok_or_else(|| refused.clone())?);
        }
        self.slabs.append(&mut slabs);
        Ok(())
    }

    /// A copy in memory of its own.
    pub fn try_clone(&self) -> Result<Self> {
        let &Self { blocks_per_slab, num_kv_heads, record_bytes, .. } = self;
        let mut copy = Self { slabs: Vec::new(), blocks_per_slab, num_kv_heads, record_bytes };
        copy.grow(self.num_records())?;
        for (from, to) in self.slabs.iter().zip(&copy.slabs) {
            // SAFETY: two allocations of the same size, one of them ours alone.
            unsafe { std::ptr::copy_nonoverlapping(from.base, to.base, from.bytes) };
        }
        Ok(copy)
    }

    pub fn copy(&mut self, source: u32, destination: u32) {
        let bytes = self.block_bytes();
        let (from, to) = (self.at(source, 0), self.at(destination, 0));
        // SAFETY: both blocks lie in slabs that `at` found, `bytes` long; `copy` allows them to be the same block.
        unsafe { std::ptr::copy(from, to, bytes) };
    }

    /// The record of (block, head), to read.
    pub fn record(&self, index: u32, head: usize) -> &[u8] {
        // SAFETY: `at` checked that the record lies in its slab; `&self` keeps writers out but for `record_mut`'s callers,
        // who hold the arena exclusively.
        unsafe { std::slice::from_raw_parts(self.at(index, head), self.record_bytes) }
    }

    /// The record of (block, head), to write.
    ///
    /// # Safety
    /// The caller holds the arena exclusively and asks for each record once at a time.
    #[allow(clippy::mut_from_ref)] // exclusive by contract: records are written side by side
    pub unsafe fn record_mut(&self, index: u32, head: usize) -> &mut [u8] {
        // SAFETY: `at` checked that the record lies in its slab; the caller keeps records apart.
        unsafe { std::slice::from_raw_parts_mut(self.at(index, head), self.record_bytes) }
    }

    fn at(&self, index: u32, head: usize) -> *mut u8 {
        let block = index as usize;
        let slab = &self.slabs[block / self.blocks_per_slab];
        let offset = (block % self.blocks_per_slab) * self.block_bytes() + head * self.record_bytes;
        assert!(head < self.num_kv_heads && offset + self.record_bytes <= slab.bytes);
        slab.base.wrapping_add(offset)
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

// SAFETY: a slab owns its memory; access follows the borrows of `Arena`.
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
