"""How another library names and shapes its LoRA leaves: one `Pair` line a kind of site.

A line says where the two arrays of a site lie, which base leaf they belong to, and which of the base weight's
axes each array has. What those axes are called in PyTorch is the family's business (`keymap.py`): so a dialect
and a family compose, without a table for each pair of them.

Pure: strings and shapes only.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping, Sequence

from jaxadapt.core.errors import KeyMapError
from jaxadapt.keymaps.weight import Weight

RANK = "~r"
"""The rank's axis. (Marked as `plan` marks a method's own axes: a base weight may have an axis "r" as well.)"""

_HOLES = {"module": r"(?:(?P<module>.+)\.)?", "leaf": r"(?P<leaf>.+)", "name": r"(?P<name>[^\W\d][^.]*)"}
_LIKE = re.compile(r"(^|[._])lora([._]|$)|\.LoraWeight\.[ab]$", re.IGNORECASE)

Dims = tuple[tuple[str, ...], ...]
"""The axes of one array, each a group of base axes that the dialect keeps flattened into one."""


def is_like(path: str) -> bool:
    """Whether a path looks like a LoRA leaf's, so that no dialect may pass it over.

    >>> [is_like(p) for p in ("q.kernel_lora_a", "q.lora.b", "q.lora_magnitude", "explorable.w")]
    [True, True, True, False]
    """
    return _LIKE.search(path) is not None


@functools.cache
def _regex(pattern: str) -> re.Pattern[str]:
    """`{module}.` stands for any path, or none; `{leaf}` for any path; `{name}` for one segment, no number."""
    pieces = re.split(r"(\{module\}\.|\{leaf\}|\{name\})", pattern)
    return re.compile("".join(_HOLES[p.strip("{}.")] if p.startswith("{") else re.escape(p) for p in pieces))


def _fill(pattern: str, holes: Mapping[str, str | None]) -> str:
    filled = pattern.format(**{name: text or "" for name, text in holes.items()})
    return filled.removeprefix(".")


@dataclasses.dataclass(frozen=True)
class Pair:
    """One line: a site's two arrays and the base leaf they adapt.

    Args:
        a, b: paths of the input side (…, r) and the output side (r, …).
        leaf: the base leaf, as a family's table calls it.
        layouts: what the two may look like, told apart by their shapes. A layout is words with spaces: "r"; "in",
            "out", "batch" (the base weight's axes of that role, in the leaf's own order), "ins" and "outs" (the same
            with the batch axes among them), "first" and "last" (its last two axes, whatever their role). A word in
            parentheses stands for its axes flattened into one. Stacked layers keep the position they have in the
            base weight.

    >>> Pair("{leaf}_lora_a", "{leaf}_lora_b", "{leaf}").match("q.kernel_lora_a")
    ('q.kernel_lora_b', 'q.kernel')
    """

    a: str
    b: str
    leaf: str
    layouts: tuple[tuple[str, str], ...] = (("in r", "r out"),)

    def match(self, path: str) -> tuple[str, str] | None:
        """Of a path that is this line's `a`: the path of its `b`, and the base leaf."""
        found = _regex(self.a).fullmatch(path)
        return found and (_fill(self.b, found.groupdict()), _fill(self.leaf, found.groupdict()))

    def paths(self, leaf: str) -> tuple[str, str] | None:
        """The paths of `a` and `b` at a base leaf, None if this line is not for it."""
        found = _regex(self.leaf).fullmatch(leaf)
        return found and (_fill(self.a, found.groupdict()), _fill(self.b, found.groupdict()))


@dataclasses.dataclass(frozen=True)
class Dialect:
    """A table of `Pair` lines, and what the library says, or leaves out, of the scale.

    Args:
        name: what messages call it.
        pairs: the lines; of several that fit a path the first counts.
        unscaled: it computes W·x + B·A·x: lora_alpha equals the rank, and there is nothing to ask.
        scale: what it calls its alpha, for the message that asks for it.
        shares: braced axes (fused parts, experts) may be missing from one of the arrays, which all share.
        moved: base leaves that lie elsewhere in its trees: `(where, the family's name)`.
        slots: what lies beside `a` where the arrays hold several adapters, on an axis before the weight's own: the
            rank that each slot uses, and its scale.
        heads: B has the weight's last axis alone, and A the others: what heads have in common is in B (`heads.py`).
        proved: against the library itself, or trees recorded from it.

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
    per_head: bool = False
    proved: bool = True

    def claim(self, paths: Collection[str]) -> dict[str, list[tuple[str, str, int]]]:
        """`{base leaf: [(path of a, path of b, line)]}` of the arrays that lie where this dialect has them."""
        out: dict[str, list[tuple[str, str, int]]] = {}
        for path in paths:
            for number, pair in enumerate(self.pairs):
                found = pair.match(path)
                if found and found[0] in paths:
                    out.setdefault(found[1], []).append((path, found[0], number))
                    break
        return out

    def owned(self, paths: Collection[str]) -> set[str]:
        """The paths of all arrays that are this dialect's."""
        pairs = [pair for pairs in self.claim(paths).values() for pair in pairs]
        return {path for a, b, _ in pairs for path in (a, b, *(p for p in self.slot_paths(a) if p in paths))}

    def slot_paths(self, a: str) -> tuple[str, ...]:
        """Where the ranks and scales of the slots of an A lie; nowhere, without slots."""
        return tuple(a.rpartition(".")[0] + "." + name for name in self.slots or ())

    def base(self, path: str) -> str:
        """A base leaf's path under the family's own name.

        >>> Dialect("d", (), moved=(("{module}.base_module.{leaf}", "{module}.{leaf}"),)).base("q.base_module.w")
        'q.w'
        """
        for where, name in self.moved:
            found = _regex(where).fullmatch(path)
            if found:
                return self.base(_fill(name, found.groupdict()))
        return path

    def flattened(self) -> Dialect:
        """The same with its layouts the other way round: those that flatten come first."""
        pairs = tuple(dataclasses.replace(pair, layouts=pair.layouts[::-1]) for pair in self.pairs)
        return dataclasses.replace(self, pairs=pairs)

    def paths(self, leaf: str) -> tuple[str, str, Pair] | None:
        """Where the arrays of a base leaf would lie, by the line that says most of it."""
        for pair in sorted(self.pairs, key=lambda pair: pair.leaf.count("{")):
            found = pair.paths(leaf)
            if found:
                return (*found, pair)
        return None


def layouts(pair: Pair, weight: Weight, shares: bool) -> list[tuple[Dims, Dims]]:
    """What the two arrays of a site may look like beside a base weight.

    >>> w = Weight("{l}.o", "{l}.o.weight", "n h d -> d (n h)")
    >>> pair = Pair("{leaf}_a", "{leaf}_b", "{leaf}", (("in r", "r out"), ("(in) r", "r (out)")))
    >>> [a for a, _ in layouts(pair, w, False)]
    [(('n',), ('h',), ('~r',)), (('n', 'h'), ('~r',))]
    """
    roles = {role: set(weight.roles[role]) for role in ("in", "out", "batch")}
    stack = list(weight.stack)
    own = [n for i, n in enumerate(weight.left) if i not in stack]
    out: list[tuple[Dims, Dims]] = []
    for texts in pair.layouts:
        halves: list[Dims] = []
        for text, role in zip(texts, ("in", "out"), strict=True):
            dims = _dims(text, own, roles)
            named = {n for dim in dims for n in dim} - {RANK}
            batch = named & roles["batch"]
            if named - batch == roles[role] and (batch == roles["batch"] or shares):
                for axis in stack:  # ascending, so each lands at the base weight's own position
                    dims.insert(axis, (weight.left[axis],))
                halves.append(tuple(dims))
        if len(halves) == 2:
            held = {n for half in halves for dim in half for n in dim}
            if roles["batch"] <= held and (halves[0], halves[1]) not in out:
                out.append((halves[0], halves[1]))
    return out


def _dims(text: str, own: Sequence[str], roles: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    inputs, out, batch = roles["in"], roles["out"], roles["batch"]
    words = {
        "r": [RANK],
        "in": [n for n in own if n in inputs],
        "ins": [n for n in own if n in inputs | batch],
        "out": [n for n in own if n in out],
        "outs": [n for n in own if n in out | batch],
        "batch": [n for n in own if n in batch],
        "first": own[-2:-1],
        "last": own[-1:],
    }
    dims: list[tuple[str, ...]] = []
    for word in text.split():
        axes = words.get(word.strip("()"))
        if axes is None:
            raise KeyMapError(f"the layout {text!r} has the word {word!r}; known are {', '.join(words)}")
        dims += [tuple(axes)] if word.startswith("(") else [(n,) for n in axes]
    return [dim for dim in dims if dim]
