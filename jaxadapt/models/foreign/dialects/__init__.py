"""The dialects, one file for each library that trains LoRA: the names and shapes of its LoRA leaves.

A dialect has a `Pair` for each kind of site: the paths of the two arrays of a site, their base leaf, and the axes of the
base weight in each array. The family's keymap gives PyTorch's names of those axes. So dialects and families combine
freely. A new dialect is a file that defines `DIALECT`, and a row of `_FILES`.

Uses only strings and shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from collections.abc import Collection, Mapping, Sequence

from jaxadapt.core.errors import KeyMapError
from jaxadapt.core.paths import bullets
from jaxadapt.keymaps.weight import Weight

RANK = "~r"
"""The name of the rank's axis. "~" marks a method's own axes, as in `plan`: a base weight may have an axis "r"."""

_HOLES = {"module": r"(?:(?P<module>.+)\.)?", "leaf": r"(?P<leaf>.+)", "name": r"(?P<name>[^\W\d][^.]*)"}
_LIKE = re.compile(r"(^|[._])lora([._]|$)|\.LoraWeight\.[ab]$", re.IGNORECASE)

Dims = tuple[tuple[str, ...], ...]
"""The axes of one array, each a group of base axes that the dialect flattens into one."""


def is_like(path: str) -> bool:
    """Return True if a path looks like that of a LoRA leaf.

    A dialect must claim every such path of a tree.

    >>> [is_like(p) for p in ("q.kernel_lora_a", "q.lora.b", "q.lora_magnitude", "explorable.w")]
    [True, True, True, False]
    """
    return _LIKE.search(path) is not None


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    """Compile a pattern; `{module}.` is a path or none, `{leaf}` any path, `{name}` a segment that is not a number."""
    pieces = re.split(r"(\{module\}\.|\{leaf\}|\{name\})", pattern)
    return re.compile("".join(_HOLES[p.strip("{}.")] if p.startswith("{") else re.escape(p) for p in pieces))


def _fill(pattern: str, holes: Mapping[str, str | None]) -> str:
    filled = pattern.format(**{name: text or "" for name, text in holes.items()})
    return filled.removeprefix(".")


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

    >>> Pair("{leaf}_lora_a", "{leaf}_lora_b", "{leaf}").match("q.kernel_lora_a")
    ('q.kernel_lora_b', 'q.kernel')
    """

    a: str
    b: str
    leaf: str
    layouts: tuple[tuple[str, str], ...] = (("in r", "r out"),)
    unscaled: bool = False

    def match(self, path: str) -> tuple[str, str] | None:
        """Return the path of `b` and the base leaf, if `path` matches `a`; else None."""
        holes = _regex(self.a).fullmatch(path)
        return holes and (_fill(self.b, holes.groupdict()), _fill(self.leaf, holes.groupdict()))

    def paths(self, leaf: str) -> tuple[str, str] | None:
        """Return the paths of `a` and `b` of a base leaf; None if the leaf does not match."""
        holes = _regex(self.leaf).fullmatch(leaf)
        return holes and (_fill(self.a, holes.groupdict()), _fill(self.b, holes.groupdict()))


@dataclasses.dataclass(frozen=True)
class Dialect:
    """The convention of a library for its LoRA leaves: a table of `Pair`s, and how it stores the scale.

    Args:
        name: its name in messages.
        pairs: the pairs; the first one that matches a path is used.
        unscaled: True if the library computes W·x + B·A·x, so that lora_alpha equals the rank.
        scale: the library's name of alpha, for the error that asks for it.
        shares: True if one of the arrays may lack braced axes (fused parts, experts), which then share it.
        moved: base leaves with another path in its trees, `(pattern, the family's path)`.
        slots: names of two arrays beside `a`, if the arrays hold several adapters on a leading axis: the rank that
            each slot uses, and its scale.
        heads: "shared": B is shared by all heads (r, last axis), A has one matrix per head. "own": both have one per
            head. See `forms.py`. "" otherwise.
        named: True if its paths name the modules of one library's models, so that it is chosen before dialects whose
            paths have any module.
        trains: the libraries whose models it trains; "maxtext/flat" if the layers call dot_general there.
        proved: True if tested against the library, or against trees recorded from it.

    >>> Dialect("d", (Pair("{leaf}_a", "{leaf}_b", "{leaf}"),)).claim({"q.w_a", "q.w_b", "q.w"})
    {'q.w': [('q.w_a', 'q.w_b', 0)]}
    """

    name: str
    pairs: tuple[Pair, ...]
    unscaled: bool = False
    scale: str = "alpha"
    shares: bool = False
    moved: tuple[tuple[str, str], ...] = ()
    slots: tuple[str, str] | None = None
    heads: str = ""
    named: bool = False
    trains: tuple[str, ...] = ()
    proved: bool = True

    def claim(self, paths: Collection[str]) -> dict[str, list[tuple[str, str, int]]]:
        """Return `{base leaf: [(path of a, path of b, number of the pair)]}` of the arrays of this dialect."""
        out: dict[str, list[tuple[str, str, int]]] = {}
        for path in paths:
            for number, pair in enumerate(self.pairs):
                partner, leaf = pair.match(path) or (None, "")
                if partner is not None and partner in paths:
                    out.setdefault(leaf, []).append((path, partner, number))
                    break
        return out

    def owned(self, paths: Collection[str]) -> set[str]:
        """Return the paths of all arrays of this dialect; none if it has slots and no path is that of a slot's rank.

        (An adapter of jaxadapt without its configuration has the other paths of SkyRL-tx.)
        """
        if self.slots and not any(path.endswith(self.slots) for path in paths):
            return set()
        pairs = [pair for pairs in self.claim(paths).values() for pair in pairs]
        return {path for a, b, _ in pairs for path in (a, b, *(p for p in self.slot_paths(a) if p in paths))}

    def slot_paths(self, a: str) -> tuple[str, ...]:
        """Return the paths of the ranks and scales of the slots of an A; () without slots."""
        return tuple(a.rpartition(".")[0] + "." + name for name in self.slots or ())

    def base(self, path: str) -> str:
        """Return the family's path of a base leaf.

        >>> Dialect("d", (), moved=(("{module}.base_module.{leaf}", "{module}.{leaf}"),)).base("q.base_module.w")
        'q.w'
        """
        for pattern, name in self.moved:
            holes = _regex(pattern).fullmatch(path)
            if holes:
                return self.base(_fill(name, holes.groupdict()))
        return path

    def flattened(self) -> Dialect:
        """Return the dialect with its layouts reversed, so that those that flatten come first."""
        reverse = (dataclasses.replace(pair, layouts=pair.layouts[::-1]) for pair in self.pairs)
        return dataclasses.replace(self, pairs=tuple(reverse))

    def paths(self, leaf: str) -> tuple[str, str, Pair] | None:
        """Return the paths of a base leaf's arrays and their pair, by the most specific pair; None without a match."""
        for pair in sorted(self.pairs, key=lambda pair: pair.leaf.count("{")):
            lora_paths = pair.paths(leaf)
            if lora_paths:
                return (*lora_paths, pair)
        return None


def layouts(pair: Pair, weight: Weight, shares: bool) -> list[tuple[Dims, Dims]]:
    """Return the possible axes of the two arrays of a site, given its base weight.

    >>> w = Weight("{l}.o", "{l}.o.weight", "n h d -> d (n h)")
    >>> pair = Pair("{leaf}_a", "{leaf}_b", "{leaf}", (("in r", "r out"), ("(in) r", "r (out)")))
    >>> [a for a, _ in layouts(pair, w, False)]
    [(('n',), ('h',), ('~r',)), (('n', 'h'), ('~r',))]
    """
    batch = set(weight.roles["batch"])
    out: dict[tuple[Dims, Dims], None] = {}  # each once, in order
    for texts in pair.layouts:
        a, b = (_dims(text, weight) for text in texts)
        named = [{axis for dim in dims for axis in dim} - {RANK} for dims in (a, b)]
        complete = shares or batch <= named[0] & named[1]
        sides = all(axes - batch == set(weight.roles[role]) for axes, role in zip(named, ("in", "out"), strict=True))
        if complete and sides and batch <= named[0] | named[1]:
            out[_with_stack(a, weight), _with_stack(b, weight)] = None
    return list(out)


def _with_stack(dims: Sequence[tuple[str, ...]], weight: Weight) -> Dims:
    """Return axes with those of stacked layers at their positions in the base weight."""
    out = list(dims)
    for axis in weight.stack:  # ascending
        out.insert(axis, (weight.left[axis],))
    return tuple(out)


def _dims(text: str, weight: Weight) -> list[tuple[str, ...]]:
    own = [axis for number, axis in enumerate(weight.left) if number not in weight.stack]

    def of(*roles: str) -> list[str]:
        return [axis for axis in own if any(axis in weight.roles[role] for role in roles)]

    words = {
        "r": [RANK],
        "in": of("in"),
        "ins": of("in", "batch"),
        "out": of("out"),
        "outs": of("out", "batch"),
        "batch": of("batch"),
        "first": own[-2:-1],
        "last": own[-1:],
    }
    dims: list[tuple[str, ...]] = []
    for word in text.split():
        axes = words.get(word.strip("()"))
        if axes is None:
            raise KeyMapError(f"the layout {text!r} has the unknown word {word!r}; known are {', '.join(words)}")
        dims += [tuple(axes)] if word.startswith("(") else [(n,) for n in axes]
    return [dim for dim in dims if dim]


# ---------------------------------------------------------------- table


_FILES = ("qwix", "flax", "gemma", "maxtext", "levanter", "lorax", "skyrl", "keras", "openpi")
"""The files of this package that define a `DIALECT`."""
DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect for dialect in (importlib.import_module(f"{__name__}.{file}").DIALECT for file in _FILES)
}


def get_dialect(name: str) -> Dialect:
    """Return a dialect by name: "qwix" for layers that call einsum, "qwix/flat" for layers that call dot_general."""
    base, _, change = name.partition("/")
    if base not in DIALECTS or change not in ("", "flat"):
        raise KeyMapError(
            f"no dialect is called {name!r}; known are {', '.join(sorted(DIALECTS))} (append /flat if the"
            " layers call dot_general, so that inputs and outputs are one axis each)"
        )
    return DIALECTS[base].flattened() if change else DIALECTS[base]


def dialect_of(library: str) -> Dialect | None:
    """Return the dialect that trains the models of a library (the part of a family's name before the colon).

    >>> dialect_of("gemma").name
    'gemma'
    """
    for dialect in DIALECTS.values():
        if library in dialect.trains:
            return dialect
        if f"{library}/flat" in dialect.trains:
            return dialect.flattened()
    return None


def recognize_dialect(paths: Collection[str]) -> Dialect | None:
    """Return the dialect that claims every path that looks like a LoRA leaf; None if no path does.

    Raises `KeyMapError` listing the paths that no dialect claims, or if several dialects claim all of them.

    >>> recognize_dialect(["q.kernel", "q.kernel_lora_a", "q.kernel_lora_b"]).name
    'qwix'
    """
    paths = frozenset(paths)
    like = {p for p in paths if is_like(p)}
    claimed = {d: d.owned(paths) for d in DIALECTS.values()}
    if not like:
        return None
    fitting = [d for d, mine in claimed.items() if mine and like <= mine]
    fitting = [d for d in fitting if d.named] or fitting
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise KeyMapError(
            "the LoRA leaves of this tree are ambiguous: they match the dialects"
            f" {', '.join(dialect.name for dialect in fitting)}"
        )
    best = max(claimed, key=lambda d: len(claimed[d]))
    known = f" (those of {best.name}: {len(claimed[best])})" if claimed[best] else ""
    raise KeyMapError(
        f"{len(like)} leaves of this tree look like LoRA leaves{known}, but no dialect matches these:\n"
        + bullets(sorted(like - claimed[best]))
        + f"\nKnown dialects are {', '.join(DIALECTS)}. Remove these leaves from the tree if they are not part of the"
        " adapter"
    )
