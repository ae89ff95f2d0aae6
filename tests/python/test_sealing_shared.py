"""Sealing of blocks shared by several sequences: forks, prefixes, batches, copies, and concurrent open steps."""

from __future__ import annotations

import copy

import pytest
import torch

from kvarn_rs import PagedKvCache
from paged_reference import (
    BLOCK_SIZE,
    KV_HEADS,
    Pair,
    append_layers,
    attention,
    contents,
    distance,
    extend,
    filled,
    keys_and_values,
    make_cache,
    normal,
    same,
    same_but_refitted,
    settle,
)

SEALED = ["int4", "int3", "int2"]
FORMATS = pytest.mark.parametrize("format", SEALED)
# Attention in float32 against float64, relative to outputs of order 1.
FLOAT32_TOLERANCE = 1e-5


def part(pair: Pair, start: int, end: int) -> Pair:
    return pair[0][:, :, start:end], pair[1][:, :, start:end]


def attend(cache: PagedKvCache, sequence: int, num_new: int, seed: int) -> torch.Tensor:
    """A step whose queries see what the sequence holds; the output is that of its dequantized tokens."""
    k, v = keys_and_values(num_new, seed)
    q = normal(1, 2 * KV_HEADS, num_new, k.shape[3], seed=seed)
    with cache.begin_step([sequence], num_new) as step:
        step.append(0, k, v)
        out = step.attend(0, q, None, None)
        assert distance(out, attention(q, *contents(cache, sequence, pending=num_new))) <= FLOAT32_TOLERANCE
    return out


# Forks


@FORMATS
def test_a_full_shared_block_is_sealed_once(format) -> None:
    cache = make_cache(format)
    parent = filled(cache, 32)
    children = [cache.fork(parent) for _ in range(3)]
    assert (cache.stats()["sealed"], cache.stats()["open_pages"]) == (1, 1)
    extend(cache, children[0], *keys_and_values(1, 1))
    assert (cache.stats()["sealed"], cache.stats()["open_pages"]) == (2, 1)
    held = contents(cache, parent)
    assert same(part(contents(cache, children[0]), 0, 32), held)
    for index, sequence in enumerate([parent, *children[1:]]):
        extend(cache, sequence, *keys_and_values(1, 2 + index))
        assert same(part(contents(cache, sequence), 0, 32), held)
    assert (cache.stats()["sealed"], cache.stats()["open_pages"], cache.stats()["blocks_in_use"]) == (2, 4, 6)
    with cache.begin_step([parent, *children], 1) as step:
        append_layers(cache, step, *keys_and_values(4, 9))
    assert cache.stats()["sealed"] == 2


@FORMATS
def test_a_block_is_not_sealed_while_another_sequence_ends_within_it(format) -> None:
    cache = make_cache(format)
    parent = filled(cache, 16)
    child = cache.fork(parent)
    cache.truncate(child, 11)  # within the block that the parent holds whole
    held = contents(cache, parent)
    for seed in range(3):
        k, v = keys_and_values(1, seed)
        with cache.begin_step([parent], 1) as step:
            step.append(0, k, v)
            assert same(part(contents(cache, parent, pending=1), 0, 16), held), "nor read as if it were"
        assert cache.stats()["sealed"] == 0
        assert same(part(contents(cache, parent), 0, 16), held)
        assert same(contents(cache, child), part(held, 0, 11))
    before = contents(cache, parent)
    attend(cache, child, 2, 7)  # into a copy
    assert cache.stats()["cow_copies"] == 1
    assert same(part(contents(cache, child), 0, 11), part(held, 0, 11))
    assert same(contents(cache, parent), before)
    attend(cache, parent, 1, 8)
    assert cache.stats()["sealed"] == 1, "now nobody ends within it"
    assert not same(part(contents(cache, parent), 0, 16), held)


@FORMATS
def test_a_block_due_for_sealing_stays_open_if_a_sequence_is_truncated_into_it(format) -> None:
    cache = make_cache(format)
    parent = filled(cache, 16)
    child = cache.fork(parent)
    held, (k, v) = contents(cache, parent), keys_and_values(1, 1)
    with cache.begin_step([parent], 1) as step:
        step.append(0, k, v)
        cache.truncate(child, 11)
    assert cache.stats()["sealed"] == 0
    assert same(contents(cache, child), part(held, 0, 11))
    assert same(part(contents(cache, parent), 0, 16), held)
    attend(cache, child, 1, 2)
    attend(cache, parent, 1, 3)
    assert cache.stats()["sealed"] == 1
    assert same(part(contents(cache, child), 0, 11), part(held, 0, 11))


@FORMATS
def test_two_sequences_continue_in_one_step_from_a_block_that_one_ends_within(format) -> None:
    for order in (1, -1):
        cache = make_cache(format)
        parent = filled(cache, 16)
        child = cache.fork(parent)
        cache.truncate(child, 11)
        held = contents(cache, parent)
        k, v = keys_and_values(2, 1)
        with cache.begin_step([parent, child][::order], 1) as step:
            append_layers(cache, step, k, v)
        assert same(part(contents(cache, child), 0, 11), part(held, 0, 11))
        assert (cache.stats()["sealed"], cache.stats()["cow_copies"]) == (1, 1)
        assert not same(part(contents(cache, parent), 0, 16), held)


def test_a_fork_that_outlives_its_parent_writes_in_place() -> None:
    cache = make_cache("int4")
    parent = filled(cache, 16)
    child = cache.fork(parent)
    cache.truncate(child, 11)
    cache.free(parent)
    held = contents(cache, child)
    extend(cache, child, *keys_and_values(5, 1))
    assert (cache.stats()["cow_copies"], cache.stats()["blocks_in_use"], cache.stats()["sealed"]) == (0, 1, 0)
    assert same_but_refitted(part(contents(cache, child), 0, 11), held)
    settle(cache, child)
    assert cache.stats()["sealed"] == 1


# Prefixes


@FORMATS
def test_a_warm_prefix_has_the_stored_bytes_and_keeps_them(format) -> None:
    cache = make_cache(format, num_layers=2, num_blocks=12)
    sequence, ids = filled(cache, 70), list(range(70))
    settle(cache, sequence)
    held = [contents(cache, sequence, layer) for layer in range(2)]
    assert cache.publish_prefix(sequence, ids) == 4
    for _ in range(3):
        found = cache.match_prefix([*ids[:64], 999])
        assert cache.seq_len(found) == 64
        for layer in range(2):
            assert same(contents(cache, found, layer), part(held[layer], 0, 64))
        extend(cache, found, *keys_and_values(20, 1))
        for layer in range(2):
            assert same(part(contents(cache, found, layer), 0, 64), part(held[layer], 0, 64))
        cache.free(found)
    cache.free(sequence)
    assert cache.stats()["blocks_in_use"] == cache.stats()["open_pages"] == 0
    found = cache.match_prefix([*ids[:64], 999])
    assert cache.seq_len(found) == 64, "tiles outlive their sequences"
    assert same(contents(cache, found), part(held[0], 0, 64))


@FORMATS
def test_an_open_prefix_block_is_found_only_while_a_sequence_uses_it(format) -> None:
    cache = make_cache(format)
    sequence, ids = filled(cache, 40), list(range(40))
    cache.publish_prefix(sequence, ids)
    held = contents(cache, sequence)
    found = cache.match_prefix([*ids[:32], 999])
    assert cache.seq_len(found) == 32
    assert same(contents(cache, found), part(held, 0, 32))
    cache.free(sequence)
    assert same(contents(cache, found), part(held, 0, 32))
    cache.free(found)
    again = cache.match_prefix([*ids[:32], 999])
    assert cache.seq_len(again) == 16, "a page that nobody holds is given back"
    assert same(contents(cache, again), part(held, 0, 16))


# Batches


@FORMATS
def test_a_tile_does_not_depend_on_the_rest_of_the_batch(format) -> None:
    lengths = [50, 7, 33, 64, 17]
    k, v = keys_and_values(64, batch=5)
    mask = torch.arange(64) >= 64 - torch.tensor(lengths)[:, None]  # padded on the left
    together, alone = make_cache(format), make_cache(format)
    sequences = [together.new_sequence() for _ in lengths]
    with together.begin_step(sequences, mask=mask) as step:
        step.append(0, k, v)
    for index in range(20):
        with together.begin_step(sequences, 1) as step:
            append_layers(together, step, *keys_and_values(1, 100 + index, batch=5))
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        own = alone.new_sequence()
        extend(alone, own, k[row, None, :, 64 - length :], v[row, None, :, 64 - length :])
        for index in range(20):
            extend(alone, own, *(x[row, None] for x in keys_and_values(1, 100 + index, batch=5)))
        assert same(contents(together, sequence), contents(alone, own))
        first = contents(together, sequence)[1][:, :, 0] - v[row, None, :, 64 - length]
        assert first.abs().max() < 0.03, "the first token is the first that is no padding"
        alone.free(own)


# Steps side by side


@FORMATS
def test_a_block_read_by_another_open_step_is_sealed_later(format) -> None:
    cache = make_cache(format)
    one = filled(cache, 32)
    two = cache.fork(one)
    held = contents(cache, one)
    k, v = keys_and_values(1, 1)
    first, second = cache.begin_step([one], 1), cache.begin_step([two], 1)
    for step in (first, second):
        step.append(0, k, v)
    first.commit()
    assert cache.stats()["sealed"] == 1, "the second step may read it yet"
    assert same(part(contents(cache, one), 16, 32), part(held, 16, 32))
    out = second.attend(0, k, None, None)
    assert distance(out, attention(k, *contents(cache, two, pending=1))) <= FLOAT32_TOLERANCE
    second.commit()
    assert cache.stats()["sealed"] == 2
    assert same(contents(cache, one), contents(cache, two))


@FORMATS
def test_an_aborted_concurrent_step_delays_sealing_and_does_not_prevent_it(format) -> None:
    cache = make_cache(format)
    one = filled(cache, 32)
    two = cache.fork(one)
    held, (k, v) = contents(cache, one), keys_and_values(1, 1)
    first, second = cache.begin_step([one], 1), cache.begin_step([two], 1)
    first.append(0, k, v)
    first.commit()
    second.append(0, k, v)
    second.abort()
    assert same(contents(cache, two), held)
    assert cache.stats()["sealed"] == 1
    extend(cache, one, k, v)
    assert cache.stats()["sealed"] == 2


@FORMATS
def test_sequences_that_share_nothing_seal_though_a_step_is_always_open(format) -> None:
    cache, alone = make_cache(format), make_cache(format)
    sequences, expected = [cache.new_sequence() for _ in range(2)], [alone.new_sequence() for _ in range(2)]
    earlier = None
    for index in range(50):
        k, v = keys_and_values(1, index)
        step = cache.begin_step([sequences[index % 2]], 1)
        step.append(0, k, v)
        if earlier is not None:
            earlier.commit()
        earlier = step
        extend(alone, expected[index % 2], k, v)
    assert earlier is not None
    earlier.commit()
    assert (cache.stats()["sealed"], cache.stats()["open_pages"]) == (2, 2)
    for sequence, own in zip(sequences, expected, strict=True):
        assert same(contents(cache, sequence), contents(alone, own))


# Copies


@FORMATS
@pytest.mark.parametrize("clone", [PagedKvCache.copy, copy.deepcopy])
def test_a_copy_has_tiles_and_pages_of_its_own(format, clone) -> None:
    cache = make_cache(format, num_open_pages=6)
    sequence = filled(cache, 70)
    other = clone(cache)
    held = contents(cache, sequence)
    settle(cache, sequence)
    assert (cache.stats()["sealed"], other.stats()["sealed"]) == (4, 3)
    assert same(contents(other, sequence), held)
    extend(other, sequence, *keys_and_values(30, 1))
    other.truncate(sequence, 21, unseal=True)
    assert (cache.stats()["unsealed"], other.stats()["unsealed"]) == (0, 1)
    assert same(part(contents(cache, sequence), 0, 3 * BLOCK_SIZE), part(held, 0, 3 * BLOCK_SIZE))
    other.reset()
    assert cache.seq_len(sequence) == 70
