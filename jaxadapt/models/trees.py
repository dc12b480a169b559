"""Any tree as `{dotted path: array}`, and back: NNX models and states, Linen variables, nested dicts, other pytrees.

Boxes are opened, and closed again; lorax' weights are told apart by what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jaxadapt.adapters.adapter import CONFIG_NODE, is_array
from jaxadapt.arrays.quantized import is_quantized
from jaxadapt.core import paths
from jaxadapt.core.errors import MismatchError
from jaxadapt.models.foreign import dialects
from jaxadapt.models.linen import collections
from jaxadapt.models.nnx import attach

Leaves = dict[str, Any]
Put = Callable[[Mapping[str, Any]], Any]


def may_have_path(tree: Any, wanted: Callable[[str], bool]) -> bool:
    """Whether `open_tree` may have such a path, by a glance: nearly all trees are plain, and have none."""
    if isinstance(tree, attach.nnx.Module):
        return any(wanted(paths.join(*map(str, path))) for path, _ in attach.nnx.iter_graph(tree))
    if not isinstance(tree, Mapping):
        return True
    inner = tree.get("params")
    flat = paths.flatten(inner if isinstance(inner, Mapping) else tree)
    return any(map(wanted, flat)) or not all(is_array(x) or isinstance(x, attach.nnx.Variable) for x in flat.values())


def open_tree(tree: Any) -> tuple[Leaves, Put]:
    """`{dotted path: array}` of a tree, boxes opened, and a function that gives the tree with other leaves."""
    if isinstance(tree, attach.nnx.Module | attach.nnx.State):
        return _opened_nnx(tree)
    if isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
        leaves, put = _opened_tree(tree["params"])
        return leaves, lambda new: {**tree, "params": put(new)}
    return _opened_tree(tree)


def _opened_nnx(tree: Any) -> tuple[Leaves, Put]:
    module = isinstance(tree, attach.nnx.Module)
    state = attach.nnx.state(tree, attach.nnx.Any(attach.nnx.Param, _is_mark)) if module else tree
    flat = {paths.join(*map(str, path)): var for path, var in attach.nnx.to_flat_state(state)}
    ours = {p for p, var in flat.items() if isinstance(var, attach.AdapterParam)}
    held = {
        p: var.get_value() if isinstance(var, attach.nnx.Variable) else var for p, var in flat.items() if p not in ours
    }
    leaves = {p: leaf for p, leaf in held.items() if is_array(leaf) or is_quantized(leaf)}

    def put(new: Mapping[str, Any]) -> Any:
        plain = [p for p in new if not isinstance(flat[p], attach.nnx.Variable)]
        if plain:
            raise MismatchError(
                "a pure state holds its arrays by value; put them into the model, or into nnx.state(model):\n"
                + paths.bullets(plain)
            )
        for path, value in new.items():
            flat[path].set_value(value)
        return tree

    return leaves, put


def _is_mark(path: Sequence[Any], _: Any) -> bool:
    """Whether a variable that is no parameter belongs to a dialect all the same: the ranks and scales of its slots."""
    return any(str(path[-1]) in (d.slots or ()) for d in dialects.DIALECTS.values())


def is_box(node: Any) -> bool:
    """Whether a node wraps one array with what belongs to it (`nn.Partitioned`, an NNX variable), or stands for one."""
    return isinstance(node, collections.meta.AxisMetadata | attach.nnx.Variable) or is_quantized(node)


def _name(key: Any) -> str:
    if isinstance(key, DictKey | FlattenedIndexKey):
        return str(key.key)
    if isinstance(key, GetAttrKey):
        return key.name
    return str(key.idx) if isinstance(key, SequenceKey) else str(key)


def _path(keys: Sequence[Any]) -> str:
    """A dotted path; an unnamed last segment (haliax' NamedArray has one) is left out."""
    named = keys[:-1] if keys and isinstance(keys[-1], FlattenedIndexKey) else keys
    return ".".join(map(_name, named))


def _lorax(tree: Any) -> dict[str, Any]:
    """`{path: lorax.LoraWeight}`: one weight with its LoRA, whose three arrays the path alone does not tell apart."""
    nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_lorax)[0]
    return {_path(keys): node for keys, node in nodes if _is_lorax(node)}


def _is_lorax(node: Any) -> bool:
    return type(node).__name__ == "LoraWeight" and type(node).__module__.partition(".")[0] == "lorax"


def lorax_alphas(tree: Any) -> dict[str, float]:
    """`{base leaf: alpha}` of the weights that carry theirs."""
    if isinstance(tree, attach.nnx.Module | attach.nnx.State):
        return {}
    params = tree["params"] if isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping) else tree
    return {path: float(node.alpha) for path, node in _lorax(params).items()}


def _opened_tree(tree: Any) -> tuple[Leaves, Put]:
    if isinstance(tree, Mapping) and CONFIG_NODE in tree:
        return {}, lambda new: tree  # the tree of an adapter of ours
    seen: list[Any] = []

    def is_leaf(node: Any) -> bool:
        if type(node) is dict:  # nearly every node that is no leaf
            return False
        if _is_lorax(node):
            seen.append(node)
        return is_box(node)

    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    lorax = _lorax(tree) if seen else {}
    names = [_path(keys) for keys, _ in flat]
    for number, (keys, _) in enumerate(flat if lorax else ()):
        if _path(keys[:-1]) in lorax:
            names[number] = ".".join([_path(keys[:-1]), "LoraWeight", _name(keys[-1])])
    leaves: Leaves = {}
    for name, (_, node) in zip(names, flat, strict=True):
        value = unbox(node)
        if is_array(value) or is_quantized(value):
            leaves[name] = value

    def put(new: Mapping[str, Any]) -> Any:
        nodes: Sequence[Any] = [
            rebox(node, new[name]) if name in new else node for name, (_, node) in zip(names, flat, strict=True)
        ]
        return jax.tree_util.tree_unflatten(structure, nodes)

    return leaves, put


def unbox(node: Any) -> Any:
    """What a box holds; any other node itself."""
    if isinstance(node, collections.meta.AxisMetadata):
        return collections.unbox_tree(node)
    return node.get_value() if isinstance(node, attach.nnx.Variable) else node


def rebox(node: Any, value: Any) -> Any:
    """The box with another value; the value, where there is none."""
    if isinstance(node, collections.meta.AxisMetadata):
        return node.replace_boxed(value)
    return node.replace(value) if isinstance(node, attach.nnx.Variable) else value
