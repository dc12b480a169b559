"""One entry of a keymap: the path of a base weight in the JAX tree, its PyTorch name, and both layouts.

PyTorch stores (out, in), so the pattern determines which axes are inputs, outputs, stacked layers or fused parts. The
keys, shapes and transposes of every method's tensors (`MethodTensor`) follow from it. Paths are templates with holes,
such as `layers.{l}.{path}.kernel`. `keymap.py` combines entries into keymaps. Pure: strings only; no arrays, no files,
no devices.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

from jaxadapt.arrays.layout import Axes, axis_parts, parse_pattern, scale_factor
from jaxadapt.core.errors import KeyMapError, raise_listed

# ---------------------------------------------------------------- templates


_NAME_HOLE = re.compile(r"(\{\w+\})")


def template_regex(template: str, names: Mapping[str, tuple[str, ...]], number: str = r"\d+") -> re.Pattern[str]:
    """Return the expression of a text with holes: a number, any path for `{path}`, or one of the names of a hole."""
    seen: set[str] = set()

    def part_regex(text: str) -> str:
        name = text[1:-1]
        if not text.startswith("{"):
            return re.escape(text)
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        default = ".+" if name == "path" else number
        return f"(?P<{name}>{'|'.join(map(re.escape, names[name])) if name in names else default})"

    return re.compile("".join(map(part_regex, _NAME_HOLE.split(template))))


@functools.cache
def name_regex(template: str) -> re.Pattern[str]:
    """Return the regular expression of a name with holes for numbers, which excludes leading zeros.

    Without leading zeros, no two names denote the same expert.

    >>> [bool(name_regex("experts.{e}.w1").fullmatch(f"experts.{e}.w1")) for e in ("0", "12", "012")]
    [True, True, False]
    """
    return template_regex(template, {}, "0|[1-9][0-9]*")


# ---------------------------------------------------------------- weight


Kind = Literal["linear", "embedding", "conv", "attention", "vector", "other", "parameter", "experts", "lookup", "fused"]
"""The kind of a weight: what it is in PyTorch, which determines how PEFT adapts it (see `Weight`)."""

_HOLE = re.compile(r"\{(\w+)\}")
_LAYER = re.compile(r"(?:^|[._])\{(l|place)\}(?=\.|$)")
_PART = re.compile(r"\[(?:(?P<axis>\w+) )?(?P<part>\d+(?:/|::)\d+)\]$")

EXPERTS = "{e}"
"""A numbered axis that the layer itself sees and contracts index by index; other numbered axes stack whole layers."""


@dataclasses.dataclass(frozen=True, init=False)
class Weight:
    """One entry of a keymap: the path of a base weight in the JAX tree, its PyTorch name, and the layouts.

    Args:
        leaf: dotted path in the JAX tree. `{l}` stands for digits, `{path}` for any path.
        key: the PyTorch parameter name; its holes are filled from `leaf`, `pattern` and `over`. If PyTorch stores
            several leaves in one tensor, a suffix selects the part: "[0/3]" is the first third of the rows, "[f 0/2]"
            the first half of the axis f or (f g), and "[f 0::2]" every second index of that axis, from the first.
        pattern: `"d {l} n h -> (n h) d"`: the JAX axes, then PyTorch's. A name in braces is an axis that PyTorch does
            not have. Each index of that axis has its own tensor, numbered (`{l}`: stacked layers) or named by `over`.
        kind: "linear" (out, in), "embedding" (vocabulary, dim), "conv" (out, in, window...), "attention" (see
            `attention`), "vector" or "other". The default follows from the number of PyTorch axes. "parameter"
            (out, in) and "experts" (expert, out, in) are not weights of an nn.Linear; target_parameters selects them.
            "lookup" is a token embedding whose copy replaces it in the lookup only, although it is the head as well.
            "fused" is a part of the weight of one nn.Linear; only LoRA can be divided among the parts.
        fan_in_fan_out: PyTorch stores (in, out), as GPT-2's Conv1D does; for experts, PyTorch's `is_transposed`.
        groups: the groups of a convolution.
        scale: `(axes, power)`: the JAX weight is PyTorch's weight times the size of the axes to that power.
            `("h", -0.5)` is a query projection that includes the factor 1/√head_dim.
        shift: a number added to PyTorch's weight to get the JAX weight: 1 for a norm that stores 1 + w in JAX.
        layers: `(step, first)`: number l of `{l}` in JAX is PyTorch's layer step · l + first. (2, 1) is the second half
            of a JAX layer that corresponds to two PyTorch layers. A third number is the axis on which layers of this
            leaf are stacked, if it differs from that of the other leaves.
        over: the names of a braced axis' indices, `p=("k", "v")` for a leaf that has both. As a number, the size of an
            axis in parentheses on the left: `"d n (c p) -> (n p c) d", p=2` undoes an interleaving, where the leaf's
            last axis has pairs and PyTorch has first halves and second halves. `place=5` is the number of layers of a
            block in an entry with the axis (or hole) `{place}`, where `{l}` is the number of the block: PyTorch's layer
            is step · l + first + place. `"d {l} {place} f -> f d", layers=(6, 0), place=5` is a leaf with the first
            five layers of each block of six.

    Raises `KeyMapError` if the entry contradicts itself.

    >>> w = Weight("layer_{l}.attn.kv.w", "h.{l}.{p}_proj.weight", "{p} n d h -> (n h) d", p=("k", "v"))
    >>> w.left, w.right
    (('{p}', 'n', 'd', 'h'), (('n', 'h'), ('d',)))
    """

    leaf: str
    key: str
    pattern: str
    kind: Kind
    fan_in_fan_out: bool
    groups: int
    over: tuple[tuple[str, tuple[str, ...]], ...]
    sizes: tuple[tuple[str, int], ...]
    scale: tuple[str, float] | None
    shift: float
    layers: tuple[int, int]
    scan: tuple[int, ...]

    def __init__(
        self,
        leaf: str,
        key: str,
        pattern: str,
        *,
        kind: Kind | None = None,
        fan_in_fan_out: bool = False,
        groups: int = 1,
        scale: tuple[str, float] | None = None,
        shift: float = 0.0,
        layers: Sequence[int] = (1, 0),
        **over: Sequence[str] | int,
    ) -> None:
        vars(self).update(
            leaf=leaf,
            key=key,
            pattern=pattern,
            kind=kind or {1: "vector", 2: "linear"}.get(len(parse_pattern(pattern).right), "other"),
            fan_in_fan_out=fan_in_fan_out,
            groups=groups,
            over=tuple(sorted((n, tuple(v)) for n, v in over.items() if not isinstance(v, int))),
            sizes=tuple(sorted((n, v) for n, v in over.items() if isinstance(v, int))),
            scale=None if scale is None else (scale[0], float(scale[1])),
            shift=float(shift),
            layers=tuple(layers[:2]),
            scan=tuple(layers[2:]),
        )
        raise_listed(KeyMapError, f"the entry {leaf!r} -> {key!r} ({pattern!r}) is invalid:", self._problems())

    @staticmethod
    def attention(leaf: str, key: str) -> tuple[Weight, ...]:
        """Return the entries of one of Flax's attention layers, which in PyTorch is an `nn.MultiheadAttention`.

        The layer is an `nnx.MultiHeadAttention` or an `nn.MultiHeadDotProductAttention`. PyTorch concatenates the rows
        of queries, keys and values in one tensor: "[0/3]" in a key is the first third of its rows.

        Args:
            leaf: the layer's path in the JAX tree, with holes as in any entry.
            key: the module's name in PyTorch, with the same holes.

        >>> [w.key for w in Weight.attention("{path}.attn", "{path}.attn")][2:4]
        ['{path}.attn.in_proj_weight[1/3]', '{path}.attn.in_proj_bias[1/3]']
        """
        thirds = (
            entry
            for i, name in enumerate(("query", "key", "value"))
            for entry in (
                Weight(f"{leaf}.{name}.kernel", f"{key}.in_proj_weight[{i}/3]", "d n h -> (n h) d", kind="attention"),
                Weight(f"{leaf}.{name}.bias", f"{key}.in_proj_bias[{i}/3]", "n h -> (n h)"),
            )
        )
        return (
            *thirds,
            Weight(f"{leaf}.out.kernel", f"{key}.out_proj.weight", "n h d -> d (n h)", kind="attention"),
            Weight(f"{leaf}.out.bias", f"{key}.out_proj.bias", "d -> d"),
        )

    def _problems(self) -> list[str]:
        _, _, plain, braced, pattern_problems = parse_pattern(self.pattern)
        holes, key_holes, axis = set(_HOLE.findall(self.leaf)), _HOLE.findall(self.key), self._bracket.get("axis")
        return [
            *pattern_problems,
            *([] if self.kind in get_args(Kind) else [f"expected a kind of {get_args(Kind)}, found {self.kind!r}"]),
            *(
                f"hole {{{h}}} of the key is neither a hole of the leaf nor a braced axis"
                for h in key_holes
                if h not in holes | braced
            ),
            *(
                []
                if not axis or self.part_axis
                else [f"{self.key!r} is a part of the axis {axis!r}, which is not a PyTorch axis of the pattern"]
            ),
            *(f"{{{n}}} is both a hole of the leaf and an axis" for n in sorted(holes & braced)),
            *(
                f"{text!r} has a brace that is not part of a hole"
                for text in (self.leaf, self.key)
                if not set("{}").isdisjoint(_HOLE.sub("", text))
            ),
            *(
                f"{n!r} must have at least one name, and no name twice: {list(names)}"
                for n, names in self.over
                if not names or len(set(names)) < len(names)
            ),
            *(f"{n!r} has names but is not a braced axis" for n, _ in self.over if n not in braced),
            *(
                f"axis {{{n}}} must appear in the key, else all its indices have the same key"
                + "; for the layers of a block, pass their number, as in place=5" * (n == "place")
                for n in sorted((braced | {"place"} & holes).difference(key_holes, self.layer_names[1:]))
            ),
            *self._problems_of_groups(plain),
            *self._problems_of_blocks(),
        ]

    def _problems_of_groups(self, plain: frozenset[str]) -> list[str]:
        sizes, problems = dict(self.sizes), list[str]()
        groups = [(axis, axis_parts(axis)) for axis in self.left if axis.startswith("(")]
        for axis, names in groups:
            if len(set(names) - sizes.keys()) != 1 or "{" in axis:
                problems.append(f"{axis}: all axes except one must have a size (as in p=2), and none may have braces")
            elif len({i for i, group in enumerate(self.right) for n in names if n in group}) != 1:
                problems.append(f"{axis}: its axes must be in the same PyTorch axis")
        return [
            *problems,
            *(
                f"{n!r} has a size, but is not in parentheses on the left"
                for n in sorted(sizes.keys() - {n for _, names in groups for n in names} - {*self.layer_names[1:]})
            ),
            *(
                f"the axis {n!r} of the scale is not in the pattern"
                for n in sorted({*("" if self.scale is None else self.scale[0]).split()} - plain)
            ),
        ]

    def _problems_of_blocks(self) -> list[str]:
        together = any({"{l}", "{place}"} <= {*names} for names in (self.left, _NAME_HOLE.findall(self.leaf)))
        return [
            *(
                "l and place must both be holes of the leaf, or both be braced axes, and only l a hole of the key"
                for name in self.layer_names[1:]
                if not together or f"{{{name}}}" in self.key
            ),
            *(
                []
                if len(self.layers) == 2 and 1 <= self.places <= self.layers[0]
                else [
                    f"layers={self.layers + self.scan} must be (step, first) with a step of at least 1"
                    + f", and place={self.places} must be at least 1 and at most step" * len(self.layer_names[1:])
                ]
            ),
        ]

    @functools.cached_property
    def left(self) -> tuple[str, ...]:
        """Axis names of the JAX leaf; braced axes keep their braces, and split axes their parentheses."""
        return parse_pattern(self.pattern).left

    @functools.cached_property
    def right(self) -> tuple[tuple[str, ...], ...]:
        """PyTorch's axes, each a group of axis names that are flattened together."""
        return parse_pattern(self.pattern).right

    @functools.cached_property
    def regex(self) -> re.Pattern[str]:
        """The regular expression that a leaf of this entry matches in full; repeated holes must have the same text."""
        return template_regex(self.leaf, {name: tuple(map(str, range(self.places))) for name in self.layer_names[1:]})

    @functools.cached_property
    def _key_regex(self) -> re.Pattern[str]:
        return template_regex(self.file_key, dict(self.over))

    def match_key(self, key: str) -> dict[str, str] | None:
        """Return the texts of the key's holes for which this entry gives that key, or None if there are none.

        >>> Weight("l_{l}.kv", "l.{l}.{p}.weight", "{p} i o -> o i", p=("k", "v")).match_key("l.3.v.weight")
        {'l': '3', 'p': 'v'}
        """
        match = self._key_regex.fullmatch(key)
        texts = None if match is None else match.groupdict()
        return texts if texts is None or self.has_layer(texts.get("l", str(self.layers[1]))) else None

    @functools.cached_property
    def layer_names(self) -> tuple[str, ...]:
        """The axes or holes that make up the number of PyTorch's layer: "l", and "place" if its size is given."""
        return ("l", "place") if "place" in dict(self.sizes) and "{place}" in self.leaf + self.pattern else ("l",)

    @property
    def places(self) -> int:
        """The number of layers of a block in this entry; 1 without `{place}`."""
        return dict(self.sizes)["place"] if "place" in self.layer_names else 1

    def has_layer(self, text: str) -> bool:
        """Return True if PyTorch's layer of this number belongs to this entry."""
        step, first = self.layers
        return len(text) <= 18 and int(text) >= first and (int(text) - first) % step < self.places

    def add_number(self, texts: Mapping[str, str], axis: str, i: int) -> dict[str, str]:
        """Return the texts for the holes of a key, with PyTorch's number for index i of a numbered axis or hole."""
        name = axis.strip("{}")
        if name in self.layer_names:
            step, first = self.layers
            i = int(texts.get("l", first)) + (step if name == "l" else 1) * i
            name = "l"
        return {**texts, name: str(i)}

    def model_number(self, axis: str, texts: Mapping[str, str]) -> int:
        """Return the index on a numbered axis or hole for the texts of a key: the inverse of `add_number`."""
        if (name := axis.strip("{}")) not in self.layer_names:
            return int(texts[name])
        return divmod(int(texts["l"]) - self.layers[1], self.layers[0])[self.layer_names.index(name)]

    def fill_leaf(self, texts: Mapping[str, str]) -> str:
        """Return the leaf with these texts in its holes; holes that no text fills remain."""
        numbers = {n: str(self.model_number(n, texts)) for n in self.layer_names} if "l" in texts else {}
        return _HOLE.sub(lambda hole: {**texts, **numbers}.get(hole[1], hole[0]), self.leaf)

    def fill_key(self, texts: Mapping[str, str]) -> str:
        """Return the key with these texts in its holes."""
        return _HOLE.sub(lambda hole: texts[hole[1]], self.file_key)

    @functools.cached_property
    def suffix(self) -> str:
        """The common end of all leaves of this entry: the text after the last hole."""
        return self.leaf.rpartition("}")[2]

    @functools.cached_property
    def _bracket(self) -> dict[str, str]:
        bracket = _PART.search(self.key)
        return {} if bracket is None else {name: text or "" for name, text in bracket.groupdict().items()}

    @functools.cached_property
    def part(self) -> str:
        """The part of PyTorch's tensor that is this leaf: "0/3" for the key "in_proj_weight[0/3]", else ""."""
        return self._bracket.get("part", "")

    @functools.cached_property
    def part_axis(self) -> tuple[str, ...]:
        """The PyTorch axis, as a group of names, along which the leaf is a part; by default the first."""
        axis = self._bracket.get("axis")
        return next((group for group in self.right if not axis or group[:1] == (axis,)), ())

    @functools.cached_property
    def file_key(self) -> str:
        """PyTorch's name of the tensor, with holes."""
        return _PART.sub("", self.key)

    @property
    def by_parameter(self) -> bool:
        """True if PEFT adapts the weight by the name of the parameter only (target_parameters)."""
        return self.kind in ("parameter", "experts")

    @property
    def is_stored_in_out(self) -> bool:
        """True if PyTorch stores the weight as (in, out)."""
        return self.fan_in_fan_out or self.kind == "embedding"

    @property
    def products(self) -> int:
        """How often PEFT (0.15 to 0.21.2) adds s·B·A: 2 for an `nn.MultiheadAttention`'s output projection, else 1."""
        return 2 if self.kind == "attention" and not self.part else 1

    @functools.cached_property
    def adaptable(self) -> bool:
        """True if adapters can target the module of this weight; biases and norms can only be copied."""
        return self.kind == "attention" or self.file_key.rpartition(".")[2] == "weight"

    @functools.cached_property
    def module(self) -> str:
        """PyTorch's name of the module that has this weight's adapter, with holes.

        PEFT adapts an `nn.MultiheadAttention` as one module, including its output projection.
        """
        if self.kind == "attention":
            return re.sub(r"\.?(in_proj_weight\[.*\]|out_proj\.weight)$", "", self.key)
        return self.file_key.removesuffix("weight").removesuffix(".")

    @functools.cached_property
    def layout_cache(self) -> dict[Any, Any]:
        """Cache of `tensor_layout` and `plan`: the layouts of a method's tensors for this entry."""
        return {}

    @functools.cached_property
    def stack(self) -> tuple[int, ...]:
        """Positions of the stacked (numbered) axes in the leaf."""
        return tuple(
            i for i, n in enumerate(self.left) if n.startswith("{") and n != EXPERTS and self.index_names(n) is None
        )

    @functools.cached_property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """The leaf's axes by role.

        The roles are "stack", "fused", "experts" (experts that PyTorch also stores in one array), "batch" (fused parts
        and all experts), "in", "out" and "channels". "in" and "out" are in PyTorch's flattening order. "in" of a
        convolution includes the window; "channels" does not.
        """
        axis_of = {n: axis for axis in self.left for n in axis_parts(axis)}
        torch = {role: dict.fromkeys(axis_of[n] for n in names) for role, names in self.torch_roles.items()}
        return {"stack": tuple(self.left[i] for i in self.stack), **{role: tuple(axes) for role, axes in torch.items()}}

    @functools.cached_property
    def torch_roles(self) -> dict[str, tuple[str, ...]]:
        """The axes of the file's tensors by role: as `roles`, with split axes replaced by their parts."""
        fused = tuple(n for n in self.left if self.index_names(n) is not None)
        batch = fused + tuple(n for n in self.left if n == EXPERTS)
        experts = self.right[0] if self.kind == "experts" and len(self.right) == 3 else ()
        groups = self.right[1:] if experts else self.right
        out, inputs = (groups[0], groups[1]) if len(groups) == 2 else (groups[0] if groups else (), ())
        channels = inputs
        if self.kind == "conv":
            channels = groups[1] if len(groups) > 1 else ()
            inputs = tuple(n for group in groups[1:] for n in group)
        if self.is_stored_in_out:
            out, inputs = inputs, out
        batch += experts
        return {"fused": fused, "batch": batch, "experts": experts, "in": inputs, "out": out, "channels": channels}

    @functools.cached_property
    def axes(self) -> Axes:
        """The axis roles without the stacked axes, as the module sees its weight."""
        unstacked = [n for i, n in enumerate(self.left) if i not in self.stack]
        positions = {role: tuple(unstacked.index(n) for n in self.roles[role]) for role in ("in", "out", "batch")}
        return Axes(in_axes=positions["in"], out_axes=positions["out"], batch_axes=positions["batch"])

    def index_names(self, axis: str) -> tuple[str, ...] | None:
        """Return the names of a braced axis' indices, or None if they are numbered."""
        return dict(self.over).get(axis.strip("{}"))

    @functools.cached_property
    def scanned_leaf(self) -> str:
        """The path of the leaf in a model with stacked layers, without `{l}` and `{place}`."""
        return _LAYER.sub(lambda m: "" if m[1] in self.layer_names else m[0], self.leaf).removeprefix(".")

    @functools.cached_property
    def is_layer_matrix(self) -> bool:
        """True for a matrix of a numbered or stacked layer, whose name identifies a family."""
        return self.kind == "linear" and ("{l}" in self.leaf or "{l}" in self.left)

    def scanned(self, axis: int) -> Weight:
        """Return this entry for layers stacked on `axis`: `{l}` is removed from the path and becomes an axis.

        `{place}` becomes the axis behind that of `{l}`. A negative axis counts from the end of the stacked leaf. If the
        leaf has fewer axes than that, its layers are stacked on axis 0.

        >>> Weight("layers.{l}.q.kernel", "layers.{l}.q.weight", "i o -> o i").scanned(1).pattern
        'i {l} o -> o i'
        >>> Weight("layers_{l}.q.kernel", "layers.{l}.q.weight", "i o -> o i").scanned(0).leaf
        'layers.q.kernel'
        """
        if self.scanned_leaf == self.leaf:
            return self
        left = list(self.left)
        (axis,) = self.scan or (axis,)
        left.insert(axis if axis >= 0 else max(0, len(left) + 1 + axis), f"{{{'} {'.join(self.layer_names)}}}")
        return Weight(self.scanned_leaf, self.key, f"{' '.join(left)} ->{self.pattern.split('->')[1]}", **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the entry: everything except leaf, key and pattern."""
        usual = {"kind": self.kind, "fan_in_fan_out": self.fan_in_fan_out, "scale": self.scale}
        rare = (("groups", self.groups, 1), ("shift", self.shift, 0.0), ("layers", self.layers + self.scan, (1, 0)))
        changed = ((name, value) for name, value, default in rare if value != default)
        return dict((*usual.items(), *changed, *self.over, *self.sizes))

    def factor(self, sizes: Mapping[str, int]) -> float:
        """Return the factor by which to multiply PyTorch's weight to get the leaf; 1 without a scale.

        Args:
            sizes: the sizes of the leaf's axes, by name.
        """
        return scale_factor(self.scale, sizes.items(), dict(self.sizes))


# ---------------------------------------------------------------- tensor spec


_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class MethodTensor:
    """One tensor of a method at one site: its name, its PEFT key suffix and its two layouts.

    Attributes:
        name: the tensor's name in the model.
        suffix: the end of its PEFT key, after the module's name. For a copy, the text between the names of the module
            and the parameter.
        axes: its axes in the model. Each is a role of the base weight's axes ("batch", "in", "out", or "channels" for a
            convolution's inputs without the window), or an axis of the method itself.
        torch: its axes in the file, each a group of such names. An empty group is an axis of size 1. "in" of a
            convolution is one PyTorch axis for the channels and one for each axis of the window.
        own: `(name, size)` of the method's own axes.
        is_copy: True if the tensor is a copy of the base weight, with its layouts in the model and in the file.
        from_base: True if the initial value is computed from the base weight.
        trained: False for a tensor that training must not change.
        in_file: False for a tensor that no file has: it is computed from the configuration and the base when an adapter
            is created or loaded.
        optional: True if a file may lack the tensor; it is then computed as for a new adapter.
        repeated: True if a file has a tensor of the whole adapter once more under the name of each module; a reader
            accepts files without these copies.
        numbered: True if a file has one tensor for each index of the first axis, with the index at the end of the key;
            only for a tensor of the whole adapter.
        dtype: the dtype of a tensor of integers; None for a tensor of floats.
        scale_power: if the JAX weight is f times the PyTorch weight (as MaxText's queries are), this tensor is
            multiplied by f to this power. None if the effect is not defined; converting the tensor then raises.
        used_sizes: for a leaf whose entries (stacked layers, fused parts) differ, the size of the axis "r" in each
            entry's file tensor, in the order of `Match.braced`, or 1 for a tensor without that axis. Where it is
            smaller than the axis of the leaf, the leaf ends in zeros. 0 for an entry that is not adapted: it has no
            file tensor.
    """

    name: str
    suffix: str
    axes: tuple[str, ...]
    torch: tuple[tuple[str, ...], ...]
    own: tuple[tuple[str, int], ...] = ()
    is_copy: bool = False
    from_base: bool = False
    trained: bool = True
    in_file: bool = True
    optional: bool = False
    repeated: bool = False
    numbered: bool = False
    dtype: str | None = None
    scale_power: int | None = None
    used_sizes: tuple[int, ...] | None = None


def own_tensor(name: str, shape: Sequence[int], suffix: str = "", **options: Any) -> MethodTensor:
    """Return the specification of a tensor whose axes are all the method's own, in this order.

    Args:
        suffix: the end of its key; by default a dot and the name.
        options: other fields of `MethodTensor`.

    >>> own_tensor("oft_R", (4, 6), ".oft_R.weight").torch
    (('d0',), ('d1',))
    """
    names = tuple(f"d{i}" for i in range(len(shape)))
    return axes_tensor(name, " ".join(names), tuple(zip(names, shape, strict=True)), suffix, **options)


def axes_tensor(
    name: str,
    axes: str,
    own: Sequence[tuple[str, int]] = (),
    suffix: str = "",
    scale_power: int | None = 0,
    **options: Any,
) -> MethodTensor:
    """Return the specification of a tensor whose axes in the file are those in the model, in the same order.

    Args:
        name: the tensor.
        axes: the names of the axes, separated by spaces. "1" is an axis of size 1, which only the file has.
        own: `(name, size)` of the method's own axes.
        suffix: the end of its key; by default a dot and the name.
        scale_power: see `MethodTensor`.
        options: other fields of `MethodTensor`.

    >>> scale = axes_tensor("boft_s", "out 1")
    >>> scale.torch, scale.scale_power
    ((('out',), ()), 0)
    """
    names = axes.split()
    layouts = ("batch", *(n for n in names if n != "1")), tuple(() if n == "1" else (n,) for n in names)
    return MethodTensor(name, suffix or f".{name}", *layouts, tuple(own), scale_power=scale_power, **options)


@dataclasses.dataclass(frozen=True)
class Modules:
    """The PyTorch modules of a leaf's entries: one for each stacked layer, expert and fused part.

    Attributes:
        names: the modules in the order of `Match.braced`; None for an entry that is not adapted.
        sizes: the sizes of the braced axes that are not stacked, in the same order.
        order: the positions of these axes in the order of the role "batch", as a method sees them; -1 for an axis that
            PyTorch has as well.

    >>> list(Modules(("0.q", None, "2.q")))
    ['0.q', '2.q']
    """

    names: tuple[str | None, ...] = ("",)
    sizes: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.names if name is not None)

    @property
    def all(self) -> bool:
        """True if every entry is adapted."""
        return None not in self.names

    def each(self, value: Callable[[str], _T], none: _T) -> tuple[_T, ...]:
        """Return `value` of each adapted entry's module, and `none` for the entries that are not adapted."""
        return tuple(none if name is None else value(name) for name in self.names)
