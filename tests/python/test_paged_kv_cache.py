"""The life of a cache: steps and how they end, forks, rollback, and the sliding window."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

import kvarn_rs
from kvarn_rs import OpenStepError, RollbackError, StaleStepError
from paged_reference import (
    BLOCK_SIZE,
    append_layers,
    attention,
    concatenate,
    contents,
    distance,
    extend,
    filled,
    keys_and_values,
    make_cache,
    same,
    same_but_refitted,
    settle,
)

RELEASED = 2**32 - 1
# Sums of a few hundred products of unit normals, in another order than torch's.
FLOAT32_TOLERANCE = 1e-5
FORMATS = pytest.mark.parametrize("format", kvarn_rs.FORMATS)


# Steps


@FORMATS
def test_a_step_is_committed_at_the_end_of_its_block(format) -> None:
    cache = make_cache(format, num_layers=2)
    sequence = cache.new_sequence()
    with cache.begin_step([sequence], 20) as step:
        assert step.is_open
        assert step.num_rows == 20
        append_layers(cache, step, *keys_and_values(20))
        assert cache.seq_len(sequence) == 0, "not before the commit"
    assert not step.is_open
    assert cache.seq_len(sequence) == 20
    k, v = contents(cache, sequence, layer=1)
    assert distance(k, -contents(cache, sequence)[0]) < 0.05
    assert distance(v, -contents(cache, sequence)[1]) < 0.05


@FORMATS
def test_a_step_is_aborted_if_its_block_raises(format) -> None:
    cache = make_cache(format)
    sequence = filled(cache, 20)
    before, stats = contents(cache, sequence), cache.stats()
    step = cache.begin_step([sequence], 13)
    append_layers(cache, step, *keys_and_values(13, 1))
    with pytest.raises(ZeroDivisionError), step:
        raise ZeroDivisionError
    assert not step.is_open
    assert same(contents(cache, sequence), before)
    # Peaks and what was seen of the keys tell of what was tried, too.
    tried = {"peak_blocks", "peak_open_pages", "peak_bytes", "saturation", "drift", "out_of_range_tokens"}
    after = cache.stats()
    assert {name for name in stats if stats[name] != after[name]} <= tried
    assert after["peak_blocks"] == 3


def test_a_garbage_collected_step_is_aborted() -> None:
    cache = make_cache()
    sequence = filled(cache, 20)
    step = cache.begin_step([sequence], 13)
    with pytest.raises(OpenStepError):
        cache.begin_step([sequence], 1)
    del step
    gc.collect()
    assert cache.stats()["blocks_in_use"] == 2
    extend(cache, sequence, *keys_and_values(1))
    assert cache.seq_len(sequence) == 21


def test_a_step_keeps_its_cache_alive() -> None:
    cache = make_cache()
    step = cache.begin_step([cache.new_sequence()], 1)
    del cache
    gc.collect()
    k, v = keys_and_values(1)
    step.append(0, k, v)
    assert distance(step.attend(0, k, None, None), v) <= FLOAT32_TOLERANCE
    step.commit()


def test_an_incomplete_step_is_not_committed_and_stays_open() -> None:
    cache = make_cache(num_layers=3)
    sequence = cache.new_sequence()
    k, v = keys_and_values(4)
    step = cache.begin_step([sequence], 4)
    step.append(1, k, v)
    with pytest.raises(OpenStepError, match=r"\[0, 2\]"):
        step.commit()
    assert step.is_open
    with pytest.raises(OpenStepError, match=r"\[2\]"):
        step.attend(2, k, None, None)
    append_layers(cache, step, k, v)
    step.commit()
    assert cache.seq_len(sequence) == 4


def test_leaving_an_incomplete_step_raises_and_aborts_it() -> None:
    cache = make_cache(num_layers=2)
    sequence = filled(cache, 5)
    with pytest.raises(OpenStepError, match=r"\[1\]"), cache.begin_step([sequence], 1) as step:
        step.append(0, *keys_and_values(1))
    assert not step.is_open
    assert cache.seq_len(sequence) == 5
    cache.free(sequence)


@pytest.mark.parametrize("end", ["commit", "abort", "reset"])
def test_a_settled_step_is_stale(end) -> None:
    cache = make_cache()
    k, v = keys_and_values(2)
    step = cache.begin_step([cache.new_sequence()], 2)
    step.append(0, k, v)
    {"commit": step.commit, "abort": step.abort, "reset": cache.reset}[end]()
    for use in (
        step.commit,
        step.abort,
        lambda: step.append(0, k, v),
        lambda: step.attend(0, k, k, v),
    ):
        with pytest.raises(StaleStepError):
            use()
    assert not step.is_open


def test_only_sequences_in_an_open_step_refuse_other_operations() -> None:
    cache = make_cache()
    busy, other = filled(cache, 20), filled(cache, 20, 1)
    step = cache.begin_step([busy], 1)
    for use in (
        lambda: cache.fork(busy),
        lambda: cache.free(busy),
        lambda: cache.truncate(busy, 3),
        lambda: cache.begin_step([other, busy], 1),
        cache.copy,
    ):
        with pytest.raises(OpenStepError, match=f"sequence {busy} "):
            use()
    extend(cache, other, *keys_and_values(1))
    cache.free(cache.fork(other))
    cache.truncate(other, 4)
    step.abort()
    cache.free(busy)


@FORMATS
def test_a_layer_appended_twice_has_the_last_write(format) -> None:
    twice, once = make_cache(format), make_cache(format)
    sequence, expected = twice.new_sequence(), once.new_sequence()
    with twice.begin_step([sequence], 20) as step:
        step.append(0, *keys_and_values(20, 1))
        step.append(0, *keys_and_values(20, 2))
    extend(once, expected, *keys_and_values(20, 2))
    assert same(contents(twice, sequence), contents(once, expected))


@FORMATS
def test_threads_may_use_a_cache_at_once(format) -> None:
    cache = make_cache(format)
    sequences = [cache.new_sequence() for _ in range(4)]

    def work(index: int) -> None:
        for i in range(30):
            k, v = keys_and_values(7, 100 * index + i)
            with cache.begin_step([sequences[index]], 7) as step:
                step.append(0, k, v)
                step.attend(0, k, k, v)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, sequence in enumerate(sequences):
        alone = make_cache(format)
        expected = alone.new_sequence()
        for i in range(30):
            extend(alone, expected, *keys_and_values(7, 100 * index + i))
        assert same(contents(cache, sequence), contents(alone, expected))


# Forks and rollback


@FORMATS
@pytest.mark.parametrize("length", [5, 16, 37])
def test_a_fork_shares_blocks_until_one_of_the_two_writes(format, length) -> None:
    cache = make_cache(format)
    parent = filled(cache, length)
    settle(cache, parent)
    before, blocks = contents(cache, parent), -(-length // BLOCK_SIZE)
    child = cache.fork(parent)
    assert cache.block_table(child) == cache.block_table(parent)
    stats = cache.stats()
    open_bytes = stats["open_pages"] * stats["bytes_per_open_page"]
    assert stats["bytes_in_use"] == blocks * stats["bytes_per_block"] + open_bytes
    assert (stats["num_sequences"], stats["cow_copies"]) == (2, 0)

    extend(cache, child, *keys_and_values(1, 1))
    assert cache.stats()["blocks_in_use"] == blocks + 1
    assert cache.stats()["cow_copies"] == (length % BLOCK_SIZE > 0)
    assert same(contents(cache, parent), before)
    held = contents(cache, child)
    is_refitted = format != "raw" and length < BLOCK_SIZE // 2  # the first page is not half written
    agree = same_but_refitted if is_refitted else same
    assert agree((held[0][:, :, :length], held[1][:, :, :length]), before)

    extend(cache, parent, *keys_and_values(3, 2))
    assert same(contents(cache, child), held)
    cache.free(parent)
    assert same(contents(cache, child), held)
    cache.free(child)
    assert cache.stats()["bytes_in_use"] == 0


@FORMATS
def test_an_aborted_copy_on_write_leaves_both_as_they_were(format) -> None:
    cache = make_cache(format)
    parent = filled(cache, 21)
    settle(cache, parent)
    child, before = cache.fork(parent), contents(cache, parent)
    with cache.begin_step([child, parent], [3, 2]) as step:
        append_layers(cache, step, *keys_and_values(5, 1))
        step.abort()
    assert same(contents(cache, parent), before)
    assert same(contents(cache, child), before)
    extend(cache, child, *keys_and_values(1, 2))
    assert same(contents(cache, parent), before)


@pytest.mark.parametrize("format", ["raw", "int8"])  # where blocks seal: test_sealing_rollback.py
@pytest.mark.parametrize("length", [0, 1, 16, 17, 31, 40])
def test_a_truncated_sequence_continues_as_if_the_rest_had_never_been_appended(format, length) -> None:
    cache = make_cache(format)
    sequence = filled(cache, 40)
    kept = tuple(x[:, :, :length] for x in contents(cache, sequence))
    cache.truncate(sequence, length)
    assert cache.seq_len(sequence) == length
    assert cache.stats()["blocks_in_use"] == -(-length // BLOCK_SIZE)
    k, v = keys_and_values(30, 1)
    extend(cache, sequence, k, v)
    held = contents(cache, sequence)
    is_refitted = format == "int8" and 0 < length < BLOCK_SIZE // 2  # the first page is not half written
    agree = same_but_refitted if is_refitted else same
    assert agree((held[0][:, :, :length], held[1][:, :, :length]), (kept[0], kept[1]))
    assert distance(held[0][:, :, length:], k) <= (0.0 if format == "raw" else 0.1)
    assert distance(held[1][:, :, length:], v) <= (0.0 if format == "raw" else 0.1)


def test_truncating_a_fork_frees_only_unshared_blocks() -> None:
    cache = make_cache()
    parent = filled(cache, 40)
    child = cache.fork(parent)
    extend(cache, child, *keys_and_values(20, 1))
    assert cache.stats()["blocks_in_use"] == 5
    before = contents(cache, parent)
    cache.truncate(child, 3)
    assert cache.stats()["blocks_in_use"] == 3
    extend(cache, child, *keys_and_values(2, 2))
    assert same(contents(cache, parent), before)
    with pytest.raises(RollbackError, match=r"to 6 tokens: it holds tokens 0\.\.5"):
        cache.truncate(child, 6)


# The window


@FORMATS
def test_blocks_outside_the_window_are_released_when_the_next_step_begins(format) -> None:
    cache = make_cache(format, window=20)
    sequence = filled(cache, 60)
    settle(cache, sequence)
    assert cache.first_held(sequence) == 0
    assert cache.stats()["blocks_in_use"] == 4
    last = tuple(x[:, :, 32:] for x in contents(cache, sequence))
    with cache.begin_step([sequence], 1) as step:  # the query at 60 sees 41..=60
        append_layers(cache, step, *keys_and_values(1, 1))
        assert cache.block_table(sequence)[:2] == [RELEASED, RELEASED]
    assert RELEASED not in cache.block_table(sequence)[2:]
    assert cache.first_held(sequence) == 32
    assert cache.stats()["blocks_in_use"] == 2
    k, v = contents(cache, sequence)
    assert same((k[:, :, :-1], v[:, :, :-1]), (last[0], last[1]))


def test_a_window_keeps_the_memory_of_a_long_sequence_constant() -> None:
    cache = make_cache(window=20, num_blocks=3)
    sequence, history = cache.new_sequence(), []
    for index in range(30):
        k, v = keys_and_values(7, index)
        history.append((k, v))
        with cache.begin_step([sequence], 7) as step:
            step.append(0, k, v)
            out = step.attend(0, k, None, None)
        assert distance(out, attention(k, *concatenate(history), window=20)) <= FLOAT32_TOLERANCE
    assert cache.seq_len(sequence) == 210
    assert cache.stats()["peak_blocks"] <= 3


@pytest.mark.parametrize(("length", "possible"), [(60, True), (51, True), (50, False), (0, False)])
def test_rollback_is_refused_if_the_next_query_would_see_released_tokens(length, possible) -> None:
    cache = make_cache(window=20)
    sequence = filled(cache, 60)
    extend(cache, sequence, *keys_and_values(1, 1))
    assert cache.first_held(sequence) == 32
    if possible:  # the query at 51 sees 32..=51
        cache.truncate(sequence, length)
        k, v = keys_and_values(1, 2)
        with cache.begin_step([sequence], 1) as step:
            step.append(0, k, v)
            out = step.attend(0, k, None, None)
        whole = tuple(x[:, :, :length] for x in keys_and_values(60))
        expected = attention(k, torch.cat([whole[0], k], 2), torch.cat([whole[1], v], 2), window=20)
        assert distance(out, expected) <= FLOAT32_TOLERANCE
    else:
        with pytest.raises(RollbackError, match=rf"to {length} tokens: it holds tokens 32\.\.61"):
            cache.truncate(sequence, length)
        assert cache.seq_len(sequence) == 61


def test_a_step_that_retains_can_be_rolled_back() -> None:
    cache = make_cache(window=20)
    sequence = filled(cache, 60)
    before = contents(cache, sequence)
    extend(cache, sequence, *keys_and_values(30, 1), retain=True)
    assert cache.first_held(sequence) == 0
    cache.truncate(sequence, 60)
    assert same(contents(cache, sequence), before)
    extend(cache, sequence, *keys_and_values(1, 1))
    assert cache.first_held(sequence) == 32
