"""The plugin is added whole, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
from kvarn_rs.vllm import compat, formats

PROGRAM = """
import sys
from typing import get_args
from unittest import mock

import kvarn_rs.vllm
from kvarn_rs.vllm import compat, compat_metrics
from pydantic import dataclasses
from vllm.config import cache
from vllm.engine.arg_utils import EngineArgs

def accepts(cache_dtype):
    options = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True, kv_cache_dtype=cache_dtype)
    try:
        options.create_engine_config()
    except ValueError as error:
        assert "kvarn_int8" in str(error), error
        return False
    return True

def register(expected):
    kvarn_rs.vllm._registered = False
    with mock.patch.object(kvarn_rs.vllm, "_logger") as logger:
        kvarn_rs.vllm.register()
    assert logger.exception.called != expected
    assert ("kvarn_int8" in get_args(cache.CacheDType)) == expected
    assert accepts("kvarn_int8") == expected
    assert accepts("auto")

parts = ["_select_backend", "_check_engine_configs", "_size_blocks", "_add_cache_dtypes"]
for owner, name in [(compat_metrics, "install"), *((compat, part) for part in parts)]:
    with mock.patch.object(owner, name, side_effect=AttributeError("another vLLM")):
        register(False)
failures = [TypeError("another pydantic")]
real = dataclasses.rebuild_dataclass

def rebuild(*arguments, **options):
    if failures:
        raise failures.pop()
    return real(*arguments, **options)

with mock.patch.object(dataclasses, "rebuild_dataclass", side_effect=rebuild):
    register(False)
register(True)
"""


@pytest.mark.slow
def test_a_part_that_cannot_be_added_leaves_vllm_as_it_is(model: Path) -> None:
    environment = {**os.environ, "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-c", PROGRAM, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_smallest_block_is_that_of_the_plan_on_every_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    assert compat.smallest_block() in (None, formats.SMALLEST_UNQUANTIZED_BLOCK)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert compat.smallest_block() == formats.SMALLEST_UNQUANTIZED_BLOCK
