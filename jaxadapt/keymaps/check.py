"""Whether a family's table fits: a model's leaves, a checkpoint's keys, or the two together. Names and shapes only."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxadapt.core.errors import KeyMapError, MismatchError
from jaxadapt.keymaps import parts as pieces
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import Weight

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class KeyMapReport:
    """What a table makes of a model or a checkpoint.

    Attributes:
        claims: `{leaf: its keys}`; of a checkpoint alone, the leaves that a model of the family would have.
        unclaimed: leaves and keys that no line names.
        missing: keys that the model (or its like layers) has, and the checkpoint lacks.
        twice: keys that several leaves claim, leaves that several lines name.
        misshapen: leaves and keys whose shape contradicts their line, or each other.
        lines: how many leaves (of a checkpoint alone: keys) each line of the table names, those without any included.
        wrong: the lines of which nothing fits: each leaf's layout, or each tensor's name or shape, is another.
    """

    family: str
    claims: Mapping[str, tuple[str, ...]]
    lines: Mapping[Weight, int]
    unclaimed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    wrong: tuple[Weight, ...] = ()

    @property
    def problems(self) -> dict[str, tuple[str, ...]]:
        """Those kinds of which there are any."""
        kinds = ("unclaimed", "missing", "twice", "misshapen")
        return {kind: found for kind in kinds if (found := getattr(self, kind))}

    @property
    def fits(self) -> bool:
        """Whether everything is claimed exactly once, and nothing is missing."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        kinds = ("unclaimed", "missing", "twice", "misshapen")
        return {
            "family": self.family,
            "fits": self.fits,
            "claimed": {leaf: list(keys) for leaf, keys in self.claims.items()},
            **{kind: list(getattr(self, kind)) for kind in kinds},
            "wrong": [{"leaf": w.leaf, "key": w.key, "pattern": w.pattern} for w in self.wrong],
            "unused": [w.leaf for w, count in self.lines.items() if not count],
        }


def check_keymap(table: KeyMap, leaves: Shapes | None = None, tensors: Shapes | None = None) -> KeyMapReport:
    """What a table claims of a model's base weights, of a PyTorch checkpoint, or of both.

    Args:
        leaves: the model's shapes by dotted path. tensors: the checkpoint's by key. At least one of them.

    Nothing is raised for what does not fit: it is in the result. A tied head may be in a checkpoint or not.

    >>> line = Weight("layers.{l}.q.kernel", "layers.{l}.q.weight", "i o -> o i")
    >>> found = check_keymap(KeyMap("tiny", (line,)), {"layers.0.q.kernel": (2, 3)}, {"layers.0.q.weight": (3, 2)})
    >>> found.fits, found.claims
    (True, {'layers.0.q.kernel': ('layers.0.q.weight',)})
    >>> check_keymap(KeyMap("tiny", (line,)), tensors={"layers.1.q.weight": (3, 2), "head.weight": (9, 2)}).problems
    {'unclaimed': ('head.weight',), 'missing': ('layers.0.q.weight',)}
    """
    if leaves is None:
        return _checkpoint(table, tensors or {})
    found = _model(table, leaves)
    return found if tensors is None else _both(table, found, leaves, tensors)


def _model(table: KeyMap, leaves: Shapes) -> KeyMapReport:
    claims: dict[str, tuple[str, ...]] = {}
    lines = dict.fromkeys(table.weights, 0)
    unclaimed: list[str] = []
    misshapen: list[str] = []
    twice: list[str] = []
    odd = dict.fromkeys(table.weights, 0)
    for leaf, shape in leaves.items():
        hits = [w for w in table.weights if w.regex.fullmatch(leaf)]
        if not hits:
            unclaimed.append(leaf)
        elif len(hits) > 1:
            twice.append(f"{leaf}: {len(hits)} lines")
        else:
            lines[hits[0]] += 1
            try:
                entry = plan.base_plan_entry(table, leaf, shape)
            except (KeyMapError, MismatchError) as error:
                misshapen.append(str(error))
                odd[hits[0]] += 1
            else:
                assert entry is not None
                claims[leaf] = entry.keys
    owners: dict[str, list[str]] = {}
    for leaf, keys in claims.items():
        for key in keys:
            owners.setdefault(key, []).append(leaf)
    twice += [f"{key}: {', '.join(who)}" for key, who in owners.items() if len(who) > 1]
    missing = tuple(_needed(table, lines))
    claims = {leaf: tuple(map(pieces.file_key, keys)) for leaf, keys in claims.items()}
    wrong = _all_of(lines, odd)
    return KeyMapReport(table.name, claims, lines, tuple(unclaimed), missing, tuple(twice), tuple(misshapen), wrong)


def _all_of(lines: Mapping[Weight, int], odd: Mapping[Weight, int]) -> tuple[Weight, ...]:
    return tuple(w for w, count in lines.items() if count and odd.get(w) == count)


def _needed(table: KeyMap, lines: Mapping[Weight, int]) -> Iterable[str]:
    """What tells this family from others, and is not there."""
    return (f"{w.key}, which {table.name} always has" for w, n in lines.items() if not n and w.leaf in table.needs)


def _both(table: KeyMap, model: KeyMapReport, leaves: Shapes, tensors: Shapes) -> KeyMapReport:
    wanted: dict[str, tuple[int, ...]] = {}
    ties = dict(table.tied)
    known = {leaf: site.weight for leaf in model.claims if (site := table.match(leaf)) is not None}
    keys, bad = dict.fromkeys(table.weights, 0), dict.fromkeys(table.weights, 0)
    for leaf in model.claims:
        entry = plan.base_plan_entry(table, leaf, leaves[leaf])
        assert entry is not None
        for key in entry.keys:
            wanted[pieces.file_key(key)] = shape = pieces.joined_shape([key], entry.form.file_shape)
            line = known[leaf]
            keys[line] += 1
            bad[line] += tensors.get(pieces.file_key(key), tensors.get(ties.get(key, ""))) != shape
    odd = leaves.keys() - model.claims.keys()  # said already
    spare = ties.keys() | {key for key in tensors if is_buffer(table, key) or odd.intersection(_leaves(table, key))}
    return dataclasses.replace(
        model,
        unclaimed=(*model.unclaimed, *(key for key in tensors if key not in wanted and key not in spare)),
        missing=(*model.missing, *(key for key in wanted if key not in tensors and ties.get(key) not in tensors)),
        misshapen=(
            *model.misshapen,
            *(
                f"{key}: the model's weight is {_by(shape)} in PyTorch's layout, the checkpoint's {_by(tensors[key])}"
                for key, shape in wanted.items()
                if key in tensors and tensors[key] != shape
            ),
        ),
        wrong=(*model.wrong, *_all_of(keys, bad)),
    )


def _checkpoint(table: KeyMap, tensors: Shapes) -> KeyMapReport:
    table = table.spelling_for(tensors, [w.leaf.replace("{l}", "0") for w in table.weights])
    claims: dict[str, list[str]] = {}
    held = {w: dict[str, Mapping[str, str]]() for w in table.weights}
    misshapen: list[str] = []
    odd = dict.fromkeys(table.weights, 0)
    for key, shape in tensors.items():
        for w, mine in held.items():
            texts = w.match_key(key)
            if texts is None:
                continue
            mine[key] = texts
            claims.setdefault(w.fill_leaf(texts), []).append(key)
            if len(w.right) != len(shape):
                odd[w] += 1
                misshapen.append(f"{key}: {_by(shape)}, its line {w.pattern!r} names {len(w.right)} axes on the right")
    named = {key for mine in held.values() for key in mine} | {key for key, _ in table.tied}
    lines = {w: len(mine) for w, mine in held.items()}
    return KeyMapReport(
        table.name,
        {leaf: tuple(keys) for leaf, keys in claims.items()},
        lines,
        unclaimed=tuple(key for key in tensors if key not in named and not is_buffer(table, key)),
        missing=(*_needed(table, lines), *dict.fromkeys(_gaps(held.items(), tensors))),
        misshapen=tuple(misshapen),
        wrong=_all_of(lines, odd),
    )


def _gaps(held: Iterable[tuple[Weight, Mapping[str, Mapping[str, str]]]], tensors: Shapes) -> Iterable[str]:
    """Layers are alike, and the parts of a fused weight come together: what one layer has and another lacks."""
    held = list(held)
    lines = [w for w, _ in held]
    layers: dict[str, int] = {}  # encoder and decoder may have different numbers of them
    for w, mine in held:
        for texts in mine.values():
            layers[_stack(w)] = max(layers.get(_stack(w), 0), int(texts.get("l", -1)) + 1)
    blocks = tuple(w.key.rpartition(".")[0].rpartition(".")[0] + "." for w, _ in held if w.kind == "experts")
    sparse = {texts["l"] for w, mine in held if w.kind == "experts" for texts in mine.values() if "l" in texts}
    for w, mine in held:
        numbers = [n for n in map(str, range(layers.get(_stack(w), 0))) if w.has_layer(n)]
        here = {texts.get("l") for texts in mine.values()}
        # Where one layer has experts and another none, each is like its own kind.
        if w.key.startswith(blocks) and (here <= sparse or not here & sparse):
            numbers = [n for n in numbers if (n in sparse) == (here <= sparse)]
        alone = len(numbers) > 2 and all(texts.get("l") == "0" for texts in mine.values())
        # (What the first layer alone has, as T5 its relative positions, the others need not have.)
        for axis, choices in (("l", () if alone else numbers), *w.over):
            others = dict.fromkeys(tuple(sorted((k, v) for k, v in t.items() if k != axis)) for t in mine.values())
            for other in others if any(axis in t for t in mine.values()) else ():
                at = ({**dict(other), axis: text} for text in choices)
                lost = (texts for texts in at if w.fill_key(texts) not in tensors)
                yield from (w.fill_key(texts) for texts in lost if not _elsewhere(w, texts, lines, tensors))


def _elsewhere(weight: Weight, texts: Mapping[str, str], lines: Iterable[Weight], tensors: Shapes) -> bool:
    """Whether what there is of a fused leaf is whole in others: where k serves as v, k is a leaf of its own."""

    def parts(line: Weight, texts: Mapping[str, str]) -> set[str]:
        names, choices = [axis for axis, _ in line.over], itertools.product(*(names for _, names in line.over))
        return {line.fill_key({**texts, **dict(zip(names, choice, strict=True))}) for choice in choices}

    def whole(line: Weight, key: str) -> bool:
        found = line.match_key(key)
        return found is not None and parts(line, found) <= tensors.keys()

    here = parts(weight, texts) & tensors.keys()
    return bool(here) and all(any(whole(line, key) for line in lines if line is not weight) for key in here)


def _stack(weight: Weight) -> str:
    return weight.key.partition("{l}")[0]


def _leaves(table: KeyMap, key: str) -> set[str]:
    """The leaves that a key may lie in."""
    found = ((w, w.match_key(key)) for w in table.weights)
    return {w.fill_leaf(texts) for w, texts in found if texts is not None}


def is_buffer(table: KeyMap, key: str) -> bool:
    """Whether a key of a PyTorch file is no weight."""
    return any(re.fullmatch(r"\d+".join(map(re.escape, b.split("{l}"))), key) for b in table.buffers)


def _by(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "a scalar"
