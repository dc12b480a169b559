"""Restoring of checkpoints: fill a model and other training state from the arrays of a snapshot."""

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
from jaxadapt.core.compare import Spec, compare
from jaxadapt.core.errors import FormatError, MismatchError, raise_listed
from jaxadapt.models.carriers import Carrier, carrier, lora_carrier
from jaxadapt.models.foreign import dialects
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.training.checkpoint.snapshot import (
    PARTS,
    Snapshot,
    Specs,
    adapter_names,
    flatten,
    is_committed,
    is_key,
    is_on_device,
    name_prefix,
    named_leaves,
    segment,
)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint.

    Attributes:
        step: the number of the step.
        model: the given NNX model or state, filled in place; Linen variables and `Adapter`s as new values.
        opt_state, rng, data: the saved values; None if there were none.
        metrics: the metrics given to `save`.
    """

    step: int
    model: Any
    opt_state: Any
    rng: Any
    data: Any
    metrics: dict[str, float]


Read = Callable[[Mapping[str, Any]], dict[str, Any]]
"""A function from `{name: example leaf}` to `{name: value}` with the examples' shardings; numpy for None."""


def fill_parts(
    model: Any, parts: Mapping[str, Any], stored: Snapshot, specs: Specs, read: Read, source: str
) -> dict[str, Any]:
    """Return `{"model": …, part: …}` with the stored values. Nothing is changed unless everything fits.

    Args:
        model: the target, as in `CheckpointManager.restore`.
        parts: `{part: example}` to fill.
        stored: the snapshot without its arrays.
        specs: the shapes and dtypes of its arrays.
        read: the function that reads them.
        source: the file's name, for errors.

    Raises:
        MismatchError: values are missing, unexpected or of another shape or dtype, or an adapter has another
            configuration; the message lists all problems.
    """
    examples: dict[str, Any] = {}
    problems: list[str] = []
    held = lora_carrier(model)
    tree = held.foreign
    dialect, stored_dialect = tree.dialect.name if tree else None, stored.foreign.get("dialect")
    if dialect != stored_dialect:
        problems.append(f"{_describe_lora(stored_dialect)} saved, the target has {_describe_lora(dialect)}")
    elif tree is not None:
        examples |= {f"guest/{path}": leaf for path, leaf in tree.leaves.items()}
    for name, text in stored.recipes.items():
        recipe = Recipe.from_text(text)
        if name not in adapter_names(held):
            problems.append(f"the adapter {name!r} is saved; the target has {adapter_names(held)}: attach it first")
            continue
        adapter = held.extract(name)
        if adapter.config != recipe.config:
            problems.append(f"the adapter {name!r} has another configuration; attach it with the checkpoint's")
        examples |= {name_prefix(name) + path: leaf for path, leaf in adapter.flat().items()}
    others = held.rest()
    examples |= dict(named_leaves("model", others))
    for part in PARTS:
        if parts.get(part) is not None:
            if part not in stored.parts:
                problems.append(f"{part}: none was saved")
            examples |= dict(named_leaves(part, parts[part]))
        elif part in stored.parts:
            if stored.plain[part] is None:
                problems.append(
                    f"{part}: saved with nodes other than dicts, lists and tuples; give {part}= an example to fill, or"
                    " restore only the model with model_only=True"
                )
            examples |= {name: None for name in [*specs, *stored.values] if name.partition("/")[0] == part}
    problems += _find_mismatches(examples, stored, specs)
    hosts = set(stored.hosts)
    for name, leaf in examples.items():
        on_device = name in specs and (name not in hosts if leaf is None else is_on_device(leaf))
        if on_device and jax.dtypes.canonicalize_dtype(dtype := jnp.dtype(specs[name][1])) != dtype:
            problems.append(f"{name}: {dtype.name} saved, which JAX supports only with jax_enable_x64")
    raise_listed(
        MismatchError,
        f"{source}: does not fit the target (missing: not in the checkpoint; unexpected: not in the target):",
        problems,
        limit=16,
    )

    arrays = read({name: leaf for name, leaf in examples.items() if name in specs})
    values = {name: arrays[name] if name in arrays else _decode(name, stored.values[name]) for name in examples}
    values = {n: jnp.asarray(v) if examples[n] is None and n in arrays and n not in hosts else v
              for n, v in values.items()}  # fmt: skip
    values |= {n: _wrap_keys(values[n], stored.keys[n], examples[n]) for n in values.keys() & stored.keys.keys()}
    given = {part: example for part in PARTS if (example := parts.get(part)) is not None}
    # Rebuild these parts first: they may be damaged, and the model and given parts are filled in place.
    filled = {part: _rebuild(part, stored.plain[part], values) for part in PARTS if part in stored.parts - given.keys()}
    filled["model"] = _fill_model(held, others, stored, values)
    return filled | {part: _fill_example(part, example, values) for part, example in given.items()}


def _describe_lora(dialect: str | None) -> str:
    return f"{dialect} LoRA leaves" if dialect else "an adapter of jaxadapt"


def _find_mismatches(examples: Mapping[str, Any], stored: Snapshot, specs: Specs) -> Iterable[str]:
    """Yield a description of every value that is missing, unexpected or of another type, shape or dtype."""
    expected = dict.fromkeys(examples, Spec())
    saved = dict.fromkeys(stored.values, Spec()) | {name: Spec(*spec) for name, spec in specs.items()}
    for name, leaf in examples.items():
        if leaf is None or name not in saved:
            continue
        kind = stored.keys.get(name, "") if name in specs else stored.values[name][0]
        is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)
        if is_array != (name in specs):
            yield f"{name}: expected {type(leaf).__name__}, found {kind or 'an array'}"
        elif is_key(leaf) != (name in stored.keys):
            yield f"{name}: expected {'a random key' if is_key(leaf) else 'an array'}, found {kind or 'an array'}"
        elif is_key(leaf):  # the file has further axes, for the data of each key
            sizes = saved[name].shape or ()
            expected[name] = Spec((*leaf.shape, *sizes[len(leaf.shape) :]))
        elif is_array:
            expected[name] = Spec(tuple(leaf.shape), np.dtype(leaf.dtype).name)
    yield from map(str, compare(expected, saved))


def _wrap_keys(data: Any, implementation: str, like: Any) -> jax.Array:
    keys = jax.random.wrap_key_data(jnp.asarray(data), impl=implementation)
    return keys if like is None or not is_committed(like) else jax.device_put(keys, like.sharding)


def with_weak_type(value: Any, like: Any) -> Any:
    """Return the value with the example's weak type, which affects the dtype of further arithmetic."""
    if is_on_device(like) and like.weak_type and isinstance(value, jax.Array):
        scalar = {"f": 0.0, "i": 0, "c": 0j}[value.dtype.kind]
        return jnp.full(value.shape, scalar).at[...].set(value)
    return value


def _fill_example(part: str, example: Any, values: Mapping[str, Any]) -> Any:
    flat, structure = flatten(example)
    leaves = [with_weak_type(values[f"{part}/{path}" if path else part], leaf) for path, leaf in flat]
    return carrier(example).fill(jax.tree.unflatten(structure, leaves))


def _fill_model(held: Carrier, others: Any, stored: Snapshot, values: Mapping[str, Any]) -> Any:
    for name, text in stored.recipes.items():
        prefix = name_prefix(name)
        flat = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
        recipe = Recipe.from_text(text)
        filled = held.inject(Adapter(recipe.config, paths.unflatten(flat), recipe.keymap), name)
        # An `Adapter` also takes the saved fields that equality ignores, such as base_model_name_or_path.
        held = carrier(dataclasses.replace(filled, config=recipe.config) if isinstance(filled, Adapter) else filled)
    if held.foreign is not None:
        filled = held.foreign.put({n.removeprefix("guest/"): v for n, v in values.items() if n.startswith("guest/")})
        held = carrier(filled)
    return held.with_rest(_fill_example("model", others, values))


def _rebuild(part: str, plain: Any, values: Mapping[str, Any]) -> Any:
    """Build a tree from its stored structure and the values by path."""
    try:
        return _build_node(plain, part, values)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{part}: its stored structure is damaged: {error}") from error


def _build_node(node: Any, path: str, values: Mapping[str, Any]) -> Any:
    kind, *inner = node
    match kind:
        case "dict":
            return {k: _build_node(v, f"{path}/{segment(jax.tree_util.DictKey(k))}", values) for k, v in inner[0]}
        case "list" | "tuple":
            items = [_build_node(v, f"{path}/{i}", values) for i, v in enumerate(inner[0])]
            return tuple(items) if kind == "tuple" else items
        case "none":
            return None
        case _:
            return values[path]


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "bytes": base64.b64decode,
    "complex": lambda pair: complex(*pair),
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
}


def _decode(name: str, stored: Any) -> Any:
    try:
        kind, value = stored
        return _DECODERS[kind](value)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{name}: expected a saved value [type, value], found {stored!r}") from error


def stored_foreign_tree(stored: Snapshot, leaves: Mapping[str, Any]) -> foreign.ForeignTree:
    """Return a saved tree of another library with its leaves only, enough to convert them to PEFT's names."""
    try:
        dialect = dialects.get_dialect(stored.foreign["dialect"])
        base = {path: tuple(shape) for path, shape in stored.foreign["base"].items()}
        return foreign.ForeignTree(None, dialect, dict(leaves), lambda new: new, base, dict(stored.foreign["stored"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"the checkpoint's description of its tree is damaged: {error}") from error
