//! Memory of a device: regions that grow without moving, buffers, and pinned memory of the host.

use super::driver::{Context, call};
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUresult};
use std::ptr;
use std::sync::Arc;

/// Memory is added in pieces of at least this share of what is there, so that a growing cache asks the driver rarely.
const GROWTH: usize = 8;

/// A range of addresses, of which more and more is backed by memory. Nothing in it moves.
#[derive(Debug)]
pub(super) struct Region {
    context: Arc<Context>,
    base: u64,
    reserved: usize,
    granule: usize,
    /// Pieces of memory, one after the other from `base` on, and their bytes.
    pieces: Vec<(sys::CUmemGenericAllocationHandle, usize)>,
}

impl Region {
    /// As many addresses as the device has memory.
    pub fn new(context: Arc<Context>) -> Result<Self> {
        let _entered = context.enter()?;
        let (mut granule, mut base) = (0, 0);
        let properties = properties(&context);
        let minimum = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
        // SAFETY: writes one number.
        unsafe { call!(cuMemGetAllocationGranularity(&raw mut granule, &raw const properties, minimum)) }?;
        let reserved = context.total_bytes()?.next_multiple_of(granule);
        // SAFETY: addresses alone; freed on drop.
        unsafe { call!(cuMemAddressReserve(&raw mut base, reserved, 0, 0, 0)) }?;
        Ok(Self { context, base, reserved, granule, pieces: Vec::new() })
    }

    pub fn base(&self) -> u64 {
        self.base
    }

    /// Bytes backed by memory.
    pub fn bytes(&self) -> usize {
        self.pieces.iter().map(|piece| piece.1).sum()
    }

    /// Backs the first `bytes` with memory, zeroed, or changes nothing.
    pub fn grow(&mut self, bytes: usize) -> Result<()> {
        let backed = self.bytes();
        if bytes <= backed {
            return Ok(());
        }
        let refused = Error::OutOfMemory { bytes: bytes - backed, what: "pages on the device" };
        if bytes > self.reserved {
            return Err(refused);
        }
        let least = (bytes - backed).next_multiple_of(self.granule);
        let ample = least.max((backed / GROWTH).next_multiple_of(self.granule)).min(self.reserved - backed);
        let _entered = self.context.enter()?;
        if self.add(ample)? || self.add(least)? { Ok(()) } else { Err(refused) }
    }

    /// Adds a piece; is there memory for it?
    fn add(&mut self, bytes: usize) -> Result<bool> {
        let (mut handle, properties) = (0, properties(&self.context));
        // SAFETY: writes one handle.
        let created = unsafe { sys::cuMemCreate(&raw mut handle, bytes, &raw const properties, 0) };
        if created == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Ok(false);
        }
        super::driver::check("cuMemCreate", created)?;
        let at = self.base + self.bytes() as u64;
        // SAFETY: the addresses are reserved and not backed; the handle has so many bytes.
        if let Err(error) = unsafe { call!(cuMemMap(at, bytes, 0, handle, 0)) } {
            // SAFETY: created above, mapped nowhere.
            _ = unsafe { sys::cuMemRelease(handle) };
            return Err(error);
        }
        self.pieces.push((handle, bytes));
        let made = self.open(at, bytes);
        if made.is_err() {
            self.pieces.pop();
            // SAFETY: mapped above, used by nobody.
            _ = unsafe { (sys::cuMemUnmap(at, bytes), sys::cuMemRelease(handle)) };
        }
        made.map(|()| true)
    }

    fn open(&self, at: u64, bytes: usize) -> Result<()> {
        let access = sys::CUmemAccessDesc {
            location: location(&self.context),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: mapped memory of ours, that nobody knows of yet.
        unsafe {
            call!(cuMemSetAccess(at, bytes, &raw const access, 1))?;
            call!(cuMemsetD8Async(at, 0, bytes, ptr::null_mut()))?;
            call!(cuStreamSynchronize(ptr::null_mut()))
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // Work that was launched may read the records yet.
        _ = self.context.wait();
        let Ok(_entered) = self.context.enter() else { return };
        let mut at = self.base;
        for &(handle, bytes) in &self.pieces {
            // SAFETY: mapped by `add`, and no work reads it any more.
            _ = unsafe { (sys::cuMemUnmap(at, bytes), sys::cuMemRelease(handle)) };
            at += bytes as u64;
        }
        // SAFETY: reserved by `new`, nothing is mapped.
        _ = unsafe { sys::cuMemAddressFree(self.base, self.reserved) };
    }
}

fn location(context: &Context) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: context.index as i32 }
}

fn properties(context: &Context) -> sys::CUmemAllocationProp {
    // SAFETY: a struct of numbers, for which the driver asks that what is not used be zero.
    let none: sys::CUmemAllocationProp = unsafe { std::mem::zeroed() };
    let pinned = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    sys::CUmemAllocationProp { type_: pinned, location: location(context), ..none }
}

/// A buffer of the device.
#[derive(Debug)]
pub(super) struct Buffer {
    context: Arc<Context>,
    pub address: u64,
    pub bytes: usize,
}

impl Buffer {
    /// Zeroed memory.
    pub fn zeroed(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let buffer = Self::new(context, bytes)?;
        let _entered = context.enter()?;
        // SAFETY: memory of ours alone.
        unsafe { call!(cuMemsetD8_v2(buffer.address, 0, buffer.bytes)) }?;
        context.wait()?;
        Ok(buffer)
    }

    /// Memory that holds anything.
    pub fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        let _entered = context.enter()?;
        let (mut address, bytes) = (0, bytes.max(16));
        // SAFETY: writes one address.
        let made = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) };
        if made == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(Error::OutOfMemory { bytes, what: "a buffer on the device" });
        }
        super::driver::check("cuMemAlloc", made)?;
        Ok(Self { context: Arc::clone(context), address, bytes })
    }

    /// Copies from the host, and waits.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= self.bytes);
        let _entered = self.context.enter()?;
        // SAFETY: so many bytes are here and there.
        unsafe { call!(cuMemcpyHtoD_v2(self.address, bytes.as_ptr().cast(), bytes.len())) }?;
        self.context.wait()
    }

    /// Copies the first `bytes` to the host, once all work is done.
    pub fn read(&self, bytes: usize) -> Result<Vec<u8>> {
        assert!(bytes <= self.bytes);
        let mut read = vec![0; bytes];
        let _entered = self.context.enter()?;
        self.context.wait()?;
        // SAFETY: so many bytes are here and there.
        unsafe { call!(cuMemcpyDtoH_v2(read.as_mut_ptr().cast(), self.address, bytes)) }?;
        Ok(read)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Ok(_entered) = self.context.enter() else { return };
        // SAFETY: allocated by `new`; the driver waits for work that uses it.
        _ = unsafe { sys::cuMemFree_v2(self.address) };
    }
}

/// Pinned memory of the host, which copies read in the background.
#[derive(Debug)]
pub(super) struct Pinned {
    context: Arc<Context>,
    base: *mut i32,
    pub words: usize,
}

// SAFETY: an allocation of its own, written through `&mut` only.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub fn new(context: &Arc<Context>, words: usize) -> Result<Self> {
        let _entered = context.enter()?;
        let (mut base, bytes) = (ptr::null_mut(), 4 * words.max(4));
        // SAFETY: writes one address.
        let made = unsafe { sys::cuMemHostAlloc(&raw mut base, bytes, 0) };
        if made == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(Error::OutOfMemory { bytes, what: "pinned memory" });
        }
        super::driver::check("cuMemHostAlloc", made)?;
        Ok(Self { context: Arc::clone(context), base: base.cast(), words })
    }

    /// Copies words to the device on a stream. They are taken from here when the stream comes to it.
    pub fn send(
        &mut self,
        first: usize,
        words: impl ExactSizeIterator<Item = i32>,
        to: u64,
        stream: u64,
    ) -> Result<()> {
        let count = words.len();
        assert!(first + count <= self.words);
        for (index, word) in words.enumerate() {
            // SAFETY: within the allocation, by the assertion.
            unsafe { self.base.add(first + index).write(word) };
        }
        // SAFETY: as many bytes are here, and there by the caller; the caller waits before it writes here again.
        unsafe {
            let from = self.base.add(first).cast_const().cast();
            call!(cuMemcpyHtoDAsync_v2(to, from, 4 * count, super::launch::raw(stream)))
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        _ = self.context.wait();
        let Ok(_entered) = self.context.enter() else { return };
        // SAFETY: allocated by `new`, no copy is running.
        _ = unsafe { sys::cuMemFreeHost(self.base.cast()) };
    }
}
