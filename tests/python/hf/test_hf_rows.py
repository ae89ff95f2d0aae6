"""Row indices out of range: refused, without a change to the cache."""

from __future__ import annotations

import copy

import pytest
import torch

from hf.families import decode, forward, kvarn_cache, make_model, prompt
from kvarn_rs import ShapeError

WRONG = {
    "negative": lambda cache: cache.reorder_cache(torch.tensor([-1, 0])),
    "too large": lambda cache: cache.reorder_cache(torch.tensor([0, 0, 7])),
    "none": lambda cache: cache.reorder_cache(torch.tensor([], dtype=torch.long)),
    "repeated never": lambda cache: cache.batch_repeat_interleave(0),
    "repeated less": lambda cache: cache.batch_repeat_interleave(-1),
    "selected beyond": lambda cache: cache.batch_select_indices(torch.tensor([5])),
}


@pytest.mark.parametrize("move", WRONG.values(), ids=WRONG)
def test_a_missing_row_is_refused_and_changes_nothing(move):
    model = make_model("qwen3_mixed")
    cache, twin = kvarn_cache(model), kvarn_cache(model)
    for one in (cache, twin):
        forward(model, one, prompt(2, 40))
    before = cache.stats()
    with pytest.raises(ShapeError, match=r"nothing was changed|rows of a batch"):
        move(cache)
    assert cache.stats() == before
    next_ids = prompt(2, 1, seed=3)
    assert torch.equal(decode(model, cache, next_ids, 5), decode(model, twin, next_ids, 5))


def test_a_shallow_copy_is_an_independent_cache():
    model = make_model("llama")
    cache = kvarn_cache(model)
    forward(model, cache, prompt(1, 20))
    forward(model, copy.copy(cache), prompt(1, 3))
    assert cache.get_seq_length() == 20
