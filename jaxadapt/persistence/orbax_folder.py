"""An adapter as an Orbax checkpoint: nested dicts of its parameters in the model's layout, and its recipe as JSON.

    adapter/      {"layers": {"0": {"q_proj": {"kernel": {"lora_A": …}}}}}: NNX and Linen write the same
    recipe/       the configuration and the table of names; both in one commit

Also the adapter's part of somebody's whole training checkpoint, which says nothing of its configuration.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxadapt.adapters import sites
from jaxadapt.adapters.adapter import Adapter, PeftTensors, Recipe, collection_name, name_donated_arrays
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, FileError, FormatError, MismatchError
from jaxadapt.storage import orbax

_ADAPTER, _RECIPE = "adapter", "recipe"
_SCHEMA = 1

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
    """An adapter in a checkpoint, before it is read.

    Args:
        adapter: its parameters as `ShapeDtypeStruct`s.
        item: the part of the checkpoint they lie in.
        where: `{dotted path of a parameter: key path in the item}`.
    """

    adapter: Adapter
    item: str
    where: Mapping[str, tuple[str, ...]]


def write(adapter: Adapter, path: Path, alone: bool) -> None:
    """Writes an adapter; see `orbax.save`."""
    flat = adapter.flat()
    document = {"schema": _SCHEMA, "recipe": adapter.recipe.to_text()}
    with name_donated_arrays(flat):
        orbax.save(path, {_ADAPTER: paths.unflatten(flat)}, {_RECIPE: document}, alone)


def read_recipe(path: Path) -> Recipe | None:
    """The recipe of a checkpoint that `write` wrote; None of another's. Loads neither jax nor Orbax itself."""
    document = orbax.read_json(path, _RECIPE)
    if document is None:
        return None
    if not isinstance(document, dict) or document.get("schema") != _SCHEMA:
        raise FormatError(f"{os.fspath(path)}: its {_RECIPE}/ is damaged, or of a newer version of this library")
    try:
        return Recipe.from_text(document["recipe"])
    except (AttachError, KeyError, TypeError) as error:
        raise FormatError(f"{os.fspath(path)}: its {_RECIPE}/ is damaged: {error}") from error


def find_adapter(path: Path, like: Adapter | None = None, name: str = "default") -> StoredAdapter:
    """The adapter of a checkpoint.

    Args:
        like: the adapter that is attached to the target, if any: it tells which leaves of a whole training
            checkpoint are the adapter's.

    Raises `FileError` where it is needed and not given, `MismatchError` naming leaves that are missing.
    """
    own = read_recipe(path)
    items = orbax.leaf_specs(path)
    if own is not None:
        where = {".".join(key): key for key in items.get(_ADAPTER, {})}
        flat = {dotted: _spec(items[_ADAPTER][key]) for dotted, key in where.items()}
        if not flat:
            raise FormatError(f"{os.fspath(path)}: expected an adapter's parameters, found none")
        adapter = Adapter(own.config, paths.unflatten(flat), own.keymap)
        own.check_complete(len(adapter.sites), name)
        return StoredAdapter(adapter, _ADAPTER, where)
    if like is None:
        raise FileError(
            f"{os.fspath(path)}: an Orbax checkpoint without an adapter's configuration; adapt the model with it first,"
            " then load takes the adapter's part"
        )
    item, where = _within(path, items, like, name)
    flat = {dotted: _spec(items[item][key]) for dotted, key in where.items()}
    return StoredAdapter(dataclasses.replace(like, params=paths.unflatten(flat)), item, where)


def _spec(spec: orbax.Spec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec[0], spec[1])


def _within(
    path: Path, items: Mapping[str, Mapping[tuple[str, ...], Any]], like: Adapter, name: str
) -> tuple[str, dict[str, tuple[str, ...]]]:
    """The item of a whole checkpoint that holds this adapter, and where each of its parameters lies there."""
    collection = collection_name(like.config)
    wanted = set(like.flat())
    # The same parameters lie in several places: an optimizer's moments are trees of the same structure.
    places: dict[tuple[str, tuple[str, ...]], dict[str, tuple[str, ...]]] = {}
    for item, leaves in items.items():
        for key in leaves:
            parts = key[:-1] if key[-1] == "value" else key  # NNX variables are saved with it
            for i in range(len(parts) - 1):
                if parts[i : i + 2] != (collection, name):
                    continue
                plain = (*parts[:i], *parts[i + 2 :])
                for start in range(i + 1):
                    dotted = ".".join(plain[start:])
                    if dotted in wanted:
                        places.setdefault((item, plain[:start]), {})[dotted] = key
    chosen = [p for p in places if "opt_state" not in (p[0], *p[1])]
    full = [p for p in chosen if len(places[p]) == len(wanted)]
    if not full:
        best = max((places[p] for p in chosen), key=len, default={})
        missing = sorted(wanted - set(best))
        raise MismatchError(
            f"{os.fspath(path)}: the adapter {name!r} ({collection}) is not in this checkpoint; not found:\n"
            + paths.bullets(missing)
        )
    least = min(len(prefix) for _, prefix in full)
    nearest = [p for p in full if len(p[1]) == least]
    if len(nearest) > 1:
        shown = sorted("/".join([item, *prefix]) for item, prefix in nearest)
        raise MismatchError(
            f"{os.fspath(path)}: the adapter {name!r} may be any of these; restore the one you mean with Orbax and pass"
            " it to jaxadapt.extract(tree, config=…):\n" + paths.bullets(shown)
        )
    return nearest[0][0], places[nearest[0]]


def read(path: Path, found: StoredAdapter, like: Mapping[str, Any] | None = None) -> Adapter:
    """The adapter with its values: each with the sharding of the array of that path in `like`, else numpy arrays."""
    flat = found.adapter.flat()

    def spec(dotted: str) -> jax.ShapeDtypeStruct | None:
        example = (like or {}).get(dotted)
        sharding = getattr(example, "sharding", None)  # of numpy arrays: none
        if sharding is None or (isinstance(example, jax.Array) and not example.committed):
            return None
        return jax.ShapeDtypeStruct(flat[dotted].shape, flat[dotted].dtype, sharding=sharding)

    got = orbax.load(path, found.item, {key: spec(dotted) for dotted, key in found.where.items()})
    values = {dotted: got[key] for dotted, key in found.where.items()}
    return dataclasses.replace(found.adapter, params=paths.unflatten(values))


def adapter_tensors(adapter: Adapter, source: Path) -> PeftTensors:
    """The adapter, abstract or not, under PEFT's names."""
    bounds = sites.sites_of(adapter)
    host = all(isinstance(leaf, np.ndarray) for leaf in adapter.flat().values())
    return PeftTensors(adapter.config, sites.make_file_plan(bounds).encode(adapter.flat(), None, host), str(source))
