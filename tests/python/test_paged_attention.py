"""Attention over pages against the reference, for all formats, strides, batches and padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kvarn_rs import PagedKvCache
from paged_reference import (
    BLOCK_SIZE,
    HEAD_DIM,
    KV_HEADS,
    Pair,
    attention,
    concatenate,
    contents,
    distance,
    extend,
    filled,
    keys_and_values,
    make_cache,
    normal,
)

# Sums of a few hundred products of unit normals, in another order than torch's.
FLOAT32_TOLERANCE = 1e-5
# The output of order 1 is rounded to bfloat16 (8 bits) or float16 (11 bits).
ROUNDING = {torch.float32: FLOAT32_TOLERANCE, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# Attention against float32 on the dequantized cache, relative to outputs of order 1 (format.md, section 5).
INT8_TOLERANCE = 2e-3
# Of two candidates, the right one is this much closer than the wrong one.
CLEARLY = 0.05
# The most new tokens of a decode.
DECODE_TOKENS = 16

# Tokens of successive steps: one, a whole block, one over, into and out of an open page, prefills and decodes.
STEPS = [[1], [16], [17], [16, 1], [15, 1, 1, 16], [33, 5, 1, 20], [130, 1], [1, 300, 2]]
OPTIONS: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.7},
    "window": {"window": 9},
    "window of one": {"window": 1},
    "window across blocks": {"window": 37},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([0.5, -3.0, 4.0, -torch.inf])},
    "all": {"scale": 0.5, "window": 21, "softcap": 3.0, "sinks": torch.tensor([1.0, 2.0, -1.0, 0.0])},
}


def attend_steps(cache: PagedKvCache, steps: list[int], num_q_heads: int, fresh: bool = False, **options: Any):
    """Yields (q, everything appended so far, output) of each step of one new sequence."""
    sequence, history = cache.new_sequence(), []
    for index, num_new in enumerate(steps):
        k, v = keys_and_values(num_new, index, dtype=getattr(torch, cache.dtype))
        q = normal(1, num_q_heads, num_new, HEAD_DIM, seed=100 + index, dtype=k.dtype)
        history.append((k, v))
        with cache.begin_step([sequence], num_new) as step:
            step.append(0, k, v)
            out = step.attend(0, q, *((k, v) if fresh else (None, None)), **options)
            yield q, concatenate(history), contents(cache, sequence, pending=num_new), out


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("num_q_heads", [KV_HEADS, 3 * KV_HEADS])
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_raw_pages_give_the_attention_of_torch(steps, num_q_heads, dtype) -> None:
    cache = make_cache("raw", dtype=dtype)
    for q, (k, v), _, out in attend_steps(cache, steps, num_q_heads, fresh=True):
        length, num_new = k.shape[2], q.shape[2]
        mask = torch.ones(num_new, length, dtype=torch.bool).tril(length - num_new)
        expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, enable_gqa=True)
        assert out.dtype == q.dtype
        assert distance(out, expected) <= ROUNDING[q.dtype]


@pytest.mark.parametrize("head_dim", [16, 64, 80, 256])
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_int8_pages_give_the_attention_over_their_decoded_tokens(steps, block_size, head_dim) -> None:
    cache = make_cache("int8", block_size=block_size, head_dim=head_dim)
    sequence = cache.new_sequence()
    for index, num_new in enumerate(steps):
        k, v = (normal(1, KV_HEADS, num_new, head_dim, seed=2 * index + i) for i in range(2))
        q = normal(1, 2 * KV_HEADS, num_new, head_dim, seed=100 + index)
        with cache.begin_step([sequence], num_new) as step:
            step.append(0, k, v)
            out = step.attend(0, q, None, None)
            assert distance(out, attention(q, *contents(cache, sequence, pending=num_new))) <= INT8_TOLERANCE


def coarse(num_tokens: int, seed: int) -> Pair:
    """Values whose large last channel makes the INT8 steps of the others large: quantized or not is easily told."""
    k, v = keys_and_values(num_tokens, seed)
    v[..., -1] *= 50
    return k, v


@pytest.mark.parametrize("history", [0, 5, 40])
@pytest.mark.parametrize(
    ("num_new", "given", "reads_pages"),
    [(1, True, True), (16, True, True), (16, False, True), (17, True, False), (17, False, True), (60, True, False)],
)
def test_a_prefill_reads_its_own_tokens_unquantized_where_given(history, num_new, given, reads_pages) -> None:
    if given and history < BLOCK_SIZE // 2:
        reads_pages = False  # the first page's statistics are of too few tokens
    cache = make_cache("int8")
    sequence = cache.new_sequence()
    extend(cache, sequence, *coarse(history, 1))
    k, v = coarse(num_new, 2)
    q = normal(1, 2 * KV_HEADS, num_new, HEAD_DIM)
    with cache.begin_step([sequence], num_new) as step:
        step.append(0, k, v)
        out = step.attend(0, q, *((k, v) if given else (None, None)))
        held = contents(cache, sequence, pending=num_new)
    from_pages = attention(q, *held)
    unquantized = attention(q, *concatenate([(held[0][:, :, :history], held[1][:, :, :history]), (k, v)]))
    right, wrong = (from_pages, unquantized) if reads_pages else (unquantized, from_pages)
    assert distance(out, right) <= CLEARLY * distance(out, wrong)


def test_padding_does_not_make_a_prefill() -> None:
    cache = make_cache("int8")
    decode, prefill = filled(cache, BLOCK_SIZE), filled(cache, BLOCK_SIZE)
    held = [contents(cache, sequence) for sequence in (decode, prefill)]
    k, v = (torch.cat(pair) for pair in zip(coarse(40, 1), coarse(40, 2), strict=True))
    q = normal(2, KV_HEADS, 40, HEAD_DIM)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, DECODE_TOKENS:] = mask[1, DECODE_TOKENS + 1 :] = False
    with cache.begin_step([decode, prefill], mask=mask) as step:
        step.append(0, k, v)
        out = step.attend(0, q, k, v)
    for row, sequence in enumerate([decode, prefill]):
        one, n = slice(row, row + 1), cache.seq_len(sequence) - BLOCK_SIZE
        from_pages = attention(q[one, :, :n], *contents(cache, sequence))
        unquantized = attention(q[one, :, :n], *concatenate([held[row], (k[one, :, :n], v[one, :, :n])]))
        right, wrong = (from_pages, unquantized) if sequence == decode else (unquantized, from_pages)
        assert distance(out[one, :, :n], right) <= CLEARLY * distance(out[one, :, :n], wrong)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("format", ["raw", "int8", "int4"])
def test_scale_window_softcap_and_sinks_match_the_reference(format, options) -> None:
    tolerance = FLOAT32_TOLERANCE if format == "raw" else INT8_TOLERANCE
    plain = attend_steps(make_cache(format), [50, 3, 20, 1], 2 * KV_HEADS)
    for (q, _, held, out), (*_, other) in zip(
        attend_steps(make_cache(format), [50, 3, 20, 1], 2 * KV_HEADS, **options), plain, strict=True
    ):
        assert distance(out, attention(q, *held, **options)) <= tolerance
        assert distance(out, other) > 10 * tolerance, "the option changes something"


@pytest.mark.parametrize(("asked", "effective"), [(None, 20), (7, 7), (64, 20)])
def test_the_smaller_of_the_windows_of_cache_and_call_applies(asked, effective) -> None:
    history = []
    cache = make_cache("raw", window=20)
    sequence = cache.new_sequence()
    for index, num_new in enumerate([50, 1, 17, 3, 16]):
        k, v = keys_and_values(num_new, index)
        history.append((k, v))
        q = normal(1, KV_HEADS, num_new, HEAD_DIM, seed=50 + index)
        with cache.begin_step([sequence], num_new) as step:
            step.append(0, k, v)
            out = step.attend(0, q, k, v, window=asked)
        assert distance(out, attention(q, *concatenate(history), window=effective)) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("num_new", [3, 40])
def test_numpy_and_torch_give_the_same(num_new, dtype) -> None:
    outputs = []
    arrays = [x.numpy().astype(dtype) for x in (*keys_and_values(num_new), normal(1, 4, num_new, HEAD_DIM, seed=9))]
    sinks = np.arange(4, dtype=dtype)
    for convert in (np.asarray, torch.from_numpy):
        cache = make_cache("int8")
        k, v, q = map(convert, arrays)
        with cache.begin_step([filled(cache, 20)], mask=convert(np.ones((1, num_new), bool))) as step:
            step.append(0, k, v)
            outputs.append(step.attend(0, q, k, v, sinks=convert(sinks)))
    assert isinstance(outputs[0], np.ndarray)
    assert outputs[0].dtype == dtype
    assert np.array_equal(outputs[0], outputs[1].numpy())


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*x.shape[:3], x.shape[3] + 7), torch.nan, dtype=x.dtype)
    wide[..., 3:-4] = x
    return wide[..., 3:-4]


def every_other_token(x: torch.Tensor) -> torch.Tensor:
    spread = torch.full((x.shape[0], x.shape[1], 2 * x.shape[2], x.shape[3]), torch.nan, dtype=x.dtype)
    spread[:, :, 1::2] = x
    return spread[:, :, 1::2]


def expanded(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand(x.shape)


def reversed_memory(x: torch.Tensor) -> Any:
    return x.numpy()[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1]


def run_twice(k: Any, v: Any, q: Any) -> tuple[torch.Tensor, Pair]:
    """A prefill of two sequences and the same rows again, in decodes of at most 16 rows, from pages."""
    cache = make_cache("int8")
    sequences = [cache.new_sequence(), cache.new_sequence()]
    outputs = []
    for start, end in [(0, 24), (0, 9), (9, 24)]:
        part = slice(None), slice(None), slice(start, end)
        with cache.begin_step(sequences, end - start) as step:
            step.append(0, k[part], v[part])
            outputs.append(torch.as_tensor(np.asarray(step.attend(0, q[part], k[part], v[part]))))
    return torch.cat(outputs, 2), contents(cache, sequences[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", [transposed, sliced, every_other_token, expanded, reversed_memory])
def test_any_outer_strides_are_read_correctly(layout, dtype) -> None:
    k, v = keys_and_values(24, batch=2, dtype=dtype)
    q = normal(2, 4, 24, HEAD_DIM, seed=9, dtype=dtype)
    views = [layout(x) for x in (k, v, q)]
    plain = [torch.as_tensor(np.ascontiguousarray(view)) for view in views]
    (out, held), (expected, expected_held) = run_twice(*views), run_twice(*plain)
    assert torch.equal(out, expected)
    assert torch.equal(held[0], expected_held[0])
    assert torch.equal(held[1], expected_held[1])


class Watched(torch.Tensor):
    """Records what is asked of it."""

    asked: set[str] = set()  # noqa: RUF012 - cleared by its one test

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.asked.add(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_tensor_is_read_in_place_and_never_copied() -> None:
    k, v, q = (x.as_subclass(Watched) for x in (*map(transposed, keys_and_values(24)), normal(1, 2, 24, HEAD_DIM)))
    cache = make_cache("int8")
    Watched.asked.clear()
    with cache.begin_step([cache.new_sequence()], 24) as step:
        step.append(0, k, v)
        step.attend(0, q, k, v)
    assert "data_ptr" in Watched.asked
    assert Watched.asked <= {
        "data_ptr",
        "stride",
        "__get__",
        "new_empty",
        "size",
        "is_neg",
        "is_conj",
        "untyped_storage",
    }


@pytest.mark.parametrize("format", ["raw", "int8", "int4"])
@pytest.mark.parametrize("num_new", [1, 16, 17, 40])
def test_out_is_written_through_its_strides_and_nothing_beside_it(num_new, format) -> None:
    k, v = keys_and_values(num_new)
    q = normal(1, 4, num_new, HEAD_DIM, seed=9)
    cache = make_cache(format)
    memory = torch.full((1, num_new, 6, HEAD_DIM + 8), -7.0)
    out = memory.transpose(1, 2)[:, 1:-1, :, 4:-4]
    with cache.begin_step([filled(cache, 20)], num_new) as step:
        step.append(0, k, v)
        assert step.attend(0, q, k, v, out) is out
        assert torch.equal(out, step.attend(0, q, k, v))
    out.fill_(-7.0)
    assert (memory == -7.0).all()


@pytest.mark.parametrize("format", ["raw", "int8", "int4"])
def test_a_packed_batch_gives_the_outputs_of_its_sequences_alone(format) -> None:
    lengths, history = [40, 1, 0, 17, 16], [7, 33, 20, 0, 16]
    k, v = keys_and_values(sum(lengths), 3)
    q = normal(1, 4, sum(lengths), HEAD_DIM, seed=9)
    together, alone = make_cache(format), make_cache(format)
    packed = [filled(together, n, seed=10 + n) for n in history]
    with together.begin_step(packed, lengths) as step:
        step.append(0, k, v)
        out = step.attend(0, q, k, v)
    rows = zip(lengths, history, packed, *(x.split(lengths, 2) for x in (k, v, q, out)), strict=True)
    for num_new, before, packed_sequence, own_k, own_v, own_q, own_out in rows:
        sequence = filled(alone, before, seed=10 + before)
        with alone.begin_step([sequence], num_new) as step:
            step.append(0, own_k, own_v)
            assert torch.equal(step.attend(0, own_q, own_k, own_v), own_out)
        assert together.seq_len(packed_sequence) == before + num_new
        assert torch.equal(contents(together, packed_sequence)[0], contents(alone, sequence)[0])


@pytest.mark.parametrize("garbage", [0.0, 1e30, torch.nan, torch.inf])
@pytest.mark.parametrize("format", ["raw", "int8", "int4"])
@pytest.mark.parametrize("width", [5, 24])
def test_padding_is_neither_read_nor_stored_and_its_output_is_zero(width, format, garbage) -> None:
    mask = torch.ones(5, width, dtype=torch.bool)
    mask[0, : width - 4] = False  # left
    mask[1, 1:3] = False  # middle
    mask[2] = False  # all
    mask[3, 3:] = False  # right
    k, v = keys_and_values(width, batch=5)
    q = normal(5, 4, width, HEAD_DIM, seed=9)
    dirty = [torch.where(mask[:, None, :, None], x, garbage) for x in (k, v, q)]
    cache, alone = make_cache(format), make_cache(format)
    sequences = [filled(cache, 13, seed) for seed in range(5)]
    with cache.begin_step(sequences, mask=mask) as step:
        assert step.num_rows == 5 * width
        step.append(0, dirty[0], dirty[1])
        out = step.attend(0, dirty[2], dirty[0], dirty[1], torch.full_like(q, torch.nan))
    assert (out.transpose(1, 2)[~mask] == 0).all()
    for row, sequence in enumerate(sequences):
        own_k, own_v, own_q, own_out = (x[row : row + 1][:, :, mask[row]] for x in (k, v, q, out))
        other = filled(alone, 13, row)
        with alone.begin_step([other], own_k.shape[2]) as step:
            step.append(0, own_k, own_v)
            assert torch.equal(step.attend(0, own_q, own_k, own_v), own_out)
        assert cache.seq_len(sequence) == 13 + mask[row].sum()
        assert torch.equal(contents(cache, sequence)[0], contents(alone, other)[0])
        assert torch.equal(contents(cache, sequence)[1], contents(alone, other)[1])


@pytest.mark.parametrize("rows", [{"num_new": 0}, {"mask": np.zeros((2, 0), bool)}, {"mask": np.zeros((2, 3), bool)}])
def test_a_step_without_tokens_changes_nothing(rows) -> None:
    cache = make_cache("int8")
    sequences = [filled(cache, 16), filled(cache, 5)]
    before = cache.stats()
    with cache.begin_step(sequences, **rows) as step:
        k, v = keys_and_values(step.num_rows // 2, batch=2)
        step.append(0, k, v)
        out = step.attend(0, k, k, v)
    assert (out == 0).all()
    assert [cache.seq_len(sequence) for sequence in sequences] == [16, 5]
    assert cache.stats() == before
