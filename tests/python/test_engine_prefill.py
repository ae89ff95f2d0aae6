"""What `Engine` has for callers that attend to prefills themselves: stored tokens, and attention of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvarn_rs
from kvarn_rs import ConfigError, KvarnError, OpenStepError, ShapeError, StaleStepError, StrideError
from kvarn_rs._core import block_bytes
from test_engine import (
    BLOCK,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    Q_HEADS,
    by_heads,
    ints,
    make_engine,
    memory,
    new_tokens,
    step,
    tokens,
)

TABLES = ints([7, 3, 19, 0, 22], [11, 2, 8, 1, 13], [5, 4, 6, 9, 10])


@pytest.mark.parametrize("format", kvarn_rs.FORMATS)
def test_tokens_are_those_that_a_cache_decodes(format: str) -> None:
    engine = make_engine(format)
    cache = kvarn_rs.PagedKvCache(
        num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, block_size=BLOCK, format=format
    )
    twins = [cache.new_sequence(), cache.new_sequence()]
    lens = [0, 0]
    for seed, counts in enumerate(([50, 3], [20, 1])):
        engine.begin(TABLES[:2], ints(*lens), ints(0, counts[0], sum(counts)))
        with cache.begin_step(twins, counts) as open_step:
            for layer in range(LAYERS):
                q, k, v = new_tokens(sum(counts), 100 * seed + 10 * layer)
                engine.forward(layer, q, k, v)
                open_step.append(layer, by_heads(k), by_heads(v), by_heads(q))
                for index, (length, count) in enumerate(zip(lens, counts, strict=True)):
                    for start in (0, length // 2):
                        shape = length + count - start, KV_HEADS, HEAD_DIM
                        mine, expected = ([torch.full(shape, torch.nan) for _ in range(2)] for _ in range(2))
                        engine.dequantize(layer, index, *mine, start=start)
                        cache.dequantize(layer, twins[index], *map(by_heads, expected), start=start)
                        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
        engine.commit()
        lens = [length + count for length, count in zip(lens, counts, strict=True)]


def test_tokens_go_into_tensors_of_any_float_type_and_strides() -> None:
    engine = make_engine("int4")
    step(engine, TABLES[:1], [0], [40], 0)
    engine.begin(TABLES[:1], ints(40), ints(0, 1))
    q, k, v = new_tokens(1, 5)
    engine.forward(0, q, k, v)
    expected = torch.empty(30, KV_HEADS, HEAD_DIM), torch.empty(30, KV_HEADS, HEAD_DIM)
    engine.dequantize(0, 0, *expected, start=9)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        wider = [torch.full((KV_HEADS, 30, 2 * HEAD_DIM), torch.nan, dtype=dtype) for _ in range(2)]
        mine = [one.transpose(0, 1)[..., :HEAD_DIM] for one in wider]
        engine.dequantize(0, 0, *mine, start=9)
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(mine, expected, strict=True))


def test_tokens_that_are_not_there_are_refused() -> None:
    engine = make_engine("int8", window=20)
    step(engine, TABLES[:1], [0], [60], 0)
    k, v = torch.zeros(10, KV_HEADS, HEAD_DIM), torch.zeros(10, KV_HEADS, HEAD_DIM)
    with pytest.raises(StaleStepError):
        engine.dequantize(0, 0, k, v, start=40)
    engine.begin(TABLES[:1], ints(60), ints(0, 1))
    with pytest.raises(OpenStepError, match=r"\[0\]"):
        engine.dequantize(0, 0, k, v, start=40)
    engine.append(0, k[:1], v[:1])
    cases: list[tuple[tuple[Any, ...], int, type[KvarnError], str]] = [
        ((0, 0, k, v), 52, ShapeError, r"within 32\.\.61, from 52 on"),
        ((0, 0, k, v), 31, ShapeError, r"within 32\.\.61, from 31 on"),
        ((0, 0, k, v), 2**62, ShapeError, r"within 32\.\.61"),
        ((0, 1, k, v), 40, ConfigError, "sequence 1 of a step of 1"),
        ((LAYERS, 0, k, v), 40, ConfigError, f"layer {LAYERS}"),
        ((0, 0, k, v[:9]), 40, ShapeError, "v"),
        ((0, 0, k[:, :1], v), 40, ShapeError, "k"),
        ((0, 0, k, k), 40, StrideError, "overlaps"),
        ((0, 0, k, v[:1].expand(10, -1, -1)), 40, StrideError, "overlaps"),
    ]
    for arguments, start, error, words in cases:
        with pytest.raises(error, match=words):
            engine.dequantize(*arguments, start=start)
    assert not k.any()
    assert not v.any()
    engine.dequantize(0, 0, k, v, start=51)
    assert k.any(dim=(1, 2)).all()


def test_tokens_are_not_written_over_the_records() -> None:
    pages = torch.zeros(4, KV_HEADS, block_bytes("int8", HEAD_DIM, BLOCK), dtype=torch.uint8)
    engine = make_engine("int8", pages=[pages])
    engine.begin(ints([0]), ints(0), ints(0, 1))
    _, k, v = new_tokens(1, 0)
    engine.append(0, k, v)
    over = pages[3].view(torch.float32).flatten()[: k.numel()].view_as(k)
    for out in ((over, v), (k, over)):
        with pytest.raises(StrideError, match="overlaps"):
            engine.dequantize(0, 0, *out)
    assert not pages[3].any()


@pytest.mark.parametrize("history_only", [False, True])
@pytest.mark.parametrize("format", ["raw", "int8", "int4"])
@pytest.mark.parametrize("most", [0, 1, 16, 20, 21])
def test_rows_of_sequences_with_more_new_tokens_are_not_written(format: str, most: int, history_only: bool) -> None:
    engine = make_engine(format, **memory(format, num_pages=12))
    lens, counts = [37, 18, 0], [1, 21, 17]
    step(engine, TABLES[:2], [0, 0], lens[:2], 0)
    engine.begin(TABLES, ints(*lens), ints(0, 1, 22, 39))
    q, k, v = (tokens(39, heads, 1) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    engine.append(0, k, v, q)
    found, expected = ((torch.full_like(q, torch.nan), torch.full((39, Q_HEADS), torch.nan)) for _ in range(2))
    engine.attend(0, q, k, v, expected[0], lse=expected[1], history_only=history_only)
    engine.attend(0, q, k, v, found[0], lse=found[1], history_only=history_only, max_query_len=most)
    is_written = torch.tensor([count <= most for count in counts]).repeat_interleave(torch.tensor(counts))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[is_written], other[is_written])
        assert one[~is_written].isnan().all()
        assert not other.isnan().any()
