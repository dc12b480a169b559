"""Conversion between trees (nested dicts, FrozenDicts, NNX states) and flat `{"a.b.c": leaf}` mappings.

Path segments are strings. An integer key (a list index of an NNX model) becomes its decimal text, so Linen and NNX
give the same leaf the same path. `flatten` raises if two leaves would share one path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxadapt.core.errors import AdapterError
from jaxadapt.core.errors import bullets as bullets

SEPARATOR = "."


def join(*parts: str) -> str:
    """Join path segments, leaving out empty ones.

    >>> join("", "layers", "0")
    'layers.0'
    """
    return SEPARATOR.join(p for p in parts if p)


def flatten(tree: Mapping[Any, Any], is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Return `{"a.b.c": leaf}` of nested mappings, in the tree's order, without empty mappings.

    Raises `AdapterError` if two leaves would share a path (`{"a.b": x, "a": {"b": y}}`).

    >>> flatten({"a": {0: 1, "b": 2}})
    {'a.0': 1, 'a.b': 2}
    """
    out: dict[str, Any] = {}
    clashes: list[str] = []
    _flatten(tree, "", is_leaf, out, clashes, {dict: True})
    if clashes:
        raise AdapterError(
            f"cannot flatten the tree: two leaves share one dotted path: {sorted(set(clashes))}; rename one of them"
        )
    return out


def _flatten(
    node: Mapping[Any, Any],
    prefix: str,
    is_leaf: Callable[[Any], bool] | None,
    out: dict[str, Any],
    clashes: list[str],
    kinds: dict[type, bool],
) -> None:
    # A nested recursive function would be a reference cycle, which keeps `out` alive until the garbage collector runs.
    for key, value in node.items():
        text = str(key)
        path = f"{prefix}{SEPARATOR}{text}" if prefix and text else prefix or text
        cls = type(value)
        if cls not in kinds:  # once for each type, because the isinstance check of Mapping is slow
            kinds[cls] = issubclass(cls, Mapping)
        if kinds[cls] and not (is_leaf is not None and is_leaf(value)):
            _flatten(value, path, is_leaf, out, clashes, kinds)  # pyright: ignore[reportUnknownArgumentType]
        elif path in out:
            clashes.append(path)
        else:
            out[path] = value


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts from `{"a.b.c": leaf}`: the inverse of `flatten` on string keys.

    Raises `AdapterError` if one path passes through the leaf of another path.

    >>> unflatten({"a.0": 1, "a.b": 2})
    {'a': {'0': 1, 'b': 2}}
    """
    out: dict[str, Any] = {}
    leaves: set[int] = set()
    for path, leaf in flat.items():
        *parents, last = path.split(SEPARATOR)
        node = out
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict) or id(node) in leaves:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise AdapterError(
                    f"cannot unflatten: path {path!r} passes through the leaf {part!r} of another path; rename one"
                )
        if last in node:
            raise AdapterError(f"cannot unflatten: path {path!r} is both a leaf and a branch; rename one of them")
        node[last] = leaf
        if isinstance(leaf, dict):
            leaves.add(id(leaf))  # pyright: ignore[reportUnknownArgumentType]
    return out


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, sorted.

    >>> repeated(["b", "a", "b"])
    ['b']
    """
    return sorted(name for name, count in Counter(names).items() if count > 1)
