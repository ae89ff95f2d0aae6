//! The conversion of [`Error`] to the exceptions of `kvarn_rs.errors`.

use crate::Error;
use pyo3::prelude::*;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        Python::attach(|py| {
            let message = error.to_string();
            let class = match &error {
                Error::UnknownFormat { .. } => "UnknownFormatError",
                Error::Config(_) | Error::InvalidSetting { .. } | Error::UnknownBlock { .. } => "ConfigError",
                Error::Calibration(_) => "CalibrationError",
                Error::CacheFile(_) => "CacheFileError",
                Error::Unsupported(_) => "UnsupportedError",
                Error::OutOfBlocks { needed, free } => {
                    return exception(py, "OutOfBlocksError", (message, *needed, *free));
                }
                Error::OutOfOpenPages { needed, free } => {
                    return exception(py, "OutOfOpenPagesError", (message, *needed, *free));
                }
                Error::UnknownSequence { .. } => "UnknownSequenceError",
                Error::RollbackTooFar { .. } | Error::Sealed { .. } => "RollbackError",
                Error::OpenStep { .. } | Error::IncompleteStep { .. } => "OpenStepError",
                Error::StaleStep(_) => "StaleStepError",
                Error::Shape { .. } => "ShapeError",
                Error::Dtype { .. } => "DtypeError",
                Error::Stride { .. } | Error::Overlap { .. } => "StrideError",
                Error::OutOfMemory { .. } => "OutOfMemoryError",
                Error::Device { .. } => "DeviceError",
                Error::Driver { .. } => "DriverError",
                Error::NonFinite { .. } => "NonFiniteError",
            };
            exception(py, class, (message,))
        })
    }
}

fn exception<'py, A: pyo3::call::PyCallArgs<'py>>(py: Python<'py>, class: &str, args: A) -> PyErr {
    let made =
        py.import("kvarn_rs.errors").and_then(|errors| errors.getattr(class)).and_then(|class| class.call1(args));
    match made {
        Ok(value) => PyErr::from_value(value),
        Err(error) => error,
    }
}
