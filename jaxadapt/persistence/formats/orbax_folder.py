"""An adapter as an Orbax checkpoint: nested dicts of its parameters in the model's layout, and its recipe as JSON.

    adapter/      {"layers": {"0": {"q_proj": {"kernel": {"lora_A": …}}}}}: NNX and Linen write the same
    recipe/       the configuration and the keymap; both in one commit

Also reads the adapter's parameters out of another program's training checkpoint, which stores no configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxadapt.adapters import sites
from jaxadapt.adapters.adapter import (
    Adapter,
    Recipe,
    Site,
    collection_name,
    integers_name,
    make_file_plan,
    name_donated_arrays,
    tensor_entries,
)
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.arrays import regions
from jaxadapt.arrays.tensor_source import Whole, as_source
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError, AttachError, FileError, FormatError, MismatchError, Report, raise_as
from jaxadapt.persistence.formats import Format, Opened, Place, Wanted
from jaxadapt.storage import location, orbax

if TYPE_CHECKING:
    from jaxadapt.models.planning import BaseParams
    from jaxadapt.persistence.rules import Options

_ADAPTER, _RECIPE = "adapter", "recipe"
_SCHEMA = 1

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
    """An adapter in a checkpoint, before it is read.

    Args:
        adapter: its parameters as `ShapeDtypeStruct`s.
        item: the item of the checkpoint that contains them.
        keys: `{dotted path of a parameter: key path in the item}`.
        change_base: as in `PeftTensors`. False for the leaves of the attached adapter, which has changed the base.
    """

    adapter: Adapter
    item: str
    keys: Mapping[str, tuple[str, ...]]
    change_base: bool | None = None


def write(adapter: Adapter, path: location.Location, report: Report) -> None:
    """Write an adapter; every process calls this, with the same path. See `orbax.save`."""
    flat = adapter.flat()
    documents = {_RECIPE: {"schema": _SCHEMA, "recipe": adapter.recipe.to_text()}}
    with name_donated_arrays(flat):
        orbax.save(path, {_ADAPTER: paths.unflatten(flat)}, documents, jax.process_count() == 1)
    report_total(report, "save", adapter)


def read_recipe(path: Path) -> Recipe | None:
    """Return the recipe of a checkpoint that `write` wrote; None for other checkpoints. Loads neither jax nor Orbax."""
    document = orbax.read_json(path, _RECIPE)
    if document is None:
        return None
    if not isinstance(document, dict) or document.get("schema") != _SCHEMA:
        raise FormatError(f"{os.fspath(path)}: its {_RECIPE}/ is damaged, or a newer version of jaxadapt wrote it")
    with raise_as(FormatError, f"{os.fspath(path)}: its {_RECIPE}/ is damaged", AttachError, KeyError, TypeError):
        return Recipe.from_text(document["recipe"])


def read_config(path: Path) -> Config:
    """Read the configuration in a checkpoint that `write` wrote. Raises `FileError` for other checkpoints."""
    recipe = read_recipe(path)
    if recipe is None:
        raise FileError(f"{os.fspath(path)}: an Orbax checkpoint without an adapter's configuration")
    return recipe.config


def find_adapter(path: Path, like: Adapter | None = None, name: str = "default") -> StoredAdapter:
    """Find the adapter in a checkpoint; read no array.

    Args:
        like: the adapter attached to the target, if any. It identifies the adapter's leaves in another program's
            training checkpoint.

    Raises `FileError` if `like` is needed and not given, `MismatchError` naming leaves that are missing.
    """
    recipe = read_recipe(path)
    items = orbax.leaf_specs(path)
    if recipe is not None:
        keys = {".".join(key): key for key in items.get(_ADAPTER, {})}
        flat = {dotted: jax.ShapeDtypeStruct(*items[_ADAPTER][key]) for dotted, key in keys.items()}
        if not flat:
            raise FormatError(f"{os.fspath(path)}: expected an adapter's parameters, found none")
        adapter = Adapter(recipe.config, paths.unflatten(flat), recipe.keymap)
        recipe.check_complete(len(adapter.sites), name)
        return StoredAdapter(adapter, _ADAPTER, keys)
    if like is None:
        raise FileError(
            f"{os.fspath(path)}: an Orbax checkpoint without an adapter's configuration. Adapt the model with that"
            " configuration first; load then reads the adapter's parameters"
        )
    item, keys = _find_leaves(path, items, like, name)
    params = paths.unflatten({dotted: jax.ShapeDtypeStruct(*items[item][key]) for dotted, key in keys.items()})
    return StoredAdapter(dataclasses.replace(like, params=params), item, keys, change_base=False)


def _find_leaves(
    path: Path, items: Mapping[str, Mapping[tuple[str, ...], Any]], like: Adapter, name: str
) -> tuple[str, dict[str, tuple[str, ...]]]:
    """Return the item of a training checkpoint that contains this adapter, and the parameters' key paths in it."""
    own = (collection_name(like.config), integers_name(collection_name(like.config)))
    wanted = set(like.flat())
    # The same paths occur several times: an optimizer's moments are trees of the same structure.
    candidates = paths.nest(
        ((item, prefix), dotted, key)
        for item, leaves in items.items()
        for key in leaves
        for prefix, dotted in _places(key, own, name)
        if dotted in wanted
    )
    parameters = [p for p in candidates if "opt_state" not in (p[0], *p[1])]
    complete = [p for p in parameters if len(candidates[p]) == len(wanted)]
    if not complete:
        best = max((candidates[p] for p in parameters), key=len, default={})
        raise MismatchError(
            f"{os.fspath(path)}: this checkpoint does not contain the adapter {name!r} ({own[0]}); missing:\n"
            + paths.bullets(sorted(wanted - set(best)))
        )
    shortest = min(len(prefix) for _, prefix in complete)
    nearest = [p for p in complete if len(p[1]) == shortest]
    if len(nearest) > 1:
        shown = sorted("/".join([item, *prefix]) for item, prefix in nearest)
        raise MismatchError(
            f"{os.fspath(path)}: several subtrees match the adapter {name!r}. Restore the right one with Orbax and"
            " pass it to jaxadapt.extract(jaxadapt.models.LoraTree(tree, config=…)):\n" + paths.bullets(shown)
        )
    return nearest[0][0], candidates[nearest[0]]


def _places(key: tuple[str, ...], own: Collection[str], name: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the ways to read a key path as `(prefix, dotted path of a parameter)` of the adapter called `name`."""
    parts = key[:-1] if key[-1] == "value" else key  # as NNX variables are saved
    for i in range(len(parts) - 1):
        if parts[i + 1] == name and parts[i] in own:
            plain = (*parts[:i], *parts[i + 2 :])
            yield from ((plain[:start], ".".join(plain[start:])) for start in range(i + 1))


def read(path: Path, stored: StoredAdapter, like: Mapping[str, Any] | None = None) -> Adapter:
    """Read the adapter's values, each with the sharding of the array at that path in `like`; without one, as numpy."""
    flat = stored.adapter.flat()

    def spec(dotted: str) -> jax.ShapeDtypeStruct | None:
        example = (like or {}).get(dotted)
        sharding = getattr(example, "sharding", None)  # numpy arrays have none
        if sharding is None or (isinstance(example, jax.Array) and not example.committed):
            return None
        return jax.ShapeDtypeStruct(flat[dotted].shape, flat[dotted].dtype, sharding=sharding)

    arrays = orbax.load(path, stored.item, {key: spec(dotted) for dotted, key in stored.keys.items()})
    params = paths.unflatten({dotted: arrays[key] for dotted, key in stored.keys.items()})
    return dataclasses.replace(stored.adapter, params=params)


def adapter_tensors(adapter: Adapter, source: Path) -> PeftTensors:
    """Return the adapter, abstract or not, under PEFT's names."""
    host = all(isinstance(leaf, np.ndarray) for leaf in adapter.flat().values())
    return PeftTensors(
        adapter.config, make_file_plan(sites.sites_of(adapter)).encode(adapter.flat(), host), str(source)
    )


def recognizes(place: Place) -> bool:
    """Return True for a complete Orbax checkpoint."""
    return place.names is not None and orbax.is_checkpoint(place.at, place.names)


@contextlib.contextmanager
def open_checkpoint(place: Place) -> Generator[Opened]:
    """Open a checkpoint under PEFT's names; all arrays are read at the first access to one."""
    stored = find_adapter(place.at)
    abstract = adapter_tensors(stored.adapter, place.path)
    kinds = as_source(abstract.tensors).kinds
    whole = Whole(abstract.source, kinds, lambda: adapter_tensors(read(place.at, stored), place.path).tensors)
    yield Opened(dataclasses.replace(abstract, tensors=whole), place.at)


def read_adapter(
    place: Place, base: BaseParams, attached: Adapter | None, name: str, options: Options, report: Report
) -> tuple[Adapter, Sequence[Site], bool | None]:
    """Read a checkpoint into the layout of a base; return the adapter, its sites and its `change_base`."""
    from jaxadapt.persistence import load_adapter  # imports Flax, which a reader does not need

    path, stored = os.fspath(place.path), find_adapter(place.path, attached, name)
    expected = load_adapter.bind(adapter_tensors(stored.adapter, place.path), base, options, has_values=False)
    wanted, found = (
        {entry.path: (entry.shape, entry.keys) for _, entry in tensor_entries(each)}
        for each in (expected.sites, sites.sites_of(stored.adapter))
    )
    if wanted != found:  # another layout (scanned, fused, another keymap or vocabulary): convert by PEFT's names
        tensors = adapter_tensors(read(path, stored), place.path)
        return *load_adapter.adapter_from_tensors(tensors, base, options, report, check=True), stored.change_base
    placement = load_adapter.adapter_placement(options.shardings, base, expected.sites)
    like = {p: jax.ShapeDtypeStruct(wanted[p][0], np.float32, sharding=s) for p, s in placement.items()}
    if attached is not None and options.shardings is None:
        like |= {p: x for p, x in attached.flat().items() if p in wanted}
    own = read(path, stored, like).flat()
    with np.errstate(over="ignore"):  # `explain_not_finite` names the tensors
        dtypes = {
            p: x.dtype if p.endswith(".copy") else load_adapter.memory_dtype(x.dtype, options.dtype)
            for p, x in own.items()
        }
        flat = {p: jax.numpy.asarray(x.astype(dtypes[p])) for p, x in own.items()}
    bad = [([p], flat[p].dtype, 0) for p in regions.names_not_finite(flat)]
    regions.explain_not_finite(bad, own.__getitem__, path)
    adapter = Adapter(expected.recipe.config, paths.unflatten(flat), expected.recipe.keymap)
    report_total(report, "load", adapter)
    return adapter, expected.sites, stored.change_base


def write_tensors(tensors: PeftTensors, target: location.Location, wanted: Wanted, report: Report) -> int:
    """Write tensors as the adapter of a model whose parameters have PyTorch's names and layouts.

    Raises `MismatchError` for tensors that only the model itself has places for.
    """
    from jaxadapt.persistence import load_adapter  # imports Flax, which a reader does not need

    arrays = dataclasses.replace(tensors, tensors={key: np.asarray(tensors.tensors[key]) for key in tensors.tensors})
    with raise_as(
        MismatchError,
        f"{tensors.source}: only a model has places for all tensors of this adapter in an Orbax checkpoint; load it"
        " into its model, and call jaxadapt.save(model, path, format='orbax')",
        AdapterError,
    ):
        adapter = load_adapter.with_pytorch_names(arrays)
    write(adapter, target, report)
    return len(tensors.tensors)


def report_total(report: Report, stage: str, adapter: Adapter) -> None:
    """Report all bytes of an adapter at once: Orbax reports no progress of its own."""
    total = sum(x.nbytes for x in adapter.flat().values())
    report(stage, total, total)


FORMAT = Format(
    recognizes,
    open_checkpoint,
    write_tensors,
    read_config=lambda place: read_config(place.at),
    write_adapter=write,
    read_adapter=read_adapter,
)
