"""A walk over the object graph of an NNX model: its modules, variables and arrays, with Flax's paths, in Flax's order.

`nnx.iter_graph` takes about eight times as long, because it also lists every static attribute, and asks Flax about
each value instead of each type. `nnx.state` takes as long, and copies the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.nnx import graphlib
from jax.core import Tracer

Path = tuple[Any, ...]
"""Attribute names, keys and list indices, as in `nnx.to_flat_state`."""
Entry = tuple[Path, Any, Any]
"""`(path, value, owner)`; the owner is the last graph node (module, `nnx.List`, …) on the path to the value."""

_Children = Callable[[Any], Iterable[tuple[Any, Any, bool]]]
_VARIABLE, _ARRAY, _NODE, _CONTAINER, _OTHER = range(5)


def walk(root: Any) -> list[Entry]:
    """List the variables, arrays and graph nodes of a model.

    A variable or a graph node that several paths reach is listed once, at its first path. A graph node follows its
    contents. Attributes are in the order of their names, integers first. Containers (lists, dicts, tuples, None,
    classes registered with JAX) are entered and not listed.

    The variables and arrays have the paths of `nnx.state(root)`: static attributes are left out, and a value of another
    type is listed only if its attribute is marked as data.

    >>> [(path, type(x).__name__) for path, x, _ in walk(nnx.List([nnx.Param(1.0), nnx.Dict(a=nnx.Param(2.0))]))]
    [((0,), 'Param'), ((1, 'a'), 'Param'), ((1,), 'Dict'), ((), 'List')]
    """
    visitor = _Visitor()
    visitor.visit((), root, None, True)
    return visitor.entries


class _Visitor:
    """The entries so far, the shared objects seen, and Flax's answers about each type."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.seen: set[int] = set()
        self.kinds: dict[type, int] = {}
        self.children: dict[type, _Children] = {}

    def visit(self, path: Path, value: Any, owner: Any, data: bool) -> None:
        """Append the entries of a value; `data` is True for the value of an attribute marked as data."""
        cls = type(value)
        kind = self.kinds.get(cls)
        if kind is None:
            kind = self._classify(cls, value)
        if kind == _OTHER:
            if data:
                self.entries.append((path, value, owner))
            return
        if kind == _ARRAY:
            self.entries.append((path, value, owner))
            return
        if kind != _CONTAINER:
            if id(value) in self.seen:
                return
            self.seen.add(id(value))
        if kind != _VARIABLE:
            inside = value if kind == _NODE else owner
            for key, child, is_data in self.children[cls](value):
                self.visit((*path, key), child, inside, is_data)
        if kind != _CONTAINER:
            self.entries.append((path, value, owner))

    def _classify(self, cls: type, value: Any) -> int:
        """Return the kind of a value, and keep it for its type."""
        implementation: Any = graphlib.get_node_impl(value)
        if isinstance(value, nnx.Variable):
            kind = _VARIABLE
        elif implementation is not None:
            kind = _NODE if isinstance(implementation, graphlib.GraphNodeImpl) else _CONTAINER
            self.children[cls] = _children_function(cls, implementation)
        elif graphlib.is_graph_node(value):  # a mutable array, which may be shared as a variable may
            kind = _VARIABLE
        else:
            kind = _ARRAY if isinstance(value, jax.Array | np.ndarray) else _OTHER
        if not issubclass(cls, Tracer):  # a traced variable has the type of a traced array
            self.kinds[cls] = kind
        return kind


def _children_function(cls: Any, implementation: Any) -> _Children:
    """Return the function that lists `(key, value, whether it is marked as data)` in a container or a graph node."""
    known: dict[Any, _Children] = {
        dict: lambda node: ((key, node[key], False) for key in sorted(node)),
        list: lambda node: ((key, value, False) for key, value in enumerate(node)),
        tuple: lambda node: ((key, value, False) for key, value in enumerate(node)),
        type(None): lambda node: (),
    }
    if cls in known:
        return known[cls]
    pytree: Any = nnx.Pytree
    if implementation.flatten is pytree._graph_node_flatten and cls._pytree__is_pytree:
        return _list_int_attributes if cls._pytree__has_int_keys else _list_attributes
    return lambda node: _list_flattened(implementation.flatten(node)[0])


def _list_attributes(node: Any) -> Iterator[tuple[str, Any, bool]]:
    """List a node's data attributes, without building Flax's objects for the static ones."""
    attributes, is_data = vars(node), node._pytree__nodes
    for name in sorted([name for name in attributes if is_data.get(name)]):
        if name != "_pytree__state":  # it never has contents
            yield name, attributes[name], True


def _list_int_attributes(node: Any) -> Iterator[tuple[Any, Any, bool]]:
    """List the data attributes of a node such as `nnx.List`, whose numeric names are integer keys."""
    numbers: dict[int, Any] = {}
    others: list[tuple[str, Any, bool]] = []
    for name, value, data in _list_attributes(node):
        try:
            numbers[int(name)] = value
        except ValueError:
            others.append((name, value, data))
    yield from ((number, numbers[number], True) for number in sorted(numbers))
    yield from others


def _list_flattened(children: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any, bool]]:
    """List what a class's own flatten function returns, without static attributes."""
    for key, value in children:
        if isinstance(value, graphlib.DataElem):
            yield key, value.value, True
        elif not isinstance(value, graphlib.StaticElem):
            yield key, value, False


def instance_test(cls: Any, but: Any = ()) -> Callable[[Any], bool]:
    """Return a test for instances of `cls`, except those of `but`, that asks Flax once for each type.

    `isinstance(x, nnx.Param)` runs Python code of Flax, which takes a microsecond for every attribute of a model.
    """
    answers: dict[type, bool] = {}

    def test(value: Any) -> bool:
        kind = type(value)
        if kind in answers:
            return answers[kind]
        answer = isinstance(value, cls) and not isinstance(value, but)
        # The type of a traced or a hijax value does not show the kind of variable that it is.
        if not issubclass(kind, Tracer) and (issubclass(kind, nnx.Variable) or not isinstance(value, nnx.Variable)):
            answers[kind] = answer
        return answer

    return test
