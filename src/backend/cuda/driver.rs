//! The driver: is there one, what do its errors say, and a device's primary context, which torch uses too.

use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUresult};
use std::ffi::CStr;
use std::ptr;
use std::sync::OnceLock;

/// What a call of the driver says.
///
/// # Errors
/// [`Error::Driver`] naming the call and the driver's reason.
pub(super) fn check(call: &'static str, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    // SAFETY: the driver writes the address of a string of its own, or leaves null.
    let known = unsafe { sys::cuGetErrorString(result, &raw mut text) } == CUresult::CUDA_SUCCESS && !text.is_null();
    // SAFETY: a terminated string of the driver's.
    let reason = if known { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() } else { String::new() };
    Err(Error::Driver { call, reason: format!("{result:?} ({reason})") })
}

/// A call of the driver by its name, checked.
macro_rules! checked_call {
    ($name:ident($($argument:expr),* $(,)?)) => {
        $crate::backend::cuda::driver::check(stringify!($name), cudarc::driver::sys::$name($($argument),*))
    };
}
pub(super) use checked_call as call;

/// Starts the driver, once a process.
///
/// # Errors
/// [`Error::Unsupported`] where there is no driver, or it finds no device.
pub fn start() -> Result<()> {
    static STARTED: OnceLock<Result<()>> = OnceLock::new();
    STARTED.get_or_init(load).clone()
}

fn load() -> Result<()> {
    // SAFETY: loads the library and runs its initializers, as any first call would.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Unsupported("CUDA: this machine has no driver (libcuda.so.1)".to_owned()));
    }
    // SAFETY: the library is there; flags are zero by the driver's definition.
    let started = unsafe { call!(cuInit(0)) };
    started.map_err(|error| Error::Unsupported(format!("CUDA: {error}")))
}

/// CUDA devices of this machine.
///
/// # Errors
/// Those of [`start`].
pub fn num_devices() -> Result<u32> {
    start()?;
    let mut count = 0;
    // SAFETY: writes one number.
    unsafe { call!(cuDeviceGetCount(&raw mut count)) }?;
    Ok(count as u32)
}

/// A device and its primary context, held until dropped.
#[derive(Debug)]
pub struct Context {
    /// The device's index.
    pub index: u32,
    device: sys::CUdevice,
    handle: sys::CUcontext,
}

// SAFETY: a context is used by any thread that makes it current.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// The primary context of a device.
    ///
    /// # Errors
    /// Those of [`start`]; [`Error::Unsupported`] for an index that no device has.
    pub fn new(index: u32) -> Result<Self> {
        let count = num_devices()?;
        if index >= count {
            return Err(Error::Unsupported(format!("cuda:{index}: this machine has {count} CUDA devices")));
        }
        let (mut device, mut handle) = (0, ptr::null_mut());
        // SAFETY: each call writes one value; the index is a device's.
        unsafe {
            call!(cuDeviceGet(&raw mut device, index as i32))?;
            call!(cuDevicePrimaryCtxRetain(&raw mut handle, device))?;
        }
        Ok(Self { index, device, handle })
    }

    /// Makes the context current until the result is dropped; torch's own choice of a device is then as before.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn enter(&self) -> Result<Entered> {
        let mut current = ptr::null_mut();
        // SAFETY: the context is retained; what is pushed is popped by `Entered`.
        unsafe {
            call!(cuCtxGetCurrent(&raw mut current))?;
            if current == self.handle {
                return Ok(Entered { pushed: false });
            }
            call!(cuCtxPushCurrent_v2(self.handle))?;
        }
        Ok(Entered { pushed: true })
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: writes one number.
        unsafe { call!(cuDeviceGetAttribute(&raw mut value, attribute, self.device)) }?;
        Ok(value)
    }

    /// Compute capability, as `90` for 9.0.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn capability(&self) -> Result<u32> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        Ok((self.attribute(MAJOR)? * 10 + self.attribute(MINOR)?) as u32)
    }

    /// Bytes of the device's memory.
    ///
    /// # Errors
    /// Those of the driver.
    pub fn total_bytes(&self) -> Result<usize> {
        let mut bytes = 0;
        // SAFETY: writes one number.
        unsafe { call!(cuDeviceTotalMem_v2(&raw mut bytes, self.device)) }?;
        Ok(bytes)
    }

    /// Waits for all work of the device.
    ///
    /// # Errors
    /// Those of the driver, of this call or of work launched before.
    pub fn wait(&self) -> Result<()> {
        let _entered = self.enter()?;
        // SAFETY: a context is current.
        unsafe { call!(cuCtxSynchronize()) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once by `new`. A driver that is shutting down refuses, and nothing is left to release.
        _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// While this is there, a context is current on the thread that made it so.
#[derive(Debug)]
#[must_use]
pub struct Entered {
    pushed: bool,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = ptr::null_mut();
            // SAFETY: pushed by `enter`, on this thread.
            _ = unsafe { sys::cuCtxPopCurrent_v2(&raw mut popped) };
        }
    }
}
