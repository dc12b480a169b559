"""A checkpoint back in place: what `snapshot.take_snapshot` took, into what training goes on with."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters.adapter import Adapter, Recipe
from jaxadapt.core import paths
from jaxadapt.core.errors import FormatError, MismatchError
from jaxadapt.models import attachment
from jaxadapt.models.foreign import dialects
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.models.linen import collections
from jaxadapt.models.nnx import attach as nnx
from jaxadapt.training.checkpoint.snapshot import (
    PARTS,
    Snapshot,
    Specs,
    adapter_names,
    find_foreign,
    flatten,
    is_committed,
    is_key,
    is_object,
    is_on_device,
    name_prefix,
    named_leaves,
    other_state,
    segment,
)


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


def fill_parts(
    model: Any, parts: Mapping[str, Any], stored: Snapshot, specs: Specs, read: Read, source: str
) -> dict[str, Any]:
    """`{"model": …, part: …}` with the stored values; nothing is changed unless everything fits.

    Raises `MismatchError` naming all that is missing, unexpected, or of another shape or dtype, and `AttachError`
    where an adapter's configuration is another.
    """
    wanted: dict[str, Any] = {}
    problems: list[str] = []
    guest = find_foreign(model)
    if (guest.dialect.name if guest else None) != stored.foreign.get("dialect"):
        held, saved = (f"{what} LoRA leaves" if what else "an adapter of this library" for what in (
            guest.dialect.name if guest else None, stored.foreign.get("dialect")))  # fmt: skip
        problems.append(f"{saved} saved, the target has {held}")
    elif guest is not None:
        wanted |= {f"guest/{path}": leaf for path, leaf in guest.leaves.items()}
    for name, text in stored.recipes.items():
        recipe = Recipe.from_text(text)
        if name not in adapter_names(model):
            problems.append(f"the adapter {name!r} is saved; the target has {adapter_names(model)}: adapt it first")
            continue
        mine = attachment.extract(model, name)
        if mine.config != recipe.config:
            problems.append(f"the adapter {name!r} has another configuration; adapt with that of the checkpoint")
        wanted |= {name_prefix(name) + path: leaf for path, leaf in mine.flat().items()}
    others = other_state(model)
    wanted |= dict(named_leaves("model", others))
    for part in PARTS:
        if parts.get(part) is not None:
            if part not in stored.parts:
                problems.append(f"{part}: none was saved")
            wanted |= dict(named_leaves(part, parts[part]))
        elif part in stored.parts:
            if stored.plain[part] is None:
                problems.append(
                    f"{part}: saved as more than dicts, lists and tuples; give {part}= an example to fill, or"
                    " model_only=True to read the model alone"
                )
            wanted |= {name: None for name in [*specs, *stored.values] if name.partition("/")[0] == part}
    problems += _misfits(wanted, stored, specs)
    hosts = set(stored.hosts)
    for name, leaf in wanted.items():
        onto = name in specs and (name not in hosts if leaf is None else is_on_device(leaf))
        if onto and jax.dtypes.canonicalize_dtype(dtype := jnp.dtype(specs[name][1])) != dtype:
            problems.append(f"{name}: {dtype.name} saved, which JAX has with jax_enable_x64 alone")
    if problems:
        raise MismatchError(f"{source} does not fit:\n" + paths.bullets(problems, 16))

    arrays = read({name: leaf for name, leaf in wanted.items() if name in specs})
    values = {name: arrays[name] if name in arrays else _value(name, stored.values[name]) for name in wanted}
    values = {n: jnp.asarray(v) if wanted[n] is None and n in arrays and n not in hosts else v
              for n, v in values.items()}  # fmt: skip
    values |= {n: _wrapped(values[n], stored.keys[n], wanted[n]) for n in values.keys() & stored.keys.keys()}
    given = {part: example for part in PARTS if (example := parts.get(part)) is not None}
    # First what may turn out to be damaged: models and optimizers are filled in place.
    out = {part: _rebuilt(part, stored.plain[part], values) for part in PARTS if part in stored.parts - given.keys()}
    out["model"] = _filled_model(model, others, stored, values)
    return out | {part: _filled(part, example, values) for part, example in given.items()}


def _misfits(wanted: Mapping[str, Any], stored: Snapshot, specs: Specs) -> Iterable[str]:
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


def with_weak_type(value: Any, like: Any) -> Any:
    """The value with the example's weak type, which decides what dtype further arithmetic has."""
    if is_on_device(like) and like.weak_type and isinstance(value, jax.Array):
        scalar = {"f": 0.0, "i": 0, "c": 0j}[value.dtype.kind]
        return jnp.full(value.shape, scalar).at[...].set(value)
    return value


def _filled(part: str, example: Any, values: Mapping[str, Any]) -> Any:
    held, structure = flatten(example)
    leaves = [with_weak_type(values[f"{part}/{path}" if path else part], leaf) for path, leaf in held]
    tree = jax.tree.unflatten(structure, leaves)
    if not is_object(example):
        return tree
    nnx.nnx.update(example, tree)
    return example


def _filled_model(model: Any, others: Any, stored: Snapshot, values: Mapping[str, Any]) -> Any:
    for name, text in stored.recipes.items():
        begin = name_prefix(name)
        flat = {n.removeprefix(begin): v for n, v in values.items() if n.startswith(begin)}
        recipe = Recipe.from_text(text)
        adapter = Adapter(recipe.config, paths.unflatten(flat), recipe.keymap)
        if isinstance(model, Adapter):
            params = collections.refilled(model.params, flat)
            model = dataclasses.replace(adapter, params=params, keymap=model.keymap)
        else:
            model = attachment.inject(adapter, model, name)
    if stored.foreign:
        guest = find_foreign(model)
        assert guest is not None
        flat = {n.removeprefix("guest/"): v for n, v in values.items() if n.startswith("guest/")}
        model = guest.put(flat)
    others = _filled("model", others, values)
    if isinstance(model, nnx.nnx.Module):
        nnx.nnx.update(model, others)
    elif isinstance(model, nnx.nnx.State):
        nnx.nnx.replace_by_pure_dict(model, nnx.nnx.to_pure_dict(others))
    elif isinstance(model, Mapping):
        made: Any = type(model)
        model = made({**model, **others})
    return model


def _rebuilt(part: str, plain: Any, values: Mapping[str, Any]) -> Any:
    """A tree from its stored structure and the values by path."""
    try:
        return _built(plain, part, values)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{part}: its stored structure is damaged: {error}") from error


def _built(node: Any, path: str, values: Mapping[str, Any]) -> Any:
    kind, *inner = node
    match kind:
        case "dict":
            return {k: _built(v, f"{path}/{segment(jax.tree_util.DictKey(k))}", values) for k, v in inner[0]}
        case "list" | "tuple":
            items = [_built(v, f"{path}/{i}", values) for i, v in enumerate(inner[0])]
            return tuple(items) if kind == "tuple" else items
        case "none":
            return None
        case _:
            return values[path]


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


def stored_foreign_tree(stored: Snapshot, leaves: Mapping[str, Any]) -> foreign.ForeignTree:
    """The tree of another library that was saved, without the tree: enough to name its tensors for PEFT."""
    try:
        dialect = dialects.get_dialect(stored.foreign["dialect"])
        base = {path: tuple(shape) for path, shape in stored.foreign["base"].items()}
        return foreign.ForeignTree(None, dialect, dict(leaves), lambda new: new, base, dict(stored.foreign["stored"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"what the checkpoint says of its tree is damaged: {error}") from error
