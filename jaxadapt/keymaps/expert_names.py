"""Names of experts' weights: one tensor for each expert in model folders, one tensor for all experts in keymaps.

    {"…experts.3.w1.weight": (f, d), …} ──expert_rows──► {"…experts.gate_up_proj": names by expert and part}

transformers 5 joins the tensors of a folder when it loads them, to (e, 2f, d), and splits them when it saves (its
`conversion_mapping.py`). `KeyMap.expert_modules` has their names. Pure: names and shapes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping

from jaxadapt.core.errors import MismatchError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.templates import name_regex

Rows = tuple[tuple[str, ...], ...]
"""The tensors of single experts by expert and part (gate, up)."""

_WEIGHT = ".weight"


def expert_rows(keymap: KeyMap, keys: Iterable[str], source: str) -> tuple[dict[str, Rows], dict[str, str]]:
    """Return the tensors of single experts to join, `{tensor: rows}`, and the tensors to rename, `{name: key}`.

    Both are empty if the folder already has the tensors of all experts.

    Args:
        keymap: the keymap, whose `expert_modules` has the names.
        keys: the keys of the folder.
        source: the folder, for the message.

    Raises `MismatchError` listing every missing part.
    """
    available = dict.fromkeys(keys)
    parts_of: dict[str, dict[tuple[int, int], str]] = {}
    renamed: dict[str, str] = {}
    width: dict[str, int] = {}
    for parameter, modules in keymap.expert_modules:
        patterns = [re.compile(name_regex(module) + re.escape(_WEIGHT)) for module in modules]
        for key in available:
            for part, single in enumerate(patterns):
                texts = single.fullmatch(key)
                if texts is None:
                    continue
                name = parameter.format(**texts.groupdict())
                if name in available:
                    break
                if "e" in single.groupindex:
                    parts_of.setdefault(name, {})[int(texts["e"]), part] = key
                    width[name] = len(modules)
                else:
                    renamed[name] = key
                break
    joined: dict[str, Rows] = {}
    missing: list[str] = []
    for name, parts in parts_of.items():
        rows = [[(e, part) for part in range(width[name])] for e in expert_numbers([e for e, _ in parts])]
        missing += [f"{name}: part {p} of expert {e}" for row in rows for e, p in row if (e, p) not in parts]
        joined[name] = tuple(tuple(parts.get(index, "") for index in row) for row in rows)
    raise_listed(MismatchError, f"{source}: tensors of these experts are missing:", missing)
    return joined, renamed


def expert_numbers(experts: Collection[int]) -> list[int]:
    """Return the numbers from 0 to the largest expert, with at most 16 of the missing ones.

    The limit is for invalid files, which may have any number.

    >>> expert_numbers([1, 0, 3]), len(expert_numbers([10**12]))
    ([0, 1, 2, 3], 17)
    """
    present = set(experts)
    missing = itertools.islice((e for e in range(max(present)) if e not in present), 16)
    return sorted(present.union(missing))


def folder_names(keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Rows], dict[str, str]]:
    """Return the names of a model's tensors in a folder, `{tensor: rows}` and `{tensor: name}`.

    This is the inverse of `expert_rows`.
    """
    split: dict[str, Rows] = {}
    renamed: dict[str, str] = {}
    for parameter, modules in keymap.expert_modules:
        parameter_regex = re.compile(name_regex(parameter))
        for name, shape in shapes.items():
            texts = parameter_regex.fullmatch(name)
            if texts is None:
                continue
            if "{e}" in modules[0]:
                split[name] = tuple(
                    tuple(m.format(**texts.groupdict(), e=e) + _WEIGHT for m in modules) for e in range(shape[0])
                )
            else:
                renamed[name] = modules[0].format(**texts.groupdict()) + _WEIGHT
    return split, renamed
