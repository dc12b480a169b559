"""The method interface: pure functions over the axis roles of one weight, independent of files and Flax.

A method defines the tensors of a site (`tensors`), their initial values (`fresh`), and their effect on one contraction
of the weight (`input`, `output`) or on the weight itself (`weight`). Keys, transposes, sharding, attaching and merging
follow from these.
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
    """One adaptation method. Stateless: every value it needs is an argument.

    The `hparams` of a site are the hyperparameters of its arithmetic (a scale, a flag). They are hashable and are
    computed once a site, from the configuration only.

    Attributes:
        peft_type: PEFT's name of the method.
        kinds: the kinds of weight (`Weight.kind`) that it adapts.
        roles: `{tensor: role in training}`; `optim.roles` lists the roles.
        scaled: the tensors to multiply in order to multiply the change of the weight.
        copies: True if the adapter stores a full or partial copy of the weight.
        replaces: True if the copy replaces the weight in every use; only `weight` is then called.
        wrapper_depth: nesting depth of PEFT's ParamWrapper, when the weight is adapted through target_parameters.
        scope: "site" if each tensor belongs to one weight; "model" if all belong to the whole adapter.
    """

    peft_type: str
    kinds: frozenset[str] = frozenset({"linear"})
    roles: Mapping[str, str] = MappingProxyType({})
    scaled: frozenset[str] = frozenset()
    copies: bool = False
    replaces: bool = False
    wrapper_depth: int | None = None
    scope: str = "site"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    @abc.abstractmethod
    def check(self, config: Config) -> None:
        """Raise `ConfigError` if the configuration sets a field that the method would ignore."""

    def on_parameter(self, depth: int) -> Method:
        """Return the method for a parameter in `target_parameters`; raise `ConfigError` if it adapts modules only."""
        raise ConfigError(f"target_parameters: {self.peft_type} adapts modules only; use target_modules")

    @abc.abstractmethod
    def tensors(self, config: Any, match: Match, modules: Modules) -> tuple[MethodTensor, ...]:
        """Return the tensors of a site that corresponds to these PyTorch modules."""

    @abc.abstractmethod
    def hparams(self, config: Any, match: Match, modules: Modules) -> Hashable:
        """Return the hyperparameters of a site; values that differ between its entries are `PerEntry`."""

    @abc.abstractmethod
    def fresh(self, config: Any, tensor: MethodTensor, fan_in: int) -> Draw:
        """Return the initial distribution of one tensor; a fresh adapter leaves the model's output unchanged."""

    def from_base(self, hparams: Any, params: Params, axes: Axes, w: Array) -> dict[str, Array]:
        """Return initial values of the tensors marked `from_base`, in w's dtype, from w and the other tensors."""
        return {}

    def input(self, hparams: Any, params: Params, use: Use, x: Array) -> Array:
        """Return the input that the contraction should get in place of `x`."""
        return x

    def follows(self, hparams: Any, primitive: str) -> bool:
        """Return True if `output` handles this primitive, which is not a matrix product; else `weight` is used."""
        return False

    def forward(self, hparams: Any) -> bool:
        """Return True if the products of the module's call, if any, must include one over the weight's inputs.

        This detects a keymap that confuses inputs and outputs. Parameters of experts are exempt, because PEFT itself
        swaps the two for some of them. Copies are exempt, because they have neither.
        """
        return self.wrapper_depth is None and not self.copies

    def apart(self, hparams: Any) -> bool:
        """Return True if `output` must get the product before the layer adds its bias."""
        return False

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

    def scales_bias(self, hparams: Any) -> bool:
        """Return True if `bias` changes the layer's bias (IA3 scales the output, bias included)."""
        return False

    def bias(self, hparams: Any, params: Params, bias: Array) -> Array:
        """Return the layer's bias as the adapter changes it."""
        return bias

    def unbias(self, hparams: Any, params: Params, bias: Array) -> Array:
        """Return the layer's original bias: the inverse of `bias`."""
        return bias

    def adds_bias(self, hparams: Any) -> bool:
        """Return True if `output` adds a bias of the adapter, which a merge must add to the layer's bias."""
        return False

    def merged_bias(self, hparams: Any, params: Params, bias: Array, sign: int) -> Array:
        """Return the layer's bias with the adapter's bias added (sign 1) or subtracted (sign -1)."""
        return bias

    def role(self, hparams: Any, tensor: str) -> str:
        """Return the role of a tensor in training; `optim.roles` lists the roles."""
        return self.roles.get(tensor, "other")

    def dropout(self, hparams: Any) -> float:
        """Return the dropout rate of the site; 0 for methods without dropout."""
        return 0.0


def as_computable(x: Array) -> Array:
    """Cast 8-bit floats to float32, because JAX does not promote them implicitly; return other arrays as they are."""
    narrow = x.dtype.itemsize == 1 and jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype("float32") if narrow else x


def at_least_float32(x: Array) -> Array:
    """Cast to float32, or keep a wider dtype."""
    x = as_computable(x)
    return x.astype(jnp.promote_types(x.dtype, "float32"))


def require_weights(method: Method) -> None:
    """Raise `AttachError` if a method changes no weights, so that its adapters cannot be merged or converted."""
    if method.scope == "model":
        raise AttachError(
            f"{method.peft_type} adds virtual tokens to the input and changes no weight, so it cannot be merged,"
            " combined or converted to LoRA. Keep the adapter beside the model"
        )


def shared_value(field: str, values: Mapping[str, Any]) -> Any:
    """Return the one value that all modules of a leaf share; raise `ConfigError` if they differ."""
    distinct = sorted({repr(v) for v in values.values()})
    if len(distinct) > 1:
        listed = ", ".join(f"{m}: {v}" for m, v in list(values.items())[:4])
        raise ConfigError(
            f"{field} differs between the modules of one stacked or fused leaf ({listed}, …), but they share one"
            " computation. Use an unrolled model, or the same value for these modules"
        )
    return next(iter(values.values()))


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedMethod:
    """One adapter on one weight, ready to run; `tracing.rewrite` and the layers call it.

    It resolves partly targeted fused weights, so that a method only gets the parts it adapts.
    """

    method: Method
    hparams: Any
    params: Params
    axes: Axes
    drop: Drop | None = None

    @property
    def replaces(self) -> bool:
        return self.method.replaces

    def map(self, function: Callable[[AppliedMethod], AppliedMethod]) -> AppliedMethod:
        return function(self)

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
            index = self._parts_index(use.x, use)
            x = x if index is None else x[index]
            w = w[self._parts]

        def changed(y: Array) -> Array:
            return self.method.output(self.hparams, self.params, use, x, y, self.drop, w)

        return self._on_parts(use.y, y, changed, use)

    def weight(self, w: Array) -> Array:
        if self.drop is not None:
            raise AttachError(
                "cannot apply dropout: the model uses this weight outside a supported product, where only an effective"
                " weight can replace it. Set lora_dropout=0.0, or exclude this layer with exclude_modules"
            )
        if self.method.adds_bias(self.hparams):
            raise AttachError(
                "cannot apply lora_bias: the model uses this weight outside a supported product, where only an"
                " effective weight can replace it, and that has no bias. Exclude this layer with exclude_modules"
            )
        return self._change_parts(w, self.method.weight)

    def merged(self, w: Array) -> Array:
        """Return the effective weight for a merge; the adapter's bias is in `merged_bias`."""
        return self._change_parts(w, self.method.merged)

    def unweight(self, w: Array) -> Array:
        return self._change_parts(w, self.method.unweight)

    def from_base(self, w: Array) -> dict[str, Array]:
        axes = dataclasses.replace(self.axes, parts=None)
        w = as_computable(w if self.axes.parts is None else w[self._parts])
        return self.method.from_base(self.hparams, self.params, axes, w)

    def bias(self, bias: Array) -> Array:
        return self.method.bias(self.hparams, self.params, bias)

    def merged_bias(self, bias: Array, sign: int) -> Array:
        """Return the layer's bias after a merge (sign 1), or before it (sign -1)."""
        if self.method.adds_bias(self.hparams):
            return self.method.merged_bias(self.hparams, self.params, bias, sign)
        function = self.method.bias if sign > 0 else self.method.unbias
        return function(self.hparams, self.params, bias)

    def _change_parts(self, w: Array, function: Callable[..., Array]) -> Array:
        axes = dataclasses.replace(self.axes, parts=None)
        if self.axes.parts is None:
            return function(self.hparams, self.params, axes, as_computable(w)).astype(w.dtype)
        index = self._parts
        new = function(self.hparams, self.params, axes, as_computable(w[index])).astype(w.dtype)
        if isinstance(w, np.ndarray):
            w = w.copy()
            w[index] = new
            return w
        return w.at[index].set(new)

    @property
    def _parts(self) -> tuple[Any, ...]:
        """The adapted parts, as an index into the weight."""
        return (slice(None),) * self.axes.batch_axes[0] + (np.array(self.axes.parts),)

    def _parts_index(self, letters: str, use: Use) -> tuple[Any, ...] | None:
        letter = use.w[self.axes.batch_axes[0]]
        if letter not in letters:
            return None
        return (slice(None),) * letters.index(letter) + (np.array(self.axes.parts),)

    def _on_parts(self, letters: str, value: Array, function: Callable[[Array], Array], use: Use) -> Array:
        index = None if self.axes.parts is None else self._parts_index(letters, use)
        return function(value) if index is None else value.at[index].set(function(value[index]))


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedMethods:
    """Several active adapters on one weight: `input` of each in order, then `output` of each in order."""

    hooks: tuple[AppliedMethod, ...]

    @property
    def axes(self) -> Axes:
        return self.hooks[0].axes

    def map(self, function: Callable[[AppliedMethod], AppliedMethod]) -> AppliedMethods:
        return AppliedMethods(tuple(function(hook) for hook in self.hooks))

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
    """Raise `AttachError` if several active adapters each replace the same leaf.

    Args:
        leaves: `{leaf: {adapter: method}}` of the active adapters.
    """
    rivals = {leaf: [name for name, m in methods.items() if m.copies] for leaf, methods in leaves.items()}
    conflicts = [f"{leaf}: {', '.join(adapters)}" for leaf, adapters in rivals.items() if len(adapters) > 1]
    if conflicts:
        raise AttachError(
            "cannot activate these adapters together: several hold a full copy of the same weight, and only one copy"
            " can replace it. Activate one of them:\n" + paths.bullets(conflicts)
        )


def check_biases(hooks: Iterable[AppliedMethod | AppliedMethods], others: Mapping[str, Array]) -> None:
    """Raise `AttachError` if a custom layer may have a bias under another name than "bias", for methods that scale it.

    `others` are the layer's other parameters. One with the size of the output may be added to the output, and IA3 would
    then have to scale it too; its name does not show that.
    """
    for hook in hooks:
        for name, value in others.items():
            try:
                changed = hook.bias(value) is not value
            except AttachError:
                continue  # another size, so it is not a bias of this output
            if changed:
                raise AttachError(
                    f"its parameter {name!r} has the size of the output, so it may be a bias, and only a parameter"
                    " called 'bias' is scaled with the output. Exclude the layer, or make it a feedforward module"
                )
