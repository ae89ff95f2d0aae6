"""Formats that seal, in every architecture and mode: no fallbacks, the right lengths, and accurate logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf.families import (
    ALL_FAMILIES,
    FAMILIES,
    HYBRID_FAMILIES,
    MORE_FAMILIES,
    forward,
    generate,
    kvarn_cache,
    left_padded,
    make_model,
    prompt,
)
from hf.modes import MODES
from kvarn_rs import FORMATS, Calibration
from kvarn_rs.hf import DenseFallbackWarning, KvarnCache, attention
from kvarn_rs.hf.layer import KvarnLayer

# Logits of one layer, of order 1, by the same numbers in another order; the largest seen is 2e-6.
TOLERANCE = 1e-5
# Norm of the difference over norm of the logits of random models of three layers; the largest seen are
# 0.11, 0.2 and 0.5: only the order says something of quality.
LARGEST_ERROR = {"int8": 0.04, "int4": 0.4, "int3": 0.6, "int2": 0.9}


def assert_runs_on_tiles(model: Any, family: str, mode: str, format: str) -> None:
    raw = kvarn_cache(model)
    expected = MODES[mode](model, raw, family)
    cache = kvarn_cache(model, format)
    tokens = MODES[mode](model, cache, family)
    stats = cache.stats()
    assert tokens.shape == expected.shape
    assert cache.get_seq_length() == raw.get_seq_length()
    assert stats["dense_fallbacks"] == stats["dropped_forwards"] == 0, stats
    assert stats["fused_calls"] > 0, stats
    assert stats["sealed"] > 0, stats
    assert 0 < stats["open_pages"] < stats["blocks_in_use"] <= raw.stats()["peak_blocks"], stats
    layers = [layer for layer, kind in enumerate(cache.layers) if isinstance(kind, KvarnLayer)]
    assert list(stats["drift"]) == list(stats["saturation"]) == layers
    assert all(drift > 0 for drift in stats["drift"].values())
    assert all(share is not None and 0 <= share < 0.2 for share in stats["saturation"].values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_runs_on_tiles_of_4_bits(model_of, family, mode):
    assert_runs_on_tiles(model_of(family), family, mode, "int4")


@pytest.mark.filterwarnings("ignore:.*chunked_attention:kvarn_rs.hf.DenseFallbackWarning")  # of llama4
@pytest.mark.parametrize("mode", ["greedy", "left_padded_beams", "prompt_lookup"])
@pytest.mark.parametrize("family", [*MORE_FAMILIES, *HYBRID_FAMILIES])
def test_other_architectures_run_on_tiles(model_of, family, mode):
    if family in HYBRID_FAMILIES and mode == "prompt_lookup":
        mode = "left_padded_batch"  # their other layers cannot go back
    assert_runs_on_tiles(model_of(family), family, mode, "int4")


@pytest.mark.parametrize("format", ["int3", "int2"])
@pytest.mark.parametrize("mode", ["greedy", "left_padded_beams", "assisted", "crop_padded", "deepcopy_fan_out"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_fewer_bits_run_as_well(model_of, family, mode, format):
    assert_runs_on_tiles(model_of(family), family, mode, format)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("phi3", {"head_dim": 96}),
        ("llama", {"head_dim": 80}),
        ("qwen3", {"head_dim": 128}),
        ("gemma2", {"head_dim": 256}),
    ],
    ids=str,
)
@pytest.mark.parametrize("format", ["int4", "int3", "int2"])
def test_head_dims_of_real_models_run_on_tiles(family, overrides, format):
    assert_runs_on_tiles(make_model(family, **overrides), family, "left_padded_beams", format)


# One layer: what its attention gets is the same however it is computed


def one_layer(family: str, **overrides: Any) -> Any:
    """A model of a family with one layer, of each kind that it has."""
    settings = ALL_FAMILIES[family][1]
    kinds = settings.get("layer_types", [None])
    kind = next((kind for kind in kinds if kind == "full_attention"), kinds[0])
    layer = {"num_hidden_layers": 1, **({} if kind is None else {"layer_types": [kind]}), **overrides}
    return make_model(family, **layer)


def calibrated(model: Any) -> Calibration:
    calibration = Calibration()
    with torch.no_grad():
        forward(model, KvarnCache(model, "int8", block_size=16, calibration=calibration), prompt(1, 200, seed=1))
    calibration.freeze()
    return calibration


ONE_LAYER = {
    "llama": {},
    "qwen3": {},
    "mistral": {},
    "gemma2": {},
    "gemma3 sliding": {"layer_types": ["sliding_attention"]},
    "gpt_oss": {},
    "gpt_oss sliding": {"layer_types": ["sliding_attention"]},
    "phi3": {"head_dim": 96},
    "cohere2": {},
    "glm4": {},
    "smollm3": {"no_rope_layers": [0]},
}


def logits_of(model: Any, cache: Any, lengths: list[int]) -> list[torch.Tensor]:
    """Of a prompt of rows of these lengths, and of steps after it."""
    batch = left_padded(lengths)
    mask, rows = batch["attention_mask"], len(lengths)
    logits = [forward(model, cache, batch["input_ids"], mask)[mask == 1]]
    for seed, num_new in enumerate([1, 3, 1, 16, 20, 1]):
        mask = torch.cat([mask, mask.new_ones(rows, num_new)], 1)
        logits.append(forward(model, cache, prompt(rows, num_new, seed), mask))
    return logits


def assert_equal(logits: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for one, other in zip(logits, others, strict=True):
        assert (one - other).abs().max() <= TOLERANCE * max(1.0, other.abs().max().item())


@pytest.mark.parametrize("format", ["int4", "int2"])
@pytest.mark.parametrize(
    ("name", "own"),
    [*((name, "eager") for name in ONE_LAYER), *((name, "sdpa") for name in ("llama", "mistral", "glm4"))],
)
def test_fused_attention_is_the_model_s_own_on_the_same_tiles(name, own, format):
    """The model's own attention knows no padding until the tokens are stored."""
    model = one_layer(name.split()[0], **ONE_LAYER[name])
    calibration = calibrated(model)
    fused, dense = (kvarn_cache(model, format, calibration=calibration) for _ in range(2))
    logits = logits_of(model, fused, [50, 50])
    model.set_attn_implementation(own)
    with pytest.warns(DenseFallbackWarning):
        assert_equal(logits, logits_of(model, dense, [50, 50]))
    assert (fused.stats()["dense_fallbacks"], dense.stats()["fused_calls"]) == (0, 0)
    assert {cache.stats()["calibrated"] for cache in (fused, dense)} == {"frozen"}
    assert fused.stats()["sealed"] == dense.stats()["sealed"] > 5


@pytest.mark.parametrize("format", ["int4", "int2"])
@pytest.mark.parametrize("name", ONE_LAYER)
def test_fused_attention_is_dense_attention_on_the_same_tiles_beside_padding(name, format, monkeypatch):
    model = one_layer(name.split()[0], **ONE_LAYER[name])
    calibration = calibrated(model)
    fused, dense = (kvarn_cache(model, format, calibration=calibration) for _ in range(2))
    logits = logits_of(model, fused, [50, 33, 7])
    judge = attention._reason_against_pages
    monkeypatch.setattr(attention, "_reason_against_pages", lambda *args: judge(*args) or "custom_mask")
    with pytest.warns(DenseFallbackWarning):
        assert_equal(logits, logits_of(model, dense, [50, 33, 7]))
    assert (fused.stats()["dense_fallbacks"], dense.stats()["fused_calls"]) == (0, 0)
    assert fused.stats()["sealed"] == dense.stats()["sealed"] > 5


# Several layers: an ordering, on average


def teacher_forced(model: Any, format: str) -> torch.Tensor:
    batch, text = left_padded([50, 33]), prompt(2, 24, seed=8)
    cache = kvarn_cache(model, format, calibration=Calibration())
    mask = batch["attention_mask"]
    logits = [forward(model, cache, batch["input_ids"], mask)[:, -1:]]
    for column in text.split(1, 1):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        logits.append(forward(model, cache, column, mask))
    assert cache.stats()["dense_fallbacks"] == 0
    return torch.cat(logits, 1)


@pytest.mark.filterwarnings("ignore:.*chunked_attention:kvarn_rs.hf.DenseFallbackWarning")  # of llama4
def test_fewer_bits_are_further_from_raw_on_average(model_of):
    errors = {format: [] for format in FORMATS[1:]}
    for family in ALL_FAMILIES:
        raw = teacher_forced(model_of(family), "raw")
        for format, seen in errors.items():
            logits = teacher_forced(model_of(family), format)
            seen.append(((logits - raw).norm() / raw.norm()).item())
            assert 0 < seen[-1] < LARGEST_ERROR[format], (family, format)
    means = [sum(seen) / len(seen) for seen in errors.values()]
    assert means == sorted(means), means
    assert means[0] * 3 < means[1], "int8 and int4"
    assert means[1] * 1.3 < means[2], "int4 and int3"
    assert means[2] * 1.3 < means[3], "int3 and int2"


def test_default_blocks_seal_in_a_long_generation(model_of):
    model = model_of("llama")
    cache = KvarnCache(model)
    ids = generate(model, cache, input_ids=prompt(1, 290), max_new_tokens=120)
    assert ids.shape == (1, 410)
    stats = cache.stats()
    assert (stats["sealed"], stats["open_pages"], stats["blocks_in_use"]) == (3, 1, 4)
    assert stats["calibrated"] in ("own prompt", "frozen")
