"""Full embeddings in an adapter's file: PEFT's `save_embedding_layers`.

If an adapter is on the embeddings, PEFT writes the base's token embedding and head to the adapter's file; on request
it does so for any adapter, for a vocabulary that was resized. PEFT loads them into the base. Here the file is written
alike, but loading never changes the base: the file's embeddings must equal the base's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxadapt.adapters import full_copies, tied
from jaxadapt.adapters.sites import Site
from jaxadapt.configs import Config, matching
from jaxadapt.core.errors import AttachError, ConfigError, MismatchError, raise_listed, warn
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.plan import Encoded, PlanEntry
from jaxadapt.keymaps.weight import MethodTensor


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
    return is_token_embedding or module == keymap.output or module.rpartition(".")[2] in tied.NAMES


def _targets_embedding(config: Config, modules: Sequence[str]) -> bool:
    """Return True if PEFT sees an embedding among the targets; it only knows the usual names."""
    names = config.get("target_modules")
    if isinstance(names, str):
        return any(module.rpartition(".")[2] in tied.NAMES and matching.is_target(config, module) for module in modules)
    return any(name in (names or ()) for name in tied.NAMES)


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
    entries = [*tied.repeat_for_heads(config, entries, keymap), *entries]
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
