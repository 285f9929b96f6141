"""Who imports whom, read from the source: every import counts, also inside functions and under TYPE_CHECKING."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

#: Module -> the modules that it imports, among those of the same graph.
Graph = dict[str, set[str]]


def modules(root: Path, *packages: str) -> dict[str, Path]:
    """Return the file of every module of these packages, by its dotted name. A package is named as its ``__init__``."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph(root: Path, *packages: str) -> Graph:
    """Return the import graph of these packages, which are folders of `root`.

    ``from a import b`` is an import of the module ``a.b`` if there is one, else of ``a``. That Python runs the
    ``__init__`` of every enclosing package first is not an edge: otherwise every package would import itself.
    """
    files = modules(root, *packages)
    return {name: {target for target in _imports(name, path, files) if target != name} for name, path in files.items()}


def _imports(name: str, path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    enclosing = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module(alias.name, files)
        elif isinstance(node, ast.ImportFrom):
            begin = enclosing[: len(enclosing) - node.level + 1] if node.level else []
            source = ".".join([*begin, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield from _module(inner if inner in files else source, files)


def _module(name: str, files: Mapping[str, Path]) -> Iterator[str]:
    if name in files:
        yield name


def cycles(graph: Graph) -> list[list[str]]:
    """Return a shortest cycle of every strongly connected component that has one: each module imports the next."""
    return [_shortest_cycle(graph, component) for component in _components(graph) if len(component) > 1]


def _components(graph: Graph) -> list[set[str]]:
    """Return the strongly connected components (Kosaraju: depth first forwards, then backwards in the reverse order)."""
    order: list[str] = []
    seen: set[str] = set()
    for start in graph:
        stack = [] if start in seen else [(start, iter(sorted(graph[start])))]
        seen.add(start)
        while stack:
            module, rest = stack[-1]
            following = next((target for target in rest if target not in seen), None)
            if following is None:
                order.append(stack.pop()[0])
            else:
                seen.add(following)
                stack.append((following, iter(sorted(graph[following]))))
    importers: Graph = {module: set() for module in graph}
    for module, targets in graph.items():
        for target in targets:
            importers[target].add(module)
    found: list[set[str]] = []
    left = set(graph)
    for start in reversed(order):
        component, todo = set(), [start] if start in left else []
        while todo:
            module = todo.pop()
            if module in left:
                left.remove(module)
                component.add(module)
                todo += importers[module]
        if component:
            found.append(component)
    return found


def _shortest_cycle(graph: Graph, component: set[str]) -> list[str]:
    """Return the modules of a shortest cycle within the component."""

    def from_start(start: str) -> list[str]:
        paths = [[start]]
        seen = {start}
        for path in paths:  # grows while it is read: breadth first
            for target in sorted(graph[path[-1]] & component):
                if target == start:
                    return path
                if target not in seen:
                    seen.add(target)
                    paths.append([*path, target])
        raise AssertionError(f"{start} lies on no cycle")

    return min((from_start(start) for start in sorted(component)), key=len)


def parts(graph: Graph, depth: int) -> Graph:
    """Return the graph of the packages' parts: the first `depth` names of a module, as ``normkern.ops`` for 2."""
    merged: Graph = {}
    for module, targets in graph.items():
        part = ".".join(module.split(".")[:depth])
        merged.setdefault(part, set()).update(
            inner for target in targets if (inner := ".".join(target.split(".")[:depth])) != part
        )
    return merged


def upward_imports(graph: Graph, layers: list[set[str]]) -> list[str]:
    """Return a sentence for each import that does not lead to a lower layer, and for each name that is in no layer.

    Args:
        layers: the lowest first. What is in one layer may import the layers below it, and not its own.
    """
    layer_of = {name: layer for layer, names in enumerate(layers) for name in names}
    missing = [f"{name} is in no layer" for name in graph if name not in layer_of]
    imports = [(name, target) for name in graph for target in sorted(graph[name]) if {name, target} <= layer_of.keys()]
    return missing + [
        f"{name} imports {target}, which is not in a lower layer"
        for name, target in imports
        if layer_of[target] >= layer_of[name]
    ]
