"""Every format, with each feature of vLLM that decides which tokens a step has, against stock vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")

from kvarn_rs import FORMATS

# Rounding of float32 sums in another order than stock vLLM's.
RAW_DIVERGENCE = 1e-5
# Of the random model, at its worst token: twice what was seen. A wrong block, token or statistic gives 3e-2 and more.
MOST_DIVERGENCE = {"raw": RAW_DIVERGENCE, "int8": 1e-4, "int4": 2e-2, "int3": 7e-2, "int2": 2.5e-1}
FEATURE_NAMES = ["plain", "prefix caching", "chunked prefill", "preemption", "ngram speculation", "all at once"]
SEALS = ("int4", "int3", "int2")


QUICK = "all at once"
FORMATS_BY_COST = [pytest.param(name, marks=pytest.mark.slow if name in ("int3", "int2") else ()) for name in FORMATS]
FEATURES = [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in FEATURE_NAMES]
# vLLM 0.32 makes no second engine in a process after one with speculation.
ONE_FORMAT_A_PROCESS = ("ngram speculation", "all at once")


@pytest.fixture(scope="session")
def measured(model: Path) -> Callable[[str, str], dict[str, Any]]:
    """What `measure.py` prints of a feature and a format."""
    found: dict[tuple[str, str], dict[str, Any]] = {}

    def measure(feature: str, format: str) -> dict[str, Any]:
        if (feature, format) not in found:
            formats = [format] if feature in ONE_FORMAT_A_PROCESS else FORMATS
            script = Path(__file__).with_name("measure.py")
            command = [sys.executable, str(script), str(model), feature, *formats]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
            for name, figures in json.loads(done.stdout.splitlines()[-1]).items():
                found[feature, name] = figures
        return found[feature, format]

    return measure


@pytest.mark.parametrize("feature", FEATURES)
def test_raw_gives_the_tokens_of_stock_vllm(measured: Callable[[str, str], dict[str, Any]], feature: str) -> None:
    for found in measured(feature, "raw")["passes"]:
        assert found["same_tokens"]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("format", FORMATS_BY_COST)
def test_distributions_are_close_to_stock_vllm_s(
    measured: Callable[[str, str], dict[str, Any]], format: str, feature: str
) -> None:
    for found in measured(feature, format)["passes"]:
        assert found["divergence"] < MOST_DIVERGENCE[format]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("format", FORMATS_BY_COST)
def test_no_block_and_no_page_is_left_in_use(
    measured: Callable[[str, str], dict[str, Any]], format: str, feature: str
) -> None:
    found = measured(feature, format)
    assert found["blocks_in_use"] == 0
    assert found["open_pages"] == 0
    assert found["requests"] == 0
    assert found["sealed"] > 0 if format in SEALS else found["sealed"] == 0
    assert found["peak_open_pages"] <= found["num_open_pages"]


@pytest.mark.slow
def test_preemption_happened(measured: Callable[[str, str], dict[str, Any]]) -> None:
    for format in FORMATS:
        assert measured("preemption", format)["preempted"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("format", "factor"), [("int8", 1.85), ("int4", 3.4), ("int3", 4.3), ("int2", 5.5)])
def test_more_tokens_fit_than_in_bfloat16(
    measured: Callable[[str, str], dict[str, Any]], format: str, factor: float
) -> None:
    in_bfloat16 = 2 * measured("plain", "raw")["num_blocks"]
    assert measured("plain", format)["num_blocks"] >= factor * in_bfloat16
