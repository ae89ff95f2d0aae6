"""Forwards without some of the config's layers: models that leave them out, and caches filled by hand.

The oracle of tokens is the model without any cache, each forward over the whole text.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf.families import (
    FOUR_LAYERS,
    config_only,
    decode,
    forward,
    generate,
    keep,
    kvarn_cache,
    left_padded,
    make_model,
    prompt,
    pruned,
    random_model,
    recomputed,
)
from hf.modes import MODES, REWINDS
from kvarn_rs.errors import RollbackError, ShapeError, UnsupportedError
from kvarn_rs.hf import DenseFallbackWarning, KvarnCache

NUM_TOKENS = 30
MAKERS = pytest.mark.parametrize("make_cache", [kvarn_cache, config_only])


# Layers that do not come ---------------------------------------------------------------------------------------------


# Sliding layers in even places only: which mask a layer gets depends on its place.
KEPT = [
    *(("llama", kept) for kept in ([0, 1, 2], [0, 2], [1, 3], [2, 3], [3, 2, 1, 0], [1])),
    *(("qwen3_mixed", kept) for kept in ([0, 1, 2], [0, 3], [2, 3], [2, 1, 0, 3], [0], [2])),
]


@MAKERS
@pytest.mark.parametrize(("family", "kept"), KEPT, ids=str)
def test_a_model_without_some_of_its_layers_keeps_its_history(family, kept, make_cache):
    model = pruned(family, kept)
    expected = recomputed(model, prompt(2, 40), NUM_TOKENS)
    cache = make_cache(model)
    assert torch.equal(decode(model, cache, prompt(2, 40), NUM_TOKENS), expected)
    assert cache.get_seq_length() == 40 + NUM_TOKENS - 1
    for layer_idx in range(4):
        assert cache.get_seq_length(layer_idx) == (69 if layer_idx in {0, *kept} else 0)
    assert cache.stats()["dropped_forwards"] == cache.stats()["dense_fallbacks"] == 0


@pytest.mark.parametrize("mode", sorted(MODES.keys() - {"assisted"}))  # which makes a draft model of the family
@pytest.mark.parametrize("family", FOUR_LAYERS)
def test_a_model_without_some_of_its_layers_generates_in_every_mode(family, mode):
    model = pruned(family, [0, 1, 2])
    model.set_attn_implementation("eager")
    reference = transformers.DynamicCache() if mode in REWINDS else transformers.DynamicCache(config=model.config)
    expected = MODES[mode](model, reference, family)
    assert torch.equal(MODES[mode](model, kvarn_cache(model), family), expected)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_absent_layers_do_not_affect_the_others(format):
    model = pruned("llama", [0, 1, 2])
    ids = prompt(2, 150)
    expected = make_model("llama", num_hidden_layers=3)
    expected.load_state_dict(model.state_dict())
    other, cache = kvarn_cache(expected, format), kvarn_cache(model, format)
    assert torch.equal(forward(model, cache, ids), forward(expected, other, ids))
    assert torch.equal(decode(model, cache, prompt(2, 1), 100), decode(expected, other, prompt(2, 1), 100))
    stats = cache.stats()
    assert (stats["sealed"] > 0) == (format == "int4")
    assert set(stats["drift"]) == set(stats["saturation"]) == {0, 1, 2}


def copied(cache: KvarnCache, model: Any, path: Path) -> KvarnCache:
    return copy.deepcopy(cache)


def pickled(cache: KvarnCache, model: Any, path: Path) -> KvarnCache:
    return pickle.loads(pickle.dumps(cache))


def saved(cache: KvarnCache, model: Any, path: Path) -> KvarnCache:
    cache.save(path / "cache")
    return KvarnCache.load(path / "cache", model)


@pytest.mark.parametrize("way", [copied, pickled, saved])
@pytest.mark.parametrize(("family", "kept"), KEPT, ids=str)
def test_a_copy_and_a_file_record_which_layers_arrived(family, kept, way, tmp_path):
    model = pruned(family, kept)
    cache = kvarn_cache(model)
    forward(model, cache, prompt(2, 40))
    other = way(cache, model, tmp_path)
    expected = recomputed(model, torch.cat([prompt(2, 40), prompt(2, 3, seed=8)], 1), 10)
    assert torch.equal(decode(model, other, prompt(2, 3, seed=8), 10), expected)
    assert torch.equal(decode(model, cache, prompt(2, 3, seed=8), 10), expected)
    missing = next((layer_idx for layer_idx in range(4) if layer_idx not in kept), None)
    if missing is None:
        return
    k = torch.zeros(2, 2, 1, 16)
    for one in (cache, other):
        one.update(k, k, kept[0])
        with pytest.raises(RollbackError, match=f"layer {missing} has 0 of 52 positions"):
            one.update(k, k, missing)


def test_a_decoder_shallower_than_its_absent_encoder_keeps_its_history():
    settings = {
        "vocab_size": 128,
        "d_model": 64,
        "encoder_layers": 4,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "encoder_ffn_dim": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    for stem in ("Whisper", "Bart", "MBart", "PLBart", "Pegasus", "Marian"):
        config = getattr(transformers, f"{stem}Config")(**settings)
        model = random_model(getattr(transformers, f"{stem}ForCausalLM"), config)
        expected = recomputed(model, prompt(1, 30), 20)
        cache = kvarn_cache(model)
        assert torch.equal(decode(model, cache, prompt(1, 30), 20), expected), stem
        assert cache.get_seq_length() == 49


def test_cross_attention_layers_may_be_skipped_for_text():
    config = transformers.models.mllama.MllamaTextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1, 3],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
        eos_token_id=None,
    )
    model = random_model(transformers.MllamaForCausalLM, config)
    expected = recomputed(model, prompt(1, 30), 20)
    cache = kvarn_cache(model)
    with pytest.warns(UserWarning, match="keys or values"):  # the model looks whether there are some
        assert torch.equal(decode(model, cache, prompt(1, 30), 20), expected)
    assert [layer.is_initialized for layer in cache.layers] == [True, False] * 2


def test_a_cache_of_one_model_may_go_on_in_a_shallower_one():
    model, shallow = make_model("llama", num_hidden_layers=4), pruned("llama", [0, 1])
    cache, reference = kvarn_cache(model), transformers.DynamicCache()
    shallow.set_attn_implementation("eager")
    for one in (cache, reference):
        forward(model, one, prompt(1, 40))
    expected = decode(shallow, reference, prompt(1, 2), 10)
    shallow.set_attn_implementation("kvarn")
    assert torch.equal(decode(shallow, cache, prompt(1, 2), 10), expected)
    assert [cache.get_seq_length(layer_idx) for layer_idx in range(4)] == [51, 51, 40, 40]


# Layers that join ----------------------------------------------------------------------------------------------------


@MAKERS
@pytest.mark.parametrize("family", FOUR_LAYERS)
def test_a_layer_that_joins_later_is_refused_until_the_others_are_taken_back(family, make_cache):
    model = make_model(family, **FOUR_LAYERS[family])
    layers = model.model.layers
    ids, more = prompt(2, 20), prompt(2, 3, seed=8)
    expected = recomputed(model, torch.cat([ids, more], 1), 10)
    cache = make_cache(model)
    forward(model, cache, ids)
    keep(model, [0, 1])
    decode(model, cache, prompt(2, 2, seed=9), 2)
    model.model.layers = layers
    for _ in range(2):
        with pytest.raises(RollbackError, match=r"layer 2 has 20 of 23 positions.*crop\(20\)"):
            forward(model, cache, more)
        assert [cache.get_seq_length(layer_idx) for layer_idx in range(4)] == [23, 23, 20, 20]
    cache.crop(20)
    assert torch.equal(decode(model, cache, more, 10), expected)


def test_a_layer_that_never_arrived_is_refused_until_the_cache_is_empty():
    model = make_model("llama", num_hidden_layers=4)
    layers, expected = model.model.layers, recomputed(model, prompt(1, 20), 10)
    cache = kvarn_cache(model)
    keep(model, [0, 1])
    forward(model, cache, prompt(1, 20))
    model.model.layers = layers
    with pytest.raises(RollbackError, match=r"layer 2 has 0 of 20 positions.*reset\(\)"):
        forward(model, cache, prompt(1, 1))
    cache.reset()
    assert torch.equal(decode(model, cache, prompt(1, 20), 10), expected)


@MAKERS
def test_a_layer_that_runs_twice_needs_two_numbers(make_cache):
    model = pruned("llama", [0, 1, 1, 2])
    cache = make_cache(model)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="layer 1 came twice in one call"):
            forward(model, cache, prompt(1, 20))
        assert cache.get_seq_length() == 0
    again = copy.deepcopy(model.model.layers[2])
    again.self_attn.layer_idx = 3
    model.model.layers[2] = again
    expected = recomputed(model, prompt(1, 20), 10)
    assert torch.equal(decode(model, cache, prompt(1, 20), 10), expected)


# Filled by hand ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize(("family", "kept"), [*KEPT, ("llama", [0, 1, 2, 3]), ("qwen3_mixed", [0, 1, 2, 3])], ids=str)
def test_a_cache_filled_by_hand_continues_in_the_model_of_those_layers(family, kept, copies):
    model = pruned(family, kept)
    ids, more = prompt(2, 20), prompt(2, 3, seed=8)
    expected = recomputed(model, torch.cat([ids, more], 1), 10)
    model.set_attn_implementation("eager")
    source = transformers.DynamicCache()
    forward(model, source, ids)
    cache = kvarn_cache(model)
    for layer_idx in reversed(kept):
        if copies:
            cache = copy.deepcopy(cache)
        cache.update(source.layers[layer_idx].keys, source.layers[layer_idx].values, layer_idx)
    assert [cache.get_seq_length(i) for i in range(1, 4)] == [20 if i in kept else 0 for i in range(1, 4)]
    assert torch.equal(decode(model, cache, more, 10), expected)


def test_layers_filled_by_hand_in_turn_have_lengths_of_their_own():
    cache = kvarn_cache(make_model("llama"))
    k = torch.randn(1, 2, 5, 16)
    for layer_idx in (0, 1, 0):
        cache.update(k, k, layer_idx)
    assert [cache.get_seq_length(layer_idx) for layer_idx in range(3)] == [10, 5, 0]
    with pytest.warns(DenseFallbackWarning):
        assert [tuple(cache.layers[i].keys.shape) for i in range(2)] == [(1, 2, 10, 16), (1, 2, 5, 16)]
    assert cache.layers[2].keys is None
    with pytest.raises(RollbackError, match="layer 2 has 0 of 5"):
        cache.update(k, k, 2)
    cache.update(k, k, 0)
    with pytest.raises(ShapeError, match="layer 1 has 2 new positions"):
        cache.update(k[:, :, :2], k[:, :, :2], 1)


def test_a_batch_with_padding_works_without_some_layers():
    model = pruned("qwen3_mixed", [0, 3])
    batch = left_padded([40, 21])
    same = make_model("qwen3_mixed", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    same.load_state_dict(model.state_dict())
    expected = generate(same, transformers.DynamicCache(config=same.config), **batch)
    cache = kvarn_cache(model)
    assert torch.equal(generate(model, cache, **batch), expected)
