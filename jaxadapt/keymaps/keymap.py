"""The table that ties the leaves of a JAX model to PyTorch's names: a `KeyMap` of `Weight` lines for one family.

A `Match` is one leaf found by one line. `plan.py` applies a table to shapes. Pure: strings and shapes only; no
arrays, no files, no devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxadapt.arrays.axes import Axes
from jaxadapt.arrays.pattern import axis_parts
from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError, warn
from jaxadapt.keymaps.weight import EXPERTS, Weight

PEFT_PREFIX = "base_model.model."

PER_EXPERT = "per-expert"
"""The spelling with a module for each expert."""


Renames = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Match:
    """One base leaf, found by one line: the axis roles and the PyTorch modules it stands for.

    `parts` lists the targeted entries of the leaf's fused axis, None where there is none (or all are).
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
        """The roles as the module itself sees its weight, with the targeted parts."""
        axes = self.weight.axes
        return axes if self.parts is None else dataclasses.replace(axes, parts=self.parts)

    def module(self, index: Mapping[str, str]) -> str:
        """The PyTorch module name of one entry of the braced axes, given as `{axis: text}`."""
        return self._named(index) if index else self._name

    @functools.cached_property
    def _name(self) -> str:
        return self._named({})

    def _named(self, index: Mapping[str, str]) -> str:
        return self.weight.module.format(**dict(self.holes), **index)

    def parameter(self, index: Mapping[str, str]) -> tuple[str, str]:
        """PyTorch's name of the weight itself, as its module's and its own."""
        module, _, name = self.weight.file_key.format(**dict(self.holes), **index).rpartition(".")
        return module, name

    def parameters(self, sizes: Mapping[str, int]) -> dict[tuple[int, ...], tuple[str, str]]:
        """As `modules`, with the parameter's own name."""
        return {index: self.parameter(text) for index, text in index_entries(self.weight, self.braced, sizes)}

    def modules(self, sizes: Mapping[str, int]) -> dict[tuple[int, ...], str]:
        """PyTorch module names by index over (stacked axes..., fused axis)."""
        return {index: self.module(text) for index, text in index_entries(self.weight, self.braced, sizes)}

    @property
    def braced(self) -> tuple[str, ...]:
        """The axes that PyTorch lacks: stacked layers, then experts, then fused parts."""
        return self.roles["stack"] + tuple(n for n in self.weight.left if n == EXPERTS) + self.roles["fused"]


def index_entries(
    weight: Weight,
    braced: Sequence[str],
    sizes: Mapping[str, int],
    only: Mapping[str, Sequence[int]] | None = None,
) -> list[tuple[tuple[int, ...], dict[str, str]]]:
    """All index combinations of the braced axes, row-major, each with the text that fills the key's holes."""
    out: list[tuple[tuple[int, ...], dict[str, str]]] = [((), {})]
    for axis in braced:
        names = weight.names(axis)
        which = (only or {}).get(axis, range(sizes[axis]))
        out = [
            ((*index, i), {**text, axis.strip("{}"): names[i] if names is not None else weight.torch_number(axis, i)})
            for index, text in out
            for i in which
        ]
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class KeyMap:
    """A table of `Weight` lines for one model family.

    Args:
        name: how `keymap=` and messages call it ("llama").
        weights: the lines; each leaf of a model must match at most one.
        output: module name of the output head, which "all-linear" leaves out (PEFT does the same).
        prefix: what PEFT puts before every module name.
        proved: False for a table that has not been shown to be right against the real models: it is never
            recognised by itself, and saving with it says so.
        whole: it is recognised by itself only where every leaf has a line (save those under a first name the table
            does not know: a vision tower), because other models of the same library call their layers alike.
        needs: leaves (as in the lines) without which it is not recognised.
        same: axes that have one size in the whole model, else it is not recognised: what tells `"f d"` from `"d f"`.
        counts: `(leaf, n)` of leaves (as in the lines) that are as many layers where they are stacked, else it is not
            recognised: the numbers of further layers follow from it.
        tied: `(key, same as key)` of weights that a model with tied embeddings does not hold twice.
        buffers: keys that a PyTorch file may hold and that are no weights; `{l}` stands for digits.
        spellings: `(name, ((ours, theirs), …))`: other beginnings of the same keys. transformers 5 calls the
            layers of a vision-language model "model.language_model.layers…"; "llama/vl" is the table for that.
        each: `(parameter, (module, …))`: what the parts of a parameter of all experts are called as modules of single
            ones (`{e}`), as transformers 4 had them and checkpoints on disk still do; in PyTorch's order.
        single: adapters are saved, and models exported, with a tensor for each expert: "mixtral/per-expert".

    >>> table = KeyMap("tiny", (Weight("{path}.kernel", "{path}.weight", "i o -> o i"),))
    >>> table.match("a.b.kernel").module({})
    'a.b'
    """

    name: str
    weights: tuple[Weight, ...]
    output: str | None = None
    prefix: str = PEFT_PREFIX
    proved: bool = True
    whole: bool = False
    needs: tuple[str, ...] = ()
    same: tuple[str, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    buffers: tuple[str, ...] = ()
    spellings: tuple[tuple[str, Renames], ...] = ()
    each: tuple[tuple[str, tuple[str, ...]], ...] = ()
    single: bool = False

    @functools.cached_property
    def _identity(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __hash__(self) -> int:
        return hash(self.name)  # short: it is part of jit's cache key, leaf by leaf

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, KeyMap) and self._identity == other._identity)

    def __repr__(self) -> str:
        # Every adapter parameter carries its table, and whoever prints a model prints them all.
        return f"<KeyMap {self.name!r}, {len(self.weights)} lines>"

    def match(self, leaf: str) -> Match | None:
        """The site of a leaf, None if no line matches; several matching lines raise `KeyMapError`."""
        literal = self._literal.get(leaf)
        if literal is not None:
            return Match(leaf, literal)
        hits = [(w, m) for w in self._templates if leaf.endswith(w.suffix) and (m := w.regex.fullmatch(leaf))]
        if len(hits) > 1:
            raise KeyMapError(
                f"leaf {leaf!r} matches {len(hits)} lines of the table {self.name!r}:\n"
                + paths.bullets(w.leaf for w, _ in hits)
            )
        if not hits:
            return None
        weight, match = hits[0]
        holes = match.groupdict()
        if weight.layers != (1, 0) and "l" in holes:
            holes["l"] = weight.torch_number("l", int(holes["l"]))
        return Match(leaf, weight, tuple(sorted(holes.items())))

    @functools.cached_property
    def _literal(self) -> dict[str, Weight]:
        out: dict[str, Weight] = {}
        for w in self.weights:
            if "{" not in w.leaf:
                if w.leaf in out:
                    raise KeyMapError(f"the table {self.name!r} has two lines for the leaf {w.leaf!r}")
                out[w.leaf] = w
        return out

    @functools.cached_property
    def _templates(self) -> tuple[Weight, ...]:
        return tuple(w for w in self.weights if "{" in w.leaf)

    def scanned(self, axis: int = 0) -> KeyMap:
        """The same family with its layers stacked on `axis` of every layer weight."""
        return _scanned(self, axis)

    def with_spelling(self, spelling: str) -> KeyMap:
        """The same family under another spelling of its keys; `KeyMapError` if it has none of that name.

        >>> lines = (Weight("q.kernel", "model.q.weight", "i o -> o i"),)
        >>> table = KeyMap("tiny", lines, spellings=(("vl", (("model.", "model.language_model."),)),))
        >>> table.with_spelling("vl").match("q.kernel").module({})
        'model.language_model.q'
        """
        return _spelt(self, spelling)

    def spelling_for(self, keys: Iterable[str], leaves: Iterable[str]) -> KeyMap:
        """The spelling that most of a file's keys (without PEFT's prefix) follow; this table if none does better.

        `leaves` are the model's: a table may have lines for another spelling, of a model that has other leaves.
        """
        return _followed(self, tuple(keys), tuple(leaves)) if self.spellings else self

    def with_entries(self, lines: Iterable[Weight]) -> KeyMap:
        """The same table with further literal lines, which win over its templates."""
        lines = tuple(lines)
        mine = {w.leaf for w in lines}
        kept = tuple(w for w in self.weights if w.leaf not in mine)
        return dataclasses.replace(self, weights=lines + kept) if lines else self

    def max_coverage(self, leaves: Collection[str], scanned: bool) -> int:
        """A number that `coverage` does not pass, for this table or all `scanned` ones of it: cheap, by names alone."""
        tails = [(w.scanned_leaf if scanned else w.leaf).rpartition("}")[2] for w in self.weights]
        telling = tuple({tail for w, tail in zip(self.weights, tails, strict=True) if _tells(w)})
        every = tuple(set(tails)) if any(leaf.endswith(telling) for leaf in leaves) else ()
        return sum(leaf.endswith(every) for leaf in leaves)

    def coverage(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How many of a model's leaves the table accounts for; 0 if a leaf of its name has another layout.

        At least one must be a layer's matrix: everybody calls a head "lm_head" or "classifier". Stacked axes of layers
        that are numbered alike must agree in size, which tells layers stacked on axis 0 from those on axis 1; so must
        `same`.
        """
        if next(self.misfits(shapes), None) is not None:
            return 0
        return sum(self.match(leaf) is not None for leaf in shapes)

    def tells(self, leaves: Iterable[str]) -> bool:
        """Whether there is a matrix of a layer among these leaves, by the table's names."""
        return any((site := self.match(leaf)) is not None and _tells(site.weight) for leaf in leaves)

    def misfits(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        """Why a model with these leaves is none of the family: each leaf, and what the table expects there."""
        sizes: dict[tuple[str, tuple[int, int]], dict[int, str]] = {}
        told, found = False, set[str]()
        for leaf, shape in shapes.items():
            site = self.match(leaf)
            if site is None:
                if self.whole and _beginning(leaf) in self._known_beginnings:
                    yield f"{leaf} {shape}: no line names it"
                continue
            found.add(site.weight.leaf)
            told = told or _tells(site.weight)
            said = f"{leaf} {shape}: its line says {site.weight.pattern!r}"
            if len(site.weight.left) != len(shape):
                yield said
                continue
            fixed = dict(site.weight.sizes)
            for name, size in zip(site.weight.left, shape, strict=True):
                if fixed and size % (parts := math.prod(fixed.get(n, 1) for n in axis_parts(name))):
                    yield f"{said}, and {size} is no multiple of {parts}"
                names = site.weight.names(name)
                if names is not None and len(names) != size:
                    yield f"{said}, and {name} has the entries {', '.join(names)}"
                if name.startswith("{") and names is None:
                    sizes.setdefault((name, site.weight.layers), {}).setdefault(size, said)
                    if size != (count := self._counts.get(site.weight.leaf, size)):
                        yield f"{said}, where {name} is {count}"
                elif name in self.same:
                    sizes.setdefault((name, (1, 0)), {}).setdefault(size, said)
        for (name, _), different in sizes.items():
            first, *others = different.items()
            yield from (f"{said}, where {name} is {size}; it is {first[0]} in {first[1]}" for size, said in others)
        yield from (f"{leaf}: missing" for leaf in self.needs if leaf not in found)
        if not told:
            yield "no matrix of a layer"

    @functools.cached_property
    def _counts(self) -> dict[str, int]:
        return dict(self.counts)

    @functools.cached_property
    def _known_beginnings(self) -> set[str]:
        return {_beginning(w.leaf) for w in self.weights}


@functools.lru_cache(maxsize=512)  # a table is asked for the same ones at every load
def _scanned(table: KeyMap, axis: int) -> KeyMap:
    lines = {w.leaf: w.scanned(axis) for w in table.weights}
    return dataclasses.replace(
        table,
        name=f"{table.name}/scan{axis}",
        weights=tuple(lines.values()),
        needs=tuple(lines[leaf].leaf for leaf in table.needs),
        counts=tuple((lines[leaf].leaf, count) for leaf, count in table.counts),
    )


@functools.lru_cache(maxsize=32)
def _followed(table: KeyMap, keys: tuple[str, ...], leaves: tuple[str, ...]) -> KeyMap:
    kinds = {re.sub(r"\d+", "0", leaf): leaf for leaf in leaves}  # layers are alike
    sites = [site for leaf in kinds.values() if (site := table.match(leaf)) is not None]
    used = {site.weight.leaf for site in sites}

    def follow(other: KeyMap) -> int:
        mine = tuple(w.key.partition("{")[0].rpartition(".")[0] + "." for w in other.weights if w.leaf in used)
        return sum(key.startswith(mine) for key in keys)

    return max([table, *(table.with_spelling(name) for name, _ in table.spellings)], key=follow)


@functools.lru_cache(maxsize=512)
def _spelt(table: KeyMap, spelling: str) -> KeyMap:
    if spelling == PER_EXPERT and table.each:
        return dataclasses.replace(table, name=f"{table.name}/{spelling}", single=True)
    renames = dict(table.spellings).get(spelling)
    if renames is None:
        known = ", ".join((*dict(table.spellings), *([PER_EXPERT] if table.each else []), "scan0, scan1, …"))
        raise KeyMapError(f"the table {table.name!r} has no spelling {spelling!r}; it has {known}")

    def other(key: str) -> str:
        return next((theirs + key[len(ours) :] for ours, theirs in renames if key.startswith(ours)), key)

    return dataclasses.replace(
        table,
        name=f"{table.name}/{spelling}",
        weights=tuple(Weight(w.leaf, other(w.key), w.pattern, **w.options) for w in table.weights),
        output=None if table.output is None else other(f"{table.output}.").removesuffix("."),
        tied=tuple((other(a), other(b)) for a, b in table.tied),
        buffers=tuple(map(other, table.buffers)),
        each=tuple((other(name), tuple(map(other, modules))) for name, modules in table.each),
        spellings=(),
    )


def _tells(line: Weight) -> bool:
    """Whether a leaf of this line tells which family a model is of: a matrix of a numbered or stacked layer."""
    return line.kind == "linear" and ("{l}" in line.leaf or "{l}" in line.left)


def _beginning(leaf: str) -> str:
    """The first name of a path, whatever its number: "layer_3.attn.w" and "layer_{l}.attn.w" begin alike."""
    return re.sub(r"\d+|\{\w+\}", "#", leaf.partition(".")[0])


def warn_unproved(table: KeyMap) -> None:
    """Say so where a table is used to write that has not been proved."""
    if not table.proved:
        warn(
            f"the table {table.name!r} is not proved against the real models: compare the outputs in PyTorch before you"
            " rely on what it names"
        )


def to_data(table: KeyMap) -> dict[str, Any]:
    """A table as plain values that JSON keeps; `from_data` is the inverse."""
    lines = [[w.leaf, w.key, w.pattern, w.options] for w in table.weights]
    rest = {f.name: getattr(table, f.name) for f in dataclasses.fields(table) if f.name != "weights"}
    return {**rest, "weights": lines}


def from_data(data: Mapping[str, Any]) -> KeyMap:
    """The table of `to_data`; raises `KeyError`, `TypeError` or `ValueError` if the data are none."""
    weights = tuple(Weight(leaf, key, pattern, **options) for leaf, key, pattern, options in data["weights"])
    tied = tuple((str(a), str(b)) for a, b in data["tied"])
    counts = tuple((str(leaf), int(n)) for leaf, n in data.get("counts", ()))
    keep = {name: tuple(map(str, data[name])) for name in ("needs", "same", "buffers")}
    spellings = tuple((str(n), tuple((str(a), str(b)) for a, b in renames)) for n, renames in data["spellings"])
    each = tuple((str(name), tuple(map(str, modules))) for name, modules in data.get("each", ()))
    made: dict[str, Any] = {"weights": weights, "tied": tied, "counts": counts, "spellings": spellings, "each": each}
    fields: dict[str, Any] = {**data, **keep, **made}
    return KeyMap(**fields)
