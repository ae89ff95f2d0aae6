"""The counter of tokens whose scales or zero points do not fit float16."""

from __future__ import annotations

from typing import Any

import pytest

from kvarn_rs import PagedKvCache

np = pytest.importorskip("numpy")

HEAD_DIM = 32
TOKENS = 20
SEALED = ["int4", "int3", "int2"]


def counts(format: str, k: Any, v: Any, steps: int = 1) -> list[int]:
    """`out_of_range_tokens` of a cache of two layers, the second of which is given other rows."""
    cache = PagedKvCache(num_layers=2, num_kv_heads=2, head_dim=HEAD_DIM, format=format, block_size=16)
    sequence, plain = cache.new_sequence(), rows(k.shape[2])
    for _ in range(steps):
        with cache.begin_step([sequence], k.shape[2]) as step:
            step.append(0, plain, plain, plain)
            step.append(1, k, v, plain)
    return cache.stats()["out_of_range_tokens"]


def rows(num_tokens: int = TOKENS) -> Any:
    return np.random.default_rng(0).standard_normal((1, 2, num_tokens, HEAD_DIM)).astype(np.float32)


@pytest.mark.parametrize("format", ["raw", "int8", *SEALED])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_ordinary_values_are_in_range(format: str, size: float) -> None:
    assert counts(format, rows(48) * size, rows(48) * size, steps=2) == [0, 0]


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("size", [1e5, 1e30, 1e-7, 1e-30])
def test_tokens_of_v_are_counted_by_layer_whatever_the_head(format: str, size: float) -> None:
    v = rows()
    v[0, 0, 17:19] *= size
    v[0, 1, 18:20] *= size  # of another head: one token in three, not in four
    assert counts(format, rows(), v) == [0, 3]


@pytest.mark.parametrize("format", SEALED)
@pytest.mark.parametrize("size", [1e8, 1e-8])
def test_tokens_of_a_tile_are_counted(format: str, size: float) -> None:
    ordinary, odd = rows(32), rows(32)
    odd[0, 1, 3] *= size  # in the first block, which the step seals
    assert counts(format, ordinary, odd) == [0, 1]
    odd[0, 0, :16] *= size
    assert counts(format, odd, ordinary) == [0, 16], "the scales of a channel of K are those of the block"


def test_a_rotation_can_take_v_beyond_float16() -> None:
    v = np.full((1, 2, TOKENS, HEAD_DIM), -60_000, np.float32)
    assert counts("int8", rows(), v) == [0, 0]
    assert counts("int4", rows(), v) == [0, TOKENS], "the first channel is -60,000 * sqrt(32), in a tile and in a page"


def test_counted_tokens_decode_wrong_and_all_others_right() -> None:
    for size, wrong in ((1e4, False), (1e6, True)):
        cache = PagedKvCache(num_layers=1, num_kv_heads=2, head_dim=HEAD_DIM, format="int8", block_size=16)
        sequence, v = cache.new_sequence(), rows() * np.float32(size)
        with cache.begin_step([sequence], TOKENS) as step:
            step.append(0, rows(), v, rows())
        k_out, v_out = rows(), rows()
        cache.dequantize(0, sequence, k_out, v_out)
        far = np.abs(v_out - v).max(-1) > np.ptp(v, -1) / 255
        assert cache.stats()["out_of_range_tokens"] == [int(far.any((0, 1)).sum())]
        assert far.any() == wrong


def test_a_model_s_layers_are_counted_by_their_number() -> None:
    pytest.importorskip("transformers")
    from hf.families import forward, kvarn_cache, make_model, prompt

    model = make_model("gemma3")
    with_large_v = model.model.layers[1].self_attn.v_proj.weight
    with_large_v.data *= 1e7
    for format in ("int8", "int4"):
        cache = kvarn_cache(model, format)
        forward(model, cache, prompt(2, 40))
        counted = cache.stats()["out_of_range_tokens"]
        assert list(counted) == [0, 1, 2]
        assert counted == {0: 0, 1: 80, 2: 0}
