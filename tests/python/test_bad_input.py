"""Bad input raises a typed error that carries the numbers, and changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import kvarn_rs
from kvarn_rs import (
    CacheFileError,
    CalibrationError,
    ConfigError,
    DeviceError,
    DriverError,
    DtypeError,
    KvarnError,
    NonFiniteError,
    OpenStepError,
    OutOfBlocksError,
    OutOfMemoryError,
    OutOfOpenPagesError,
    PagedKvCache,
    RollbackError,
    ShapeError,
    StaleStepError,
    StrideError,
    UnknownFormatError,
    UnknownSequenceError,
    UnsupportedError,
)
from paged_reference import (
    HEAD_DIM,
    KV_HEADS,
    NUM_NEW,
    NUM_TOKENS,
    contents,
    distance,
    extend,
    filled,
    keys_and_values,
    make_cache,
    refused,
    step_beside_a_neighbour,
)

SETTINGS: dict[str, Any] = {"num_layers": 1, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
LARGEST = 2**64 - 1
FORMATS = pytest.mark.parametrize("format", kvarn_rs.FORMATS)


def test_every_error_is_a_kvarn_error_and_a_builtin_exception() -> None:
    builtins = {
        CacheFileError: ConfigError,
        CalibrationError: ConfigError,
        ConfigError: ValueError,
        DeviceError: ValueError,
        DriverError: RuntimeError,
        DtypeError: ValueError,
        NonFiniteError: ValueError,
        OpenStepError: RuntimeError,
        OutOfBlocksError: MemoryError,
        OutOfMemoryError: MemoryError,
        OutOfOpenPagesError: OutOfBlocksError,
        RollbackError: ValueError,
        ShapeError: ValueError,
        StaleStepError: RuntimeError,
        StrideError: ValueError,
        UnknownFormatError: ConfigError,
        UnknownSequenceError: KeyError,
        UnsupportedError: NotImplementedError,
    }
    errors = {x for x in vars(kvarn_rs).values() if isinstance(x, type) and issubclass(x, KvarnError)} - {KvarnError}
    assert errors == set(builtins)
    assert all(issubclass(error, builtin) for error, builtin in builtins.items())


# Settings


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"format": "int5"}, UnknownFormatError, ["int5", *kvarn_rs.FORMATS]),
        ({"format": ""}, UnknownFormatError, ['""', *kvarn_rs.FORMATS]),
        ({"head_dim": 72}, UnsupportedError, ["head_dim", 72, 16, 256]),
        ({"head_dim": 0}, UnsupportedError, ["head_dim", "0", 16, 256]),
        ({"head_dim": 272}, UnsupportedError, ["head_dim", 272, 16, 256]),
        ({"block_size": 48}, ConfigError, ["block_size", 48, "16, 32, 64, 128"]),
        ({"block_size": 0}, ConfigError, ["block_size", "got 0"]),
        ({"num_blocks": 0}, ConfigError, ["num_blocks", "0"]),
        ({"num_blocks": 2**32}, ConfigError, ["num_blocks", 2**32]),
        ({"num_open_pages": 0}, ConfigError, ["num_open_pages", "got 0"]),
        ({"num_open_pages": 2**32}, ConfigError, ["num_open_pages", 2**32]),
        ({"format": "int4", "codec": "fp8"}, ConfigError, ["raw", "int4"]),
        ({"format": "raw", "codec": "fp4"}, UnknownFormatError, ["fp4", *kvarn_rs.CODECS]),
        ({"layers": [0, 1], "calibration": kvarn_rs.Calibration()}, ConfigError, ["2 layer numbers", "1 layers"]),
        ({"window": 0}, ConfigError, ["window", "at least 1"]),
        ({"num_layers": 0}, ConfigError, ["num_layers", "0"]),
        ({"num_kv_heads": 0}, ConfigError, ["num_kv_heads", "0"]),
        ({"dtype": "float64"}, DtypeError, ["float64", "float32, float16, bfloat16"]),
    ],
    ids=str,
)
def test_an_invalid_setting_is_named_with_its_valid_values(settings, error, words) -> None:
    with pytest.raises(error) as caught:
        PagedKvCache(**{**SETTINGS, **settings})
    assert caught.type is error
    assert all(str(word) in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("settings", [{"num_layers": 2**62}, {"num_kv_heads": 2**60}, {"num_kv_heads": 2**58}], ids=str)
def test_a_cache_whose_bytes_cannot_be_counted_is_refused(settings) -> None:
    with pytest.raises(KvarnError):
        PagedKvCache(**{**SETTINGS, **settings})


@pytest.mark.parametrize("settings", [{"num_layers": 2**40}, {"num_blocks": 2**31}], ids=str)
def test_a_cache_larger_than_memory_raises_instead_of_aborting(settings) -> None:
    pytest.importorskip("resource")
    code = f"""
import kvarn_rs, resource
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
try:
    kvarn_rs.PagedKvCache(**{ {**SETTINGS, **settings}!r})
except kvarn_rs.KvarnError:
    print("refused")
"""
    environment = {**os.environ, "RUST_BACKTRACE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "refused"), done.stderr[:300]


# Sequences, layers, lengths

VERBS: dict[str, Callable[[PagedKvCache, int], object]] = {
    "fork": lambda cache, sequence: cache.fork(sequence),
    "free": lambda cache, sequence: cache.free(sequence),
    "truncate": lambda cache, sequence: cache.truncate(sequence, 0),
    "seq_len": lambda cache, sequence: cache.seq_len(sequence),
    "first_held": lambda cache, sequence: cache.first_held(sequence),
    "block_table": lambda cache, sequence: cache.block_table(sequence),
    "publish_prefix": lambda cache, sequence: cache.publish_prefix(sequence, [1]),
    "begin_step": lambda cache, sequence: cache.begin_step([0, sequence], 1),
    "dequantize": lambda cache, sequence: cache.dequantize(0, sequence, *keys_and_values(1)),
}


@pytest.mark.parametrize("sequence", ["freed", 7, LARGEST])
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_an_unknown_sequence_is_named(verb, sequence) -> None:
    cache = make_cache("int8")
    filled(cache, NUM_TOKENS)
    freed = filled(cache, 5)
    cache.free(freed)
    unknown = freed if sequence == "freed" else sequence
    with refused(cache, UnknownSequenceError, unknown):
        verb(cache, unknown)


@pytest.mark.parametrize("layer", [1, 1000, LARGEST])
def test_a_layer_out_of_range_is_named(layer) -> None:
    with step_beside_a_neighbour() as (cache, step):
        k, v = keys_and_values(NUM_NEW, batch=2)
        for use in (
            lambda: step.append(layer, k, v),
            lambda: step.attend(layer, k, k, v),
            lambda: cache.dequantize(layer, 0, k.clone(), v.clone()),
        ):
            with refused(cache, ConfigError, layer, 1):
                use()


@pytest.mark.parametrize("length", [NUM_TOKENS + 1, LARGEST])
def test_a_rollback_too_far_names_the_tokens_of_the_sequence(length) -> None:
    cache = make_cache("int8")
    sequence = filled(cache, NUM_TOKENS)
    with refused(cache, RollbackError, length, f"0..{NUM_TOKENS}"):
        cache.truncate(sequence, length)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_new": 1, "mask": np.ones((2, 1), bool)}, ConfigError, ["num_new", "mask"]),
        ({}, ConfigError, ["num_new", "mask"]),
        ({"num_new": [1]}, ConfigError, [2, 1]),
        ({"num_new": [1, 2, 3]}, ConfigError, [2, 3]),
        ({"num_new": []}, ConfigError, [2, 0]),
        ({"mask": np.ones((3, 4), bool)}, ConfigError, [2, 3]),
        ({"mask": np.ones(2, bool)}, ShapeError, ["mask", "[2]"]),
        ({"mask": np.ones((2, 1, 1), bool)}, ShapeError, ["mask", "[2, 1, 1]"]),
        ({"mask": torch.ones(2, 4, dtype=torch.int64)}, DtypeError, ["mask", "bool", "int64"]),
        ({"mask": torch.ones(2, 4, dtype=torch.bool, device="meta")}, DeviceError, ["mask", "cpu", "meta"]),
        ({"mask": [[True], [True]]}, DtypeError, ["mask", "list"]),
        ({"num_new": LARGEST}, ConfigError, [LARGEST, NUM_TOKENS]),
    ],
    ids=str,
)
def test_rows_that_do_not_match_the_sequences_are_refused(arguments, error, words) -> None:
    cache = make_cache("int8")
    sequences = [filled(cache, NUM_TOKENS), filled(cache, 5)]
    with refused(cache, error, *words):
        cache.begin_step(sequences, **arguments)
    extend(cache, sequences[0], *keys_and_values(1))


def test_a_sequence_named_twice_is_refused() -> None:
    cache = make_cache("int8")
    one, two = filled(cache, NUM_TOKENS), filled(cache, 5)
    with refused(cache, ConfigError, f"sequence {two} ", "twice"):
        cache.begin_step([two, one, two], 1)


def test_publishing_needs_an_id_for_every_token() -> None:
    cache = make_cache("int8")
    sequence = filled(cache, NUM_TOKENS)
    with refused(cache, ConfigError, NUM_TOKENS, 19):
        cache.publish_prefix(sequence, list(range(19)))
    assert cache.seq_len(cache.match_prefix(list(range(20)))) == 0


@pytest.mark.parametrize(("start", "count"), [(0, NUM_TOKENS + 1), (NUM_TOKENS, 1), (15, 6), (LARGEST, 1)])
def test_only_tokens_of_the_sequence_can_be_read(start, count) -> None:
    cache = make_cache("int8")
    sequence = filled(cache, NUM_TOKENS)
    with refused(cache, ShapeError, start, f"0..{NUM_TOKENS}"):
        cache.dequantize(0, sequence, *keys_and_values(count), start=start)


def test_tokens_that_left_the_window_cannot_be_read() -> None:
    cache = make_cache("int8", window=4)
    sequence = filled(cache, 40)
    extend(cache, sequence, *keys_and_values(1))
    with refused(cache, ShapeError, "32..41", "from 31"):
        cache.dequantize(0, sequence, *keys_and_values(1), start=31)


@FORMATS
def test_tokens_of_an_open_step_cannot_be_read_before_their_layer_is_appended(format) -> None:
    cache = make_cache(format, num_layers=2, num_blocks=1)
    cache.free(filled(cache, 16))  # what must not be seen: the block's last owner
    sequence = cache.new_sequence()
    k, v = keys_and_values(4, 1)
    step = cache.begin_step([sequence], 4)
    step.append(0, k, v)
    assert distance(contents(cache, sequence, 0, pending=4)[0], k) <= 0.05
    with pytest.raises(ShapeError):
        cache.dequantize(1, sequence, k, v)
    step.abort()


# Numbers that no unsigned 64 bits hold

INTEGERS: dict[str, tuple[type[KvarnError], Callable[[PagedKvCache, int], object]]] = {
    "sequence": (ConfigError, lambda cache, x: cache.seq_len(x)),
    "sequences": (ConfigError, lambda cache, x: cache.begin_step([0, x], 1)),
    "length": (ConfigError, lambda cache, x: cache.truncate(0, x)),
    "num_new": (ConfigError, lambda cache, x: cache.begin_step([0], x)),
    "num_new of one": (ConfigError, lambda cache, x: cache.begin_step([0], [x])),
    "layer": (ConfigError, lambda cache, x: cache.dequantize(x, 0, *keys_and_values(1))),
    "start": (ConfigError, lambda cache, x: cache.dequantize(0, 0, *keys_and_values(1), start=x)),
    "num_blocks": (ConfigError, lambda _, x: PagedKvCache(**SETTINGS, num_blocks=x)),
    "head_dim": (ConfigError, lambda _, x: PagedKvCache(**{**SETTINGS, "head_dim": x})),
    "window": (ConfigError, lambda _, x: PagedKvCache(**SETTINGS, window=x)),
}


@pytest.mark.parametrize(("error", "use"), INTEGERS.values(), ids=INTEGERS)
def test_an_integer_out_of_range_is_a_config_error(error, use) -> None:
    cache = make_cache("int8")
    filled(cache, NUM_TOKENS)
    for value in (-1, 2**64):
        with refused(cache, error, value):
            use(cache, value)


@pytest.mark.parametrize("token_id", [-1, 2**32, 2**70])
def test_a_token_id_beyond_32_bits_is_refused(token_id) -> None:
    cache = make_cache("int8")
    sequence = filled(cache, 1)
    for use in (cache.match_prefix, lambda ids: cache.publish_prefix(sequence, ids)):
        with refused(cache, ConfigError, token_id):
            use([token_id])
