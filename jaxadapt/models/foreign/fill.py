"""A file's tensors into the LoRA leaves of another library's tree: what goes where, and whether that is exact.

Pure: shapes, and comparisons that the caller brings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxadapt.core import paths
from jaxadapt.core.errors import MismatchError
from jaxadapt.models.foreign.survey import FactorArray, ForeignSites

Shape = tuple[int, ...]
Array = Any

Placed = dict[int, tuple[Array, slice, float]]
"""What goes into an array: by key, the tensor, its rows on the rank's axis, and a factor."""


def place_tensors(
    guests: ForeignSites,
    tensors: Mapping[str, Array],
    ratios: Mapping[str, float],
    concat: bool,
    same: Any,
) -> dict[str, tuple[FactorArray, Placed]]:
    """Where every tensor of a file goes, `{path of an array: (its axes, {key's number: …})}`.

    Args:
        tensors: `{key: array}`, checked to be of the right shapes.
        ratios: `{module: the file's scale over the tree's}`, of the modules that the file adapts.
        concat: tensors that differ but share one array in the tree are put side by side, if its rank has room.
        same: `(a, b) -> bool`, whether two tensors are equal bit for bit.

    Raises one `MismatchError` with every array that cannot hold what the file says exactly.
    """
    out: dict[str, tuple[FactorArray, Placed]] = {}
    rows, differ, need = _rows(guests, tensors, ratios, same)
    if differ and not concat:
        raise MismatchError(
            f"{guests.dialect.name} has one array where the file has several, and they differ:\n"
            + paths.bullets(dict.fromkeys(differ))
            + '\nTrain them with one A, or build the target with a larger rank and pass on_shared="concat", which'
            " puts them side by side"
        )
    small = {half.path: half for g in guests.sites for half in (g.a, g.b) if need[half.path] > half.rank}
    if small:
        listed = [f"{path}: rank {half.rank}, needed {need[path]}" for path, half in small.items()]
        raise MismatchError(
            f"the target's rank is too small:\n{paths.bullets(listed)}\nBuild it with"
            f" rank={max(need.values())}: what the file does not fill is zero"
        )
    for guest in guests.sites:
        for half, of_b in ((guest.a, False), (guest.b, True)):
            out[half.path] = (
                half,
                {
                    i: (tensors[key], rows[m], ratios[m] if of_b else 1.0)
                    for i, (key, m) in enumerate(zip(half.keys, half.modules, strict=True))
                    if m in rows
                },
            )
    return out


def needed_rank(guests: ForeignSites, tensors: Mapping[str, Array], ratios: Mapping[str, float], same: Any) -> int:
    """The rank that a tree needs to hold a file's tensors, those that share an array side by side where they differ."""
    return max(_rows(guests, tensors, ratios, same)[2].values())


def _rows(
    guests: ForeignSites, tensors: Mapping[str, Array], ratios: Mapping[str, float], same: Any
) -> tuple[dict[str, slice], list[str], dict[str, int]]:
    """Each module's rows on the rank's axis, the arrays whose tensors differ, and each array's needed rank."""
    rows: dict[str, slice] = {}
    differ: list[str] = []
    need: dict[str, int] = {}
    for guest in guests.sites:
        for half in sorted((guest.a, guest.b), key=lambda half: -half.shared):
            need[half.path] = 0
            for first in range(0, len(half.keys), half.shared):
                sharers = [i for i in range(first, first + half.shared) if half.modules[i] in ratios]
                groups = _groups([tensors[half.keys[i]] for i in sharers], same)
                if len(set(groups)) > 1:
                    names = [half.modules[i] for i in sharers]
                    differ.append(f"{half.path} is one for {', '.join(names[:4])}{', …' if len(names) > 4 else ''}")
                ends: dict[int, int] = {}
                at = 0
                for i, group in zip(sharers, groups, strict=True):
                    rank = int(tensors[half.keys[i]].shape[half.form.file_rank])
                    if half.shared == 1 and half.modules[i] in rows:  # its partner is shared, and has said where
                        at = rows[half.modules[i]].stop
                        continue
                    if group not in ends:
                        at += rank
                        ends[group] = at
                    mine = slice(ends[group] - rank, ends[group])
                    if rows.setdefault(half.modules[i], mine) != mine:
                        differ.append(f"{half.path}, like its partner, is one for several modules")
                need[half.path] = max(at, need[half.path])
    return rows, differ, need


def _groups(tensors: Sequence[Array], same: Any) -> list[int]:
    """A number for each, the same for equal ones."""
    firsts: list[Array] = []
    out: list[int] = []
    for tensor in tensors:
        for number, first in enumerate(firsts):
            if tuple(first.shape) == tuple(tensor.shape) and same(first, tensor):
                out.append(number)
                break
        else:
            out.append(len(firsts))
            firsts.append(tensor)
    return out


def check_tensors(
    guests: ForeignSites, modules: Collection[str], found: Mapping[str, Sequence[int]], source: str
) -> None:
    """Raise one `MismatchError` unless a file's tensors are those of `modules`, of the right shapes but for the rank.

    Modules that the file does not adapt may be missing: their B is zero.
    """
    missing: list[str] = []
    wrong: list[str] = []
    known: set[str] = set()
    for guest in guests.sites:
        for half in (guest.a, guest.b):
            at = half.form.file_rank
            for key, module in zip(half.keys, half.modules, strict=True):
                known.add(key)
                if key not in found:
                    missing += [key] if module in modules else []
                    continue
                shape = tuple(found[key])
                want = half.form.file_shape
                if len(shape) != len(want) or shape[:at] + shape[at + 1 :] != want[:at] + want[at + 1 :]:
                    wrong.append(f"{key}: expected {_with_rank(want, at)}, found {list(shape)}")
    unexpected = [key for key in found if key not in known]
    parts = [
        f"{len(items)} {what}:\n{paths.bullets(items)}"
        for what, items in (
            (f"missing from {source} (its configuration names their modules)", missing),
            (f"unexpected (no {guests.dialect.name} leaf takes them)", unexpected),
            ("wrongly shaped", wrong),
        )
        if items
    ]
    if parts:
        raise MismatchError(
            f"{source} does not fit the {guests.dialect.name} leaves of the target:\n"
            + "\n".join(parts)
            + "\nIs it an adapter for another base model, does the target adapt fewer layers, or is keymap= another?"
        )


def _with_rank(shape: Shape, at: int) -> str:
    return "[" + ", ".join("r" if axis == at else str(size) for axis, size in enumerate(shape)) + "]"
