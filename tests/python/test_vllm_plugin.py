"""The vLLM plugin where vLLM is not: what it computes of formats, what it refuses. Other tests are in tests/vllm."""

from __future__ import annotations

import importlib.metadata
import logging
from types import SimpleNamespace
from typing import Any

import pytest

import kvarn_rs.vllm
from kvarn_rs import FORMATS
from kvarn_rs._core import block_bytes
from kvarn_rs.errors import ConfigError, UnsupportedError
from kvarn_rs.vllm import formats, settings


def test_registering_without_vllm_logs_and_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvarn_rs.vllm, "_registered", False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    with caplog.at_level(logging.WARNING):
        kvarn_rs.vllm.register()
        kvarn_rs.vllm.register()
    (record,) = caplog.records
    assert "0.99.0 is not one of the tested releases" in record.getMessage()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_a_block_of_vllm_holds_a_record_and_keeps_its_alignment(format: str, head_dim: int) -> None:
    block = formats.BLOCK_SIZE * formats.token_bytes(format, head_dim, "bfloat16")
    record = block_bytes(format, head_dim, formats.BLOCK_SIZE, "bfloat16")
    assert record <= block < record + formats.BLOCK_SIZE
    assert block % 16 == 0
    assert formats.open_page_bytes(head_dim) % 16 == 0
    assert formats.open_page_bytes(head_dim) >= block_bytes("int8", head_dim, formats.BLOCK_SIZE)


def test_names_of_cache_dtypes_are_those_of_formats() -> None:
    assert [formats.format_of(name) for name in formats.CACHE_DTYPES] == list(FORMATS)
    assert all(formats.is_ours(name) for name in formats.CACHE_DTYPES)
    assert not any(formats.is_ours(name) for name in ("auto", "fp8", "int8", None))


def test_block_sizes_and_backends_of_others_are_refused() -> None:
    settings.check_block_size(None)
    settings.check_block_size(formats.BLOCK_SIZE)
    settings.check_backend(None, "kvarn_int8")
    settings.check_backend("CUSTOM", "kvarn_int8")
    with pytest.raises(ConfigError, match=r"16.*128"):
        settings.check_block_size(16)
    with pytest.raises(ConfigError, match=r"FLASH_ATTN.*kvarn_int8"):
        settings.check_backend("FLASH_ATTN", "kvarn_int8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prefix_match_unit": 32}, "--prefix-match-unit 32"),
        ({"kv_transfer_config": object()}, "KV transfer is not tried"),
        ({"decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"method": "dflash"}, "'dflash'.*use ngram, suffix, draft_model, eagle"),
        ({"method": "ngram", "pipeline_parallel_size": 2}, "pipeline parallelism.*only the last rank"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"model": {"is_hybrid": True}}, "layers of a constant state"),
        ({"model": {"uses_alibi": True}}, "ALiBi does not work with kvarn_int4"),
        ({"model": {"attn_type": "encoder_only"}}, "not causal"),
        ({"attention_config": SimpleNamespace(use_non_causal=True)}, "not causal"),
        ({"model": {"hf_text_config": SimpleNamespace(attention_chunk_size=64)}}, "chunked attention"),
        ({"model": {"hf_text_config": SimpleNamespace(layer_types=["chunked_attention"])}}, "chunked attention"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    ],
)
def test_features_that_a_format_does_not_work_with_are_refused(change: dict[str, Any], words: str) -> None:
    def config(**change: Any) -> Any:
        method = change.pop("method", None)
        decoder = {"hf_text_config": SimpleNamespace(), "uses_alibi": False, "attn_type": "decoder"}
        causal = SimpleNamespace(use_non_causal=False)
        return SimpleNamespace(
            cache_config=SimpleNamespace(
                prefix_match_unit=change.pop("prefix_match_unit", None),
                kv_sharing_fast_prefill=change.pop("kv_sharing_fast_prefill", False),
            ),
            model_config=SimpleNamespace(**{**decoder, **change.pop("model", {})}),
            parallel_config=SimpleNamespace(
                decode_context_parallel_size=change.pop("decode_context_parallel_size", 1),
                pipeline_parallel_size=change.pop("pipeline_parallel_size", 1),
            ),
            speculative_config=None if method is None else SimpleNamespace(method=method),
            **{"kv_transfer_config": None, "use_v2_model_runner": False, "attention_config": causal, **change},
        )

    settings.check_config(config(), "kvarn_int4")
    with pytest.raises(UnsupportedError, match=words):
        settings.check_config(config(**change), "kvarn_int4")


@pytest.mark.parametrize("options", ["x", {"calibraton": "x"}, {"calibration": 3}, {"sliding_window": "yes"}])
def test_options_that_are_not_known_are_refused(options: Any) -> None:
    with pytest.raises(ConfigError, match=r"calibration.*sliding_window"):
        settings.kvarn_options(SimpleNamespace(additional_config={"kvarn": options}))
