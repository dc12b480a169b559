"""A tree for a file's tensors where no model is at hand: which leaves of a family they adapt, and of what shapes.

The inverse of a table: from PyTorch's module names to the base leaves. Pure: names and shapes only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.weight import EXPERTS, Weight
from jaxadapt.models.foreign import per_head
from jaxadapt.models.foreign.dialect import RANK, Dialect, layouts
from jaxadapt.models.foreign.survey import hinted_sizes

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class AdaptedLeaf:
    """One base leaf that a file adapts: its site, and the entries of its braced axes, `{module: {axis: text}}`."""

    site: Match
    modules: Mapping[str, Mapping[str, str]]


def find_adapted_leaves(
    keymap: KeyMap, modules: Mapping[str, tuple[Shape, Shape]], leaves: Mapping[str, Shape] | None = None
) -> tuple[AdaptedLeaf, ...]:
    """The base leaves of a family that these PyTorch modules lie in.

    Args:
        modules: `{module: (shape of A, shape of B)}` in the file.
        leaves: the base leaves that there are, `{leaf: shape}`, where that is known: it settles which of several lines
            is meant.

    Raises one `KeyMapError` with every module that no line names, or several do.
    """
    found: dict[str, dict[str, Mapping[str, str]]] = {}
    for module in modules:
        for w in keymap.weights:
            texts = w.match_key(f"{module}.weight") if w.kind == "linear" else None
            if texts is not None and _there(keymap, w, texts, leaves):
                found.setdefault(w.fill_leaf(texts), {})[module] = texts
    # The parts of a fused leaf have one size: so a line for q, k and v in one is not meant where they differ.
    for leaf, mine in list(found.items()):
        if len({(modules[m][0][1], modules[m][1][0]) for m in mine}) > 1:
            del found[leaf]
    problems: list[str] = []
    for module in modules:
        hits = [leaf for leaf, mine in found.items() if module in mine]
        if len(hits) != 1:
            problems.append(f"{module}: fits {', '.join(hits)}" if hits else f"{module}: no line names it")
    if problems:
        raise KeyMapError(
            f"the table {keymap.name!r} does not settle where these modules lie:\n"
            + paths.bullets(problems)
            + "\nA file of the target's shapes does (--like), where several leaves are named"
        )
    sites = {leaf: keymap.match(leaf) for leaf in found}
    return tuple(AdaptedLeaf(site, found[leaf]) for leaf, site in sites.items() if site is not None)


def _there(keymap: KeyMap, w: Weight, texts: Mapping[str, str], leaves: Mapping[str, Shape] | None) -> bool:
    """Whether a line has such a weight: among these leaves, or of as many layers as the table says."""
    if not leaves:
        limits = {line.layers: n for leaf, n in keymap.counts for line in keymap.weights if line.leaf == leaf}
        return "l" not in texts or w.model_number("l", texts["l"]) < limits.get(w.layers, math.inf)
    shape = leaves.get(w.fill_leaf(texts))
    sizes = dict(zip(w.left, shape or (), strict=False))
    return shape is not None and all(
        w.model_number(axis, texts[axis.strip("{}")]) < sizes[axis] for axis in w.roles["stack"] if axis in sizes
    )


def blank_arrays(
    dialect: Dialect,
    adapted: AdaptedLeaf,
    shapes: Mapping[str, tuple[Shape, Shape]],
    rank: int,
    base: Shape | None,
    sizes: Mapping[str, int],
) -> dict[str, Shape]:
    """`{path: shape}` of the two arrays of a base leaf, in the first layout of its line.

    Args:
        shapes: `{module: (shape of A, shape of B)}` in the file.
        base: the shape of the base leaf, where it is known.
        sizes: else those of axes that the file does not tell apart, by name.

    Raises `KeyMapError` where a size is missing, or does not fit.
    """
    site, weight = adapted.site, adapted.site.weight
    found = dialect.paths(site.leaf)
    if found is None:
        raise KeyMapError(f"{dialect.name} has no place for the LoRA of {site.leaf!r}")
    path_a, path_b, pair = found
    choices = layouts(pair, weight, dialect.shares)
    if dialect.per_head and per_head.head_axes(weight):
        *rest, last = weight.left
        choices = [] if weight.stack else [((*((axis,) for axis in rest), (RANK,)), ((RANK,), (last,)))]
    if not choices:
        raise KeyMapError(f"{dialect.name} has no layout for {site.leaf!r} ({weight.pattern!r})")
    if EXPERTS in weight.left:  # with a pair for each there is room for any file
        choices = [both for both in choices if all((EXPERTS,) in dims for dims in both)] or choices
    a, b = next(iter(shapes[m] for m in adapted.modules))
    totals = {weight.roles["in"]: a[1], weight.roles["out"]: b[0]}
    known = dict(plan.axis_sizes(site, base)) if base is not None else _sizes(adapted, totals, sizes)
    known[RANK] = rank
    # (Flattened in another order than PyTorch's, single sizes are needed; that is found out when the tree is filled.)
    whole = {frozenset(axes): size for axes, size in totals.items()}
    out: dict[str, Shape] = {}
    for path, dims in zip((path_a, path_b), choices[0], strict=True):
        shape: list[int] = []
        for dim in dims:
            open_ = [n for n in dim if n not in known]
            if open_ and frozenset(dim) not in whole:
                raise KeyMapError(
                    f"{path}: the size of axis {open_[0]!r} of {weight.pattern!r} does not follow from the file; give"
                    f" it (--axis {open_[0]}=…), or a file of the target's shapes (--like)"
                )
            shape.append(whole[frozenset(dim)] if open_ else math.prod(known[n] for n in dim))
        out[path] = tuple(shape)
    return out


def _sizes(adapted: AdaptedLeaf, totals: Mapping[tuple[str, ...], int], sizes: Mapping[str, int]) -> dict[str, int]:
    weight = adapted.site.weight
    known = {axis: len(weight.names(axis) or ()) for axis in weight.roles["fused"]}
    for axis in (*weight.roles["stack"], *(axis for axis in weight.left if axis == EXPERTS)):
        known[axis] = 1 + max(weight.model_number(axis, texts[axis.strip("{}")]) for texts in adapted.modules.values())
    given = hinted_sizes(weight, sizes)
    for axes, total in totals.items():
        mine = {n: given[n] for n in axes if n in given}
        open_ = [n for n in axes if n not in mine]
        rest = math.prod(mine.values())
        if total % rest or (not open_ and total != rest):
            raise KeyMapError(
                f"{adapted.site.leaf!r}: {total} numbers cannot lie on the axes {' '.join(axes)} with {mine}"
            )
        if len(open_) == 1:
            mine[open_[0]] = total // rest
        known |= mine
    return known


def respell_modules(source: KeyMap, target: KeyMap, modules: Sequence[str]) -> dict[str, str]:
    """`{module: what it is called by another spelling of the same table}`."""
    names: dict[str, str] = {}
    for module in modules:
        for ours, theirs in zip(source.weights, target.weights, strict=False):
            texts = ours.match_key(f"{module}.weight") if ours.leaf == theirs.leaf else None
            if texts is not None:
                names[module] = theirs.fill_key(texts).removesuffix(".weight")
                break
        else:
            raise KeyMapError(f"{module}: no line of {source.name!r} names it, or {target.name!r} is another family")
    return names
