"""Attention of prefills by torch, as the vLLM plugin has it where it is faster, against the engine's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvarn_rs
from kvarn_rs import Engine
from kvarn_rs.vllm import compat_torch, prefill
from test_engine import HEAD_DIM, KV_HEADS, Q_HEADS, ints, make_engine, memory, step, tokens

LENS, COUNTS = [37, 0, 100, 3, 70], [20, 40, 1, 2, 17]
STARTS = [0, 20, 60, 61, 63, 80]
NUM_BLOCKS = 40
TABLES = torch.arange(NUM_BLOCKS, dtype=torch.int32).reshape(5, 8)
SCALE = 0.2
# Sums of a few products of unit normals, in another order.
FLOAT32_TOLERANCE = 1e-5
# Of means of unit normals in bfloat16, 1.5 times what was seen; merged in bfloat16 they are off by 0.016.
BFLOAT16_TOLERANCE = 0.011


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


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("format", kvarn_rs.FORMATS)
def test_prefills_and_decodes_of_a_step_are_as_the_engine_has_them(format: str, has_sinks: bool) -> None:
    q, k, v = (tokens(STARTS[-1], heads, 7 + heads) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    sinks = torch.arange(Q_HEADS) - 1.5 if has_sinks else None
    expected = begun(format).forward(0, q, k, v, scale=SCALE, sinks=sinks)
    engine = begun(format)
    sequences = prefill.prefills(ints(*LENS), ints(*STARTS))
    assert [one.sequence for one in sequences] == [0, 1, 4]
    found = torch.full_like(q, torch.nan)
    attention = prefill.PrefillAttention(engine, torch.float32)
    attention.forward(0, sequences, q, k, v, found, scale=SCALE, sinks=sinks)
    torch.testing.assert_close(found, expected, atol=FLOAT32_TOLERANCE, rtol=0)
    blocks = [int(TABLES[index, 0]) for index in range(5)]
    engine.append(1, k, v, q)
    engine.commit()
    assert engine.records(0, blocks[1], 16, is_first=True) != engine.records(0, blocks[0], 16, is_first=True)


def test_in_bfloat16_parts_are_merged_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "HISTORY_TOKENS", 3)
    q, k, v = (tokens(STARTS[-1], heads, 7 + heads).bfloat16() for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    expected = begun("int8").forward(0, q.float(), k.float(), v.float(), scale=SCALE)
    found = torch.empty_like(q)
    engine = begun("int8")
    attention = prefill.PrefillAttention(engine, torch.bfloat16)
    attention.forward(0, prefill.prefills(ints(*LENS), ints(*STARTS)), q, k, v, found, scale=SCALE)
    torch.testing.assert_close(found.float(), expected, atol=BFLOAT16_TOLERANCE, rtol=0)


def test_a_calibration_learns_from_the_queries() -> None:
    calibrations = kvarn_rs.Calibration(), kvarn_rs.Calibration()
    mine, expected = (begun("int4", calibration=calibration) for calibration in calibrations)
    q, k, v = (tokens(STARTS[-1], heads, 7 + heads) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    before = calibrations[0].wanted(0)
    attention = prefill.PrefillAttention(mine, torch.float32)
    attention.forward(0, prefill.prefills(ints(*LENS), ints(*STARTS)), q, k, v, torch.empty_like(q), scale=SCALE)
    expected.forward(0, q, k, v, scale=SCALE)
    assert calibrations[0].wanted(0) == calibrations[1].wanted(0) < before


def test_queries_keys_and_values_may_be_parts_of_one_tensor() -> None:
    both = tokens(STARTS[-1], Q_HEADS + 2 * KV_HEADS, 3)
    q, k, v = both.split([Q_HEADS, KV_HEADS, KV_HEADS], 1)
    outs = [torch.empty(STARTS[-1], Q_HEADS, HEAD_DIM), torch.empty(STARTS[-1], Q_HEADS, 2 * HEAD_DIM)[..., :HEAD_DIM]]
    for parts, out in zip(((q.contiguous(), k.contiguous(), v.contiguous()), (q, k, v)), outs, strict=True):
        attention = prefill.PrefillAttention(begun("int8"), torch.float32)
        attention.forward(0, prefill.prefills(ints(*LENS), ints(*STARTS)), *parts, out, scale=SCALE)
    assert torch.equal(*outs)


def test_a_prefill_has_more_new_tokens_than_a_decode() -> None:
    found = prefill.prefills(ints(5, 0, 0, 9), ints(0, 16, 33, 33, 34))
    assert found == [prefill.Prefill(1, slice(16, 33), 0)]
    assert prefill.prefills(ints(), ints(0)) == []


def test_torch_is_used_in_bfloat16_with_amx_where_it_has_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert compat_torch.is_faster(torch.bfloat16)
    assert not compat_torch.is_faster(torch.float32)
    assert not compat_torch.is_faster(torch.float16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not compat_torch.is_faster(torch.bfloat16)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert not compat_torch.is_faster(torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    monkeypatch.setattr(compat_torch, "_FLASH", "no_such_operator")
    assert not compat_torch.is_faster(torch.bfloat16)
