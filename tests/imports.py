"""Which modules of afd import which, wherever in a file they do so, and those that import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def modules() -> dict[str, Path]:
    """The files of afd, by module."""
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in sorted((ROOT / "afd").rglob("*.py"))}
    return {".".join(one[:-1] if one[-1] == "__init__" else one): path for path, one in parts.items()}


def imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """What a file imports of `known`, in functions and for type checkers, too: the module that a name lies in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name != "afd._C" and (name in known or node.module in known):  # the compiled one imports nothing
                    yield name if name in known else str(node.module)


def cycles() -> list[list[str]]:
    """Sets of modules each of which imports all others of its set, if not directly (Tarjan 1972)."""
    known = modules()
    graph = {module: sorted({*imported(path, known)} - {module}) for module, path in known.items()}
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in graph[module]:
            if other not in number:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], number[other])
        if low[module] == number[module]:
            first = stack.index(module)
            if len(stack) - first > 1:
                found.append(sorted(stack[first:]))
            del stack[first:]

    for module in graph:
        if module not in number:
            visit(module)
    return found
