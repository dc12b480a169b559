"""The LoRA leaves of other libraries, and the dialects: the names and shapes that each library gives such leaves.

A dialect has a `Pair` for each kind of site: the paths of the two arrays of a site, their base leaf, and the axes of
the base weight in each array. The family's keymap gives PyTorch's names of those axes. So dialects and families
combine freely. A new dialect is a file of this package that defines `DIALECT`, and a row of `_FILES`. The leaves are
converted in `tree.py`.

Uses only strings and shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Collection
from typing import NamedTuple

from jaxadapt.arrays.layout import RANK
from jaxadapt.core.errors import KeyMapError, bullets, raise_listed
from jaxadapt.keymaps.weight import Weight

_HOLES = {"{module}.": r"(?:(?P<module>.+)\.)?", "{leaf}": r"(?P<leaf>.+)", "{name}": r"(?P<name>[^\W\d][^.]*)"}
"""The holes of path patterns: `{module}.` is a path or none, `{leaf}` any path, `{name}` a segment but no number."""
_HOLE = re.compile("|".join(map(re.escape, _HOLES)))
_WORDS = {
    "r": (), "in": ("in",), "ins": ("in", "batch"), "out": ("out",), "outs": ("out", "batch"), "batch": ("batch",),
    "first": (), "last": (),
}  # fmt: skip
"""`{word of a layout: the roles of its axes}`."""

Dims = tuple[tuple[str, ...], ...]
"""The axes of one array, each a group of base axes that the dialect flattens into one."""


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(
        "".join(_HOLES.get(piece) or re.escape(piece) for piece in re.split(f"({_HOLE.pattern})", pattern))
    )


def _rename(path: str, pattern: str, *others: str) -> tuple[str, ...] | None:
    """Return the other patterns with the texts that a path has in the holes of `pattern`; None if it does not match."""
    found = _regex(pattern).fullmatch(path)
    if found is None:
        return None
    texts = {name: text or "" for name, text in found.groupdict().items()}
    return tuple(other.format(**texts).removeprefix(".") for other in others)


def _check_holes(*patterns: str) -> None:
    """Raise `KeyMapError` unless patterns have the same holes, all of them known."""
    holes = {pattern: sorted(_HOLE.findall(pattern)) for pattern in patterns}
    unknown = [pattern for pattern in patterns if not {*"{}"}.isdisjoint(_HOLE.sub("", pattern))]
    if unknown or len({*map(tuple, holes.values())}) > 1:
        raise KeyMapError(
            f"the patterns {', '.join(map(repr, patterns))} of a dialect must have the same holes, each one of"
            f" {', '.join(_HOLES)}; found {', '.join(map(repr, unknown)) or holes}"
        )


@dataclasses.dataclass(frozen=True)
class Pair:
    """The two arrays of a kind of site, and the base leaf they adapt.

    Args:
        a, b: path patterns of the input side (…, r) and the output side (r, …).
        leaf: path pattern of the base leaf, by the family's keymap.
        layouts: the possible layouts of the two arrays, distinguished by their shapes. A layout consists of words:
            "r"; "in", "out", "batch" (the base weight's axes of that role, in the leaf's order), "ins" and "outs" (the
            same, batch axes included), "first" and "last" (the last two axes, of any role). Parentheses around a word
            flatten its axes into one. Axes of stacked layers keep their position in the base weight.
        unscaled: True if the library does not multiply by alpha/r here, although it does elsewhere.
        alpha_leaf, scale_leaf: path pattern of the array or number that stores alpha, or alpha/r; "" if there is none.
        rank_leaf: path pattern of the ranks in use, if the arrays hold several adapters on a leading axis, one in each
            slot. The array of `scale_leaf` then has the scale of each slot.

    Raises `KeyMapError` for an unknown hole of a pattern or an unknown word of a layout.

    >>> Pair("{leaf}_lora_a", "{leaf}_lora_b", "{leaf}").layouts
    (('in r', 'r out'),)
    """

    a: str
    b: str
    leaf: str
    layouts: tuple[tuple[str, str], ...] = (("in r", "r out"),)
    unscaled: bool = False
    alpha_leaf: str = ""
    scale_leaf: str = ""
    rank_leaf: str = ""

    def __post_init__(self) -> None:
        _check_holes(self.a, self.b, self.leaf, *self.stored)
        known = {*_WORDS, *(f"({word})" for word in _WORDS)}
        raise_listed(
            KeyMapError,
            f"a layout of {self.a!r} must consist of the words {', '.join(_WORDS)}, also in parentheses; found:",
            [word for both in self.layouts for text in both for word in text.split() if word not in known],
        )

    @property
    def stored(self) -> list[str]:
        """The path patterns of what the library stores beside the two arrays."""
        return [pattern for pattern in (self.alpha_leaf, self.scale_leaf, self.rank_leaf) if pattern]


class Claim(NamedTuple):
    """The leaf paths of one site that a dialect claims, and the pair that matches them; "" if nothing is stored."""

    pair: Pair
    a: str
    b: str
    alpha: str
    scale: str
    rank: str


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The convention of a library for its LoRA leaves: a table of `Pair`s, and what is the same for all of them.

    Args:
        name: its name in messages.
        pairs: the pairs; the first one that matches a path is used.
        like: a regular expression for a part of each path of a LoRA leaf, upper or lower case. A dialect must claim
            every path of a tree that matches that of any dialect.
        unscaled: True if the library computes W·x + B·A·x, so that lora_alpha equals the rank.
        scale: the library's name of alpha, for the error that asks for it where no leaf stores it.
        shares: True if one of the arrays may lack braced axes (fused parts, experts), which then share it.
        moved: base leaves with another path in its trees, `(pattern, the family's path)`.
        heads: "shared": B is shared by all heads (r, last axis), A has one matrix per head. "own": both have one per
            head. See `forms.py`. "" otherwise.
        named: True if its paths name the modules of one library's models, so that it is chosen before dialects whose
            paths have any module.
        trains: the libraries whose models it trains; "maxtext/flat" if the layers call dot_general there.

    Raises `KeyMapError` for an unknown hole or value of `heads`.

    >>> found = Dialect("d", (Pair("{leaf}_a", "{leaf}_b", "{leaf}"),)).claim({"q.w_a", "q.w_b", "q.w"})
    >>> [(leaf, claim.a, claim.b) for leaf, (claim,) in found.items()]
    [('q.w', 'q.w_a', 'q.w_b')]
    """

    name: str
    pairs: tuple[Pair, ...]
    like: str = r"(^|[._])lora([._]|$)"
    unscaled: bool = False
    scale: str = "alpha"
    shares: bool = False
    moved: tuple[tuple[str, str], ...] = ()
    heads: str = ""
    named: bool = False
    trains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for patterns in self.moved:
            _check_holes(*patterns)
        if self.heads not in ("", "shared", "own"):
            raise KeyMapError(f"the heads of the dialect {self.name!r}: expected shared or own, found {self.heads!r}")

    @property
    def has_slots(self) -> bool:
        """True if the arrays hold several adapters."""
        return any(pair.rank_leaf for pair in self.pairs)

    def claim(self, paths: Collection[str]) -> dict[str, list[Claim]]:
        """Return `{base leaf: its claims}` of the arrays of this dialect."""
        out: dict[str, list[Claim]] = {}
        for path in paths:
            for pair in self.pairs:
                found = _rename(path, pair.a, pair.leaf, pair.b, pair.alpha_leaf, pair.scale_leaf, pair.rank_leaf)
                if found is not None and found[1] in paths:
                    out.setdefault(found[0], []).append(Claim(pair, path, *found[1:]))
                    break
        return out

    def owned(self, paths: Collection[str]) -> set[str]:
        """Return the paths of all leaves of this dialect; none if it has slots and no path is of a rank or scale.

        (An adapter of jaxadapt without its configuration has the other paths of SkyRL-tx.)
        """
        claims = [claim for claims in self.claim(paths).values() for claim in claims]
        beside = {path for claim in claims for path in (claim.alpha, claim.scale, claim.rank) if path in paths}
        if self.has_slots and not beside:
            return set()
        return {path for claim in claims for path in (claim.a, claim.b)} | beside

    def base(self, path: str) -> str:
        """Return the family's path of a base leaf.

        >>> Dialect("d", (), moved=(("{module}.base_module.{leaf}", "{module}.{leaf}"),)).base("q.base_module.w")
        'q.w'
        """
        for pattern, name in self.moved:
            if found := _rename(path, pattern, name):
                return self.base(found[0])
        return path

    def flattened(self) -> Dialect:
        """Return the dialect with its layouts reversed, so that those that flatten come first."""
        return dataclasses.replace(
            self, pairs=tuple(dataclasses.replace(pair, layouts=pair.layouts[::-1]) for pair in self.pairs)
        )

    def paths(self, leaf: str) -> tuple[str, str, Pair] | None:
        """Return the paths of a base leaf's arrays and their pair, by the most specific pair; None without a match."""
        for pair in sorted(self.pairs, key=lambda pair: pair.leaf.count("{")):
            if found := _rename(leaf, pair.leaf, pair.a, pair.b):
                return found[0], found[1], pair
        return None


# ---------------------------------------------------------------- axes


def layouts(pair: Pair, weight: Weight, shares: bool) -> list[tuple[Dims, Dims]]:
    """Return the possible axes of the two arrays of a site, given its base weight.

    >>> w = Weight("{l}.o", "{l}.o.weight", "n h d -> d (n h)")
    >>> pair = Pair("{leaf}_a", "{leaf}_b", "{leaf}", (("in r", "r out"), ("(in) r", "r (out)")))
    >>> [a for a, _ in layouts(pair, w, False)]
    [(('n',), ('h',), ('~r',)), (('n', 'h'), ('~r',))]
    """
    batch, besides = set(weight.roles["batch"]), {RANK, *(weight.left[axis] for axis in weight.stack)}
    out: dict[tuple[Dims, Dims], None] = {}  # each once, in order
    for texts in pair.layouts:
        a, b = (_dims(text, weight) for text in texts)
        named = [{axis for dim in dims for axis in dim} - besides for dims in (a, b)]
        complete = shares or batch <= named[0] & named[1]
        sides = all(axes - batch == set(weight.roles[role]) for axes, role in zip(named, ("in", "out"), strict=True))
        if complete and sides and batch <= named[0] | named[1]:
            out[a, b] = None
    return list(out)


def _dims(text: str, weight: Weight) -> Dims:
    """Return the axes of an array by its layout, with those of stacked layers at their positions in the base weight."""
    own = [axis for number, axis in enumerate(weight.left) if number not in weight.stack]
    special = {"r": [RANK], "first": own[-2:-1], "last": own[-1:]}
    dims: list[tuple[str, ...]] = []
    for word in text.split():
        name = word.strip("()")
        named = {axis for role in _WORDS[name] for axis in weight.roles[role]}
        axes = special.get(name, [axis for axis in own if axis in named])
        dims += [tuple(axes)] if word.startswith("(") else [(axis,) for axis in axes]
    dims = [dim for dim in dims if dim]
    for axis in weight.stack:  # ascending
        dims.insert(axis, (weight.left[axis],))
    return tuple(dims)


# ---------------------------------------------------------------- table


_FILES = ("qwix", "flax", "gemma", "maxtext", "levanter", "lorax", "skyrl", "keras", "openpi")
"""The files of this package that define a `DIALECT`."""


def import_dialect(file: str) -> Dialect:
    """Return the dialect of a row of `_FILES`; raise `KeyMapError` if there is none."""
    try:
        return importlib.import_module(f"{__name__}.{file}").DIALECT
    except (ImportError, AttributeError) as error:
        raise KeyMapError(
            f"{file!r} of the dialects: expected a file {file}.py that defines DIALECT: {error}"
        ) from error


DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in map(import_dialect, _FILES)}


def get_dialect(name: str) -> Dialect:
    """Return a dialect by name: "qwix" for layers that call einsum, "qwix/flat" for layers that call dot_general."""
    base, _, change = name.partition("/")
    if base not in DIALECTS or change not in ("", "flat"):
        raise KeyMapError(
            f"there is no dialect {name!r}; known are {', '.join(sorted(DIALECTS))} (append /flat if the"
            " layers call dot_general, so that inputs and outputs are one axis each)"
        )
    return DIALECTS[base].flattened() if change else DIALECTS[base]


def dialect_of(library: str) -> Dialect | None:
    """Return the dialect that trains the models of a library (the part of a family's name before the colon).

    >>> dialect_of("gemma").name
    'gemma'
    """
    names = (
        dialect.name + change
        for dialect in DIALECTS.values()
        for change in ("", "/flat")
        if library + change in dialect.trains
    )
    return next(map(get_dialect, names), None)


def like_pattern() -> re.Pattern[str]:
    """Return the regular expression that finds the paths that look like those of LoRA leaves of any dialect.

    >>> paths = "q.kernel_lora_a", "q.lora.b", "q.LoraWeight.a", "q.lora_magnitude", "explorable.w"
    >>> [bool(like_pattern().search(path)) for path in paths]
    [True, True, True, True, False]
    """
    return re.compile("|".join({dialect.like: None for dialect in DIALECTS.values()}), re.IGNORECASE)


def may_be_scale(path: str) -> bool:
    """Return True if the number at a path may belong to LoRA leaves: a dialect stores one there, or its name says so.

    >>> may_be_scale("q.lora_scaling"), may_be_scale("q.kernel.lora_alpha"), may_be_scale("norm.scale")
    (True, True, False)
    """
    patterns = {pattern for dialect in DIALECTS.values() for pair in dialect.pairs for pattern in pair.stored}
    is_named = re.search("alpha|scal", path.rpartition(".")[2], re.IGNORECASE) and like_pattern().search(path)
    return bool(is_named) or any(_regex(pattern).fullmatch(path) for pattern in patterns)


def recognize_dialect(paths: Collection[str]) -> Dialect | None:
    """Return the dialect that claims every path that looks like a LoRA leaf; None if no dialect claims any.

    Raises `KeyMapError` listing the paths that no dialect claims, or if several dialects claim all of them.

    >>> recognize_dialect(["q.kernel", "q.kernel_lora_a", "q.kernel_lora_b"]).name
    'qwix'
    """
    paths = frozenset(paths)
    like = set(filter(like_pattern().search, paths))
    claimed = {dialect: mine for dialect in DIALECTS.values() if like and (mine := dialect.owned(paths))}
    if not claimed:
        return None
    fitting = [dialect for dialect, mine in claimed.items() if like <= mine]
    fitting = [dialect for dialect in fitting if dialect.named] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise KeyMapError(
            "the LoRA parameters of this tree are ambiguous: they match the dialects"
            f" {', '.join(dialect.name for dialect in fitting)}"
        )
    best = max(claimed, key=lambda dialect: len(claimed[dialect]))
    raise KeyMapError(
        f"{len(like)} parameters of this tree look like LoRA (those of {best.name}: {len(claimed[best])}), but no"
        " dialect matches these:\n"
        + bullets(sorted(like - claimed[best]))
        + f"\nKnown dialects are {', '.join(DIALECTS)}. Remove these parameters from the tree if they are not part of"
        " the adapter. If they hold its scale, remove them too, and pass the scale times the rank:"
        " jaxadapt.models.LoraTree(tree, lora_alpha=…)"
    )
