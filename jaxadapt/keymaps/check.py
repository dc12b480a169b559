"""Check a keymap against a model's leaves, a checkpoint's keys, or both. Pure: names and shapes only."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from jaxadapt.core.errors import KeyMapError, MismatchError
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.plan import (
    Plan,
    PlanEntry,
    base_plan_entry,
    contested_keys,
    file_key,
    joined_shape,
    unequal_parts,
)
from jaxadapt.keymaps.weight import Weight

Shapes = Mapping[str, tuple[int, ...]]

_KINDS = ("unclaimed", "missing", "twice", "misshapen")


@dataclasses.dataclass(frozen=True)
class KeyMapReport:
    """The result of `check_keymap`.

    Attributes:
        family: the name of the keymap.
        claims: `{leaf: its keys}`. For a checkpoint without a model, the leaves that a model of the family would have.
        counts: `{entry: number of matching leaves}`; for a checkpoint without a model, the number of matching keys.
        unclaimed: leaves and keys that no entry matches.
        missing: keys that the model (or a similar layer) has, but the checkpoint lacks.
        twice: keys that several leaves claim, and leaves that several entries match.
        misshapen: leaves and keys whose shapes contradict their entry, or each other.
        wrong: the entries with matches, but without any match of the right name and shape.
    """

    family: str
    claims: Mapping[str, tuple[str, ...]]
    counts: Mapping[Weight, int]
    unclaimed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    wrong: tuple[Weight, ...] = ()

    @property
    def problems(self) -> dict[str, tuple[str, ...]]:
        """`{kind: problems}` of the kinds of problems that occurred."""
        return {kind: problems for kind in _KINDS if (problems := getattr(self, kind))}

    @property
    def fits(self) -> bool:
        """True if every leaf and key is claimed exactly once and no key is missing."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            "family": self.family,
            "fits": self.fits,
            "claimed": {leaf: list(keys) for leaf, keys in self.claims.items()},
            **{kind: list(getattr(self, kind)) for kind in _KINDS},
            "wrong": [{"leaf": w.leaf, "key": w.key, "pattern": w.pattern} for w in self.wrong],
            "unused": [w.leaf for w, count in self.counts.items() if not count],
        }


def check_keymap(keymap: KeyMap, leaves: Shapes | None = None, tensors: Shapes | None = None) -> KeyMapReport:
    """Check a keymap against a model's base weights, a PyTorch checkpoint, or both.

    Problems are returned, not raised. A checkpoint may have a tied head or not.

    Args:
        keymap: the keymap.
        leaves: the shapes of the model's weights by dotted path.
        tensors: the shapes of the checkpoint's tensors by key. `leaves`, `tensors` or both must be given.

    Returns:
        The claimed keys of each leaf, and the problems by kind.

    >>> entry = Weight("layers.{l}.q.kernel", "layers.{l}.q.weight", "i o -> o i")
    >>> report = check_keymap(KeyMap("tiny", (entry,)), {"layers.0.q.kernel": (2, 3)}, {"layers.0.q.weight": (3, 2)})
    >>> report.fits, report.claims
    (True, {'layers.0.q.kernel': ('layers.0.q.weight',)})
    >>> check_keymap(KeyMap("tiny", (entry,)), tensors={"layers.1.q.weight": (3, 2), "head.weight": (9, 2)}).problems
    {'unclaimed': ('head.weight',), 'missing': ('layers.0.q.weight',)}
    """
    return _check_checkpoint(keymap, tensors or {}) if leaves is None else _check_model(keymap, leaves, tensors)


def _check_model(keymap: KeyMap, leaves: Shapes, tensors: Shapes | None) -> KeyMapReport:
    found: dict[str, tuple[Weight, PlanEntry]] = {}
    counts, mismatches = dict.fromkeys(keymap.weights, 0), Counter[Weight]()
    problems: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    for leaf, shape in leaves.items():
        hits = [w for w in keymap.weights if w.regex.fullmatch(leaf)]
        if not hits:
            problems["unclaimed"].append(leaf)
        elif len(hits) > 1:
            problems["twice"].append(f"{leaf}: {len(hits)} entries")
        else:
            counts[hits[0]] += 1
            try:
                plan_entry = base_plan_entry(keymap, leaf, shape)
            except (KeyMapError, MismatchError) as error:
                problems["misshapen"].append(str(error))
                mismatches[hits[0]] += 1
            else:
                assert plan_entry is not None
                found[leaf] = hits[0], plan_entry
    problems["twice"] += contested_keys(plan_entry for _, plan_entry in found.values())
    problems["misshapen"] += unequal_parts(Plan(tuple(plan_entry for _, plan_entry in found.values())))
    problems["missing"] += _missing_needs(keymap, counts)
    report = KeyMapReport(
        keymap.name,
        {leaf: tuple(map(file_key, plan_entry.keys)) for leaf, (_, plan_entry) in found.items()},
        counts,
        **{kind: tuple(found_problems) for kind, found_problems in problems.items()},
        wrong=_without_fit(counts, mismatches),
    )
    return report if tensors is None else _compare(keymap, report, found, leaves, tensors)


def _without_fit(counts: Mapping[Weight, int], mismatches: Mapping[Weight, int]) -> tuple[Weight, ...]:
    """Return the entries whose matches are all mismatches."""
    return tuple(w for w, count in counts.items() if count and mismatches.get(w) == count)


def _missing_needs(keymap: KeyMap, counts: Mapping[Weight, int]) -> Iterable[str]:
    """Return the keys that identify this family and are missing."""
    return (f"{w.key}, which {keymap.name} always has" for w, n in counts.items() if not n and w.leaf in keymap.needs)


def _compare(
    keymap: KeyMap,
    model: KeyMapReport,
    found: Mapping[str, tuple[Weight, PlanEntry]],
    leaves: Shapes,
    tensors: Shapes,
) -> KeyMapReport:
    """Return the report of a model with the problems of a checkpoint added."""
    expected: dict[str, tuple[int, ...]] = {}
    ties = dict(keymap.tied)
    counts, mismatches = dict.fromkeys(keymap.weights, 0), Counter[Weight]()
    for entry, plan_entry in found.values():
        for key in plan_entry.keys:
            expected[file_key(key)] = shape = joined_shape([key], plan_entry.form.file_shape)
            counts[entry] += 1
            mismatches[entry] += tensors.get(file_key(key), tensors.get(ties.get(key, ""))) != shape
    reported = leaves.keys() - found.keys()
    optional = ties.keys() | {
        key for key in tensors if is_buffer(keymap, key) or reported.intersection(_possible_leaves(keymap, key))
    }
    return dataclasses.replace(
        model,
        unclaimed=(*model.unclaimed, *(key for key in tensors if key not in expected and key not in optional)),
        missing=(*model.missing, *(key for key in expected if key not in tensors and ties.get(key) not in tensors)),
        misshapen=(
            *model.misshapen,
            *(
                f"{key}: the model's weight has shape {_format_shape(shape)} in PyTorch's layout, but the checkpoint's"
                f" has {_format_shape(tensors[key])}"
                for key, shape in expected.items()
                if key in tensors and tensors[key] != shape
            ),
        ),
        wrong=(*model.wrong, *_without_fit(counts, mismatches)),
    )


def _check_checkpoint(keymap: KeyMap, tensors: Shapes) -> KeyMapReport:
    keymap = keymap.spelling_for(tensors, [w.leaf.replace("{l}", "0") for w in keymap.weights])
    claims: dict[str, list[str]] = {}
    matches = {w: dict[str, Mapping[str, str]]() for w in keymap.weights}
    misshapen: list[str] = []
    mismatches = Counter[Weight]()
    for key, shape in tensors.items():
        for w, keys in matches.items():
            texts = w.match_key(key)
            if texts is None:
                continue
            keys[key] = texts
            claims.setdefault(w.fill_leaf(texts), []).append(key)
            if len(w.right) != len(shape):
                mismatches[w] += 1
                misshapen.append(
                    f"{key}: its shape is {_format_shape(shape)}, but the pattern of its entry, {w.pattern!r}, names"
                    f" {len(w.right)} axes on the right"
                )
    known = {key for keys in matches.values() for key in keys} | {key for key, _ in keymap.tied}
    counts = {w: len(keys) for w, keys in matches.items()}
    return KeyMapReport(
        keymap.name,
        {leaf: tuple(keys) for leaf, keys in claims.items()},
        counts,
        unclaimed=tuple(key for key in tensors if key not in known and not is_buffer(keymap, key)),
        missing=(*_missing_needs(keymap, counts), *dict.fromkeys(_find_gaps(matches, tensors))),
        misshapen=tuple(misshapen),
        wrong=_without_fit(counts, mismatches),
    )


def _find_gaps(matches: Mapping[Weight, Mapping[str, Mapping[str, str]]], tensors: Shapes) -> Iterable[str]:
    """Yield the keys that one layer has and a similar layer lacks, and the missing parts of fused weights.

    Args:
        matches: `{entry: {key: texts of its holes}}`.
        tensors: the shapes of the checkpoint's tensors.
    """
    similar = _similar_layers(matches)
    for w, keys in matches.items():
        for axis, choices in (("l", similar[w]), *w.over):
            others = dict.fromkeys(tuple(sorted((k, v) for k, v in t.items() if k != axis)) for t in keys.values())
            for other in others if any(axis in t for t in keys.values()) else ():
                candidates = ({**dict(other), axis: text} for text in choices)
                yield from (
                    w.fill_key(texts)
                    for texts in candidates
                    if w.fill_key(texts) not in tensors and not _is_claimed_by_others(w, texts, matches, tensors)
                )


def _similar_layers(matches: Mapping[Weight, Mapping[str, Mapping[str, str]]]) -> dict[Weight, list[str]]:
    """Return `{entry: numbers of the layers that are like those with its keys}`."""
    places = {w: {texts["l"] for texts in keys.values() if "l" in texts} for w, keys in matches.items()}
    blocks = {w: set[str]().union(*(places[v] for v in places if _block(v) == _block(w))) for w in places}

    def are_alternatives(v: Weight, w: Weight) -> bool:
        """Return True if no layer has both, although they are of one block or of blocks that exclude each other."""
        together = places if _block(v) == _block(w) else blocks
        return _block(v)[0] == _block(w)[0] and not together[v] & together[w]

    similar: dict[Weight, list[str]] = {}
    for w, present in places.items():
        # A layer with at least two alternatives is of another kind: sparse and not dense, recurrent and not attention.
        other = Counter(n for v, found in places.items() if are_alternatives(v, w) for n in found)
        # Encoder and decoder may have different numbers of layers.
        layers = {int(n) for v, found in places.items() if _block(v)[0] == _block(w)[0] for n in found}
        numbers = [n for n in map(str, range(max(layers, default=-1) + 1)) if w.has_layer(n) and other[n] < 2]
        # A weight that only the first layer has (T5's relative positions) is not missing in the others.
        similar[w] = [] if len(numbers) > 2 and present <= {"0"} else numbers
    return similar


def _block(weight: Weight) -> tuple[str, str]:
    """Return the stack of an entry, and the first name of its key inside a layer, such as "mlp"."""
    stack, _, inside = weight.key.partition("{l}.")
    return stack, inside.partition(".")[0]


def _is_claimed_by_others(weight: Weight, texts: Mapping[str, str], entries: Iterable[Weight], tensors: Shapes) -> bool:
    """Return True if other entries claim all present parts of a fused leaf, and are complete.

    For example, where k serves as v, k is a leaf of its own and not a part of a fused one.
    """

    def part_keys(entry: Weight, texts: Mapping[str, str]) -> set[str]:
        names = [axis for axis, _ in entry.over]
        return {
            entry.fill_key({**texts, **dict(zip(names, choice, strict=True))})
            for choice in itertools.product(*(names for _, names in entry.over))
        }

    def is_complete(entry: Weight, key: str) -> bool:
        key_texts = entry.match_key(key)
        return key_texts is not None and part_keys(entry, key_texts) <= tensors.keys()

    present = part_keys(weight, texts) & tensors.keys()
    return bool(present) and all(
        any(is_complete(entry, key) for entry in entries if entry is not weight) for key in present
    )


def _possible_leaves(keymap: KeyMap, key: str) -> set[str]:
    """Return the leaves that may claim a key."""
    return {w.fill_leaf(texts) for w in keymap.weights if (texts := w.match_key(key)) is not None}


def is_buffer(keymap: KeyMap, key: str) -> bool:
    """Return True if a key of a PyTorch file is a buffer and not a weight."""
    return any(re.fullmatch(r"\d+".join(map(re.escape, b.split("{l}"))), key) for b in keymap.buffers)


def _format_shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "a scalar"
