//! Where a backend works.

use std::fmt;

/// The device that memory belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Device {
    /// Host memory.
    Cpu,
    /// A CUDA device, by its index.
    Cuda(u32),
}

impl Device {
    /// The device called `name`: `cpu` or `cuda:N`, as torch writes them.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name.split_once(':') {
            None if name == "cpu" => Some(Self::Cpu),
            Some(("cuda", index)) => index.parse().ok().map(Self::Cuda),
            _ => None,
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// The queue of a device that work is launched on: a raw `CUstream`. The CPU has only the default one, 0, and works at
/// once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stream(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_called_as_torch_calls_it() {
        for device in [Device::Cpu, Device::Cuda(0), Device::Cuda(11)] {
            assert_eq!(Device::parse(&device.to_string()), Some(device));
        }
        for name in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cpu:0", "meta"] {
            assert_eq!(Device::parse(name), None, "{name}");
        }
    }
}
