"""Base weights with a tensor for each expert, as folders of models hold them, and with one for all, as tables do.

    {"…experts.3.w1.weight": (f, d), …} ──rows──► {"…experts.gate_up_proj": names by expert and part}, (e, 2f, d)

transformers 5 puts a folder's tensors together when it loads it, and apart again when it saves (its
`conversion_mapping.py`); what they are called there is in a table (`KeyMap.each`). Pure: names and shapes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping

from jaxadapt.core import paths
from jaxadapt.core.errors import MismatchError
from jaxadapt.keymaps.keymap import KeyMap

Rows = tuple[tuple[str, ...], ...]
"""The tensors of single experts by expert and part (gate, up)."""

_WEIGHT = ".weight"


def expert_rows(table: KeyMap, keys: Iterable[str], source: str) -> tuple[dict[str, Rows], dict[str, str]]:
    """What of a folder's tensors belongs together, `{tensor: rows}`, and what is only called otherwise, `{name: key}`.

    Nothing, where the folder has the tensors of all experts. Raises `MismatchError` with every part that is missing.
    """
    have = dict.fromkeys(keys)
    found: dict[str, dict[tuple[int, int], str]] = {}
    renamed: dict[str, str] = {}
    width: dict[str, int] = {}
    for parameter, modules in table.each:
        patterns = [re.compile(name_regex(module) + re.escape(_WEIGHT)) for module in modules]
        for key in have:
            for part, single in enumerate(patterns):
                texts = single.fullmatch(key)
                if texts is None:
                    continue
                name = parameter.format(**texts.groupdict())
                if name in have:
                    break
                if "e" in single.groupindex:
                    found.setdefault(name, {})[int(texts["e"]), part] = key
                    width[name] = len(modules)
                else:
                    renamed[name] = key
                break
    whole: dict[str, Rows] = {}
    missing: list[str] = []
    for name, mine in found.items():
        wanted = [[(e, part) for part in range(width[name])] for e in expert_numbers([e for e, _ in mine])]
        missing += [f"{name}: part {p} of expert {e}" for line in wanted for e, p in line if (e, p) not in mine]
        whole[name] = tuple(tuple(mine.get(at, "") for at in line) for line in wanted)
    if missing:
        raise MismatchError(f"{source}: experts without all of their tensors:\n" + paths.bullets(missing))
    return whole, renamed


def expert_numbers(experts: Collection[int]) -> list[int]:
    """The numbers of experts from 0 to the last of these; of a gap its beginning, as a file may say any number.

    >>> expert_numbers([1, 0, 3]), len(expert_numbers([10**12]))
    ([0, 1, 2, 3], 17)
    """
    held = set(experts)
    gap = itertools.islice((e for e in range(max(held)) if e not in held), 16)
    return sorted(held.union(gap))


def folder_names(table: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Rows], dict[str, str]]:
    """The inverse, for a model's tensors: what each is called in a folder, `{tensor: rows}` and `{tensor: name}`."""
    whole: dict[str, Rows] = {}
    renamed: dict[str, str] = {}
    for parameter, modules in table.each:
        whole_name = re.compile(name_regex(parameter))
        for name, shape in shapes.items():
            texts = whole_name.fullmatch(name)
            if texts is None:
                continue
            if "{e}" in modules[0]:
                whole[name] = tuple(
                    tuple(m.format(**texts.groupdict(), e=e) + _WEIGHT for m in modules) for e in range(shape[0])
                )
            else:
                renamed[name] = modules[0].format(**texts.groupdict()) + _WEIGHT
    return whole, renamed


def name_regex(template: str) -> str:
    """The expression of a name with holes for numbers, each written in one way (no two names are of one expert).

    >>> [bool(re.fullmatch(name_regex("experts.{e}.w1"), f"experts.{e}.w1")) for e in ("0", "12", "012")]
    [True, True, False]
    """
    parts = re.split(r"(\{\w+\})", template)
    return "".join(rf"(?P<{p[1:-1]}>0|[1-9][0-9]*)" if p.startswith("{") else re.escape(p) for p in parts)
