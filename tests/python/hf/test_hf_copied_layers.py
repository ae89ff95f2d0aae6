"""Layers of a cache copied without it: they become transformers' own, with a warning, or are refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers

from hf.families import WINDOW, decode, forward, generate, kvarn_cache, left_padded, prompt, reference_cache
from hf.other_models import make_other
from kvarn_rs.errors import UnsupportedError
from kvarn_rs.hf import DenseFallbackWarning

needs_dory = pytest.mark.skipif(not hasattr(transformers, "DoryForCausalLM"), reason="transformers without Dory")


def looped() -> Any:
    """Runs its layers 1 and 2 twice, and adds a copy of their cache layers for the second time."""
    return make_other(
        "Dory",
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        n_input_layers=1,
        n_output_layers=1,
        sliding_window=WINDOW,
    )


@needs_dory
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_model_that_copies_cache_layers_gives_the_tokens_of_a_dynamic_cache(num_beams):
    model = looped()
    batch = left_padded([50, 33])
    expected = generate(model, reference_cache(model), **batch, num_beams=num_beams)
    cache = kvarn_cache(model)
    with pytest.warns(DenseFallbackWarning, match="copied by itself"):
        assert torch.equal(generate(model, cache, **batch, num_beams=num_beams), expected)
    stats = cache.stats()
    assert stats["fallback_reasons"] == {"copied_layer": 2}
    assert stats["unpaged"] == dict.fromkeys((4, 5), "added by the model")
    assert stats["fused_calls"] == 4 * 30


@needs_dory
def test_layers_that_a_model_added_are_cropped_and_copied_with_the_others():
    model = looped()
    reference = reference_cache(model, keeps_everything=True)
    forward(model, reference, prompt(1, 20))
    reference.crop(-5)
    expected = decode(model, reference, prompt(1, 3, seed=8), 20)
    cache = kvarn_cache(model)
    with pytest.warns(DenseFallbackWarning, match="copied by itself"):
        forward(model, cache, prompt(1, 20))
    cache.crop(-5)
    clone = copy.deepcopy(cache)
    assert torch.equal(decode(model, cache, prompt(1, 3, seed=8), 20), expected)
    assert torch.equal(decode(model, clone, prompt(1, 3, seed=8), 20), expected)
    with pytest.raises(UnsupportedError, match=r"cannot be saved: 4 .* 5 "):
        pickle.dumps(cache)


@needs_dory
def test_a_strict_cache_refuses_a_model_that_copies_its_layers():
    model = looped()
    cache = kvarn_cache(model, strict=True)
    with pytest.raises(UnsupportedError, match="copied by itself"):
        forward(model, cache, prompt(1, 20))
    assert len(cache.layers) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps, lambda layer: copy.deepcopy([layer])])
def test_a_layer_with_tokens_is_not_copied_by_itself(model_of, copied):
    model = model_of("qwen3_mixed")
    cache = kvarn_cache(model)
    forward(model, cache, prompt(2, 40))
    for layer in cache.layers:
        with pytest.raises(UnsupportedError, match="copy the whole cache"):
            copied(layer)
    ids = prompt(2, 1)
    clones = [copy.deepcopy(cache), copy.copy(cache), *copy.deepcopy([cache, cache.layers[0]])[:1]]
    expected = decode(model, cache, ids, 10)
    for clone in clones:
        assert torch.equal(decode(model, clone, ids, 10), expected)
