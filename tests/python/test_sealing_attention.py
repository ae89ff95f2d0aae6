"""Attention over tiles and open pages in one pass is attention over what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvarn_rs import PagedKvCache
from kvarn_rs._core import is_prefill
from paged_reference import KV_HEADS, Pair, attention, concatenate, contents, extend, make_cache, normal

FORMATS = pytest.mark.parametrize("format", ["int4", "int3", "int2"])
# Of an output row in float32 against float64, relative to its norm; format.md, section 5, asks for 2e-3.
TOLERANCE = 1e-5
# Every block size, and head_dims of one and of several blocks of the rotation.
SHAPES = [(16, 16), (16, 96), (32, 80), (64, 128), (128, 64), (128, 256)]


def keys_of_sizes(cache: PagedKvCache, num_tokens: int, seed: int) -> Pair:
    """Keys whose channels differ in mean and size, and values."""
    size = 1 + torch.arange(cache.head_dim) % 5
    k, v = (normal(1, KV_HEADS, num_tokens, cache.head_dim, seed=2 * seed + i) for i in range(2))
    return k * size + size.flip(0), v


def step_of(cache: PagedKvCache, sequence: int, num_new: int, seed: int, fresh: bool, **options: Any):
    """A step of such keys; gives (q, (k, v), contents with it, out)."""
    k, v = keys_of_sizes(cache, num_new, seed)
    q = normal(1, 3 * KV_HEADS, num_new, cache.head_dim, seed=1000 + seed) / 3
    with cache.begin_step([sequence], num_new) as step:
        step.append(0, k, v)
        out = step.attend(0, q, *((k, v) if fresh else (None, None)), **options)
        held = contents(cache, sequence, pending=num_new)
    return q, (k, v), held, out


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest of all rows."""
    return ((out - expected).norm(dim=3) / expected.norm(dim=3)).max().item()


@FORMATS
@pytest.mark.parametrize(("block_size", "head_dim"), SHAPES)
def test_decode_of_every_length_reads_tiles_and_pages_alike(format, block_size, head_dim) -> None:
    sizes = (1, block_size - 1, block_size, block_size + 1, 2 * block_size, 2 * block_size + 1, 16 * block_size)
    for length in sizes:
        cache = make_cache(format, block_size=block_size, head_dim=head_dim)
        sequence = cache.new_sequence()
        extend(cache, sequence, *keys_of_sizes(cache, length, 0))
        for seed, num_new in enumerate([1, 16] if length > 2 * block_size + 1 else [1, 2, 5, 16], 1):
            context_len = cache.seq_len(sequence)
            q, own, held, out = step_of(cache, sequence, num_new, seed, fresh=True)
            if is_prefill(block_size, context_len, num_new):  # the first page is not half written
                held = concatenate([(held[0][:, :, :context_len], held[1][:, :, :context_len]), own])
            assert relative_error(out, attention(q, *held)) <= TOLERANCE, (length, num_new)
        assert cache.stats()["sealed"] >= cache.seq_len(sequence) // block_size - 1


@FORMATS
@pytest.mark.parametrize("num_new", range(1, 17))
def test_up_to_16_queries_read_the_tokens_of_their_own_step_from_pages(format, num_new) -> None:
    cache = make_cache(format, head_dim=32)
    sequence = cache.new_sequence()
    step_of(cache, sequence, 40, 0, fresh=True)
    for seed in range(1, 4):
        q, _, held, out = step_of(cache, sequence, num_new, seed, fresh=True)
        assert relative_error(out, attention(q, *held)) <= TOLERANCE


@FORMATS
@pytest.mark.parametrize("history", [0, 1, 16, 47, 200])
@pytest.mark.parametrize("num_new", [17, 32, 130])
def test_a_prefill_reads_its_own_tokens_unquantized_and_the_history_as_it_is_stored(format, history, num_new) -> None:
    for fresh in (True, False):
        cache = make_cache(format, head_dim=80)
        sequence = cache.new_sequence()
        if history:
            step_of(cache, sequence, history, 0, fresh=True)
        q, own, held, out = step_of(cache, sequence, num_new, 1, fresh=fresh)
        stored = held[0][:, :, :history], held[1][:, :, :history]
        unquantized = attention(q, *concatenate([stored, own]))
        from_pages = attention(q, *held)
        right, wrong = (unquantized, from_pages) if fresh else (from_pages, unquantized)
        assert relative_error(out, right) <= TOLERANCE
        assert relative_error(out, wrong) > 100 * TOLERANCE


@FORMATS
def test_a_step_reads_the_tiles_that_it_seals(format) -> None:
    cache = make_cache(format)
    sequence = cache.new_sequence()
    step_of(cache, sequence, 16, 0, fresh=False)
    before = contents(cache, sequence)
    q, _, held, out = step_of(cache, sequence, 1, 1, fresh=False)
    assert not torch.equal(before[0], held[0][:, :, :16])
    with_page = tuple(torch.cat([old, new[:, :, 16:]], 2) for old, new in zip(before, held, strict=True))
    assert relative_error(out, attention(q, *held)) <= TOLERANCE
    assert relative_error(out, attention(q, *with_page)) > 100 * TOLERANCE


@FORMATS
@pytest.mark.parametrize("window", [1, 5, 16, 37])
@pytest.mark.parametrize("steps", [[100, 1, 16, 40, 1], [1] * 40], ids=["prefills", "decode"])
def test_a_window_over_tiles_sees_its_tokens_and_no_others(format, window, steps) -> None:
    cache = make_cache(format, window=window, head_dim=32)
    sequence = cache.new_sequence()
    for seed, num_new in enumerate(steps):
        q, _, held, out = step_of(cache, sequence, num_new, seed, fresh=False)
        assert relative_error(out, attention(q, *held, window=window)) <= TOLERANCE
    assert cache.first_held(sequence) >= sum(steps[:-1]) - window - 16


@FORMATS
@pytest.mark.parametrize(
    "options",
    [{"softcap": 1.5}, {"sinks": torch.tensor([0.5, -3.0, 4.0, -torch.inf, 1.0, 2.0])}, {"window": 21, "softcap": 3.0}],
    ids=["softcap", "sinks", "window and softcap"],
)
def test_softcap_and_sinks_mean_the_same_over_tiles(format, options) -> None:
    cache = make_cache(format, head_dim=96)
    sequence = cache.new_sequence()
    for seed, num_new in enumerate([60, 1, 5, 30, 1]):
        q, _, held, out = step_of(cache, sequence, num_new, seed, fresh=False, **options)
        assert relative_error(out, attention(q, *held, **options)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiles_of_half_precision_keys_equal_those_of_the_same_values_in_float32(dtype) -> None:
    held = []
    for own_dtype in (dtype, torch.float32):
        cache = make_cache("int4", head_dim=64)
        sequence = cache.new_sequence()
        for seed, num_new in enumerate([60, 1]):
            k, v = (normal(1, KV_HEADS, num_new, 64, seed=2 * seed + i).to(dtype).to(own_dtype) for i in range(2))
            with cache.begin_step([sequence], num_new) as step:
                step.append(0, k, v)
        held.append(contents(cache, sequence))
    assert torch.equal(held[0][0], held[1][0])
    assert torch.equal(held[0][1], held[1][1])
