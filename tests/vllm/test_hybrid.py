"""A model with sliding-window and full attention: which layers are quantized, and what their blocks hold."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
from models import SIZES, saved
from runs import (
    MOST_DIVERGENCE,
    MOST_DIVERGENCE_IN_16_BITS,
    blocks_in_use,
    finish,
    greedy,
    groups,
    largest_divergence,
    make_llm,
    num_blocks,
)

from kvarn_rs.errors import UnsupportedError
from kvarn_rs.vllm import compat, formats

needs_blocks_of_several_sizes = pytest.mark.skipif(
    compat.smallest_block() is None, reason="vLLM's own CPU attention has blocks of one size in this release"
)


@pytest.fixture(scope="module")
def hybrid_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma of three sliding layers, whose queries see 100 tokens, and a full one."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = [*["sliding_attention"] * 3, "full_attention"]
    options = {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 100, "query_pre_attn_scalar": 64}
    folder = tmp_path_factory.mktemp("hybrid_model")
    return saved(Gemma3ForCausalLM, Gemma3TextConfig(**{**SIZES, **options}), folder)


@pytest.fixture(scope="module")
def expected(hybrid_model: Path) -> list[Any]:
    """Stock vLLM's tokens and log probabilities."""
    return greedy(make_llm(hybrid_model, "auto"))


@needs_blocks_of_several_sizes
@pytest.mark.parametrize("format", ["raw", "int8"])
def test_full_attention_alone_is_quantized_by_default(hybrid_model: Path, expected: list[Any], format: str) -> None:
    llm = make_llm(hybrid_model, f"kvarn_{format}", enable_prefix_caching=True)
    (group,) = groups(llm)
    assert group.engine.num_layers == 1
    for _ in range(2):  # the second time finds prefixes in all groups
        assert largest_divergence(expected, greedy(llm)) < MOST_DIVERGENCE[format]
    finish(llm)
    assert blocks_in_use(llm) == 0


@needs_blocks_of_several_sizes
def test_blocks_that_are_sealed_go_with_unquantized_layers_beside_them(hybrid_model: Path) -> None:
    stock = greedy(make_llm(hybrid_model, "auto", dtype="bfloat16"))  # in 32 bits, no unquantized block fits
    llm = make_llm(hybrid_model, "kvarn_int4", dtype="bfloat16", enable_prefix_caching=True)
    (group,) = groups(llm)
    assert group.engine.num_layers == 1
    for _ in range(2):  # the second time finds prefixes in all groups
        assert largest_divergence(stock, greedy(llm)) < MOST_DIVERGENCE_IN_16_BITS["int4"]
    finish(llm)
    assert blocks_in_use(llm) == 0
    assert group.engine.stats()["sealed"] > 0
    assert (group.engine.stats()["open_pages"], group.num_requests) == (0, 0)


@needs_blocks_of_several_sizes
def test_a_pool_of_mixed_layers_has_the_blocks_of_the_format(hybrid_model: Path) -> None:
    stock, ours = (num_blocks(make_llm(hybrid_model, name)) for name in ("auto", "kvarn_int8"))
    raw, int8 = (formats.token_bytes(name, SIZES["head_dim"], "float32") for name in ("raw", "int8"))
    assert ours == pytest.approx(stock * raw / int8, rel=0.01)


@needs_blocks_of_several_sizes
@needs_blocks_of_several_sizes
def test_the_log_claims_no_tokens_of_a_pool_that_other_groups_share(
    hybrid_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    logger = logging.getLogger("vllm.kvarn_rs")
    monkeypatch.setattr(logger, "info", lambda text, *values: messages.append(text % values))
    llm = make_llm(hybrid_model, "kvarn_int4")
    (line,) = [message for message in messages if message.startswith("kvarn-rs: int4")]
    assert f"{num_blocks(llm)} blocks of 128 tokens for " in line


def test_layers_named_by_hand_are_not_quantized(hybrid_model: Path, expected: list[Any]) -> None:
    llm = make_llm(hybrid_model, "kvarn_int8", kv_cache_dtype_skip_layers=["0", "3"])
    assert sum(group.engine.num_layers for group in groups(llm)) == 2
    assert largest_divergence(expected, greedy(llm)) < MOST_DIVERGENCE["int8"]


def test_sliding_layers_are_quantized_where_they_are_asked_for(hybrid_model: Path, expected: list[Any]) -> None:
    options = {"additional_config": {"kvarn": {"sliding_window": True}}}
    llm = make_llm(hybrid_model, "kvarn_int8", enable_prefix_caching=True, **options)
    assert sum(group.engine.num_layers for group in groups(llm)) == 4
    for _ in range(2):
        assert largest_divergence(expected, greedy(llm)) < MOST_DIVERGENCE["int8"]


def test_sliding_layers_are_quantized_where_no_unquantized_block_fits(hybrid_model: Path) -> None:
    llm = make_llm(hybrid_model, "kvarn_int2")  # 20 float32 tokens take the bytes of a block
    assert sum(group.engine.num_layers for group in groups(llm)) == 4
    with pytest.raises(UnsupportedError, match="skip-layers sliding_window"):
        make_llm(hybrid_model, "kvarn_int2", kv_cache_dtype_skip_layers=["sliding_window"])
