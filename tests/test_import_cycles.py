"""No module imports itself through others; imports in functions and for types alone count too."""

from __future__ import annotations

import ast
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Graph = Mapping[str, set[str]]

PACKAGES = (
    "mha_spec",
    "mha_spec_conformance",
    "mha_spec_jax",
    "mha_spec_numpy",
    "mha_spec_tensorflow",
    "mha_spec_torch",
)


def _modules(package: str) -> dict[str, Path]:
    """Return the modules of a package by their dotted names."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    return {_name(package, path.relative_to(root)): path for path in root.rglob("*.py")}


def _name(package: str, path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def _imports(name: str, path: Path) -> Iterator[tuple[str, str | None]]:
    """Yield the (module, attribute) pairs that a module imports, in functions too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((module, alias.name) for alias in node.names)


def _graph(package: str) -> dict[str, set[str]]:
    """Return the modules of the package that each module imports."""
    modules = _modules(package)
    return {
        name: {
            target
            for module, attribute in _imports(name, path)
            if (target := f"{module}.{attribute}" if f"{module}.{attribute}" in modules else module) in modules
        }
        for name, path in modules.items()
    }


def _reachable(graph: Graph, start: str) -> set[str]:
    """Return the modules that `start` imports, also through others; a cycle contains `start`."""
    reached: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += graph[name]
    return reached


def _cyclic(graph: Graph) -> list[str]:
    return sorted(name for name in graph if name in _reachable(graph, name))


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_each_other_in_no_cycle(package: str) -> None:
    graph = _graph(package)
    assert sum(map(len, graph.values())) > len(graph)
    assert _cyclic(graph) == []


def test_a_cycle_is_noticed() -> None:
    assert _cyclic({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]
