"""Placement of a file's tensors in the LoRA leaves of a foreign tree, and the checks that it is exact.

Uses only shapes, and a comparison of tensors that the caller passes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxadapt.core import paths
from jaxadapt.core.compare import Spec, compare, group_findings
from jaxadapt.core.errors import MismatchError
from jaxadapt.models.foreign.per_head import require_rank
from jaxadapt.models.foreign.survey import FactorArray, ForeignSites

Array = Any

Placed = dict[int, tuple[Array, slice, float]]
"""The content of an array: `{number of a key: (tensor, its rows on the rank's axis, factor)}`."""


def place_tensors(
    sites: ForeignSites,
    tensors: Mapping[str, Array],
    ratios: Mapping[str, float],
    concat: bool,
    same: Any,
) -> dict[str, tuple[FactorArray, Placed]]:
    """Return the placement of a file's tensors, `{path of an array: (the array, its content)}`.

    Args:
        tensors: `{key: array}`, with shapes that `check_tensors` accepts.
        ratios: `{module: the file's scale / the tree's scale}` of the modules that the file adapts.
        concat: concatenate tensors that differ but share one array of the tree along the rank's axis.
        same: `(a, b) -> bool`, True if two tensors are bitwise equal.

    Raises one `MismatchError` with every array that cannot hold the file's tensors exactly.
    """
    out: dict[str, tuple[FactorArray, Placed]] = {}
    rows, differ, need = _assign_rows(sites, tensors, ratios, same)
    if differ and not concat:
        raise MismatchError(
            f"cannot fill these {sites.dialect.name} leaves: each is shared by several tensors of the file,"
            " which differ:\n"
            + paths.bullets(dict.fromkeys(differ))
            + '\nTrain the modules with one A, or build the target with a larger rank and pass on_shared="concat",'
            " which concatenates the tensors"
        )
    small = {half.path: half for g in sites.sites for half in (g.a, g.b) if need[half.path] > half.rank}
    require_rank(
        [f"{path}: rank {half.rank}, needed {need[path]}" for path, half in small.items()],
        max(need.values(), default=0),
    )
    for site in sites.sites:
        for half, is_b in ((site.a, False), (site.b, True)):
            out[half.path] = (
                half,
                {
                    i: (tensors[key], rows[m], ratios[m] if is_b else 1.0)
                    for i, (key, m) in enumerate(zip(half.keys, half.modules, strict=True))
                    if m in rows
                },
            )
    return out


def needed_rank(sites: ForeignSites, tensors: Mapping[str, Array], ratios: Mapping[str, float], same: Any) -> int:
    """Return the rank that a tree needs for a file's tensors if differing tensors are concatenated."""
    return max(_assign_rows(sites, tensors, ratios, same)[2].values())


def _assign_rows(
    sites: ForeignSites, tensors: Mapping[str, Array], ratios: Mapping[str, float], same: Any
) -> tuple[dict[str, slice], list[str], dict[str, int]]:
    """Return each module's rows on the rank's axis, the arrays whose tensors differ, and each array's needed rank."""
    rows: dict[str, slice] = {}
    differ: list[str] = []
    need: dict[str, int] = {}
    for site in sites.sites:
        for half in sorted((site.a, site.b), key=lambda half: -half.shared):
            need[half.path] = 0
            for first in range(0, len(half.keys), half.shared):
                sharers = [i for i in range(first, first + half.shared) if half.modules[i] in ratios]
                groups = _group_equal([tensors[half.keys[i]] for i in sharers], same)
                if len(set(groups)) > 1:
                    names = [half.modules[i] for i in sharers]
                    differ.append(f"{half.path} is shared by {', '.join(names[:4])}{', …' if len(names) > 4 else ''}")
                ends: dict[int, int] = {}
                end = 0
                for i, group in zip(sharers, groups, strict=True):
                    rank = int(tensors[half.keys[i]].shape[half.form.file_rank])
                    if half.shared == 1 and half.modules[i] in rows:  # its shared partner has set the rows
                        end = rows[half.modules[i]].stop
                        continue
                    if group not in ends:
                        end += rank
                        ends[group] = end
                    own_rows = slice(ends[group] - rank, ends[group])
                    if rows.setdefault(half.modules[i], own_rows) != own_rows:
                        differ.append(f"{half.path} and its partner are both shared by several modules")
                need[half.path] = max(end, need[half.path])
    return rows, differ, need


def _group_equal(tensors: Sequence[Array], same: Any) -> list[int]:
    """Return a number for each tensor; equal tensors have the same number."""
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
    sites: ForeignSites, modules: Collection[str], shapes: Mapping[str, Sequence[int]], source: str
) -> None:
    """Raise one `MismatchError` unless a file has the tensors of `modules`, with the expected shapes but for the rank.

    Tensors of other modules may be missing: their B becomes zero.
    """
    expected: dict[str, Spec] = {}
    optional: set[str] = set()
    for half in (half for site in sites.sites for half in (site.a, site.b)):
        sizes = tuple(None if i == half.form.file_rank else size for i, size in enumerate(half.form.file_shape))
        expected |= dict.fromkeys(half.keys, Spec(sizes))
        optional |= {key for key, module in zip(half.keys, half.modules, strict=True) if module not in modules}
    parts = group_findings(
        compare(expected, {key: Spec(tuple(shape)) for key, shape in shapes.items()}, optional),
        f"missing from {source} (its configuration names their modules)",
        f"unexpected (no {sites.dialect.name} leaf matches them)",
    )
    if parts:
        raise MismatchError(
            f"{source} does not match the {sites.dialect.name} leaves of the target:\n"
            + "\n".join(parts)
            + "\nCheck that the adapter is for this base model, that the target adapts the same layers, and keymap="
        )
