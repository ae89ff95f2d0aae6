"""Attention masks of every shape and dtype, against transformers' eager attention."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask, sdpa_mask, sliding_window_causal_mask_function

from hf.families import (
    CACHE_NAME,
    WINDOW,
    decode,
    forward,
    generate,
    kvarn_cache,
    left_padded,
    make_model,
    prompt,
    reference_cache,
)
from kvarn_rs.errors import DtypeError, KvarnError, ShapeError, UnsupportedError
from kvarn_rs.hf import DenseFallbackWarning, KvarnCache, register
from kvarn_rs.hf.masks import KvarnMask, kvarn_mask

# The same sums in another order; logits of these models are of the order of 1.
TOLERANCE = 1e-4
HEADS = 4
LENGTH = WINDOW - 4  # so that layers with a window show every position


def causal(batch_size: int, heads: int, hidden: slice | None = None) -> torch.Tensor:
    """bool [batch_size, heads, LENGTH, LENGTH], each head with a pattern of its own where there are several."""
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().repeat(batch_size, heads, 1, 1)
    for head in range(1, heads):
        seen[:, head, :, : head + 1] = False
        seen[:, head].diagonal(dim1=1, dim2=2).fill_(True)
    if hidden is not None:
        seen[-1, :, :, hidden] = False
        seen[-1, 0].diagonal().fill_(True)
    return seen


def added(seen: torch.Tensor, hidden: float) -> torch.Tensor:
    return torch.where(seen, 0.0, hidden)


def columns(batch_size: int) -> torch.Tensor:
    """bool [batch_size, 1, 1, LENGTH]: every query sees these positions, later ones too."""
    seen = torch.ones(batch_size, 1, 1, LENGTH, dtype=torch.bool)
    seen[..., 3:7] = False
    return seen


LOWEST = torch.finfo(torch.float32).min
MASKS = {
    "columns": columns(2),
    "columns of all rows": columns(1),
    "columns, added": added(columns(2), LOWEST),
    "every position": torch.ones(2, 1, 1, LENGTH, dtype=torch.bool),
    "queries of all rows": causal(1, 1),
    "queries": causal(2, 1, slice(2, 6)),
    "heads": causal(2, HEADS),
    "heads of all rows": causal(1, HEADS),
    "heads, added": added(causal(2, HEADS), LOWEST),
    "minus infinity": added(causal(2, 1), float("-inf")),
    "-1e4": added(causal(2, 1, slice(2, 6)), -1e4),
    "a bias": torch.linspace(-3, 3, LENGTH * LENGTH).view(1, 1, LENGTH, LENGTH) + added(causal(1, 1), LOWEST),
    "float64": added(causal(2, 1, slice(2, 6)), LOWEST).double(),
    "float16": added(causal(2, 1, slice(2, 6)), torch.finfo(torch.float16).min).half(),
}


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("name", MASKS)
def test_a_caller_s_mask_is_used_as_it_is(model_of, family, name):
    model, mask, ids = model_of(family), MASKS[name], prompt(2, LENGTH)
    float_mask = mask if mask.dtype.is_floating_point else added(mask, LOWEST)  # eager adds its mask
    expected = forward(model, reference_cache(model), ids, float_mask)
    cache = kvarn_cache(model)
    with pytest.warns(DenseFallbackWarning, match="2-D attention_mask"):
        actual = forward(model, cache, ids, mask)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE, check_dtype=False)


@pytest.mark.parametrize("family", ["llama", "qwen3_mixed"])
@pytest.mark.parametrize("num_new", [1, 2])
def test_a_caller_s_mask_of_columns_goes_on_after_a_prompt(model_of, family, num_new):
    """For a single query it is the same as a 2-D mask, so pages serve it; of two, the first sees the second, too."""
    model = model_of(family)
    batch = left_padded([LENGTH, 11])
    grown = torch.cat([batch["attention_mask"], torch.ones(2, num_new, dtype=torch.long)], 1)
    reference = reference_cache(model)
    forward(model, reference, **renamed(batch))
    positions = {"position_ids": (grown.cumsum(-1) - 1)[:, -num_new:]}
    mask = grown.bool()[:, None, None]
    expected = forward(model, reference, prompt(2, num_new), added(mask, LOWEST), **positions)
    cache = kvarn_cache(model)
    forward(model, cache, **renamed(batch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DenseFallbackWarning)
        actual = forward(model, cache, prompt(2, num_new), mask, **positions)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    assert cache.stats()["fallback_reasons"] == ({} if num_new == 1 else {"custom_mask": 3})


def renamed(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"ids": batch["input_ids"], "mask": batch["attention_mask"]}


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.long), DtypeError),
        (torch.ones(2, 1, 1, LENGTH, dtype=torch.int32), DtypeError),
        (torch.ones(2, 1, LENGTH, LENGTH + 1, dtype=torch.bool), ShapeError),
        (torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool), ShapeError),
        (torch.ones(2, 3, LENGTH, LENGTH, dtype=torch.bool), ShapeError),
        (torch.ones(2, 1, LENGTH - 1, LENGTH, dtype=torch.bool), ShapeError),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_and_changes_nothing(model_of, mask, error):
    model = model_of("llama")
    cache = kvarn_cache(model)
    ids = prompt(2, LENGTH)
    with pytest.raises(error, match="attention mask"):
        forward(model, cache, ids, mask)
    assert cache.get_seq_length() == 0
    assert cache.stats()["bytes_in_use"] == 0
    torch.testing.assert_close(forward(model, cache, ids), forward(model, kvarn_cache(model), ids))


@pytest.mark.parametrize("other", [False, True])
def test_a_mask_that_is_no_tensor_is_refused(model_of, other):
    model = model_of("llama")
    cache = kvarn_cache(model)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, LENGTH, LENGTH, device="cpu")
    with pytest.raises(UnsupportedError, match="not BlockMask"):
        model(prompt(1, LENGTH), attention_mask=mask, **{CACHE_NAME: DynamicCache() if other else cache})
    assert cache.get_seq_length() == 0


def test_a_model_whose_layers_disagree_with_its_mask_follows_the_mask():
    """Sliding layers in the config, and code that gives them the mask of full attention, or a narrower window."""
    model = make_model("mistral")
    ids = prompt(1, WINDOW + 9)
    for window in (None, WINDOW // 2):
        model.config.sliding_window = WINDOW
        cache, reference = kvarn_cache(model), reference_cache(model)
        model.config.sliding_window = window  # the model makes its mask from this
        expected = forward(model, reference, ids)
        model.set_attn_implementation("kvarn")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DenseFallbackWarning)
            actual = forward(model, cache, ids)
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
        assert cache.stats()["fallback_reasons"] == ({"other_window": 3} if window is None else {})
    model.config.sliding_window = WINDOW


def test_is_causal_false_does_not_undo_a_causal_mask(model_of):
    """Attention classes may say that they are not causal and leave it to the mask: eager goes by the mask alone."""
    model = make_model("llama")
    batch = left_padded([40, 22])
    expected = generate(model, reference_cache(model), **batch)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    cache = kvarn_cache(model)
    assert torch.equal(generate(model, cache, **batch), expected)
    assert cache.stats()["dense_fallbacks"] == 0


# What models see of the mask ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("padded", [False, True])
def test_a_model_that_looks_at_the_mask_sees_the_whole_one(window, padded):
    tokens = torch.ones(2, 20, dtype=torch.bool)
    if padded:
        tokens[1, :9] = False
    sizes: dict[str, Any] = {"batch_size": 2, "q_length": 5, "kv_length": 20, "q_offset": 15, "attention_mask": tokens}
    if window is not None:
        sizes["mask_function"] = sliding_window_causal_mask_function(window)
    whole = sdpa_mask(**sizes, allow_is_causal_skip=False)
    assert whole is not None
    mask = kvarn_mask(**sizes)
    assert isinstance(mask, KvarnMask)
    assert (mask.is_causal, mask.window) == (True, window)
    assert (mask.shape, mask.dtype) == (whole.shape, torch.bool)
    assert torch.equal(mask.clone(), whole)
    assert torch.equal(mask & whole, whole)
    assert torch.equal(~mask, ~whole)
    assert torch.equal(mask[:, 0], whole[:, 0])
    assert torch.equal(mask.expand(2, 4, 5, 20), whole.expand(2, 4, 5, 20))
    assert torch.equal(torch.cat([mask, mask], -1), torch.cat([whole, whole], -1))
    for cut in (slice(-3, None), slice(0, 2), slice(1, 4, 2)):
        assert torch.equal(mask[:, :, cut].clone(), whole[:, :, cut])
        assert torch.equal(mask[:, :, :, cut].clone(), whole[:, :, :, cut])
    last: Any = mask[:, :, -3:]  # what models that share K and V between layers do
    others: list[Any] = [mask[:, :, :3], mask[:, :, :, 1:], mask[:1]]
    assert last.is_causal
    assert not any(part.is_causal for part in others)


def test_a_mask_that_is_added_to_scores_is_refused():
    """True + score: hidden positions would get 0, visible ones 1."""
    scores = torch.randn(2, 4, 20, 20)
    for made in (kvarn_mask(2, 20, 20), kvarn_mask(2, 20, 20, allow_is_causal_skip=False)):
        for mask in (made, made[:, :, :, :20]):
            for add in (lambda a, b: a + b, lambda a, b: b + a, lambda a, b: a.clone().add_(b)):
                with pytest.raises(UnsupportedError, match="eager"):
                    add(scores, mask)


def test_a_mask_of_keys_that_go_on_after_the_queries_is_whole():
    tokens = torch.zeros(1, 32, dtype=torch.bool)
    tokens[:, :12] = True
    for offset in (7, torch.tensor(7)):
        sizes: dict[str, Any] = {"q_length": 5, "kv_length": 32, "q_offset": offset, "attention_mask": tokens}
        mask = kvarn_mask(1, **sizes)
        assert not (isinstance(mask, KvarnMask) and mask.is_causal)
        whole = sdpa_mask(1, **sizes, allow_is_causal_skip=False)
        assert whole is not None
        assert torch.equal(mask.clone(), whole)


def test_masks_are_tensors_while_a_graph_is_traced():
    register()
    config = make_model("llama").config
    config._attn_implementation = "kvarn"

    @torch.compile(backend="eager", fullgraph=True)
    def masked(embeds: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        made: Any = create_causal_mask(config, embeds, mask, None)
        return torch.where(made, 0.0, 1.0)

    mask = torch.ones(1, 6, dtype=torch.long)
    traced = masked(torch.zeros(1, 6, 64), mask)
    assert torch.equal(traced == 0, torch.ones(6, 6, dtype=torch.bool).tril()[None, None])


def test_a_padded_batch_whose_mask_is_read_by_a_hook_stays_on_the_pages(model_of):
    model = model_of("llama")
    batch = left_padded([40, 22])
    expected = generate(model, reference_cache(model), **batch)
    seen = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        mask = kwargs["attention_mask"]
        seen.append((args[0].shape[1], mask.shape, mask.float().mean()))

    cache = kvarn_cache(model)
    handle = model.model.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    try:
        assert torch.equal(generate(model, cache, **batch), expected)
    finally:
        handle.remove()
    assert len(seen) == 30
    assert all(shape == (2, 1, num_queries, 40 + step) for step, (num_queries, shape, _) in enumerate(seen))
    assert cache.stats()["dense_fallbacks"] == 0


# Sliding windows of one position ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
def test_a_window_of_one_gives_the_tokens_of_transformers(family):
    """transformers' layer keeps all tokens then, and its mask of one column is for all of them: padding, too, so that
    its own eager and sdpa attention differ in padded rows."""
    model = make_model(family, sliding_window=1)
    expected = generate(model, reference_cache(model), input_ids=prompt(2, 30))
    with pytest.warns(DenseFallbackWarning, match="sliding_attention over 1"):
        cache = kvarn_cache(model)
    assert torch.equal(generate(model, cache, input_ids=prompt(2, 30)), expected)
    sliding = [i for i, layer in enumerate(reference_cache(model).layers) if layer.is_sliding]
    assert list(cache.stats()["unpaged"]) == sliding


def test_decoding_under_masks_of_a_caller_keeps_the_cache_usable(model_of):
    """A refused mask between two forwards: the next ones go on as if it had not been."""
    model = model_of("qwen3_mixed")
    ids = prompt(1, LENGTH)
    reference = reference_cache(model)
    forward(model, reference, ids)
    expected = decode(model, reference, prompt(1, 1), 10)
    cache = kvarn_cache(model)
    forward(model, cache, ids)
    for mask in (torch.ones(1, 1, 1, 3, dtype=torch.bool), torch.ones(1, 1, 1, LENGTH + 1, dtype=torch.int8)):
        with pytest.raises(KvarnError):
            forward(model, cache, prompt(1, 1), mask)
    assert torch.equal(decode(model, cache, prompt(1, 1), 10), expected)
    assert isinstance(cache, KvarnCache)
