"""The size and shape of a package, from its source alone; and the walk of one call through its files.

Statements are nodes of the syntax tree that are statements, docstrings apart. Branches are counted as McCabe's number.
A chain is a path of imports at module level; those in functions and under `if TYPE_CHECKING:` are left out, and the
files of a circle count as one.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

Graph = Mapping[str, set[str]]
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case)
# Packages whose tests are about their modules: functions on plain values, tables, bytes.
PURE = ("adapters", "analysis", "arrays", "configs", "core", "keymaps", "merging", "methods", "storage")


def statements(tree: ast.AST) -> list[ast.stmt]:
    def is_docstring(node: ast.stmt) -> bool:
        return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)

    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not is_docstring(node)]


def branches(function: ast.AST) -> int:
    """McCabe's number of a function, without the functions and classes in it."""
    count, todo = 1, list(ast.iter_child_nodes(function))
    while todo:
        node = todo.pop()
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, _BRANCHES):
            count += 1
        elif isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += 1 + len(node.ifs)
        todo.extend(ast.iter_child_nodes(node))
    return count


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def components(graph: Graph) -> list[set[str]]:
    """The strongly connected parts of a graph, each before those that lead to it (Tarjan)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        path.append(node)
        for other in graph[node]:
            if other not in number:
                visit(other)
            if other in path:
                low[node] = min(low[node], low[other])
        if low[node] == number[node]:
            start = path.index(node)
            found.append(set(path[start:]))
            del path[start:]

    for node in graph:
        if node not in number:
            visit(node)
    return found


@dataclasses.dataclass(frozen=True)
class House:
    """The numbers of one package.

    Attributes:
        branching: `{function: its branches}`. taking: `{function: the number of its parameters}`.
        chain: the number of files of the longest chain of imports. circles: the sizes of circles of files.
    """

    files: int
    median_lines: float
    statements: int
    imports: float
    branching: Mapping[str, int]
    taking: Mapping[str, int]
    chain: int
    circles: tuple[int, ...]


def measure(package: Path) -> House:
    """Read a package's files."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(package.rglob("*.py"))}
    nodes = {path: statements(tree) for path, tree in trees.items()}
    branching: collections.Counter[str] = collections.Counter()
    taking: collections.Counter[str] = collections.Counter()
    for path, found in nodes.items():
        for node in found:
            if isinstance(node, _FUNCTIONS):
                name = f"{path.relative_to(package)}:{node.lineno} {node.name}"
                branching[name], taking[name] = branches(node), parameters(node)

    def module(path: Path) -> str:
        parts = path.relative_to(package.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    modules = {module(path): tree for path, tree in trees.items()}
    graph = {
        name: {other for other in _imported(tree) if other in modules and other not in (name, package.name)}
        for name, tree in modules.items()
    }
    parts = components(graph)
    part_of = {name: index for index, part in enumerate(parts) for name in part}
    longest: list[int] = []
    for index, part in enumerate(parts):
        below = {part_of[other] for name in part for other in graph[name]} - {index}
        longest.append(1 + max((longest[other] for other in below), default=0))
    every = [node for found in nodes.values() for node in found]
    return House(
        files=len(trees),
        median_lines=statistics.median(len(path.read_text().splitlines()) for path in trees),
        statements=len(every),
        imports=sum(isinstance(node, ast.Import | ast.ImportFrom) for node in every) / len(every),
        branching=branching,
        taking=taking,
        chain=max(longest),
        circles=tuple(sorted((len(part) for part in parts if len(part) > 1), reverse=True)),
    )


@dataclasses.dataclass
class Walk:
    """The files that a call runs through, and how often it enters a function of another file."""

    files: set[str] = dataclasses.field(default_factory=set)
    moves: int = 0


def walk(package: Path, call: Callable[[], Any]) -> Walk:
    """Run a call and follow it through the functions of a package; code that runs at import is left out."""
    found, stack, root = Walk(), list[str](), f"{package}/"

    def profile(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event not in ("call", "return") or not name.startswith(root) or frame.f_code.co_name == "<module>":
            return
        if event == "return":
            stack.pop()
            return
        found.files.add(name)
        found.moves += bool(stack) and stack[-1] != name
        stack.append(name)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def doors(root: Path) -> set[str]:
    """Public packages, the command line, the demo's models, and the modules that the documentation imports from."""
    public = [path.parent.relative_to(root).parts for path in (root / "jaxadapt").rglob("__init__.pyi")]
    found = {".".join(parts) for parts in public} | {"jaxadapt.cli"}
    found |= {f"jaxadapt.demo.{path.stem}" for path in (root / "jaxadapt" / "demo").glob("*.py")}
    for path in [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("notebooks/*.ipynb")]:
        for home, names in re.findall(r"from (jaxadapt[\w.]*) import ([\w, ]+)", path.read_text(encoding="utf-8")):
            found |= {home, *(f"{home}.{name.strip()}" for name in names.split(","))}
    return found


def inner_modules(root: Path) -> dict[str, set[str]]:
    """`{module of the package that is no door: the tests that import it}`.

    A test in the folder of a package of `PURE` may import that package's modules: their functions are its subject.
    """
    modules = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for path in (root / "jaxadapt").rglob("*.py")
    }
    known, found = modules - doors(root), dict[str, set[str]]()
    for path in sorted((root / "tests").rglob("*.py")):
        folder = path.relative_to(root / "tests").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: set[str] = set()
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                names = {name if name in modules else node.module for name in inside}
            for name in names & known:
                if folder not in PURE or not name.startswith(f"jaxadapt.{folder}."):
                    found.setdefault(name, set()).add(str(path.relative_to(root)))
    return found


def replaced_internals(root: Path) -> list[str]:
    """The places where a test replaces something of the package: a name of a module, or a private name of an object."""
    found: list[str] = []
    for path in sorted((root / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        ours = {
            alias.asname or alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if (getattr(node, "module", None) or alias.name).split(".")[0] == "jaxadapt"
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                if node.func.attr not in ("setattr", "setitem", "delattr", "delitem", "object"):
                    continue
                target, name = node.args[0], node.args[1] if len(node.args) > 1 else None
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
                target, name = node.targets[0].value, ast.Constant(node.targets[0].attr)
            else:
                continue
            if _is_ours(target, name, ours, isinstance(node, ast.Assign)):
                found.append(f"{path.relative_to(root)}:{node.lineno}")
    return found


def _is_ours(target: ast.expr, name: ast.expr | None, ours: set[str], assigned: bool) -> bool:
    if isinstance(target, ast.Constant):
        return str(target.value).startswith("jaxadapt.")
    private = isinstance(name, ast.Constant) and str(name.value).startswith("_")
    while isinstance(target, ast.Attribute):
        private |= target.attr.startswith("_")
        target = target.value
    if not isinstance(target, ast.Name) or target.id == "self":
        return False
    return target.id in ours or (private and not assigned)
