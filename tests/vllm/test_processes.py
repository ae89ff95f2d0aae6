"""Engines of several processes: vLLM's own, and tensor parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
import apart
import runs

pytestmark = pytest.mark.slow

ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
RANKS = 2


@pytest.fixture(scope="module", params=[1, RANKS], ids=["one rank", "two ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    """Ranks of tensor parallelism."""
    return request.param


@pytest.fixture(scope="module")
def stock(model: Path, ranks: int) -> list[runs.Answer]:
    """Stock vLLM's answers with as many ranks."""
    return run(model, "auto", ranks)["answers"]


def run(model: Path, cache_dtype: str, ranks: int) -> dict:
    return apart.run(
        model,
        cache_dtype,
        ENGINE,
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp",
        enable_prefix_caching=True,
        max_num_batched_tokens=256,
    )


@pytest.mark.parametrize("format", ["raw", "int4"])
def test_an_engine_of_several_processes_answers_as_stock_vllm_and_leaves_nothing(
    model: Path, stock: list[runs.Answer], ranks: int, format: str
) -> None:
    found = run(model, f"kvarn_{format}", ranks)
    assert runs.largest_divergence(stock, found["answers"]) < runs.MOST_DIVERGENCE[format]
    if format == "raw":
        assert runs.same_tokens(stock, found["answers"])
    assert len({worker["process"] for worker in found["workers"]}) == ranks
    for worker in found["workers"]:
        (group,) = worker["groups"]
        assert group["format"] == format
        assert group["num_kv_heads"] == 2 // ranks
        assert group["open_pages"] == group["requests"] == 0
        assert (group["sealed"] > 0) == (format == "int4")
    assert found["metrics"]["vllm:kv_cache_usage_perc"] == 0
