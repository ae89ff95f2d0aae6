"""Forwards that raise, which leave the cache unchanged. The oracle is the model without a cache."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hf.families import (
    FOUR_LAYERS,
    config_only,
    decode,
    forward,
    generate,
    kvarn_cache,
    make_model,
    prompt,
    pruned,
    recomputed,
)
from kvarn_rs.errors import RollbackError
from kvarn_rs.hf import KvarnCache

NUM_TOKENS = 30


class GaveUpError(Exception):
    """Not one that anybody else raises."""


@contextlib.contextmanager
def failing(module: torch.nn.Module, error: type[BaseException] = GaveUpError) -> Iterator[None]:
    """The module raises instead of running."""

    def fail(*args: object) -> None:
        raise error

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def where(model: Any, name: str) -> torch.nn.Module:
    layers = model.model.layers
    return {
        "first_mlp": layers[0].mlp,
        "second_attention": layers[1].self_attn,
        "third_output": layers[2].self_attn.o_proj,
        "last_mlp": layers[3].mlp,
        "norm": model.model.norm,
    }[name]


@pytest.mark.parametrize("error", [GaveUpError, KeyboardInterrupt])
@pytest.mark.parametrize("at", ["first_mlp", "second_attention", "third_output", "last_mlp", "norm"])
@pytest.mark.parametrize("family", FOUR_LAYERS)
@pytest.mark.parametrize("make_cache", [kvarn_cache, config_only])
def test_a_forward_that_raises_can_be_repeated(family, at, error, make_cache):
    model = make_model(family, **FOUR_LAYERS[family])
    ids = prompt(2, 40)
    expected = recomputed(model, ids, NUM_TOKENS)
    cache = make_cache(model)
    seen = 0
    for length in (40, 41, 52) if make_cache is kvarn_cache else (52,):
        text = torch.cat([ids, expected], 1)[:, seen:length]
        if make_cache is config_only:
            forward(model, cache, text[:, :40])  # only a first forward is not seen through
            seen, text = 40, text[:, 40:]
        with failing(where(model, at), error), pytest.raises(error):
            forward(model, cache, text)
        assert [cache.get_seq_length(layer_idx) for layer_idx in range(4)] == [seen] * 4
        assert cache.get_mask_sizes(3, 0)[0] <= seen + 3
        with pytest.warns(RuntimeWarning, match="dropped a forward that raised"):
            forward(model, cache, text)
        seen = length
    assert cache.stats()["dropped_forwards"] == (3 if make_cache is kvarn_cache else 1)
    assert torch.equal(decode(model, cache, expected[:, 12:13], NUM_TOKENS - 13), expected[:, 13:])


@pytest.mark.parametrize("error", [GaveUpError, KeyboardInterrupt])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 1, 3]], ids=str)
def test_generate_can_be_repeated_after_an_interruption(kept, error):
    model = pruned("llama", kept)
    ids = prompt(1, 40)
    expected = recomputed(model, ids, 20)
    cache = kvarn_cache(model)
    text = torch.cat([ids, generate(model, cache, input_ids=ids, max_new_tokens=5)[:, 40:]], 1)
    with failing(model.model.layers[1].mlp, error), pytest.raises(error):
        generate(model, cache, input_ids=text, max_new_tokens=15)
    with pytest.warns(RuntimeWarning, match="dropped a forward"):
        actual = generate(model, cache, input_ids=text, max_new_tokens=15)
    assert torch.equal(actual[:, 40:], expected)


def test_what_is_written_after_a_forward_that_raised_finds_the_cache_as_before_it(tmp_path):
    model = pruned("llama", [0, 1, 3])
    ways: list[Callable[[KvarnCache], Any]] = [
        copy.deepcopy,
        lambda cache: cache.crop(0),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.save(tmp_path / "x"),
        pickle.dumps,
    ]
    for way in ways:
        cache = kvarn_cache(model)
        forward(model, cache, prompt(2, 20))
        with failing(model.model.layers[1].mlp), pytest.raises(GaveUpError):
            forward(model, cache, prompt(2, 3))
        with pytest.warns(RuntimeWarning, match="after 2 of 4 layers"):
            way(cache)
        assert [cache.get_seq_length(layer_idx) for layer_idx in range(4)] == [20, 20, 0, 20]


def test_a_first_forward_that_raises_unseen_is_refused_by_the_next_one():
    """A cache made from a config knows the model from its first K and V on."""
    model = make_model("llama")
    expected = recomputed(model, prompt(1, 20), 5)
    cache = config_only(model)
    with failing(model.model.layers[1].mlp), pytest.raises(GaveUpError):
        forward(model, cache, prompt(1, 20))
    with pytest.raises(RollbackError, match=r"layer 2 has 0 of 20 positions.*reset\(\)"):
        forward(model, cache, prompt(1, 20))
    cache.reset()
    assert torch.equal(decode(model, cache, prompt(1, 20), 5), expected)


def test_an_exception_that_a_module_around_the_model_catches_is_one():
    class Retries(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, cache: KvarnCache, ids: torch.Tensor) -> torch.Tensor:
            forward(self.model, cache, ids)
            with failing(self.model.model.layers[1].mlp), contextlib.suppress(GaveUpError):
                forward(self.model, cache, ids[:, :1])
            return decode(self.model, cache, ids[:, :1], 10)

    model, ids = pruned("llama", [0, 1, 3]), prompt(1, 20)
    expected = recomputed(model, torch.cat([ids, ids[:, :1]], 1), 10)
    with pytest.warns(RuntimeWarning, match="dropped a forward"):
        assert torch.equal(Retries(model)(kvarn_cache(model), ids), expected)


@pytest.mark.parametrize("layer_idx", [0, 1, 2])
def test_layers_that_are_not_paged_are_refused_after_a_forward_that_raised(layer_idx):
    model = make_model("qwen3_next")
    cache = kvarn_cache(model)
    forward(model, cache, prompt(1, 30))
    with failing(model.model.layers[layer_idx].mlp), pytest.raises(GaveUpError):
        forward(model, cache, prompt(1, 1))
    for _ in range(2):
        with pytest.raises(RollbackError, match=r"call reset\(\)"):
            forward(model, cache, prompt(1, 1))
    cache.reset()
    expected = decode(model, kvarn_cache(model), prompt(1, 30), 5)
    assert torch.equal(decode(model, cache, prompt(1, 30), 5), expected)


# The model -----------------------------------------------------------------------------------------------------------


def test_a_model_keeps_one_pair_of_hooks_and_can_be_copied_and_pickled():
    model = make_model("llama")
    cache = kvarn_cache(model)
    kvarn_cache(model)
    assert [len(module._forward_hooks) for module in (model, model.model, model.model.layers[0])] == [1, 1, 0]
    expected = decode(model, cache, prompt(1, 20), 5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        cache = kvarn_cache(twin)
        with failing(twin.model.layers[1].mlp), pytest.raises(GaveUpError):
            forward(twin, cache, prompt(1, 20))
        assert cache.get_seq_length() == 0
        with pytest.warns(RuntimeWarning, match="dropped a forward"):
            assert torch.equal(decode(twin, cache, prompt(1, 20), 5), expected)
