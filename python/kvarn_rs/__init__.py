"""Quantized, paged key/value cache for LLM inference, attended to without unpacking it.

`PagedKvCache` is the cache on its own, for torch or numpy CPU tensors; `kvarn_rs.hf` plugs it into Hugging Face
`generate`. Importing this package imports neither torch nor numpy.
"""

from kvarn_rs._core import Calibration, PagedKvCache, Step, __version__, codecs, formats
from kvarn_rs.errors import (
    CacheFileError,
    CalibrationError,
    ConfigError,
    DeviceError,
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
"""Names of the schemes that `raw` pages can be quantized with in place, to compare formats by."""

__all__ = [
    "CODECS",
    "FORMATS",
    "CacheFileError",
    "Calibration",
    "CalibrationError",
    "ConfigError",
    "DeviceError",
    "DtypeError",
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
