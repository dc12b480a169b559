"""Keymaps, which map the leaves of a JAX model to PyTorch's names: a `KeyMap` has the `Weight` entries of one family.

A `Match` is one leaf matched by one entry. `coverage` and `misfits` tell whether a model's leaves and shapes are those
of a keymap. The meaning of some adapters depends on the order of PyTorch's modules (`KeyMap.order`). `plan.py` applies
a keymap to shapes. A model of no known family has the generic keymap, and entries made from its layers' axis roles.

Pure: strings and shapes only; no arrays, no files, no devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from jaxadapt.arrays.layout import Axes, axis_parts
from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError, bullets, raise_listed, repeated, warn
from jaxadapt.keymaps.weight import EXPERTS, Kind, Weight

if TYPE_CHECKING:
    from jaxadapt.configs.base import Config

# ---------------------------------------------------------------- keymap


PEFT_PREFIX = "base_model.model."

PER_EXPERT = "per-expert"
"""The spelling with one module for each expert."""


Renames = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Match:
    """One base leaf and the entry that matches it, with its axis roles and PyTorch modules.

    Attributes:
        leaf: the path of the leaf.
        weight: the entry.
        holes: `(hole, text)` of the entry's holes.
        parts: the targeted indices of the leaf's fused axis; None if there is no such axis, or if all are targeted.
    """

    leaf: str
    weight: Weight
    holes: tuple[tuple[str, str], ...] = ()
    parts: tuple[int, ...] | None = None

    @property
    def stack(self) -> tuple[int, ...]:
        """Positions of the stacked (numbered) axes in the leaf."""
        return self.weight.stack

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """Axis names by role: "stack", "fused", "experts", "batch", "in", "out"."""
        return self.weight.roles

    @property
    def axes(self) -> Axes:
        """The axis roles without the stacked axes, as the module sees its weight, with the targeted parts."""
        axes = self.weight.axes
        return axes if self.parts is None else dataclasses.replace(axes, parts=self.parts)

    def module(self, index: Mapping[str, str]) -> str:
        """Return the PyTorch module name of one index of the braced axes, given as `{axis: text}`."""
        return self.weight.module.format(**dict(self.holes), **index)

    def parameter(self, index: Mapping[str, str]) -> tuple[str, str]:
        """Return PyTorch's name of the weight, as (module, parameter)."""
        module, _, name = self.weight.file_key.format(**dict(self.holes), **index).rpartition(".")
        return module, name

    def parameters(self, sizes: Mapping[str, int]) -> dict[tuple[int, ...], tuple[str, str]]:
        """Return the PyTorch (module, parameter) names by index over the braced axes."""
        return {index: self.parameter(text) for index, text in index_entries(self.weight, self.braced, sizes)}

    def modules(self, sizes: Mapping[str, int]) -> dict[tuple[int, ...], str]:
        """Return the PyTorch module names by index over the braced axes."""
        return {index: self.module(text) for index, text in index_entries(self.weight, self.braced, sizes)}

    @property
    def braced(self) -> tuple[str, ...]:
        """The axes that PyTorch does not have: stacked layers, then experts, then fused parts."""
        return self.roles["stack"] + tuple(n for n in self.weight.left if n == EXPERTS) + self.roles["fused"]


def index_entries(
    weight: Weight,
    braced: Sequence[str],
    sizes: Mapping[str, int],
    only: Mapping[str, Sequence[int]] | None = None,
) -> list[tuple[tuple[int, ...], dict[str, str]]]:
    """Return all indices of the braced axes in row-major order, each with the texts for the key's holes.

    Args:
        weight: the entry of the keymap.
        braced: the axes.
        sizes: the axis sizes by name.
        only: the indices to use on some of the axes; all by default.
    """
    combinations: list[tuple[tuple[int, ...], dict[str, str]]] = [((), {})]
    for axis in braced:
        names = weight.index_names(axis)
        indices = (only or {}).get(axis, range(sizes[axis]))
        combinations = [
            ((*index, i), weight.add_number(text, axis, i) if names is None else {**text, axis.strip("{}"): names[i]})
            for index, text in combinations
            for i in indices
        ]
    return combinations


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """The `Weight` entries of one model family.

    Args:
        name: the name in `keymap=` and in messages ("llama").
        weights: the entries; a leaf may match at most one.
        output: module name of the output head, which "all-linear" excludes (as in PEFT).
        prefix: PEFT's prefix of every module name.
        proved: False if the keymap has not been verified against the real models. It is then never recognized
            automatically, and saving with it warns.
        complete: True to recognize the keymap only if every leaf has an entry, because other models of the same library
            use the same names for their layers. Leaves whose first name is in no entry (a vision tower) do not count.
        needs: leaves (as written in the entries) that a model must have to be recognized.
        same: axes that must have one size in the whole model for it to be recognized. They distinguish `"f d"` from
            `"d f"`.
        counts: `(leaf, n)`: the number of layers that a stacked leaf (as written in its entry) must have for the model
            to be recognized, because the numbers of later layers depend on it.
        tied: `(key, same as key)` of weights that a model with tied embeddings stores only once.
        buffers: keys that a PyTorch file may have and that are not weights; `{l}` stands for digits.
        spellings: `(name, ((ours, theirs), …))`: other prefixes of the same keys. transformers 5 calls the layers of a
            vision-language model "model.language_model.layers…"; the keymap "llama/vl" uses these names.
        expert_modules: `(parameter, (module, …))`: for a parameter of all experts, the names of its parts as modules of
            single experts (`{e}`), in PyTorch's order. transformers 4 and checkpoints on disk use these names. A name
            that ends in "_bias" is a tensor.
        order: the last names of PyTorch's modules, in the order in which they occur in the module that contains them.
            The meaning of some adapters depends on it.
        per_expert: True to save adapters and export models with one tensor for each expert ("mixtral/per-expert").
        relative_positions: True if the models know positions only as distances (T5), so that a prefix moves no token.

    >>> keymap = KeyMap("tiny", (Weight("{path}.kernel", "{path}.weight", "i o -> o i"),))
    >>> keymap.match("a.b.kernel").module({})
    'a.b'
    """

    name: str
    weights: tuple[Weight, ...]
    output: str | None = None
    prefix: str = PEFT_PREFIX
    proved: bool = True
    complete: bool = False
    needs: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    buffers: tuple[str, ...] = ()
    spellings: tuple[tuple[str, Renames], ...] = ()
    expert_modules: tuple[tuple[str, tuple[str, ...]], ...] = ()
    order: tuple[str, ...] = ()
    per_expert: bool = False
    relative_positions: bool = False

    def __hash__(self) -> int:
        return hash(self.name)  # cheap, because each leaf's keymap is part of jit's cache key

    def __repr__(self) -> str:
        # Short, because every adapter parameter has its keymap, and printing a model prints them all.
        return f"<KeyMap {self.name!r}, {len(self.weights)} entries>"

    def match(self, leaf: str) -> Match | None:
        """Return the match of a leaf, or None if no entry matches; raise `KeyMapError` if several entries match."""
        literal = self._literal.get(leaf)
        if literal is not None:
            return Match(leaf, literal)
        hits = [(w, m) for w in self._templates if leaf.endswith(w.suffix) and (m := w.regex.fullmatch(leaf))]
        if len(hits) > 1:
            raise KeyMapError(
                f"parameter {leaf!r} matches {len(hits)} entries of the keymap {self.name!r}, but it must match only"
                " one. Change or remove the others:\n" + bullets(w.leaf for w, _ in hits)
            )
        if not hits:
            return None
        weight, regex_match = hits[0]
        holes = regex_match.groupdict()
        for name in weight.layer_names if weight.layers != (1, 0) and "l" in holes else ():
            holes = weight.add_number(holes, name, int(holes.pop(name)))
        return Match(leaf, weight, tuple(sorted(holes.items())))

    @functools.cached_property
    def _literal(self) -> dict[str, Weight]:
        entries = [w for w in self.weights if "{" not in w.leaf]
        if twice := repeated(w.leaf for w in entries):
            raise KeyMapError(f"the keymap {self.name!r} has two entries for the parameter {twice[0]!r}; remove one")
        return {w.leaf: w for w in entries}

    @functools.cached_property
    def _templates(self) -> tuple[Weight, ...]:
        return tuple(w for w in self.weights if "{" in w.leaf)

    def scanned(self, axis: int = 0) -> KeyMap:
        """Return the keymap of the same family with its layers stacked on `axis` of every layer's weights."""
        return _scanned(self, axis)

    def with_spelling(self, spelling: str) -> KeyMap:
        """Return the keymap of the same family with another spelling of its keys.

        Raises `KeyMapError` if the keymap has no spelling of that name.

        >>> entries = (Weight("q.kernel", "model.q.weight", "i o -> o i"),)
        >>> keymap = KeyMap("tiny", entries, spellings=(("vl", (("model.", "model.language_model."),)),))
        >>> keymap.with_spelling("vl").match("q.kernel").module({})
        'model.language_model.q'
        """
        return _respell(self, spelling)

    def spelling_for(self, keys: Iterable[str], leaves: Iterable[str]) -> KeyMap:
        """Return the spelling that most of a file's keys follow, or this keymap if no spelling matches more.

        Args:
            keys: the file's keys, without PEFT's prefix.
            leaves: the model's leaves. Only entries that match one of them count.
        """
        return _best_spelling(self, tuple(keys), tuple(leaves)) if self.spellings else self

    def with_entries(self, entries: Iterable[Weight]) -> KeyMap:
        """Return the keymap with further literal entries, which take precedence over its templates."""
        entries = tuple(entries)
        replaced = {w.leaf for w in entries}
        kept = tuple(w for w in self.weights if w.leaf not in replaced)
        return dataclasses.replace(self, weights=entries + kept) if entries else self


@functools.lru_cache(maxsize=512)  # every load requests the same ones
def _scanned(keymap: KeyMap, axis: int) -> KeyMap:
    scanned = {w.leaf: w.scanned(axis) for w in keymap.weights}
    return dataclasses.replace(
        keymap,
        name=f"{keymap.name}/scan{axis}",
        weights=tuple(scanned.values()),
        needs=tuple(scanned[leaf].leaf for leaf in keymap.needs),
        counts=tuple((scanned[leaf].leaf, count) for leaf, count in keymap.counts),
    )


@functools.lru_cache(maxsize=32)
def _best_spelling(keymap: KeyMap, keys: tuple[str, ...], leaves: tuple[str, ...]) -> KeyMap:
    kinds = {re.sub(r"\d+", "0", leaf): leaf for leaf in leaves}  # layers are alike
    used = {matched.weight.leaf for matched in map(keymap.match, kinds.values()) if matched is not None}

    def count_matches(spelling: KeyMap) -> int:
        prefixes = tuple(w.key.partition("{")[0].rpartition(".")[0] + "." for w in spelling.weights if w.leaf in used)
        return sum(key.startswith(prefixes) for key in keys)

    return max([keymap, *(keymap.with_spelling(name) for name, _ in keymap.spellings)], key=count_matches)


@functools.lru_cache(maxsize=512)
def _respell(keymap: KeyMap, spelling: str) -> KeyMap:
    if spelling == PER_EXPERT and keymap.expert_modules:
        return dataclasses.replace(keymap, name=f"{keymap.name}/{spelling}", per_expert=True)
    renames = dict(keymap.spellings).get(spelling)
    if renames is None:
        known = ", ".join(
            (*dict(keymap.spellings), *([PER_EXPERT] if keymap.expert_modules else []), "scan0, scan1, …")
        )
        raise KeyMapError(f"the keymap {keymap.name!r} has no naming variant {spelling!r}; use one of {known}")

    def respell(key: str) -> str:
        return next((theirs + key[len(ours) :] for ours, theirs in renames if key.startswith(ours)), key)

    return dataclasses.replace(
        keymap,
        name=f"{keymap.name}/{spelling}",
        weights=tuple(Weight(w.leaf, respell(w.key), w.pattern, **w.options) for w in keymap.weights),
        output=None if keymap.output is None else respell(f"{keymap.output}.").removesuffix("."),
        tied=tuple((respell(a), respell(b)) for a, b in keymap.tied),
        buffers=tuple(map(respell, keymap.buffers)),
        expert_modules=tuple((respell(name), tuple(map(respell, modules))) for name, modules in keymap.expert_modules),
        spellings=(),
    )


def warn_unproved(keymap: KeyMap) -> None:
    """Warn if a keymap that writes a file has not been verified against the real models."""
    if not keymap.proved:
        warn(
            f"the keymap {keymap.name!r} has not been verified against the real models: compare the outputs in PyTorch"
            " before you rely on the file"
        )


_STORED = {"complete": "whole", "expert_modules": "each", "per_expert": "single"}
"""{field: its name in stored keymaps}, where it is another one."""


def to_data(keymap: KeyMap) -> dict[str, Any]:
    """Return a keymap as plain JSON values; `from_data` is the inverse."""
    return {
        _STORED.get(f.name, f.name): getattr(keymap, f.name)
        for f in dataclasses.fields(keymap)
        if f.name != "relative_positions" or keymap.relative_positions
    } | {"weights": [[w.leaf, w.key, w.pattern, w.options] for w in keymap.weights]}


def from_data(data: Mapping[str, Any]) -> KeyMap:
    """Return the keymap of `to_data`; raise `KeyError`, `TypeError` or `ValueError` if the data are invalid."""
    fields: dict[str, Any] = {
        **data,
        "weights": tuple(Weight(leaf, key, pattern, **options) for leaf, key, pattern, options in data["weights"]),
        "tied": tuple((str(a), str(b)) for a, b in data["tied"]),
        "counts": tuple((str(leaf), int(n)) for leaf, n in data.get("counts", ())),
        "spellings": tuple((str(n), tuple((str(a), str(b)) for a, b in renames)) for n, renames in data["spellings"]),
        "each": tuple((str(name), tuple(map(str, modules))) for name, modules in data.get("each", ())),
        **{name: tuple(map(str, data.get(name, ()))) for name in ("needs", "same", "buffers", "order")},
    }
    stored = {name: field for field, name in _STORED.items()}
    return KeyMap(**{stored.get(name, name): value for name, value in fields.items()})


# ---------------------------------------------------------------- recognition


def max_coverage(keymap: KeyMap, leaves: Collection[str], scanned: bool) -> int:
    """Return an upper bound of `coverage`, for a keymap or for all `scanned` forms of it.

    It compares only the ends of names, so it is much cheaper.
    """
    identifying, countable = _leaf_suffixes(keymap, scanned)
    return sum(leaf.endswith(countable) for leaf in leaves) if any(leaf.endswith(identifying) for leaf in leaves) else 0


def coverage(keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of a model's leaves that match, or 0 if the model is not of the family.

    A matching leaf with another layout excludes the family. At least one match must be a layer's matrix, because
    names such as "lm_head" and "classifier" occur in many families. Stacked axes of layers with the same numbering
    must agree in size, which distinguishes layers stacked on axis 0 from those stacked on axis 1; so must the axes
    in `same`.
    """
    return 0 if next(misfits(keymap, shapes), "") else sum(keymap.match(leaf) is not None for leaf in shapes)


def shape_problem(match: Match, shape: Sequence[int]) -> str:
    """Return how the shape of a leaf contradicts its entry; "" if it does not."""
    weight, fixed = match.weight, dict(match.weight.sizes)
    if len(weight.left) != len(shape):
        return (
            f"parameter {match.leaf!r} has shape {tuple(shape)}, but the pattern of its entry, {weight.pattern!r},"
            f" names {len(weight.left)} axes"
        )
    for axis, size in zip(weight.left, shape, strict=True):
        names = (axis.startswith("{") and weight.index_names(axis)) or range(fixed.get(axis.strip("{}"), size))
        if len(names) != size:
            return f"parameter {match.leaf!r} has size {size} on its axis {axis}, but its entry names {list(names)}"
        if fixed and size % math.prod(fixed.get(name, 1) for name in axis_parts(axis)):
            return f"parameter {match.leaf!r}: an axis of size {size} cannot be split as {axis} with the sizes {fixed}"
    return ""


def misfits(keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield the reasons why a model with these leaves is not of the family, one for each leaf."""
    sizes: dict[tuple[str, tuple[int, int]], dict[int, str]] = {}
    counts = dict(keymap.counts)
    matched_weights: list[Weight] = []
    known = {_first_name(w.leaf) for w in keymap.weights} if keymap.complete else set[str]()
    for leaf, shape in shapes.items():
        matched = keymap.match(leaf)
        if matched is None:
            if _first_name(leaf) in known:
                yield f"{leaf} {shape}: no entry matches it"
            continue
        matched_weights.append(matched.weight)
        limit = counts.get(matched.weight.leaf, math.inf)
        beyond = any(text.isdecimal() and int(text) >= limit for _, text in matched.holes)
        if problem := f"parameter {leaf!r}: only {limit} such layers" if beyond else shape_problem(matched, shape):
            yield problem
            continue
        mismatch = f"{leaf} {shape}: its entry has the pattern {matched.weight.pattern!r}"
        for name, size in zip(matched.weight.left, shape, strict=True):
            if name.startswith("{") and matched.weight.index_names(name) is None:
                sizes.setdefault((name, matched.weight.layers), {}).setdefault(size, mismatch)
                if limit not in (size, math.inf):
                    yield f"{mismatch}, where {name} is {limit}"
            elif name in keymap.same:
                sizes.setdefault((name, (1, 0)), {}).setdefault(size, mismatch)
    for (name, _), different in sizes.items():
        first, *others = different.items()
        yield from (f"{text}, where {name} is {size}; it is {first[0]} in {first[1]}" for size, text in others)
    matched_leaves = {weight.leaf for weight in matched_weights}
    yield from (f"{leaf}: missing" for leaf in keymap.needs if leaf not in matched_leaves)
    if not any(weight.is_layer_matrix for weight in matched_weights):
        yield "no parameter is a layer's matrix"


def leaves_left_out(keymap: KeyMap, shapes: Iterable[str], adapted: Iterable[str]) -> list[str]:
    """Return the leaves without an entry that have the last two names of an adapted leaf.

    They are of layers beside those that the keymap knows: a stacked model may have further layers for a remainder.
    """
    ends = {(*leaf.split(".")[-2:],) for leaf in adapted}
    known = {_first_name(w.leaf) for w in keymap.weights}
    return [
        leaf
        for leaf in shapes
        if (*leaf.split(".")[-2:],) in ends and _first_name(leaf) in known and keymap.match(leaf) is None
    ]


def wrong_counts(keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the leaves of `KeyMap.counts` whose number of layers differs in a model; later layers then move."""
    found = [
        (match.weight.leaf, dict(zip(match.weight.left, shape, strict=False)).get("{l}", 1))
        for leaf, shape in shapes.items()
        if keymap.counts and (match := keymap.match(leaf)) is not None
    ]
    return [
        f"{leaf}: {layers} layers, expected {count}"
        for leaf, count in keymap.counts
        if (layers := sum(size for each, size in found if each == leaf)) not in (0, count)
    ]


def advise_stacked(keymap: KeyMap, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the advice to name the form of a keymap for stacked layers, if a model has the leaves of that form."""
    return next(
        (
            f"the model's layers are stacked: pass keymap={form.name!r}"
            for form in map(keymap.scanned, range(3))
            if form.weights != keymap.weights and coverage(form, shapes)
        ),
        "",
    )


@functools.lru_cache(maxsize=512)
def _leaf_suffixes(keymap: KeyMap, scanned: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what follows the last hole in each leaf: for the entries that identify a family, and for all entries."""
    suffixes = [((w.scanned_leaf if scanned else w.leaf).rpartition("}")[2], w) for w in keymap.weights]
    return tuple({suffix for suffix, w in suffixes if w.is_layer_matrix}), tuple({suffix for suffix, _ in suffixes})


def _first_name(leaf: str) -> str:
    """Return the first name of a path with "#" for numbers: the same for "layer_3.attn.w" and "layer_{l}.attn.w"."""
    return re.sub(r"\d+|\{\w+\}", "#", leaf.partition(".")[0])


def tied_heads(keymap: KeyMap, leaves: Iterable[str]) -> dict[str, str]:
    """Return `{head: token embedding whose weight it uses}` for a model with these leaves, as PyTorch modules."""
    keys = {match.weight.key for leaf in leaves if keymap.tied and (match := keymap.match(leaf)) is not None}
    return {
        head.removesuffix(".weight"): embedding.removesuffix(".weight")
        for head, embedding in keymap.tied
        if head not in keys and embedding in keys
    }


# ---------------------------------------------------------------- module order


def sort_modules(keymap: KeyMap, modules: Iterable[str]) -> tuple[str, ...]:
    """Return PyTorch modules in the order of `named_modules`: by their numbers, and other names by `KeyMap.order`.

    Raises `KeyMapError` listing the modules whose order the keymap does not state.

    >>> sort_modules(KeyMap("tiny", (), order=("v", "q")), ("h.10.q", "h.2.q", "h.2.v"))
    ('h.2.v', 'h.2.q', 'h.10.q')
    """
    modules = tuple(dict.fromkeys(modules))
    places = {name: place for place, name in enumerate(keymap.order)}
    inside = paths.group(
        (".".join(parts[:i]), part) for parts in (m.split(".") for m in modules) for i, part in enumerate(parts)
    )
    unknown = {
        re.sub(r"(?<![^.])\d+(?![^.])", "#", f"{parent}.{name}".strip("."))
        for parent, names in inside.items()
        for name in names
        if len(set(names)) > 1 and not name.isdigit() and name not in places
    }
    raise_listed(
        KeyMapError,
        f"this adapter depends on the order of PyTorch's modules, which the keymap {keymap.name!r} does not state for"
        " these. Pass a KeyMap with order=(their last names, in the order of the PyTorch model's named_modules):",
        sorted(unknown),
    )
    positions = {m: [int(part) if part.isdigit() else places.get(part, 0) for part in m.split(".")] for m in modules}
    return tuple(sorted(modules, key=positions.__getitem__))


# ---------------------------------------------------------------- generic


GENERIC = KeyMap(
    "generic",
    tuple(Weight(f"{prefix}kernel", f"{prefix}weight", "i o -> o i") for prefix in ("", "{path}.")),
)
"""The keymap for models of no known family: 2-D leaves called `kernel`, (in, out) as in Flax, named by their paths."""

MAIN_WEIGHT_NAMES = ("kernel", "w", "weight", "embedding")
"""Usual names of a module's main weight, which is named by its module alone; other parameters keep their own name."""


def entry_from_axes(
    leaf: str,
    shape: Sequence[int],
    axes: Axes,
    stack: Sequence[int] = (),
    kind: Kind = "linear",
    groups: int = 1,
    places: Sequence[int] | None = None,
) -> Weight:
    """Return a literal entry for a leaf whose axis roles come from its class or a trace, not from a keymap.

    The PyTorch name is the JAX path. The index of a numbered axis (stacked layers, batch) is inserted before the last
    module name, so that targets still match by suffix. A vector keeps the last name of its path.

    Args:
        leaf: the path of the leaf.
        shape: the shape of the leaf.
        axes: the axis roles, without the stacked axes.
        stack: positions of the stacked axes.
        kind: the kind of the weight.
        groups: the groups of a convolution.
        places: the number of names of the module's path before the number of each stacked axis; by default all but one.

    >>> entry_from_axes("blk.q.kernel", (3, 8, 2, 4), Axes((0,), (1, 2)), stack=(0,)).pattern
    '{s0} i0 o0 o1 -> (o0 o1) (i0)'
    """
    unstacked = [i for i in range(len(shape)) if i not in stack]
    names: dict[int, str] = {axis: f"{{s{n}}}" for n, axis in enumerate(stack)}
    for role, name in ((axes.in_axes, "i{}"), (axes.out_axes, "o{}"), (axes.batch_axes, "{{b{}}}")):
        names |= {unstacked[a]: name.format(n) for n, a in enumerate(role)}
    *head, last = leaf.split(".")
    module = head if kind == "vector" or last in MAIN_WEIGHT_NAMES else [*head, last]
    before = dict(zip(stack, places or [len(module) - 1] * len(stack), strict=True))
    key = ".".join([*_numbered_path(module, names, before), last if kind == "vector" else "weight"])
    left = " ".join(names[i] for i in range(len(shape)))
    out, inputs = (" ".join(names[unstacked[a]] for a in role) for role in (axes.out_axes, axes.in_axes))
    over: Any = {f"b{n}": [str(i) for i in range(shape[unstacked[a]])] for n, a in enumerate(axes.batch_axes)}
    right = {"embedding": f"({inputs}) ({out})", "conv": f"({out}) {inputs}", "vector": f"({out})"}.get(
        kind, f"({out}) ({inputs})"
    )
    return Weight(leaf, key, f"{left} -> {right}", kind=kind, groups=groups, **over)


def _numbered_path(module: Sequence[str], names: Mapping[int, str], places: Mapping[int, int]) -> list[str]:
    """Return a module's path with the numbers of axes before its last name, or at the places of some axes.

    Args:
        names: `{axis: name}`; those of numbered axes are in braces.

    >>> _numbered_path(["layers", "attn", "q"], {0: "{s0}", 1: "{b0}", 2: "i0"}, {0: 1})
    ['layers', '{s0}', 'attn', '{b0}', 'q']
    """
    path = list(module)
    for axis in sorted(names, reverse=True):
        if names[axis].startswith("{"):
            path.insert(places.get(axis, len(module) - 1), names[axis])
    return path


def keymap_from_paths(
    shapes: Mapping[str, Sequence[int]], entries: Iterable[Weight], custom: Collection[str] = ()
) -> tuple[KeyMap, list[str]]:
    """Return a keymap for a model whose paths are PyTorch's names, and its matrices of unknown orientation.

    The orientation of a matrix that is not square is visible from its shape in the file. A kernel with more than two
    axes gets no entry, unless `entries` has one.

    Args:
        shapes: the shapes of the model's weights.
        entries: the entries of the weights whose layers define the axis roles.
        custom: leaves of custom layers, which do not define the roles. Flax's own kernels are (in, out).

    >>> keymap, unsure = keymap_from_paths({"fc.kernel": (2, 3), "fc.bias": (3,), "out.weight": (3, 3)}, ())
    >>> keymap.match("fc.kernel").weight.pattern, unsure
    ('i o -> o i', ['out.weight'])
    """
    by_leaf = {entry.leaf: entry for entry in entries}
    unsure: list[str] = []
    for leaf, shape in shapes.items():
        module, _, last = leaf.rpartition(".")
        if leaf in by_leaf or (last in ("kernel", "w") and len(shape) > 2):
            continue
        by_leaf[leaf] = entry_for_copy(leaf, shape)
        if (
            len(shape) == 2
            and shape[0] == shape[1]
            and (last in ("w", "weight") or (last == "kernel" and leaf in custom))
        ):
            unsure.append(leaf)
        if last == "bias" and len(shape) > 1:  # axes for the heads and their features: one axis in PyTorch
            axes = " ".join(f"a{i}" for i in range(len(shape)))
            by_leaf[leaf] = Weight(leaf, f"{module}.bias".lstrip("."), f"{axes} -> ({axes})")
    return KeyMap(GENERIC.name, tuple(by_leaf.values())), unsure


def fitting_match(keymap: KeyMap, leaf: str, shape: Sequence[int]) -> Match | None:
    """Return the match of a leaf; None if there is none, or if its entry has another number of axes."""
    matched = keymap.match(leaf)
    return matched if matched is not None and len(matched.weight.left) == len(shape) else None


def is_guess(keymap: KeyMap, leaf: str, shape: Sequence[int]) -> bool:
    """Return True if no family's keymap defines a leaf's PyTorch layout, so that its entry assumes Flax's layout."""
    matched = fitting_match(keymap, leaf, shape)
    return matched is None or matched.weight in GENERIC.weights or _is_from_axes(matched.weight)


def _is_from_axes(entry: Weight) -> bool:
    """Return True if `entry_from_axes` made the entry."""
    axes = entry.axes
    return not axes.batch_axes and entry == entry_from_axes(
        entry.leaf, range(len(entry.left)), axes, entry.stack, entry.kind, entry.groups
    )


def is_square(matched: Match, shape: Sequence[int]) -> bool:
    """Return True if a linear weight has as many inputs as outputs, so that its shape also fits when transposed."""
    sizes = dict(zip(matched.weight.left, shape, strict=True))
    inputs, out = (math.prod(sizes[axis] for axis in matched.roles[role]) for role in ("in", "out"))
    return matched.weight.kind == "linear" and inputs == out


_C = TypeVar("_C", bound="Config")


def with_layout(config: _C, keymap: KeyMap, sites: Iterable[Match]) -> _C:
    """Return the configuration with `fan_in_fan_out` as PEFT sets it: by the last Conv1D or nn.Linear that it adapts.

    Modules are in the order of the keymap's entries. Modules without an entry of the family (a custom head) come last.
    """
    linear = [matched.weight for matched in sites if matched.weight.kind in ("linear", "fused")]
    if "fan_in_fan_out" not in config.to_dict() or not any(w.fan_in_fan_out for w in keymap.weights) or not linear:
        return config
    order = {entry.leaf: i for i, entry in enumerate(keymap.weights)}
    turned = max(linear, key=lambda entry: (_is_from_axes(entry), order[entry.leaf])).fan_in_fan_out
    return config if bool(config.get("fan_in_fan_out")) == turned else config.replace(fan_in_fan_out=turned)


def entry_for_copy(leaf: str, shape: Sequence[int]) -> Weight:
    """Return a literal entry for a leaf that is only copied: 2-D kernels are transposed, others keep their layout.

    >>> entry_for_copy("score.kernel", (4, 2)).key, entry_for_copy("norm.scale", (4,)).pattern
    ('score.weight', 'a0 -> a0')
    """
    module, dot, last = leaf.rpartition(".")
    key = f"{module}{dot}{'weight' if last in ('kernel', 'scale', 'embedding') else last}"
    if last == "kernel" and len(shape) == 2:
        return Weight(leaf, key, "i o -> o i")
    axes = " ".join(f"a{i}" for i in range(len(shape)))
    return Weight(leaf, key, f"{axes} -> {axes}", kind="vector" if len(shape) == 1 else "other")


def linen_example(config: Config) -> str:
    """Return the lines that get the shapes of an adapter's collection from the adapted Linen module, and load it."""
    name = config.peft_type.lower()
    return (
        f'\n  adapter = jax.eval_shape(jaxadapt.adapt(module, config).init, key, x)["{name}"]\n'
        f'  jaxadapt.load(path, {{"params": params, "{name}": adapter}})'
    )


def layout_advice(config: Config, leave_out: str) -> str:
    """Return the end of an error message about unknown layouts: the ways to define a layout."""
    return (
        "\nFor an NNX model or a pytree, pass example=[inputs of one call] (in load, LoraTree(model, example=…)): the"
        f" computation shows the layouts. Or pass keymap=<family>, or a KeyMap with an entry for each; or {leave_out}."
        f" In Linen, a call of the adapted module shows them:{linen_example(config)}\n  jaxadapt.init(params, config,"
        f' key=key, keymap=jaxadapt.extract({{"{config.peft_type.lower()}": adapter}}).keymap)  # for a new adapter'
    )
