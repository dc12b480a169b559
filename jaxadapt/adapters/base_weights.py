"""The base's own weights in an adapter's file, as the state dict of a whole PEFT model has them: compared, left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters import state_dict_keys
from jaxadapt.core import paths
from jaxadapt.core.errors import MismatchError, warn
from jaxadapt.keymaps import check, generic, plan
from jaxadapt.keymaps.keymap import KeyMap


def base_weight_keys(
    tensors: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    keymap: KeyMap,
    base: Mapping[str, Any],
    source: str,
    strict: bool = True,
) -> set[str]:
    """The keys of a file that hold weights (or buffers) of the base, which must be those that the base has.

    Args:
        shapes: `{key: shape}` of what the adapter itself does not take.
        base: `{leaf: array or spec}` of the base parameters.
        strict: False leaves those with other values out of the result.

    Raises `MismatchError` where the file brings other values.
    """
    mine = {leaf: tuple(array.shape) for leaf, array in base.items()}
    sites = {leaf: keymap.match(leaf) for leaf in mine}
    bare = [leaf for leaf, site in sites.items() if site is None or len(site.weight.left) != len(mine[leaf])]
    table = keymap.with_entries(generic.entry_for_copy(leaf, mine[leaf]) for leaf in bare)
    entries = [entry for leaf, shape in mine.items() if (entry := plan.base_plan_entry(table, leaf, shape)) is not None]
    known = {key: (entry, i) for entry in entries for i, key in enumerate(entry.keys)}
    ties = dict(keymap.tied)
    found, blind, problems = set[str](), list[str](), dict[str, str]()
    for key, shape in shapes.items():
        name = state_dict_keys.unwrapped_key(key.removeprefix(keymap.prefix))
        if check.is_buffer(keymap, name) or _is_repeated(tensors, key, ties):
            found.add(key)
            continue
        at = known.get(name) or known.get(ties.get(name, ""))
        if at is None:
            continue
        entry, i = at
        leaf = base[entry.path]
        found.add(key)
        turned = len(shape) == 2 and generic.is_guess(keymap, entry.path, mine[entry.path])  # a Conv1D's, perhaps
        if tuple(shape) != entry.form.file_shape and not (turned and tuple(shape)[::-1] == entry.form.file_shape):
            problems[key] = f"{key}: {list(shape)}, in the base {list(entry.form.file_shape)}"
        elif not isinstance(leaf, np.ndarray | jax.Array) or isinstance(leaf, Tracer):
            blind.append(key)
        else:
            own = np.asarray(entry.form.encode(np.asarray(leaf), i))
            value = np.asarray(tensors[key])
            ways = [value, value.T] if turned else [value]
            if not any(way.shape == own.shape and _same(way, own, entry.form.exact) for way in ways):
                problems[key] = f"{key}: other values"
    if problems and strict:
        raise MismatchError(
            f"{source} brings weights of the base that differ from the model's, and a base is never changed by an"
            " adapter:\n"
            + paths.bullets(problems.values())
            + "\nPut them into the base parameters yourself (jaxadapt.read(path).tensors has them), then load it again"
        )
    if blind:
        warn(
            f"{source}: these are taken for the base's own, which has no values to compare:\n"
            + paths.bullets(blind, len(blind))
        )
    return found - problems.keys()


def _is_repeated(tensors: Mapping[str, Any], key: str, ties: Mapping[str, str]) -> bool:
    """Whether a tensor of a tied module is that of the module it is tied to, which the file holds as well."""
    twins = [
        key.replace(f"{mine.removesuffix('weight')}token_adapter.", f"{its.removesuffix('weight')}token_adapter.")
        for mine, its in ties.items()
    ]
    return any(t != key and t in tensors and np.array_equal(tensors[t], tensors[key]) for t in twins)


def _same(found: np.ndarray, own: np.ndarray, exact: bool) -> bool:
    """Equal in the base's dtype; a table's factor may round once more."""
    found = found.astype(own.dtype)
    if exact:
        return np.array_equal(found, own)
    wide = found.astype("float32")
    return bool(np.allclose(wide, own.astype("float32"), rtol=4 * float(jax.numpy.finfo(own.dtype).eps), atol=0))
