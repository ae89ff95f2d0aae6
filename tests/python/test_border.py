"""Property tests of tensor arguments: numpy and torch views of the same memory give the same bytes or the same error.

A *view* is a dtype, a shape, strides and an offset into some memory; it stands for one argument of a step whose others
are good. What is taken must be what a contiguous copy of it comes to, and what can be taken is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from kvarn_rs import KvarnError, PagedKvCache

NUM_SEQUENCES, NUM_NEW, HEAD_DIM = 2, 2, 16
HEADS = {"k": 2, "v": 2, "q": 4, "out": 4}
ROWS = NUM_SEQUENCES * NUM_NEW
FLOATS = {"float32": np.float32, "float16": np.float16}
OTHERS = {"float64": np.float64, "int8": np.int8, "bool": np.bool_, "complex64": np.complex64}


@dataclass
class View:
    """Where a tensor's elements are; strides and offset in elements."""

    role: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    margin: int
    memory: np.ndarray

    @staticmethod
    def of(role: str, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], margin: int, seed: int) -> View:
        """Memory for every element, and a margin before and after them."""
        reach = sum((n - 1) * abs(stride) for n, stride in zip(shape, strides, strict=True) if n > 1)
        values = np.random.default_rng(seed).normal(size=2 * margin + reach + 1)
        return View(role, dtype, shape, strides, margin, values.astype({**FLOATS, **OTHERS}[dtype]))

    @property
    def offset(self) -> int:
        """Of the first element: strides below 0 reach back from it."""
        pairs = zip(self.shape, self.strides, strict=True)
        return self.margin + sum((n - 1) * -stride for n, stride in pairs if stride < 0 and n > 1)

    def array(self, memory: np.ndarray) -> np.ndarray:
        """The view in `memory`, by numpy."""
        return as_strided(memory[self.offset :], self.shape, [stride * memory.itemsize for stride in self.strides])

    def tensor(self, memory: np.ndarray) -> torch.Tensor:
        """The same by torch, which has no strides below 0."""
        return torch.as_strided(torch.from_numpy(memory), self.shape, self.strides, self.offset)

    def elements(self) -> np.ndarray:
        """The places of its elements in the memory."""
        return self.array(np.arange(len(self.memory)))

    def is_good(self, format: str) -> bool:
        """Is it one that a step takes?"""
        if self.dtype not in (["float32"] if format == "raw" and self.role in "kv" else FLOATS):
            return False
        if len(self.shape) != 4 or self.shape[1::2] != (HEADS[self.role], HEAD_DIM):
            return False
        return self.shape[0] * self.shape[2] == ROWS and self.strides[3] == 1


@st.composite
def views(draw: st.DrawFn) -> View:
    role = draw(st.sampled_from(list(HEADS)))
    dtype = draw(st.sampled_from(["float32"] * 6 + ["float16"] * 3 + list(OTHERS)))
    rows = draw(st.sampled_from([(NUM_SEQUENCES, NUM_NEW), (1, ROWS), (ROWS, 1)]))
    shape = [rows[0], HEADS[role], rows[1], HEAD_DIM]
    match draw(st.integers(0, 9)):
        case 0:
            shape[draw(st.integers(0, 3))] = draw(st.integers(0, 5))
        case 1:
            shape = draw(st.lists(st.integers(0, 5), max_size=5))
    # Dimensions in any order in memory, and room between their elements.
    strides, step = [0] * len(shape), 1
    order = draw(st.permutations(range(len(shape)))) if draw(st.integers(0, 9)) == 0 else list(range(len(shape)))[::-1]
    inner, *outer = order or [0]
    for dimension in [inner, *draw(st.permutations(outer))] if shape else []:
        strides[dimension] = step
        step *= max(1, shape[dimension])
        step += draw(st.sampled_from([0, 0, 1, 3, HEAD_DIM]))
    match draw(st.integers(0, 9)):
        case 0 if shape:
            strides[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 40))
        case 1 if shape:
            dimension = draw(st.integers(0, len(shape) - 1))
            strides[dimension] = -strides[dimension]
    return View.of(role, dtype, tuple(shape), tuple(strides), draw(st.integers(0, 5)), draw(st.integers(0, 9)))


@dataclass
class Outcome:
    """What came of a step: an error, or the bytes of the cache and of attention's result."""

    error: type | None
    cache: bytes
    out: bytes = b""


def good(role: str) -> Any:
    return np.random.default_rng(len(role)).normal(size=(NUM_SEQUENCES, HEADS[role], NUM_NEW, HEAD_DIM)).astype("f4")


def outcome(role: str, given: Any, format: str) -> Outcome:
    """Of a step whose `role` is `given`; where that is refused, nothing may have changed."""
    cache = PagedKvCache(num_layers=1, num_kv_heads=HEADS["k"], head_dim=HEAD_DIM, block_size=16, format=format)
    sequences = [cache.new_sequence() for _ in range(NUM_SEQUENCES)]
    before = cache.to_bytes()
    arguments = {name: good(name) for name in HEADS} | {role: given}
    k, v, q, out = (arguments[name] for name in HEADS)
    step = cache.begin_step(sequences, NUM_NEW)
    try:
        step.append(0, k, v)
        step.attend(0, q, None, None, out)
    except KvarnError as error:
        if role in "kv":
            assert step.is_open
        step.abort()
        assert cache.to_bytes() == before
        return Outcome(type(error), before)
    step.commit()
    return Outcome(
        None, cache.to_bytes(), torch.as_tensor(out.copy() if hasattr(out, "copy") else out).numpy().tobytes()
    )


@settings(max_examples=200, deadline=None)
@given(views(), st.sampled_from(["raw", "int8", "int4"]))
def test_a_view_gives_the_bytes_of_its_contiguous_copy_in_numpy_and_torch(view, format) -> None:
    shape_fits, overlaps = view.is_good(format), len(np.unique(view.elements())) < math.prod(view.shape)
    expected = None
    if shape_fits and not (view.role == "out" and overlaps):
        # What a contiguous copy comes to.
        expected = outcome(view.role, np.ascontiguousarray(view.array(view.memory)), format)
        assert expected.error is None
    memories = {"numpy": view.memory.copy()}
    if all(stride >= 0 for stride in view.strides):
        memories["torch"] = view.memory.copy()
    outcomes = {
        name: outcome(view.role, (view.array if name == "numpy" else view.tensor)(memory), format)
        for name, memory in memories.items()
    }
    # numpy forgets the strides of a view without elements: of two faults, it has one.
    kinds = {found.error and (found.error if view.elements().size else KvarnError) for found in outcomes.values()}
    assert len(kinds) == len({(found.cache, found.out) for found in outcomes.values()}) == 1, outcomes
    found = outcomes["numpy"]
    if expected is None:
        assert found.error is not None, view
    elif found.error is None:
        assert found == expected
    else:
        # Elements of which none is another's, but which the check by ranges cannot tell apart.
        assert view.role == "out", (view, found.error)
    for memory in memories.values():
        beside = np.ones(len(memory), bool)
        if view.role == "out" and found.error is None:
            beside[view.elements()] = False
        assert np.array_equal(memory[beside], view.memory[beside]), "what is not the view's is as it was"


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(list(HEADS)), st.sampled_from(list(FLOATS)), st.integers(0, 4))
def test_a_misaligned_element_is_refused(role, dtype, shift) -> None:
    shape = (NUM_SEQUENCES, HEADS[role], NUM_NEW, HEAD_DIM)
    item = np.dtype(dtype).itemsize
    memory = np.zeros(math.prod(shape) * item + 4 + item, np.uint8)
    memory = memory[-memory.ctypes.data % item :]
    array = memory[shift:][: math.prod(shape) * item].view(dtype).reshape(shape)
    found = outcome(role, array, "int8")
    assert (found.error is None) == (shift % item == 0)


@settings(max_examples=50, deadline=None)
@given(views().filter(lambda view: all(stride >= 0 for stride in view.strides) and view.dtype == "float32"))
def test_a_bfloat16_view_gives_the_bytes_of_its_values_in_float32(view) -> None:
    memory = torch.from_numpy(view.memory.copy()).bfloat16()
    narrow = torch.as_strided(memory, view.shape, view.strides, view.offset)
    wide = torch.as_strided(memory.float(), view.shape, view.strides, view.offset)
    if view.role != "out":
        assert outcome(view.role, narrow, "int8") == outcome(view.role, wide, "int8")
