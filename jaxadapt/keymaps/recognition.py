"""Recognition of a model's family: whether its leaves and shapes are those of a keymap. Pure: strings and shapes."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from jaxadapt.arrays.layout import axis_parts
from jaxadapt.keymaps.keymap import KeyMap


def max_coverage(keymap: KeyMap, leaves: Collection[str], scanned: bool) -> int:
    """Return an upper bound of `coverage`, for a keymap or for all `scanned` forms of it.

    It compares only the ends of names, so it is much cheaper.
    """
    identifying, countable = _leaf_suffixes(keymap, scanned)
    if not any(leaf.endswith(identifying) for leaf in leaves):
        return 0
    return sum(leaf.endswith(countable) for leaf in leaves)


def coverage(keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of a model's leaves that match, or 0 if the model is not of the family.

    A matching leaf with another layout excludes the family. At least one match must be a layer's matrix, because
    names such as "lm_head" and "classifier" occur in many families. Stacked axes of layers with the same numbering
    must agree in size, which distinguishes layers stacked on axis 0 from those stacked on axis 1; so must the axes
    in `same`.
    """
    if next(misfits(keymap, shapes), None) is not None:
        return 0
    return sum(keymap.match(leaf) is not None for leaf in shapes)


def identifies(keymap: KeyMap, leaves: Iterable[str]) -> bool:
    """Return True if one of these leaves matches the entry of a layer's matrix."""
    return any((matched := keymap.match(leaf)) is not None and matched.weight.is_layer_matrix for leaf in leaves)


def misfits(keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield the reasons why a model with these leaves is not of the family, one for each leaf."""
    sizes: dict[tuple[str, tuple[int, int]], dict[int, str]] = {}
    identified, matched_leaves, counts = False, set[str](), dict(keymap.counts)
    for leaf, shape in shapes.items():
        matched = keymap.match(leaf)
        if matched is None:
            if keymap.complete and _first_name(leaf) in _known_first_names(keymap):
                yield f"{leaf} {shape}: no entry matches it"
            continue
        matched_leaves.add(matched.weight.leaf)
        identified = identified or matched.weight.is_layer_matrix
        mismatch = f"{leaf} {shape}: its entry has the pattern {matched.weight.pattern!r}"
        if len(matched.weight.left) != len(shape):
            yield mismatch
            continue
        fixed = dict(matched.weight.sizes)
        for name, size in zip(matched.weight.left, shape, strict=True):
            if fixed and size % (parts := math.prod(fixed.get(n, 1) for n in axis_parts(name))):
                yield f"{mismatch}, but {size} is not a multiple of {parts}"
            names = matched.weight.index_names(name)
            if names is not None and len(names) != size:
                yield f"{mismatch}, where {name} has the entries {', '.join(names)}"
            if name.startswith("{") and names is None:
                sizes.setdefault((name, matched.weight.layers), {}).setdefault(size, mismatch)
                if size != (count := counts.get(matched.weight.leaf, size)):
                    yield f"{mismatch}, where {name} is {count}"
            elif name in keymap.same:
                sizes.setdefault((name, (1, 0)), {}).setdefault(size, mismatch)
    for (name, _), different in sizes.items():
        first, *others = different.items()
        yield from (f"{text}, where {name} is {size}; it is {first[0]} in {first[1]}" for size, text in others)
    yield from (f"{leaf}: missing" for leaf in keymap.needs if leaf not in matched_leaves)
    if not identified:
        yield "no leaf is a layer's matrix"


@functools.lru_cache(maxsize=512)
def _leaf_suffixes(keymap: KeyMap, scanned: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what follows the last hole in each leaf: for the entries that identify a family, and for all entries."""
    leaves = [(w.scanned_leaf if scanned else w.leaf, w) for w in keymap.weights]
    suffixes = [(leaf.rpartition("}")[2], weight) for leaf, weight in leaves]
    identifying = {suffix for suffix, weight in suffixes if weight.is_layer_matrix}
    return tuple(identifying), tuple({suffix for suffix, _ in suffixes})


@functools.lru_cache(maxsize=512)
def _known_first_names(keymap: KeyMap) -> frozenset[str]:
    return frozenset(_first_name(w.leaf) for w in keymap.weights)


def _first_name(leaf: str) -> str:
    """Return the first name of a path with "#" for numbers: the same for "layer_3.attn.w" and "layer_{l}.attn.w"."""
    return re.sub(r"\d+|\{\w+\}", "#", leaf.partition(".")[0])
