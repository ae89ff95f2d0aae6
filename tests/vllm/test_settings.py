"""One flag: what it selects, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
from models import SIZES
from runs import KV_CACHE_BYTES, groups, make_llm, num_blocks

import kvarn_rs.vllm
from kvarn_rs.errors import ConfigError, UnsupportedError
from kvarn_rs.vllm import formats


def test_one_flag_selects_backend_and_block_size(model: Path) -> None:
    llm = make_llm(model, "kvarn_int8")
    (group,) = groups(llm)
    assert group.engine.format == "int8"
    assert group.engine.block_size == formats.BLOCK_SIZE
    layers, heads = group.engine.num_layers, group.engine.num_kv_heads
    block = layers * heads * formats.BLOCK_SIZE * formats.token_bytes("int8", 64, "float32")
    assert num_blocks(llm) == KV_CACHE_BYTES // block


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"block_size": 64}, ConfigError, "--block-size 64.*128"),
        ({"attention_backend": "CPU_ATTN"}, ConfigError, "CPU_ATTN does not read.*kvarn_int4"),
        ({"prefix_match_unit": 32}, UnsupportedError, "--prefix-match-unit 32"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            UnsupportedError,
            "KV transfer is not tried with kvarn_int4",
        ),
    ],
)
def test_settings_that_contradict_the_format_are_refused(
    model: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    if "prefix_match_unit" in options and not _has_prefix_match_unit():
        pytest.skip("this vLLM has no prefix_match_unit")
    with pytest.raises(error, match=words):
        make_llm(model, "kvarn_int4", **options)


@pytest.mark.parametrize("format", ["raw", "int8", "int4"])
def test_options_of_kvarn_are_checked_in_every_format(model: Path, format: str) -> None:
    with pytest.raises(ConfigError, match="kvarn has 'calibratoin'"):
        make_llm(model, f"kvarn_{format}", additional_config={"kvarn": {"calibratoin": "FILE"}})


def test_attention_that_is_not_supported_is_refused_before_a_model_is_loaded(model: Path, tmp_path: Path) -> None:
    from transformers import BloomConfig, LlamaConfig

    configs: list[tuple[Any, str, dict[str, Any], str]] = [
        (BloomConfig(hidden_size=64, n_layer=1, n_head=1), "BloomForCausalLM", {}, "ALiBi does not work"),
        (LlamaConfig(**{**SIZES, "is_causal": False}), "LlamaModel", {"runner": "pooling"}, "not causal"),
    ]
    for config, architecture, options, words in configs:
        folder = tmp_path / architecture
        config.architectures = [architecture]
        config.save_pretrained(folder)  # there are no weights
        with pytest.raises(UnsupportedError, match=words):
            make_llm(folder, "kvarn_int4", **options)
    with pytest.raises(UnsupportedError, match="not causal"):
        make_llm(model, "kvarn_int4", attention_config={"use_non_causal": True})


def test_an_unknown_format_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="kvarn_int8"):
        make_llm(model, "kvarn_int9")


def test_other_cache_dtypes_are_vllm_s(model: Path) -> None:
    llm = make_llm(model, "auto")
    assert groups(llm) == []


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.26.0", True), ("0.32.0+cpu", True), ("0.32.1", True), ("0.33.0", False), ("1.0", False), ("0.3.2", False)],
)
def test_other_releases_are_left_alone(version: str, tested: bool) -> None:
    assert kvarn_rs.vllm.is_tested(version) is tested


def _has_prefix_match_unit() -> bool:
    from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]

    return hasattr(EngineArgs, "prefix_match_unit")
