"""The keymaps of model families, and the lookup of `keymap=`. A new family is a file and a row of `TABLE`."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxadapt.core import errors, paths
from jaxadapt.keymaps.generic import GENERIC
from jaxadapt.keymaps.keymap import KeyMap, coverage, identifies, max_coverage, misfits
from jaxadapt.keymaps.weight import Weight

TABLE = {
    "llama": "LLAMA",
    "gpt": "GPT2 GPT2_DENSE GPT_NEO GPTJ",
    "bert": "BERT ROBERTA",
    "t5": "T5",
    "vit": "VIT",
    "clip": "CLIP",
    "whisper": "WHISPER",
    "moe": "MIXTRAL QWEN3_MOE GPT_OSS LLAMA4 DEEPSEEK_V3",
    "tunix": "LLAMA3 QWEN2 QWEN3 QWEN3_MOE",
    "gemma": "TUNIX_GEMMA TUNIX_GEMMA2 TUNIX_GEMMA3 TUNIX_GEMMA4 GEMMA2_2B GEMMA2 GEMMA3 GEMMA3N GEMMA4 GEMMA4_MOE",
    "maxtext": "LLAMA31 LLAMA3 QWEN2 QWEN3 GEMMA2 GEMMA3 GEMMA3_4B GEMMA3_12B GEMMA3_27B"
    " MIXTRAL QWEN3_MOE GPT_OSS GPT_OSS_BLOCKS DEEPSEEK_V3 KIMI_K2",
    "keras": "LLAMA QWEN3 GEMMA3",
    "easydel": "LLAMA",
    "openpi": "PI0",
}
"""`{file of this package: its keymaps}`, in the order in which families are tried."""


def load_families(table: Mapping[str, str]) -> dict[str, KeyMap]:
    """Return `{name: keymap}` of the rows of a table such as `TABLE`."""
    files = {file: vars(importlib.import_module(f"{__name__}.{file}")) for file in table}
    keymaps: list[KeyMap] = [files[file][name] for file, names in table.items() for name in names.split()]
    return {keymap.name: keymap for keymap in keymaps}


FAMILIES = load_families(TABLE)
_SCAN_AXES = range(3)
_LAYER = re.compile(r"\d+(?=\.)")
_BLOCK = frozenset("012345")


def get_family(name: str, families: Mapping[str, KeyMap] = FAMILIES) -> KeyMap:
    """Return a keymap by name: "llama", "llama/scan1" for layers stacked on axis 1, "llama/vl" for another spelling.

    Raises `KeyMapError` for an unknown name.

    >>> get_family("llama/scan1").name
    'llama/scan1'
    """
    base, *changes = name.split("/")
    keymap = {**families, GENERIC.name: GENERIC}.get(base)
    if keymap is None:
        close = errors.close_matches((base,), tuple(families))
        guess = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
        raise errors.KeyMapError(
            f"no family is called {name!r}{guess} Known families: {', '.join(sorted(families))} (add /scan0, /scan1, …"
            f" for layers stacked on that axis) and {GENERIC.name!r}. Mistral, Qwen 2 and Qwen 3 with Hugging Face's"
            " names are 'llama'"
        )
    for change in changes:
        axis = change.removeprefix("scan")
        keymap = keymap.scanned(int(axis)) if change != axis and axis.isdecimal() else keymap.with_spelling(change)
    return keymap


def resolve_keymap(
    keymap: KeyMap | str | None,
    shapes: Mapping[str, tuple[int, ...]],
    families: Mapping[str, KeyMap] = FAMILIES,
) -> KeyMap:
    """Return the keymap for an argument `keymap=`; None and "auto" recognize it from the model's paths and shapes.

    "auto" selects the family that matches most leaves, and of several such families the one with the fewest unused
    entries. A head or a norm without an entry stays unmapped, which is an error only if it is targeted. If no family
    matches, it selects the generic keymap.

    Args:
        keymap: a keymap, the name of a family, "auto" or None.
        shapes: the shapes of the model's weights by dotted path.
        families: the families to choose from, by name.

    Raises `KeyMapError` naming the candidates if the best families disagree, or if the best one is not verified.
    """
    if isinstance(keymap, KeyMap):
        return keymap
    given: Any = keymap
    if not isinstance(given, str | None):
        raise errors.KeyMapError(f"keymap: expected a KeyMap or the name of a family, found {type(given).__name__}")
    if keymap not in (None, "auto"):
        return get_family(keymap, families)
    # All layers have the same kinds of leaves, so one leaf of each kind is enough. A number at the end is part of a
    # weight's name (wi_0, wi_1). In a model whose blocks are several layers, at most six, these layers differ.
    kinds = {(_LAYER.sub(lambda n: n[0] if n[0] in _BLOCK else "6", p), shape): p for p, shape in shapes.items()}
    return _recognize(tuple(families.values()), tuple((leaf, shape) for (_, shape), leaf in kinds.items()))


@functools.lru_cache(maxsize=128)  # the same model is recognized for each adapter
def _recognize(keymaps: tuple[KeyMap, ...], leaves: tuple[tuple[str, tuple[int, ...]], ...]) -> KeyMap:
    samples, counts, best = dict(leaves), dict[KeyMap, int](), 1
    # In most keymaps few entries match any of these leaves, so their upper bound excludes them cheaply.
    candidates = [(max_coverage(f, samples, stacked), f, stacked) for f in keymaps for stacked in (False, True)]
    for bound, family, stacked in sorted(candidates, key=lambda p: -p[0]):
        if bound < best:
            break
        forms = map(family.scanned, _SCAN_AXES) if stacked else [family]
        other = (t for t in forms if not stacked or t.weights != family.weights)  # not of a family that is stacked
        counts |= {t: coverage(t, samples) for t in other}
        best = max([best, *counts.values()])
    fitting = [t for t, count in counts.items() if count == best]
    if not fitting:
        return GENERIC
    unused = {t: len(t.weights) - len(set(_matched_entries(t, samples))) for t in fitting}
    chosen = [t for t in fitting if unused[t] == min(unused.values())]
    rivals = [t for t in fitting if _matched_entries(t, samples) != _matched_entries(chosen[0], samples)]
    if rivals or len(chosen) > 1:
        names = ", ".join(_format_name(t) for t in dict.fromkeys((*chosen, *rivals)))
        raise errors.KeyMapError(
            f"cannot recognize the model: its leaves fit several keymaps: {names}; select one with keymap="
        )
    if not chosen[0].proved:
        name = chosen[0].name
        raise errors.KeyMapError(
            f"the model looks like {name!r}, but that keymap has not been verified against the real models; pass"
            f" keymap={name!r} to use it, or keymap={GENERIC.name!r} for the generic keymap"
        )
    return chosen[0]


def family_of_leaves(leaves: Iterable[str], families: Mapping[str, KeyMap] = FAMILIES) -> KeyMap:
    """Return the family that matches all of these leaves, by their names only, or the generic keymap if none does.

    Raises `KeyMapError` if several families match and disagree.
    """
    leaves = tuple(leaves)
    known = [t for t in families.values() if all(t.match(leaf) is not None for leaf in leaves)]
    if not known:
        return GENERIC
    if any(_matched_entries(t, leaves) != _matched_entries(known[0], leaves) for t in known):
        raise errors.KeyMapError(
            "cannot recognize the model: the adapted leaves fit several keymaps:"
            f" {', '.join(map(_format_name, known))}; select one with keymap="
        )
    return min(known, key=lambda t: len(t.needs))  # they agree: the one with the fewest conditions


def describe_nearest_family(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return a text for an error message: the family most similar to a model, and the leaves that do not fit it.

    The text is empty if no family is similar.
    """
    stacked = [keymap.scanned(axis) for keymap in FAMILIES.values() for axis in _SCAN_AXES]
    known = {
        t: sum(t.match(leaf) is not None for leaf in shapes)
        for t in (*FAMILIES.values(), *stacked)
        if identifies(t, shapes)
    }
    most = max(known.values(), default=0)
    candidates = [(keymap, list(misfits(keymap, shapes))) for keymap, count in known.items() if count == most]
    if not candidates:
        return ""
    keymap, reasons = min(candidates, key=lambda item: len(item[1]))
    return (
        f"\nThe most similar keymap is {keymap.name!r}, with entries for {most} of {len(shapes)} weights. It does not"
        f" fit because of\n" + paths.bullets(reasons)
    )


def _matched_entries(keymap: KeyMap, leaves: Iterable[str]) -> list[Weight | None]:
    return [None if match is None else match.weight for match in map(keymap.match, leaves)]


def _format_name(keymap: KeyMap) -> str:
    return keymap.name if keymap.proved else f"{keymap.name} (not verified)"


__all__ = ["FAMILIES", "describe_nearest_family", "family_of_leaves", "get_family", "resolve_keymap"]
