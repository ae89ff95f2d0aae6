//! The compiled kernels: those of `kernels/prebuilt` that suit a device, loaded once a process and device.

use super::driver::{Context, call};
use crate::error::{Error, Result};
use cudarc::driver::sys;
use serde_json::Value;
use std::collections::HashMap;
use std::ffi::CString;
use std::io::Read;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

/// A module, and what it was compiled to: cubins by compute capability, and PTX for other devices.
struct Prebuilt {
    name: &'static str,
    cubins: [(u32, &'static [u8]); 4],
    ptx: [(u32, &'static [u8]); 2],
}

macro_rules! prebuilt {
    ($($name:literal),* $(,)?) => {
        [$(Prebuilt {
            name: $name,
            cubins: [
                (80, include_bytes!(concat!("../../../kernels/prebuilt/", $name, ".sm_80.zst"))),
                (86, include_bytes!(concat!("../../../kernels/prebuilt/", $name, ".sm_86.zst"))),
                (89, include_bytes!(concat!("../../../kernels/prebuilt/", $name, ".sm_89.zst"))),
                (90, include_bytes!(concat!("../../../kernels/prebuilt/", $name, ".sm_90.zst"))),
            ],
            ptx: [
                (80, include_bytes!(concat!("../../../kernels/prebuilt/", $name, ".compute_80.zst"))),
                (90, include_bytes!(concat!("../../../kernels/prebuilt/", $name, ".compute_90.zst"))),
            ],
        }),*]
    };
}

/// Every module: a kernel's author adds the name of its `.cu` file.
static PREBUILT: &[Prebuilt] = &prebuilt!["tables"];
/// What `just kernels` says of them: the names of the kernels.
const MANIFEST: &str = include_str!("../../../kernels/manifest.json");

/// A kernel.
#[derive(Debug, Clone, Copy)]
pub struct Function(pub(super) sys::CUfunction);

// SAFETY: a handle, good for as long as its module is loaded, which is for ever.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// All kernels, on one device.
#[derive(Debug)]
pub struct Kernels {
    functions: HashMap<String, Function>,
    /// What each module came from: `sm_90`, or `compute_90` where the driver had to compile.
    pub source: String,
}

impl Kernels {
    /// The kernels on a device. The first call loads them; they stay loaded while the
    /// process lives, as its primary context does in torch.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a device before compute capability 8.0, those of the driver.
    pub fn of(context: &Context) -> Result<Arc<Self>> {
        static LOADED: Mutex<Vec<(u32, Arc<Kernels>)>> = Mutex::new(Vec::new());
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, kernels)) = loaded.iter().find(|(index, _)| *index == context.index) {
            return Ok(Arc::clone(kernels));
        }
        let kernels = Arc::new(Self::load(context)?);
        // The modules live in the primary context: it is never released again.
        std::mem::forget(Context::new(context.index)?);
        loaded.push((context.index, Arc::clone(&kernels)));
        Ok(kernels)
    }

    fn load(context: &Context) -> Result<Self> {
        let _entered = context.enter()?;
        let capability = context.capability()?;
        let manifest: Value = serde_json::from_str(MANIFEST).map_err(|error| damaged(&error))?;
        let (mut functions, mut source) = (HashMap::new(), String::new());
        for module in PREBUILT {
            let (image, name) = module.image(capability)?;
            source = name;
            let mut handle = ptr::null_mut();
            // SAFETY: a whole cubin, or PTX that ends with a zero.
            unsafe { call!(cuModuleLoadData(&raw mut handle, image.as_ptr().cast())) }?;
            let kernels = manifest["modules"][module.name]["kernels"].as_object();
            for name in kernels.into_iter().flatten().map(|(name, _)| name) {
                let (mut function, c_name) = (ptr::null_mut(), c_string(name)?);
                // SAFETY: the module is loaded, the name is terminated.
                unsafe { call!(cuModuleGetFunction(&raw mut function, handle, c_name.as_ptr())) }?;
                functions.insert(name.clone(), Function(function));
            }
        }
        Ok(Self { functions, source })
    }

    /// A kernel by its name.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming it, where it was not compiled.
    pub fn function(&self, name: &str) -> Result<Function> {
        let function = self.functions.get(name).copied();
        function.ok_or_else(|| Error::Unsupported(format!("CUDA: there is no kernel {name}")))
    }
}

impl Prebuilt {
    /// What this device runs: its own cubin, that of a lower capability of the same generation, else PTX.
    fn image(&self, capability: u32) -> Result<(Vec<u8>, String)> {
        let runs = |built: u32| built / 10 == capability / 10 && built <= capability;
        if let Some((built, packed)) = self.cubins.iter().rev().find(|(built, _)| runs(*built)) {
            return Ok((unpack(packed)?, format!("sm_{built}")));
        }
        let ptx = self.ptx.iter().rev().find(|(built, _)| *built <= capability);
        let Some((built, packed)) = ptx else {
            let (major, minor) = (capability / 10, capability % 10);
            let why = format!("CUDA: kernels need compute capability 8.0, the device has {major}.{minor}");
            return Err(Error::Unsupported(why));
        };
        Ok((unpack(packed)?, format!("compute_{built}")))
    }
}

fn unpack(packed: &[u8]) -> Result<Vec<u8>> {
    let mut image = Vec::new();
    let mut decoder = ruzstd::decoding::StreamingDecoder::new(packed).map_err(|error| damaged(&error))?;
    decoder.read_to_end(&mut image).map_err(|error| damaged(&error))?;
    Ok(image)
}

fn damaged(error: &dyn std::fmt::Display) -> Error {
    Error::Unsupported(format!("CUDA: the kernels of this build are damaged: {error}"))
}

fn c_string(name: &str) -> Result<CString> {
    CString::new(name).map_err(|error| damaged(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_module_of_the_manifest_is_in_this_build_and_its_images_unpack() {
        let manifest: Value = serde_json::from_str(MANIFEST).unwrap();
        let modules = manifest["modules"].as_object().unwrap().iter();
        let compiled: Vec<&String> =
            modules.filter(|(_, module)| module.get("results").is_some()).map(|(name, _)| name).collect();
        assert_eq!(compiled, PREBUILT.iter().map(|module| module.name).collect::<Vec<_>>());
        for module in PREBUILT {
            for capability in [80, 86, 87, 89, 90] {
                assert!(module.image(capability).unwrap().0.starts_with(b"\x7fELF"));
            }
            for capability in [100, 120] {
                let (ptx, name) = module.image(capability).unwrap();
                assert_eq!((name.as_str(), ptx.last()), ("compute_90", Some(&0)));
            }
            assert!(matches!(module.image(75), Err(Error::Unsupported(_))));
        }
    }

    #[test]
    fn a_device_runs_the_cubin_nearest_below_it() {
        let names = [80, 86, 87, 89, 90].map(|capability| PREBUILT[0].image(capability).unwrap().1);
        assert_eq!(names, ["sm_80", "sm_86", "sm_86", "sm_89", "sm_90"]);
    }
}
