"""Engines of several processes: vLLM's own, and tensor parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
import apart
import runs
from test_formats import MOST_DIVERGENCE

pytestmark = pytest.mark.slow

ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
RANKS = 2


def answers(found: dict) -> list[runs.Answer]:
    return [runs.Answer(*answer) for answer in found["answers"]]


@pytest.fixture(scope="module", params=[1, RANKS], ids=["one rank", "two ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    """Ranks of tensor parallelism."""
    return request.param


@pytest.fixture(scope="module")
def stock(model: Path, ranks: int) -> list[runs.Answer]:
    """Stock vLLM's answers with as many ranks."""
    return answers(run(model, "auto", ranks))


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
    assert runs.largest_divergence(stock, answers(found)) < MOST_DIVERGENCE[format]
    if format == "raw":
        assert runs.same_tokens(stock, answers(found))
    assert len({worker["process"] for worker in found["workers"]}) == ranks
    for worker in found["workers"]:
        assert worker["formats"] == [format]
        assert worker["num_kv_heads"] == [2 // ranks]
        assert worker["open_pages"] == worker["requests"] == 0
        assert (worker["sealed"] > 0) == (format == "int4")
    assert found["cache_usage"] == [0]
