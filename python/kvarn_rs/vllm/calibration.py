"""The calibration that the layers of a model share in vLLM."""

from __future__ import annotations

from typing import Any

from kvarn_rs import Calibration

from . import settings


def calibration_of(config: Any) -> Calibration:
    """The file that `--additional-config '{"kvarn": {"calibration": FILE}}'` names, or one that learns.

    Raises:
        CalibrationError: not a calibration file, damaged, or of another version.
    """
    path = settings.kvarn_options(config).get("calibration")
    return Calibration() if path is None else Calibration.load(path)
