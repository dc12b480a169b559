"""The method interface: pure functions over one weight, independent of files and Flax.

A method defines the tensors of a target (`tensors`), their initial values (`init`), what it changes (`effects`), and
the change itself: of one use of the weight (`input`, `output`) or of the weight (`weight`). Keys, transposes, sharding,
attaching and merging follow from these. Most methods subclass `matrix.MatrixMethod`, which sees PyTorch's layout. A
`Target` is one target of a configuration as a method sees it, before its tensors are known.

Hyperparameters may differ between stacked layers, or between fused parts. All layers of a scan run the same code, each
with its own slice of every array. A value that differs between layers is therefore an entry of a constant for all
layers, indexed by the layer's number. That number is an array (`LAYER`) that is stacked and sliced as the parameters
are.

`METHODS` has the methods by type: those of `configs.table`, loaded on first use, and those that other packages
register.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays.layout import Axes, split_sizes
from jaxadapt.arrays.products import Operation, PerEntry, Use
from jaxadapt.arrays.random_draws import Draw, Drop, TorchRandom
from jaxadapt.configs.base import Change, Config, class_of
from jaxadapt.configs.table import FACTS, NO_FACTS, MethodFacts
from jaxadapt.core.errors import AttachError, ConfigError, MismatchError, raise_listed, warn
from jaxadapt.keymaps.keymap import PEFT_PREFIX, Match
from jaxadapt.keymaps.weight import MethodTensor, Modules, Weight, axes_tensor, own_tensor

# The file of a method imports these names from here, wherever they are defined.
__all__ = [
    "CALL_KEY", "METHODS", "PRIMITIVES", "Array", "Axes", "Change", "Draw", "Drop", "Effects", "Examples", "Floats",
    "Match", "Method", "MethodTensor", "Operation", "Params", "PerEntry", "Shapes", "Start", "Strings", "Target",
    "Targets", "TorchRandom", "Use", "adapted_entries", "as_computable", "at_least_float32", "axes_tensor",
    "file_sizes", "get_method", "is_collection", "own_tensor", "register", "require_weights", "shared_value",
    "tensor_roles",
]  # fmt: skip

# ---------------------------------------------------------------- per entry


def per_entry(modules: Modules, value: Callable[[str], float], none: float) -> PerEntry:
    """Return `value` of each adapted entry's module, and `none` for the entries that are not adapted."""
    values = np.array(modules.each(value, none), float).reshape(-1, *modules.sizes)
    values = values.transpose(0, *(1 + axis for axis in modules.order if axis >= 0))
    sizes = tuple(modules.sizes[axis] if axis >= 0 else 1 for axis in modules.order)
    return PerEntry(tuple(values.reshape(-1).tolist()), sizes)


def adapted_entries(modules: Modules) -> PerEntry | None:
    """Return 1 for each adapted entry and 0 for the others, or None if all entries are adapted."""
    return None if modules.all else per_entry(modules, lambda _: 1.0, 0.0)


# ---------------------------------------------------------------- target


Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclasses.dataclass(frozen=True)
class Target:
    """A leaf that a configuration selects: its PyTorch modules, its sizes, and the shapes of existing tensors.

    Attributes:
        match: the leaf, with its entry in the keymap.
        modules: the PyTorch modules of the leaf's entries (stacked layers, fused parts).
        sizes: the sizes of the leaf's axes by name; empty if only the adapter is known and not its base.
        found: `{tensor name: shape of one entry}` of an existing adapter; empty for a new one. A file's tensor has the
            name of its key's end, with dots as underscores and without ".weight". The shape has the file's axes, or the
            model's if the adapter is already in a model; use it for axes of the method's own.
        has_bias: whether the base has a bias beside the leaf; None if only the adapter is known and not its base.
    """

    match: Match
    modules: Modules = dataclasses.field(default_factory=Modules)
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    found: Shapes = dataclasses.field(default_factory=dict[str, Shape])
    has_bias: bool | None = None

    @staticmethod
    def of_file(module: str, found: Shapes, shape: Shape = ()) -> Target:
        """Return a module as a target of its method, from its file tensors `{name: shape}`.

        Args:
            module: the module.
            found: the shapes of its tensors in a file, by name.
            shape: the shape of a convolution's weight; empty for a matrix, whose sizes are then not known.
        """
        leaf, key, axes = "weight", f"{module}.weight", " ".join(f"a{i}" for i in range(len(shape)))
        if len(shape) > 2:
            weight = Weight(leaf, key, f"{axes} -> {axes}", kind="conv")
            return Target(Match(leaf, weight), Modules((module,)), dict(zip(weight.left, shape, strict=True)), found)
        kind = "embedding" if any("_embedding_" in name for name in found) else "linear"
        return Target(Match(leaf, Weight(leaf, key, "o i -> o i", kind=kind)), Modules((module,)), {}, found)

    @property
    def leaf(self) -> str:
        """The path of the leaf."""
        return self.match.leaf

    @property
    def kind(self) -> str:
        """The kind of the weight: "linear", "embedding", "conv", …"""
        return self.match.weight.kind

    @property
    def in_size(self) -> int:
        """The number of inputs of one module in PyTorch, without a convolution's window."""
        return self._size("channels" if self.kind == "conv" else "in")

    @property
    def out_size(self) -> int:
        """The number of outputs of one module in PyTorch."""
        return self._size("out")

    @property
    def window(self) -> Shape:
        """The sizes of a convolution's window, 0 where the base is not known; empty for other weights."""
        if self.kind != "conv":
            return ()
        parts = self._parts()
        return tuple(math.prod(parts.get(name, 0) for name in group) for group in self.match.weight.right[2:])

    @property
    def is_known(self) -> bool:
        """True if the numbers of inputs and outputs are known."""
        roles = self.match.weight.torch_roles
        return {*roles["in"], *roles["out"]} <= self._parts().keys()

    def _parts(self) -> dict[str, int]:
        return split_sizes(self.sizes.items(), dict(self.match.weight.sizes))

    def _size(self, role: str) -> int:
        names, sizes = self.match.weight.torch_roles[role], self._parts()
        if not all(name in sizes for name in names):
            raise LookupError(f"{self.leaf}: the sizes of the base weight are not known here; use found")
        return math.prod(sizes[name] for name in names)

    def own_size(self, tensor: str, axis: int, new: Callable[[], int]) -> int:
        """Return the size of an axis of the method's own: that of the existing tensor, or `new()` for a new adapter.

        Raises `MismatchError` if the existing tensor has no such axis.
        """
        shape = self.found.get(tensor)
        if shape is None:
            return new()
        if axis >= len(shape):
            module = next(iter(self.modules), self.leaf)
            raise MismatchError(f"{module}: {tensor}: expected at least {axis + 1} axes, found the shape {list(shape)}")
        return shape[axis]

    def value(self, field: Callable[[str], float]) -> float | PerEntry:
        """Return `field(module)`: one number if all modules agree, else a number for each."""
        values = {field(module) for module in self.modules}
        return values.pop() if len(values) == 1 else per_entry(self.modules, field, min(values))

    def rank(self, field: Callable[[str], int]) -> int:
        """Return the largest `field(module)`, the size of the axis "r" in the model."""
        return max(field(module) for module in self.modules)

    def with_ranks(self, tensors: Sequence[MethodTensor], field: Callable[[str], int]) -> tuple[MethodTensor, ...]:
        """Return the tensors with the size of the axis "r" in each module's file tensor, where modules differ."""
        ranks = self.modules.each(field, 0)
        if len(set(ranks)) == 1:
            return tuple(tensors)

        def used_sizes(tensor: MethodTensor) -> tuple[int, ...]:
            own = dict(tensor.own).get("r")  # less than the rank for a convolution with groups
            return tuple(min(rank, 1) if own is None else rank * own // max(ranks) for rank in ranks)

        return tuple(dataclasses.replace(tensor, used_sizes=used_sizes(tensor)) for tensor in tensors)

    def cap_rank(self, peft_type: str, rank: int, limit: int) -> int:
        """Return the rank of a new adapter, at most `limit`, with a warning where PEFT is silent."""
        if rank > limit:
            warn(f"{self.leaf}: {peft_type} with r={limit}, the most for the sizes of this weight, and not r={rank}")
        return min(rank, limit)

    def refuse(self, problem: str) -> ConfigError:
        """Return the error for a configuration that does not fit this target, to raise."""
        return ConfigError(f"{self.leaf}: {problem}")


Targets = Sequence[Target]


def shared_value(field: str, values: Mapping[str, Any]) -> Any:
    """Return the one value that all modules of a leaf share; raise `ConfigError` if they differ."""
    if len({repr(v) for v in values.values()}) > 1:
        listed = ", ".join(f"{m}: {v}" for m, v in list(values.items())[:4])
        raise ConfigError(
            f"{field} differs between the modules of one stacked or fused parameter ({listed}, …), but they share one"
            " computation. Use an unrolled model, or the same value for these modules"
        )
    return next(iter(values.values()))


# ---------------------------------------------------------------- base


Array = Any
Params = Mapping[str, Array]

CALL_KEY = "call_key"
"""The random key of one call among the parameters of a site whose method drops parts of its change."""

PRIMITIVES: Mapping[str, str] = MappingProxyType({"conv": "conv_general_dilated", "embedding": "gather"})
"""{kind of a weight: the primitive of its layer, if that is not a matrix product}."""


@dataclasses.dataclass(frozen=True)
class Effects:
    """The changes that a method makes at one site.

    Attributes:
        weight: "adds" if the change of the weight is a sum that other adapters' changes can join, "changes" if it is
            another function of the weight, "replaces" if the effective weight does not depend on the weight.
        form: "use" if `input` and `output` change each use of the weight, "weight" if the layer runs with the effective
            weight.
        bias: "scales" if the layer's bias is changed as its output is, "adds" if the adapter has a bias of its own,
            which `output` adds; None if the bias stays.
        reads: True if the change of the weight depends on the weight.
        sees: "layer" if `output` accepts the layer's output with its bias, "product" if it needs it without.
        order: "weight" if several active adapters change the weight one after another, and the input passes the last
            one first; "input" if the input passes the first one first.
    """

    weight: Literal["adds", "changes", "replaces"] = "adds"
    form: Literal["use", "weight"] = "use"
    bias: Literal["scales", "adds"] | None = None
    reads: bool = False
    sees: Literal["layer", "product"] = "layer"
    order: Literal["weight", "input"] = "weight"


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """The circumstances of one tensor's initial values.

    Attributes:
        shape: the shape to return, with the file's axes (`MatrixMethod`) or the model's.
        fan_in: the number of inputs of the module, with a convolution's window.
        w: the base weight, in the same layout; None unless the tensor is marked `from_base`.
        axes: the roles of the weight's axes.
        hparams: the hyperparameters of the site, None for a shared tensor.
        params: the tensors of the site that precede this one, and the shared tensors.
        module: the PyTorch module; "" for a shared tensor.
        target: the weight's sizes, and whether it has a bias; None for a shared tensor.
        shared: `{name: shape}` of the adapter's shared tensors.
        modules: the PyTorch modules of all sites of the adapter, in the order of the base.
        make_key: returns `key`.
        order_modules: returns `ordered_modules`.
    """

    shape: tuple[int, ...]
    fan_in: int = 1
    w: Array = None
    axes: Axes | None = None
    hparams: Any = None
    params: Params = dataclasses.field(default_factory=dict[str, Any])
    module: str = ""
    target: Target | None = None
    shared: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict[str, tuple[int, ...]])
    modules: tuple[str, ...] = ()
    make_key: Callable[[], Array] = lambda: None
    order_modules: Callable[[], Mapping[str, tuple[int, int]]] = dict[str, tuple[int, int]]

    @functools.cached_property
    def key(self) -> Array:
        """The random key of this tensor, another one for each module."""
        return self.make_key()

    @functools.cached_property
    def ordered_modules(self) -> Mapping[str, tuple[int, int]]:
        """`{module: (inputs, outputs)}` of all sites of the adapter, in the order of PyTorch's modules.

        Raises `KeyMapError` if the keymap does not state the order.
        """
        return self.order_modules()


ROLES = ("A", "B", "embedding", "bias", "vector", "copy", "frozen", "other")
"""The roles of tensors in training; `optim.roles` describes them."""


# The types of a method's tables, `{tensor: value}`, and of its example configurations.
Strings = MappingProxyType[str, str]
Floats = MappingProxyType[str, float]
Examples = tuple[Mapping[str, Any], ...]


def tensor_roles(**names: str) -> Strings:
    """Return `{tensor: role in training}` from the tensors of each role, separated by spaces.

    >>> dict(tensor_roles(A="lora_A", vector="lora_diag"))
    {'lora_A': 'A', 'lora_diag': 'vector'}
    """
    return Strings({name: role for role, words in names.items() for name in words.split()})


class Method(abc.ABC):
    """One adaptation method. Stateless: every value it needs is an argument.

    The `hparams` of a site are the hyperparameters of its arithmetic (a scale, a flag). They are hashable and are
    computed once a site.

    Attributes:
        peft_type: PEFT's name of the method.
        scope: "site" for a method that adapts weights; "model" for one whose tensors all belong to the whole adapter
            (prompts); "copies" for one that trains copies of its targets' parameters (`copy_of`).
        key_prefix: the start of the keys of its modules' tensors, and of copies beside them, in a file.
        kinds: the kinds of weight (`Weight.kind`) that it adapts.
        roles: `{tensor: role in training}`; `optim.roles` lists the roles.
        scaled: the tensors to multiply in order to multiply the change of the weight.
        has_shared: True if it has tensors that belong to the whole adapter (`shared`); set for each class.
        copies: True if the tensors accompany another method's: a full or partial copy of the weight.
        replaced_rows: the rows that a copy replaces (the numbers of tokens); None if it replaces the whole weight.
        on_parameters: True if it adapts a parameter in `target_parameters`, by the parameter's own name.
        neutral: `{tensor: value}` of the tensors that have no effect where they have this value, for tokens that a
            file lacks.
        as_head: `{end of a key: end of the head's key}` of an embedding's tensors that PEFT repeats for the head tied
            to it, transposed if the ends differ.
        ties_heads: True if PEFT repeats them for every tied head; False if only with `ensure_weight_tying`.
        sums: True if PEFT combines adapters by the weighted sum of their tensors (`combine`).
        row_neutral: `{tensor: value}` of the tensors of `row_params` in an adapter that changes nothing; 0 if absent.
        ordered: True if a module's change depends on its place among all modules of the adapter.
        row_padded: the method's own axes that rows may fill with these values, because a smaller adapter then computes
            the same; the other axes of all rows are equal.
        row_turned: the tensors whose last axis is moved to the front in each row's copy, because batched products with
            them are faster so.
        torch_layout: True if the method sees PyTorch's layout (`MatrixMethod`).
        drops: what dropout drops: entries of the input, which `output` gets as `drop`, or parts of the change. The
            method then draws these from the key `CALL_KEY`, which its `params` have in calls with dropout.
        examples: the fields of small configurations that take every way through the arithmetic, for the tests.
    """

    peft_type: str
    scope: ClassVar[Literal["site", "model", "copies"]] = "site"
    key_prefix: ClassVar[str] = PEFT_PREFIX
    kinds: frozenset[str] = frozenset({"linear"})
    roles: Strings = Strings({})
    scaled: frozenset[str] = frozenset()
    has_shared: ClassVar[bool] = False
    copies: bool = False
    replaced_rows: frozenset[int] | None = None
    on_parameters: bool = False
    sums: ClassVar[bool] = False
    neutral: Floats = Floats({})
    as_head: Strings = Strings({})
    ties_heads: bool = False
    row_neutral: Floats = Floats({})
    ordered: bool = False
    row_padded: frozenset[str] = frozenset()
    row_turned: frozenset[str] = frozenset()
    torch_layout: bool = False
    drops: ClassVar[Literal["input", "change"]] = "input"
    examples: Examples = ({},)

    def __init_subclass__(cls, peft_type: str = "") -> None:
        """Set `has_shared`, and PEFT's name; a class without one is the base of others, or states it in its body."""
        super().__init_subclass__()
        cls.has_shared = cls.shared is not Method.shared
        if peft_type:
            cls.peft_type = peft_type

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    @property
    def rows(self) -> Literal["call", "put", "no"]:
        """The way in which the rows of a batch may each have their own adapter; see `MethodFacts`."""
        return FACTS[self.peft_type].rows

    def check(self, config: Any) -> None:
        """Raise `ConfigError` if the configuration sets a field that the method would ignore."""
        return

    def for_parameter(self, depth: int) -> Method:
        """Return the method for a parameter in `target_parameters`; raise `ConfigError` if it adapts modules only.

        `depth` is the number of PEFT's wrappers outside the parameter's own.
        """
        raise ConfigError(f"target_parameters: {self.peft_type} adapts modules only; use target_modules")

    def copy_of(self, config: Any, parameter: str, lookup: bool) -> Method | None:
        """Return the method of the copy of one parameter of a target ("weight", "bias"); None if it has none."""
        return None

    @abc.abstractmethod
    def tensors(self, config: Any, target: Target) -> tuple[MethodTensor, ...]:
        """Return the tensors of a target."""

    def shared(self, config: Any, targets: Targets, found: Shapes) -> tuple[MethodTensor, ...]:
        """Return the tensors that belong to the whole adapter, with the sizes that all its targets require.

        Every function of a site gets them among its `params`. Their keys are "base_model" and the tensor's suffix, or
        only a suffix that does not begin with a dot. All their axes are the method's own. For an existing adapter,
        `found` is `{tensor name: shape}` of those in it.
        """
        return ()

    @abc.abstractmethod
    def hparams(self, config: Any, target: Target) -> Hashable:
        """Return the hyperparameters of a site; values that differ between its entries are `PerEntry`."""

    def own_hparams(self, hparams: Any) -> Any:
        """Return the part of a site's hyperparameters that has the method's own, such as `kind` and `dropout`."""
        return hparams

    @abc.abstractmethod
    def effects(self, hparams: Any) -> Effects:
        """Return what the method changes at a site."""

    @abc.abstractmethod
    def init(self, config: Any, tensor: MethodTensor, start: Start) -> Draw | Array:
        """Return the initial values of one tensor, as an array of `start.shape` or as a distribution.

        It is called once for each entry of a leaf, in the order of `tensors`, and may be traced.
        """

    def input(self, hparams: Any, params: Params, use: Use | Operation, x: Array, w: Array) -> Array:
        """Return the input that a product, or an operation of a primitive in `follows`, should get in place of `x`.

        `w` is the base weight; of a fused one the adapted parts.
        """
        return x

    def warnings(self, sites: Mapping[str, Any]) -> list[str]:
        """Return what a user should know about the sites of an adapter, `{leaf: hyperparameters}`."""
        return []

    def kind(self, hparams: Any) -> str:
        """Return the kind of the site's weight; "" if the arithmetic does not depend on it."""
        return getattr(self.own_hparams(hparams), "kind", "")

    def follows(self, hparams: Any, primitive: str) -> bool:
        """Return True if `output` handles this primitive, which is not a matrix product; else `weight` is used."""
        return PRIMITIVES.get(self.kind(hparams)) == primitive

    def follows_use(self, hparams: Any, use: Use) -> bool:
        """Return True if `input` and `output` handle this product; else `weight` is used."""
        return True

    def forward(self, hparams: Any) -> bool:
        """Return True if the products of the module's call, if any, must include one over the weight's inputs.

        This detects a keymap that confuses inputs and outputs. Parameters of experts are exempt, because PEFT itself
        swaps the two for some of them. Copies are exempt, because they have neither. So are embeddings, whose product
        is that of a tied head.
        """
        return not self.on_parameters and not self.copies and self.kind(hparams) not in PRIMITIVES

    @abc.abstractmethod
    def output(
        self, hparams: Any, params: Params, use: Use | Operation, x: Array, y: Array, drop: Drop | None, w: Array
    ) -> Array:
        """Return the adapted result of a use of the weight, in y's dtype.

        Args:
            x: the result of `input`.
            y: the result of the base weight.
            drop: the dropout of this call, if any.
            w: the base weight.
        """

    @abc.abstractmethod
    def weight(self, hparams: Any, params: Params, axes: Axes, w: Array) -> Array:
        """Return the effective weight, in w's dtype; `axes.parts` is already resolved (w has only those parts)."""

    def merged(self, hparams: Any, params: Params, axes: Axes, w: Array) -> Array:
        """Return the effective weight for a merge, where no gradient is needed."""
        return self.weight(hparams, params, axes, w)

    @abc.abstractmethod
    def unweight(self, hparams: Any, params: Params, axes: Axes, w: Array) -> Array:
        """Return the base weight of an effective weight: the inverse of `weight`, up to rounding.

        Raises `AttachError` if the effective weight does not determine the base weight.
        """

    def bias(self, hparams: Any, params: Params, axes: Axes, bias: Array, undo: bool = False) -> Array:
        """Return the layer's bias as the adapter changes it, or with `undo` the original bias of a changed one."""
        return bias

    def call_data(self, config: Any, given: Mapping[str, Array]) -> dict[str, Array]:
        """Return the data that every site needs in one call, `{name: array}`, from what the caller gives to `invoke`.

        A site gets them among its `params`, also inside scans. They are arguments of a compiled program, so new values
        do not compile it again.
        """
        return {}

    def stored(self, config: Any, shared: Params) -> Params:
        """Return the shared tensors that a file holds, from those of an adapter."""
        return shared

    def plain_rank(self, config: Any) -> int | None:
        """Return the rank of a plain LoRA that changes each linear weight as an adapter of this configuration does.

        None if the tensors alone do not give its factors (`matrix.FactoredMethod`).
        """
        return None

    def row_hparams(self, hparams: Any) -> Any:
        """Return the hyperparameters that adapters must share so that each row of a batch can have its own.

        `input` and `output` get them with the tensors of one row, in matrix products only. Raises `AttachError` if rows
        cannot differ.
        """
        return hparams

    def row_params(self, hparams: Any, params: Params, entries: tuple[int, ...]) -> dict[str, Array]:
        """Return the tensors of one adapter for a batch that mixes adapters, as arrays of numpy.

        Hyperparameters that differ between adapters become tensors, with one number for each entry.

        Args:
            params: the tensors, with the stacked axes first.
            entries: the sizes of the stacked axes and of the batch axes.
        """
        return dict(params)

    def row_pair(self, hparams: Any, params: Params) -> tuple[Array, Array, Array] | None:
        """Return `(s, A, B)` if a row's whole change of a product is s·B·A·x, else None.

        `hparams` are those of `row_hparams`. The tensors have a leading axis of slots: (slots, batch...) for s,
        (slots, batch..., r, in...) and (slots, batch..., out..., r).
        """
        return None

    def prepare_rows(self, hparams: Any, params: Params, axes: Axes, w: Array) -> dict[str, Array]:
        """Return the tensors that rows use, from those of `row_params` and the weight; called once for an adapter."""
        return dict(params)

    def role(self, hparams: Any, tensor: str) -> str:
        """Return the role of a tensor in training; `optim.roles` lists the roles."""
        return self.roles.get(tensor, "other")

    def dropout(self, hparams: Any) -> float:
        """Return the dropout rate of the site; 0 if its hyperparameters have none."""
        return getattr(self.own_hparams(hparams), "dropout", 0.0)

    def starts_unchanged(self, config: Any) -> bool:
        """Return True if a new adapter leaves the model's output as it is."""
        return bool(config.get("init_weights", True))

    def describe_change(self, config: Any) -> str | None:
        """Return what the norms of `measure_change` measure; None if they cannot be computed from a file."""
        return None

    def measure_change(self, config: Any, module: str, arrays: Mapping[str, Any]) -> Change | None:
        """Return the size of the change of one module, from its file tensors in float64, without the base weight.

        None if the tensors do not determine it.
        """
        return None


def file_sizes(
    method: Method, config: Any, module: str, found: Shapes, shape: Shape = ()
) -> tuple[int | None, int | None]:
    """Return the outputs and the inputs of a module, as far as its file tensors `{name: shape}` determine them.

    The inputs of a convolution are its channels, in all groups. A copy has the layout of its weight, whichever it is.
    The arguments are those of `Target.of_file`.
    """
    sizes: dict[str, int] = {}
    for tensor in () if method.scope == "copies" else method.tensors(config, Target.of_file(module, found, shape)):
        if len(tensor.torch) == len(found.get(tensor.name, ())):
            sizes |= {group[0]: n for group, n in zip(tensor.torch, found[tensor.name], strict=True) if len(group) == 1}
    return sizes.get("out"), sizes.get("channels", sizes.get("in"))


def as_computable(x: Array) -> Array:
    """Cast 8-bit floats to float32, because JAX does not promote them implicitly; return other arrays as they are."""
    return x.astype("float32") if x.dtype.itemsize == 1 and jnp.issubdtype(x.dtype, jnp.floating) else x


def at_least_float32(x: Array) -> Array:
    """Cast to float32, or keep a wider dtype; return integers as they are."""
    x = as_computable(x)
    return x.astype(jnp.promote_types(x.dtype, "float32")) if jnp.issubdtype(x.dtype, jnp.floating) else x


def require_weights(method: Method | None) -> None:
    """Raise `AttachError` if a method changes no weights, so that its adapters cannot be merged or converted."""
    if method is not None and method.scope == "model":
        raise AttachError(
            f"{method.peft_type} adds virtual tokens to the input and changes no weight, so it cannot be merged,"
            " combined or converted to LoRA. Keep the adapter beside the model"
        )


# ---------------------------------------------------------------- registry


class Methods(Mapping[str, Method]):
    """`{peft_type: method}`; those in `loaded` were used already, or other packages registered them."""

    def __init__(self) -> None:
        self.loaded: dict[str, Method] = {}

    def __getitem__(self, peft_type: str) -> Method:
        if peft_type not in self.loaded and peft_type in FACTS:
            module = importlib.import_module(f"jaxadapt.methods.{peft_type.lower()}")
            classes = (x for x in vars(module).values() if isinstance(x, type) and issubclass(x, Method))
            self.loaded[peft_type] = next(x for x in classes if vars(x).get("peft_type") == peft_type)()
        return self.loaded[peft_type]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*FACTS, *self.loaded]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, peft_type: object) -> bool:
        return peft_type in FACTS or peft_type in self.loaded


METHODS = Methods()


def is_collection(name: object) -> bool:
    """Return True for the name of a Linen collection, or of an attribute of an NNX layer, that holds adapters."""
    return isinstance(name, str) and name == name.lower() and name.upper() in METHODS


def get_method(config: Config) -> Method:
    """Return the method of a configuration; raise `ConfigError` if there is none, or if it would ignore a field."""
    if not isinstance(config, Config):  # pyright: ignore[reportUnnecessaryIsInstance]
        kind = f"{type(config).__module__}.{type(config).__name__}".removeprefix("builtins.")
        raise ConfigError(
            f"expected a configuration such as jaxadapt.LoraConfig(…), found {kind}. The model comes first, as in"
            " adapt(model, config), init(model, config), select(model, config) and initializers.start(model, config)"
        )
    method = METHODS.get(config.peft_type)
    if method is None:
        from jaxadapt.configs.matching import passing_types  # only this error uses it

        reason = passing_types().get(config.peft_type, "it is no type of PEFT")
        raise ConfigError(
            f"cannot apply peft_type {config.peft_type!r}: {reason}. Its files can be"
            f" read and written unchanged. Implemented methods: {', '.join(sorted(METHODS))}"
        )
    method.check(config)
    return method


def register(method: Method, facts: MethodFacts = NO_FACTS) -> Method:
    """Add a method of another package for this process, and return it.

    Its configuration is a subclass of `jaxadapt.Config` with the same `peft_type` by default. Files of this type then
    read into that class, and `adapt`, `save`, `load`, `merge` and the other functions accept it.

    Args:
        method: the method.
        facts: what lists, cards, `jaxadapt verify`, the demo and servers read about it; see `MethodFacts`.

    Raises `ConfigError` if the type has a method already, or no configuration class, or if a role is unknown.

    >>> register(METHODS["IA3"]).peft_type
    'IA3'
    """
    raise_listed(
        ConfigError,
        f"cannot register the method {method.peft_type!r}: expected the roles {', '.join(ROLES)}, found:",
        [f"{tensor}: {role!r}" for tensor, role in method.roles.items() if role not in ROLES],
    )
    if method.peft_type in METHODS and METHODS[method.peft_type] != method:
        raise ConfigError(
            f"cannot register the method {method.peft_type!r}: the type has a method already; choose another peft_type"
        )
    if class_of(method.peft_type) is None:
        raise ConfigError(
            f"cannot register the method {method.peft_type!r}: the type has no configuration. Define a subclass of"
            f' jaxadapt.Config first, with peft_type: str = "{method.peft_type}"'
        )
    METHODS.loaded[method.peft_type] = method
    if not FACTS[method.peft_type].module:
        FACTS[method.peft_type] = facts
    return method
