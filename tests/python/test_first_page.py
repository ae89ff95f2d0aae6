"""First pages: their statistics are taken anew until half of the page is written, without rounding K twice.

The low bytes of K's codes that this needs are in rows that no token has yet: whatever copies, saves or reuses pages
must neither lose them nor read them where they are stale.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kvarn_rs import NonFiniteError, PagedKvCache
from paged_reference import append_layers, contents, extend, keys_and_values, make_cache, same

FORMATS = pytest.mark.parametrize("format", ["int8", "int4"])
BLOCK_SIZE = 128
HALF = BLOCK_SIZE // 2
# K in steps of its own against K at once: 1/256 of a code a refit, and statistics that differ by that much.
AS_GOOD = 1.02


def text(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first tokens of one text; K with channels far from zero beside channels near it."""
    k, v = keys_and_values(4 * BLOCK_SIZE, 3)
    offsets = torch.zeros(k.shape[-1])
    offsets[::4] = 100
    return (k * (1 + offsets / 20) + offsets)[:, :, :num_tokens], v[:, :, :num_tokens]


def one_by_one(cache: PagedKvCache, sequence: int, first: int, last: int) -> None:
    k, v = text(last)
    for token in range(first, last):
        extend(cache, sequence, k[:, :, token : token + 1], v[:, :, token : token + 1])


def error(cache: PagedKvCache, sequence: int) -> float:
    """Root mean square error of K in the first half of the page."""
    k = contents(cache, sequence)[0][:, :, :HALF]
    return (k - text(k.shape[2])[0]).square().mean().sqrt().item()


@FORMATS
def test_tokens_that_come_one_by_one_are_as_near_as_tokens_that_come_at_once(format) -> None:
    cache = make_cache(format, block_size=BLOCK_SIZE)
    at_once, slowly = cache.new_sequence(), cache.new_sequence()
    extend(cache, at_once, *text(HALF))
    one_by_one(cache, slowly, 0, HALF)
    assert error(cache, slowly) <= AS_GOOD * error(cache, at_once)


@FORMATS
@pytest.mark.parametrize("cuts", [(1,), (5,), (32,), (63,), (1, 2, 9, 40)], ids=str)
@pytest.mark.parametrize("end", [65, 100, BLOCK_SIZE])
def test_a_step_that_crosses_the_middle_of_the_page_is_as_near_as_one_step(format, cuts, end) -> None:
    cache = make_cache(format, block_size=BLOCK_SIZE)
    at_once, in_steps = cache.new_sequence(), cache.new_sequence()
    k, v = text(end)
    extend(cache, at_once, k, v)
    for first, last in pairwise((0, *cuts, end)):
        extend(cache, in_steps, k[:, :, first:last], v[:, :, first:last])
    assert error(cache, in_steps) <= AS_GOOD * error(cache, at_once)


def truncated(cache: PagedKvCache, sequence: int) -> tuple[PagedKvCache, int]:
    """Twelve more tokens, and back."""
    extend(cache, sequence, *keys_and_values(12, 8))
    cache.truncate(sequence, 20)
    return cache, sequence


def forked(cache: PagedKvCache, sequence: int) -> tuple[PagedKvCache, int]:
    child = cache.fork(sequence)
    extend(cache, sequence, *keys_and_values(100, 8))
    return cache, child


def saved(cache: PagedKvCache, sequence: int, folder: Path) -> tuple[PagedKvCache, int]:
    cache.save(folder / "cache.safetensors")
    return PagedKvCache.load(folder / "cache.safetensors"), sequence


@FORMATS
def test_a_fork_of_a_short_sequence_has_a_page_of_its_own(format) -> None:
    plain, other = (make_cache(format, block_size=BLOCK_SIZE) for _ in range(2))
    sequence, changed = plain.new_sequence(), other.new_sequence()
    one_by_one(plain, sequence, 0, 20)
    one_by_one(other, changed, 0, 20)
    other, changed = forked(other, changed)
    one_by_one(plain, sequence, 20, 40)
    one_by_one(other, changed, 20, 40)
    assert same(contents(other, changed), contents(plain, sequence))


@FORMATS
@pytest.mark.parametrize("again", [False, True], ids=["aborted", "appended again"])
@pytest.mark.parametrize(
    ("block_size", "length", "num_new"),
    [(128, 20, 12), (128, 20, 100), (128, 60, 20), (128, 1, 300), (16, 6, 5), (16, 4, 12), (32, 12, 16)],
)
def test_an_append_that_does_not_count_leaves_the_page_as_it_was(format, again, block_size, length, num_new) -> None:
    plain, other = (make_cache(format, block_size=block_size, num_layers=2) for _ in range(2))
    sequence, changed = plain.new_sequence(), other.new_sequence()
    one_by_one(plain, sequence, 0, length)
    one_by_one(other, changed, 0, length)
    step = other.begin_step([changed], num_new)
    wrong = keys_and_values(num_new, 8)
    append_layers(other, step, *wrong)
    if again:
        k, v = text(length + num_new)
        with pytest.raises(NonFiniteError):
            step.append(0, torch.full_like(wrong[0], torch.nan), wrong[1])
        append_layers(other, step, k[:, :, length:], v[:, :, length:])
        step.commit()
        extend(plain, sequence, k[:, :, length:], v[:, :, length:])
    else:
        step.abort()
    for layer in range(2):
        assert same(contents(other, changed, layer), contents(plain, sequence, layer))
    one_by_one(plain, sequence, plain.seq_len(sequence), length + num_new + 20)
    one_by_one(other, changed, other.seq_len(changed), length + num_new + 20)
    for layer in range(2):
        assert same(contents(other, changed, layer), contents(plain, sequence, layer))


@FORMATS
def test_a_saved_short_sequence_goes_on_bit_for_bit(format, tmp_path) -> None:
    cache = make_cache(format, block_size=BLOCK_SIZE)
    sequence = cache.new_sequence()
    one_by_one(cache, sequence, 0, 20)
    loaded, again = saved(cache, sequence, tmp_path)
    one_by_one(cache, sequence, 20, 40)
    one_by_one(loaded, again, 20, 40)
    assert same(contents(loaded, again), contents(cache, sequence))


@FORMATS
def test_low_bytes_of_truncated_tokens_are_not_read(format) -> None:
    cache = make_cache(format, block_size=BLOCK_SIZE)
    at_once, sequence = cache.new_sequence(), cache.new_sequence()
    extend(cache, at_once, *text(HALF))
    one_by_one(cache, sequence, 0, 20)
    truncated(cache, sequence)
    one_by_one(cache, sequence, 20, HALF)
    assert error(cache, sequence) <= AS_GOOD * error(cache, at_once)
    full = cache.new_sequence()
    extend(cache, full, *keys_and_values(BLOCK_SIZE, 9))  # rows where low bytes would be
    cache.truncate(full, 0)
    one_by_one(cache, full, 0, HALF)
    assert error(cache, full) <= AS_GOOD * error(cache, at_once)
    emptied = cache.new_sequence()
    extend(cache, emptied, *text(BLOCK_SIZE))
    cache.truncate(emptied, 20)
    one_by_one(cache, emptied, 20, HALF)
    assert error(cache, emptied) <= 2 * error(cache, at_once)


def test_a_file_has_nothing_of_a_page_s_former_tokens(tmp_path) -> None:
    def written(former: bool) -> bytes:
        cache = make_cache("int8", block_size=BLOCK_SIZE, num_blocks=2)
        gone = cache.new_sequence()
        if former:
            one_by_one(cache, gone, 0, 10)
        cache.free(gone)
        sequence = cache.new_sequence()
        extend(cache, sequence, *text(BLOCK_SIZE + 5))
        cache.truncate(sequence, 40)
        path = tmp_path / f"{former}.safetensors"
        cache.save(path)
        return path.read_bytes()

    assert written(former=True) == written(former=False)
