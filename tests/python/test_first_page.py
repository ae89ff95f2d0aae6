"""First pages: their statistics are taken anew until half of the page is written, without rounding K twice.

The low bytes of K's codes that this needs are in rows that no token has yet: whatever copies, saves or reuses pages
must neither lose them nor read them where they are stale.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvarn_rs import PagedKvCache
from paged_reference import contents, extend, keys_and_values, make_cache, same

FORMATS = pytest.mark.parametrize("format", ["int8", "int4"])
BLOCK_SIZE = 128
HALF = BLOCK_SIZE // 2
# K in steps of its own against K at once: 1/256 of a code a refit, and statistics that differ by that much.
AS_GOOD = 1.02


def text(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first tokens of one text; K with channels far from zero beside channels near it."""
    k, v = keys_and_values(2 * BLOCK_SIZE, 3)
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
def test_tokens_appended_one_by_one_are_as_accurate_as_tokens_appended_at_once(format) -> None:
    cache = make_cache(format, block_size=BLOCK_SIZE)
    at_once, slowly = cache.new_sequence(), cache.new_sequence()
    extend(cache, at_once, *text(HALF))
    one_by_one(cache, slowly, 0, HALF)
    assert error(cache, slowly) <= AS_GOOD * error(cache, at_once)


def test_a_step_that_overwrites_low_bytes_at_most_doubles_the_error() -> None:
    cache = make_cache("int8", block_size=BLOCK_SIZE)
    at_once, in_two = cache.new_sequence(), cache.new_sequence()
    k, v = text(BLOCK_SIZE)
    extend(cache, at_once, k[:, :, :BLOCK_SIZE], v)
    extend(cache, in_two, k[:, :, :32], v[:, :, :32])
    extend(cache, in_two, k[:, :, 32:], v[:, :, 32:])
    assert error(cache, in_two) <= 2 * error(cache, at_once)


def truncated(cache: PagedKvCache, sequence: int) -> tuple[PagedKvCache, int]:
    """Twelve more tokens, and back."""
    extend(cache, sequence, *keys_and_values(12, 8))
    cache.truncate(sequence, 20)
    return cache, sequence


def forked(cache: PagedKvCache, sequence: int) -> tuple[PagedKvCache, int]:
    child = cache.fork(sequence)
    extend(cache, sequence, *keys_and_values(100, 8))
    return cache, child


def aborted(cache: PagedKvCache, sequence: int) -> tuple[PagedKvCache, int]:
    step = cache.begin_step([sequence], 12)
    step.append(0, *keys_and_values(12, 8))
    step.abort()
    return cache, sequence


def saved(cache: PagedKvCache, sequence: int, folder: Path) -> tuple[PagedKvCache, int]:
    cache.save(folder / "cache.safetensors")
    return PagedKvCache.load(folder / "cache.safetensors"), sequence


@FORMATS
@pytest.mark.parametrize("change", [forked, aborted], ids=lambda change: change.__name__)
def test_operations_on_a_short_sequence_do_not_change_its_page(format, change: Callable) -> None:
    plain, other = (make_cache(format, block_size=BLOCK_SIZE) for _ in range(2))
    sequence, changed = plain.new_sequence(), other.new_sequence()
    one_by_one(plain, sequence, 0, 20)
    one_by_one(other, changed, 0, 20)
    other, changed = change(other, changed)
    one_by_one(plain, sequence, 20, 40)
    one_by_one(other, changed, 20, 40)
    assert same(contents(other, changed), contents(plain, sequence))


@FORMATS
def test_a_restored_short_sequence_continues_bit_for_bit(format, tmp_path) -> None:
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


def test_a_file_has_no_bytes_of_a_page_s_former_tokens(tmp_path) -> None:
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
