"""Trees of other libraries: their LoRA leaves out as PEFT's tensors, and a file's tensors in.

What lies where is `dialects/`; what the arrays hold, `guests.py`. Here are only the trees themselves: NNX models and
states, Linen variables, nested dicts, or any other pytree.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jaxadapt import bind, dialects, families, guest_config, guests, linen_tree, nnx, nnx_survey, paths
from jaxadapt.adapter import CONFIG_NODE, Adapter, is_array
from jaxadapt.configs import Config, LoraConfig
from jaxadapt.dialect import Dialect, is_like
from jaxadapt.errors import KeyMapError, MismatchError
from jaxadapt.guests import Guests, Half, Placed
from jaxadapt.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.plan import Encoded

Leaves = dict[str, Any]
Put = Callable[[Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Found:
    """A tree with LoRA leaves of a known dialect: the leaves, how to put others there, and the base's shapes.

    `stored` is the alpha of each base leaf, where the tree has it; `sizes` are those of axes that somebody gave.
    """

    tree: Any
    dialect: Dialect
    leaves: Leaves
    put: Put
    base: dict[str, tuple[int, ...]]
    stored: dict[str, float]
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])

    @property
    def arrays(self) -> dict[str, tuple[int, ...]]:
        return {path: tuple(leaf.shape) for path, leaf in self.leaves.items()}


def find(tree: Any) -> Found | None:
    """The LoRA leaves of another library in a tree; None if it has none that a dialect knows.

    Raises `KeyMapError` where a dialect knows some of them and not all.
    """
    leaves, put = _opened(tree)
    like = {path for path in leaves if is_like(path)}
    if not like or not any(d.claim(leaves) for d in dialects.DIALECTS.values()):
        return None
    dialect = dialects.recognise(leaves)
    assert dialect is not None
    mine = {path for pairs in dialect.claim(leaves).values() for a, b, _ in pairs for path in (a, b)}
    base = {dialect.base(path): tuple(leaf.shape) for path, leaf in leaves.items() if path not in mine}
    return Found(tree, dialect, {p: leaf for p, leaf in leaves.items() if p in mine}, put, base, _alphas(tree))


def unknown(tree: Any) -> str:
    """What to say of LoRA-like leaves that no dialect knows; "" if there are none."""
    like = [path for path in _opened(tree)[0] if is_like(path)]
    if not like:
        return ""
    known = ", ".join(dialects.DIALECTS)
    return f"\nIts leaves that look like a LoRA's are of no known dialect ({known}):\n{paths.listing(like)}"


def survey(found: Found, keymap: KeyMap | str | None, keys: Collection[str] = ()) -> Guests:
    """The tree's LoRA leaves under a family's table (recognised, without `keymap`), spelt as in a file's `keys`."""
    leaves = found.dialect.claim(found.leaves)
    table = _table(found, keymap).spelt_as([key.removeprefix(PEFT_PREFIX) for key in keys], leaves)
    if isinstance(found.tree, nnx.nnx.Module):
        claimed = found.dialect.claim(found.leaves)
        lines = nnx_survey.class_lines(nnx.base_leaves(found.tree), table)
        table = table.with_lines(line for line in lines if line.leaf in claimed)
    return guests.survey(found.dialect, table, found.arrays, found.base, found.stored, found.sizes)


def _table(found: Found, keymap: KeyMap | str | None) -> KeyMap:
    if isinstance(keymap, KeyMap) or keymap not in (None, "auto"):
        return families.resolve(keymap, {})
    leaves = list(found.dialect.claim(found.leaves))
    if any(leaf in found.base for leaf in leaves):
        return families.resolve(keymap, found.base)
    return families.of_leaves(leaves)  # only the LoRA leaves are at hand


# ---------------------------------------------------------------- out


def take(
    found: Found, config: Config | None, keymap: KeyMap | str | None, lora_alpha: float | None, call: str
) -> tuple[LoraConfig, Guests, Encoded]:
    """The tree's LoRA as PEFT's tensors, each made when it is asked for, with the configuration that goes with them."""
    known = survey(found, keymap)
    if not known.keymap.proved:
        warnings.warn(
            f"the table {known.keymap.name!r} is not proved against the real models: compare the outputs in PyTorch"
            " before you rely on what it names",
            stacklevel=4,
        )
    config = guest_config.infer(known, config, lora_alpha, call)
    host = not any(isinstance(leaf, Tracer) for leaf in found.leaves.values())
    return config, known, known.plan.encode(found.leaves, host=host)


def extract(
    found: Found, config: Config | None, keymap: KeyMap | str | None, lora_alpha: float | None
) -> Adapter:
    """The tree's LoRA as an adapter in our layout: one A for each fused part, every axis apart."""
    config, known, tensors = take(found, config, keymap, lora_alpha, "extract(tree")
    shapes = {g.site.leaf: shape for g in known.guests if (shape := g.base_shape) is not None}
    lost = [g.site.leaf for g in known.guests if g.base_shape is None]
    if lost:
        raise KeyMapError(
            "the shapes of these weights do not follow from their LoRA leaves alone; give the whole tree, or use"
            f" to_peft, which needs less:\n{paths.listing(lost)}"
        )
    bounds = bind.select(config, known.keymap, shapes)
    leaves = bind.file_plan(bounds).decode(tensors)
    return Adapter(config, paths.unflatten(leaves), known.keymap)


# ---------------------------------------------------------------- in


def put(
    found: Found,
    config: Config,
    tensors: Mapping[str, Any],
    *,
    keymap: KeyMap | str | None = None,
    lora_alpha: float | None = None,
    on_shared: str | None = None,
    dtype: Any = None,
    source: str = "the file",
    call: str = "load(path, tree",
) -> Any:
    """The tree with a file's tensors in its LoRA leaves (NNX in place). Nothing is changed unless all of it fits.

    Where the file adapts fewer modules, or a smaller rank, than the tree has room for, B is zero and A stays.
    """
    if on_shared not in (None, "concat"):
        raise MismatchError(f'on_shared: expected None or "concat", found {on_shared!r}')
    known = survey(found, keymap, tensors)
    ratios = guest_config.ratios(known, config, lora_alpha, call)
    shapes = {key: tuple(spec.shape) for key, spec in _specs(tensors).items()}
    guests.check(known, ratios, shapes, source)
    values = {key: tensors[key] for half in _halves(known) for key in half.keys if key in shapes}
    traced = any(isinstance(x, Tracer) for x in [*values.values(), *found.leaves.values()])
    if traced and on_shared is None and any(half.shared > 1 for half in _halves(known)):
        raise MismatchError(
            f'inside jit nobody can tell whether two As are equal; pass on_shared="concat", or put them into the'
            f" {found.dialect.name} tree outside"
        )
    placed = guests.fill(known, values, ratios, on_shared == "concat", _never if traced else same)
    # Where the file says nothing B is zero, so A may stay as it is, and can be trained; not so beside a shared B.
    kept = {guest.a.path for guest in known.guests if guest.b.shared == 1}
    dtypes = _dtypes(found, placed, dtype, source)
    rounded = guest_config.inexact(ratios)
    if rounded is not None:
        warnings.warn(
            f"{source}: its scale is {rounded:g} times that of the {found.dialect.name} tree, which no power of two is:"
            " B is multiplied by it and rounded once",
            stacklevel=4,
        )
    new = {
        path: _like(found.leaves[path], _build(half, found.leaves[path], where, path in kept, dtypes[path], traced))
        for path, (half, where) in placed.items()
    }
    return found.put(new)


def _halves(known: Guests) -> list[Half]:
    return [half for guest in known.guests for half in (guest.a, guest.b)]


def _specs(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    return tensors.specs if isinstance(tensors, Encoded) else tensors


def same(a: Any, b: Any) -> bool:
    """Bit for bit, so that a NaN equals itself and 0.0 is not -0.0."""
    x, y = np.asarray(a), np.asarray(b)
    return x.dtype == y.dtype and x.tobytes() == y.tobytes()


def _never(a: Any, b: Any) -> bool:
    return a is b


def _dtypes(found: Found, placed: Mapping[str, tuple[Half, Placed]], dtype: Any, source: str) -> dict[str, Any]:
    """The dtype each array will have: the tree's own, which must hold the file's numbers exactly."""
    out: dict[str, Any] = {}
    lossy: list[str] = []
    for path, (_, where) in placed.items():
        own = np.dtype(found.leaves[path].dtype)
        out[path] = own if dtype is None else np.dtype(dtype)
        given = {np.dtype(tensor.dtype) for tensor, _, _ in where.values()}
        lossy += [f"{path}: {own.name}, in the file {d.name}" for d in given if jnp.promote_types(d, own) != own]
    if lossy and dtype is None:
        raise MismatchError(
            f"{source}: the target's LoRA leaves cannot hold these numbers exactly; pass dtype= to say what they shall"
            f" be, rounded where need be:\n{paths.listing(lossy)}"
        )
    return out


def _build(half: Half, current: Any, where: Placed, keep: bool, dtype: Any, traced: bool) -> Any:
    """The new array, in the tree's own shape; zero, or what it was, where nothing is placed."""
    keep = keep and is_array(current) and not isinstance(current, jax.ShapeDtypeStruct)
    if traced:
        out: Any = jnp.asarray(current, dtype).reshape(half.shape) if keep else jnp.zeros(half.shape, dtype)
    else:
        out = np.array(current, dtype).reshape(half.shape) if keep else np.zeros(half.shape, dtype)
    done: set[tuple[int, int]] = set()
    for i, (tensor, rows, factor) in where.items():
        spot = (i // half.shared, rows.start)
        if spot in done:  # the same tensor again, for another sharer
            continue
        done.add(spot)
        piece = half.form.unit(rows.stop - rows.start).decode(tensor if traced else np.asarray(tensor))
        if factor != 1.0:  # rounded once, if at all
            wide = np.dtype(np.float32 if traced else np.float64)
            piece = piece.astype(wide) * wide.type(factor)
        index = list(half.form.index(i))
        index[half.form.rank] = rows
        if traced:
            out = out.at[tuple(index)].set(piece.astype(dtype))
        else:
            out[tuple(index)] = piece.astype(dtype)
    return out.reshape(half.form.packed)


def _like(leaf: Any, value: Any) -> Any:
    """The value where the leaf was: on its devices, if it is on any."""
    if isinstance(value, Tracer):
        return value
    placed = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not isinstance(leaf, Tracer)
    return jax.device_put(value, leaf.sharding if placed else None)


# ---------------------------------------------------------------- trees


def _opened(tree: Any) -> tuple[Leaves, Put]:
    """`{dotted path: array}` of a tree, boxes opened, and a function that gives the tree with other leaves."""
    if isinstance(tree, nnx.nnx.Module | nnx.nnx.State):
        return _opened_nnx(tree)
    if isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping):
        leaves, put = _opened_tree(tree["params"])
        return leaves, lambda new: {**tree, "params": put(new)}
    return _opened_tree(tree)


def _opened_nnx(tree: Any) -> tuple[Leaves, Put]:
    module = isinstance(tree, nnx.nnx.Module)
    state = nnx.nnx.state(tree, nnx.nnx.Param) if module else tree
    flat = {paths.join(*map(str, path)): var for path, var in nnx.nnx.to_flat_state(state)}
    ours = {p for p, var in flat.items() if isinstance(var, nnx.AdapterParam)}
    held = {
        p: var.get_value() if isinstance(var, nnx.nnx.Variable) else var for p, var in flat.items() if p not in ours
    }
    leaves = {p: leaf for p, leaf in held.items() if is_array(leaf)}

    def put(new: Mapping[str, Any]) -> Any:
        plain = [p for p in new if not isinstance(flat[p], nnx.nnx.Variable)]
        if plain:
            raise MismatchError(
                "a pure state holds its arrays by value; put them into the model, or into nnx.state(model):\n"
                + paths.listing(plain)
            )
        for path, value in new.items():
            flat[path].set_value(value)
        return tree

    return leaves, put


def _is_box(node: Any) -> bool:
    return isinstance(node, linen_tree.meta.AxisMetadata | nnx.nnx.Variable)


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


def _alphas(tree: Any) -> dict[str, float]:
    """`{base leaf: alpha}` of the weights that carry theirs."""
    if isinstance(tree, nnx.nnx.Module | nnx.nnx.State):
        return {}
    params = tree["params"] if isinstance(tree, Mapping) and isinstance(tree.get("params"), Mapping) else tree
    return {path: float(node.alpha) for path, node in _lorax(params).items()}


def _opened_tree(tree: Any) -> tuple[Leaves, Put]:
    if isinstance(tree, Mapping) and CONFIG_NODE in tree:
        return {}, lambda new: tree  # the tree of an adapter of ours
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_box)
    lorax = _lorax(tree)
    names: list[str] = []
    for keys, _ in flat:
        inside = _path(keys[:-1]) in lorax
        names.append(".".join([_path(keys[:-1]), "LoraWeight", _name(keys[-1])]) if inside else _path(keys))
    leaves: Leaves = {}
    for name, (_, node) in zip(names, flat, strict=True):
        value = _unboxed(node)
        if is_array(value):
            leaves[name] = value

    def put(new: Mapping[str, Any]) -> Any:
        nodes: Sequence[Any] = [
            _reboxed(node, new[name]) if name in new else node for name, (_, node) in zip(names, flat, strict=True)
        ]
        return jax.tree_util.tree_unflatten(structure, nodes)

    return leaves, put


def _unboxed(node: Any) -> Any:
    if isinstance(node, linen_tree.meta.AxisMetadata):
        return node.unbox()
    return node.get_value() if isinstance(node, nnx.nnx.Variable) else node


def _reboxed(node: Any, value: Any) -> Any:
    if isinstance(node, linen_tree.meta.AxisMetadata):
        return node.replace_boxed(value)
    return node.replace(value) if isinstance(node, nnx.nnx.Variable) else value


__all__ = ["Found", "extract", "find", "put", "same", "survey", "take", "unknown"]
