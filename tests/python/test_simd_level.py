"""`KVARN_SIMD`, which selects the SIMD level of a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

LEVELS = ["scalar", "avx2", "avx512"]
# Products of 32 unit normals and a softmax, summed in another order.
TOLERANCE = 1e-5

CODE = """
import json, numpy as np, kvarn_rs
from kvarn_rs import _core
report = {}
try:
    report["level"] = _core.simd_level()
    cache = kvarn_rs.PagedKvCache(num_layers=1, num_kv_heads=2, head_dim=32, block_size=16)
    step = cache.begin_step([cache.new_sequence()], 33)
    k, v, q = np.random.default_rng(0).normal(size=(3, 1, 2, 33, 32)).astype(np.float32)
    step.append(0, k, v)
    report["out"] = step.attend(0, q, None, None).tolist()
    step.commit()
    report["file"] = cache.to_bytes().hex()
except kvarn_rs.KvarnError as error:
    report["error"] = [type(error).__name__, str(error)]
print(json.dumps(report))
"""


def report(level: str | None) -> dict[str, Any]:
    """What a process finds whose `KVARN_SIMD` is `level`."""
    environment = {name: value for name, value in os.environ.items() if name != "KVARN_SIMD"}
    if level is not None:
        environment["KVARN_SIMD"] = level
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def test_a_process_uses_the_level_that_is_named() -> None:
    best, scalar = report(None), report("scalar")
    assert best["level"] in LEVELS
    for level in LEVELS:
        found = report(level)
        if LEVELS.index(level) > LEVELS.index(best["level"]):
            assert found["error"] == ["UnsupportedError", f"this machine does not have SIMD level {level}"]
            continue
        assert found["level"] == level
        assert found["file"] == scalar["file"], "every level writes the same bytes"
        np.testing.assert_allclose(found["out"], scalar["out"], rtol=TOLERANCE, atol=TOLERANCE)
    assert report("")["level"] == best["level"], "nothing is named"


@pytest.mark.parametrize("level", ["avx1024", "AVX2", " scalar", "\udcff"])
def test_an_unknown_level_is_a_typed_error_that_lists_the_known_ones(level) -> None:
    kind, message = report(level)["error"]
    assert kind == "ConfigError"
    shown = level.replace("\udcff", "\ufffd")  # a byte that is not UTF-8
    assert all(part in message for part in (f'"{shown}"', *LEVELS)), message
