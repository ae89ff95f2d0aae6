"""Layers and models that are not quantized: one warning by layer and reason, or refused by a strict cache."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers

from hf.families import BLOCK_SIZE, WINDOW, forward, generate, kvarn_cache, make_model, prompt, reference_cache
from hf.other_models import dynamic, falcon_h1, implementations, make_other
from kvarn_rs.errors import ConfigError, DeviceError, UnsupportedError
from kvarn_rs.hf import DenseFallbackWarning, KvarnCache, register


def mamba() -> Any:
    return make_other("Mamba", state_size=16, num_attention_heads=None)


def rwkv() -> Any:
    return make_other("Rwkv", attention_hidden_size=64, context_length=128, num_attention_heads=None)


def reformer() -> Any:
    """States and buckets in a cache of its own."""
    return make_other(
        "Reformer",
        "ModelWithLMHead",
        attn_layers=["local", "lsh"],
        axial_pos_embds=False,
        is_decoder=True,
        attention_head_size=16,
        num_key_value_heads=None,
        head_dim=None,
        intermediate_size=None,
        num_hidden_layers=None,
    )


def assert_told(model: Any, told: str, unpaged: dict[int, str], paged_layers: int) -> Any:
    """Checks the warning, `stats` and strict refusal of a model and its config; returns a cache of the model."""
    before = implementations(model)
    for own in (model, model.config):
        with pytest.raises(UnsupportedError, match=told):
            KvarnCache(own, "int4", strict=True)
        assert implementations(model) == before
    with pytest.warns(DenseFallbackWarning, match=told) as caught:
        cache = KvarnCache(model, "raw", block_size=BLOCK_SIZE)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    stats = cache.stats()
    assert stats["unpaged"] == unpaged
    assert stats["paged_layers"] == paged_layers
    assert stats["notices"] == [str(caught[0].message)]
    return cache


def test_layers_with_a_state_beside_k_and_v_are_reported():
    model = falcon_h1()
    expected = generate(model, dynamic(model), input_ids=prompt(1, 50))
    cache = assert_told(model, r"2 of 2 layers \(0, 1\) .* hybrid", {0: "hybrid", 1: "hybrid"}, 0)
    assert implementations(model) == {"": "eager"}  # there is nothing for kvarn attention to do
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseFallbackWarning)  # once is enough
        assert torch.equal(generate(model, cache, input_ids=prompt(1, 50)), expected)
    assert cache.stats()["dense_fallbacks"] == 0


def test_chunked_layers_beside_paged_ones_are_reported():
    model = make_model("llama4")
    cache = assert_told(model, r"\(0, 2\) .* chunked_attention", dict.fromkeys((0, 2), "chunked_attention"), 1)
    expected = generate(model, reference_cache(model), input_ids=prompt(1, 50))
    model.set_attn_implementation("kvarn")
    assert torch.equal(generate(model, cache, input_ids=prompt(1, 50)), expected)
    assert cache.stats()["fused_calls"] == 30


def test_layers_without_k_and_v_are_no_fault(model_of):
    for family in ("qwen3_next", "gemma4_shared"):
        cache = kvarn_cache(model_of(family), strict=True)
        assert cache.stats()["unpaged"] == {}
        assert cache.stats()["notices"] == []


def test_a_model_without_any_k_and_v_is_reported():
    assert_told(mamba(), "nothing to quantize", {}, 0)


@pytest.mark.parametrize(("make", "name"), [(rwkv, "RwkvForCausalLM"), (reformer, "ReformerModelWithLMHead")])
def test_a_model_that_takes_no_cache_is_reported(make, name):
    model = make()
    why = f"{name}, as it is now, hands no K and V to a cache"
    expected = generate(model, dynamic(model), input_ids=prompt(1, 30))
    with pytest.raises(UnsupportedError, match=why):
        KvarnCache(model, "raw", strict=True)
    with pytest.warns(DenseFallbackWarning) as caught:
        cache = KvarnCache(model, "raw")
    assert [str(warning.message) for warning in caught] == [
        f"2 of 2 layers (0, 1) are not paged and stay unquantized: {why}"
    ]
    assert cache.stats()["unpaged"] == {0: why, 1: why}
    assert torch.equal(generate(model, cache, input_ids=prompt(1, 30)), expected)
    assert cache.stats()["paged_layers"] == cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("stem", "settings"),
    [
        ("GPTNeoX", {"num_key_value_heads": None, "head_dim": None}),
        ("GPTBigCode", {"num_key_value_heads": None, "head_dim": None}),
        ("CTRL", {"dff": 64, "num_key_value_heads": None, "head_dim": None}),
    ],
)
def test_models_that_name_their_cache_otherwise_are_served(stem, settings):
    head = "LMHeadModel" if stem == "CTRL" else "ForCausalLM"
    model = make_other(stem, head, **settings)
    expected = generate(model, dynamic(model), input_ids=prompt(1, 30))
    cache = kvarn_cache(model, strict=True)
    assert torch.equal(generate(model, cache, input_ids=prompt(1, 30)), expected)
    assert cache.stats()["fused_calls"] == 2 * 30
    assert cache.stats()["notices"] == []


LIMIT = 48


@pytest.mark.parametrize("stem", ["Phi3", "Phimoe"])
def test_a_model_whose_generate_drops_its_cache_is_reported(stem):
    factors = [1.0 + 0.1 * i for i in range(8)]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": factors,
        "long_factor": [2 * f for f in factors],
    }
    rope |= {"original_max_position_embeddings": LIMIT}
    rope |= {"short_mscale": 1.0, "long_mscale": 1.0} if stem == "Phimoe" else {}
    settings: dict[str, Any] = {"original_max_position_embeddings": LIMIT, "rope_parameters": rope}
    if stem == "Phimoe":
        settings |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = make_other(stem, **settings)
    told = f"more than {LIMIT} positions, generate of {stem}ForCausalLM drops the cache"
    ids = prompt(1, LIMIT - 10)
    expected = generate(model, dynamic(model), input_ids=ids)
    with pytest.raises(UnsupportedError, match=told):
        KvarnCache(model, "raw", strict=True)
    assert implementations(model) == {"": "eager"}
    with pytest.warns(DenseFallbackWarning, match=told):
        cache = KvarnCache(model, "raw", block_size=BLOCK_SIZE)
    assert torch.equal(generate(model, cache, input_ids=ids), expected)
    assert cache.get_seq_length() == LIMIT  # what came after is in a cache of transformers
    assert any(f"{LIMIT} positions" in notice for notice in cache.stats()["notices"])


def test_a_model_that_never_gets_so_long_is_not_reported():
    cache = KvarnCache(make_model("phi3"), "raw", strict=True)
    assert cache.stats()["notices"] == []


def test_k_and_v_that_turn_out_to_have_no_place_in_pages_are_in_stats():
    model = make_model("llama", head_dim=20)
    cache = kvarn_cache(model)
    assert cache.stats()["unpaged"] == {}
    with pytest.warns(DenseFallbackWarning, match="head_dim"):
        forward(model, cache, prompt(1, 30))
    unpaged = cache.stats()["unpaged"]
    assert list(unpaged) == [0, 1, 2]
    assert all("head_dim" in why for why in unpaged.values())


def test_a_restored_cache_reports_its_unpaged_layers_again(tmp_path):
    """The notices are the constructor's: `load` goes through it."""
    model = make_model("mistral")
    cache = kvarn_cache(model)
    forward(model, cache, prompt(1, WINDOW))
    cache.save(tmp_path / "cache")
    loaded = KvarnCache.load(tmp_path / "cache", model)
    assert loaded.stats()["notices"] == []
    assert loaded.stats()["unpaged"] == {}


# No model -------------------------------------------------------------------------------------------------------


class Wrapped(torch.nn.Module):
    """Has a model's config, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.config = make_model("llama").config


@pytest.mark.parametrize(
    "other",
    [
        torch.nn.Linear(2, 2),
        Wrapped(),
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
        None,
    ],
    ids=lambda other: type(other).__name__,
)
def test_an_object_that_is_not_a_model_is_refused(other):
    with pytest.raises(ConfigError, match="expected a transformers model or config"):
        KvarnCache(other, "raw")


def test_a_config_without_layers_is_refused():
    with pytest.raises(ConfigError, match="does not tell its layers"):
        KvarnCache(transformers.BltConfig(), "raw")


def test_a_model_without_weights_is_told_what_to_do():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(make_model("llama").config)
    with pytest.raises(DeviceError, match="device_map='cpu'"):
        KvarnCache(model, "raw")


def test_weights_that_accelerate_keeps_on_disk(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    ids = prompt(1, 30)
    model = make_model("llama")
    expected = generate(model, reference_cache(model), input_ids=ids)
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    with pytest.raises(DeviceError, match=r"offloaded by accelerate.*KvarnCache\(model\.config\)"):
        KvarnCache(model, "raw")
    register()
    model.set_attn_implementation("kvarn")
    cache = KvarnCache(model.config, "raw", block_size=BLOCK_SIZE, strict=True)
    assert torch.equal(generate(model, cache, input_ids=ids), expected)
