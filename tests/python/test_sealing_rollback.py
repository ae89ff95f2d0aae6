"""Truncation into a sealed block: refused, or with `unseal` decoded into a page again."""

from __future__ import annotations

import pytest

from kvarn_rs import ConfigError, OpenStepError, OutOfBlocksError, OutOfOpenPagesError, RollbackError
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
    refused,
    same,
    settle,
)

SEALED = ["int4", "int3", "int2"]
FORMATS = pytest.mark.parametrize("format", SEALED)
# What an INT8 page makes of the values of a tile, which are of the order of 1: the largest seen is 0.03.
INT8_ERROR = 0.06
# Attention in float32 against float64, relative to outputs of order 1.
FLOAT32_TOLERANCE = 1e-5


def head(pair: Pair, length: int) -> Pair:
    return pair[0][:, :, :length], pair[1][:, :, :length]


def is_near(one: Pair, other: Pair) -> bool:
    return max(distance(a, b) for a, b in zip(one, other, strict=True)) <= INT8_ERROR


@FORMATS
@pytest.mark.parametrize("length", [1, 15, 17, 31, 47])
def test_truncation_within_a_sealed_block_is_refused_and_names_its_tokens(format, length) -> None:
    cache = make_cache(format)
    sequence = filled(cache, 70)
    settle(cache, sequence)
    start = length - length % BLOCK_SIZE
    with refused(
        cache, RollbackError, f"sequence {sequence}", f"to {length} tokens", f"{start}..{start + 16} are sealed"
    ):
        cache.truncate(sequence, length)
    with refused(cache, RollbackError, "71", "70"):
        cache.truncate(sequence, 71, unseal=True)


@FORMATS
@pytest.mark.parametrize("length", [0, 16, 32, 48, 64, 65, 70])
def test_truncation_between_blocks_or_within_an_open_one_unseals_nothing(format, length) -> None:
    cache = make_cache(format)
    sequence = filled(cache, 70)
    settle(cache, sequence)
    held = contents(cache, sequence)
    cache.truncate(sequence, length)
    assert (cache.stats()["unsealed"], cache.stats()["blocks_in_use"]) == (0, -(-length // BLOCK_SIZE))
    assert cache.stats()["open_pages"] == (length % BLOCK_SIZE > 0)
    assert same(contents(cache, sequence), head(held, length))


@FORMATS
@pytest.mark.parametrize("length", [33, 40, 47])
def test_the_last_full_block_of_a_prompt_can_be_truncated_before_the_next_step(format, length) -> None:
    cache = make_cache(format)
    sequence = filled(cache, 50)
    held = contents(cache, sequence)
    cache.truncate(sequence, length)
    assert same(contents(cache, sequence), head(held, length))
    assert cache.stats()["unsealed"] == 0


@FORMATS
@pytest.mark.parametrize("length", [1, 15, 17, 31, 33, 63])
def test_an_unsealed_block_is_a_page_of_the_tile_s_tokens(format, length) -> None:
    cache = make_cache(format, num_layers=2)
    sequence = filled(cache, 70)
    settle(cache, sequence)
    held = [contents(cache, sequence, layer) for layer in range(2)]
    cache.truncate(sequence, length, unseal=True)
    stats = cache.stats()
    assert (stats["unsealed"], stats["sealed"], stats["open_pages"]) == (1, 4, 1)
    assert (stats["blocks_in_use"], stats["cow_copies"]) == (-(-length // BLOCK_SIZE), 0)
    start = length - length % BLOCK_SIZE
    for layer in range(2):
        kept = contents(cache, sequence, layer)
        assert kept[0].shape[2] == length
        assert same(head(kept, start), head(held[layer], start)), "blocks before it are tiles as before"
        assert is_near(kept, head(held[layer], length))


@FORMATS
@pytest.mark.parametrize("length", [5, 21])
def test_a_sequence_continues_after_unsealing(format, length) -> None:
    cache = make_cache(format)
    sequence = filled(cache, 60)
    settle(cache, sequence)
    cache.truncate(sequence, length, unseal=True)
    kept = contents(cache, sequence)
    for index, num_new in enumerate([3, 1, 40, 1]):
        before = contents(cache, sequence)
        k, v = keys_and_values(num_new, 10 + index)
        q = normal(1, 2 * KV_HEADS, num_new, k.shape[3], seed=index)
        with cache.begin_step([sequence], num_new) as step:
            step.append(0, k, v)
            out = step.attend(0, q, None, None)
            assert distance(out, attention(q, *contents(cache, sequence, pending=num_new))) <= FLOAT32_TOLERANCE
            if index == 0:
                assert same(head(contents(cache, sequence, pending=3), length), before)
    assert cache.seq_len(sequence) == length + 45
    settle(cache, sequence)
    assert cache.stats()["open_pages"] == 1
    assert not same(head(contents(cache, sequence), length), kept), "its block is sealed again"
    again = contents(cache, sequence)
    cache.truncate(sequence, length, unseal=True)
    assert cache.stats()["unsealed"] == 2
    assert is_near(contents(cache, sequence), head(again, length))


@FORMATS
def test_the_first_token_s_v_is_as_exact_after_unsealing_and_sealing_again(format) -> None:
    cache = make_cache(format)
    sequence = filled(cache, 40)
    _, v = keys_and_values(40)
    for _ in range(3):
        cache.truncate(sequence, 9, unseal=True)
        extend(cache, sequence, *keys_and_values(31, 1))
        first = contents(cache, sequence)[1][:, :, 0]
        assert distance(first, v[:, :, 0]) < INT8_ERROR / 2


@FORMATS
def test_unsealing_a_shared_block_does_not_change_other_sequences(format) -> None:
    cache = make_cache(format)
    parent = filled(cache, 60)
    settle(cache, parent)
    child, held, table = cache.fork(parent), contents(cache, parent), cache.block_table(parent)
    cache.truncate(child, 21, unseal=True)
    assert cache.block_table(parent) == table
    assert cache.block_table(child)[0] == table[0]
    assert cache.block_table(child)[1] not in table
    assert cache.stats()["blocks_in_use"] == 5
    assert same(contents(cache, parent), held)
    extend(cache, child, *keys_and_values(40, 1))
    extend(cache, parent, *keys_and_values(3, 2))
    assert same(head(contents(cache, parent), 60), held)
    cache.free(parent)
    cache.truncate(child, 3, unseal=True)
    assert is_near(contents(cache, child), head(held, 3))


def test_a_published_block_is_found_after_its_sequence_was_truncated_into_it() -> None:
    cache = make_cache("int4")
    sequence, ids = filled(cache, 60), list(range(60))
    settle(cache, sequence)
    cache.publish_prefix(sequence, ids)
    held = contents(cache, sequence)
    cache.truncate(sequence, 21, unseal=True)
    extend(cache, sequence, *keys_and_values(5, 1))
    found = cache.match_prefix([*ids[:48], 999])
    assert cache.seq_len(found) == 48
    assert same(contents(cache, found), head(held, 48))


@FORMATS
def test_a_window_bounds_how_far_back_a_sealed_block_can_be_reached(format) -> None:
    cache = make_cache(format, window=20)
    sequence = filled(cache, 70)
    extend(cache, sequence, *keys_and_values(1, 1))
    assert cache.first_held(sequence) == 48
    with refused(cache, RollbackError, "to 66 tokens"):
        cache.truncate(sequence, 66, unseal=True)
    extend(cache, sequence, *keys_and_values(15, 2), retain=True)
    assert cache.seq_len(sequence) == 86
    settle(cache, sequence)
    held = contents(cache, sequence)
    with refused(cache, RollbackError, "64..80 are sealed"):
        cache.truncate(sequence, 75)
    cache.truncate(sequence, 75, unseal=True)
    assert (cache.first_held(sequence), cache.seq_len(sequence), cache.stats()["unsealed"]) == (48, 75, 1)
    assert is_near(contents(cache, sequence), head(held, 75 - 48))
    k, v = keys_and_values(1, 3)
    with cache.begin_step([sequence], 1) as step:
        step.append(0, k, v)
        out = step.attend(0, k, None, None)
        window = tuple(x[:, :, -20:] for x in contents(cache, sequence, pending=1))
        assert distance(out, attention(k, window[0], window[1])) <= FLOAT32_TOLERANCE


@FORMATS
def test_a_block_stays_sealed_if_no_page_is_free(format) -> None:
    cache = make_cache(format, num_open_pages=2)
    sequence = filled(cache, 48)
    cache.truncate(sequence, 32)
    assert cache.stats()["open_pages"] == 0
    other = filled(cache, 20, 1)  # a full page and an open one
    with refused(cache, OutOfOpenPagesError, "needed 1, free 0"):
        cache.truncate(sequence, 20, unseal=True)
    cache.free(other)
    cache.truncate(sequence, 20, unseal=True)
    assert cache.seq_len(sequence) == 20


@FORMATS
def test_a_shared_block_stays_sealed_if_no_block_is_free(format) -> None:
    cache = make_cache(format, num_blocks=3)
    sequence = filled(cache, 48)
    cache.truncate(sequence, 32)
    child = cache.fork(sequence)
    filled(cache, 10, 1)
    with pytest.raises(OutOfBlocksError) as caught:
        cache.truncate(child, 20, unseal=True)
    assert (type(caught.value), caught.value.needed, caught.value.free) == (OutOfBlocksError, 1, 0)
    assert same(contents(cache, child), contents(cache, sequence))
    held = contents(cache, sequence)
    cache.truncate(sequence, 16)
    cache.truncate(child, 20, unseal=True)  # in the block that it gives up itself
    assert is_near(contents(cache, child), head(held, 20))
    assert cache.stats()["free_blocks"] == 0


def test_check_truncate_foresees_truncations_of_several_sequences() -> None:
    cache = make_cache("int4", num_blocks=7, num_open_pages=3)
    parent = filled(cache, 60)
    settle(cache, parent)
    children = [cache.fork(parent) for _ in range(2)]
    cache.check_truncate([parent, *children], [20, 21, 22])
    other = filled(cache, 3, 1)  # takes one of the two that are left
    with refused(cache, OutOfOpenPagesError, "needed 1, free 0"):
        cache.check_truncate([parent, *children], [20, 21, 22])
    cache.free(other)
    for sequence, length in zip([parent, *children], [20, 21, 22], strict=True):
        cache.truncate(sequence, length, unseal=True)
    with refused(cache, RollbackError, "to 24 tokens"):
        cache.check_truncate([parent, children[1]], [3, 24])
    with refused(cache, ConfigError, "1 lengths"):
        cache.check_truncate([parent, children[1]], [3])
    step = cache.begin_step([parent], 1)
    with pytest.raises(OpenStepError):
        cache.check_truncate([parent], [3])
    step.abort()


def test_a_sequence_in_an_open_step_is_not_unsealed_and_one_beside_it_is() -> None:
    cache = make_cache("int4")
    one, two = filled(cache, 40), filled(cache, 40, 1)
    held = contents(cache, two)
    k, v = keys_and_values(3, 2)
    step = cache.begin_step([one], 3)
    with pytest.raises(OpenStepError):
        cache.truncate(one, 5, unseal=True)
    cache.truncate(two, 5, unseal=True)
    append_layers(cache, step, k, v)
    step.commit()
    assert cache.seq_len(one) == 43
    assert is_near(contents(cache, two), head(held, 5))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("codec", ["kivi4", "kvarn_k4v2"])
def test_a_codec_s_blocks_open_again_as_they_were(codec, dtype) -> None:
    cache = make_cache("raw", codec=codec, dtype=dtype)
    sequence = filled(cache, 70)
    held = contents(cache, sequence)
    with refused(cache, RollbackError, "16..32 are sealed"):
        cache.truncate(sequence, 20)
    cache.truncate(sequence, 20, unseal=True)
    assert cache.stats()["unsealed"] == 1
    assert same(contents(cache, sequence), head(held, 20))
