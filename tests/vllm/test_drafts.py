"""Draft models, whose layers have blocks and passes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
import apart
from models import SIZES, saved
from runs import MOST_DIVERGENCE, largest_divergence, same_tokens

NUM_TOKENS = 60  # sequences go over edges of blocks, with drafts on both sides
DRAFTS = 3
ALL_AT_ONCE = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 64}
ACCEPTED, DRAFTED = "vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens"
# Of a draft model with the target's weights: int4's rounding of either cache changes some of the likeliest tokens.
LEAST_ACCEPTED = 0.8


def answers(model: Path, cache_dtype: str, method: str, draft: Path, **options: Any) -> dict[str, Any]:
    """What `apart.run` finds, with drafts of a method."""
    speculation = {"method": method, "model": str(draft), "num_speculative_tokens": DRAFTS}
    return apart.run(model, cache_dtype, num_tokens=NUM_TOKENS, speculative_config=speculation, **options)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller Llama, none of whose drafts are right."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 4})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An EAGLE head of one layer."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = saved(LlamaForCausalLM, LlamaConfig(**{**SIZES, "num_hidden_layers": 1}), tmp_path_factory.mktemp("head"))
    weights = load_file(folder / "model.safetensors")
    layer = {name.removeprefix("model."): weight for name, weight in weights.items() if "layers.0." in name}
    del layer["layers.0.input_layernorm.weight"]
    fc = torch.randn(SIZES["hidden_size"], 2 * SIZES["hidden_size"]) / 16
    save_file({**layer, "fc.weight": fc}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def stock(model: Path) -> dict[str, Any]:
    """The answers of stock vLLM with a draft model of the same weights."""
    return answers(model, "auto", "draft_model", model)


@pytest.mark.slow
def test_raw_gives_the_tokens_and_accepts_the_drafts_of_stock_vllm(model: Path, stock: dict[str, Any]) -> None:
    found = answers(model, "kvarn_raw", "draft_model", model)
    assert same_tokens(stock["answers"], found["answers"])
    assert [found["metrics"][name] for name in (ACCEPTED, DRAFTED)] == [
        stock["metrics"][name] for name in (ACCEPTED, DRAFTED)
    ]


def test_a_draft_model_of_the_same_weights_is_mostly_right(model: Path, stock: dict[str, Any]) -> None:
    found = answers(model, "kvarn_int4", "draft_model", model, **ALL_AT_ONCE)
    assert largest_divergence(stock["answers"], found["answers"]) < MOST_DIVERGENCE["int4"]
    assert found["metrics"][ACCEPTED] > LEAST_ACCEPTED * found["metrics"][DRAFTED]
    assert len([line for line in found["log"].splitlines() if "kvarn-rs: int4, 2 layers" in line]) == 2
    nothing_is_left(found, [2, 2])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_drafts_that_are_wrong_change_no_token(
    method: str, model: Path, other: Path, head: Path, stock: dict[str, Any]
) -> None:
    draft = {"draft_model": other, "eagle": head}[method]
    found = answers(model, "kvarn_int4", method, draft, **ALL_AT_ONCE)
    assert found["metrics"][DRAFTED] > 0
    assert found["metrics"][ACCEPTED] < found["metrics"][DRAFTED] / 10
    assert largest_divergence(stock["answers"], found["answers"]) < MOST_DIVERGENCE["int4"]
    nothing_is_left(found, [2, 1])


@pytest.mark.slow
def test_requests_that_are_preempted_give_the_pages_of_both_models_back(model: Path, stock: dict[str, Any]) -> None:
    options = {"num_gpu_blocks_override": 12, "max_num_batched_tokens": 256}
    found = answers(model, "kvarn_int4", "draft_model", model, **options)
    assert found["metrics"]["vllm:num_preemptions"] > 0
    assert largest_divergence(stock["answers"], found["answers"]) < MOST_DIVERGENCE["int4"]
    nothing_is_left(found, [2, 2])


def nothing_is_left(found: dict[str, Any], num_layers: list[int]) -> None:
    """Every group has sealed blocks, and has neither pages nor requests any more."""
    assert found["metrics"]["vllm:kv_cache_usage_perc"] == 0
    (worker,) = found["workers"]
    assert [group["num_layers"] for group in worker["groups"]] == num_layers
    for group in worker["groups"]:
        assert group["sealed"] > 0
        assert (group["open_pages"], group["requests"]) == (0, 0)
