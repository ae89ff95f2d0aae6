"""Invalid tensors raise a typed error that names the tensor and the reason, and change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import kvarn_rs
from kvarn_rs import (
    ConfigError,
    DeviceError,
    DtypeError,
    KvarnError,
    NonFiniteError,
    OpenStepError,
    ShapeError,
    Step,
    StrideError,
    UnsupportedError,
)
from paged_reference import (
    HEAD_DIM,
    KV_HEADS,
    NUM_NEW,
    contents,
    distance,
    filled,
    keys_and_values,
    make_cache,
    normal,
    refused,
    same,
    step_beside_a_neighbour,
)

NUM_Q_HEADS = 4
# Two sequences of three new tokens each.
ROWS = 2 * NUM_NEW
GOOD = (2, KV_HEADS, NUM_NEW, HEAD_DIM)
GOOD_Q = (2, NUM_Q_HEADS, NUM_NEW, HEAD_DIM)
# Sums of a few products of unit normals, in another order than the reference.
FLOAT32_TOLERANCE = 1e-5


def zeros(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(shape, **options)


def read_only(*shape: int) -> Any:
    array = np.zeros(shape, np.float32)
    array.flags.writeable = False
    return array


# What is wrong with a tensor of the given shape, the error, and words of its message.
Case = tuple[Callable[..., Any], type[KvarnError], list[object]]
FLOATS = "float32, float16, bfloat16"
WRONG: dict[str, Case] = {
    "float64": (lambda *s: zeros(*s, dtype=torch.float64), DtypeError, [FLOATS, "float64"]),
    "int64": (lambda *s: zeros(*s, dtype=torch.int64), DtypeError, [FLOATS, "int64"]),
    "complex64": (lambda *s: zeros(*s, dtype=torch.complex64), DtypeError, [FLOATS, "complex64"]),
    "numpy float64": (lambda *s: np.zeros(s), DtypeError, [FLOATS, "f8"]),
    "big-endian": (lambda *s: np.zeros(s, ">f4"), DtypeError, [FLOATS, ">f4"]),
    "numpy objects": (lambda *s: np.zeros(s, object), DtypeError, [FLOATS, "|O"]),
    "a list": (lambda *s: zeros(*s).tolist(), DtypeError, ["list"]),
    "on another device": (lambda *s: zeros(*s, device="meta"), DeviceError, ["cpu", "meta"]),
    "three dimensions": (lambda *s: zeros(*s[1:]), ShapeError, ["[B, heads, T, head_dim]", HEAD_DIM]),
    "five dimensions": (lambda *s: zeros(1, *s), ShapeError, ["[B, heads, T, head_dim]", HEAD_DIM]),
    "a channel too many": (lambda *s: zeros(*s[:3], 17), ShapeError, [f"T, {HEAD_DIM}]", "17]"]),
    "no channels": (lambda *s: zeros(*s[:3], 0), ShapeError, [f"T, {HEAD_DIM}]", ", 0]"]),
    "a row too many": (lambda *s: zeros(s[0], s[1], 4, s[3]), ShapeError, [f"{ROWS} rows", "4, 16]"]),
    "no rows": (lambda *s: zeros(0, *s[1:]), ShapeError, [f"{ROWS} rows", "[0, "]),
    "channels apart": (
        lambda *s: zeros(*s[:3], 2 * s[3])[..., ::2],
        StrideError,
        [", 2]"],
    ),
    "one channel for all": (lambda *s: zeros(*s[:3], 1).expand(s), StrideError, [", 0]"]),
    "channels backwards": (lambda *s: np.zeros(s, np.float32)[..., ::-1], StrideError, [", -1]"]),
    "between addresses": (
        lambda *s: np.zeros(4 * math.prod(s) + 1, np.uint8)[1:].view(np.float32).reshape(s),
        UnsupportedError,
        ["float32", "no multiple of 4"],
    ),
    "between elements": (
        lambda *s: np.zeros(s, np.dtype([("pad", "u1"), ("x", "<f4")]))["x"],
        StrideError,
        [", 5]"],
    ),
}
# Only where it is written to.
WRONG_OUT: dict[str, Case] = {
    "read-only": (read_only, ConfigError, ["read-only"]),
    "one sequence for both": (lambda *s: zeros(1, *s[1:]).expand(s), StrideError, ["[0, "]),
    "one head for all": (lambda *s: zeros(s[0], 1, *s[2:]).expand(s), StrideError, [", 0, "]),
    "overlapping tokens": (
        lambda *s: zeros(10_000).as_strided(s, (1000, 100, 8, 1)),
        StrideError,
        ["[1000, 100, 8, 1]"],
    ),
}


def cases(wrong: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("make", "error", "words"), wrong.values(), ids=wrong)


@cases(WRONG)
@pytest.mark.parametrize("name", ["k", "v"])
def test_keys_and_values_are_checked_before_anything_is_written(name, make, error, words) -> None:
    with step_beside_a_neighbour() as (cache, step):
        tensors = {"k": zeros(*GOOD), "v": zeros(*GOOD), name: make(*GOOD)}
        with refused(cache, error, f"{name}:", *words):
            step.append(0, **tensors)
        with pytest.raises(OpenStepError):
            step.attend(0, zeros(*GOOD_Q), None, None)


@pytest.mark.parametrize("heads", [1, 3, 0])
def test_keys_of_another_number_of_heads_are_refused(heads) -> None:
    with step_beside_a_neighbour() as (cache, step), refused(cache, ShapeError, "k", KV_HEADS, f"[2, {heads}, "):
        step.append(0, zeros(2, heads, NUM_NEW, HEAD_DIM), zeros(*GOOD))


def attendable(step: Step) -> torch.Tensor:
    """Appends good keys and values, so that attention is possible; gives queries."""
    step.append(0, *keys_and_values(NUM_NEW, 2, batch=2))
    return normal(*GOOD_Q)


@cases(WRONG)
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_attention_checks_its_tensors(name, make, error, words) -> None:
    with step_beside_a_neighbour() as (cache, step):
        q = attendable(step)
        out = torch.full(GOOD_Q, 7.0)
        tensors: dict[str, Any] = {"q": q, "k": zeros(*GOOD), "v": zeros(*GOOD), "out": out}
        tensors[name] = make(*(GOOD_Q if name in ("q", "out") else GOOD))
        with refused(cache, error, f"{name}:", *words):
            step.attend(0, **tensors)
        assert (out == 7).all()


@cases(WRONG_OUT)
def test_attention_writes_only_where_it_may(make, error, words) -> None:
    with step_beside_a_neighbour() as (cache, step):
        q, out = attendable(step), make(*GOOD_Q)
        with refused(cache, error, "out:", *words):
            step.attend(0, q, None, None, out)
        assert (out == 0).all()


@cases({**{name: case for name, case in WRONG.items() if "row" not in name}, **WRONG_OUT})
@pytest.mark.parametrize("name", ["k", "v"])
def test_dequantizing_checks_where_it_writes(name, make, error, words) -> None:
    cache = make_cache("int8")
    sequence = filled(cache, ROWS)
    tensors = {"k": torch.full(GOOD, 7.0), "v": torch.full(GOOD, 7.0), name: make(*GOOD)}
    with refused(cache, error, f"{name}:", *words):
        cache.dequantize(0, sequence, **tensors)
    assert (tensors["v" if name == "k" else "k"] == 7).all()


def test_overlapping_outputs_are_named_in_the_error() -> None:
    with step_beside_a_neighbour() as (_, step):
        q = attendable(step)
        with pytest.raises(StrideError, match="overlap"):
            step.attend(0, q, None, None, zeros(1, *GOOD_Q[1:]).expand(GOOD_Q))


def test_dequantizing_takes_two_tensors() -> None:
    cache = make_cache("int8")
    sequence, both = filled(cache, ROWS), zeros(*GOOD)
    with refused(cache, StrideError, "k", "v"):
        cache.dequantize(0, sequence, both, both)


@pytest.mark.parametrize("num_new", [NUM_NEW, 40])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_out_that_overlaps_an_argument_is_refused_or_correct(name, num_new) -> None:
    cache = make_cache("int8")
    sequences = [filled(cache, 20), filled(cache, 5, 1)]
    k, v = keys_and_values(num_new, 2, batch=2)
    tensors: dict[str, Any] = {"q": normal(*k.shape), "k": k, "v": v}
    memory = zeros(3, *k.shape[1:])
    memory[:2] = tensors[name]
    with cache.begin_step(sequences, num_new) as step:
        step.append(0, k, v)
        expected = step.attend(0, **tensors)
        try:
            out = step.attend(0, **{**tensors, name: memory[:2]}, out=memory[1:])
        except KvarnError:
            return
        assert distance(out, expected) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", ["q", "k", "out", "sinks"])
def test_a_tensor_without_strides_is_a_kvarn_error(name) -> None:
    with step_beside_a_neighbour() as (cache, step):
        q = attendable(step)
        tensors: dict[str, Any] = {
            "q": q,
            "k": zeros(*GOOD),
            "v": zeros(*GOOD),
            "out": zeros(*GOOD_Q),
            "sinks": zeros(NUM_Q_HEADS),
        }
        with refused(cache, UnsupportedError, name):
            step.attend(0, **{**tensors, name: tensors[name].to_sparse()})


def test_read_only_arrays_can_be_read() -> None:
    with step_beside_a_neighbour() as (_, step):
        k, q = read_only(*GOOD), read_only(*GOOD_Q)
        step.append(0, k, k)
        assert np.array_equal(step.attend(0, q, k, k), step.attend(0, q.copy(), k.copy(), k.copy()))


def test_a_lazily_negated_view_is_refused_or_read_negated() -> None:
    """Torch negates the imaginary part of a conjugate by a flag; in memory it has the other sign."""
    sinks = torch.complex(torch.zeros(NUM_Q_HEADS), torch.arange(4.0)).conj().imag
    assert sinks.is_neg()
    with step_beside_a_neighbour() as (_, step):
        q = attendable(step)
        expected = step.attend(0, q, None, None, sinks=sinks.clone())
        try:
            out = step.attend(0, q, None, None, sinks=sinks)
        except KvarnError:
            return
        assert torch.equal(out, expected)


# Values


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("format", kvarn_rs.FORMATS)
@pytest.mark.parametrize(("row", "head", "channel"), [(0, 0, 0), (4, 1, 7), (5, 1, HEAD_DIM - 1)])
def test_a_non_finite_value_is_named_and_its_layer_is_not_appended(format, name, bad, row, head, channel):
    with step_beside_a_neighbour(format) as (cache, step):
        k, v = keys_and_values(NUM_NEW, 3, batch=2)
        {"k": k, "v": v}[name][row // NUM_NEW, head, row % NUM_NEW, channel] = bad
        with refused(cache, NonFiniteError, f"{name}:", f"row {row}", f"head {head}", f"channel {channel}"):
            step.append(0, k, v)
        with pytest.raises(OpenStepError, match=r"\[0\]"):
            step.commit()
        with pytest.raises(OpenStepError, match=r"\[0\]"):
            step.attend(0, normal(*GOOD_Q), None, None)


def test_a_refused_append_keeps_the_previous_append() -> None:
    cache = make_cache("int8")
    sequence = cache.new_sequence()
    k, v = keys_and_values(40)
    with cache.begin_step([sequence], 40) as step:
        step.append(0, k, v)
        held = contents(cache, sequence, pending=40)
        worse = v + 1
        worse[0, 1, 39, 3] = torch.nan
        with pytest.raises(NonFiniteError, match="row 39, head 1, channel 3"):
            step.append(0, k + 1, worse)
        assert same(contents(cache, sequence, pending=40), held)
    assert same(contents(cache, sequence), held)


def test_a_value_beyond_float16_is_found_in_a_large_step_too() -> None:
    """Large steps are checked by several threads."""
    cache = make_cache("int8", head_dim=64)
    k = normal(1, KV_HEADS, 2000, 64).half()
    v = k.clone()
    v[0, 1, 1234, 56] = 1e5  # infinity
    with cache.begin_step([cache.new_sequence()], 2000) as step:
        with refused(cache, NonFiniteError, "v:", "row 1234", "head 1", "channel 56"):
            step.append(0, k, v)
        step.append(0, k, k)


@pytest.mark.parametrize(("pages", "given"), [("float32", "float16"), ("float16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("name", ["k", "v"])
def test_raw_pages_accept_only_their_own_dtype(pages, given, name) -> None:
    with step_beside_a_neighbour("raw", dtype=pages) as (cache, step):
        tensors = {key: zeros(*GOOD, dtype=getattr(torch, pages)) for key in "kv"}
        tensors[name] = tensors[name].to(getattr(torch, given))
        with refused(cache, DtypeError, f"{name}:", pages, given):
            step.append(0, **tensors)


# Options of attention


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"softcap": 0.0}, ConfigError, ["softcap", "positive", "0"]),
        ({"softcap": -2.5}, ConfigError, ["softcap", "positive", "-2.5"]),
        ({"softcap": float("nan")}, ConfigError, ["softcap", "positive", "NaN"]),
        ({"scale": float("nan")}, ConfigError, ["scale", "finite"]),
        ({"scale": float("inf")}, ConfigError, ["scale", "finite"]),
        ({"window": 0}, ConfigError, ["window", "at least 1"]),
        ({"sinks": zeros(NUM_Q_HEADS - 1)}, ShapeError, ["sinks", NUM_Q_HEADS, NUM_Q_HEADS - 1]),
        ({"sinks": zeros(1)}, ShapeError, ["sinks", NUM_Q_HEADS, 1]),
        ({"sinks": zeros(NUM_Q_HEADS, 1)}, ShapeError, ["sinks", "[4, 1]"]),
        ({"sinks": zeros(NUM_Q_HEADS, dtype=torch.float64)}, DtypeError, ["sinks", "float64"]),
        ({"sinks": zeros(NUM_Q_HEADS, device="meta")}, DeviceError, ["sinks", "meta"]),
        ({"sinks": zeros(NUM_Q_HEADS) / 0}, ConfigError, ["sinks", "NaN"]),
        ({"k": zeros(*GOOD)}, ConfigError, ["k", "v", "both"]),
        ({"v": zeros(*GOOD)}, ConfigError, ["k", "v", "both"]),
        ({"q": zeros(2, 3, NUM_NEW, HEAD_DIM)}, ShapeError, ["q", "multiple of 2", "[2, 3, 3, 16]"]),
        ({"q": zeros(2, 0, NUM_NEW, HEAD_DIM)}, ShapeError, ["q", "multiple of 2", "[2, 0, 3, 16]"]),
        ({"out": zeros(*GOOD)}, ShapeError, ["out", NUM_Q_HEADS, KV_HEADS]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_invalid_option_is_named(options, error, words) -> None:
    with step_beside_a_neighbour() as (cache, step):
        q, out = attendable(step), torch.full(GOOD_Q, 7.0)
        with refused(cache, error, *words):
            step.attend(0, **{"q": q, "k": None, "v": None, "out": out, **options})
        assert (out == 7).all()


@pytest.mark.parametrize("name", ["k", "v", "q", "out"])
def test_a_tensor_whose_storage_was_freed_is_refused(name) -> None:
    with step_beside_a_neighbour() as (cache, step):
        q = attendable(step)
        tensors: dict[str, Any] = {"q": q, "k": zeros(*GOOD), "v": zeros(*GOOD), "out": zeros(*GOOD_Q)}
        for kept_bytes in (0, 4):
            tensors[name] = zeros(*tensors[name].shape)
            tensors[name].untyped_storage().resize_(kept_bytes)
            with refused(cache, UnsupportedError, f"{name}:", f"storage of {kept_bytes} bytes"):
                step.attend(0, **tensors)


def test_a_fake_tensor_is_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with step_beside_a_neighbour() as (_, step):
        with FakeTensorMode():
            fake = torch.zeros(*GOOD)
        with pytest.raises(KvarnError, match="k"):
            step.append(0, fake, zeros(*GOOD))
