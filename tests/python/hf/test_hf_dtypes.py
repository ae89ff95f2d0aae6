"""Dtypes that change between forwards: accepted, or refused by an error that says what to do and changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hf.families import CACHE_NAME, decode, forward, kvarn_cache, make_model, prompt
from kvarn_rs import Calibration
from kvarn_rs.errors import DtypeError
from kvarn_rs.hf import DenseFallbackWarning
from kvarn_rs.hf.attention import kvarn_attention

QUANTIZED = ["int8", "int4"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of logits, relative to their size, root mean square: several roundings to bfloat16 (2^-9 each), and the codes of K and
# V that they push over an edge.
ROUNDING = 0.1
# Of outputs of the order of 1: the rounding of eight-bit codes.
EIGHT_BITS = 0.02


def copies(dtypes: list[torch.dtype], **overrides: Any) -> list[Any]:
    """One model in several dtypes."""
    model = make_model("llama", **overrides)
    return [copy.deepcopy(model).to(dtype) for dtype in dtypes]


def cache_of(model: Any, format: str = "raw") -> Any:
    """A cache that learns by itself: what its model's own knows depends on what ran before."""
    return kvarn_cache(model, format, calibration=Calibration())


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.float() - expected.float()).square().mean().sqrt() / expected.float().square().mean().sqrt()
    assert error < ROUNDING, error


@pytest.mark.parametrize("after", DTYPES, ids=str)
@pytest.mark.parametrize("before", DTYPES, ids=str)
@pytest.mark.parametrize("format", QUANTIZED)
def test_quantized_pages_accept_a_model_whose_dtype_changes(format, before, after):
    first, second, reference = copies([before, after, torch.float32], num_hidden_layers=1)
    expected_cache = cache_of(reference, format)
    ids = prompt(2, 60)
    expected = [forward(reference, expected_cache, ids), forward(reference, expected_cache, ids[:, :20])]
    cache = cache_of(first, format)
    kvarn_cache(second)  # sets the attention
    actual = [forward(first, cache, ids), forward(second, cache, ids[:, :20])]
    assert [logits.dtype for logits in actual] == [before, after]
    for mine, theirs in zip(actual, expected, strict=True):
        assert_near(mine, theirs)
    assert cache.get_seq_length() == 80
    assert cache.stats()["dense_fallbacks"] == 0
    with pytest.warns(DenseFallbackWarning):
        assert {cache.layers[0].keys.dtype, cache.layers[0].values.dtype, cache.layers[0].dtype} == {after}


@pytest.mark.parametrize(("before", "after"), [(b, a) for b in DTYPES for a in DTYPES if a != b], ids=str)
def test_raw_pages_accept_lossless_dtypes_and_refuse_the_rest(before, after):
    first, second = copies([before, after])
    cache, twin = kvarn_cache(first), kvarn_cache(first)
    kvarn_cache(second)
    ids = prompt(2, 30)
    for one in (cache, twin):
        forward(first, one, ids)
    if before == torch.float32:
        assert forward(second, cache, ids[:, :1]).dtype == after
        assert cache.get_seq_length() == 31
        return
    names = [str(dtype).removeprefix("torch.") for dtype in (after, before)]
    for _ in range(2):
        with pytest.raises(DtypeError, match=rf"of {names[0]} came to raw pages .* of {names[1]}.*reset\(\)"):
            forward(second, cache, ids[:, :1])
        assert cache.get_seq_length() == 30
    assert torch.equal(forward(first, cache, ids[:, :1]), forward(first, twin, ids[:, :1]))
    cache.reset()
    assert torch.equal(decode(second, cache, ids, 5), decode(second, kvarn_cache(second), ids, 5))


@pytest.mark.parametrize("empty", ["reset", "crop"])
@pytest.mark.parametrize("after", DTYPES, ids=str)
@pytest.mark.parametrize("before", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["raw", "int8"])
def test_an_emptied_cache_accepts_another_dtype(format, before, after, empty):
    first, second = copies([before, after])
    cache = cache_of(first, format)
    forward(first, cache, prompt(2, 30))
    cache.reset() if empty == "reset" else cache.crop(-30)
    expected = decode(second, cache_of(second, format), prompt(2, 40), 10)
    assert torch.equal(decode(second, cache, prompt(2, 40), 10), expected)
    assert cache.stats()["unpaged_layers"] == 0


@pytest.mark.parametrize("format", ["raw", *QUANTIZED])
def test_autocast_gets_pages(format):
    """Rotated K are float32 there, V bfloat16."""
    model = make_model("llama", num_hidden_layers=1)
    ids, cache, expected_cache = prompt(2, 60), cache_of(model, format), cache_of(model, format)
    expected = [forward(model, expected_cache, part) for part in (ids, ids[:, :1])]
    with torch.autocast("cpu", torch.bfloat16):
        actual = [forward(model, cache, part) for part in (ids, ids[:, :1])]
    for mine, theirs in zip(actual, expected, strict=True):
        assert_near(mine, theirs)
    assert cache.stats()["unpaged_layers"] == cache.stats()["dense_fallbacks"] == 0
    forward(model, cache, ids[:, :1])  # and out of it again
    assert cache.get_seq_length() == 62


@pytest.mark.parametrize("format", ["raw", "int8"])
@pytest.mark.parametrize("num_new", [3, 40])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_k_and_v_of_two_dtypes_are_paged(dtypes, num_new, format):
    cache = kvarn_cache(make_model("llama"), format)
    torch.manual_seed(0)
    k, v = torch.randn(1, 2, num_new, 16).to(dtypes[0]), torch.randn(1, 2, num_new, 16).to(dtypes[1])
    keys, values = cache.update(k, v, 0)
    assert (keys.dtype, values.dtype) == dtypes
    query = torch.randn(1, 4, num_new, 16)
    expected, _ = kvarn_attention(torch.nn.Identity().eval(), query, k.float(), v.float(), None)
    for dtype in DTYPES:  # the output is of the query's
        actual, _ = kvarn_attention(torch.nn.Identity().eval(), query.to(dtype), keys, values, None)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), expected, rtol=0, atol=EIGHT_BITS)
    assert cache.stats()["dense_fallbacks"] == 0
    with pytest.warns(DenseFallbackWarning):
        read = (cache.layers[0].keys, cache.layers[0].values)
    assert (read[0].dtype, read[1].dtype) == dtypes
    if format == "raw":
        assert torch.equal(read[0], k)
        assert torch.equal(read[1], v)
        with pytest.warns(DenseFallbackWarning):
            biased, _ = kvarn_attention(
                torch.nn.Identity().eval(), query, keys, values, None, position_bias=torch.zeros(1, 4, num_new, num_new)
            )
        torch.testing.assert_close(biased, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", ["raw", "int8"])
def test_a_dtype_that_no_pages_hold_is_refused_once_there_are_pages(format):
    model, double = copies([torch.float32, torch.float64])
    cache = cache_of(model, format)
    kvarn_cache(double)
    forward(model, cache, prompt(1, 30))
    for held in (30, 0):
        with pytest.raises(DtypeError, match=f"float64 came to {format} pages that hold {held} positions"):
            forward(double, cache, prompt(1, 1))
        assert cache.get_seq_length() == held
        cache.reset()
    assert torch.equal(decode(model, cache, prompt(1, 30), 5), decode(model, cache_of(model, format), prompt(1, 30), 5))
    with pytest.warns(DenseFallbackWarning, match="float64"):
        double(input_ids=prompt(1, 5), **{CACHE_NAME: kvarn_cache(double, format)})


def test_layers_of_two_dtypes_share_quantized_pages():
    model = make_model("llama")
    expected = forward(model, kvarn_cache(model, "int8"), prompt(1, 30))
    hooks = [
        getattr(model.model.layers[1].self_attn, name).register_forward_hook(lambda _, args, out: out.bfloat16())
        for name in ("k_proj", "v_proj")
    ]
    cache = kvarn_cache(model, "int8")
    assert_near(forward(model, cache, prompt(1, 30)), expected)
    raw = kvarn_cache(model)
    forward(model, raw, prompt(1, 30))  # float32 first: wide enough
    for hook in hooks:
        hook.remove()
    assert (cache.get_seq_length(), raw.get_seq_length()) == (30, 30)
