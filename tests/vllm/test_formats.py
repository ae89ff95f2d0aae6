"""Every format, with each feature of vLLM that decides which tokens a step has, against stock vLLM."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")

import runs

from kvarn_rs import FORMATS

FEATURE_NAMES = ["plain", "prefix caching", "chunked prefill", "preemption", "ngram speculation", "all at once"]
SEALS = ("int4", "int3", "int2")


QUICK = "all at once"
FORMATS_BY_COST = [pytest.param(name, marks=pytest.mark.slow if name in ("int3", "int2") else ()) for name in FORMATS]
FEATURES = [pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in FEATURE_NAMES]

Measured = Callable[[str, str], dict[str, Any]]


@pytest.fixture(scope="session")
def expected(model: Path) -> list[runs.Answer]:
    """Stock vLLM's answers."""
    return runs.greedy(runs.make_llm(model, "auto"))


@pytest.fixture(scope="session")
def measured(model: Path, expected: list[runs.Answer]) -> Measured:
    """What `runs.measure` says of a feature and a format, run once."""
    return cache(lambda feature, format: runs.measure(model, f"kvarn_{format}", feature, expected))


@pytest.mark.parametrize("feature", FEATURES)
def test_raw_gives_the_tokens_of_stock_vllm(measured: Measured, feature: str) -> None:
    assert measured(feature, "raw")["same_tokens"] == [True] * runs.PASSES


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("format", FORMATS_BY_COST)
def test_distributions_are_close_to_stock_vllm_s(
    measured: Measured, record_property: Callable[[str, object], None], format: str, feature: str
) -> None:
    divergence = max(measured(feature, format)["divergences"])
    record_property("divergence", divergence)  # for benches/record
    assert divergence < runs.MOST_DIVERGENCE[format]


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("format", FORMATS_BY_COST)
def test_no_block_and_no_page_is_left_in_use(measured: Measured, format: str, feature: str) -> None:
    found = measured(feature, format)
    assert found["blocks_in_use"] == 0
    assert found["open_pages"] == 0
    assert found["requests"] == 0
    assert found["sealed"] > 0 if format in SEALS else found["sealed"] == 0
    assert found["peak_open_pages"] <= found["num_open_pages"]


@pytest.mark.slow
def test_preemption_happened(measured: Measured) -> None:
    for format in FORMATS:
        assert measured("preemption", format)["preempted"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("format", "factor"), [("int8", 1.85), ("int4", 3.4), ("int3", 4.3), ("int2", 5.5)])
def test_more_tokens_fit_than_in_bfloat16(measured: Measured, format: str, factor: float) -> None:
    in_bfloat16 = 2 * measured("plain", "raw")["num_blocks"]
    assert measured("plain", format)["num_blocks"] >= factor * in_bfloat16
