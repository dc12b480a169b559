"""Tied embeddings: a head that shares the weight of the token embedding. Here they are one leaf, in PEFT two modules.

With `ensure_weight_tying` PEFT keeps one adapter for both and writes it twice, once under each name. Without it, an
adapter or copy under one name does not affect the weight's use under the other name. A keymap lists the modules that
can be tied (`KeyMap.tied`); a model ties them if it has no leaf for the head.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxadapt.configs import Config, matching
from jaxadapt.core.errors import ConfigError, MismatchError, raise_listed, warn
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.plan import PlanEntry
from jaxadapt.methods import METHODS

_C = TypeVar("_C", bound=Config)

NAMES = ("embed_tokens", "lm_head")
"""The module names that PEFT recognises as embeddings."""


def tied_heads(keymap: KeyMap, leaves: Iterable[str]) -> dict[str, str]:
    """Return `{head: token embedding whose weight it uses}` for a model with these leaves, as PyTorch modules."""
    if not keymap.tied:
        return {}
    keys = {match.weight.key for leaf in leaves if (match := keymap.match(leaf)) is not None}
    return {
        head.removesuffix(".weight"): embedding.removesuffix(".weight")
        for head, embedding in keymap.tied
        if head not in keys and embedding in keys
    }


def resolve_tying(config: _C, keymap: KeyMap, leaves: Collection[str]) -> _C:
    """Return the configuration as PEFT rewrites it for `ensure_weight_tying`: the token embedding replaces the head.

    Raises `ConfigError` if, by its keymap, the model ties no weights.
    """
    if not config.get("ensure_weight_tying"):
        return config
    tied = tied_heads(keymap, leaves)
    if not tied:
        raise ConfigError(
            f"ensure_weight_tying=True has no effect: by the keymap {keymap.name!r} this model has no tied weights (a"
            " head without a leaf of its own). Leave the field out, or list the tied weights in KeyMap(tied=...)"
        )
    saved: tuple[str, ...] = config.get("modules_to_save") or ()
    targets: Any = config.get("target_modules")
    if any(name.rpartition(".")[2] in NAMES for name in saved):
        return config.replace(modules_to_save=_with_embeddings(saved, tied))
    if isinstance(targets, str):
        (embedding,) = set(tied.values())
        suffix = f"|^{re.escape(embedding)}$)"
        if not any(re.fullmatch(targets, name) for name in (*NAMES, embedding)) or targets.endswith(suffix):
            return config
        return config.replace(target_modules=f"(?:{targets}{suffix}")
    if any(name.rpartition(".")[2] in NAMES for name in targets or ()):
        return config.replace(target_modules=_with_embeddings(targets, tied))
    if config.get("trainable_token_indices") is None:
        warn(
            "ensure_weight_tying=True has no effect: neither target_modules nor modules_to_save names the embeddings",
        )
    return config


def _with_embeddings(names: Sequence[str], tied: Mapping[str, str]) -> list[str]:
    """Return these names with the token embeddings in place of the heads."""
    replaced = list(names)
    replaced += [embedding for embedding in dict.fromkeys(tied.values()) if embedding not in replaced]
    for head in tied:
        first = next((name for name in replaced if re.match(rf"(^|.*\.){name}($|\..*)", head)), None)
        replaced = [name for name in replaced if name != first]
    return replaced


def repeats_heads(config: Config, keymap: KeyMap, leaves: Iterable[str] | None) -> bool:
    """Return True if PEFT's file has an embedding's tensors once more for the head tied to it.

    Args:
        leaves: the leaves of the base; None if they are not known, and then a method that does so by itself does not.
    """
    if config.get("ensure_weight_tying"):
        return True
    method = METHODS.get(config.peft_type)
    return method is not None and method.ties_heads and leaves is not None and bool(tied_heads(keymap, leaves))


def repeat_for_heads(config: Config, entries: Iterable[PlanEntry], keymap: KeyMap) -> list[PlanEntry]:
    """Return the entries that a file repeats under the head's name, as the method says (`Method.as_head`)."""
    method = METHODS.get(config.peft_type)
    as_head = {**_COPIES, **({} if method is None else method.as_head)}
    repeated: list[PlanEntry] = []
    for head, embedding in keymap.tied:
        embedding_prefix, head_prefix = (f"{keymap.prefix}{key.removesuffix('weight')}" for key in (embedding, head))
        for entry in entries:
            suffix = entry.keys[0].removeprefix(embedding_prefix)
            if not entry.keys[0].startswith(embedding_prefix) or suffix not in as_head:
                continue
            form = entry.form
            if suffix != as_head[suffix]:
                form = dataclasses.replace(form, right=form.right[::-1])
            repeated.append(PlanEntry(entry.path, form, (f"{head_prefix}{as_head[suffix]}",)))
    return repeated


_COPIES = {"weight": "weight", "base_layer.weight": "base_layer.weight"}


def redundant_head_keys(
    config: Config, tensors: Mapping[str, Any], entries: Iterable[PlanEntry], keymap: KeyMap, source: str
) -> set[str]:
    """Return the keys of a file that repeat others for the head; raise `MismatchError` if their values differ."""
    entries = list(entries)
    first = {entry.path: entry for entry in entries}
    repeated = {entry.keys[0]: entry for entry in repeat_for_heads(config, entries, keymap) if entry.keys[0] in tensors}
    different: list[str] = []
    for key, entry in repeated.items():
        original_key = first[entry.path].keys[0]
        if original_key not in tensors:
            continue  # another check reports missing keys
        original, repetition = np.asarray(tensors[original_key]), np.asarray(tensors[key])
        if not np.array_equal(original if entry.form.right == first[entry.path].form.right else original.T, repetition):
            different.append(f"{key} and {original_key}")
    raise_listed(
        MismatchError,
        f"{source}: the head is tied to the embedding, so these tensors must be equal, and they differ:",
        different,
    )
    return set(repeated)


def lookup_only_tables(config: Config, keymap: KeyMap, leaves: Iterable[str]) -> frozenset[str]:
    """Return the token embeddings whose copy replaces the weight in the lookup only; PEFT's head is another module."""
    if config.get("ensure_weight_tying") or not config.get("modules_to_save"):
        return frozenset()
    return frozenset(
        embedding for embedding in tied_heads(keymap, leaves).values() if matching.is_saved(config, embedding)
    )
