"""One line of a table: where a base weight lies in the JAX tree, what PyTorch calls it, and both layouts.

PyTorch stores (out, in), so the pattern alone tells which axes are inputs, outputs, stacked layers or
fused parts; the keys, shapes and transposes of *every* method's tensors follow. `keymap.py` makes tables of
lines. Pure: strings only; no arrays, no files, no devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxadapt.arrays.axes import Axes
from jaxadapt.arrays.pattern import axis_parts, parse_pattern, part_sizes
from jaxadapt.core import paths
from jaxadapt.core.errors import KeyMapError

_HOLE = re.compile(r"\{(\w+)\}")
_PIECE = re.compile(r"\[(?:(?P<axis>\w+) )?(?P<part>\d+(?:/|::)\d+)\]$")

EXPERTS = "{e}"
"""A numbered axis that the layer itself sees, and contracts entry by entry; other numbered axes stack whole layers."""


@dataclasses.dataclass(frozen=True, init=False)
class Weight:
    """One line of a table: a base weight's place in the JAX tree, its PyTorch name, and the layouts.

    Args:
        leaf: dotted path in the JAX tree. `{l}` stands for digits, `{path}` for any path.
        key: the PyTorch parameter name; its holes are filled from `leaf`, `pattern` and `over`. Where PyTorch keeps
            several leaves in one tensor, "[0/3]" behind it is the first third of its rows, "[f 0/2]" the first half of
            its axis f, and "[f 0::2]" every second entry there, from the first.
        pattern: `"d {l} n h -> (n h) d"`: the JAX axes, then PyTorch's. A name in braces is an axis that
            PyTorch does not have: one tensor an entry, numbered (`{l}`: stacked layers) or named by `over`.
        kind: "linear" (out, in), "embedding" (vocabulary, dim), "conv" (out, in, window...), "attention" (see
            `attention`), "vector" or "other"; by default what the number of PyTorch axes says. "parameter" (out, in)
            and "experts" (expert, out, in) are no Linear's weights in PyTorch: target_parameters names them.
        fan_in_fan_out: PyTorch stores (in, out), as GPT-2's Conv1D does; for experts what its `is_transposed` says.
        groups: of a convolution.
        scale: `(axes, power)`: the JAX weight is PyTorch's times their size to that power. `("h", -0.5)` is a
            query that holds its 1/√head_dim already.
        shift: what is added to PyTorch's weight to give the JAX one: 1 for a norm whose scale is 1 + w there.
        layers: `(step, first)`: number l of `{l}` here is PyTorch's layer step · l + first. (2, 1) where a layer here
            is two there, and this the second.
        scan: the axis on which layers of this leaf are stacked, if they are, whatever that of the others is.
        over: names of a braced axis' entries, `p=("k", "v")` for a leaf that holds both; or, as a number, the size
            of an axis in parentheses on the left. `"d n (c p) -> (n p c) d", p=2` undoes an interleaving: the
            leaf's last axis holds pairs, where PyTorch holds first halves and second halves.

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
    groups: int
    over: tuple[tuple[str, tuple[str, ...]], ...]
    sizes: tuple[tuple[str, int], ...]
    scale: tuple[str, float] | None
    shift: float
    layers: tuple[int, int]
    scan: int | None

    def __init__(
        self,
        leaf: str,
        key: str,
        pattern: str,
        *,
        kind: str | None = None,
        fan_in_fan_out: bool = False,
        groups: int = 1,
        scale: tuple[str, float] | None = None,
        shift: float = 0.0,
        layers: Sequence[int] = (1, 0),
        scan: int | None = None,
        **over: Sequence[str] | int,
    ) -> None:
        put = functools.partial(object.__setattr__, self)
        put("leaf", leaf)
        put("key", key)
        put("pattern", pattern)
        put("fan_in_fan_out", fan_in_fan_out)
        put("groups", groups)
        named = {n: tuple(v) for n, v in over.items() if not isinstance(v, int)}
        put("over", tuple(sorted(named.items())))
        put("sizes", tuple(sorted((n, v) for n, v in over.items() if isinstance(v, int))))
        put("scale", None if scale is None else (scale[0], float(scale[1])))
        put("shift", float(shift))
        put("layers", tuple(layers))
        put("scan", scan)
        problems = self._problems()
        if problems:
            raise KeyMapError(f"the line {leaf!r} -> {key!r} ({pattern!r}) is wrong:\n" + paths.bullets(problems))
        put("kind", kind or {1: "vector", 2: "linear"}.get(len(self.right), "other"))

    @staticmethod
    def attention(leaf: str, key: str) -> tuple[Weight, ...]:
        """The lines of one of Flax's attention layers, which in PyTorch is an `nn.MultiheadAttention`.

        For `nnx.MultiHeadAttention` and `nn.MultiHeadDotProductAttention`. PyTorch keeps queries, keys and values
        above each other in one tensor: "[0/3]" in a key is the first third of its rows.

        Args:
            leaf, key: the layer's path here and its module in PyTorch, with holes as in any line.

        >>> [w.key for w in Weight.attention("{path}.attn", "{path}.attn")][2:4]
        ['{path}.attn.in_proj_weight[1/3]', '{path}.attn.in_proj_bias[1/3]']
        """
        lines: list[Weight] = []
        for i, name in enumerate(("query", "key", "value")):
            at, third = f"{leaf}.{name}", f"[{i}/3]"
            lines.append(Weight(f"{at}.kernel", f"{key}.in_proj_weight{third}", "d n h -> (n h) d", kind="attention"))
            lines.append(Weight(f"{at}.bias", f"{key}.in_proj_bias{third}", "n h -> (n h)"))
        lines.append(Weight(f"{leaf}.out.kernel", f"{key}.out_proj.weight", "n h d -> d (n h)", kind="attention"))
        return (*lines, Weight(f"{leaf}.out.bias", f"{key}.out_proj.bias", "d -> d"))

    def _problems(self) -> list[str]:
        _, _, plain, braced, found = parse_pattern(self.pattern)
        problems = list(found)
        holes, wanted = set(_HOLE.findall(self.leaf)), _HOLE.findall(self.key)
        problems += [
            f"hole {{{h}}} of the key is filled by nothing" for h in wanted if h not in holes and h not in braced
        ]
        axis = self._bracket.get("axis")
        if axis and (axis,) not in self.right:
            problems.append(f"{self.key!r} is a part of an axis {axis!r}, which is none of PyTorch's in the pattern")
        problems += [f"{{{n}}} is both a hole of the leaf and an axis" for n in sorted(holes & braced)]
        problems += [
            f"{text!r} has a brace that belongs to no hole"
            for text in (self.leaf, self.key)
            if not set("{}").isdisjoint(_HOLE.sub("", text))
        ]
        problems += [
            f"{n!r} names no entry, or one twice: {list(names)}"
            for n, names in self.over
            if not names or len(set(names)) < len(names)
        ]
        problems += [f"{n!r} has names but is no braced axis of the pattern" for n, _ in self.over if n not in braced]
        problems += [
            f"axis {{{n}}} must appear in the key, else its entries share one name"
            for n in sorted(braced.difference(wanted))
        ]
        return problems + self._problems_of_groups(plain)

    def _problems_of_groups(self, plain: frozenset[str]) -> list[str]:
        sizes, problems = dict(self.sizes), list[str]()
        groups = [(axis, axis_parts(axis)) for axis in self.left if axis.startswith("(")]
        for axis, names in groups:
            if len([n for n in names if n not in sizes]) != 1 or any(n.startswith("{") for n in names):
                problems.append(f"{axis}: all its axes but one need a size (as in p=2), and none has braces")
            elif len({at for at, group in enumerate(self.right) for n in names if n in group}) != 1:
                problems.append(f"{axis}: its axes must lie in one of PyTorch's axes")
        inside = {n for _, names in groups for n in names}
        problems += [f"{n!r} has a size, but is in no parentheses on the left" for n in sorted(sizes.keys() - inside)]
        if self.scale is not None:
            missing = sorted(set(self.scale[0].split()) - plain)
            problems += [f"the scale's axis {n!r} is none of the pattern's" for n in missing]
        return problems

    @property
    def left(self) -> tuple[str, ...]:
        """Axis names of the JAX leaf; braced ones keep their braces, and a split one its parentheses."""
        return parse_pattern(self.pattern).left

    @property
    def right(self) -> tuple[tuple[str, ...], ...]:
        """PyTorch's axes, each a group of axis names flattened together."""
        return parse_pattern(self.pattern).right

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
    def _key_regex(self) -> re.Pattern[str]:
        names = dict(self.over)
        seen: set[str] = set()

        def piece(text: str) -> str:
            name = text[1:-1]
            if not text.startswith("{"):
                return re.escape(text)
            if name in seen:
                return f"(?P={name})"
            seen.add(name)
            if name in names:
                return f"(?P<{name}>{'|'.join(map(re.escape, names[name]))})"
            return f"(?P<{name}>.+)" if name == "path" else rf"(?P<{name}>\d+)"

        return re.compile("".join(map(piece, re.split(r"(\{\w+\})", self.file_key))))

    def match_key(self, key: str) -> dict[str, str] | None:
        """What fills the holes of this line's key to give that one; None where nothing does.

        >>> Weight("l_{l}.kv", "l.{l}.{p}.weight", "{p} i o -> o i", p=("k", "v")).match_key("l.3.v.weight")
        {'l': '3', 'p': 'v'}
        """
        match = self._key_regex.fullmatch(key)
        texts = None if match is None else match.groupdict()
        return texts if texts is None or self.has_layer(texts.get("l", str(self.layers[1]))) else None

    def has_layer(self, text: str) -> bool:
        """Whether PyTorch's layer of this number is one of the line's."""
        step, first = self.layers
        return int(text) >= first and (int(text) - first) % step == 0

    def torch_number(self, axis: str, i: int) -> str:
        """PyTorch's number of entry i of a numbered axis or hole."""
        step, first = self.layers if axis.strip("{}") == "l" else (1, 0)
        return str(step * i + first)

    def model_number(self, axis: str, text: str) -> int:
        """The inverse: which entry here has PyTorch's number."""
        step, first = self.layers if axis.strip("{}") == "l" else (1, 0)
        return (int(text) - first) // step

    def fill_leaf(self, texts: Mapping[str, str]) -> str:
        """The leaf whose holes hold these texts, in which a braced axis has no place."""
        own = {**texts, "l": str(self.model_number("l", texts["l"]))} if "l" in texts else texts
        return _HOLE.sub(lambda hole: own[hole[1]], self.leaf)

    def fill_key(self, texts: Mapping[str, str]) -> str:
        """The key whose holes hold these texts."""
        return _HOLE.sub(lambda hole: texts[hole[1]], self.file_key)

    @functools.cached_property
    def suffix(self) -> str:
        """What every path of this line ends in: the text behind the last hole."""
        return self.leaf.rpartition("}")[2]

    @functools.cached_property
    def _bracket(self) -> dict[str, str]:
        found = _PIECE.search(self.key)
        return {} if found is None else {name: text or "" for name, text in found.groupdict().items()}

    @property
    def part(self) -> str:
        """Of a key such as "in_proj_weight[0/3]" the part in brackets: which part of PyTorch's tensor the leaf is."""
        return self._bracket.get("part", "")

    @functools.cached_property
    def part_axis(self) -> tuple[str, ...]:
        """PyTorch's axis, by its names, of which the leaf is a part: the first, if none is named."""
        axis = self._bracket.get("axis")
        return (axis,) if axis else self.right[0] if self.right else ()

    @functools.cached_property
    def file_key(self) -> str:
        """PyTorch's name of the tensor, with its holes."""
        return _PIECE.sub("", self.key)

    @functools.cached_property
    def adaptable(self) -> bool:
        """Whether PyTorch's module goes by this weight: by the others (biases, norms) only copies are meant."""
        return self.kind == "attention" or self.key.rpartition(".")[2] == "weight"

    @functools.cached_property
    def module(self) -> str:
        """PyTorch's name of the module that an adapter of this weight belongs to, with its holes.

        PEFT adapts an `nn.MultiheadAttention` as a whole, its output projection included.
        """
        if self.kind == "attention":
            return re.sub(r"\.?(in_proj_weight\[.*\]|out_proj\.weight)$", "", self.key)
        return self.key.removesuffix("weight").removesuffix(".")

    @functools.cached_property
    def layout_cache(self) -> dict[Any, Any]:
        """For `plan`: how a method's tensors lie in arrays of this line."""
        return {}

    @functools.cached_property
    def stack(self) -> tuple[int, ...]:
        """Positions of the stacked (numbered) axes in the leaf."""
        numbered = (i for i, n in enumerate(self.left) if n.startswith("{") and self.names(n) is None)
        return tuple(i for i in numbered if self.left[i] != EXPERTS)

    @functools.cached_property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """The leaf's axes by role: "stack", "fused", "experts", "batch" (fused parts and all experts), "in", "out".

        The last two are in PyTorch's flattening order; a convolution's window is part of what it sums over, and
        "channels" are its inputs without it.
        "experts" are those that PyTorch too holds in one array.
        """
        of = {n: axis for axis in self.left for n in axis_parts(axis)}
        torch = self.torch_roles
        return {
            "stack": tuple(self.left[i] for i in self.stack),
            "fused": tuple(n for n in self.left if n.startswith("{") and self.names(n) is not None),
            "experts": torch["experts"],
            "batch": torch["batch"],
            "in": tuple(dict.fromkeys(of[n] for n in torch["in"])),
            "channels": tuple(dict.fromkeys(of[n] for n in torch["channels"])),
            "out": tuple(dict.fromkeys(of[n] for n in torch["out"])),
        }

    @functools.cached_property
    def torch_roles(self) -> dict[str, tuple[str, ...]]:
        """The same as a file's tensors hold them: split axes by their parts."""
        groups = self.right
        batch = tuple(n for n in self.left if n.startswith("{") and self.names(n) is not None)
        batch += tuple(n for n in self.left if n == EXPERTS)
        experts = groups[0] if self.kind == "experts" and len(groups) == 3 else ()
        groups = groups[1:] if experts else groups
        out, inputs = (groups[0], groups[1]) if len(groups) == 2 else (groups[0] if groups else (), ())
        channels = inputs
        if self.kind == "conv":
            channels = groups[1] if len(groups) > 1 else ()
            inputs = tuple(n for group in groups[1:] for n in group)
        if self.fan_in_fan_out or self.kind == "embedding":
            out, inputs = inputs, out
        return {"batch": batch + experts, "experts": experts, "in": inputs, "out": out, "channels": channels}

    @functools.cached_property
    def axes(self) -> Axes:
        """The roles as the module itself sees its weight: without the stacked axes."""
        own = [n for i, n in enumerate(self.left) if i not in self.stack]
        at = {role: tuple(own.index(n) for n in self.roles[role]) for role in ("in", "out", "batch")}
        return Axes(in_axes=at["in"], out_axes=at["out"], batch_axes=at["batch"])

    def names(self, axis: str) -> tuple[str, ...] | None:
        """The names of a braced axis' entries, or None where they are numbered."""
        return dict(self.over).get(axis.strip("{}"))

    @property
    def scanned_leaf(self) -> str:
        """The path where layers are stacked: `{l}` has left it."""
        return ".".join(p.removesuffix("_{l}") for p in self.leaf.split(".") if p != "{l}")

    def scanned(self, axis: int) -> Weight:
        """This line for layers stacked on `axis`: `{l}` leaves the path and becomes an axis.

        A negative axis counts from the end of the stacked leaf; where a leaf has fewer axes than that, its
        layers are stacked on the last.

        >>> Weight("layers.{l}.q.kernel", "layers.{l}.q.weight", "i o -> o i").scanned(1).pattern
        'i {l} o -> o i'
        >>> Weight("layers_{l}.q.kernel", "layers.{l}.q.weight", "i o -> o i").scanned(0).leaf
        'layers.q.kernel'
        """
        leaf = self.scanned_leaf
        if leaf == self.leaf:
            return self
        left = list(self.left)
        axis = axis if self.scan is None else self.scan
        left.insert(axis if axis >= 0 else max(0, len(left) + 1 + axis), "{l}")
        pattern = " ".join(left) + " ->" + self.pattern.split("->")[1]
        return Weight(leaf, self.key, pattern, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What was given besides leaf, key and pattern."""
        given = {"kind": self.kind, "fan_in_fan_out": self.fan_in_fan_out, "scale": self.scale}
        given |= {"groups": self.groups} if self.groups != 1 else {}
        given |= {"shift": self.shift} if self.shift else {}
        given |= {"layers": self.layers} if self.layers != (1, 0) else {}
        given |= {"scan": self.scan} if self.scan is not None else {}
        return {**given, **dict(self.over), **dict(self.sizes)}

    def factor(self, sizes: Mapping[str, int]) -> float:
        """What PyTorch's weight is multiplied by to give the leaf, whose axes have these `sizes`; 1 mostly."""
        if self.scale is None:
            return 1.0
        one = {n: size for axis, size in sizes.items() for n, size in part_sizes(axis, size, dict(self.sizes)).items()}
        return float(math.prod(one[n] for n in self.scale[0].split()) ** self.scale[1])
