"""Prefills by vLLM's own kernels, in real vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
from runs import MOST_DIVERGENCE, blocks_in_use, finish, greedy, largest_divergence, make_llm

from kvarn_rs.vllm import prefill

# Between two bfloat16 computations of the random model, at its worst token: twice what was seen.
BFLOAT16_DIVERGENCE = 2e-4
# Steps with decodes, parts of prompts, and histories that end within blocks and within windows.
OPTIONS = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 100}
HISTORY_TOKENS = 90


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Rows and prefills of each call."""
    found = []
    forward = prefill.PrefillAttention.forward

    def noted(self: Any, layer: int, batches: list[Any], q: Any, *args: Any, **kwargs: Any) -> None:
        found.append((len(q), [one for batch in batches for one in batch.prefills]))
        forward(self, layer, batches, q, *args, **kwargs)

    monkeypatch.setattr(prefill, "HISTORY_TOKENS", HISTORY_TOKENS)
    monkeypatch.setattr(prefill.PrefillAttention, "forward", noted)
    return found


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def stock(request: pytest.FixtureRequest, model: Path) -> tuple[str, list[Any]]:
    """A dtype, and stock vLLM's tokens and log probabilities."""
    return request.param, greedy(make_llm(model, "auto", dtype=request.param))


@pytest.mark.parametrize("format", ["raw", "int8"])
def test_distributions_are_close_to_stock_vllm_s(
    model: Path, stock: tuple[str, list[Any]], format: str, steps: list[Any]
) -> None:
    dtype, expected = stock
    llm = make_llm(model, f"kvarn_{format}", dtype=dtype, **OPTIONS)
    most = MOST_DIVERGENCE[format] if dtype == "float32" else BFLOAT16_DIVERGENCE
    for _ in range(2):  # the second time finds prefixes
        steps.clear()
        found = greedy(llm)
        assert largest_divergence(expected, found) < most
        if (dtype, format) == ("float32", "raw"):
            assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
        assert any(one.context_len > HISTORY_TOKENS for _, sequences in steps for one in sequences)
        assert any(rows > sum(one.rows.stop - one.rows.start for one in sequences) for rows, sequences in steps)
    finish(llm)
    assert blocks_in_use(llm) == 0
