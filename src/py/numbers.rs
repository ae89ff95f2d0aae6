//! Python integers as arguments: out of range is a `ConfigError`, like any other invalid setting, not an `OverflowError`.

use crate::Error;
use pyo3::prelude::*;

/// An integer in 0..2^64.
#[derive(Debug, Clone, Copy)]
pub struct Whole(pub u64);

impl Whole {
    pub fn count(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX) // larger than any valid count
    }
}

impl<'py> FromPyObject<'_, 'py> for Whole {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match object.extract::<u64>() {
            Ok(number) => Ok(Self(number)),
            Err(_) if object.hasattr("__index__")? => {
                let given = object.str()?.to_string();
                Err(Error::Config(format!("expected a whole number in 0..2^64, got {given}")).into())
            }
            Err(error) => Err(error),
        }
    }
}
