"""What a training run holds, as named arrays and plain values; `resuming` is the way back.

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
from collections.abc import Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters.adapter import Adapter
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, FormatError
from jaxadapt.models import attachment
from jaxadapt.models.foreign import tree as foreign
from jaxadapt.models.linen import collections
from jaxadapt.models.nnx import attach as nnx

Specs = Mapping[str, tuple[tuple[int, ...], str]]
"""`{name: (shape, dtype name)}` of stored arrays."""

PARTS = ("opt_state", "rng", "data")
# Not of a model's changing state: parameters (the base stays, adapters are saved apart), what follows from an adapter's
# configuration, and what lives within one call, in which a step leaves nothing that the next one reads.
_NOT_STATE = (nnx.nnx.Param, nnx.LayerNumber, nnx.nnx.Intermediate, nnx.nnx.Cache, nnx.nnx.Perturbation)
_NOT_STATE_COLLECTIONS = {"params", "intermediates", "cache", "perturbations"}


@dataclasses.dataclass(frozen=True)
class Snapshot:
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
    foreign: dict[str, Any]
    values: dict[str, Any]
    keys: dict[str, str]
    hosts: list[str]
    plain: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """All but the arrays."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "arrays"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: str) -> Snapshot:
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


def take_snapshot(model: Any, parts: Mapping[str, Any]) -> Snapshot:
    """What there is to save of a model (what `extract` takes) and of `parts`, each a pytree, an NNX object or None.

    Raises `AttachError` for leaves that cannot be saved, all of them together.
    """
    taken = Snapshot({}, {}, {}, {}, {}, [], {})
    problems: list[str] = []
    guest = find_foreign(model)
    if guest is not None:
        base = {path: list(shape) for path, shape in guest.base.items()}
        taken.foreign.update(dialect=guest.dialect.name, base=base, stored=guest.stored)
        for path, leaf in guest.leaves.items():
            _add(taken, f"guest/{path}", leaf, problems)
    for name in [] if guest is not None else adapter_names(model):
        adapter = attachment.extract(model, name)
        taken.recipes[name] = adapter.recipe.to_text()
        for path, leaf in adapter.flat().items():
            _add(taken, name_prefix(name) + path, leaf, problems)
    for name, leaf in named_leaves("model", other_state(model)):
        _add(taken, name, leaf, problems)
    for part, tree in parts.items():
        if tree is not None:
            taken.plain[part] = _plain(tree)
            for name, leaf in named_leaves(part, tree):
                _add(taken, name, leaf, problems)
    if problems:
        raise AttachError("these cannot be saved:\n" + paths.bullets(problems))
    return taken


def find_foreign(model: Any) -> foreign.ForeignTree | None:
    return None if isinstance(model, Adapter) else attachment.find_foreign(model)


def adapter_names(model: Any) -> list[str]:
    """The names of all adapters a model, state, variables or `Adapter` carries; ["default"] if it cannot tell."""
    if isinstance(model, nnx.nnx.Module | nnx.nnx.State):
        return sorted(nnx.adapter_variables(model)) or [attachment.DEFAULT]
    if isinstance(model, Mapping):
        return collections.adapter_names(model) or [attachment.DEFAULT]
    return [attachment.DEFAULT]


def other_state(model: Any) -> Any:
    """What training changes in a model besides its adapters: random streams, batch statistics, …; never the base."""
    if isinstance(model, nnx.nnx.Module | nnx.nnx.State):
        state = nnx.nnx.state(model) if isinstance(model, nnx.nnx.Module) else model
        return nnx.nnx.filter_state(state, nnx.nnx.Not(nnx.nnx.Any(*_NOT_STATE)))
    if isinstance(model, Mapping):
        ours = collections.collection_names(model)
        if ours or isinstance(model.get("params"), Mapping):  # variables, and no bare tree of parameters
            return {k: v for k, v in model.items() if k not in _NOT_STATE_COLLECTIONS and k not in ours}
    return {}


def is_object(tree: Any) -> TypeGuard[Any]:
    """Whether a tree is an NNX object (an optimizer, random streams, a model), which is filled in place."""
    return isinstance(tree, nnx.nnx.Pytree)


def flatten(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """`[(path, leaf)]` and the structure. The segments of a path are escaped, so no two leaves share one."""
    held = nnx.nnx.state(tree) if is_object(tree) else tree
    try:
        leaves, structure = jax.tree_util.tree_flatten_with_path(held)
    except ValueError as error:  # numbers and strings as keys of one dict, say
        raise AttachError(f"JAX cannot take this tree apart: {error}") from error
    return [("/".join(map(segment, path)), leaf) for path, leaf in leaves], structure


def segment(entry: Any) -> str:
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


def name_prefix(name: str) -> str:
    """What the names of one adapter's arrays begin with, and no other's."""
    return f"adapter/{_quoted(name)}/"


def named_leaves(part: str, tree: Any) -> list[tuple[str, Any]]:
    found = [(f"{part}/{path}" if path else part, leaf) for path, leaf in flatten(tree)[0]]
    if len({name for name, _ in found}) < len(found):
        raise AttachError(f"{part}: two leaves have the same path; give the nodes of its pytrees distinct keys")
    return found


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed random keys."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or isinstance(leaf.dtype, np.dtype):
        return False  # NumPy's dtypes, which are nearly all, are no keys: not worth asking JAX thousands of times
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_on_device(leaf: Any) -> TypeGuard[Any]:
    """Whether a leaf is a JAX array of numbers (or stands for one), not of random keys."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not is_key(leaf)


def is_committed(like: Any) -> bool:
    """Whether an example leaf says on which devices its value must lie."""
    if isinstance(like, jax.ShapeDtypeStruct):
        return like.sharding is not None
    return isinstance(like, jax.Array) and bool(like.committed)


def _add(taken: Snapshot, name: str, leaf: Any, problems: list[str]) -> None:
    if isinstance(leaf, Tracer):
        problems.append(f"{name}: traced; save outside jit, grad and vmap")
    elif isinstance(leaf, jax.Array) and leaf.is_deleted():
        problems.append(f"{name}: deleted: it was donated to a jitted function")
    elif is_key(leaf):
        taken.keys[name] = str(jax.random.key_impl(leaf))
        taken.arrays[name] = jax.random.key_data(leaf)
    elif isinstance(leaf, jax.Array):
        taken.arrays[name] = leaf
    elif isinstance(leaf, np.ndarray | np.generic) and _is_plain(leaf.dtype):
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


def _is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether an array of it can be told by the dtype's name: no objects, texts, dates, nor records of fields."""
    return dtype.kind not in "OSUMm" and not issubclass(dtype.type, np.void)


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
    return ["leaf"] if jax.tree_util.all_leaves([tree]) and not is_object(tree) else None
