"""`Engine`: records in a caller's tensors, with the caller's block tables, against `PagedKvCache` and float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import kvarn_rs
from kvarn_rs import (
    ConfigError,
    DtypeError,
    Engine,
    KvarnError,
    OpenStepError,
    OutOfOpenPagesError,
    ShapeError,
    StaleStepError,
    StrideError,
)
from kvarn_rs._core import block_bytes

LAYERS, KV_HEADS, Q_HEADS, HEAD_DIM, BLOCK = 2, 2, 4, 32, 16
NUM_BLOCKS, NUM_PAGES = 24, 6
GARBAGE = 0xFF
PADDING = 64
"""Bytes of a block beyond its records, as an engine that allocates blocks of one size has them."""
INT8_PAGE_BYTES = block_bytes("int8", HEAD_DIM, BLOCK)
# Sums of a few products of unit normals, in another order than the reference.
FLOAT32_TOLERANCE = 1e-5
# Means of some tens of unit normals, from a page while it is written and from what it is once it is committed: twice
# the largest difference seen.
PAGE_TOLERANCE = {"raw": 0, "int8": 0.003, "int4": 0.4, "int3": 0.6, "int2": 0.8}


def memory(format: str, num_blocks: int = NUM_BLOCKS, num_pages: int = NUM_PAGES) -> dict[str, Any]:
    """Pages and tiles of all layers, interleaved in one tensor each, with bytes between them."""
    seals = format not in ("raw", "int8")

    def records(num: int, width: int) -> list[torch.Tensor]:
        whole = torch.full((num, LAYERS, KV_HEADS, width + PADDING), GARBAGE, dtype=torch.uint8)
        return [whole[:, layer, :, :width] for layer in range(LAYERS)]

    page_bytes = block_bytes(format, HEAD_DIM, BLOCK, "float32") if format == "raw" else INT8_PAGE_BYTES
    pages = records(num_pages if seals else num_blocks, page_bytes)
    return {"pages": pages, "tiles": records(num_blocks, block_bytes(format, HEAD_DIM, BLOCK)) if seals else None}


def make_engine(format: str, /, **options: Any) -> Engine:
    settings = {"num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "block_size": BLOCK, "format": format}
    return Engine(**{**settings, **memory(format), **options})


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def tokens(num: int, heads: int, seed: int) -> torch.Tensor:
    return torch.randn(num, heads, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def new_tokens(num: int, seed: int) -> list[torch.Tensor]:
    """Q, K and V."""
    return [tokens(num, heads, seed + i) for i, heads in enumerate((Q_HEADS, KV_HEADS, KV_HEADS))]


def by_heads(rows: torch.Tensor) -> torch.Tensor:
    return rows.transpose(0, 1)[None]


def step(engine: Engine, tables: torch.Tensor, lens: list[int], counts: list[int], seed: int) -> list[torch.Tensor]:
    """Takes sequences forward with random tokens, and gives each layer's output and log-sum-exp."""
    starts = np.cumsum([0, *counts])
    engine.begin(tables, ints(*lens), ints(*starts))
    found = []
    for layer in range(LAYERS):
        q, k, v = (
            tokens(int(starts[-1]), heads, seed + 10 * layer + i)
            for i, heads in enumerate((Q_HEADS, KV_HEADS, KV_HEADS))
        )
        lse = torch.empty(len(q), Q_HEADS)
        found += [engine.forward(layer, q, k, v, lse=lse), lse]
    engine.commit()
    return found


@pytest.mark.parametrize("format", kvarn_rs.FORMATS)
def test_an_engine_gives_the_outputs_and_the_records_of_a_cache(format: str) -> None:
    engine = make_engine(format)
    cache = kvarn_rs.PagedKvCache(
        num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, block_size=BLOCK, format=format
    )
    twins = [cache.new_sequence(), cache.new_sequence()]
    tables = ints([7, 3, 19, 0, 22, 5], [11, 2, 8, 1, 13, -1])
    lens = [0, 0]
    for seed, counts in enumerate(([50, 3], [1, 1], [1, 4], [1, 30], [16, 1], [0, 1])):
        outputs = step(engine, tables, lens, counts, 100 * seed)
        with cache.begin_step(twins, counts) as open_step:
            for layer in range(LAYERS):
                q, k, v = map(by_heads, new_tokens(sum(counts), 100 * seed + 10 * layer))
                lse = torch.empty(1, Q_HEADS, sum(counts))
                out = open_step.forward(layer, q, k, v, lse=lse)
                assert torch.equal(by_heads(outputs[2 * layer]), out)
                assert torch.equal(outputs[2 * layer + 1].T, lse[0])
        lens = [length + count for length, count in zip(lens, counts, strict=True)]
    assert engine.stats()["saturation"] == cache.stats()["saturation"]
    if format not in ("raw", "int8"):
        assert engine.stats()["sealed"] >= 3
        engine.release([int(block) for block in tables.flatten() if block >= 0])
        assert engine.stats()["open_pages"] == 0


@pytest.mark.parametrize("seal", [False, True])
def test_a_block_that_drafts_fill_stays_a_page_where_the_caller_says_so(seal: bool) -> None:
    engine = make_engine("int4")
    tables = ints([7, 3, 19])
    step(engine, tables, [0], [BLOCK - 2], 0)
    for draft in range(4):  # two drafts fill the first block; the others would find it sealed
        engine.begin(tables, ints(BLOCK - 2 + draft), ints(0, 1), seal=seal)
        for layer in range(LAYERS):
            engine.forward(layer, *new_tokens(1, 1000 + 10 * draft + layer))
        engine.commit()
    assert engine.stats()["sealed"] == int(seal)
    assert [engine.has_page(block) for block in (7, 3, 19)] == [not seal, True, False]
    if not seal:  # one draft was right: what comes after it is written again, as if there had been no more
        twin = make_engine("int4")
        step(twin, tables, [0], [BLOCK - 2], 0)
        for each in (engine, twin):
            step(each, tables, [BLOCK - 2], [1], 1000)
        lens = [BLOCK - 1]
        for seed, count in enumerate((3, 1)):
            found, expected = (step(each, tables, lens, [count], 10 + seed) for each in (engine, twin))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, atol=PAGE_TOLERANCE["int4"], rtol=0)
            lens = [lens[0] + count]
        assert engine.stats()["sealed"] == twin.stats()["sealed"] == 1
        engine.release([7, 3, 19])
        assert engine.stats()["open_pages"] == 0
        assert not engine.has_page(3)


@pytest.mark.parametrize("format", ["raw", "int8", "int4"])
def test_history_merged_with_the_step_s_own_tokens_is_attention_to_all(format: str) -> None:
    engine = make_engine(format)
    tables = ints([7, 3, 19, 0])
    step(engine, tables, [0], [37], 0)
    engine.begin(tables, ints(37), ints(0, 20))
    q, k, v = tokens(20, Q_HEADS, 1), tokens(20, KV_HEADS, 2), tokens(20, KV_HEADS, 3)
    engine.append(0, k, v, q)
    lse, lse_all = torch.empty(20, Q_HEADS), torch.empty(20, Q_HEADS)
    history = engine.attend(0, q, None, None, lse=lse, history_only=True)
    expected = engine.attend(0, q, k, v, lse=lse_all)
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(2, 1)) / HEAD_DIM**0.5
    scores = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
    own = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double().repeat_interleave(2, 1))
    own_lse = scores.logsumexp(-1).T
    total = torch.logaddexp(lse.double(), own_lse)
    merged = history * (lse - total).exp()[..., None] + own * (own_lse - total).exp()[..., None]
    torch.testing.assert_close(merged.float(), expected, atol=FLOAT32_TOLERANCE, rtol=0)
    torch.testing.assert_close(total.float(), lse_all, atol=FLOAT32_TOLERANCE, rtol=0)


def test_rows_without_a_history_are_zero_and_weigh_no_more_than_a_sink() -> None:
    engine = make_engine("int8")
    tables = ints([7, 3], [4, 5])
    step(engine, tables[:1], [0], [20], 0)
    engine.begin(tables, ints(20, 0), ints(0, 1, 6))
    q, k = tokens(6, Q_HEADS, 1), tokens(6, KV_HEADS, 2)
    engine.append(0, k, k)
    lse = torch.full((6, Q_HEADS), torch.nan)
    out = engine.attend(0, q, None, None, torch.full_like(q, torch.nan), lse=lse, history_only=True)
    assert out[1:].eq(0).all()
    assert lse[1:].eq(-torch.inf).all()
    assert out[0].isfinite().all()
    assert lse[0].isfinite().all()
    sinks = torch.arange(Q_HEADS) / 2
    engine.attend(0, q, None, None, out, lse=lse, sinks=sinks, history_only=True)
    assert out[1:].eq(0).all()
    assert lse[1:].eq(sinks).all()


def test_drafts_that_are_not_accepted_are_written_again() -> None:
    tables = ints([7, 3])
    outputs = []
    for drafts in ((5, 2), (2, None)):
        engine = make_engine("int4")
        step(engine, tables, [0], [14], 0)
        num_new, accepted = drafts
        engine.begin(tables, ints(14), ints(0, num_new))
        for layer in range(LAYERS):
            q, k = tokens(5, Q_HEADS, 1)[:num_new], tokens(5, KV_HEADS, 2)[:num_new]
            engine.forward(layer, q, k, k)
        engine.commit(None if accepted is None else [accepted])
        outputs.append(step(engine, tables, [16], [1], 50)[::2])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, atol=0.2, rtol=0)  # statistics of other tokens


@pytest.mark.parametrize("format", kvarn_rs.FORMATS)
@pytest.mark.parametrize(("context", "num_new"), [(0, 50), (30, 2), (30, 20)])
def test_a_prefix_is_read_in_the_step_that_writes_it(format: str, context: int, num_new: int) -> None:
    shared = (context + num_new) // BLOCK
    first = [7, 3, 19, 0][: shared + 1]
    found = []
    for at_once in (True, False):
        engine = make_engine(format)
        if context:
            step(engine, ints(first), [0], [context], 0)
        q, k, v = new_tokens(num_new + 1, 1)
        outputs: list[torch.Tensor] = []
        if at_once:
            steps = [(ints([*first, 5], [*first[:shared], 5, 5]), [context, shared * BLOCK], [num_new, 1], slice(None))]
        else:
            one = (ints(first), [context], [num_new], slice(num_new))
            steps = [one, (ints([*first[:shared], 5]), [shared * BLOCK], [1], slice(num_new, None))]
        for tables, lens, counts, rows in steps:
            engine.begin(tables, ints(*lens), ints(*np.cumsum([0, *counts])))
            outputs = [engine.forward(layer, q[rows], k[rows], v[rows]) for layer in range(LAYERS)]
            engine.commit()
        found.append([out[-1] for out in outputs])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=PAGE_TOLERANCE[format], rtol=0)


def test_a_refused_step_changes_nothing() -> None:
    engine = make_engine("int4")
    tables = ints([7, 3, 19, 0])
    step(engine, tables, [0], [20], 0)
    before = engine.stats()
    cases: list[tuple[tuple[Any, Any, Any], type[KvarnError], str]] = [
        ((ints([7, 99]), ints(20), ints(0, 1)), ConfigError, "unknown block or page 99"),
        ((ints([7, -1]), ints(20), ints(0, 1)), ConfigError, "-1 for block 1 of sequence 0"),
        ((ints([7]), ints(20), ints(0, 1)), ConfigError, "needs 2 blocks, its table has 1"),
        ((ints(7, 3), ints(20), ints(0, 1)), ShapeError, "block_tables"),
        ((tables, ints(20, 20), ints(0, 1, 2)), ShapeError, "block_tables"),
        ((tables, ints(20), ints(0, 1, 2)), ShapeError, "query_start_loc"),
        ((tables, ints(20), ints(1, 2)), ConfigError, "query_start_loc begins at 0"),
        ((tables, ints(20), ints(0, -1)), ConfigError, "does not fall"),
        ((tables, ints(-1), ints(0, 1)), ConfigError, "-1 tokens of sequence 0"),
        ((tables.long(), ints(20), ints(0, 1)), DtypeError, "int64"),
        ((tables.T.contiguous().T.repeat(2, 1)[:, ::2], ints(20, 20), ints(0, 1, 2)), StrideError, "block_tables"),
        (
            (torch.arange(NUM_BLOCKS, dtype=torch.int32).repeat(7, 1), ints(*[0] * 7), ints(*range(8))),
            ConfigError,
            "two",
        ),
        (
            (ints(*[[n] for n in range(8, 16)]), ints(*[0] * 8), ints(*range(9))),
            OutOfOpenPagesError,
            "needed 8, free 4",
        ),
    ]
    for (block_tables, context_lens, query_start_loc), error, words in cases:
        with pytest.raises(error, match=words):
            engine.begin(block_tables, context_lens, query_start_loc)
        assert engine.stats() == before
        assert not engine.is_open
    step(engine, tables, [20], [1], 1)


def test_a_step_is_begun_once_and_ended_whole() -> None:
    engine = make_engine("int8")
    q, k = tokens(1, Q_HEADS, 1), tokens(1, KV_HEADS, 2)
    for call in (engine.commit, engine.abort, lambda: engine.append(0, k, k)):
        with pytest.raises(StaleStepError):
            call()
    engine.begin(ints([4]), ints(0), ints(0, 1))
    with pytest.raises(StaleStepError):
        engine.begin(ints([4]), ints(0), ints(0, 1))
    with pytest.raises(OpenStepError):
        engine.attend(0, q, k, k)
    engine.forward(0, q, k, k)
    with pytest.raises(OpenStepError, match=r"\[1\]"):
        engine.commit()
    for counts in ([2], [1, 1]):
        engine.append(1, k, k)
        with pytest.raises(ConfigError):
            engine.commit(counts)
    with pytest.raises(StaleStepError):
        engine.release([4])
    engine.commit([1])


def test_lent_memory_that_does_not_fit_is_refused() -> None:
    good = memory("int4")
    pages = good["pages"]
    whole = torch.zeros(NUM_PAGES, KV_HEADS, INT8_PAGE_BYTES + 24, dtype=torch.uint8)
    cases: list[tuple[dict[str, Any], type[KvarnError], str]] = [
        ({"pages": pages[:1]}, ConfigError, "tiles of 2 layers, pages of 1"),
        ({"tiles": None}, ConfigError, "tiles is missing"),
        ({"format": "int8"}, ConfigError, "tiles is given"),
        ({"pages": [pages[0], pages[1][1:]]}, ConfigError, "of layer 1"),
        ({"pages": [pages[0], pages[0]]}, ConfigError, "pages of layer 0 and the pages of layer 1 overlap"),
        ({"pages": [pages[0][1:], pages[0][:-1]]}, ConfigError, "overlap"),
        ({"pages": [page[:, :1] for page in pages]}, ShapeError, "pages"),
        ({"pages": [page[:, :, 16:] for page in pages]}, ShapeError, "pages"),
        ({"pages": [page.flatten(1) for page in pages]}, ShapeError, "pages"),
        ({"pages": [page.contiguous().view(torch.float16) for page in pages]}, DtypeError, "pages"),
        ({"pages": [whole, whole.clone()]}, ConfigError, "multiples of 16"),
        ({"pages": [page.transpose(1, 2).contiguous().transpose(1, 2) for page in pages]}, StrideError, "pages"),
        ({"window": 0}, ConfigError, "window"),
        ({"head_dim": 24}, KvarnError, "head_dim 24"),
    ]
    for options, error, words in cases:
        with pytest.raises(error, match=words):
            make_engine("int4", **{**good, **options})


def test_nothing_is_written_into_the_memory_of_the_records_but_records() -> None:
    memory = torch.zeros(4, KV_HEADS, INT8_PAGE_BYTES, dtype=torch.uint8)
    engine = Engine(num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, block_size=BLOCK, format="int8", pages=[memory])
    engine.begin(ints([0]), ints(0), ints(0, 1))
    q, k = tokens(1, Q_HEADS, 1), tokens(1, KV_HEADS, 2)
    out = memory[3].view(torch.float32).flatten()[: q.numel()].view_as(q)
    with pytest.raises(StrideError, match="overlaps"):
        engine.forward(0, q, k, k, out)
    assert not memory.any()


def test_numpy_arrays_are_lent_like_tensors() -> None:
    page = np.zeros((4, KV_HEADS, INT8_PAGE_BYTES), np.uint8)
    engine = Engine(num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, block_size=BLOCK, format="int8", pages=[page])
    engine.begin(np.array([[2]], np.int32), np.array([0], np.int32), np.array([0, 3], np.int32))
    k = tokens(3, KV_HEADS, 0).numpy()
    engine.append(0, k, k)
    engine.commit()
    assert page[2].any()
    assert not page[[0, 1, 3]].any()
    assert engine.records(0, 2, 3, is_first=True) != bytes(KV_HEADS * INT8_PAGE_BYTES)


def test_a_fork_copies_the_block_that_it_is_within() -> None:
    engine = make_engine("int4")
    step(engine, ints([7, 3]), [0], [20], 0)
    engine.copy_block(3, 9)
    assert engine.records(0, 9, 4, is_first=False) == engine.records(0, 3, 4, is_first=False)
    one = step(engine, ints([7, 3]), [20], [1], 1)
    other = step(engine, ints([7, 9]), [20], [1], 1)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    step(engine, ints([7, 9]), [21], [1], 1)
    with pytest.raises(KvarnError, match="share it"):
        engine.copy_block(7, 10)
