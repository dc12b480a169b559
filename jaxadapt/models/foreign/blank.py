"""Paths and shapes of a foreign tree for a file's tensors, without a model: the base leaves that the file adapts.

The inverse of a keymap: from PyTorch's module names to the base leaves. Uses only names and shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from jaxadapt.core.errors import KeyMapError, raise_listed
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.weight import EXPERTS, Weight
from jaxadapt.models.foreign.dialects import RANK, Dialect, Dims, Pair, layouts
from jaxadapt.models.foreign.forms import head_axes
from jaxadapt.models.foreign.survey import hinted_sizes

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class AdaptedLeaf:
    """One base leaf that a file adapts: its match, and the names of its braced axes, `{module: {axis: text}}`."""

    match: Match
    modules: Mapping[str, Mapping[str, str]]


def find_adapted_leaves(
    keymap: KeyMap, modules: Mapping[str, tuple[Shape, Shape]], leaves: Mapping[str, Shape] | None = None
) -> tuple[AdaptedLeaf, ...]:
    """Return the base leaves of a family that hold the weights of these PyTorch modules.

    Args:
        modules: `{module: (shape of A, shape of B)}` in the file.
        leaves: the base leaves of the target, `{leaf: shape}`, if known. They decide between entries that match the
            same module.

    Raises one `KeyMapError` with every module that no entry, or several entries, match.
    """
    modules_of = _group_modules(keymap, modules, leaves)
    problems = [
        f"{module}: matches {', '.join(hits)}" if hits else f"{module}: no entry matches"
        for module in modules
        if len(hits := [leaf for leaf, axis_names in modules_of.items() if module in axis_names]) != 1
    ]
    raise_listed(
        KeyMapError,
        f"the keymap {keymap.name!r} does not map each of these modules to one base leaf:",
        problems,
        "\nIf several leaves match, pass a file of the target's shapes (--like)",
    )
    matches = ((keymap.match(leaf), texts) for leaf, texts in modules_of.items())
    return tuple(AdaptedLeaf(match, texts) for match, texts in matches if match is not None)


def _group_modules(
    keymap: KeyMap, modules: Mapping[str, tuple[Shape, Shape]], leaves: Mapping[str, Shape] | None
) -> dict[str, dict[str, Mapping[str, str]]]:
    """Return `{base leaf: {module: the names of its braced axes}}` of the entries that may have these modules."""
    modules_of: dict[str, dict[str, Mapping[str, str]]] = {}
    for module, w in itertools.product(modules, keymap.weights):
        texts = w.match_key(f"{module}.weight") if w.kind == "linear" else None
        if texts is not None and _weight_exists(keymap, w, texts, leaves):
            modules_of.setdefault(w.fill_leaf(texts), {})[module] = texts
    # The parts of a fused leaf have one size, so an entry that fuses q, k and v is wrong if their shapes differ.
    sizes = {leaf: {(modules[m][0][1], modules[m][1][0]) for m in texts} for leaf, texts in modules_of.items()}
    return {leaf: texts for leaf, texts in modules_of.items() if len(sizes[leaf]) == 1}


def _weight_exists(keymap: KeyMap, w: Weight, texts: Mapping[str, str], leaves: Mapping[str, Shape] | None) -> bool:
    """Return True if an entry's weight exists: in `leaves`, or among the layers that the keymap counts."""
    if not leaves:
        limits = {entry.layers: n for leaf, n in keymap.counts for entry in keymap.weights if entry.leaf == leaf}
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
    """Return `{path: shape}` of the two arrays of a base leaf, in the first layout of its entry.

    Args:
        shapes: `{module: (shape of A, shape of B)}` in the file.
        base: the shape of the base leaf, if known.
        sizes: `{axis: size}` of axes that the file has flattened into one, if `base` is not known.

    Raises `KeyMapError` if a size is missing or contradicts the file.
    """
    weight = adapted.match.weight
    lora_paths = dialect.paths(adapted.match.leaf)
    if lora_paths is None:
        raise KeyMapError(f"cannot store the LoRA of {adapted.match.leaf!r}: {dialect.name} has no path for it")
    path_a, path_b, pair = lora_paths
    choices = _possible_layouts(dialect, pair, weight)
    if not choices:
        raise KeyMapError(
            f"cannot store the LoRA of {adapted.match.leaf!r}: {dialect.name} has no layout for {weight.pattern!r}"
        )
    a, b = next(iter(shapes[m] for m in adapted.modules))
    totals = {weight.roles["in"]: a[1], weight.roles["out"]: b[0]}
    known = dict(plan.axis_sizes(adapted.match, base)) if base is not None else _infer_sizes(adapted, totals, sizes)
    known[RANK] = rank
    # If axes are flattened in another order than in PyTorch, filling the tree needs their sizes and raises an error.
    flat_sizes = {frozenset(axes): size for axes, size in totals.items()}

    def size_of(path: str, dim: tuple[str, ...]) -> int:
        unknown = [n for n in dim if n not in known]
        if unknown and frozenset(dim) not in flat_sizes:
            raise KeyMapError(
                f"{path}: the size of axis {unknown[0]!r} of {weight.pattern!r} does not follow from the file; pass"
                f" it (--axis {unknown[0]}=…), or a file of the target's shapes (--like)"
            )
        return flat_sizes[frozenset(dim)] if unknown else math.prod(known[n] for n in dim)

    both = zip((path_a, path_b), choices[0], strict=True)
    return {path: tuple(size_of(path, dim) for dim in dims) for path, dims in both}


def _possible_layouts(dialect: Dialect, pair: Pair, weight: Weight) -> list[tuple[Dims, Dims]]:
    """Return the layouts in which a dialect may hold any file's tensors of a weight."""
    if dialect.heads == "shared" and head_axes(weight, True):
        *rest, last = weight.left
        return [] if weight.stack else [((*((axis,) for axis in rest), (RANK,)), ((RANK,), (last,)))]
    if dialect.heads == "own":
        *rest, first, last = ((axis,) for axis in weight.left)
        return [((*rest, first, (RANK,)), (*rest, (RANK,), last))]
    choices = layouts(pair, weight, dialect.shares)
    if EXPERTS in weight.left:  # arrays with an expert axis can hold any file
        return [both for both in choices if all((EXPERTS,) in dims for dims in both)] or choices
    return choices


def _infer_sizes(
    adapted: AdaptedLeaf, totals: Mapping[tuple[str, ...], int], sizes: Mapping[str, int]
) -> dict[str, int]:
    weight = adapted.match.weight
    known = {axis: len(weight.index_names(axis) or ()) for axis in weight.roles["fused"]}
    for axis in (*weight.roles["stack"], *({EXPERTS} & set(weight.left))):
        known[axis] = 1 + max(weight.model_number(axis, texts[axis.strip("{}")]) for texts in adapted.modules.values())
    given = hinted_sizes(weight, sizes)
    for axes, total in totals.items():
        axis_sizes = {n: given[n] for n in axes if n in given}
        unknown = [n for n in axes if n not in axis_sizes]
        rest = math.prod(axis_sizes.values())
        if total % rest or (not unknown and total != rest):
            raise KeyMapError(
                f"{adapted.match.leaf!r}: the axes {' '.join(axes)} must multiply to {total}, which"
                f" contradicts {axis_sizes}"
            )
        if len(unknown) == 1:
            axis_sizes[unknown[0]] = total // rest
        known |= axis_sizes
    return known


def respell_modules(source: KeyMap, target: KeyMap, modules: Sequence[str]) -> dict[str, str]:
    """Return `{module: its name in another spelling of the same keymap}`."""
    names: dict[str, str] = {}
    for module in modules:
        for entry, target_entry in zip(source.weights, target.weights, strict=False):
            texts = entry.match_key(f"{module}.weight") if entry.leaf == target_entry.leaf else None
            if texts is not None:
                names[module] = target_entry.fill_key(texts).removesuffix(".weight")
                break
        else:
            raise KeyMapError(
                f"cannot rename the module {module}: no entry of {source.name!r} matches it, or"
                f" {target.name!r} is another family"
            )
    return names
