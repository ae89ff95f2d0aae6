"""`kvarn plan --engine vllm` against figures computed by hand; tests/vllm has vLLM's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvarn_rs.cli import plan_vllm
from kvarn_rs.cli.model_shape import LayerGroup
from kvarn_rs.vllm import formats, settings

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
GEMMA = {
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_size": 640,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
}
GIB = 2**30
VLLM = ("--engine", "vllm", "--max-seqs", "256", "--max-batched-tokens", "8192", "--context", "32k", "--json")
PAGES = 3 * 256 + 64  # 3 a sequence, and one for each 128 tokens of a step
PAGE = 34048  # of one head of 128 channels, in int8


def by_format(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["format"]: row for row in report["formats"]}


def test_a_block_of_vllm_has_whole_bytes_a_token_and_pages_are_beside_the_pool(
    kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    file = config_file(**LLAMA_3_8B)
    rows = by_format(kvarn("plan", file, *VLLM, "--kv-cache-memory", "64GiB").json)
    block = 32 * 8 * 128 * 140  # a tile of 17,808 bytes has 139.125 a token
    assert rows["int4"] == {
        "format": "int4",
        "bytes_per_token": 32 * 8 * 140,
        "num_blocks": 64 * GIB // block,
        "block_bytes": block,
        "tokens": 64 * GIB // block * 128,
        "sequences": (64 * GIB // block - 1) // 256,
        "sequence_bytes": 256 * block,
        "pool_bytes": 64 * GIB,
        "open_pages": PAGES,
        "open_pages_bytes": PAGES * 32 * 8 * PAGE,
    }
    assert rows["bf16"]["num_blocks"] == 64 * GIB // (32 * 8 * 128 * 512)
    assert rows["int8"]["num_blocks"] == 64 * GIB // (32 * 8 * 128 * 266)
    assert rows["int8"]["open_pages"] == rows["int8"]["open_pages_bytes"] == 0


def test_open_pages_are_part_of_the_memory_of_a_gpu(
    kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    report = kvarn("plan", config_file(**LLAMA_3_8B), *VLLM, "--memory", "80GiB", "--weights", "16GiB", "--tp", 2).json
    rows = by_format(report)
    assert rows["int8"]["pool_bytes"] == 64 * GIB
    assert rows["int4"]["open_pages_bytes"] == PAGES * 32 * 4 * PAGE
    assert rows["int4"]["pool_bytes"] == 64 * GIB - PAGES * 32 * 4 * PAGE
    assert rows["int4"]["num_blocks"] == rows["int4"]["pool_bytes"] // (32 * 4 * 128 * 140)
    assert (report["engine"], report["max_sequences"], report["max_batched_tokens"]) == ("vllm", 256, 8192)


def test_a_draft_model_s_layers_are_in_the_blocks_and_have_open_pages(
    kvarn: Callable[..., Any], config_file: Callable[..., Path], tmp_path: Path
) -> None:
    draft = tmp_path / "draft.json"
    draft.write_text(json.dumps({**LLAMA_3_8B, "num_hidden_layers": 4, "num_key_value_heads": 2}))
    memory = ("--kv-cache-memory", "64GiB")
    done = kvarn("plan", config_file(**LLAMA_3_8B), *VLLM, *memory, "--draft-model", draft)
    row = by_format(done.json)["int4"]
    assert row["block_bytes"] == (32 * 8 + 4 * 2) * 128 * 140
    assert row["open_pages_bytes"] == PAGES * (32 * 8 + 4 * 2) * PAGE
    assert done.json["draft_layers"] == [{"num_layers": 4, "num_kv_heads": 2, "head_dim": 128, "window": None}]
    assert any("draft model" in note for note in done.json["notes"])


@pytest.mark.parametrize("is_draft", [True, False])
def test_draft_models_with_windows_or_without_vllm_are_refused(
    kvarn: Callable[..., Any], config_file: Callable[..., Path], tmp_path: Path, is_draft: bool
) -> None:
    draft = tmp_path / "draft.json"
    draft.write_text(json.dumps(LLAMA_3_8B if is_draft else mixed(1, 3)))
    model = config_file(**(mixed(1, 3) if is_draft else LLAMA_3_8B))
    refused = kvarn("plan", model, *VLLM, "--kv-cache-memory", "1GiB", "--draft-model", draft).refused()
    assert "window" in refused
    refused = kvarn("plan", model, "--memory", "8GiB", "--draft-model", draft).refused()
    assert "--draft-model are for --engine vllm" in refused


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int2"])
def test_the_plan_and_the_plugin_agree_on_layers_that_stay_unquantized(name: str, head_dim: int) -> None:
    text_config = SimpleNamespace(layer_types=["sliding_attention", "full_attention"])
    model = SimpleNamespace(hf_text_config=text_config, dtype="bfloat16", get_head_size=lambda: head_dim)
    cache = SimpleNamespace(cache_dtype=f"kvarn_{name}", kv_cache_dtype_skip_layers=[])
    config = SimpleNamespace(model_config=model, cache_config=cache, additional_config={})
    skipped = settings.skipped_layers(config, formats.SMALLEST_UNQUANTIZED_BLOCK)
    layers = [(LayerGroup(1, 1, head_dim, window), 1) for window in (100, None)]
    blocks = {tokens for _, tokens in plan_vllm.layout(layers, name).groups}
    assert (len(blocks) == 2) == (skipped == ["sliding_window"])


# (full layers, sliding layers): layers of a group, groups that are full, groups that slide.
LAYOUTS = [(3, 15, 3, (1, 5)), (12, 13, 13, (1, 1)), (4, 6, 4, (1, 2))]
STEP = 511 + 8192  # tokens of a sequence in a sliding layer: the window but one, and what a step adds


def mixed(full: int, sliding: int) -> dict[str, Any]:
    kinds = ["full_attention"] * full + ["sliding_attention"] * sliding
    return {**GEMMA, "num_hidden_layers": len(kinds), "layer_types": kinds}


@pytest.mark.parametrize(("full", "sliding", "of_group", "groups"), LAYOUTS)
# Bytes of a block, and the power of two of tokens in bfloat16 (1,024 bytes) that these hold.
@pytest.mark.parametrize(("name", "size", "tokens"), [("int8", 128 * 526, 64), ("int4", 128 * 273, 32)])
def test_sliding_layers_beside_full_ones_are_not_quantized_and_their_blocks_have_the_same_bytes(
    name: str,
    size: int,
    tokens: int,
    full: int,
    sliding: int,
    of_group: int,
    groups: tuple[int, int],
    kvarn: Callable[..., Any],
    config_file: Callable[..., Path],
) -> None:
    report = kvarn("plan", config_file(**mixed(full, sliding)), *VLLM, "--kv-cache-memory", "1GiB").json
    row = by_format(report)[name]
    block = of_group * size
    blocks = groups[0] * 256 + groups[1] * (-(-STEP // tokens) + 1)
    assert row["block_bytes"] == block
    assert row["num_blocks"] == GIB // block
    assert row["tokens"] == GIB // block * 32768 // blocks
    assert row["sequences"] == (GIB // block - 1) // blocks
    assert row["open_pages_bytes"] == (0 if name == "int8" else PAGES * full * 128 * 526)
    assert f"{name}: sliding layers stay in bfloat16, in blocks of {tokens} tokens" in report["notes"]


def test_sliding_layers_are_quantized_where_a_block_holds_too_few_tokens_or_all_slide(
    kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    report = kvarn("plan", config_file(**mixed(3, 15)), *VLLM, "--kv-cache-memory", "1GiB").json
    row = by_format(report)["int2"]  # 147 bytes a token: 18 in bfloat16
    assert row["sequence_bytes"] == (256 + 5 * (-(-STEP // 128) + 1)) * row["block_bytes"]
    assert row["open_pages_bytes"] == PAGES * 18 * 128 * 526
    assert not [note for note in report["notes"] if note.startswith("int2:")]
    row = by_format(kvarn("plan", config_file(**mixed(0, 6)), *VLLM, "--kv-cache-memory", "1GiB").json)["int4"]
    assert row["sequence_bytes"] == (-(-STEP // 128) + 1) * row["block_bytes"]
    assert row["open_pages_bytes"] == PAGES * 6 * 128 * 526


def test_sequences_are_at_most_those_of_vllm_s_setting(
    kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    options = ("--engine", "vllm", "--max-seqs", "5", "--max-batched-tokens", "2k", "--context", "1k", "--json")
    row = by_format(kvarn("plan", config_file(**LLAMA_3_8B), *options, "--kv-cache-memory", "64GiB").json)["int8"]
    assert row["sequences"] == 5


def test_the_notes_say_where_open_pages_are(kvarn: Callable[..., Any], config_file: Callable[..., Path]) -> None:
    file = config_file(**LLAMA_3_8B)
    beside = kvarn("plan", file, *VLLM, "--kv-cache-memory", "64GiB").json["notes"]
    within = kvarn("plan", file, *VLLM, "--memory", "80GiB", "--weights", "1GiB").json["notes"]
    assert [note for note in beside if "beside --kv-cache-memory" in note]
    assert [note for note in within if "--gpu-memory-utilization" in note]


def test_the_pool_is_printed_as_a_table(kvarn: Callable[..., Any], config_file: Callable[..., Path]) -> None:
    done = kvarn("plan", config_file(**LLAMA_3_8B), *VLLM[:-1], "--kv-cache-memory", "64GiB")
    assert done.code == 0
    assert all(word in done.out for word in ("blocks", "open pages", "beside", "35,840.0", "14,979", "6.754 GiB"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--engine", "vllm", "--max-seqs", "2", "--memory", "1GiB"), "--max-batched-tokens"),
        (("--engine", "vllm", "--max-batched-tokens", "2k", "--memory", "1GiB"), "--max-seqs"),
        ((*VLLM, "--memory", "1GiB", "--block-size", "64"), "--block-size 64"),
        ((*VLLM, "--memory", "1GiB", "--kv-cache-memory", "1GiB"), "not allowed with"),
        ((*VLLM, "--kv-cache-memory", "1GiB", "--weights", "1GiB"), "--weights"),
        (("--kv-cache-memory", "1GiB"), "for --engine vllm"),
        (("--memory", "1GiB", "--max-batched-tokens", "2k"), "for --engine vllm"),
        (VLLM, "--kv-cache-memory"),
        ((*VLLM, "--memory", "6GiB", "--format", "int4"), "6.754 GiB of open pages"),
    ],
)
def test_options_that_do_not_go_together_and_too_little_memory_are_refused(
    change: tuple[str, ...], words: str, kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    assert words in kvarn("plan", config_file(**LLAMA_3_8B), *change).refused()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"global_head_dim": 128, "layer_types": ["sliding_attention", "full_attention"]}, "different bytes"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "constant state"),
        ({"attention_chunk_size": 256, "sliding_window": None}, "chunked attention"),
    ],
)
def test_layouts_of_vllm_that_are_not_planned_are_refused(
    fields: dict[str, Any], words: str, kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    file = config_file(**{**GEMMA, "num_hidden_layers": 2, **fields})
    assert words in kvarn("plan", file, *VLLM, "--memory", "64GiB", "--format", "int8").refused()
