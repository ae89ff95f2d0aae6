"""The calibration that the layers of a model share in vLLM: from a file made ahead, or learned."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvarn_rs import Calibration
from kvarn_rs.errors import CalibrationError, ConfigError
from kvarn_rs.identity import fingerprint_of_checkpoint, path_of

from . import settings

# Formats of `--load-format` that read the files which transformers reads.
_READS_SAFETENSORS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
_LEARNED = "learned from the first requests"

_logger = logging.getLogger("vllm.kvarn_rs")


@dataclass(frozen=True)
class Found:
    """A calibration, and where it is from, for the log."""

    calibration: Calibration
    origin: str


def calibration_of(config: Any, model: Any, layers: Iterable[int], rank: int, num_ranks: int) -> Found:
    """The calibration of a rank's layers.

    It is the file that `--additional-config '{"kvarn": {"calibration": FILE}}'` names, else the one that
    `kvarn calibrate` made of the same weights, else one that learns.

    Args:
        config: vLLM's.
        model: vLLM's config of the model that the layers are of: the one that is served, or its draft model.
        layers: their numbers.
        rank: of tensor parallelism.
        num_ranks: of it.

    Raises:
        CalibrationError: the file that was named cannot be read, is damaged, or is of another model.
    """
    layers = sorted(layers)
    named = named_file(config) if model is config.model_config else None
    known = fingerprint(config.load_config, model)
    if named is not None:
        compared = "" if known is not None else " (not compared with the model: there are no safetensors)"
        return Found(_load(named, known, model, layers).shard(rank, num_ranks), f"{named}{compared}")
    if known is None:
        return Found(Calibration(), f"{_LEARNED} (no safetensors to find a file by)")
    path = path_of(known)
    if not path.exists():
        return Found(Calibration(), f"{_LEARNED} (no {path})")
    try:
        return Found(_load(path, known, model, layers).shard(rank, num_ranks), str(path))
    except ConfigError as error:
        _logger.warning("kvarn-rs: %s. Going on without; `kvarn calibrate` makes it anew", error)
        return Found(Calibration(), _LEARNED)


def check_named(config: Any) -> None:
    """Refuses a calibration file that is not of the model, before the model is loaded.

    Raises:
        CalibrationError: as `calibration_of`.
    """
    named = named_file(config)
    if named is not None:
        _load(named, fingerprint(config.load_config, config.model_config), config.model_config, ())


def named_file(config: Any) -> str | None:
    """The calibration file that `--additional-config` names."""
    return settings.kvarn_options(config).get("calibration")


def _load(path: str | os.PathLike[str], known: str | None, model: Any, layers: Iterable[int]) -> Calibration:
    """A file, which must have these layers, and none that the model does not have."""
    calibration = Calibration.load(path, known)
    found = {layer["layer"] for layer in calibration.layers()}
    num_layers = model.get_total_num_hidden_layers()
    if max(found) >= num_layers:
        raise CalibrationError(
            f"{path}: a calibration of {calibration.model!r} up to layer {max(found)}; the last one here is "
            f"{num_layers - 1}"
        )
    missing = set(layers) - found
    if missing:
        raise CalibrationError(f"{path}: the calibration of {calibration.model!r} is without layers {sorted(missing)}")
    return calibration


def fingerprint(load: Any, model: Any) -> str | None:
    """The fingerprint of a model, from its files; None where they are of another kind, or not on this machine.

    Args:
        load: vLLM's config of how weights are loaded.
        model: vLLM's config of the model.
    """
    if load.load_format not in _READS_SAFETENSORS:
        return None
    folder = model.model
    if not os.path.isdir(folder):
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                folder, revision=model.revision, cache_dir=load.download_dir, local_files_only=True
            )
        except (OSError, ValueError):  # no repository's name, or nothing of it was fetched
            return None
    return fingerprint_of_checkpoint(folder, trust_remote_code=model.trust_remote_code)
