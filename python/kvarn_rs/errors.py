"""The exceptions of kvarn-rs. Each derives from `KvarnError` and from the built-in exception closest to it."""


class KvarnError(Exception):
    """Base of every exception that kvarn-rs raises."""


class ConfigError(KvarnError, ValueError):
    """An invalid setting, or two settings that contradict each other; also an invalid or unreadable input file."""


class CalibrationError(ConfigError):
    """A calibration file that cannot be written or used: not a calibration, damaged, or of another version or model."""


class CacheFileError(ConfigError):
    """A cache file that cannot be written or used: not a cache, damaged, or of another version or model."""


class UnknownFormatError(ConfigError):
    """An unknown cache format or codec name."""


class UnsupportedError(KvarnError, NotImplementedError):
    """A well-formed request that this build, format or device does not support."""


class OutOfBlocksError(KvarnError, MemoryError):
    """The pool has fewer free blocks than the operation needs; nothing was changed.

    Attributes:
        needed: blocks that the operation would have allocated.
        free: blocks that were free.
    """

    def __init__(self, message: str = "", needed: int = 0, free: int = 0) -> None:
        super().__init__(message)
        self.needed = needed
        self.free = free


class OutOfOpenPagesError(OutOfBlocksError):
    """The pool has fewer free pages for open blocks than the operation needs; nothing was changed.

    Attributes:
        needed: pages that the operation would have allocated.
        free: pages that were free.
    """


class DriverError(KvarnError, RuntimeError):
    """A call of a device's driver that failed, by itself or because work launched before it did."""


class OutOfMemoryError(KvarnError, MemoryError):
    """A failed memory allocation; nothing was changed."""


class UnknownSequenceError(KvarnError, KeyError):
    """A sequence id that was never allocated, or was freed."""

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0]) if self.args else ""


class RollbackError(KvarnError, ValueError):
    """A truncation to more tokens than there are, to tokens that the window released, or into a sealed block.

    Also raised in `kvarn_rs.hf` for a layer that lacks earlier positions, or cannot undo a forward that raised.
    """


class StaleStepError(KvarnError, RuntimeError):
    """A step (or tensor handle) that is not open: it was committed or aborted, or its sequences have changed since."""


class OpenStepError(KvarnError, RuntimeError):
    """An operation on a sequence in an open step, a step with layers not yet appended, or a cache within a forward."""


class ShapeError(KvarnError, ValueError):
    """A tensor whose shape is not the one the operation needs."""


class DtypeError(KvarnError, ValueError):
    """A tensor whose element type is not accepted."""


class StrideError(KvarnError, ValueError):
    """A tensor whose strides cannot be read without a copy, or whose memory overlaps where it is written."""


class DeviceError(KvarnError, ValueError):
    """A tensor on another device than the cache's."""


class NonFiniteError(KvarnError, ValueError):
    """A NaN or infinity in keys or values; nothing was written."""
