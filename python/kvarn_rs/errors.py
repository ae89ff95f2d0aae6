"""The exceptions of kvarn-rs. Each is a `KvarnError` and the built-in it resembles; messages carry the numbers."""


class KvarnError(Exception):
    """Base of every error that kvarn-rs raises."""


class ConfigError(KvarnError, ValueError):
    """A setting, or two settings together, that cannot work; also a corrupt or unreadable configuration file."""


class CalibrationError(ConfigError):
    """A calibration that cannot be used: not one, damaged, of another version, or of another model."""


class CacheFileError(ConfigError):
    """A cache file that cannot be written, or used: not one, damaged, of another version, or of another model."""


class UnknownFormatError(ConfigError):
    """A cache format name that does not exist."""


class UnsupportedError(KvarnError, NotImplementedError):
    """Well formed, but not done by this build, format or device."""


class OutOfBlocksError(KvarnError, MemoryError):
    """The pool has fewer free blocks than the operation needs; nothing was changed.

    Attributes:
        needed: blocks that the operation would have taken.
        free: blocks that were free.
    """

    def __init__(self, message: str = "", needed: int = 0, free: int = 0) -> None:
        super().__init__(message)
        self.needed = needed
        self.free = free


class OutOfOpenPagesError(OutOfBlocksError):
    """The pool has fewer free pages for open blocks than the operation needs; nothing was changed.

    Attributes:
        needed: pages that the operation would have taken.
        free: pages that were free.
    """


class OutOfMemoryError(KvarnError, MemoryError):
    """The machine does not give the memory that the pages need; nothing was changed."""


class UnknownSequenceError(KvarnError, KeyError):
    """A sequence id that was never given out, or was freed."""

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0]) if self.args else ""


class RollbackError(KvarnError, ValueError):
    """A truncation to more tokens than there are, to ones that left the window, or to within a sealed block.

    Also K and V of a layer that lacks earlier positions, and of one that cannot undo a forward which raised.
    """


class StaleStepError(KvarnError, RuntimeError):
    """A step (or tensor handle) that is no longer open: committed, aborted, or its sequences have moved on."""


class OpenStepError(KvarnError, RuntimeError):
    """The operation needs a sequence without an open step, a step whose layers are all appended, or no open forward."""


class ShapeError(KvarnError, ValueError):
    """A tensor whose shape is not the one the operation needs."""


class DtypeError(KvarnError, ValueError):
    """A tensor whose element type is not accepted."""


class StrideError(KvarnError, ValueError):
    """A tensor whose strides cannot be read without a copy, or whose memory overlaps where it is written."""


class DeviceError(KvarnError, ValueError):
    """A tensor on a device that this cache does not live on."""


class NonFiniteError(KvarnError, ValueError):
    """A NaN or an infinity in keys or values; nothing was written."""
