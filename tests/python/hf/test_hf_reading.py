"""Reading a cache within a forward: it changes nothing and gives the values of `DynamicCache`."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

from hf.families import decode, forward, generate, kvarn_cache, left_padded, make_model, prompt
from kvarn_rs import Calibration
from kvarn_rs.errors import OpenStepError, UnsupportedError
from kvarn_rs.hf import KvarnCache, register

# The same K and V; under padding, ours are zero and theirs what the model made of it.
FAMILIES = ["llama", "qwen3_mixed", "gemma3", "gpt_oss"]
READING = pytest.mark.filterwarnings("ignore::kvarn_rs.hf.DenseFallbackWarning")


@contextlib.contextmanager
def after_each_attention(model: Any, read: Callable[[int], Any]) -> Iterator[list[Any]]:
    """Calls `read` with the layer's number after each attention module; gives what it returned."""
    told: list[Any] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda *_, layer_idx=layer_idx: told.append(read(layer_idx)))
        for layer_idx, layer in enumerate(model.model.layers)
    ]
    try:
        yield told
    finally:
        for hook in hooks:
            hook.remove()


def all_that_can_be_read(cache: Any) -> dict[str, Any]:
    """Numbers and tensors; not what a KvarnCache counts."""
    assert len(list(cache.layers)) == len(cache)
    assert repr(cache)
    stats = cache.stats() if isinstance(cache, KvarnCache) else None
    assert stats is None or stats["dropped_forwards"] == 0
    indices, layers = range(len(cache)), list[Any](cache.layers)
    return {
        "lengths": [cache.get_seq_length(), *(cache.get_seq_length(layer_idx) for layer_idx in indices)],
        "mask_sizes": [cache.get_mask_sizes(query_length, idx) for idx in indices for query_length in (1, 3, 50)],
        "is_initialized": [layer.is_initialized for layer in layers],
        "keys": [None if layer.keys is None else layer.keys.clone() for layer in layers],
        "values": [None if layer.values is None else layer.values.clone() for layer in layers],
    }


def assert_same(actual: dict[str, Any], expected: dict[str, Any], tokens: torch.Tensor | None) -> None:
    for name in ("lengths", "mask_sizes", "is_initialized"):
        assert actual[name] == expected[name], name
    for name in ("keys", "values"):
        for mine, theirs in zip(actual[name], expected[name], strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and tokens is not None:
                theirs = theirs * tokens[:, None, -theirs.shape[2] :, None]
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


@READING
@pytest.mark.parametrize("implementation", ["kvarn", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_reads_what_a_dynamic_cache_has_and_changes_nothing(family, implementation):
    model = make_model(family)
    chunks = [prompt(2, 30), prompt(2, 1, seed=8), prompt(2, 20, seed=9), prompt(2, 1, seed=10)]
    runs = []
    for make in (lambda: transformers.DynamicCache(config=model.config), lambda: kvarn_cache(model)):
        cache = make()
        register()
        model.set_attn_implementation(implementation)
        before = all_that_can_be_read(cache)
        with after_each_attention(model, lambda _, cache=cache: all_that_can_be_read(cache)) as told:
            logits = [forward(model, cache, ids) for ids in chunks]
        runs.append((logits, [before, *told, all_that_can_be_read(cache)]))
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=0, atol=1e-4)
    for mine, theirs in zip(runs[1][1], runs[0][1], strict=True):
        assert_same(mine, theirs, None)


@READING
@pytest.mark.parametrize("family", ["llama", "qwen3_mixed"])
def test_a_hook_reads_zeros_where_padding_is(family):
    model = make_model(family)
    batch = left_padded([40, 21])
    tokens = batch["attention_mask"].bool()
    runs = []
    for make in (lambda: transformers.DynamicCache(config=model.config), lambda: kvarn_cache(model)):
        cache = make()
        register()
        model.set_attn_implementation("kvarn")
        with after_each_attention(model, lambda _, cache=cache: all_that_can_be_read(cache)) as told:
            forward(model, cache, batch["input_ids"], batch["attention_mask"])
        runs.append(told)
    for mine, theirs in zip(runs[1], runs[0], strict=True):
        assert_same(mine, theirs, tokens)


@READING
@pytest.mark.parametrize("format", ["raw", "int8", "int4", "int2"])
@pytest.mark.parametrize("family", ["llama", "qwen3_mixed"])
def test_a_generation_does_not_depend_on_who_looks(family, format):
    model = make_model(family)
    # Of each cache alone: what the model's own learns of one generation changes the next.
    expected = generate(
        model, kvarn_cache(model, format, calibration=Calibration()), **left_padded([50, 33]), num_beams=2
    )
    cache = kvarn_cache(model, format, calibration=Calibration())
    with after_each_attention(model, lambda _: all_that_can_be_read(cache)):
        actual = generate(model, cache, **left_padded([50, 33]), num_beams=2)
    assert torch.equal(actual, expected)


@READING
def test_what_is_read_before_attention_does_not_decide_what_is_padding():
    """A hook on the value projection of a later layer, and code that reads between update and attention."""
    model = make_model("llama")
    batch = left_padded([40, 21])
    expected = generate(model, kvarn_cache(model), **batch)
    cache = kvarn_cache(model)
    update = cache.update

    def update_and_read(*args: Any, **kwargs: Any) -> Any:
        all_that_can_be_read(cache)
        handles = update(*args, **kwargs)
        all_that_can_be_read(cache)
        return handles

    cache.update = update_and_read  # ty: ignore
    assert torch.equal(generate(model, cache, **batch), expected)


WRITES: dict[str, Callable[[KvarnCache], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickle.dumps,
    "crop": lambda cache: cache.crop(-1),
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "batch_repeat_interleave": lambda cache: cache.batch_repeat_interleave(2),
    "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([0])),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("knows_its_model", [True, False])
def test_a_cache_cannot_be_changed_or_copied_within_a_forward(name, knows_its_model, first):
    model = make_model("llama")
    register()
    ids = prompt(2, 20)
    expected = decode(model, kvarn_cache(model), ids, 10)
    cache = kvarn_cache(model) if knows_its_model else KvarnCache(model.config, "raw", block_size=16)
    tokens = []
    if not first:
        ids = forward(model, cache, ids)[:, -1:].argmax(-1)
        tokens.append(ids)

    def write(layer_idx: int) -> None:
        with pytest.raises(OpenStepError, match="in the middle of a forward"):
            WRITES[name](cache)

    with after_each_attention(model, write):
        tokens.append(decode(model, cache, ids, 10 - len(tokens)))
    assert torch.equal(torch.cat(tokens, 1), expected)


def test_a_strict_cache_refuses_to_be_read_and_stays_as_it_was():
    model = make_model("llama")
    expected = decode(model, kvarn_cache(model), prompt(1, 20), 10)
    cache = kvarn_cache(model, strict=True)

    def read(layer_idx: int) -> None:
        with pytest.raises(UnsupportedError, match="keys or values"):
            _ = cache.layers[layer_idx].keys

    with after_each_attention(model, read):
        assert torch.equal(decode(model, cache, prompt(1, 20), 10), expected)


@READING
def test_another_thread_may_look_at_a_forward():
    import threading

    model = make_model("llama")
    expected = decode(model, kvarn_cache(model), prompt(1, 20), 10)
    cache = kvarn_cache(model)
    told: list[Any] = []

    def look(layer_idx: int) -> None:
        thread = threading.Thread(target=lambda: told.append(cache.get_seq_length(layer_idx)))
        thread.start()
        thread.join()

    with after_each_attention(model, look):
        assert torch.equal(decode(model, cache, prompt(1, 20), 10), expected)
    assert told == [length for length in range(20, 30) for _ in range(3)]
    assert cache.stats()["dropped_forwards"] == 0


@pytest.mark.parametrize("knows_its_model", [True, False])
def test_a_model_may_be_run_within_a_forward_of_itself(knows_its_model):
    model = make_model("llama")
    register()
    expected = decode(model, kvarn_cache(model), prompt(1, 20), 10)
    cache = kvarn_cache(model) if knows_its_model else KvarnCache(make_model("llama").config, "raw", block_size=16)
    others, lengths = [kvarn_cache(model), kvarn_cache(model)], []

    def run(_: Any, args: Any, output: Any) -> None:
        if others:
            forward(model, others.pop(), prompt(1, 7))
            lengths.append([cache.get_seq_length(layer_idx) for layer_idx in range(3)])

    hook = model.model.layers[1].self_attn.register_forward_hook(run)
    actual = decode(model, cache, prompt(1, 20), 10)
    hook.remove()
    assert torch.equal(actual, expected)
    assert lengths == [[20, 20, 0]] * 2  # the second within the first
