"""Reference attention in float64, and helpers to fill caches and to check that errors change nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kvarn_rs import KvarnError, PagedKvCache, Step, UnknownSequenceError

KV_HEADS = 2
HEAD_DIM = 16
BLOCK_SIZE = 16
# Two INT8 steps of unit normals under the statistics of a few tokens.
REFITTED = 0.1
# Tokens of the neighbour of `step_beside_a_neighbour`, and new ones of each sequence of its step.
NUM_TOKENS = 20
NUM_NEW = 3

Pair = tuple[torch.Tensor, torch.Tensor]


def make_cache(format: str = "raw", **settings: Any) -> PagedKvCache:
    """A small cache of one layer unless told."""
    defaults = {"num_layers": 1, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "block_size": BLOCK_SIZE}
    return PagedKvCache(**{**defaults, "format": format, **settings})


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def keys_and_values(num_tokens: int, seed: int = 0, batch: int = 1, dtype: torch.dtype = torch.float32) -> Pair:
    """Two different tensors [batch, KV_HEADS, num_tokens, HEAD_DIM]."""
    shape = (batch, KV_HEADS, num_tokens, HEAD_DIM)
    return normal(*shape, seed=2 * seed, dtype=dtype), normal(*shape, seed=2 * seed + 1, dtype=dtype)


def append_layers(cache: PagedKvCache, step: Step, k: torch.Tensor, v: torch.Tensor) -> None:
    """The same keys and values in every layer but for their sign, which is the layer's own."""
    for layer in range(cache.num_layers):
        sign = (-1) ** layer
        step.append(layer, k * sign, v * sign)


def extend(cache: PagedKvCache, sequence: int, k: torch.Tensor, v: torch.Tensor, **options: Any) -> None:
    """One committed step of one sequence."""
    with cache.begin_step([sequence], k.shape[2], **options) as step:
        append_layers(cache, step, k, v)


def filled(cache: PagedKvCache, num_tokens: int, seed: int = 0) -> int:
    """A new sequence of that many tokens, those of `keys_and_values`."""
    sequence = cache.new_sequence()
    extend(cache, sequence, *keys_and_values(num_tokens, seed, dtype=getattr(torch, cache.dtype)))
    return sequence


def settle(cache: PagedKvCache, sequence: int) -> None:
    """A step without tokens: seals what is due, so that nothing which the sequence holds will change any more."""
    k = torch.zeros(1, cache.num_kv_heads, 0, cache.head_dim, dtype=getattr(torch, cache.dtype))
    extend(cache, sequence, k, k, retain=True)


def contents(cache: PagedKvCache, sequence: int, layer: int = 0, pending: int = 0) -> Pair:
    """Everything that a sequence holds, dequantized to float32, and `pending` tokens of its open step."""
    start = cache.first_held(sequence)
    shape = (1, cache.num_kv_heads, cache.seq_len(sequence) + pending - start, cache.head_dim)
    k, v = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    cache.dequantize(layer, sequence, k, v, start=start)
    return k, v


def same(one: Pair, other: Pair) -> bool:
    """Bit for bit."""
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def same_but_refitted(one: Pair, other: Pair) -> bool:
    """V bit for bit, and K within what rounding a first page anew does."""
    return torch.equal(one[1], other[1]) and distance(one[0], other[0]) <= REFITTED


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [1, num_q_heads, n, D]: the last n of the tokens of k and v [1, num_kv_heads, length, D]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    num_new, length = scores.shape[2:]
    position = torch.arange(length - num_new, length)[:, None]
    age = position - torch.arange(length)
    hidden = (age < 0) | (age >= (length if window is None else window))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        sink = sinks.double().reshape(1, -1, 1, 1).expand(1, -1, num_new, 1)
        scores = torch.cat([scores, sink], 3)
    return torch.softmax(scores, 3)[..., :length] @ v


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference; NaN is infinitely far."""
    if actual.numel() == 0:
        return 0.0
    return torch.nan_to_num((actual.double() - expected.double()).abs(), nan=torch.inf).max().item()


def concatenate(pairs: Sequence[Pair]) -> Pair:
    return torch.cat([k for k, _ in pairs], 2), torch.cat([v for _, v in pairs], 2)


@contextmanager
def refused(cache: PagedKvCache, error: type[KvarnError], *words: object) -> Iterator[None]:
    """The block raises `error` with every word in its message, and no sequence or count has changed by it."""
    known = [sequence for sequence in range(10) if knows(cache, sequence)]
    before = [(contents(cache, sequence), cache.block_table(sequence)) for sequence in known]
    stats = cache.stats()
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error, caught.type
    missing = [word for word in words if str(word) not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
    assert cache.stats() == stats
    for sequence, (held, table) in zip(known, before, strict=True):
        assert cache.block_table(sequence) == table
        assert same(contents(cache, sequence), held)


def knows(cache: PagedKvCache, sequence: int) -> bool:
    try:
        return cache.seq_len(sequence) >= 0
    except UnknownSequenceError:
        return False


@contextmanager
def step_beside_a_neighbour(format: str = "int8", **settings: Any) -> Iterator[tuple[PagedKvCache, Step]]:
    """A step over two sequences of three new tokens each, which is committed with good input in the end."""
    cache = make_cache(format, **settings)
    neighbour, sequences = filled(cache, NUM_TOKENS), [filled(cache, 5, 1), cache.new_sequence()]
    held = contents(cache, neighbour)
    k, v = keys_and_values(NUM_NEW, 2, batch=2, dtype=getattr(torch, settings.get("dtype", "float32")))
    with cache.begin_step(sequences, NUM_NEW) as step:
        yield cache, step
        step.append(0, k, v)
        out = step.attend(0, k, k, v)
    assert same(contents(cache, neighbour), held)
    untroubled = make_cache(format, **settings)
    filled(untroubled, NUM_TOKENS)
    sequences = [filled(untroubled, 5, 1), untroubled.new_sequence()]
    with untroubled.begin_step(sequences, NUM_NEW) as step:
        step.append(0, k, v)
        assert torch.equal(step.attend(0, k, k, v), out)
