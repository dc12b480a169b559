"""Conversion of any tree to `{dotted path: array}` and back: NNX models and states, Linen variables, other pytrees.

Boxes are opened, and restored on the way back. The nodes of lorax are recognised by their type. A slash in a key
separates names, as in keras' `variable.path`. A "value" at the end of every path, as in an NNX state that was stored as
plain dicts, is no name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.tree_util import FlattenedIndexKey, keystr

from jaxadapt.adapters.adapter import CONFIG_NODE, is_array
from jaxadapt.arrays.quantized import is_quantized
from jaxadapt.core import paths
from jaxadapt.core.errors import MismatchError, raise_listed
from jaxadapt.models.foreign import DIALECTS
from jaxadapt.models.linen import collections
from jaxadapt.models.nnx import graph

Leaves = dict[str, Any]
Put = Callable[[Mapping[str, Any]], Any]


def may_have_path(tree: Any, wanted: Callable[[str], object]) -> bool:
    """Return True if `open_tree` may return a wanted path; a quick test that rules out nearly all plain trees."""
    if isinstance(tree, graph.Model):
        return any(wanted(paths.SEPARATOR.join(map(str, path))) for path, _, _ in graph.walk_model(tree).entries)
    if not isinstance(tree, Mapping):
        return True
    inner = tree.get("params")
    flat = paths.flatten(inner if isinstance(inner, Mapping) else tree)
    return any(map(wanted, _names(flat))) or not all(is_array(x) or isinstance(x, nnx.Variable) for x in flat.values())


def open_tree(tree: Any) -> tuple[Leaves, Put]:
    """Return `{dotted path: array}` of a tree, without boxes, and a function that returns the tree with new leaves."""
    if isinstance(tree, graph.TREES):
        return _open_nnx(tree)
    if isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
        leaves, put = _open_pytree(tree["params"])
        return leaves, lambda new: {**tree, "params": put(new)}
    return _open_pytree(tree)


def _open_nnx(tree: Any) -> tuple[Leaves, Put]:
    if isinstance(tree, graph.Model):
        is_param, entries = graph.instance_test(nnx.Param), graph.walk_model(tree).entries
        variables = [(path, x) for path, x, _ in entries if is_param(x) or _is_slot_variable(path)]
    else:
        variables = list(nnx.to_flat_state(tree))
    is_variable, is_ours = graph.instance_test(nnx.Variable), graph.instance_test(graph.AdapterParam)
    flat = {paths.join(*map(str, path)): var for path, var in variables}
    values = {p: var.get_value() if is_variable(var) else var for p, var in flat.items() if not is_ours(var)}
    leaves = {p: leaf for p, leaf in values.items() if is_array(leaf) or is_quantized(leaf)}

    def put(new: Mapping[str, Any]) -> Any:
        raise_listed(
            MismatchError,
            "cannot write into a pure state, which holds its arrays by value. Pass the model or"
            " nnx.state(model) instead of:",
            (path for path in new if not isinstance(flat[path], nnx.Variable)),
        )
        graph.set_values(flat, new)
        return tree.model if isinstance(tree, graph.ModelWalk) else tree

    return leaves, put


def _is_slot_variable(path: Sequence[Any]) -> bool:
    """Return True for variables that are not parameters but belong to a dialect: the ranks and scales of slots."""
    return bool(path) and any(str(path[-1]) in (d.slots or ()) for d in DIALECTS.values())


def is_box(node: Any) -> bool:
    """Return True if a node wraps one array with metadata (`nn.Partitioned`, an NNX variable), or is quantised."""
    return isinstance(node, collections.meta.AxisMetadata | nnx.Variable) or is_quantized(node)


def _node_path(keys: Sequence[Any]) -> str:
    """Return a dotted path without an unnamed last segment, as haliax' NamedArray has."""
    named = keys[:-1] if keys and isinstance(keys[-1], FlattenedIndexKey) else keys
    return keystr(tuple(named), simple=True, separator=".")


def _names(given: Collection[str]) -> list[str]:
    """Return the paths of leaves with dots for slashes, and without a "value" that ends all of them.

    >>> _names(["dense/kernel", "dense/bias"]), _names(["q.w.value", "q.b.value"])
    (['dense.kernel', 'dense.bias'], ['q.w', 'q.b'])
    """
    dotted = [path.replace("/", paths.SEPARATOR) for path in given]
    return [path.removesuffix(".value") for path in dotted] if all(p.endswith(".value") for p in dotted) else dotted


def _find_lorax(tree: Any) -> dict[str, Any]:
    """Return `{path: lorax.LoraWeight}`, nodes of a weight and its LoRA whose three arrays have ambiguous paths."""
    return {
        _node_path(keys): node
        for keys, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_lorax)
        if _is_lorax(node)
    }


def _is_lorax(node: Any) -> bool:
    return type(node).__name__ == "LoraWeight" and type(node).__module__.partition(".")[0] == "lorax"


def lorax_alphas(tree: Any) -> dict[str, float]:
    """Return `{base leaf: alpha}` of the lorax weights, which store their alpha."""
    if isinstance(tree, nnx.Module | nnx.State):
        return {}
    params = tree["params"] if isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping) else tree
    return {path: float(node.alpha) for path, node in _find_lorax(params).items()}


def _open_pytree(tree: Any) -> tuple[Leaves, Put]:
    if isinstance(tree, Mapping) and CONFIG_NODE in tree:
        return {}, lambda new: tree  # an adapter of jaxadapt
    lorax_nodes: list[Any] = []

    def is_leaf(node: Any) -> bool:
        if type(node) is dict:  # fast path for nearly every inner node
            return False
        if _is_lorax(node):
            lorax_nodes.append(node)
        return is_box(node)

    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    lorax = _find_lorax(tree) if lorax_nodes else {}
    names = _names([_node_path(keys) for keys, _ in flat])
    for number, (keys, _) in enumerate(flat if lorax else ()):
        if _node_path(keys[:-1]) in lorax:
            names[number] = ".".join([_node_path(keys[:-1]), "LoraWeight", keystr(keys[-1:], simple=True)])
    named = list(zip(names, (node for _, node in flat), strict=True))
    leaves = {name: x for name, node in named if is_array(x := unbox(node)) or is_quantized(x)}

    def put(new: Mapping[str, Any]) -> Any:
        nodes = [rebox(node, new[name]) if name in new else node for name, node in named]
        return jax.tree_util.tree_unflatten(structure, nodes)

    return leaves, put


def unbox(node: Any) -> Any:
    """Return the value in a box; any other node unchanged."""
    if isinstance(node, collections.meta.AxisMetadata):
        return collections.unbox_tree(node)
    return node.get_value() if isinstance(node, nnx.Variable) else node


def rebox(node: Any, value: Any) -> Any:
    """Return the box with another value; `value` itself if `node` is not a box."""
    if isinstance(node, collections.meta.AxisMetadata):
        return node.replace_boxed(value)
    return node.replace(value) if isinstance(node, nnx.Variable) else value
