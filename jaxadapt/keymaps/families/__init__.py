"""The tables, one file a model family, and how `keymap=` finds one. A new family is a file and a line."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxadapt.core import paths, suggest
from jaxadapt.core.errors import KeyMapError
from jaxadapt.keymaps.families import easydel, gemma, keras, maxtext, maxtext_gemma, maxtext_moe, moe, tunix
from jaxadapt.keymaps.families.bert import BERT, ROBERTA
from jaxadapt.keymaps.families.clip import CLIP
from jaxadapt.keymaps.families.gpt2 import GPT2, GPT2_DENSE
from jaxadapt.keymaps.families.gpt_neo import GPT_NEO, GPTJ
from jaxadapt.keymaps.families.llama import LLAMA
from jaxadapt.keymaps.families.t5 import T5
from jaxadapt.keymaps.families.vit import VIT
from jaxadapt.keymaps.families.whisper import WHISPER
from jaxadapt.keymaps.generic import GENERIC
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

_TABLES = (
    *(LLAMA, GPT2, GPT2_DENSE, GPT_NEO, GPTJ, BERT, ROBERTA, T5, VIT, CLIP, WHISPER),
    *(moe.MIXTRAL, moe.QWEN3_MOE, moe.GPT_OSS, moe.LLAMA4, moe.DEEPSEEK_V3),
    *(tunix.LLAMA3, tunix.QWEN2, tunix.QWEN3, tunix.QWEN3_MOE),
    *(gemma.TUNIX_GEMMA, gemma.TUNIX_GEMMA2, gemma.TUNIX_GEMMA3, gemma.TUNIX_GEMMA4),
    *(gemma.GEMMA2_2B, gemma.GEMMA2, gemma.GEMMA3, gemma.GEMMA3N, gemma.GEMMA4, gemma.GEMMA4_MOE),
    *(maxtext.LLAMA31, maxtext.LLAMA3, maxtext.QWEN2, maxtext.QWEN3),
    *(maxtext_gemma.GEMMA2, maxtext_gemma.GEMMA3),
    *(maxtext_gemma.GEMMA3_4B, maxtext_gemma.GEMMA3_12B, maxtext_gemma.GEMMA3_27B),
    *(maxtext_moe.MIXTRAL, maxtext_moe.QWEN3_MOE, maxtext_moe.GPT_OSS, maxtext_moe.GPT_OSS_BLOCKS),
    *(maxtext_moe.DEEPSEEK_V3, maxtext_moe.KIMI_K2),
    *(keras.LLAMA, keras.QWEN3, keras.GEMMA3, easydel.LLAMA),
)
FAMILIES: dict[str, KeyMap] = {table.name: table for table in _TABLES}
_SCAN_AXES = range(3)
_LAYER = re.compile(r"\d+(?=\.)")
_BLOCK = frozenset("012345")


def get_family(name: str) -> KeyMap:
    """A table by name: "llama", "llama/scan1" for layers stacked on axis 1, "llama/vl" for another spelling.

    >>> get_family("llama/scan1").name
    'llama/scan1'
    """
    base, *changes = name.split("/")
    table = {**FAMILIES, GENERIC.name: GENERIC}.get(base)
    if table is None:
        close = suggest.close_matches((base,), tuple(FAMILIES))
        guess = f"; {' or '.join(map(repr, close))} comes near" if close else ""
        raise KeyMapError(
            f"no family is called {name!r}{guess}. Known are {', '.join(sorted(FAMILIES))} (add /scan0, /scan1, … for"
            f" layers stacked on that axis) and {GENERIC.name!r}. Mistral, Qwen 2 and Qwen 3 under Hugging Face's names"
            " are 'llama'"
        )
    for change in changes:
        axis = change.removeprefix("scan")
        table = table.scanned(int(axis)) if change != axis and axis.isdecimal() else table.with_spelling(change)
    return table


def resolve_keymap(keymap: KeyMap | str | None, shapes: Mapping[str, tuple[int, ...]]) -> KeyMap:
    """The table `keymap=` asks for; None and "auto" recognise it from the model's paths and shapes.

    "auto" takes the family that accounts for most leaves, and of those the one with fewest lines to spare: a
    head or a norm it does not know is left unmapped, and an error only if it is targeted. Where the best
    disagree, or the best is not proved, it raises `KeyMapError` naming the candidates; where no family knows
    the leaves, the generic map serves.
    """
    if isinstance(keymap, KeyMap):
        return keymap
    given: Any = keymap
    if not isinstance(given, str | None):
        raise KeyMapError(f"keymap: expected a KeyMap or the name of a family, found {type(given).__name__}")
    if keymap not in (None, "auto"):
        return get_family(keymap)
    # Layers are alike: some leaves of each kind will do. (A number at the end is part of a weight's name: wi_0, wi_1;
    # and where a block is several layers, at most six, they are not alike.)
    kinds = {(_LAYER.sub(lambda n: n[0] if n[0] in _BLOCK else "6", p), shape): p for p, shape in shapes.items()}
    return _recognised(tuple(FAMILIES.values()), tuple((leaf, shape) for (_, shape), leaf in kinds.items()))


@functools.lru_cache(maxsize=128)  # adapters are swapped on one model
def _recognised(tables: tuple[KeyMap, ...], leaves: tuple[tuple[str, tuple[int, ...]], ...]) -> KeyMap:
    few, counts, best = dict(leaves), dict[KeyMap, int](), 1
    # Most tables have few lines that end like any of these leaves, and need not be tried, nor made.
    promise = [(f.max_coverage(few, stacked), f, stacked) for f in tables for stacked in (False, True)]
    for most, family, stacked in sorted(promise, key=lambda p: -p[0]):
        if most < best:
            break
        counts |= {t: t.coverage(few) for t in (map(family.scanned, _SCAN_AXES) if stacked else [family])}
        best = max(best, *counts.values())
    fitting = [t for t, count in counts.items() if count == best]
    if not fitting:
        return GENERIC
    spare = {t: len(t.weights) - len(set(_lines(t, few))) for t in fitting}
    chosen = [t for t in fitting if spare[t] == min(spare.values())]
    rivals = [t for t in fitting if _lines(t, few) != _lines(chosen[0], few)]
    if rivals or len(chosen) > 1:
        called = ", ".join(_called(t) for t in dict.fromkeys((*chosen, *rivals)))
        raise KeyMapError(f"the model's leaves fit several tables: {called}; say which with keymap=")
    if not chosen[0].proved:
        name = chosen[0].name
        raise KeyMapError(
            f"the model looks like {name!r}, whose table is not proved; keymap={name!r} takes it all the same, and"
            f" keymap={GENERIC.name!r} takes none"
        )
    return chosen[0]


def family_of_leaves(leaves: Iterable[str]) -> KeyMap:
    """The family all of these leaves belong to, where nothing but their names is known; else the generic map.

    Raises `KeyMapError` where families disagree about them.
    """
    leaves = tuple(leaves)
    known = [t for t in FAMILIES.values() if all(t.match(leaf) is not None for leaf in leaves)]
    if not known:
        return GENERIC
    named_ = dict.fromkeys(leaves, ())
    if any(_lines(t, named_) != _lines(known[0], named_) for t in known):
        raise KeyMapError(
            f"the adapted leaves fit several tables: {', '.join(map(_called, known))}; say which with keymap="
        )
    return min(known, key=lambda t: len(t.needs))  # of tables that agree, the one that asks for least


def nearest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Which family comes nearest to a model that none fits, and which leaves keep it from fitting; "" if none does."""
    stacked = [table.scanned(axis) for table in FAMILIES.values() for axis in _SCAN_AXES]
    known = {
        t: sum(t.match(leaf) is not None for leaf in shapes) for t in (*FAMILIES.values(), *stacked) if t.tells(shapes)
    }
    most = max(known.values(), default=0)
    found = [(table, list(table.misfits(shapes))) for table, count in known.items() if count == most]
    if not found:
        return ""
    table, misfits = min(found, key=lambda item: len(item[1]))
    return (
        f"\nThe table {table.name!r} comes nearest, with lines for {most} of {len(shapes)} weights. It does not fit"
        f" because of\n" + paths.bullets(misfits)
    )


def _lines(table: KeyMap, leaves: Iterable[str]) -> list[Weight | None]:
    sites = [table.match(leaf) for leaf in leaves]
    return [None if site is None else site.weight for site in sites]


def _called(table: KeyMap) -> str:
    return table.name if table.proved else f"{table.name} (not proved)"


__all__ = ["FAMILIES", "family_of_leaves", "get_family", "nearest", "resolve_keymap"]
