"""The table that ties the leaves of a JAX model to PyTorch's names, and what follows from it.

One `Weight` line a base weight: where it lies in the JAX tree, what PyTorch calls it, and an einops-style
pattern whose right side is PyTorch's layout. PyTorch stores (out, in), so the pattern alone tells which
axes are inputs, outputs, stacked layers or fused parts; the keys, shapes and transposes of *every*
method's tensors follow. A `KeyMap` is such a table for one model family. `plan.py` applies it to shapes.

Pure: strings and shapes only; no arrays, no files, no devices.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxadapt import paths
from jaxadapt.axes import Axes
from jaxadapt.errors import KeyMapError

PEFT_PREFIX = "base_model.model."
_TOKEN = re.compile(r"\(([^()]*)\)|(\{?\w+\}?)")
_HOLE = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True, init=False)
class Weight:
    """One line of a table: a base weight's place in the JAX tree, its PyTorch name, and the layouts.

    Args:
        leaf: dotted path in the JAX tree. `{l}` stands for digits, `{path}` for any path.
        key: the PyTorch parameter name; its holes are filled from `leaf`, `pattern` and `over`.
        pattern: `"d {l} n h -> (n h) d"`: the JAX axes, then PyTorch's. A name in braces is an axis that
            PyTorch does not have: one tensor an entry, numbered (`{l}`: stacked layers) or named by `over`.
        kind: "linear" (out, in), "embedding" (vocabulary, dim), "vector" or "other"; by default what the
            number of PyTorch axes says.
        fan_in_fan_out: PyTorch stores (in, out), as GPT-2's Conv1D does.
        over: names of a braced axis' entries, `p=("k", "v")` for a leaf that holds both.

    Raises `KeyMapError` if the line contradicts itself.

    >>> w = Weight("layer_{l}.attn.kv.w", "h.{l}.{p}_proj.weight", "{p} n d h -> (n h) d", p=("k", "v"))
    >>> w.left, w.right
    (('{p}', 'n', 'd', 'h'), (('n', 'h'), ('d',)))
    """

    leaf: str
    key: str
    pattern: str
    kind: str
    fan_in_fan_out: bool
    over: tuple[tuple[str, tuple[str, ...]], ...]

    def __init__(
        self,
        leaf: str,
        key: str,
        pattern: str,
        *,
        kind: str | None = None,
        fan_in_fan_out: bool = False,
        **over: Sequence[str],
    ) -> None:
        put = functools.partial(object.__setattr__, self)
        put("leaf", leaf)
        put("key", key)
        put("pattern", pattern)
        put("fan_in_fan_out", fan_in_fan_out)
        put("over", tuple(sorted((name, tuple(values)) for name, values in over.items())))
        problems = self._problems()
        if problems:
            raise KeyMapError(
                f"the line {leaf!r} -> {key!r} ({pattern!r}) is wrong:\n" + paths.listing(problems)
            )
        put("kind", kind or {1: "vector", 2: "linear"}.get(len(self.right), "other"))

    def _problems(self) -> list[str]:
        if self.pattern.count("->") != 1:
            return ["a pattern has one '->': JAX axes on the left, PyTorch's on the right"]
        left, flat = list(self.left), [name for group in self.right for name in group]
        rest = re.sub(_TOKEN, "", self.pattern.replace("->", " "))
        problems = [f"{rest.strip()!r} is no axis name"] if rest.strip() else []
        problems += [
            f"axis {n!r} is on the {side} twice"
            for side, names in (("left", left), ("right", flat))
            for n in sorted({n for n in names if names.count(n) > 1})
        ]
        plain = {n for n in left if not n.startswith("{")}
        problems += [
            f"axis {n!r} is only on the left (braces mark axes PyTorch lacks)"
            for n in sorted(plain - set(flat))
        ]
        problems += [f"axis {n!r} is only on the right" for n in sorted(set(flat) - plain)]
        braced = {n.strip("{}") for n in left if n.startswith("{")}
        holes = set(_HOLE.findall(self.leaf))
        problems += [
            f"hole {{{h}}} of the key is filled by nothing"
            for h in _HOLE.findall(self.key)
            if h not in holes | braced
        ]
        problems += [f"{{{n}}} is both a hole of the leaf and an axis" for n in sorted(holes & braced)]
        problems += [
            f"{text!r} has a brace that belongs to no hole"
            for text in (self.leaf, self.key)
            if set("{}") & set(_HOLE.sub("", text))
        ]
        problems += [
            f"{n!r} names no entry, or one twice: {list(names)}"
            for n, names in self.over
            if not names or len(set(names)) < len(names)
        ]
        problems += [
            f"{n!r} has names but is no braced axis of the pattern" for n, _ in self.over if n not in braced
        ]
        problems += [
            f"axis {{{n}}} must appear in the key, else its entries share one name"
            for n in sorted(braced - set(_HOLE.findall(self.key)))
        ]
        return problems

    @functools.cached_property
    def left(self) -> tuple[str, ...]:
        """Axis names of the JAX leaf; braced ones keep their braces."""
        return tuple(m.group(2) for m in _TOKEN.finditer(self.pattern.split("->")[0]))

    @functools.cached_property
    def right(self) -> tuple[tuple[str, ...], ...]:
        """PyTorch's axes, each a group of axis names flattened together."""
        found = _TOKEN.finditer(self.pattern.split("->")[1])
        return tuple(tuple((m.group(1) if m.group(1) is not None else m.group(2)).split()) for m in found)

    @functools.cached_property
    def regex(self) -> re.Pattern[str]:
        """What a path must match in full to be this line's leaf; a hole used twice holds the same text."""
        seen: set[str] = set()

        def piece(text: str) -> str:
            if not text.startswith("{"):
                return re.escape(text)
            name = text[1:-1]
            if name in seen:
                return f"(?P={name})"
            seen.add(name)
            return rf"(?P<{name}>.+)" if name == "path" else rf"(?P<{name}>\d+)"

        return re.compile("".join(map(piece, re.split(r"(\{\w+\})", self.leaf))))

    @functools.cached_property
    def tail(self) -> str:
        """What every path of this line ends in: the text behind the last hole."""
        return self.leaf.rpartition("}")[2]

    @functools.cached_property
    def layouts(self) -> dict[Tensor, Any]:
        """A memo for `plan`: the axis names of a method's tensors at this line."""
        return {}

    @functools.cached_property
    def stack(self) -> tuple[int, ...]:
        """Positions of the stacked (numbered) axes in the leaf."""
        return tuple(i for i, n in enumerate(self.left) if n.startswith("{") and self.names(n) is None)

    @functools.cached_property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """Axis names by role: "stack", "batch", "inn", "out"."""
        groups = self.right
        out, inn = (groups[0], groups[1]) if len(groups) == 2 else (groups[0] if groups else (), ())
        if self.fan_in_fan_out or self.kind == "embedding":
            out, inn = inn, out
        return {
            "stack": tuple(self.left[i] for i in self.stack),
            "batch": tuple(n for n in self.left if n.startswith("{") and self.names(n) is not None),
            "inn": inn,
            "out": out,
        }

    @functools.cached_property
    def axes(self) -> Axes:
        """The roles as the module itself sees its weight: without the stacked axes."""
        own = [n for i, n in enumerate(self.left) if i not in self.stack]
        at = {role: tuple(own.index(n) for n in self.roles[role]) for role in ("inn", "out", "batch")}
        return Axes(inn=at["inn"], out=at["out"], batch=at["batch"])

    def names(self, axis: str) -> tuple[str, ...] | None:
        """The names of a braced axis' entries, or None where they are numbered."""
        return dict(self.over).get(axis.strip("{}"))

    def scanned(self, axis: int) -> Weight:
        """This line for layers stacked on `axis`: `{l}` leaves the path and becomes an axis.

        A negative axis counts from the end of the stacked leaf; where a leaf has fewer axes than that, its
        layers are stacked on the last.

        >>> Weight("layers.{l}.q.kernel", "layers.{l}.q.weight", "i o -> o i").scanned(1).pattern
        'i {l} o -> o i'
        """
        if "{l}" not in self.leaf.split("."):
            return self
        leaf = ".".join(p for p in self.leaf.split(".") if p != "{l}")
        left = list(self.left)
        left.insert(axis if axis >= 0 else max(0, len(left) + 1 + axis), "{l}")
        pattern = " ".join(left) + " ->" + self.pattern.split("->")[1]
        over: Any = dict(self.over)
        return Weight(leaf, self.key, pattern, kind=self.kind, fan_in_fan_out=self.fan_in_fan_out, **over)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a method stores for one site: its name, its PEFT key suffix and its two layouts.

    `axes` (in the model) and `torch` (in the file) name roles of the base weight's axes, "batch", "inn",
    "out", or axes of the method's own with their sizes in `own`. An empty torch group is a size-1 axis.
    """

    name: str
    suffix: str
    axes: tuple[str, ...]
    torch: tuple[tuple[str, ...], ...]
    own: tuple[tuple[str, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Site:
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
        """Axis names by role: "stack", "batch", "inn", "out"."""
        return self.weight.roles

    @property
    def axes(self) -> Axes:
        """The roles as the module itself sees its weight, with the targeted parts."""
        axes = self.weight.axes
        return axes if self.parts is None else dataclasses.replace(axes, parts=self.parts)

    def module(self, index: Mapping[str, str]) -> str:
        """The PyTorch module name of one entry of the braced axes, given as `{axis: text}`."""
        name = self.weight.key.format(**dict(self.holes), **index)
        return name.removesuffix("weight").removesuffix(".")

    def modules(self, sizes: Mapping[str, int]) -> dict[tuple[int, ...], str]:
        """PyTorch module names by index over (stacked axes..., fused axis)."""
        return {index: self.module(text) for index, text in entries(self.weight, self.braced, sizes)}

    @property
    def braced(self) -> tuple[str, ...]:
        return self.roles["stack"] + self.roles["batch"]


def entries(
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
            ((*index, i), {**text, axis.strip("{}"): names[i] if names is not None else str(i)})
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

    >>> table = KeyMap("tiny", (Weight("{path}.kernel", "{path}.weight", "i o -> o i"),))
    >>> table.site("a.b.kernel").module({})
    'a.b'
    """

    name: str
    weights: tuple[Weight, ...]
    output: str | None = None
    prefix: str = PEFT_PREFIX

    @functools.cached_property
    def _identity(self) -> tuple[Any, ...]:
        return (self.name, self.weights, self.output, self.prefix)

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._identity)

    def __hash__(self) -> int:
        return self._hash  # cached: it is part of jit's cache key, leaf by leaf

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, KeyMap) and self._identity == other._identity)

    def site(self, leaf: str) -> Site | None:
        """The site of a leaf, None if no line matches; several matching lines raise `KeyMapError`."""
        literal = self._literal.get(leaf)
        if literal is not None:
            return Site(leaf, literal)
        hits = [
            (w, m) for w in self._templates if leaf.endswith(w.tail) and (m := w.regex.fullmatch(leaf))
        ]
        if len(hits) > 1:
            raise KeyMapError(
                f"leaf {leaf!r} matches {len(hits)} lines of the table {self.name!r}:\n"
                + paths.listing(w.leaf for w, _ in hits)
            )
        return Site(leaf, hits[0][0], tuple(sorted(hits[0][1].groupdict().items()))) if hits else None

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
        return dataclasses.replace(
            self, name=f"{self.name}/scan{axis}", weights=tuple(w.scanned(axis) for w in self.weights)
        )

    def with_lines(self, lines: Iterable[Weight]) -> KeyMap:
        """The same table with further literal lines, which win over its templates."""
        lines = tuple(lines)
        mine = {w.leaf for w in lines}
        kept = tuple(w for w in self.weights if w.leaf not in mine)
        return dataclasses.replace(self, weights=lines + kept) if lines else self

    def covers(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How many of a model's leaves the table accounts for; 0 if a leaf of its name has another layout.

        All stacked axes must agree in size, which tells layers stacked on axis 0 from those on axis 1.
        """
        sizes: dict[str, set[int]] = {}
        count = linear = 0
        for leaf, shape in shapes.items():
            site = self.site(leaf)
            if site is None:
                continue
            if len(site.weight.left) != len(shape):
                return 0
            count += 1
            linear += site.weight.kind == "linear"
            for name, size in zip(site.weight.left, shape, strict=True):
                names = site.weight.names(name)
                if names is not None and len(names) != size:
                    return 0
                if name.startswith("{") and names is None:
                    sizes.setdefault(name, set()).add(size)
        return count if linear and all(len(s) == 1 for s in sizes.values()) else 0


GENERIC = KeyMap(
    "generic",
    tuple(Weight(f"{at}kernel", f"{at}weight", "i o -> o i") for at in ("", "{path}.")),
)
"""The map for models no table knows: 2-D leaves called `kernel`, Flax's own (in, out); names are the JAX paths."""


PLAIN = ("kernel", "w", "weight", "embedding")
"""What a module's only weight is usually called: it goes by its module's name, any other by its own."""


def module_of(leaf: str) -> str:
    """What a leaf that no table names is called as a module: its path, less a last segment that every layer has.

    >>> module_of("blk.q.kernel"), module_of("mlp.gating_einsum")
    ('blk.q', 'mlp.gating_einsum')
    """
    head, _, last = leaf.rpartition(".")
    return head if last in ("kernel", "w", "weight", "embedding") else leaf


def line_for(leaf: str, shape: Sequence[int], axes: Axes, stack: Sequence[int] = ()) -> Weight:
    """A literal line for a leaf whose roles come from its class or a trace, not from a table.

    The PyTorch name is the JAX path; numbered axes (stacked layers, batch) put their index before the
    last module name, so that suffix matching still sees it.

    >>> line_for("blk.q.kernel", (3, 8, 2, 4), Axes((0,), (1, 2)), stack=(0,)).pattern
    '{s0} i0 o0 o1 -> (o0 o1) (i0)'
    """
    ndim = len(shape)
    own = [i for i in range(ndim) if i not in stack]
    names: dict[int, str] = {axis: f"{{s{n}}}" for n, axis in enumerate(stack)}
    for role, letter in (("inn", "i"), ("out", "o")):
        names |= {own[a]: f"{letter}{n}" for n, a in enumerate(getattr(axes, role))}
    names |= {own[a]: f"{{b{n}}}" for n, a in enumerate(axes.batch)}
    *head, last = leaf.split(".")
    module = [*head] if last in PLAIN else [*head, last]
    numbered = [names[i] for i in sorted(names) if names[i].startswith("{")]
    key = ".".join([*module[:-1], *numbered, *module[-1:], "weight"])
    left = " ".join(names[i] for i in range(ndim))
    out, inn = (" ".join(names[own[a]] for a in role) for role in (axes.out, axes.inn))
    over: Any = {f"b{n}": [str(i) for i in range(shape[own[a]])] for n, a in enumerate(axes.batch)}
    return Weight(leaf, key, f"{left} -> ({out}) ({inn})", kind="linear", **over)
