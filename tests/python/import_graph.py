"""The import graph of a Python package, and its cycles."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path


def read_package(folder: Path) -> dict[str, str]:
    """The text of every module of a package, by its dotted name; a package itself is `package.__init__`."""
    files = sorted(folder.rglob("*.py"))
    return {".".join(file.relative_to(folder.parent).with_suffix("").parts): file.read_text("utf-8") for file in files}


def graph_of(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules that each one imports, out of those given.

    Every import counts, wherever it stands: one within a function only puts a circle off, and one under `TYPE_CHECKING`
    says that a file cannot be understood without the other. Importing `a.b.c` also runs `a.__init__` and
    `a.b.__init__`; that is left out, since every module of a package would be in a circle with it.
    """
    return {name: set(_imported(name, text, modules)) - {name} for name, text in modules.items()}


def _imported(name: str, text: str, modules: Mapping[str, str]) -> Iterator[str]:
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (found for alias in node.names if (found := _module(alias.name, modules)))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                found = _module(f"{parent}.{alias.name}", modules) or _module(parent, modules)
                if found:
                    yield found


def _module(name: str, modules: Mapping[str, str]) -> str | None:
    return next((found for found in (name, f"{name}.__init__") if found in modules), None)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of two or more modules that import each other, directly or by others; each sorted."""
    reached = {module: _reachable(module, graph) for module in graph}
    groups = {frozenset(other for other in reached[module] if module in reached[other]) for module in graph}
    return sorted(sorted(group) for group in groups if group)


def _reachable(start: str, graph: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    queue = list(graph[start])
    while queue:
        module = queue.pop()
        if module not in found:
            found.add(module)
            queue += graph[module]
    return found
