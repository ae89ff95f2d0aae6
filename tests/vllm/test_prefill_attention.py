"""Attention of prefills by vLLM's kernels, against the engine's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
import kvarn_rs
from kvarn_rs import Engine
from kvarn_rs.vllm import compat_cpu, prefill
from test_engine import HEAD_DIM, KV_HEADS, Q_HEADS, ints, make_engine, memory, step, tokens

LENS, COUNTS = [37, 0, 100, 3, 70], [20, 40, 1, 2, 17]
STARTS = [0, 20, 60, 61, 63, 80]
NUM_BLOCKS = 40
TABLES = torch.arange(NUM_BLOCKS, dtype=torch.int32).reshape(5, 8)
SCALE = 0.2
# Sums of a few products of unit normals, in another order.
FLOAT32_TOLERANCE = 1e-5
# A rounding of means of unit normals, and of the weights that they are means by.
BFLOAT16_TOLERANCE = 0.016
SCRATCH_TOKENS = 256
SINKS = (torch.arange(Q_HEADS) - 1.5).bfloat16()  # the one dtype that the kernels of 0.26 take


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that begin and end within blocks, the last of them with fewer tokens."""
    monkeypatch.setattr(prefill, "HISTORY_TOKENS", 30)


def begun(format: str, **options: Any) -> Engine:
    """An engine in whose open step two sequences with a history and one without prefill, and two decode."""
    engine = make_engine(format, **memory(format, NUM_BLOCKS, NUM_BLOCKS), **options)
    step(engine, TABLES, [0] * 5, LENS, 0)
    engine.begin(TABLES, ints(*LENS), ints(*STARTS))
    return engine


def attended(engine: Engine, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """What layer 0 has for the prefills and decodes of the open step."""
    out = torch.full_like(q, torch.nan)
    attention = prefill.PrefillAttention(engine, q.dtype, SCRATCH_TOKENS)
    batches = attention.batches(prefill.prefills(ints(*LENS), ints(*STARTS)))
    attention.forward(0, batches, q, k, v, out, scale=SCALE, **options)
    return out


def new_tokens(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of the step."""
    return tuple(tokens(STARTS[-1], heads, 7 + heads).to(dtype) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))


@pytest.mark.parametrize("options", [{}, {"sinks": SINKS}, {"softcap": 2.0}], ids=["plain", "sinks", "softcap"])
@pytest.mark.parametrize("format", kvarn_rs.FORMATS)
def test_prefills_and_decodes_of_a_step_are_as_the_engine_has_them(format: str, options: dict[str, Any]) -> None:
    q, k, v = new_tokens()
    expected = begun(format).forward(0, q, k, v, scale=SCALE, **options)
    engine = begun(format)
    torch.testing.assert_close(attended(engine, q, k, v, **options), expected, atol=FLOAT32_TOLERANCE, rtol=0)
    blocks = [int(TABLES[index, 0]) for index in range(5)]
    engine.append(1, k, v, q)
    engine.commit()
    assert engine.records(0, blocks[1], 16, is_first=True) != engine.records(0, blocks[0], 16, is_first=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", kvarn_rs.FORMATS[1:])
def test_half_precision_costs_a_rounding(format: str, dtype: torch.dtype) -> None:
    q, k, v = new_tokens(dtype)
    expected = begun(format).forward(0, q.float(), k.float(), v.float(), scale=SCALE)
    found = attended(begun(format), q, k, v)
    torch.testing.assert_close(found.float(), expected, atol=BFLOAT16_TOLERANCE, rtol=0)


def test_a_calibration_learns_from_the_queries() -> None:
    calibrations = kvarn_rs.Calibration(), kvarn_rs.Calibration()
    mine, expected = (begun("int4", calibration=calibration) for calibration in calibrations)
    q, k, v = new_tokens()
    before = calibrations[0].wanted(0)
    attended(mine, q, k, v)
    expected.forward(0, q, k, v, scale=SCALE)
    assert calibrations[0].wanted(0) == calibrations[1].wanted(0) < before


def test_queries_keys_and_values_may_be_parts_of_one_tensor() -> None:
    both = tokens(STARTS[-1], Q_HEADS + 2 * KV_HEADS, 3)
    q, k, v = both.split([Q_HEADS, KV_HEADS, KV_HEADS], 1)
    apart = attended(begun("int8"), q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(attended(begun("int8"), q, k, v), apart)


def test_a_prefill_has_more_new_tokens_than_a_decode() -> None:
    found = prefill.prefills(ints(5, 0, 0, 9), ints(0, 16, 33, 33, 34))
    assert found == [prefill.Prefill(1, slice(16, 33), 0)]
    assert prefill.prefills(ints(), ints(0)) == []


@pytest.mark.parametrize(
    ("context_lens", "starts", "expected"),
    [
        ([0, 0, 0], [0, 100, 200, 300], [[0, 1], [2]]),  # two blocks, of which each takes one
        ([0, 0, 0], [0, 20, 21, 41], [[0], [2]]),  # a decode between them
        ([200, 0], [0, 20, 40], [[0], [1]]),  # a history
        ([0], [0, 256], [[0]]),
        ([], [0], []),
    ],
)
def test_batches_have_neighboring_rows_and_fit_the_scratch_cache(
    context_lens: list[int], starts: list[int], expected: list[list[int]]
) -> None:
    attention = prefill.PrefillAttention(make_engine("int8"), torch.float32, SCRATCH_TOKENS)
    batches = attention.batches(prefill.prefills(ints(*context_lens), ints(*starts)))
    assert [[one.sequence for one in batch.prefills] for batch in batches] == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_a_scratch_block_has_behind_its_tokens_does_not_matter(dtype: torch.dtype) -> None:
    scratch = compat_cpu.ScratchCache(SCRATCH_TOKENS, KV_HEADS, HEAD_DIM, dtype)
    q, k, v = new_tokens(dtype)
    found = []
    for filler in (0, 1e4):
        scratch.write(0, *(torch.full((SCRATCH_TOKENS, KV_HEADS, HEAD_DIM), filler, dtype=dtype) for _ in "kv"))
        scratch.write(0, k, v)
        batch = compat_cpu.ScratchBatch(scratch, [len(q)], [len(q)])
        found.append(torch.empty_like(q))
        batch.attend(q, found[-1], SCALE, None, None)
    assert torch.equal(*found)
    unused = compat_cpu.ScratchCache(SCRATCH_TOKENS, KV_HEADS, HEAD_DIM, dtype)
    assert not unused.k.any()
    assert not unused.v.any()


def test_there_are_kernels_for_the_heads_that_vllm_supports() -> None:
    assert compat_cpu.has_kernels(64, torch.bfloat16)
    assert not compat_cpu.has_kernels(48, torch.bfloat16)
    assert not compat_cpu.has_kernels(64, torch.float64)
