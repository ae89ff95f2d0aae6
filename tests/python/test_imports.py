"""The imports of the package's files: no cycles, and private names of other libraries in files for that."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvarn_rs
from import_graph import circles, graph_of, read_package

PACKAGE = Path(kvarn_rs.__file__).parent
COMPAT = ("kvarn_rs.hf.compat:", "kvarn_rs.vllm.compat:", "kvarn_rs.vllm.compat_metrics:")
# Not an attribute of a library that changes under us: `sys._current_frames`, which the Python manual describes.
DOCUMENTED = {"_current_frames"}


def test_no_file_is_in_an_import_cycle() -> None:
    modules = read_package(PACKAGE)
    assert len(modules) > 30, "the package was not found"
    assert circles(graph_of(modules)) == []


def test_files_use_only_private_attributes_that_they_define() -> None:
    modules = read_package(PACKAGE)
    found = [f"{name}:{line}: {attribute}" for name, text in modules.items() for line, attribute in _foreign(text)]
    assert [each for each in found if not each.startswith(COMPAT)] == []
    for file in COMPAT:
        assert any(each.startswith(file) for each in found), "the checker finds nothing at all"


def _foreign(text: str) -> Iterator[tuple[int, str]]:
    """Private attributes that a file reads or sets, and that nothing in it defines."""
    nodes = list(ast.walk(ast.parse(text)))
    defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    on_self = [node for node in nodes if isinstance(node, ast.Attribute) and _is_self(node.value)]
    defined |= {node.attr for node in on_self if isinstance(node.ctx, ast.Store)}
    for node in nodes:
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        if node.attr not in defined | DOCUMENTED:
            yield node.lineno, node.attr


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch\ntorch._C.f()", ["_C"]),
        ("def f(config):\n    config._attn = 1", ["_attn"]),
        ("class A:\n    def f(self, other):\n        self._x = 1\n        return other._x", []),
        ("class A:\n    _x: int\n    def f(self):\n        return self._g()\n    def _g(self): ...", []),
        ("class A:\n    def f(self):\n        return self._inherited", ["_inherited"]),
        ("x.__dict__", []),
    ],
)
def test_the_checker_finds_private_attributes_of_others(text: str, expected: list[str]) -> None:
    assert [attribute for _, attribute in _foreign(text)] == expected


@pytest.mark.parametrize(
    "modules",
    [
        {"p.a": "from .b import x", "p.b": "from p import a"},
        {"p.a": "from . import b", "p.b": "import p.a"},
        {"p.a": "def f():\n    from .b import x", "p.b": "class C:\n    from .a import y"},
        {
            "p.a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import X",
            "p.b": "from .a import y",
        },
        {"p.a": "from .q import b", "p.q.__init__": "", "p.q.b": "from ..a import x"},
        {"p.a": "from .q import x", "p.q.__init__": "from .. import a"},
        {"p.a": "from .c import x", "p.b": "from .a import x", "p.c": "try:\n    from .b import x\nfinally:\n    pass"},
    ],
    ids=["from", "import", "in functions", "for types", "a package's module", "a package", "three"],
)
def test_the_checker_finds_a_circle(modules: dict[str, str]) -> None:
    (circle,) = circles(graph_of(modules))
    assert set(circle) == {name for name, text in modules.items() if text}


def test_the_checker_separates_cycles() -> None:
    graph = {"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"c"}, "e": {"a"}, "f": set()}
    assert circles(graph) == [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize(
    "modules",
    [
        {"p.a": "from .b import x\nfrom .c import y", "p.b": "from .c import y", "p.c": "import os"},
        {"p.__init__": "from .a import x", "p.a": "from .b import y", "p.b": ""},
        {"p.a": "import other.b\nfrom other import b", "p.b": "from .a import x"},
        {"p.q.a": "from .b import x", "p.q.b": "from ..b import y", "p.b": ""},
    ],
    ids=["a diamond", "an __init__", "a namesake elsewhere", "a namesake above"],
)
def test_the_checker_accepts_valid_modules(modules: dict[str, str]) -> None:
    assert circles(graph_of(modules)) == []
