"""Quantized, paged key/value cache for LLM inference, attended to without unpacking it.

`PagedKvCache` is the cache on its own, for torch or numpy CPU tensors; `kvarn_rs.hf` plugs it into Hugging Face
`generate`. Importing this package imports neither torch nor numpy.
"""

from kvarn_rs._core import PagedKvCache, Step, __version__, formats
from kvarn_rs.errors import (
    ConfigError,
    DeviceError,
    DtypeError,
    KvarnError,
    NonFiniteError,
    OpenStepError,
    OutOfBlocksError,
    OutOfMemoryError,
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

__all__ = [
    "FORMATS",
    "ConfigError",
    "DeviceError",
    "DtypeError",
    "KvarnError",
    "NonFiniteError",
    "OpenStepError",
    "OutOfBlocksError",
    "OutOfMemoryError",
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
