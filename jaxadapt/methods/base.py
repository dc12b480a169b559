"""What a method is: pure functions over one weight's roles, and nothing about files or Flax.

A method says which tensors it keeps at a site (`tensors`), how they begin (`fresh`), and what they do
to one contraction of the weight (`input`, `output`) or to the weight itself (`weight`). Everything
else (keys, transposes, sharding, attaching, merging) follows from these.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays.axes import Axes, Operation, Use
from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.keymaps.keymap import Match
from jaxadapt.keymaps.tensor_spec import MethodTensor, Modules

Array = Any
Params = Mapping[str, Array]
Drop = Callable[[Array], Array]


class Method(abc.ABC):
    """One `peft_type`. Stateless: everything it needs comes as arguments.

    `static` is what the mathematics needs besides arrays (a scale, a flag): hashable, computed once a
    site from the configuration, so a configuration is the only source of it.
    """

    peft_type: str
    kinds: frozenset[str] = frozenset({"linear"})
    roles: Mapping[str, str] = MappingProxyType({})  # of its tensors in training; `optim.roles` lists them
    scaled: frozenset[str] = frozenset()  # the tensors to multiply where the change of the weight shall be multiplied
    copies: bool = False  # (parts of) the leaf, so that it is no adapter of the module
    replaces: bool = False  # the leaf altogether, whatever the model does with it: `weight` alone is asked
    wrapper_depth: int | None = (
        None  # of a parameter adapted by its own name: how many of PEFT's wrappers lie around its own
    )

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    @abc.abstractmethod
    def check(self, config: Config) -> None:
        """Raise `ConfigError` if the configuration asks for anything that would not be honoured."""

    def on_parameter(self, depth: int) -> Method:
        """The method for a parameter that `target_parameters` names; `ConfigError` if it is for modules only."""
        raise ConfigError(f"target_parameters: {self.peft_type} adapts modules only")

    @abc.abstractmethod
    def tensors(self, config: Any, site: Match, modules: Modules) -> tuple[MethodTensor, ...]:
        """The tensors kept at a site that stands for these PyTorch modules."""

    @abc.abstractmethod
    def hparams(self, config: Any, site: Match, modules: Modules) -> Hashable:
        """What the arithmetic at the site needs besides arrays; what differs between entries as `PerEntry`."""

    @abc.abstractmethod
    def fresh(self, config: Any, tensor: MethodTensor, fan_in: int) -> Draw:
        """How one tensor begins; a fresh adapter leaves the model's output unchanged."""

    def from_base(self, static: Any, params: Params, axes: Axes, w: Array) -> dict[str, Array]:
        """Initial values of the tensors marked `from_base`, in w's dtype, from the weight and the other tensors."""
        return {}

    def input(self, static: Any, params: Params, use: Use, x: Array) -> Array:
        """`x` as the contraction should see it."""
        return x

    def follows(self, static: Any, primitive: str) -> bool:
        """Whether `output` takes part in this operation (no matrix product) of the weight; else `weight` is asked."""
        return False

    def forward(self, static: Any) -> bool:
        """Whether the module's call must have a product over the weight's inputs, if it has any.

        A table may not take outputs for inputs; but PEFT takes some parameters of experts so, and copies have no sides.
        """
        return self.wrapper_depth is None and not self.copies

    def apart(self, static: Any) -> bool:
        """Whether `output` must see the product alone, before the layer adds its bias."""
        return False

    @abc.abstractmethod
    def output(
        self, static: Any, params: Params, use: Use | Operation, x: Array, y: Array, drop: Drop | None, w: Array
    ) -> Array:
        """`y` as the use should return it, in y's dtype.

        Args:
            x: what `input` returned.
            drop: this call's dropout, if any.
            w: the base weight.
        """

    @abc.abstractmethod
    def weight(self, static: Any, params: Params, axes: Axes, w: Array) -> Array:
        """The effective weight, in w's dtype; `axes.parts` is already resolved (w holds those parts only)."""

    def merged(self, static: Any, params: Params, axes: Axes, w: Array) -> Array:
        """The same, to be made once and kept: nothing is differentiated."""
        return self.weight(static, params, axes, w)

    @abc.abstractmethod
    def unweight(self, static: Any, params: Params, axes: Axes, w: Array) -> Array:
        """The base weight from an effective one: the inverse of `weight`, within rounding.

        Raises `AttachError` where the effective weight has kept too little of the base for that.
        """

    def scales_bias(self, static: Any) -> bool:
        """Whether `bias` changes the layer's bias (IA3 scales the whole output, bias included)."""
        return False

    def bias(self, static: Any, params: Params, bias: Array) -> Array:
        """The layer's bias as the adapter leaves it."""
        return bias

    def unbias(self, static: Any, params: Params, bias: Array) -> Array:
        """The inverse of `bias`."""
        return bias

    def adds_bias(self, static: Any) -> bool:
        """Whether `output` adds a bias of the adapter's own, which a merge has to put into the layer's."""
        return False

    def merged_bias(self, static: Any, params: Params, bias: Array, sign: int) -> Array:
        """The layer's bias with the adapter's own in it (or out of it again, with sign -1)."""
        return bias

    def role(self, static: Any, tensor: str) -> str:
        """What one of its tensors is in training (`optim.roles`)."""
        return self.roles.get(tensor, "other")

    def dropout(self, static: Any) -> float:
        """The dropout rate of the site; 0 for methods that have none."""
        return 0.0


def as_computable(x: Array) -> Array:
    """`x`, or a float of 8 bits in float32: JAX promotes none so narrow by itself."""
    narrow = x.dtype.itemsize == 1 and jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype("float32") if narrow else x


def at_least_float32(x: Array) -> Array:
    """At least float32."""
    x = as_computable(x)
    return x.astype(jnp.promote_types(x.dtype, "float32"))


def shared_value(what: str, values: Mapping[str, Any]) -> Any:
    """The value that all modules of one leaf share, where its arithmetic can have only one."""
    distinct = sorted({repr(v) for v in values.values()})
    if len(distinct) > 1:
        listed = ", ".join(f"{m}: {v}" for m, v in list(values.items())[:4])
        raise ConfigError(
            f"{what} differs inside one stacked or fused leaf ({listed}, …), which has one computation for all;"
            " use an unrolled model, or one value for these modules"
        )
    return next(iter(values.values()))


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedMethod:
    """One adapter on one weight, ready to run: what `trace.rewrite` and the layers call.

    Handles partly targeted fused weights, so methods only ever see whole ones.
    """

    method: Method
    hparams: Any
    params: Params
    axes: Axes
    drop: Drop | None = None

    @property
    def replaces(self) -> bool:
        return self.method.replaces

    def map(self, change: Callable[[AppliedMethod], AppliedMethod]) -> AppliedMethod:
        return change(self)

    def input(self, use: Use, x: Array) -> Array:
        return self._on_parts(use.x, x, lambda x: self.method.input(self.hparams, self.params, use, x), use)

    def follows(self, primitive: str) -> bool:
        return self.axes.parts is None and self.method.follows(self.hparams, primitive)

    @property
    def forward(self) -> bool:
        return self.method.forward(self.hparams)

    @property
    def apart(self) -> bool:
        return self.method.apart(self.hparams)

    def output(self, use: Use | Operation, x: Array, y: Array, w: Array) -> Array:
        if isinstance(use, Operation):
            return self.method.output(self.hparams, self.params, use, x, y, self.drop, w)
        if self.axes.parts is not None:
            where = self._where(use.x, use)
            x = x if where is None else x[where]
            w = w[self._parts]

        def changed(y: Array) -> Array:
            return self.method.output(self.hparams, self.params, use, x, y, self.drop, w)

        return self._on_parts(use.y, y, changed, use)

    def weight(self, w: Array) -> Array:
        if self.drop is not None:
            raise AttachError(
                "dropout was asked for where the weight is used in a way that only the effective weight can follow;"
                " set lora_dropout=0.0, or leave this layer out with exclude_modules"
            )
        if self.method.adds_bias(self.hparams):
            raise AttachError(
                "lora_bias was asked for where the weight is used in a way that only the effective weight can follow,"
                " which has no place for it; leave this layer out with exclude_modules"
            )
        return self._whole(w, self.method.weight)

    def merged(self, w: Array) -> Array:
        """The effective weight for a merge, which puts a bias of the adapter's own elsewhere."""
        return self._whole(w, self.method.merged)

    def unweight(self, w: Array) -> Array:
        return self._whole(w, self.method.unweight)

    def from_base(self, w: Array) -> dict[str, Array]:
        axes = dataclasses.replace(self.axes, parts=None)
        w = as_computable(w if self.axes.parts is None else w[self._parts])
        return self.method.from_base(self.hparams, self.params, axes, w)

    def bias(self, bias: Array) -> Array:
        return self.method.bias(self.hparams, self.params, bias)

    def merged_bias(self, bias: Array, sign: int) -> Array:
        """The bias for a merge (1) or out of one (-1)."""
        if self.method.adds_bias(self.hparams):
            return self.method.merged_bias(self.hparams, self.params, bias, sign)
        change = self.method.bias if sign > 0 else self.method.unbias
        return change(self.hparams, self.params, bias)

    def _whole(self, w: Array, change: Callable[..., Array]) -> Array:
        axes = dataclasses.replace(self.axes, parts=None)
        if self.axes.parts is None:
            return change(self.hparams, self.params, axes, as_computable(w)).astype(w.dtype)
        where = self._parts
        new = change(self.hparams, self.params, axes, as_computable(w[where])).astype(w.dtype)
        if isinstance(w, np.ndarray):
            w = w.copy()
            w[where] = new
            return w
        return w.at[where].set(new)

    @property
    def _parts(self) -> tuple[Any, ...]:
        """The adapted parts as an index into the weight."""
        return (slice(None),) * self.axes.batch_axes[0] + (np.array(self.axes.parts),)

    def _where(self, letters: str, use: Use) -> tuple[Any, ...] | None:
        letter = use.w[self.axes.batch_axes[0]]
        if letter not in letters:
            return None
        return (slice(None),) * letters.index(letter) + (np.array(self.axes.parts),)

    def _on_parts(self, letters: str, value: Array, change: Callable[[Array], Array], use: Use) -> Array:
        where = None if self.axes.parts is None else self._where(letters, use)
        return change(value) if where is None else value.at[where].set(change(value[where]))


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedMethods:
    """Several adapters active on one weight: inputs in order, then outputs in order."""

    hooks: tuple[AppliedMethod, ...]

    @property
    def axes(self) -> Axes:
        return self.hooks[0].axes

    def map(self, change: Callable[[AppliedMethod], AppliedMethod]) -> AppliedMethods:
        return AppliedMethods(tuple(change(hook) for hook in self.hooks))

    @property
    def replaces(self) -> bool:
        return all(hook.replaces for hook in self.hooks)

    def input(self, use: Use, x: Array) -> Array:
        for hook in self.hooks:
            x = hook.input(use, x)
        return x

    def follows(self, primitive: str) -> bool:
        return all(hook.follows(primitive) for hook in self.hooks)

    @property
    def forward(self) -> bool:
        return any(hook.forward for hook in self.hooks)

    @property
    def apart(self) -> bool:
        return any(hook.apart for hook in self.hooks)

    def output(self, use: Use | Operation, x: Array, y: Array, w: Array) -> Array:
        for hook in self.hooks:
            y = hook.output(use, x, y, w)
        return y

    def weight(self, w: Array) -> Array:
        for hook in self.hooks:
            w = hook.weight(w)
        return w

    def bias(self, bias: Array) -> Array:
        for hook in self.hooks:
            bias = hook.bias(bias)
        return bias


def refuse_rivals(leaves: Mapping[str, Mapping[str, Method]]) -> None:
    """Raise if several active adapters each put something of their own in one leaf's place.

    Args:
        leaves: `{leaf: {adapter: method}}` of the active adapters.
    """
    rivals = {leaf: [n for n, m in at.items() if m.copies] for leaf, at in leaves.items()}
    lines = [f"{leaf}: {', '.join(those)}" for leaf, those in rivals.items() if len(those) > 1]
    if lines:
        raise AttachError(
            "several of these adapters hold a full copy of one weight, and only one can stand in its place:\n"
            + paths.bullets(lines)
            + "\nActivate one of them"
        )


def check_biases(hooks: Iterable[AppliedMethod | AppliedMethods], others: Mapping[str, Array]) -> None:
    """Refuse a custom layer whose bias has another name than "bias", where a method scales biases (IA3).

    `others` are the layer's further parameters. One of the vector's size may be added to the output, and
    would then have to be scaled with it; nothing tells.
    """
    for hook in hooks:
        for name, value in others.items():
            try:
                touched = hook.bias(value) is not value
            except AttachError:
                continue  # of another size: no bias of this output
            if touched:
                raise AttachError(
                    f"its parameter {name!r} has the size of the output: a bias must be called 'bias' to be scaled with"
                    " it; leave the layer out, or make it a feedforward module"
                )
