"""A quantized, paged key/value cache for LLM inference, with attention that reads the quantized data directly.

`PagedKvCache` is the cache without a framework, for torch or numpy CPU tensors; `Engine` is its attention for a
serving engine that has memory and block tables of its own; `kvarn_rs.hf` connects the cache to Hugging Face `generate`.
Importing this package imports neither torch nor numpy.
"""

from kvarn_rs._core import Calibration, Engine, PagedKvCache, Step, __version__, codecs, formats
from kvarn_rs.errors import (
    CacheFileError,
    CalibrationError,
    ConfigError,
    DeviceError,
    DriverError,
    DtypeError,
    KvarnError,
    NonFiniteError,
    OpenStepError,
    OutOfBlocksError,
    OutOfMemoryError,
    OutOfOpenPagesError,
    RollbackError,
    ShapeError,
    StaleStepError,
    StrideError,
    UnknownFormatError,
    UnknownSequenceError,
    UnsupportedError,
)

FORMATS: tuple[str, ...] = tuple(formats())
"""Names of the cache formats, from the largest to the smallest."""

CODECS: tuple[str, ...] = tuple(codecs())
"""Names of the codecs, which quantize `raw` pages in place to evaluate other schemes."""

__all__ = [
    "CODECS",
    "FORMATS",
    "CacheFileError",
    "Calibration",
    "CalibrationError",
    "ConfigError",
    "DeviceError",
    "DriverError",
    "DtypeError",
    "Engine",
    "KvarnError",
    "NonFiniteError",
    "OpenStepError",
    "OutOfBlocksError",
    "OutOfMemoryError",
    "OutOfOpenPagesError",
    "PagedKvCache",
    "RollbackError",
    "ShapeError",
    "StaleStepError",
    "Step",
    "StrideError",
    "UnknownFormatError",
    "UnknownSequenceError",
    "UnsupportedError",
    "__version__",
]
