"""`kvarn plan --engine vllm` against the pool that vLLM makes, and the pages that kvarn allocates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
from models import SIZES, saved
from runs import KV_CACHE_BYTES, core, groups, make_llm, num_blocks

from kvarn_rs.cli import main
from kvarn_rs.vllm import compat

STEP = 256
MAX_SEQS = 8
MAX_LEN = 1000
FORMATS = ("int8", "int4", "int2")


@pytest.fixture(scope="module")
def mixed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma of five layers, of which one sees all tokens and the others see 200."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    sizes = {**SIZES, "num_hidden_layers": len(kinds), "layer_types": kinds, "sliding_window": 200}
    return saved(Gemma3ForCausalLM, Gemma3TextConfig(**sizes), tmp_path_factory.mktemp("mixed_model"))


@pytest.fixture(scope="module")
def draft_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with four kv heads, so that its tokens take other bytes than the model's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 4})
    return saved(LlamaForCausalLM, config, tmp_path_factory.mktemp("draft_model"))


def planned(model: Path, capfd: pytest.CaptureFixture[str], *more: str) -> dict[str, dict[str, Any]]:
    capfd.readouterr()
    options = ["--engine", "vllm", "--kv-cache-memory", str(KV_CACHE_BYTES), "--context", str(MAX_LEN)]
    limits = ["--max-seqs", str(MAX_SEQS), "--max-batched-tokens", str(STEP)]
    assert main(["plan", str(model), *options, *limits, *more, "--json"]) == 0
    return {row["format"]: row for row in json.loads(capfd.readouterr().out)["formats"]}


needs_blocks_of_several_sizes = pytest.mark.skipif(
    compat.smallest_block() is None, reason="this release quantizes sliding layers too, and the plan is of later ones"
)


@pytest.mark.parametrize(
    "kind",
    [
        "model",
        pytest.param("sliding_model", marks=pytest.mark.slow),
        pytest.param("mixed_model", marks=[pytest.mark.slow, needs_blocks_of_several_sizes]),
    ],
)
def test_blocks_and_tokens_are_those_of_vllm(
    kind: str, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    model = request.getfixturevalue(kind)
    check(model, planned(model, capfd))


def test_layers_of_a_draft_model_are_counted(model: Path, draft_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    speculation = {"method": "draft_model", "model": str(draft_model), "num_speculative_tokens": 3}
    check(model, planned(model, capfd, "--draft-model", str(draft_model)), speculative_config=speculation)


def check(model: Path, plan: dict[str, dict[str, Any]], **more: Any) -> None:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity  # pyright: ignore[reportMissingImports]

    for format in FORMATS:
        options = {"dtype": "bfloat16", "max_model_len": MAX_LEN, "max_num_batched_tokens": STEP}
        llm = make_llm(model, f"kvarn_{format}", **options, **more)
        row = plan[format]
        assert row["num_blocks"] == num_blocks(llm)
        tokens, _ = get_kv_cache_capacity(core(llm).vllm_config, core(llm).scheduler.kv_cache_config)
        assert row["tokens"] == pytest.approx(tokens, abs=1)  # vLLM rounds a product of floats down
        pages = [pages for layer in _layers(llm) if (pages := getattr(layer.impl, "open_pages", None)) is not None]
        assert row["open_pages_bytes"] == sum(found.nbytes for found in pages)
        assert {row["open_pages"]} == {group.num_open_pages for group in groups(llm)}
        if format == "int8":
            assert not pages


def _layers(llm: Any) -> list[Any]:
    runner = core(llm).model_executor.driver_worker.worker.model_runner
    context = runner.vllm_config.compilation_config.static_forward_context
    return [layer for layer in context.values() if hasattr(layer, "impl")]
