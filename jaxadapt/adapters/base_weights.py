"""Base weights in an adapter's file, as the state dict of a complete PEFT model has them: compare and skip them."""

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
    """Return the keys of a file that hold weights or buffers of the base, after comparing them with the base.

    Args:
        shapes: `{key: shape}` of the tensors that the adapter itself does not take.
        base: `{leaf: array or spec}` of the base parameters.
        strict: if False, leave keys with other values out of the result instead of raising.

    Raises `MismatchError` if values or shapes differ from the base's.
    """
    base_shapes = {leaf: tuple(array.shape) for leaf, array in base.items()}
    matches = {leaf: keymap.match(leaf) for leaf in base_shapes}
    unmapped = [
        leaf for leaf, match in matches.items() if match is None or len(match.weight.left) != len(base_shapes[leaf])
    ]
    full_keymap = keymap.with_entries(generic.entry_for_copy(leaf, base_shapes[leaf]) for leaf in unmapped)
    entries = [
        entry
        for leaf, shape in base_shapes.items()
        if (entry := plan.base_plan_entry(full_keymap, leaf, shape)) is not None
    ]
    known = {key: (entry, i) for entry in entries for i, key in enumerate(entry.keys)}
    ties = dict(keymap.tied)
    base_keys, uncompared, problems = set[str](), list[str](), dict[str, str]()
    for key, shape in shapes.items():
        name = state_dict_keys.unwrapped_key(key.removeprefix(keymap.prefix))
        if check.is_buffer(keymap, name) or _repeats_tied_module(tensors, key, ties):
            base_keys.add(key)
            continue
        location = known.get(name) or known.get(ties.get(name, ""))
        if location is None:
            continue
        entry, i = location
        leaf = base[entry.path]
        base_keys.add(key)
        # A guessed layout may be a Conv1D's, which stores (in, out).
        may_be_transposed = len(shape) == 2 and generic.is_guess(keymap, entry.path, base_shapes[entry.path])
        if tuple(shape) != entry.form.file_shape and not (
            may_be_transposed and tuple(shape)[::-1] == entry.form.file_shape
        ):
            problems[key] = f"{key}: expected {list(entry.form.file_shape)} as in the base, found {list(shape)}"
        elif not isinstance(leaf, np.ndarray | jax.Array) or isinstance(leaf, Tracer):
            uncompared.append(key)
        else:
            expected = np.asarray(entry.form.encode(np.asarray(leaf), i))
            value = np.asarray(tensors[key])
            candidates = [value, value.T] if may_be_transposed else [value]
            if not any(
                candidate.shape == expected.shape and _equal_values(candidate, expected, entry.form.is_exact)
                for candidate in candidates
            ):
                problems[key] = f"{key}: its values differ from the base's"
    if problems and strict:
        raise MismatchError(
            f"{source} holds base weights that differ from the model's; loading an adapter never changes the base:\n"
            + paths.bullets(problems.values())
            + "\nReplace the base parameters yourself (jaxadapt.read(path).tensors has the values), then load again"
        )
    if uncompared:
        warn(
            f"{source}: these tensors could not be compared, because the base has only shapes here; they are assumed"
            " to equal the base's:\n" + paths.bullets(uncompared, len(uncompared))
        )
    return base_keys - problems.keys()


def _repeats_tied_module(tensors: Mapping[str, Any], key: str, ties: Mapping[str, str]) -> bool:
    """Return True if a tensor of a tied module equals the tensor of the module it is tied to, in the same file."""
    twins = [
        key.replace(f"{alias.removesuffix('weight')}token_adapter.", f"{original.removesuffix('weight')}token_adapter.")
        for alias, original in ties.items()
    ]
    return any(twin != key and twin in tensors and np.array_equal(tensors[twin], tensors[key]) for twin in twins)


def _equal_values(found: np.ndarray, expected: np.ndarray, exact: bool) -> bool:
    """Return True if the values are equal in the base's dtype; a keymap's factor may add one rounding."""
    found = found.astype(expected.dtype)
    if exact:
        return np.array_equal(found, expected)
    widened = found.astype("float32")
    return bool(
        np.allclose(widened, expected.astype("float32"), rtol=4 * float(jax.numpy.finfo(expected.dtype).eps), atol=0)
    )
