"""What a training run holds, as named arrays and plain values, and back.

    model, opt_state, rng, data ──take──► {"adapter/default/q.kernel.lora_A": array, "opt_state/0/count": …}
                                ◄─fill──

Nothing here knows files. The adapter's names are its dotted paths, so that Linen and NNX spell it alike; every other
part is a pytree (an NNX object stands for its state) whose names are its key paths.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt import attach, dialects, foreign, nnx, paths
from jaxadapt.adapter import Adapter, Recipe
from jaxadapt.errors import AttachError, FormatError, MismatchError

Specs = Mapping[str, tuple[tuple[int, ...], str]]
"""`{name: (shape, dtype name)}` of stored arrays."""

PARTS = ("opt_state", "rng", "data")
# Not of a model's changing state: parameters (the base stays, adapters are saved apart), and what lives within
# one call, in which a step leaves nothing that the next one reads.
_NOT_STATE = (nnx.nnx.Param, nnx.nnx.Intermediate, nnx.nnx.Cache, nnx.nnx.Perturbation)
_NOT_STATE_COLLECTIONS = {"params", "intermediates", "cache", "perturbations"}


@dataclasses.dataclass(frozen=True)
class Taken:
    """The content of one checkpoint: arrays by name, and everything else as JSON.

    Args:
        arrays: as they are on the device; typed random keys as their key data.
        recipes: `{adapter name: Recipe.to_text()}`.
        guest: of a tree with another library's LoRA leaves, which are saved as they are: what tells how to read them.
        values: leaves that are no arrays, `{name: [type, JSON value]}`.
        keys: `{name: implementation}` of the arrays that are random keys.
        hosts: the names of the arrays that were numpy's.
        plain: the parts made of dicts, lists and tuples only, as `[kind, …]`: no example is needed to rebuild these.
    """

    arrays: dict[str, Any]
    recipes: dict[str, str]
    guest: dict[str, Any]
    values: dict[str, Any]
    keys: dict[str, str]
    hosts: list[str]
    plain: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All but the arrays."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "arrays"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: str) -> Taken:
        """The inverse of `to_json`, without arrays. Raises `FormatError` if it is none."""
        kinds = {f.name: list if f.name == "hosts" else dict for f in dataclasses.fields(cls) if f.name != "arrays"}
        wrong = [name for name, kind in kinds.items() if not isinstance(data.get(name), kind)]
        if wrong:
            raise FormatError(f"{source}: not a checkpoint of this library: {', '.join(wrong)} missing or damaged")
        return cls(arrays={}, **{name: data[name] for name in kinds})

    @property
    def parts(self) -> set[str]:
        """The parts that were saved besides the model."""
        return set(self.plain)


# ---------------------------------------------------------------- out


def take(model: Any, parts: Mapping[str, Any]) -> Taken:
    """What there is to save of a model (what `extract` takes) and of `parts`, each a pytree, an NNX object or None.

    Raises `AttachError` for leaves that cannot be saved, all of them together.
    """
    taken = Taken({}, {}, {}, {}, {}, [], {})
    problems: list[str] = []
    guest = _guest(model)
    if guest is not None:
        base = {path: list(shape) for path, shape in guest.base.items()}
        taken.guest.update(dialect=guest.dialect.name, base=base, stored=guest.stored)
        for path, leaf in guest.leaves.items():
            _add(taken, f"guest/{path}", leaf, problems)
    for name in [] if guest is not None else adapter_names(model):
        adapter = attach.extract(model, name)
        taken.recipes[name] = adapter.recipe.to_text()
        for path, leaf in adapter.flat().items():
            _add(taken, f"adapter/{name}/{path}", leaf, problems)
    for name, leaf in _named("model", rest(model)):
        _add(taken, name, leaf, problems)
    for part, tree in parts.items():
        if tree is not None:
            taken.plain[part] = _plain(tree)
            for name, leaf in _named(part, tree):
                _add(taken, name, leaf, problems)
    if problems:
        raise AttachError("these cannot be saved:\n" + paths.listing(problems))
    return taken


def _guest(model: Any) -> foreign.Found | None:
    return None if isinstance(model, Adapter) else attach.guest_in(model)


def adapter_names(model: Any) -> list[str]:
    """The names of all adapters a model, state, variables or `Adapter` carries; ["default"] if it cannot tell."""
    if isinstance(model, nnx.nnx.Module | nnx.nnx.State):
        return sorted(nnx.variables(model)) or [attach.DEFAULT]
    if isinstance(model, Mapping):
        return attach.names_in(model) or [attach.DEFAULT]
    return [attach.DEFAULT]


def rest(model: Any) -> Any:
    """What training changes in a model besides its adapters: random streams, batch statistics, …; never the base."""
    if isinstance(model, nnx.nnx.Module | nnx.nnx.State):
        state = nnx.nnx.state(model) if isinstance(model, nnx.nnx.Module) else model
        return nnx.nnx.filter_state(state, nnx.nnx.Not(nnx.nnx.Any(*_NOT_STATE)))
    if isinstance(model, Mapping) and (ours := attach.collections_in(model)):
        return {k: v for k, v in model.items() if k not in _NOT_STATE_COLLECTIONS and k not in ours}
    return {}


def _object(tree: Any) -> TypeGuard[Any]:
    """Whether a tree is an NNX object (an optimizer, random streams, a model), which is filled in place."""
    return isinstance(tree, nnx.nnx.Pytree)


def _flatten(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """`[(path, leaf)]` and the structure. The segments of a path are escaped, so no two leaves share one."""
    held = nnx.nnx.state(tree) if _object(tree) else tree
    try:
        leaves, structure = jax.tree_util.tree_flatten_with_path(held)
    except ValueError as error:  # numbers and strings as keys of one dict, say
        raise AttachError(f"JAX cannot take this tree apart: {error}") from error
    return [("/".join(map(_segment, path)), leaf) for path, leaf in leaves], structure


def _segment(entry: Any) -> str:
    match entry:
        case jax.tree_util.DictKey():
            return _quoted(str(entry.key))
        case jax.tree_util.SequenceKey():
            return str(entry.idx)
        case jax.tree_util.GetAttrKey():
            return _quoted(entry.name)
        case jax.tree_util.FlattenedIndexKey():
            return _quoted(str(entry.key))
        case _:
            return _quoted(str(entry))


@functools.lru_cache(4096)  # an adapter has thousands of leaves, and few names; the loop stands still meanwhile
def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe=" ()[]',:")


def _named(part: str, tree: Any) -> list[tuple[str, Any]]:
    found = [(f"{part}/{path}" if path else part, leaf) for path, leaf in _flatten(tree)[0]]
    if len({name for name, _ in found}) < len(found):
        raise AttachError(f"{part}: two leaves have the same path; give the nodes of its pytrees distinct keys")
    return found


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed random keys."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and jnp.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def is_on_device(leaf: Any) -> TypeGuard[Any]:
    """Whether a leaf is a JAX array of numbers (or stands for one), not of random keys."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not is_key(leaf)


def _add(taken: Taken, name: str, leaf: Any, problems: list[str]) -> None:
    if isinstance(leaf, Tracer):
        problems.append(f"{name}: traced; save outside jit, grad and vmap")
    elif isinstance(leaf, jax.Array) and leaf.is_deleted():
        problems.append(f"{name}: deleted: it was donated to a jitted function")
    elif is_key(leaf):
        taken.keys[name] = str(jax.random.key_impl(leaf))
        taken.arrays[name] = jax.random.key_data(leaf)
    elif isinstance(leaf, jax.Array):
        taken.arrays[name] = leaf
    elif isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind not in "OSUMm":
        taken.arrays[name] = leaf
        taken.hosts.append(name)
    elif isinstance(leaf, bytes):
        taken.values[name] = ["bytes", base64.b64encode(leaf).decode()]
    elif type(leaf) is complex:
        taken.values[name] = ["complex", [leaf.real, leaf.imag]]
    elif type(leaf) in (bool, int, float, str):
        taken.values[name] = [type(leaf).__name__, leaf]
    else:
        problems.append(f"{name}: {type(leaf).__name__}; expected arrays, numbers, strings or bytes")


_VALUES: dict[str, Callable[[Any], Any]] = {
    "bytes": base64.b64decode,
    "complex": lambda pair: complex(*pair),
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
}


def _value(name: str, stored: Any) -> Any:
    try:
        kind, value = stored
        return _VALUES[kind](value)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{name}: this is no saved value: {stored!r}") from error


def _plain(tree: Any) -> Any:
    """The structure of a tree of dicts, lists, tuples and leaves as JSON; None where there is more to it."""
    if type(tree) is dict:
        inner = [(k, _plain(v)) for k, v in tree.items()]
        known = all(type(k) in (str, int) and v is not None for k, v in inner)
        return ["dict", [[k, v] for k, v in inner]] if known else None
    if type(tree) in (list, tuple):
        inner = [_plain(v) for v in tree]
        return [type(tree).__name__, inner] if None not in inner else None
    if tree is None:
        return ["none"]
    return ["leaf"] if jax.tree_util.all_leaves([tree]) and not _object(tree) else None


def guest_of(stored: Taken, leaves: Mapping[str, Any]) -> foreign.Found:
    """The tree of another library that was saved, without the tree: enough to name its tensors for PEFT."""
    try:
        dialect = dialects.named(stored.guest["dialect"])
        base = {path: tuple(shape) for path, shape in stored.guest["base"].items()}
        return foreign.Found(None, dialect, dict(leaves), lambda new: new, base, dict(stored.guest["stored"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"what the checkpoint says of its tree is damaged: {error}") from error


# ---------------------------------------------------------------- back in


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint, back in place.

    Args:
        step: the step it was saved at.
        model: what was given: NNX models and states in place, Linen variables and `Adapter`s anew.
        opt_state, rng, data: as they were saved; None where there was none.
        metrics: as given to `save`.
    """

    step: int
    model: Any
    opt_state: Any
    rng: Any
    data: Any
    metrics: dict[str, float]


Read = Callable[[Mapping[str, Any]], dict[str, Any]]
"""`{name: example leaf}` -> `{name: value}`, each with the example's sharding; None as an example: a numpy array."""


def fill(model: Any, parts: Mapping[str, Any], stored: Taken, specs: Specs, read: Read, source: str) -> dict[str, Any]:
    """`{"model": …, part: …}` with the stored values; nothing is changed unless everything fits.

    Raises `MismatchError` naming all that is missing, unexpected, or of another shape or dtype, and `AttachError`
    where an adapter's configuration is another.
    """
    wanted: dict[str, Any] = {}
    problems: list[str] = []
    guest = _guest(model)
    if (guest.dialect.name if guest else None) != stored.guest.get("dialect"):
        held, saved = (f"{what} LoRA leaves" if what else "an adapter of this library" for what in (
            guest.dialect.name if guest else None, stored.guest.get("dialect")))  # fmt: skip
        problems.append(f"{saved} saved, the target has {held}")
    elif guest is not None:
        wanted |= {f"guest/{path}": leaf for path, leaf in guest.leaves.items()}
    for name, text in stored.recipes.items():
        recipe = Recipe.from_text(text)
        if name not in adapter_names(model):
            problems.append(f"the adapter {name!r} is saved; the target has {adapter_names(model)}: adapt it first")
            continue
        mine = attach.extract(model, name)
        if mine.config != recipe.config:
            problems.append(f"the adapter {name!r} has another configuration; adapt with that of the checkpoint")
        wanted |= {f"adapter/{name}/{path}": leaf for path, leaf in mine.flat().items()}
    others = rest(model)
    wanted |= dict(_named("model", others))
    for part in PARTS:
        if parts.get(part) is not None:
            if part not in stored.parts:
                problems.append(f"{part}: none was saved")
            wanted |= dict(_named(part, parts[part]))
        elif part in stored.parts:
            if stored.plain[part] is None:
                problems.append(f"{part}: saved as more than dicts, lists and tuples; give {part}= an example to fill")
            wanted |= {name: None for name in [*specs, *stored.values] if name.partition("/")[0] == part}
    problems += _misfits(wanted, stored, specs)
    if problems:
        raise MismatchError(f"{source} does not fit:\n" + paths.listing(problems, 16))

    arrays = read({name: leaf for name, leaf in wanted.items() if name in specs})
    values = {name: arrays[name] if name in arrays else _value(name, stored.values[name]) for name in wanted}
    values = {n: jnp.asarray(v) if wanted[n] is None and n in arrays and n not in stored.hosts else v
              for n, v in values.items()}  # fmt: skip
    values |= {n: _wrapped(values[n], stored.keys[n], wanted[n]) for n in values.keys() & stored.keys.keys()}
    out: dict[str, Any] = {"model": _filled_model(model, others, stored, values)}
    for part in PARTS:
        example = parts.get(part)
        if example is not None:
            out[part] = _filled(part, example, values)
        elif part in stored.parts:
            out[part] = _rebuilt(part, stored.plain[part], values)
    return out


def _misfits(wanted: Mapping[str, Any], stored: Taken, specs: Specs) -> Iterable[str]:
    have = {**specs, **stored.values}
    yield from (f"{name}: not in the checkpoint" for name in wanted if name not in have)
    yield from (f"{name}: in the checkpoint, not in the target" for name in have if name not in wanted)
    for name, leaf in wanted.items():
        if leaf is None or name not in have:
            continue
        kind = stored.keys.get(name, "") if name in specs else stored.values[name][0]
        is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
        if is_array != (name in specs):
            yield f"{name}: {kind or 'an array'} saved, {type(leaf).__name__} expected"
        elif is_key(leaf) != (name in stored.keys):
            yield f"{name}: {kind or 'an array'} saved, {'a random key' if is_key(leaf) else 'an array'} expected"
        elif is_array and not is_key(leaf):
            shape, dtype = specs[name]
            if (shape, dtype) != (tuple(leaf.shape), np.dtype(leaf.dtype).name):
                yield f"{name}: {dtype} {shape} saved, {np.dtype(leaf.dtype).name} {tuple(leaf.shape)} expected"
        elif is_key(leaf) and specs[name][0][: len(leaf.shape)] != tuple(leaf.shape):
            yield f"{name}: keys {specs[name][0]} saved, {tuple(leaf.shape)} expected"


def _wrapped(data: Any, implementation: str, like: Any) -> jax.Array:
    keys = jax.random.wrap_key_data(jnp.asarray(data), impl=implementation)
    return keys if like is None or not is_committed(like) else jax.device_put(keys, like.sharding)


def is_committed(like: Any) -> bool:
    """Whether an example leaf says on which devices its value must lie."""
    if isinstance(like, jax.ShapeDtypeStruct):
        return like.sharding is not None
    return isinstance(like, jax.Array) and bool(like.committed)


def weak(value: Any, like: Any) -> Any:
    """The value with the example's weak type, which decides what dtype further arithmetic has."""
    if is_on_device(like) and like.weak_type and isinstance(value, jax.Array):
        scalar = {"f": 0.0, "i": 0, "c": 0j}[value.dtype.kind]
        return jnp.full(value.shape, scalar).at[...].set(value)
    return value


def _filled(part: str, example: Any, values: Mapping[str, Any]) -> Any:
    named, structure = _flatten(example)
    leaves = [weak(values[f"{part}/{path}" if path else part], leaf) for path, leaf in named]
    tree = jax.tree.unflatten(structure, leaves)
    if not _object(example):
        return tree
    nnx.nnx.update(example, tree)
    return example


def _filled_model(model: Any, others: Any, stored: Taken, values: Mapping[str, Any]) -> Any:
    for name, text in stored.recipes.items():
        begin = f"adapter/{name}/"
        flat = {n.removeprefix(begin): v for n, v in values.items() if n.startswith(begin)}
        recipe = Recipe.from_text(text)
        adapter = Adapter(recipe.config, paths.unflatten(flat), recipe.keymap)
        if isinstance(model, Adapter):
            model = dataclasses.replace(adapter, keymap=model.keymap)
        else:
            model = attach.inject(adapter, model, name)
    if stored.guest:
        guest = _guest(model)
        assert guest is not None
        flat = {n.removeprefix("guest/"): v for n, v in values.items() if n.startswith("guest/")}
        model = guest.put(flat)
    others = _filled("model", others, values)
    if isinstance(model, nnx.nnx.Module):
        nnx.nnx.update(model, others)
    elif isinstance(model, nnx.nnx.State):
        nnx.nnx.replace_by_pure_dict(model, nnx.nnx.to_pure_dict(others))
    elif isinstance(model, Mapping):
        model = {**model, **others}
    return model


def _rebuilt(part: str, plain: Any, values: Mapping[str, Any]) -> Any:
    """A tree from its stored structure and the values by path."""

    def build(node: Any, path: str) -> Any:
        kind, *inner = node
        match kind:
            case "dict":
                return {k: build(v, f"{path}/{_segment(jax.tree_util.DictKey(k))}") for k, v in inner[0]}
            case "list" | "tuple":
                items = [build(v, f"{path}/{i}") for i, v in enumerate(inner[0])]
                return tuple(items) if kind == "tuple" else items
            case "none":
                return None
            case _:
                return values[path]

    try:
        return build(plain, part)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{part}: its stored structure is damaged: {error}") from error
