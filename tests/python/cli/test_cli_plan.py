"""`kvarn plan` against figures computed by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
GIB = 2**30
PAGED = ["int8", "int4", "int3", "int2"]


def by_format(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["format"]: row for row in report["formats"]}


def test_capacity_of_llama_3_8b_matches_figures_computed_by_hand(
    kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    file = config_file(**LLAMA_3_8B)
    report = kvarn("plan", file, "--memory", "80GiB", "--weights", "16GiB", "--context", "32k", "--json").json
    rows = by_format(report)
    # 32 layers x 8 kv heads x 266 bytes; 64 GiB / (68,096 x 128) = 7,884.03 blocks; 64 GiB / (68,096 x 32,768) = 30.8
    assert rows["int8"]["bytes_per_token"] == 68096
    assert rows["int8"]["tokens"] == 7884 * 128
    assert rows["int8"]["sequences"] == 30
    # 32 x 8 x 512 bytes; 64 GiB / 131,072 = 524,288
    assert rows["bf16"] == {
        "format": "bf16",
        "bytes_per_token": 131072,
        "tokens": 524288,
        "sequences": 16,
        "sequence_bytes": 4 * GIB,
        "open_bytes": 0,
        "open_page_bytes": 0,
    }
    assert rows["fp8"]["bytes_per_token"] == 65536
    assert rows["fp8"]["sequences"] == 32
    assert report["context"] == 32768
    assert report["notes"] == []


# 32 layers x 8 kv heads of 256 blocks, a tile each, and of two pages of 34,048 bytes:
# 64 GiB / (256 x (256 x tile + 2 x 34,048)) = 58.02, 75.02 and 106.1.
@pytest.mark.parametrize(
    ("name", "tile", "per_token", "sequences"),
    [("int4", 17808, 139.125, 58), ("int3", 13712, 107.125, 75), ("int2", 9616, 75.125, 106)],
)
def test_formats_that_seal_take_tiles_and_two_open_pages_for_each_sequence(
    name: str,
    tile: int,
    per_token: float,
    sequences: int,
    kvarn: Callable[..., Any],
    config_file: Callable[..., Path],
) -> None:
    file = config_file(**LLAMA_3_8B)
    arguments = ("plan", file, "--memory", "80GiB", "--weights", "16GiB", "--context", "32k", "--json")
    open_pages = 256 * 2 * 34048
    assert by_format(kvarn(*arguments).json)[name] == {
        "format": name,
        "bytes_per_token": 256 * per_token,
        "tokens": (64 * GIB - sequences * open_pages) // (256 * tile) * 128,
        "sequences": sequences,
        "sequence_bytes": 256 * 256 * tile + open_pages,
        "open_bytes": open_pages,
        "open_page_bytes": open_pages,
    }
    capped = by_format(kvarn(*arguments, "--max-seqs", "2").json)[name]
    assert capped["sequences"] == 2
    assert capped["tokens"] == (64 * GIB - 2 * open_pages) // (256 * tile) * 128


def test_the_folder_of_a_config_is_accepted(kvarn: Callable[..., Any], config_file: Callable[..., Path]) -> None:
    file = config_file(**LLAMA_3_8B)
    arguments = ("--memory", "40GiB", "--json")
    assert kvarn("plan", file, *arguments).json == kvarn("plan", file.parent, *arguments).json


def test_a_partly_filled_block_counts_in_full_and_is_shown_separately(
    kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    file = config_file(**LLAMA_3_8B)
    row = by_format(kvarn("plan", file, "--memory", "1GiB", "--context", "129", "--json").json)["int8"]
    assert row["sequence_bytes"] == 2 * 128 * 68096
    assert row["open_bytes"] == 127 * 68096
    assert row["bytes_per_token"] == 2 * 128 * 68096 / 129
    sealed = by_format(kvarn("plan", file, "--memory", "1GiB", "--context", "129", "--json").json)["int4"]
    assert sealed["sequence_bytes"] == 256 * (2 * 17808 + 2 * 34048)
    assert sealed["open_bytes"] == 256 * 17808 * 127 // 128 + sealed["open_page_bytes"]
    assert sealed["bytes_per_token"] == 256 * 2 * 17808 / 129


@pytest.mark.parametrize(("gpus", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1)])
def test_kv_heads_divide_among_gpus_and_never_below_one(
    gpus: int, heads: int, kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    report = kvarn("plan", config_file(**LLAMA_3_8B), "--memory", "8GiB", "--tp", gpus, "--json").json
    assert by_format(report)["int8"]["bytes_per_token"] == 32 * heads * 266
    assert any("heads are replicated" in note for note in report["notes"]) == (gpus > 8)


def test_gpus_that_heads_do_not_divide_among_are_refused(
    kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    assert "8 kv heads" in kvarn("plan", config_file(**LLAMA_3_8B), "--memory", "8GiB", "--tp", 3).refused()


def test_sequences_are_capped_and_tokens_are_not(kvarn: Callable[..., Any], config_file: Callable[..., Path]) -> None:
    arguments = ("plan", config_file(**LLAMA_3_8B), "--memory", "64GiB", "--context", "8k", "--json")
    free, capped = (by_format(kvarn(*arguments, *more).json)["int8"] for more in ((), ("--max-seqs", "5")))
    assert (free["sequences"], capped["sequences"]) == (123, 5)
    assert free["tokens"] == capped["tokens"]


def test_sliding_layers_take_their_window_and_one_block(
    kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    # Gemma 3 270M: 18 layers, every sixth full, window 512, 1 kv head of 256 channels.
    file = config_file(
        model_type="gemma3_text",
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        hidden_size=640,
        sliding_window=512,
        max_position_embeddings=32768,
    )
    report = kvarn("plan", file, "--memory", "1GiB", "--context", "8k", "--json").json
    page = 2 * 128 * 256 + 6 * 128 + 4 * 256
    sequence_bytes = (3 * 64 + 15 * 5) * page  # 8,192 / 128 blocks in full layers, 512 / 128 + 1 in sliding ones
    row = by_format(report)["int8"]
    assert row["sequence_bytes"] == sequence_bytes
    assert row["open_bytes"] == 15 * page
    assert row["sequences"] == GIB // sequence_bytes
    assert row["tokens"] == GIB * 8192 // sequence_bytes
    sealed = by_format(report)["int4"]  # sliding layers have their open pages too
    assert sealed["sequence_bytes"] == (3 * 64 + 15 * 5) * 34832 + 18 * 2 * page
    assert sealed["open_page_bytes"] == 18 * 2 * page
    assert {layer["window"]: layer["num_layers"] for layer in report["layers"]} == {512: 15, None: 3}


def test_a_context_within_the_window_takes_only_its_own_blocks(
    kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    file = config_file(**{**LLAMA_3_8B, "model_type": "mistral", "sliding_window": 4096})
    row = by_format(kvarn("plan", file, "--memory", "1GiB", "--context", "1k", "--json").json)["int8"]
    assert row["sequence_bytes"] == 8 * 128 * 68096


def test_layers_with_a_constant_state_take_nothing(kvarn: Callable[..., Any], config_file: Callable[..., Path]) -> None:
    file = config_file(
        model_type="qwen3_next",
        num_hidden_layers=48,
        full_attention_interval=4,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        hidden_size=2048,
    )
    report = kvarn("plan", file, "--memory", "1GiB", "--context", "32k", "--json").json
    assert by_format(report)["bf16"]["bytes_per_token"] == 12 * 2 * 1024
    assert report["state_layers"] == 36
    assert any("36 layers" in note for note in report["notes"])


def test_layers_that_pages_cannot_store_are_counted_dense_with_a_note(
    kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    file = config_file(
        model_type="gemma4_text",
        layer_types=["sliding_attention", "full_attention"],
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        global_head_dim=512,
        hidden_size=2304,
        sliding_window=512,
    )
    report = kvarn("plan", file, "--memory", "1GiB", "--context", "4k", "--json").json
    assert by_format(report)["int4"]["sequences"] > 3
    page = 2 * 128 * 256 + 6 * 128 + 4 * 256
    row = by_format(report)["int8"]
    assert row["sequence_bytes"] == 4 * 5 * page + 4 * 4096 * 512 * 2 * 2
    assert row["tokens"] == GIB * 4096 // row["sequence_bytes"]
    assert any("int8: 1 layers" in note and "head_dim 512" in note for note in report["notes"])
    sealed = by_format(report)["int4"]
    assert sealed["sequence_bytes"] == 4 * (5 * 34832 + 2 * page) + 4 * 4096 * 512 * 2 * 2
    assert sealed["open_page_bytes"] == 4 * 2 * page
    capped = kvarn("plan", file, "--memory", "1GiB", "--context", "4k", "--max-seqs", "3", "--json").json
    assert by_format(capped)["int4"] == {**sealed, "sequences": 3}


def test_an_unsupported_head_dim_leaves_the_dense_formats(
    kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    file = config_file(**LLAMA_3_8B, head_dim=72)
    report = kvarn("plan", file, "--memory", "1GiB", "--json").json
    assert [row["format"] for row in report["formats"]] == ["bf16", "fp8"]
    assert [refusal["format"] for refusal in report["unsupported"]] == PAGED
    assert all("72" in refusal["reason"] for refusal in report["unsupported"])
    assert "72" in kvarn("plan", file, "--memory", "1GiB", "--format", "int8").refused()


def test_chunked_layers_stay_dense_and_take_their_chunk(
    kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    fields = {**LLAMA_3_8B, "model_type": "llama4_text", "num_hidden_layers": 4, "attention_chunk_size": 256}
    report = kvarn("plan", config_file(**fields), "--memory", "1GiB", "--context", "1k", "--json").json
    # Three chunked layers in bf16, three blocks each (a chunk and one); one full layer in int8, eight blocks.
    assert by_format(report)["int8"]["sequence_bytes"] == 8 * 128 * (3 * 3 * 512 + 8 * 266)


def test_a_model_within_a_larger_configuration_is_found(
    kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    plain = kvarn("plan", config_file(**LLAMA_3_8B), "--memory", "1GiB", "--json").json
    nested = config_file(model_type="llava", text_config=LLAMA_3_8B, vision_config={"num_hidden_layers": 3})
    assert kvarn("plan", nested, "--memory", "1GiB", "--json").json == plain


def test_formats_are_planned_in_the_requested_order(
    kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    arguments = ("plan", config_file(**LLAMA_3_8B), "--memory", "1GiB", "--json", "--format")
    assert list(by_format(kvarn(*arguments, "int8,bf16").json)) == ["int8", "bf16"]
    assert list(by_format(kvarn(*arguments, "all").json)) == ["bf16", "fp8", *PAGED]


def test_assumptions_are_noted(kvarn: Callable[..., Any], config_file: Callable[..., Path]) -> None:
    file = config_file(**{**LLAMA_3_8B, "model_type": "novel", "sliding_window": 4096})
    notes = kvarn("plan", file, "--memory", "1GiB", "--context", "256k", "--json").json["notes"]
    assert [word for word in ("weights", "beyond", "sliding") if not any(word in note for note in notes)] == []


def test_the_plan_is_printed_as_a_table(kvarn: Callable[..., Any], config_file: Callable[..., Path]) -> None:
    done = kvarn("plan", config_file(**LLAMA_3_8B), "--memory", "80GiB", "--weights", "16GiB", "--context", "32k")
    assert done.code == 0
    assert done.err == ""
    assert "68,096.0" in done.out
    assert "1,009,152" in done.out
    assert all(words in done.out for words in ("open pages", "35,616.0", "3.68x", "16.62 MiB"))


def test_planning_imports_neither_torch_nor_transformers(config_file: Callable[..., Path]) -> None:
    code = (
        "import sys; from kvarn_rs.cli import main; code = main(sys.argv[1:]); "
        "print(code, [name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "plan", str(config_file(**LLAMA_3_8B)), "--memory", "1GiB"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"kv_lora_rank": 512}, "latent"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_key_value_heads": [8, 4]}, "num_key_value_heads"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"hidden_size": 7}, "hidden_size"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["hyper_attention"] * 32}, "hyper_attention"),
        ({"layer_types": ["sliding_attention"] * 32}, "sliding_window"),
        ({"layer_types": ["linear_attention"] * 32}, "no attention layer"),
        ({"layer_types": 5}, "layer_types"),
        ({"sliding_window": 64, "sliding_window_pattern": "odd"}, "sliding_window_pattern"),
        ({"v_head_dim": 64}, "64"),
        ({"per_layer_config": {"first": 1}}, "per_layer_config"),
    ],
)
def test_a_configuration_that_cannot_be_planned_is_refused_by_name(
    fields: dict[str, Any], word: str, kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    file = config_file(**{**LLAMA_3_8B, **fields})
    assert word in kvarn("plan", file, "--memory", "1GiB", "--json").refused()


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"llama"', "null", "{}", '{"model_type": "llama"}', "\x00\udcff"])
def test_a_file_that_is_not_a_configuration_is_refused(text: str, kvarn: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    kvarn("plan", file, "--memory", "1GiB").refused()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--memory", "1GiB", "--weights", "2GiB"),
        ("--memory", "0"),
        ("--memory", "-1GiB"),
        ("--memory", "1GiB", "--context", "0"),
        ("--memory", "1GiB", "--format", "int7"),
        ("--memory", "1GiB", "--format", "raw"),
        ("--memory", "1GiB", "--format", ","),
        ("--memory", "1GiB", "--block-size", "100"),
        ("--memory", "1GiB", "--block-size", "-128"),
        ("--memory", "1GiB", "--tp", "0"),
        ("--memory", "1GiB", "--context", "8000000000g"),
        ("--memory", "1GiB", "--context", "8000000000000000000"),
    ],
)
def test_invalid_settings_are_refused(
    arguments: tuple[str, ...], kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    kvarn("plan", config_file(**LLAMA_3_8B), *arguments).refused()


@pytest.mark.parametrize("memory", ["80", "80KiB", "1MiB"])
def test_a_memory_smaller_than_a_block_is_refused_with_the_size_of_one(
    memory: str, kvarn: Callable[..., Any], config_file: Callable[..., Path]
) -> None:
    said = kvarn("plan", config_file(**LLAMA_3_8B), "--memory", memory).refused()
    assert "hold no block: 128 tokens take about" in said
    assert "in int2" in said
    assert "without a unit is in bytes" in said
    enough = kvarn("plan", config_file(**LLAMA_3_8B), "--memory", str(80 << 30), "--json").json
    assert enough["memory_bytes"] == 80 << 30, "a number of bytes is one"


def test_a_missing_configuration_is_refused(kvarn: Callable[..., Any], tmp_path: Path) -> None:
    assert "config.json" in kvarn("plan", tmp_path, "--memory", "1GiB").refused()
