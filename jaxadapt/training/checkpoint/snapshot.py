"""Snapshots of training state as named arrays and plain values; `restore` does the reverse.

    model, opt_state, rng, data ──take_snapshot──► {"adapter/default/q.kernel.lora_A": array, "opt_state/0/count": …}
                                ◄───fill_parts───

This file does not know about files. An adapter's arrays are named by their dotted paths, so that Linen and NNX use the
same names. Every other part is a pytree (an NNX object is replaced by its state) whose leaves are named by key paths.
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

from jaxadapt.core.errors import AttachError, FormatError, raise_listed
from jaxadapt.models.carriers import DEFAULT, Carrier, carrier, lora_carrier
from jaxadapt.models.carriers.nnx_kinds import is_object

Specs = Mapping[str, tuple[tuple[int, ...], str]]
"""`{name: (shape, dtype name)}` of stored arrays."""

PARTS = ("opt_state", "rng", "data")


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The content of one checkpoint: arrays by name, and everything else as JSON.

    Attributes:
        arrays: arrays on the device; typed random keys as their key data.
        recipes: `{adapter name: Recipe.to_text()}`.
        foreign: for a tree with LoRA leaves of another library, which are saved unchanged: its dialect, base shapes and
            scales.
        values: leaves that are not arrays, `{name: [type, JSON value]}`.
        keys: `{name: implementation}` of the arrays that are random keys.
        hosts: the names of the arrays that were numpy arrays.
        plain: `{part: structure}`; the structure is `[kind, …]` for a part of dicts, lists and tuples only, which can
            be rebuilt without an example, and None for other parts.
    """

    arrays: dict[str, Any]
    recipes: dict[str, str]
    foreign: dict[str, Any]
    values: dict[str, Any]
    keys: dict[str, str]
    hosts: list[str]
    plain: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return everything except the arrays."""
        return {_json_key(f.name): getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "arrays"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: str) -> Snapshot:
        """Invert `to_json`. Raise `FormatError` if fields are missing or damaged."""
        kinds = {f.name: list if f.name == "hosts" else dict for f in dataclasses.fields(cls) if f.name != "arrays"}
        wrong = [_json_key(name) for name, kind in kinds.items() if not isinstance(data.get(_json_key(name)), kind)]
        if wrong:
            raise FormatError(f"{source}: not a checkpoint of jaxadapt: {', '.join(wrong)} missing or damaged")
        return cls(arrays={}, **{name: data[_json_key(name)] for name in kinds})

    @property
    def parts(self) -> set[str]:
        """The parts that were saved besides the model."""
        return set(self.plain)


def _json_key(name: str) -> str:
    """Return the key of a field in a checkpoint's JSON, which stays what it was in the first version."""
    return "guest" if name == "foreign" else name


# ---------------------------------------------------------------- taking


def take_snapshot(model: Any, parts: Mapping[str, Any]) -> Snapshot:
    """Collect the training state of a model and of `parts`.

    Args:
        model: an NNX model or state, Linen variables, a tree of another library, or an `Adapter`.
        parts: `{part: value}`, each a pytree, an NNX object or None.

    Raises:
        AttachError: leaves cannot be saved; the message lists all of them.
    """
    snapshot = Snapshot({}, {}, {}, {}, {}, [], {})
    problems: list[str] = []
    held = lora_carrier(model)
    tree = held.foreign
    if tree is not None:
        base = {path: list(shape) for path, shape in tree.base.items()}
        snapshot.foreign.update(dialect=tree.dialect.name, base=base, stored=tree.stored)
        for path, leaf in tree.leaves.items():
            _add_leaf(snapshot, f"guest/{path}", leaf, problems)
    for name in [] if tree is not None else adapter_names(held):
        adapter = held.extract(name)
        snapshot.recipes[name] = adapter.recipe.to_text()
        for path, leaf in adapter.flat().items():
            _add_leaf(snapshot, name_prefix(name) + path, leaf, problems)
    for name, leaf in named_leaves("model", held.rest()):
        _add_leaf(snapshot, name, leaf, problems)
    for part, value in parts.items():
        if value is not None:
            snapshot.plain[part] = _plain_structure(value)
            for name, leaf in named_leaves(part, value):
                _add_leaf(snapshot, name, leaf, problems)
    raise_listed(AttachError, "cannot save these leaves:", problems)
    return snapshot


def adapter_names(held: Carrier) -> list[str]:
    """Return the names of all adapters of a tree; ["default"] if there are no names."""
    return sorted(held.names()) or [DEFAULT]


def flatten(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Return `[(path, leaf)]` and the structure. Segments of paths are escaped, so that all paths differ."""
    pytree = carrier(tree).pytree() if is_object(tree) else tree
    try:
        leaves, structure = jax.tree_util.tree_flatten_with_path(pytree)
    except ValueError as error:  # for example numbers and strings as keys of one dict
        raise AttachError(f"JAX cannot flatten this tree: {error}") from error
    return [("/".join(map(segment, path)), leaf) for path, leaf in leaves], structure


def segment(entry: Any) -> str:
    """Return the escaped segment of a path for one entry of a JAX key path."""
    match entry:
        case jax.tree_util.DictKey():
            return _quote(str(entry.key))
        case jax.tree_util.SequenceKey():
            return str(entry.idx)
        case jax.tree_util.GetAttrKey():
            return _quote(entry.name)
        case jax.tree_util.FlattenedIndexKey():
            return _quote(str(entry.key))
        case _:
            return _quote(str(entry))


@functools.lru_cache(4096)  # an adapter has thousands of leaves but few names, and the training loop waits
def _quote(text: str) -> str:
    return urllib.parse.quote(text, safe=" ()[]',:")


def name_prefix(name: str) -> str:
    """Return the prefix of the names of one adapter's arrays."""
    return f"adapter/{_quote(name)}/"


def named_leaves(part: str, tree: Any) -> list[tuple[str, Any]]:
    """Return `[(name, leaf)]` of one part; raise `AttachError` if names are not unique."""
    leaves = [(f"{part}/{path}" if path else part, leaf) for path, leaf in flatten(tree)[0]]
    if len({name for name, _ in leaves}) < len(leaves):
        raise AttachError(f"{part}: two leaves have the same path; give the nodes of its pytrees distinct keys")
    return leaves


def is_key(leaf: Any) -> bool:
    """Return True if a leaf is an array of typed random keys."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or isinstance(leaf.dtype, np.dtype):
        return False  # nearly all leaves have numpy dtypes, which are never keys; this avoids thousands of calls to JAX
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_on_device(leaf: Any) -> TypeGuard[Any]:
    """Return True if a leaf is a JAX array of numbers, concrete or abstract."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not is_key(leaf)


def is_committed(like: Any) -> bool:
    """Return True if an example leaf decides the devices of its value."""
    if isinstance(like, jax.ShapeDtypeStruct):
        return like.sharding is not None
    return isinstance(like, jax.Array) and bool(like.committed)


def _add_leaf(snapshot: Snapshot, name: str, leaf: Any, problems: list[str]) -> None:
    if isinstance(leaf, Tracer):
        problems.append(f"{name}: traced; save outside jit, grad and vmap")
    elif isinstance(leaf, jax.Array) and leaf.is_deleted():
        problems.append(f"{name}: deleted, because it was donated to a jitted function")
    elif is_key(leaf):
        snapshot.keys[name] = str(jax.random.key_impl(leaf))
        snapshot.arrays[name] = jax.random.key_data(leaf)
    elif isinstance(leaf, jax.Array):
        snapshot.arrays[name] = leaf
    elif isinstance(leaf, np.ndarray | np.generic) and _is_plain(leaf.dtype):
        snapshot.arrays[name] = leaf
        snapshot.hosts.append(name)
    elif isinstance(leaf, bytes):
        snapshot.values[name] = ["bytes", base64.b64encode(leaf).decode()]
    elif type(leaf) is complex:
        snapshot.values[name] = ["complex", [leaf.real, leaf.imag]]
    elif type(leaf) in (bool, int, float, str):
        snapshot.values[name] = [type(leaf).__name__, leaf]
    else:
        problems.append(f"{name}: {type(leaf).__name__}; expected arrays, numbers, strings or bytes")


def _is_plain(dtype: np.dtype[Any]) -> bool:
    """Return True if the dtype's name describes it fully: not for objects, texts, dates and records."""
    return dtype.kind not in "OSUMm" and not issubclass(dtype.type, np.void)


def _plain_structure(tree: Any) -> Any:
    """Return the structure of a tree of dicts, lists, tuples and leaves as JSON; None if it has other nodes."""
    if type(tree) is dict:
        inner = [(k, _plain_structure(v)) for k, v in tree.items()]
        is_plain = all(type(k) in (str, int) and v is not None for k, v in inner)
        return ["dict", [[k, v] for k, v in inner]] if is_plain else None
    if type(tree) in (list, tuple):
        inner = [_plain_structure(v) for v in tree]
        return [type(tree).__name__, inner] if None not in inner else None
    if tree is None:
        return ["none"]
    return ["leaf"] if jax.tree_util.all_leaves([tree]) and not is_object(tree) else None
