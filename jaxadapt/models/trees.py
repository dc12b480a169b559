"""Trees of parameters: boxes, the adapter collections of Linen variables, and any tree as `{dotted path: array}`.

`open_tree` takes NNX models and states, Linen variables and other pytrees. Boxes are opened, and restored on the way
back. The nodes of lorax are recognized by their type. A slash in a key separates names, as in keras' `variable.path`. A
"value" at the end of every path, as in an NNX state that was stored as plain dicts, is no name.
"""

from __future__ import annotations

import functools
import itertools
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx, serialization
from flax.core import meta

from jaxadapt.adapters import initial_values
from jaxadapt.adapters.adapter import (
    CONFIG_NODE,
    SHARED_NODE,
    Adapter,
    Recipe,
    collection_name,
    integers_name,
    is_array,
)
from jaxadapt.adapters.sites import sites_of
from jaxadapt.arrays import regions
from jaxadapt.arrays.quantized import is_quantized
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, MismatchError, raise_listed
from jaxadapt.keymaps import families
from jaxadapt.methods.applied import refuse_rivals
from jaxadapt.methods.base import METHODS
from jaxadapt.models import graph
from jaxadapt.models.foreign import may_be_scale

# ---------------------------------------------------------------- boxes and nested mappings


Keys = tuple[str, ...]


def unbox_tree(tree: Any) -> Any:
    """Return a tree with its boxed leaves (`nn.Partitioned` …) replaced by their values."""
    return tree if is_array(tree) else jax.tree.map(unbox, tree, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))


def base_shardings(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{path: sharding}` for the base leaves: the sharding of the array or spec, else that of the box."""
    shardings: dict[str, Any] = {}
    for path, leaf in leaves.items():
        value = unbox_tree(leaf)
        shardings[path] = regions.sharding_of(value)
        if regions.is_unplaced(value) and isinstance(leaf, meta.Partitioned):
            spec: Any = leaf.get_partition_spec()
            if isinstance(leaf, nn.LogicallyPartitioned):
                spec = nn.spmd.logical_to_mesh_axes(tuple(spec), leaf.rules)
            shardings[path] = regions.sharding_from_spec(tuple(spec), leaf.mesh)
    return shardings


def lookup(tree: Any, keys: Sequence[str]) -> Any:
    """Return the value at these keys of nested mappings."""
    return functools.reduce(lambda node, key: node[key], keys, tree)


def overlay(tree: Mapping[str, Any], leaves: Mapping[Keys, Any]) -> dict[str, Any]:
    """Return nested mappings with these leaves added or replaced; all other mappings are shared with `tree`."""
    inner: dict[str, dict[Keys, Any]] = {}
    out = dict(tree)
    for (first, *rest), value in leaves.items():
        if rest:
            inner.setdefault(first, {})[tuple(rest)] = value
        else:
            out[first] = value
    return {**out, **{key: overlay(out.get(key, {}), below) for key, below in inner.items()}}


def like(tree: Any, items: Mapping[str, Any]) -> Any:
    """Return `items` in a mapping of the tree's type, such as a FrozenDict."""
    return type(tree)(items)


def with_value(tree: Any, value: Any, *keys: str) -> Any:
    """Return nested mappings of the same types with `value` at these keys."""
    if not keys:
        return value
    return like(tree, {**tree, keys[0]: with_value(tree.get(keys[0], {}), value, *keys[1:])})


def replace_adapter_values(
    tree: Mapping[str, Any], name: str, values: Mapping[str, Any], recipe: Recipe | None = None
) -> Any:
    """Return a tree with other values in one adapter, and with the same boxes and mapping types.

    Args:
        tree: Linen variables, an adapter collection, or the tree of one adapter, as for `adapter_tree`.
        values: `{path: array}` for all parameters of the adapter.
        recipe: replaces the adapter's recipe, if given.
    """
    for keys in places(tree, next(keys for keys in find_adapters(tree) if keys[-1:] in ((), (name,)))):
        tree = with_value(tree, replace_values(lookup(tree, keys), values, recipe), *keys)
    return tree


def replace_values(
    tree: Mapping[str, Any],
    values: Mapping[str, Any],
    recipe: Recipe | None = None,
    within: str = "",
    *,
    boxes: bool = True,
) -> Any:
    """Return the tree of one adapter, with or without its recipe, with other values.

    Args:
        tree: the tree, or a subtree at the path `within`.
        values: `{path: array}` for all parameters of the adapter.
        recipe: replaces the adapter's recipe, if given.
        within: the path of `tree` in the adapter.
        boxes: True if the values go into the present boxes, False if they replace them.
    """
    filled: dict[str, Any] = {}
    for key, leaf in tree.items():
        path = paths.join(within, str(key))
        if key == CONFIG_NODE:
            filled[key] = recipe or leaf
        elif isinstance(leaf, Mapping):
            filled[key] = replace_values(leaf, values, recipe, path, boxes=boxes)
        else:
            filled[key] = (
                leaf.replace_boxed(values[path]) if boxes and isinstance(leaf, meta.AxisMetadata) else values[path]
            )
    return like(tree, filled)


# ---------------------------------------------------------------- finding and reading adapters


def find_adapters(tree: Mapping[str, Any]) -> dict[Keys, Mapping[str, Any]]:
    """Return `{keys: tree of one adapter}` of Linen variables, of one collection, or of one adapter, with the keys ().

    The tree of an adapter in variables has the integer tensors of the collection beside its own.
    """
    if CONFIG_NODE in tree:
        return {(): tree}
    groups: list[tuple[Keys, Any, Mapping[str, Any]]] = [
        ((), tree, {}),
        *(((c,), tree[c], tree.get(integers_name(c), {})) for c in collection_names(tree)),
    ]
    return {
        (*keys, name): with_integers(inner, integers.get(name, {}))
        for keys, group, integers in groups
        if isinstance(group, Mapping)
        for name, inner in group.items()
        if isinstance(inner, Mapping) and (keys or CONFIG_NODE in inner)
    }


def with_integers(tree: Mapping[str, Any], integers: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tree of one adapter with the integer tensors that its own collection holds."""
    return {
        **tree,
        **{
            key: with_integers(tree.get(key, {}), value) if isinstance(value, Mapping) else value
            for key, value in integers.items()
        },
    }


def places(tree: Mapping[str, Any], keys: Keys) -> list[Keys]:
    """Return the keys of an adapter that `find_adapters` found, and those of its integer tensors, if it has some."""
    integers = [(integers_name(collection), name) for collection, name in [keys] * (len(keys) == 2)]
    return [keys, *(each for each in integers if each[1] in tree.get(each[0], {}))]


def variable_adapters(variables: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Return `(name, tree of one adapter)` of the collections in Linen variables.

    Returns none for a tree without "params": in a parameter tree, "lora" may be the name of a module.
    """
    if not isinstance(variables, Mapping) or "params" not in variables:
        return []
    return [(keys[1], inner) for keys, inner in find_adapters(variables).items() if len(keys) == 2]


def collection_names(tree: Mapping[str, Any]) -> list[str]:
    """Return the names of the adapter collections in Linen variables, without those of integer tensors."""
    return [name for name in map(str.lower, METHODS) if name in tree]


def without_adapters(tree: Mapping[str, Any]) -> Any:
    """Return Linen variables without the adapters' collections, in a mapping of the same type."""
    dropped = {each for name in collection_names(tree) for each in (name, integers_name(name))}
    return like(tree, {name: value for name, value in tree.items() if name not in dropped})


def without_adapter(tree: Mapping[str, Any], name: str, collection: str) -> Any:
    """Return Linen variables without one adapter of a collection, and without a collection that is then empty."""
    out = dict(tree)
    for each in (collection, integers_name(collection)):
        kept = {k: v for k, v in out.pop(each, {}).items() if k != name}
        out |= {each: kept} if kept else {}
    return like(tree, out)


def map_adapters(tree: Any, f: Callable[[str, Adapter], Mapping[str, Any]], names: Sequence[str] | None = None) -> Any:
    """Return a tree with the values that `f` returns in place of its adapters' leaves (None: of all adapters)."""
    for keys, inner in find_adapters(tree).items():
        if keys and CONFIG_NODE in inner and (names is None or keys[-1] in names):
            values = f(keys[-1], read_adapter(inner, keys[-1]))
            for at in places(tree, keys):
                tree = with_value(tree, replace_values(lookup(tree, at), values, boxes=False), *at)
    return tree


def adapter_tree(tree: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Return the tree of one adapter, or None.

    Args:
        tree: Linen variables, an adapter collection, or the tree of one adapter, which is returned as it is.

    Raises `AttachError` if several collections have an adapter of this name.
    """
    found = {keys: inner for keys, inner in find_adapters(tree).items() if keys[-1:] in ((), (name,))}
    if len(found) > 1 and all(len(keys) == 2 for keys in found):
        raise AttachError(
            f"several adapters have the name {name!r} here, in {' and '.join(keys[0] for keys in found)}. Rename one of"
            " them, for example with adapter.named('other')"
        )
    return next(iter(found.values()), None)


def read_adapter(tree: Mapping[str, Any], name: str) -> Adapter:
    """Return the adapter whose tree is given; `name` is for messages.

    Raises `AttachError` if the tree has no configuration, or if parts of the adapter are missing.
    """
    recipe = tree.get(CONFIG_NODE)
    if isinstance(recipe, str):  # from Flax's msgpack, restored without a target
        recipe = Recipe.from_text(recipe)
    if not isinstance(recipe, Recipe):
        raise AttachError(
            f"the adapter {name!r} has lost its configuration, as a restore without a target does. Pass"
            " jaxadapt.models.LoraTree(variables, config=config) in place of the variables (and keymap=, if it was"
            " adapted with one), or put the configuration back with extract: variables |"
            f" extract(LoraTree(variables, config=config), name={name!r}).named({name!r})"
        )
    adapter = Adapter(recipe.config, {k: v for k, v in tree.items() if k != CONFIG_NODE}, recipe.keymap)
    recipe.check_complete(len(adapter.sites), name)
    return adapter


def adapter_from_arrays(tree: Mapping[str, Any], name: str, config: Config | None, keymap: Any) -> Adapter:
    """Return the adapter called `name` from a tree that holds only arrays.

    Raises `AttachError` if `config` is None, or if the tree has no such adapter.
    """
    if config is None:
        raise AttachError(
            "this tree has no adapter configuration (it has no adapter, as after merge, or to_pure_dict or a"
            " restore without a target dropped it). Save a merged adapter from the variables before the merge; else"
            " pass jaxadapt.models.LoraTree(tree, config=config) in place of the tree, and keymap= if the model was"
            " adapted with one"
        )
    collection = collection_name(config)
    values = _named_arrays({k: v for k, v in tree.items() if k != "params" or collection not in tree}, collection, name)
    if not values:
        # The tree may be that of one adapter, without a collection around it.
        leaves = paths.flatten({k: v for k, v in tree.items() if k != CONFIG_NODE})
        values = {path: leaf for path, leaf in leaves.items() if is_array(unbox_tree(leaf))}
        if not values or any(collection in path.split(".") for path in values):
            raise AttachError(f"there is no adapter {name!r} of type {config.peft_type} in this tree. Check name=")
    base_leaves = {path.rpartition(".")[0] for path in values} - {SHARED_NODE}
    resolved = (
        families.family_of_leaves(base_leaves) if keymap in (None, "auto") else families.resolve_keymap(keymap, {})
    )
    return Adapter(config, paths.unflatten(values), resolved)


def extract_adapter(
    tree: Mapping[str, Any], name: str, config: Config | None, keymap: Any, names: Sequence[str]
) -> Adapter:
    """Return the adapter called `name`, read with a given configuration and keymap where the tree stores none.

    `names` are those of the adapters that store a configuration.
    """
    present = adapter_tree(tree, name)
    stored = present is not None and isinstance(present.get(CONFIG_NODE), Recipe | str)
    if present is not None and (config is None or (keymap is None and stored)):
        adapter = read_adapter(present, name)
        return adapter if config is None else Adapter(config, adapter.params, adapter.keymap)
    if present is None and names:
        raise AttachError(f"cannot extract {name!r}: no adapter has that name; found {names}")
    return adapter_from_arrays(tree, name, config, keymap)


def refuse_rival_copies(adapters: Mapping[str, Adapter]) -> None:
    """Raise `AttachError` if several of these adapters hold copies of the same weight or rows, `{name: adapter}`."""
    sites = [(name, site) for name, adapter in adapters.items() for site in sites_of(adapter)]
    refuse_rivals(paths.nest((site.leaf, name, site.method) for name, site in sites if site.method.copies))


def refuse_others(state: Any, variables: Collection[int]) -> None:
    """Raise `AttachError` for an NNX state with other variables than those of these ids."""
    raise_listed(
        AttachError,
        "expected a state with only the trained variables, nnx.state(model, jaxadapt.AdapterParam); this one"
        " also contains:",
        (
            f"{paths.join(*map(str, path))}: {type(var).__name__}"
            for path, var in nnx.to_flat_state(state)
            if id(var) not in variables
        ),
    )


def _named_arrays(tree: Mapping[str, Any], collection: str, name: str) -> dict[str, Any]:
    """Return `{path in the adapter: array}` of the arrays below a collection and a name, wherever these are."""
    values: dict[str, Any] = {}
    for path, leaf in paths.flatten(tree).items():
        parts = [p for p in path.split(".") if p != CONFIG_NODE]
        if not is_array(unbox_tree(leaf)) or "opt_state" in path.split("."):
            continue
        if parts[-1] == "value":  # Orbax restores an nnx.Variable without a target as {"value": array}
            parts.pop()
        heads = {(collection, name), (integers_name(collection), name)}
        at = next((i for i, pair in enumerate(itertools.pairwise(parts)) if pair in heads), None)
        if at is not None:
            values[paths.join(*parts[:at], *parts[at + 2 :])] = leaf
    return values


def box_like_base(adapter: Adapter, base: Mapping[str, Any]) -> Adapter:
    """Return the adapter with each tensor boxed like its base weight, so that `nn.get_partition_spec` works on it.

    Args:
        base: the base parameters with their boxes, nested or by dotted path.
    """
    boxes = {leaf: box for leaf, box in paths.flatten(base).items() if isinstance(box, meta.Partitioned)}
    if not boxes:
        return adapter
    values = adapter.flat()
    for site in sites_of(adapter):
        if site.leaf in boxes:
            box = boxes[site.leaf]
            for entry in site.entries:
                names = initial_values.propagate_axes(site.match, entry.form, tuple(box.names))
                values[entry.path] = box.replace(value=values[entry.path], names=names)
    return Adapter.of_leaves(adapter.config, values, adapter.keymap)


def _recipe_from_text(target: Recipe, state: Any) -> Recipe:
    if not isinstance(state, str):
        raise AttachError(
            f"cannot restore an adapter's configuration: expected text, found {type(state).__name__}."
            " Restore from a file that flax.serialization wrote"
        )
    return Recipe.from_text(state)


serialization.register_serialization_state(Recipe, Recipe.to_text, _recipe_from_text)


# ---------------------------------------------------------------- any tree


Leaves = dict[str, Any]
Put = Callable[[Mapping[str, Any]], Any]


def may_have_path(tree: Any, wanted: Callable[[str], object]) -> bool:
    """Return True if `open_tree` may return a wanted path; a quick test that rules out nearly all plain trees."""
    if isinstance(tree, graph.Model):
        return any(wanted(paths.SEPARATOR.join(map(str, path))) for path, _ in graph.walk_model(tree).entries)
    if not isinstance(tree, Mapping):
        return True
    inner = tree.get("params")
    flat = paths.flatten(inner if isinstance(inner, Mapping) else tree)
    return any(map(wanted, _names(flat))) or not all(is_array(x) or isinstance(x, nnx.Variable) for x in flat.values())


def open_tree(tree: Any) -> tuple[Leaves, Put]:
    """Return `{dotted path: array}` of a tree, without boxes, and a function that returns the tree with new leaves.

    A number is among them where it may be the scale of LoRA leaves.
    """
    if isinstance(tree, graph.TREES):
        return _open_nnx(tree)
    if isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
        leaves, put = _open_pytree(tree["params"])
        return leaves, lambda new: with_value(tree, put(new), "params")
    return _open_pytree(tree)


def _open_nnx(tree: Any) -> tuple[Leaves, Put]:
    if isinstance(tree, graph.Model):
        is_param = graph.instance_test(nnx.Param)
        variables = [
            (path, x)
            for path, x in graph.walk_model(tree).entries
            if is_param(x) or may_be_scale(paths.join(*map(str, path)))
        ]
    else:
        variables = list(nnx.to_flat_state(tree))
    is_variable, is_ours = graph.instance_test(nnx.Variable), graph.instance_test(graph.AdapterParam)
    flat = {paths.join(*map(str, path)): var for path, var in variables}
    values = {p: var.get_value() if is_variable(var) else var for p, var in flat.items() if not is_ours(var)}
    leaves = {p: leaf for p, leaf in values.items() if _is_leaf(p, leaf)}

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


def _is_leaf(path: str, x: Any) -> bool:
    """Return True for an array, and for a number that may be the scale of LoRA leaves."""
    return is_array(x) or is_quantized(x) or (isinstance(x, numbers.Real) and may_be_scale(path))


def is_box(node: Any) -> bool:
    """Return True if a node wraps one array with metadata (`nn.Partitioned`, an NNX variable), or is quantized."""
    return isinstance(node, meta.AxisMetadata | nnx.Variable) or is_quantized(node)


def _node_path(keys: Sequence[Any]) -> str:
    """Return a dotted path without an unnamed last segment, as haliax' NamedArray has."""
    named = keys[:-1] if keys and isinstance(keys[-1], jax.tree_util.FlattenedIndexKey) else keys
    return jax.tree_util.keystr(tuple(named), simple=True, separator=".")


def _names(given: Collection[str]) -> list[str]:
    """Return the paths of leaves with dots for slashes, and without a "value" that ends all of them.

    >>> _names(["dense/kernel", "dense/bias"]), _names(["q.w.value", "q.b.value"])
    (['dense.kernel', 'dense.bias'], ['q.w', 'q.b'])
    """
    dotted = [path.replace("/", paths.SEPARATOR) for path in given]
    return [path.removesuffix(".value") for path in dotted] if all(p.endswith(".value") for p in dotted) else dotted


def _is_lorax(node: Any) -> bool:
    return type(node).__name__ == "LoraWeight" and type(node).__module__.partition(".")[0] == "lorax"


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
    # The nodes of a weight and its LoRA, whose three arrays have ambiguous paths.
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_lorax) if lorax_nodes else ()
    lorax = {_node_path(keys): node for keys, node in nodes if _is_lorax(node)}
    names = _names([_node_path(keys) for keys, _ in flat])
    for number, (keys, _) in enumerate(flat if lorax else ()):
        if _node_path(keys[:-1]) in lorax:
            names[number] = ".".join(
                [_node_path(keys[:-1]), "LoraWeight", jax.tree_util.keystr(keys[-1:], simple=True)]
            )
    named = list(zip(names, (node for _, node in flat), strict=True))
    leaves = {name: x for name, node in named if _is_leaf(name, x := unbox(node))}
    leaves |= {f"{path}.LoraWeight.alpha": float(node.alpha) for path, node in lorax.items()}  # static, so no leaf

    def put(new: Mapping[str, Any]) -> Any:
        return structure.unflatten([rebox(node, new[name]) if name in new else node for name, node in named])

    return leaves, put


def unbox(node: Any) -> Any:
    """Return the value in a box; any other node unchanged."""
    if isinstance(node, meta.AxisMetadata):  # Partitioned.unbox() would apply a sharding constraint
        return node.value if isinstance(node, meta.Partitioned) else node.unbox()
    return node.get_value() if isinstance(node, nnx.Variable) else node


def rebox(node: Any, value: Any) -> Any:
    """Return the box with another value; `value` itself if `node` is not a box."""
    if isinstance(node, meta.AxisMetadata):
        return node.replace_boxed(value)
    return node.replace(value) if isinstance(node, nnx.Variable) else value
