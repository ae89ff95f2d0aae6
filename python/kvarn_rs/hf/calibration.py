"""The calibration of a model: where it is kept, and which one a cache uses.

A calibration is shared by all caches of a model object. Without a file it learns from the model's first tokens; a file
made ahead (`calibrate`) makes results the same from the first token on. Files are named by the model's *fingerprint*:
another model, or the same loaded again after training, finds none. A model object keeps the calibration that its caches
began with.
"""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from kvarn_rs import Calibration
from kvarn_rs.errors import CalibrationError, ConfigError
from kvarn_rs.identity import path_of

from .fingerprint import fingerprint

_lock = threading.Lock()
_of_model: WeakKeyDictionary[Any, Calibration] = WeakKeyDictionary()
_warned: set[Path] = set()


def calibration_path(model: Any) -> Path:
    """The file of a model's calibration, whether it is there or not."""
    return path_of(fingerprint(model))


def resolve(model: Any, calibration: Calibration | str | os.PathLike[str] | None = None) -> Calibration:
    """The calibration that a cache of a model uses.

    Args:
        model: the model, or None where only its config is known.
        calibration: one, or the file of one; None: the model's own, which is the same for all its caches. That is its
            file in `identity.calibration_folder()` if there is one (looked for once), else one that learns.

    Raises:
        CalibrationError: a given file that cannot be read, is damaged, or is of another model. The model's own file is
            passed over with a warning in that case.
        ConfigError: neither a calibration nor a path.
    """
    if isinstance(calibration, Calibration):
        return calibration
    if isinstance(calibration, (str, os.PathLike)):
        return Calibration.load(calibration, None if model is None else fingerprint(model))
    if calibration is not None:
        raise ConfigError(f"calibration is a Calibration, a path or None, not {type(calibration).__name__}")
    if model is None:
        return Calibration()
    with _lock:
        if model not in _of_model:
            _of_model[model] = _from_folder(fingerprint(model))
        return _of_model[model]


def of_fingerprint(model_fingerprint: str | None) -> Calibration:
    """The calibration of a model that is not at hand: its file if there is one, else one that learns."""
    return Calibration() if model_fingerprint is None else _from_folder(model_fingerprint)


def _from_folder(model_fingerprint: str) -> Calibration:
    path = path_of(model_fingerprint)
    if not path.exists():
        return Calibration()
    try:
        return Calibration.load(path, model_fingerprint)
    except CalibrationError as error:
        if path not in _warned:
            _warned.add(path)
            message = f"kvarn: {error}. Going on without; `kvarn_rs.hf.calibrate(model)` makes it anew."
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        return Calibration()


def remember(model: Any, calibration: Calibration) -> None:
    """Makes a calibration the one that `resolve` finds for a model object."""
    with _lock:
        _of_model[model] = calibration
