"""Weights of the base model in an adapter's file: complete models, full embeddings, other vocabularies.

Base weights in an adapter's file, as the state dict of a complete PEFT model has them: compare and skip them.

Full embeddings in an adapter's file: PEFT's `save_embedding_layers`.

If an adapter is on the embeddings, PEFT writes the base's token embedding and head to the adapter's file; on request
it does so for any adapter, for a vocabulary that was resized. PEFT loads them into the base. Here the file is written
alike, but loading never changes the base: the file's embeddings must equal the base's.

Files for another vocabulary size: copy the rows that both have, and keep the model's own for the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters import full_copies, key_names
from jaxadapt.adapters.full_copies import NAMES
from jaxadapt.adapters.initial_values import has_value
from jaxadapt.adapters.site import Site
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, MismatchError, raise_listed, warn
from jaxadapt.keymaps import check, generic, plan
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.plan import Encoded, PlanEntry
from jaxadapt.keymaps.weight import MethodTensor

# ---------------------------------------------------------------- base weights


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
        name = key_names.unwrapped_key(key.removeprefix(keymap.prefix))
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


# ---------------------------------------------------------------- embeddings


def _embedding_entries(keymap: KeyMap, shapes: Mapping[str, Sequence[int]], wrapped: bool) -> dict[str, PlanEntry]:
    """Return `{module: entry}` of the token embedding and the head; `wrapped` gives their names inside an adapter."""
    entries: dict[str, PlanEntry] = {}
    for leaf, shape in shapes.items():
        match = keymap.match(leaf)
        if match is None or match.braced or len(match.weight.left) != len(shape) or not _is_embedding(keymap, match):
            continue
        tensor = MethodTensor("base", ".base_layer" if wrapped else "", (), (), is_copy=True, scale_power=1)
        entries[match.module({})] = plan.plan_entry(keymap, match, tensor, plan.axis_sizes(match, shape))
    return entries


def _is_embedding(keymap: KeyMap, match: Match) -> bool:
    """Return True for a token embedding or a head."""
    module, parameter = match.parameter({})
    if parameter != "weight":
        return False
    is_token_embedding = match.weight.kind == "embedding" and module.rpartition(".")[2] in full_copies.INPUTS
    return is_token_embedding or module == keymap.output or module.rpartition(".")[2] in full_copies.NAMES


def _targets_embedding(config: Config, modules: Sequence[str]) -> bool:
    """Return True if PEFT sees an embedding among the targets; it only knows the usual names."""
    names = config.get("target_modules")
    if isinstance(names, str):
        return any(
            module.rpartition(".")[2] in full_copies.NAMES and matching.is_target(config, module) for module in modules
        )
    return any(name in (names or ()) for name in full_copies.NAMES)


def may_need_embeddings(config: Config, mode: bool | str) -> bool:
    """Return True if the file may need embeddings, judging by the configuration only.

    Raises `ConfigError` for an unknown `mode` (PEFT's `save_embedding_layers`).
    """
    if mode not in (True, False, "auto"):
        raise ConfigError(f"save_embedding_layers: expected true, false or 'auto', found {mode!r}")
    names = config.get("target_modules")
    return mode is True or (mode == "auto" and (isinstance(names, str) or _targets_embedding(config, ())))


def add_embeddings(
    tensors: Encoded,
    config: Config,
    keymap: KeyMap,
    sites: Sequence[Site],
    base: Mapping[str, Any] | None,
    mode: bool | str,
) -> Encoded:
    """Return an adapter's tensors with the embeddings that PEFT would save with them.

    Args:
        base: `{leaf: array}` of the base parameters; None for an adapter without a model.
        mode: as PEFT's `save_embedding_layers`: "auto", true or false.
    """
    if base is None and mode is True:
        raise AttachError(
            "save_embedding_layers=True: an adapter without its model does not hold the embeddings; save the model"
        )
    if base is None or not mode:
        return tensors
    shapes = {leaf: tuple(array.shape) for leaf, array in base.items()}
    wrapped_entries, plain_entries = (_embedding_entries(keymap, shapes, wrapped) for wrapped in (True, False))
    adapted = {module for site in sites if not site.method.copies for module in site.modules}
    targeted = _targets_embedding(config, list(wrapped_entries))
    if mode == "auto" and (not targeted or config.get("trainable_token_indices") is not None):
        return tensors
    selected = [
        wrapped_entries[module] if module in adapted else plain_entries[module]
        for module in wrapped_entries
        if module in adapted or not targeted
    ]
    selected = [entry for entry in selected if not any(key in tensors.plan.keys for key in entry.keys)]
    values = {entry.path: base[entry.path.rpartition(".")[0]] for entry in selected}
    file_plan = plan.make_plan([*tensors.plan.entries, *selected])
    return dataclasses.replace(tensors, plan=file_plan, leaves={**tensors.leaves, **values})


def embedding_keys(
    config: Config,
    tensors: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    known: Mapping[str, Any],
    keymap: KeyMap,
    base: Mapping[str, Any],
    source: str,
) -> set[str]:
    """Return the keys of a file that hold embeddings of the base, after comparing them with the base.

    Args:
        shapes: `{key: shape}` of the file.
        known: the keys that the adapter itself takes.
        base: `{leaf: array or spec}` of the base parameters.

    Raises `MismatchError` if values or vocabulary sizes differ from the base's.
    """
    base_shapes = {leaf: tuple(array.shape) for leaf, array in base.items()}
    entries = [
        entry for wrapped in (True, False) for entry in _embedding_entries(keymap, base_shapes, wrapped).values()
    ]
    entries = [*full_copies.repeat_for_heads(config, entries, keymap), *entries]
    embeddings = {key: entry for entry in entries for key in entry.keys if key in shapes and key not in known}
    problems: list[str] = []
    heads: list[str] = []
    saved = {str(name).rpartition(".")[2] for name in config.get("modules_to_save") or ()}
    for key, entry in embeddings.items():
        leaf = base[entry.path.rpartition(".")[0]]
        if tuple(shapes[key]) != entry.form.file_shape:
            problems.append(f"{key}: expected {list(entry.form.file_shape)} as in the base, found {list(shapes[key])}")
        elif not _has_values(leaf):
            warn(
                f"{source}: {key} could not be compared, because the base has only shapes here; it is assumed to equal"
                " the base's"
            )
        else:
            expected = np.asarray(entry.form.encode(np.asarray(leaf), 0))
            if not np.array_equal(np.asarray(tensors[key]).astype(expected.dtype), expected):
                is_copy = key.removeprefix(keymap.prefix).removesuffix(".weight").rpartition(".")[2] in saved
                (heads if is_copy else problems).append(f"{key}: its values differ from the base's")
    raise_listed(
        MismatchError,
        f"{source} holds a trained copy of a head that this model ties to its token embedding, so that the model has no"
        " leaf for the copy:",
        heads,
        "\nMerge the files (`jaxadapt merge BASE ADAPTER --out FOLDER`), which gives the head a tensor of its own, or"
        " load the adapter into a model with a separate head",
    )
    raise_listed(
        MismatchError,
        f"{source} holds embeddings that differ from the model's; loading an adapter never changes the base:",
        problems,
        "\nReplace the base parameters yourself (jaxadapt.read(path).tensors has the values), then load again",
    )
    return set(embeddings)


def _has_values(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | jax.Array) and not isinstance(leaf, Tracer)


# ---------------------------------------------------------------- vocabulary


def fit_vocabulary(
    tensors: Mapping[str, Any], sites: Sequence[Site], keymap: KeyMap, base: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Return a file's tensors resized to the model's vocabulary, and warn for each.

    Rows that the file lacks have no effect in an adapter, and are the base's own in a copy. Tensors that differ in
    another way stay unchanged; a later check reports them.
    """
    fitted = dict(tensors)
    for site in sites:
        vocabulary_axes = _vocabulary_axes(site, keymap)
        for tensor, entry in zip(site.tensors, site.entries, strict=True):
            key, expected = entry.keys[0], entry.form.file_shape
            found = tuple(fitted[key].shape) if key in fitted else expected
            differing = [i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b]
            if len(found) != len(expected) or len(differing) != 1 or len(entry.keys) != 1:
                continue
            (axis,) = differing
            if not vocabulary_axes or entry.form.right[axis] != vocabulary_axes:
                continue
            if tensor.name in site.method.neutral:
                rows = np.full(expected, site.method.neutral[tensor.name], fitted[key].dtype)
            elif tensor.is_copy and has_value(base.get(site.leaf), abstract=False):
                rows = np.array(entry.form.encode(np.asarray(base[site.leaf]), 0)).astype(fitted[key].dtype)
            else:
                continue
            common = (slice(None),) * axis + (slice(min(found[axis], expected[axis])),)
            rows[common] = np.asarray(fitted[key])[common]
            fitted[key] = rows
            warn(
                f"{source}: {key} is for a vocabulary of {found[axis]}, and the model's has {expected[axis]}: only the"
                f" first {min(found[axis], expected[axis])} rows are used",
            )
    return fitted


def _vocabulary_axes(site: Site, keymap: KeyMap) -> tuple[str, ...]:
    """Return the names of the axis that counts tokens, of a token embedding or of the head; empty for other weights."""
    roles = site.match.weight.torch_roles
    if site.match.weight.kind in ("embedding", "lookup"):
        return roles["in"]
    module = site.match.module({}) if not site.match.braced else ""
    return roles["out"] if module and (module == keymap.output or module.rpartition(".")[2] in NAMES) else ()
