"""Tied embeddings: a head that shares the table of tokens' weight. Here they are one leaf, in PEFT two modules.

With `ensure_weight_tying` PEFT keeps one adapter for both and writes it twice, once under each name; without, what
is adapted or copied under the one name leaves the other's use of the weight alone. A table of names says what is
tied (`KeyMap.tied`), and the model whether it is: then it has no leaf for the head.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxadapt.configs import Config, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, MismatchError, warn
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.plan import PlanEntry

_C = TypeVar("_C", bound=Config)

NAMES = ("embed_tokens", "lm_head")
"""What PEFT takes for an embedding when it decides by itself."""


def tied_heads(keymap: KeyMap, leaves: Iterable[str]) -> dict[str, str]:
    """`{head: the table of tokens whose weight it uses}` of a model with these leaves, as PyTorch's modules."""
    if not keymap.tied:
        return {}
    keys = {site.weight.key for leaf in leaves if (site := keymap.match(leaf)) is not None}
    return {
        head.removesuffix(".weight"): same.removesuffix(".weight")
        for head, same in keymap.tied
        if head not in keys and same in keys
    }


def resolve_tying(config: _C, keymap: KeyMap, leaves: Collection[str]) -> _C:
    """The configuration as PEFT rewrites it for `ensure_weight_tying`: the table stands for the head as well.

    Raises `ConfigError` where the model ties nothing, as far as its table of names tells.
    """
    if not config.get("ensure_weight_tying"):
        return config
    tied = tied_heads(keymap, leaves)
    if not tied:
        raise ConfigError(
            f"ensure_weight_tying=True: the table {keymap.name!r} knows of no tied weights in this model (a head that"
            " has none of its own); leave the field out, which then means the same, or say in a KeyMap what is tied"
        )
    saved: tuple[str, ...] = config.get("modules_to_save") or ()
    wanted: Any = config.get("target_modules")
    if any(name.rpartition(".")[2] in NAMES for name in saved):
        return config.replace(modules_to_save=_tied(saved, tied))
    if isinstance(wanted, str):
        (table,) = set(tied.values())
        end = f"|^{re.escape(table)}$)"
        if not any(re.fullmatch(wanted, name) for name in (*NAMES, table)) or wanted.endswith(end):
            return config
        return config.replace(target_modules=f"(?:{wanted}{end}")
    if any(name.rpartition(".")[2] in NAMES for name in wanted or ()):
        return config.replace(target_modules=_tied(wanted, tied))
    if config.get("trainable_token_indices") is None:
        warn(
            "ensure_weight_tying=True, and neither target_modules nor modules_to_save names the embeddings: it has no"
            " effect",
        )
    return config


def _tied(names: Sequence[str], tied: Mapping[str, str]) -> list[str]:
    """These names with the table for the heads."""
    found = list(names)
    found += [table for table in dict.fromkeys(tied.values()) if table not in found]
    for head in tied:
        first = next((name for name in found if re.match(rf"(^|.*\.){name}($|\..*)", head)), None)
        found = [name for name in found if name != first]
    return found


def repeat_for_heads(entries: Iterable[PlanEntry], keymap: KeyMap) -> list[PlanEntry]:
    """What a file holds once more, under the head's name: of LoRA's factors A is there B, turned, and B is A."""
    out: list[PlanEntry] = []
    for head, same in keymap.tied:
        at, to = (f"{keymap.prefix}{key.removesuffix('weight')}" for key in (same, head))
        for entry in entries:
            suffix = entry.keys[0].removeprefix(at)
            if not entry.keys[0].startswith(at) or suffix not in _AS_HEAD:
                continue
            form = entry.form
            if suffix != _AS_HEAD[suffix]:
                form = dataclasses.replace(form, right=form.right[::-1])
            out.append(PlanEntry(entry.path, form, (f"{to}{_AS_HEAD[suffix]}",)))
    return out


_AS_HEAD = {
    "weight": "weight",
    "base_layer.weight": "base_layer.weight",
    "lora_embedding_A": "lora_B.weight",
    "lora_embedding_B": "lora_A.weight",
}


def redundant_head_keys(
    tensors: Mapping[str, Any], entries: Iterable[PlanEntry], keymap: KeyMap, source: str
) -> set[str]:
    """The keys of a file that repeat others for the head; `MismatchError` where they say something else."""
    entries = list(entries)
    first = {e.path: e for e in entries}
    again = {e.keys[0]: e for e in repeat_for_heads(entries, keymap) if e.keys[0] in tensors}
    apart: list[str] = []
    for key, entry in again.items():
        same = first[entry.path].keys[0]
        if same not in tensors:
            continue  # reported as missing
        mine, other = np.asarray(tensors[same]), np.asarray(tensors[key])
        if not np.array_equal(mine if entry.form.right == first[entry.path].form.right else mine.T, other):
            apart.append(f"{key} and {same}")
    if apart:
        raise MismatchError(
            f"{source}: ensure_weight_tying says that these are one, and they differ:\n" + paths.bullets(apart)
        )
    return set(again)


def lookup_only_tables(config: Config, keymap: KeyMap, leaves: Iterable[str]) -> frozenset[str]:
    """The tables of tokens of which a copy counts in the lookup alone, as PEFT has it: the head is another module."""
    if config.get("ensure_weight_tying") or not config.get("modules_to_save"):
        return frozenset()
    return frozenset(t for t in tied_heads(keymap, leaves).values() if matching.is_saved(config, t))
