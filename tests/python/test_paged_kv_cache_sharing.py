"""Blocks shared and counted: published prefixes, a pool that runs out, copies of a cache, and its statistics."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import kvarn_rs
from kvarn_rs import OutOfBlocksError, PagedKvCache
from paged_reference import (
    BLOCK_SIZE,
    append_layers,
    contents,
    extend,
    filled,
    keys_and_values,
    make_cache,
    normal,
    same,
    same_but_refitted,
    settle,
)

FORMATS = pytest.mark.parametrize("format", kvarn_rs.FORMATS)


def tokens(num_tokens: int, first: int = 0) -> list[int]:
    return list(range(first, first + num_tokens))


# Prefixes


@FORMATS
def test_a_published_prefix_is_found_with_its_bytes(format) -> None:
    cache = make_cache(format)
    sequence = filled(cache, 40)
    settle(cache, sequence)
    assert cache.publish_prefix(sequence, tokens(40)) == 2
    assert cache.publish_prefix(sequence, tokens(40)) == 0, "both are known already"
    found = cache.match_prefix([*tokens(35), 999])
    assert cache.seq_len(found) == 32
    assert cache.block_table(found) == cache.block_table(sequence)[:2]
    k, v = contents(cache, sequence)
    assert same(contents(cache, found), (k[:, :, :32], v[:, :, :32]))
    assert cache.stats()["blocks_in_use"] == 3

    extend(cache, found, *keys_and_values(8, 1))
    assert same(contents(cache, sequence), (k, v))


@pytest.mark.parametrize(
    ("token_ids", "length"),
    [
        ([], 0),
        (tokens(16), 0),  # the last token is never matched: a step needs a query
        (tokens(17), 16),
        (tokens(32), 16),
        (tokens(33), 32),
        (tokens(48), 32),  # the third block is not full
        ([*tokens(16), *tokens(20, 100)], 16),
        ([7, *tokens(40)], 0),
        (tokens(40, 16), 0),  # the second block alone
    ],
)
def test_a_prefix_match_has_whole_blocks_and_never_the_last_token(token_ids, length) -> None:
    cache = make_cache()
    cache.publish_prefix(filled(cache, 40), tokens(40))
    assert cache.seq_len(cache.match_prefix(token_ids)) == length


def test_a_published_block_survives_its_sequence_until_it_is_evicted() -> None:
    cache = make_cache("int8", num_blocks=4)
    sequence = filled(cache, 32)
    cache.publish_prefix(sequence, tokens(32))
    k, v = contents(cache, sequence)
    cache.free(sequence)
    assert cache.stats()["free_blocks"] == 4
    filled(cache, 32, 1)  # the other two blocks
    found = cache.match_prefix(tokens(33))
    assert same(contents(cache, found), (k, v))
    cache.free(found)
    filled(cache, 17, 2)
    assert cache.seq_len(cache.match_prefix(tokens(33))) == 0
    assert cache.stats()["free_blocks"] == 0


def test_a_published_block_that_is_written_again_is_not_found() -> None:
    cache = make_cache()
    sequence = filled(cache, 32)
    cache.publish_prefix(sequence, tokens(32))
    cache.truncate(sequence, 20)
    extend(cache, sequence, *keys_and_values(12, 1))
    assert cache.seq_len(cache.match_prefix(tokens(33))) == 16
    assert cache.publish_prefix(sequence, tokens(20) + tokens(12, 500)) == 1
    assert cache.seq_len(cache.match_prefix(tokens(33))) == 16
    assert cache.seq_len(cache.match_prefix([*tokens(20), *tokens(12, 500), 0])) == 32


# A pool that runs out


@pytest.mark.parametrize("forked", [False, True])
def test_a_step_that_does_not_fit_raises_and_changes_nothing(forked) -> None:
    cache = make_cache("int8", num_blocks=4)
    long, short = filled(cache, 20), filled(cache, 5, 1)
    sequences = [long, short, *([cache.fork(long)] if forked else [])]
    rows = [12, 28, *([1] if forked else [])]
    before, held = cache.stats(), [contents(cache, sequence) for sequence in sequences]
    tables = [cache.block_table(sequence) for sequence in sequences]
    with pytest.raises(OutOfBlocksError) as caught:
        cache.begin_step(sequences, rows)
    # `short` takes two blocks; a fork makes its open page be copied once
    assert (caught.value.needed, caught.value.free) == (2 + forked, 1)
    assert isinstance(caught.value, MemoryError)
    assert f"needed {2 + forked}, free 1" in str(caught.value)
    assert cache.stats() == before
    assert [cache.block_table(sequence) for sequence in sequences] == tables
    assert all(same(contents(cache, sequence), old) for sequence, old in zip(sequences, held, strict=True))

    for sequence in sequences[2:]:
        cache.free(sequence)
    cache.free(long)
    extend(cache, short, *keys_and_values(28, 2))
    assert cache.stats()["free_blocks"] == 1
    k, v = contents(cache, short)
    assert same_but_refitted((k[:, :, :5], v[:, :, :5]), held[1])


def test_attention_after_a_failed_step_is_as_without_it() -> None:
    outputs = []
    for fail in (False, True):
        cache = make_cache("int8", num_blocks=2)
        sequence = filled(cache, 20)
        if fail:
            with pytest.raises(OutOfBlocksError):
                cache.begin_step([sequence], 13)
        k, v = keys_and_values(12, 1)
        with cache.begin_step([sequence], 12) as step:
            step.append(0, k, v)
            outputs.append(step.attend(0, k, k, v))
    assert outputs[0].equal(outputs[1])


@pytest.mark.parametrize("num_blocks", [4, None])
def test_no_pool_has_room_for_2_to_the_50_tokens(num_blocks) -> None:
    cache = make_cache(num_blocks=num_blocks)
    with pytest.raises(OutOfBlocksError, match=str(2**46)):
        cache.begin_step([cache.new_sequence()], 2**50)
    filled(cache, 20)


def test_blocks_that_leave_the_window_make_room_for_new_ones() -> None:
    cache = make_cache(window=20, num_blocks=2)
    sequence = filled(cache, 32)
    with pytest.raises(OutOfBlocksError) as caught:
        cache.begin_step([sequence], 1)  # the query at 32 sees 13..=32
    assert (caught.value.needed, caught.value.free) == (1, 0)
    assert cache.first_held(sequence) == 0
    cache.truncate(sequence, 17)

    cache = make_cache(window=16, num_blocks=3)
    sequence = filled(cache, 48)
    extend(cache, sequence, *keys_and_values(20, 1))
    assert cache.stats()["free_blocks"] == 0
    assert cache.first_held(sequence) == 32


# Copies and reset


@FORMATS
@pytest.mark.parametrize("clone", [PagedKvCache.copy, copy.deepcopy])
def test_a_copy_is_independent(format, clone) -> None:
    cache = make_cache(format, num_blocks=8)
    sequence = filled(cache, 20)
    cache.publish_prefix(sequence, tokens(20))
    before, stats = contents(cache, sequence), cache.stats()
    other = clone(cache)
    assert other.stats() == stats
    assert same(contents(other, sequence), before)
    extend(other, sequence, *keys_and_values(9, 1))
    other_held = contents(other, sequence)
    assert cache.stats() == stats
    assert same(contents(cache, sequence), before)
    extend(cache, sequence, *keys_and_values(3, 2))
    cache.free(sequence)
    filled(cache, 100, 3)
    assert same(contents(other, sequence), other_held)
    assert other.seq_len(other.match_prefix(tokens(20))) == 16


@pytest.mark.parametrize("num_blocks", [4, None])
def test_reset_removes_all_sequences_and_keeps_the_memory(num_blocks) -> None:
    cache = make_cache("int8", num_blocks=num_blocks)
    sequence = filled(cache, 40)
    cache.publish_prefix(sequence, tokens(40))
    allocated = cache.stats()["allocated_bytes"]
    step = cache.begin_step([sequence], 1)
    cache.reset()
    assert not step.is_open
    stats = cache.stats()
    assert (stats["num_sequences"], stats["blocks_in_use"], stats["peak_blocks"]) == (0, 0, 0)
    assert (stats["free_blocks"], stats["allocated_bytes"]) == (num_blocks, allocated)
    assert cache.seq_len(cache.match_prefix(tokens(40))) == 0
    with pytest.raises(kvarn_rs.UnknownSequenceError):
        cache.seq_len(sequence)
    assert filled(cache, 40, 1) != sequence, "ids are not given out again"
    fresh = make_cache("int8")
    expected = contents(fresh, filled(fresh, 33, 2))
    cache.reset()
    assert same(contents(cache, filled(cache, 33, 2)), expected)


# Statistics


@pytest.mark.parametrize(
    ("format", "head_dim", "dtype", "token_bytes"),
    [
        ("int8", 64, "float32", 136),
        ("int8", 128, "bfloat16", 266),
        ("raw", 64, "float32", 512),
        ("raw", 128, "bfloat16", 512),
        ("raw", 128, "float16", 512),
    ],
)
def test_bytes_are_those_of_blocks_of_all_layers_and_heads(format, head_dim, dtype, token_bytes) -> None:
    cache = make_cache(
        format, num_layers=3, num_kv_heads=5, head_dim=head_dim, dtype=dtype, block_size=128, num_blocks=4
    )
    sequence = cache.new_sequence()
    k = normal(1, 5, 130, head_dim).to(getattr(torch, dtype))
    with cache.begin_step([sequence], 130) as step:
        append_layers(cache, step, k, k)
    cache.truncate(sequence, 128)
    stats = cache.stats()
    block_bytes = 3 * 5 * 128 * token_bytes
    assert stats["bytes_per_block"] == block_bytes
    assert stats["bytes_per_token"] == 15 * token_bytes
    assert (stats["blocks_in_use"], stats["bytes_in_use"]) == (1, block_bytes)
    assert (stats["peak_blocks"], stats["peak_bytes"]) == (2, 2 * block_bytes)
    assert (stats["free_blocks"], stats["partial_blocks"], stats["num_sequences"]) == (3, 0, 1)
    assert stats["allocated_bytes"] >= 4 * block_bytes
    assert stats["cow_copies"] == 0


def test_partial_blocks_counts_blocks_with_room_left() -> None:
    cache = make_cache()
    for length in (0, 1, 15, 16, 17):
        filled(cache, length)
    assert cache.stats()["partial_blocks"] == 3
    assert cache.stats()["blocks_in_use"] == 5
    cache.fork(filled(cache, 5))
    assert cache.stats()["partial_blocks"] == 4, "a shared block is one block"


def test_a_cache_reports_its_settings() -> None:
    settings: Any = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 48, "block_size": 32, "num_blocks": 7, "window": 9}
    cache = PagedKvCache(**settings, format="int8", dtype="float16")
    assert {name: getattr(cache, name) for name in settings} == settings
    assert (cache.format, cache.dtype) == ("int8", "float16")
    default = PagedKvCache(num_layers=1, num_kv_heads=1, head_dim=16)
    assert (default.format, default.block_size, default.num_blocks, default.window) == ("int4", 128, None, None)
    assert make_cache().block_size == BLOCK_SIZE
