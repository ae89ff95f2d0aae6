"""The typed dictionaries of `_core.pyi` against the keys and types of the dictionaries that the core returns."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest

import kvarn_rs
from kvarn_rs import _core

STUB = Path(kvarn_rs.__file__).with_name("_core.pyi")
SETTINGS: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 16, "block_size": 16, "window": 64}
NUM_TOKENS = 160
"""More than a layer must have seen to be calibrated, more than the window, and some blocks that seal."""


def declared() -> dict[str, dict[str, Any]]:
    """The typed dictionaries of the stub: of each, the types by key."""
    tree = ast.parse(STUB.read_text())
    aliases = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript)]
    classes = [
        node for node in tree.body if isinstance(node, ast.ClassDef) and "TypedDict" in map(ast.unparse, node.bases)
    ]
    names: dict[str, Any] = {"TypedDict": TypedDict, "Literal": Literal, "type_check_only": lambda cls: cls}
    code = compile(ast.Module([*aliases, *classes], []), STUB.name, "exec", dont_inherit=True)
    exec(code, names)
    return {node.name: get_type_hints(names[node.name]) for node in classes}


def given(tmp_path: Path) -> dict[str, list[Any]]:
    """What the core gives for each of them: with every optional value, and with none."""
    calibration = kvarn_rs.Calibration()
    empty = kvarn_rs.PagedKvCache(**{**SETTINGS, "window": None})
    filled = kvarn_rs.PagedKvCache(**SETTINGS, num_blocks=64, num_open_pages=8, calibration=calibration)
    sequence = filled.new_sequence()
    random = np.random.default_rng(0)
    learning: list[Any] = []
    for num_new in (1, NUM_TOKENS):
        step = filled.begin_step([sequence], num_new)
        q, k, v = random.normal(size=(3, 1, 1, num_new, 16)).astype(np.float32)
        for layer in range(SETTINGS["num_layers"]):
            step.append(layer, k, v, q)
        learning += calibration.layers()
        step.commit()
    calibration.freeze()
    _core.save_caches(tmp_path / "caches", [empty, filled])
    return {
        "LayerSummary": [*learning, *calibration.layers()],
        "CacheStats": [empty.stats(), filled.stats()],
        "EngineStats": engine_stats(),
        "CacheSummary": _core.inspect_caches(tmp_path / "caches")[0],
        "Capacity": [_core.capacity("int4", [(2, 1, 16, None)], 16, 100, 10**6)],
    }


def engine_stats() -> list[Any]:
    """Of an engine that is empty, and of one that has sealed a block."""
    page, tile = (np.zeros((8, 1, _core.block_bytes(format, 16, 16)), np.uint8) for format in ("int8", "int4"))
    engine = kvarn_rs.Engine(num_kv_heads=1, head_dim=16, block_size=16, pages=[page], tiles=[tile])
    stats: list[Any] = [engine.stats()]
    engine.begin(*(np.array(values, np.int32) for values in ([[0, 1, 2]], [0], [0, 40])))
    engine.append(0, *np.ones((2, 40, 1, 16), np.float32))
    engine.commit()
    return [*stats, engine.stats()]


def accepts(type_: Any, value: object) -> bool:
    """Is a value of the type that a stub says? Of what these stubs say."""
    arguments = get_args(type_)
    match get_origin(type_):
        case None:
            return type(value) is type_
        case origin if origin is Literal:
            return value in arguments
        case origin if origin is list:
            return isinstance(value, list) and all(accepts(arguments[0], item) for item in value)
        case origin if origin is tuple:
            return isinstance(value, tuple) and all(map(accepts, arguments, value)) and len(arguments) == len(value)
        case origin if origin is Union or type_.__class__.__name__ == "UnionType":
            return any(accepts(argument, value) for argument in arguments)
    raise AssertionError(f"a kind of type that this test does not know: {type_}")


def mends(name: str, types: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    """What to change in the stub, a line each."""
    out = []
    for key in {key: None for one in found for key in one}:
        values = [one[key] for one in found if key in one]
        if key not in types:
            out.append(f"{name}: add `{key}: {' | '.join(sorted({type(value).__name__ for value in values}))}`")
        elif wrong := [value for value in values if not accepts(types[key], value)]:
            out.append(f"{name}: `{key}: {types[key]}` does not take {wrong[0]!r}")
    out += [f"{name}: remove `{key}`" for key in types if any(key not in one for one in found)]
    return out


def test_the_stub_s_dictionaries_are_those_of_the_core(tmp_path) -> None:
    types, found = declared(), given(tmp_path)
    assert types.keys() == found.keys(), "a typed dictionary that this test does not know"
    wrong = [line for name in types for line in mends(name, types[name], found[name])]
    assert not wrong, f"mend {STUB.name}:\n  " + "\n  ".join(wrong)


def test_every_optional_value_is_seen_with_and_without(tmp_path) -> None:
    types, found = declared(), given(tmp_path)
    for name, hints in types.items():
        for key, type_ in hints.items():
            if type(None) in get_args(type_):
                kinds = {one[key] is None for one in found[name]}
                assert kinds == {True, False}, f"{name}: {key} was {[one[key] for one in found[name]]}"


@pytest.mark.parametrize(
    ("found", "mend"),
    [
        ({"a": 1, "c": "x"}, "D: add `c: str`"),
        ({}, "D: remove `a`"),
        ({"a": 1.0}, "D: `a: <class 'int'>` does not take 1.0"),
    ],
)
def test_a_difference_is_reported_with_its_fix(found, mend) -> None:
    assert mend in mends("D", {"a": int}, [found])
