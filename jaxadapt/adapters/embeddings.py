"""Whole embeddings in an adapter's file: PEFT's `save_embedding_layers`.

PEFT writes the base's own table of tokens and head beside an adapter on them (and, if told to, where there is
none: for a vocabulary that was resized), and puts what a file holds of them into the base. Here they are written
alike; on reading, the base is never changed, so that a file must hold what the base has.
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
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, MismatchError, warn
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.plan import Encoded, PlanEntry
from jaxadapt.keymaps.tensor_spec import MethodTensor


def _entries(keymap: KeyMap, shapes: Mapping[str, Sequence[int]], wrapped: bool) -> dict[str, PlanEntry]:
    """`{module: entry}` of the table of tokens and the head, as they are called inside an adapter or outside."""
    out: dict[str, PlanEntry] = {}
    for leaf, shape in shapes.items():
        site = keymap.match(leaf)
        if site is None or site.braced or len(site.weight.left) != len(shape) or not _is_one(keymap, site):
            continue
        tensor = MethodTensor("base", ".base_layer" if wrapped else "", (), (), is_copy=True, scale_power=1)
        out[site.module({})] = plan.plan_entry(keymap, site, tensor, plan.axis_sizes(site, shape))
    return out


def _is_one(keymap: KeyMap, site: Match) -> bool:
    module, parameter = site.parameter({})
    if parameter != "weight":
        return False
    tokens = site.weight.kind == "embedding" and module.rpartition(".")[2] in full_copies.INPUTS
    return tokens or module == keymap.output or module.rpartition(".")[2] in tied.NAMES


def _targeted(config: Config, modules: Sequence[str]) -> bool:
    """Whether PEFT sees an embedding among the targets: by its usual names alone."""
    names = config.get("target_modules")
    if isinstance(names, str):
        return any(module.rpartition(".")[2] in tied.NAMES and matching.matches(config, module) for module in modules)
    return any(name in (names or ()) for name in tied.NAMES)


def may_need_embeddings(config: Config, wanted: bool | str) -> bool:
    """Whether any embedding may have to go into the file: a first look, at the configuration alone."""
    if wanted not in (True, False, "auto"):
        raise ConfigError(f"save_embedding_layers: expected true, false or 'auto', found {wanted!r}")
    names = config.get("target_modules")
    return wanted is True or (wanted == "auto" and (isinstance(names, str) or _targeted(config, ())))


def add_embeddings(
    tensors: Encoded,
    config: Config,
    keymap: KeyMap,
    bounds: Sequence[Site],
    base: Mapping[str, Any] | None,
    wanted: bool | str,
) -> Encoded:
    """An adapter's tensors with the embeddings that PEFT would save with them.

    Args:
        base: `{leaf: array}` of the base parameters, None where the adapter stands alone.
        wanted: as PEFT's `save_embedding_layers`: "auto", true or false.
    """
    if base is None and wanted is True:
        raise AttachError("save_embedding_layers=True: an adapter alone does not hold them; save the model with it")
    if base is None or not wanted:
        return tensors
    shapes = {leaf: tuple(array.shape) for leaf, array in base.items()}
    inside, outside = (_entries(keymap, shapes, wrapped) for wrapped in (True, False))
    adapted = {m for b in bounds if not b.method.copies for m in b.modules}
    targeted = _targeted(config, list(inside))
    if wanted == "auto" and (not targeted or config.get("trainable_token_indices") is not None):
        return tensors
    chosen = [inside[m] if m in adapted else outside[m] for m in inside if m in adapted or not targeted]
    chosen = [e for e in chosen if not any(key in tensors.plan.keys for key in e.keys)]
    values = {e.path: base[e.path.rpartition(".")[0]] for e in chosen}
    both = plan.make_plan([*tensors.plan.entries, *chosen])
    return dataclasses.replace(tensors, plan=both, leaves={**tensors.leaves, **values})


def embedding_keys(
    tensors: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    known: Mapping[str, Any],
    keymap: KeyMap,
    base: Mapping[str, Any],
    source: str,
) -> set[str]:
    """The keys of a file that hold embeddings of the base, which must be those that the base has.

    Args:
        shapes: `{key: shape}` of the file.
        known: the keys that the adapter itself takes.
        base: `{leaf: array or spec}` of the base parameters.

    Raises `MismatchError` where the file brings other values, or another vocabulary.
    """
    mine = {leaf: tuple(array.shape) for leaf, array in base.items()}
    entries = [e for wrapped in (True, False) for e in _entries(keymap, mine, wrapped).values()]
    entries = [*tied.repeat_for_heads(entries, keymap), *entries]
    found = {key: e for e in entries for key in e.keys if key in shapes and key not in known}
    problems: list[str] = []
    for key, entry in found.items():
        leaf = base[entry.path.rpartition(".")[0]]
        if tuple(shapes[key]) != entry.form.file_shape:
            problems.append(f"{key}: {list(shapes[key])}, in the base {list(entry.form.file_shape)}")
        elif not _has_values(leaf):
            warn(f"{source}: {key} is taken for the base's own, which has no values to compare")
        else:
            own = np.asarray(entry.form.encode(np.asarray(leaf), 0))
            if not np.array_equal(np.asarray(tensors[key]).astype(own.dtype), own):
                problems.append(f"{key}: other values")
    if problems:
        raise MismatchError(
            f"{source} brings embeddings of its own, and the base is never changed by an adapter:\n"
            + paths.bullets(problems)
            + "\nPut them into the base parameters yourself (jaxadapt.read(path).tensors has them), then load it again"
        )
    return set(found)


def _has_values(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray | jax.Array) and not isinstance(leaf, Tracer)
