"""A vLLM plugin: `--kv-cache-dtype kvarn_int8` (or another of kvarn's formats) in stock vLLM, without other flags.

vLLM finds `register` by its entry point and calls it in each of its processes. Everything that moves between vLLM's
releases is in `compat`, `compat_metrics` and `compat_cpu`.
"""

from __future__ import annotations

import importlib.metadata
import logging

TESTED_VERSIONS = ("0.26", "0.32")
"""Releases of vLLM that the plugin is tested with, without their patch numbers."""

_logger = logging.getLogger("vllm.kvarn_rs")
_registered = False


def register() -> None:
    """Adds kvarn's formats to vLLM. Never raises; in a release that is not tested it does nothing but log one line."""
    global _registered
    if _registered:
        return
    _registered = True
    try:
        version = importlib.metadata.version("vllm")
        if not is_tested(version):
            tested = ", ".join(f"{known}.x" for known in TESTED_VERSIONS)
            _logger.warning("kvarn-rs is disabled: vLLM %s is not one of the tested releases (%s)", version, tested)
            return
        from . import backend, compat, compat_metrics, metadata

        compat_metrics.install()
        compat.install(backend.backend_of, metadata.KVarnMetadataBuilder)
    except Exception:  # it would end every run of vLLM
        _logger.exception("kvarn-rs is disabled: it cannot be added to this vLLM")


def is_tested(version: str) -> bool:
    """Whether a version of vLLM is of a tested release."""
    return ".".join(version.split(".")[:2]) in TESTED_VERSIONS
