"""Formats that seal: which blocks become tiles, when, and what is left of their tokens."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvarn_rs import NonFiniteError, OutOfBlocksError, OutOfOpenPagesError
from paged_reference import (
    BLOCK_SIZE,
    KV_HEADS,
    append_layers,
    attention,
    contents,
    distance,
    extend,
    filled,
    keys_and_values,
    make_cache,
    normal,
    refused,
    same,
    settle,
)

SEALED = ["int4", "int3", "int2"]
FORMATS = pytest.mark.parametrize("format", SEALED)
# Root mean square of the error of unit normals in blocks of 16 x 16, the largest seen is 0.11, 0.21, 0.51 of K and
# 0.14, 0.24, 0.46 of V.
LARGEST_ERROR = {"int4": 0.16, "int3": 0.28, "int2": 0.6}
# Of the same in INT8 pages.
INT8_ERROR = 0.01


def rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()


def blocks(pair: tuple[torch.Tensor, torch.Tensor], first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks first..last of K and V."""
    return pair[0][:, :, first * BLOCK_SIZE : last * BLOCK_SIZE], pair[1][:, :, first * BLOCK_SIZE : last * BLOCK_SIZE]


# When


@FORMATS
def test_decode_seals_a_block_with_the_step_after_the_one_that_filled_it(format) -> None:
    cache = make_cache(format, num_layers=2)
    sequence, held = cache.new_sequence(), contents(cache, 0)
    for length in range(1, 3 * BLOCK_SIZE + 2):
        extend(cache, sequence, *keys_and_values(1, length))
        num_sealed = (length - 1) // BLOCK_SIZE
        stats = cache.stats()
        assert (stats["sealed"], stats["open_pages"]) == (num_sealed, 1), length
        now = contents(cache, sequence)
        # Nothing changes but a block that is sealed, once, and a first page until half of it is written.
        changed = num_sealed if length % BLOCK_SIZE == 1 and length > 1 else None
        for block in range(-(-(length - 1) // BLOCK_SIZE)):
            old, new = blocks(held, block, block + 1), blocks(now, block, block + 1)
            written = old[0].shape[2]
            is_same = same(old, (new[0][:, :, :written], new[1][:, :, :written]))
            is_refitted = block == 0 and 1 < length <= BLOCK_SIZE // 2
            assert is_same == (changed != block + 1 and not is_refitted), (length, block)
        held = now


@FORMATS
@pytest.mark.parametrize(
    ("context", "num_new", "sealed", "open_pages"),
    [
        (0, 16, 0, 1),  # no prefill
        (0, 17, 0, 2),
        (0, 31, 0, 2),
        (0, 32, 1, 1),
        (0, 33, 1, 2),
        (0, 64, 3, 1),
        (0, 70, 3, 2),
        (8, 16, 0, 2),
        (8, 24, 0, 2),  # the first block was written by two steps, the second is the last full one
        (8, 60, 2, 3),
        (15, 16, 0, 2),
        (16, 1, 1, 1),
        (16, 16, 1, 1),
        (16, 17, 1, 2),
        (16, 48, 3, 1),
        (20, 17, 1, 2),
        (20, 1, 1, 1),
    ],
)
def test_a_prefill_seals_all_blocks_that_it_fills_except_the_last(format, context, num_new, sealed, open_pages) -> None:
    cache = make_cache(format, num_layers=2)
    sequence = filled(cache, context)
    assert cache.stats()["sealed"] == 0
    k, v = keys_and_values(num_new, 1)
    with cache.begin_step([sequence], num_new) as step:
        append_layers(cache, step, k, v)
        assert cache.stats()["sealed"] == 0, "not before the commit"
    stats = cache.stats()
    assert (stats["sealed"], stats["open_pages"]) == (sealed, open_pages)
    assert stats["open_pages"] + stats["sealed"] == stats["blocks_in_use"]
    settle(cache, sequence)
    full = (context + num_new) // BLOCK_SIZE
    assert (cache.stats()["sealed"], cache.stats()["open_pages"]) == (full, (context + num_new) % BLOCK_SIZE > 0)


@FORMATS
@pytest.mark.parametrize("num_new", [1, 60])
def test_an_aborted_step_seals_nothing(format, num_new) -> None:
    cache, untroubled = make_cache(format), make_cache(format)
    sequence, other = filled(cache, 40), filled(untroubled, 40)
    held, stats = contents(cache, sequence), cache.stats()
    as_tile, (k, v) = held, keys_and_values(num_new, 1)
    for _ in range(2):
        with cache.begin_step([sequence], num_new) as step:
            step.append(0, k, v)
            as_tile = contents(cache, sequence, pending=num_new)
            assert not same(blocks(as_tile, 1, 2), blocks(held, 1, 2)), "the step itself reads it as a tile"
            step.abort()
        assert same(contents(cache, sequence), held)
        assert {name: cache.stats()[name] for name in ("sealed", "open_pages", "blocks_in_use", "bytes_in_use")} == {
            name: stats[name] for name in ("sealed", "open_pages", "blocks_in_use", "bytes_in_use")
        }
    for one, of in ((cache, sequence), (untroubled, other)):
        extend(one, of, k, v)
    assert same(contents(cache, sequence), contents(untroubled, other))
    assert same(blocks(contents(cache, sequence), 1, 2), blocks(as_tile, 1, 2)), "as the aborted step saw it"


@FORMATS
def test_a_refused_append_seals_nothing(format) -> None:
    cache = make_cache(format)
    sequence = filled(cache, 40)
    held = contents(cache, sequence)
    k, v = keys_and_values(60, 1)
    bad = v.clone()
    bad[0, 1, 59, 3] = torch.inf
    step = cache.begin_step([sequence], 60)
    with pytest.raises(NonFiniteError):
        step.append(0, k, bad)
    step.abort()
    assert same(contents(cache, sequence), held)
    assert cache.stats()["sealed"] == 1


# What


@FORMATS
@pytest.mark.parametrize("num_new", [1, 16, 200])
def test_sealed_tokens_are_as_accurate_as_their_bits_allow(format, num_new) -> None:
    cache = make_cache(format)
    k, v = keys_and_values(200)
    sequence = cache.new_sequence()
    for part in range(0, 200, num_new):
        extend(cache, sequence, k[:, :, part : part + num_new], v[:, :, part : part + num_new])
    settle(cache, sequence)
    held = contents(cache, sequence)
    for given, read in zip((k, v), held, strict=True):
        error = (read - given)[:, :, BLOCK_SIZE : 12 * BLOCK_SIZE]
        assert LARGEST_ERROR[format] / 3 < rms(error) < LARGEST_ERROR[format]
        assert rms((read - given)[:, :, 12 * BLOCK_SIZE :]) < 2 * INT8_ERROR, "the open block is INT8"
        for block in error.split(BLOCK_SIZE, 2):
            assert rms(block) < 1.5 * LARGEST_ERROR[format]


@FORMATS
def test_any_part_of_tiles_and_pages_can_be_read(format) -> None:
    cache = make_cache(format)
    sequence = filled(cache, 70)
    whole = contents(cache, sequence)
    for start, end in [(0, 1), (1, 16), (5, 40), (15, 17), (16, 64), (47, 70), (69, 70)]:
        part = [torch.empty(1, KV_HEADS, end - start, whole[0].shape[3]) for _ in range(2)]
        cache.dequantize(0, sequence, *part, start=start)
        assert same((part[0], part[1]), (whole[0][:, :, start:end], whole[1][:, :, start:end]))


def test_more_bits_are_more_accurate() -> None:
    errors = []
    for format in ("int8", *SEALED):
        cache = make_cache(format)
        k, v = contents(cache, filled(cache, 400))
        own_k, own_v = keys_and_values(400)
        errors.append((rms(k - own_k), rms(v - own_v)))
    for nearer, further in itertools.pairwise(errors):
        assert 1.5 * nearer[0] < further[0]
        assert 1.5 * nearer[1] < further[1]


@FORMATS
@pytest.mark.parametrize("steps", [[100], [1] * 18, [16, 16, 1]], ids=str)
def test_only_the_v_of_the_first_token_stays_at_8_bits(format, steps) -> None:
    cache = make_cache(format)
    sequence, total = cache.new_sequence(), sum(steps)
    k, v = keys_and_values(total)
    for start, num_new in zip([sum(steps[:i]) for i in range(len(steps))], steps, strict=True):
        extend(cache, sequence, k[:, :, start : start + num_new], v[:, :, start : start + num_new])
    error = (contents(cache, sequence)[1] - v).square().mean(3).sqrt()[0, :, :BLOCK_SIZE]
    assert cache.stats()["sealed"] >= 1
    assert (error[:, 0] < INT8_ERROR).all()
    assert (error[:, 1:].min(1).values > 3 * INT8_ERROR).all()
    late = (contents(cache, sequence)[1] - v).square().mean(3).sqrt()[0, :, BLOCK_SIZE : 2 * BLOCK_SIZE]
    if total > 50:
        assert (late > 3 * INT8_ERROR).all(), "nor those of the second block"


@FORMATS
def test_a_reused_block_has_no_data_of_its_former_tokens(format) -> None:
    cache = make_cache(format, num_blocks=6, num_open_pages=2)
    fresh = make_cache(format)
    for seed in range(5):
        k, v = keys_and_values(90, seed)
        sequence, expected = cache.new_sequence(), fresh.new_sequence()
        for one, of in ((cache, sequence), (fresh, expected)):
            extend(one, of, k[:, :, :70], v[:, :, :70])
            for token in range(70, 90):
                extend(one, of, k[:, :, token, None], v[:, :, token, None])
        assert same(contents(cache, sequence), contents(fresh, expected))
        cache.free(sequence)
        assert cache.stats()["open_pages"] == cache.stats()["bytes_in_use"] == 0


@FORMATS
def test_a_value_near_the_float32_limit_does_not_affect_other_tokens(format) -> None:
    cache = make_cache(format)
    sequence = cache.new_sequence()
    k, v = keys_and_values(60)
    v[0, 0, 40] = 3e38
    q = normal(1, KV_HEADS, 60, k.shape[3], seed=5)
    with cache.begin_step([sequence], 60) as step:
        step.append(0, k, v)
        out = step.attend(0, q, k, v)
    assert torch.isfinite(out).all()
    before = slice(None), slice(None), slice(0, 40)
    assert distance(out[before], attention(q[before], k[before], v[before])) < 1e-5
    assert distance(out[:, 1], attention(q[:, 1:], k[:, 1:], v[:, 1:])[:, 0]) < 1e-5


# Pages, and what they cost


@FORMATS
def test_a_step_without_enough_open_pages_is_refused(format) -> None:
    cache = make_cache(format, num_open_pages=3)
    one, two = filled(cache, 32), filled(cache, 5, 1)  # a full page, an open one
    assert cache.stats()["open_pages"] == 2
    with refused(cache, OutOfOpenPagesError, "needed 2, free 1"):
        cache.begin_step([one, two], [1, 12])
    with refused(cache, OutOfOpenPagesError, "needed 2, free 1"):
        cache.begin_step([one], 17)
    with pytest.raises(OutOfBlocksError) as caught:
        cache.begin_step([one, cache.new_sequence()], [1, 1])
    assert (type(caught.value), caught.value.needed, caught.value.free) == (OutOfOpenPagesError, 2, 1)  # type: ignore[attr-defined]
    extend(cache, one, *keys_and_values(1, 2))  # which seals the full one
    assert (cache.stats()["open_pages"], cache.stats()["peak_open_pages"]) == (2, 3)
    extend(cache, one, *keys_and_values(15, 3))
    three = filled(cache, 1, 4)
    with refused(cache, OutOfOpenPagesError, "needed 1, free 0"):
        cache.begin_step([one], 1)
    cache.free(three)
    extend(cache, one, *keys_and_values(1, 5))
    assert cache.stats()["peak_open_pages"] == 3


@FORMATS
def test_a_long_prompt_takes_two_pages(format) -> None:
    cache = make_cache(format, num_open_pages=2)
    sequence = filled(cache, 400 + 7)
    assert cache.stats()["peak_open_pages"] == 2
    for token in range(60):
        extend(cache, sequence, *keys_and_values(1, token))
    assert cache.stats()["peak_open_pages"] == 2


def test_a_window_frees_open_pages_too() -> None:
    cache = make_cache("int4", window=20, num_open_pages=3, num_blocks=5)
    sequence = cache.new_sequence()
    for index in range(40):
        extend(cache, sequence, *keys_and_values(7, index))
    assert cache.stats()["open_pages"] <= 2
    extend(cache, sequence, *keys_and_values(40, 50))
    assert cache.stats()["peak_open_pages"] <= 3


@pytest.mark.parametrize(
    ("format", "head_dim", "tile_bytes"),
    [
        ("int4", 64, 9_296),
        ("int3", 64, 7_248),
        ("int2", 64, 5_200),
        ("int4", 128, 17_808),
        ("int3", 128, 13_712),
        ("int2", 128, 9_616),
        ("int4", 256, 34_832),
        ("int3", 256, 26_640),
        ("int2", 256, 18_448),
    ],
)
def test_bytes_are_those_of_tiles_and_of_the_pages_that_are_open(format, head_dim, tile_bytes) -> None:
    cache = make_cache(format, num_layers=2, num_kv_heads=3, head_dim=head_dim, block_size=128)
    page = make_cache("int8", num_layers=2, num_kv_heads=3, head_dim=head_dim, block_size=128)
    sequence = cache.new_sequence()
    k = normal(1, 3, 400, head_dim)
    with cache.begin_step([sequence], 400) as step:  # two sealed, one full page, one open
        append_layers(cache, step, k, k)
    stats = cache.stats()
    assert stats["bytes_per_block"] == 2 * 3 * tile_bytes
    assert stats["bytes_per_open_page"] == page.stats()["bytes_per_block"]
    assert stats["bytes_per_token"] == 2 * 3 * tile_bytes / 128
    assert (stats["blocks_in_use"], stats["open_pages"]) == (4, 2)
    assert stats["bytes_in_use"] == 4 * stats["bytes_per_block"] + 2 * stats["bytes_per_open_page"]
    settle(cache, sequence)
    after = cache.stats()
    assert after["bytes_in_use"] == 4 * stats["bytes_per_block"] + stats["bytes_per_open_page"]
    assert after["peak_bytes"] == stats["bytes_in_use"]
    assert cache.stats()["allocated_bytes"] >= stats["bytes_in_use"]
    assert [page.stats()[name] for name in ("bytes_per_open_page", "open_pages", "peak_open_pages", "sealed")] == [
        0
    ] * 4


@FORMATS
def test_reset_removes_tiles_and_pages(format) -> None:
    cache = make_cache(format, num_open_pages=4)
    filled(cache, 100)
    cache.reset()
    stats = cache.stats()
    assert (stats["open_pages"], stats["peak_open_pages"], stats["bytes_in_use"]) == (0, 0, 0)
    fresh = make_cache(format)
    assert same(contents(cache, filled(cache, 90, 3)), contents(fresh, filled(fresh, 90, 3)))
