"""With raw pages, tokens are exactly those of eager attention on a DynamicCache, and no call leaves the pages."""

from __future__ import annotations

import pytest
import torch

from hf.families import FAMILIES, HYBRID_FAMILIES, MORE_FAMILIES, generate, kvarn_cache, prompt, reference_cache
from hf.modes import MODES, REWINDS


def assert_same_tokens(model, family, mode):
    expected = MODES[mode](model, reference_cache(model, keeps_everything=mode in REWINDS), family)
    cache = kvarn_cache(model)
    actual = MODES[mode](model, cache, family)
    stats = cache.stats()
    assert torch.equal(actual, expected), f"first difference at {(actual != expected).nonzero()[0].tolist()}"
    assert stats["dense_fallbacks"] == 0, stats
    assert stats["dropped_forwards"] == 0, stats
    assert stats["fused_calls"] > 0, stats


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_eager_attention(model_of, family, mode):
    assert_same_tokens(model_of(family), family, mode)


@pytest.mark.parametrize("mode", ["greedy", "left_padded_batch", "left_padded_beams"])
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_other_architectures_give_the_tokens_of_eager_attention(model_of, family, mode):
    assert_same_tokens(model_of(family), family, mode)


@pytest.mark.filterwarnings("ignore:.*chunked_attention:kvarn_rs.hf.DenseFallbackWarning")  # of llama4
@pytest.mark.parametrize("mode", ["greedy", "left_padded_batch", "left_padded_beams"])
@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_layers_of_other_kinds_stay_with_transformers(model_of, family, mode):
    assert_same_tokens(model_of(family), family, mode)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_notices_a_change_far_back_in_the_prompt(model_of, family):
    """Otherwise equal tokens would prove little."""
    model = model_of(family)
    ids = prompt(1, 50)
    changed = ids.clone()
    changed[0, 50 - 20] = (ids[0, 50 - 20] + 1) % 126 + 2
    tokens = generate(model, reference_cache(model), input_ids=ids)[:, 50:]
    other = generate(model, reference_cache(model), input_ids=changed)[:, 50:]
    assert not torch.equal(tokens, other)
    assert len(set(tokens[0].tolist())) > 10
