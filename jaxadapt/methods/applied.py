"""Methods ready to run: one adapter, or several, on one weight."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from jaxadapt.arrays.layout import Axes
from jaxadapt.arrays.products import Operation, Use
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.methods.base import CALL_KEY, Array, Drop, Effects, Method, Params, as_computable


class Applicable(Protocol):
    """A method on one base weight, without its tensors."""

    @property
    def method(self) -> Method: ...

    @property
    def hparams(self) -> Any: ...

    @property
    def axes(self) -> Axes: ...


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

    @classmethod
    def in_call(cls, site: Applicable, params: Params, drop: Drop | None) -> AppliedMethod:
        """Return a site's method for one call of its layer, with a key as a tensor if it drops parts of its change."""
        if drop is not None and site.method.drops == "change":
            params, drop = {**params, CALL_KEY: drop.make_key()}, None
        return cls(site.method, site.hparams, params, site.axes, drop)

    @functools.cached_property
    def effects(self) -> Effects:
        return self.method.effects(self.hparams)

    @property
    def by_weight(self) -> bool:
        """True if the layer must run with the effective weight."""
        return self.effects.form == "weight"

    @property
    def adds_to_base(self) -> bool:
        """True if the change is a sum, computed from the base weight or its output also beside other adapters."""
        return self.effects.weight == "adds" and self.effects.reads

    def map(self, function: Callable[[AppliedMethod], AppliedMethod]) -> AppliedMethod:
        return function(self)

    def input(self, use: Use, x: Array) -> Array:
        return self._on_parts(use.x, x, lambda x: self.method.input(self.hparams, self.params, use, x), use)

    def operand(self, use: Operation, x: Array, w: Array) -> Array:
        return self.method.operand(self.hparams, self.params, use, x, w)

    def follows(self, primitive: str) -> bool:
        return self.axes.parts is None and self.method.follows(self.hparams, primitive)

    def follows_use(self, use: Use) -> bool:
        return self.method.follows_use(self.hparams, use)

    @property
    def forward(self) -> bool:
        return self.method.forward(self.hparams)

    @property
    def apart(self) -> bool:
        """True if `output` must get the product before the layer adds its bias."""
        return self.effects.sees == "product"

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
                " weight can replace it. Set the dropout of the configuration to 0.0, or exclude this layer with"
                " exclude_modules"
            )
        if self.effects.bias == "adds" and not self.by_weight:
            raise AttachError(
                "cannot apply the bias of the adapter: the model uses this weight outside a supported product, where"
                " only an effective weight can replace it, and that has no bias. Exclude this layer with"
                " exclude_modules"
            )
        return self._change_parts(w, self.method.weight)

    def merged(self, w: Array) -> Array:
        """Return the effective weight for a merge; the adapter's bias is in `merged_bias`."""
        return self._change_parts(w, self.method.merged)

    def unweight(self, w: Array) -> Array:
        return self._change_parts(w, self.method.unweight)

    def part(self, w: Array) -> Array:
        """Return the adapted parts of a weight."""
        return as_computable(w if self.axes.parts is None else w[self._parts])

    def bias(self, bias: Array) -> Array:
        """Return the bias that the layer must use in a call; a bias that `output` adds is not in it."""
        if self.effects.bias == "adds" and not self.by_weight:
            return bias
        return self.method.bias(self.hparams, self.params, self.axes, bias)

    def merged_bias(self, bias: Array, sign: int = 1) -> Array:
        """Return the layer's bias after a merge (sign 1), or before it (sign -1)."""
        return self.method.bias(self.hparams, self.params, self.axes, bias, undo=sign < 0)

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


def together(hooks: Sequence[AppliedMethod]) -> AppliedMethod | AppliedMethods:
    """Return several active adapters on one weight, at least one, as one."""
    return hooks[0] if len(hooks) == 1 else AppliedMethods(tuple(hooks))


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedMethods:
    """Several active adapters on one weight.

    Each changes the result of the one before it; a copy of the weight comes before the others. The weight W becomes
    W·H₁·H₂, so the input goes through H₂ first. Outputs change in order.
    """

    hooks: tuple[AppliedMethod, ...]

    @property
    def axes(self) -> Axes:
        return self.hooks[0].axes

    def map(self, function: Callable[[AppliedMethod], AppliedMethod]) -> AppliedMethods:
        return AppliedMethods(tuple(function(hook) for hook in self.hooks))

    @property
    def by_weight(self) -> bool:
        return all(hook.by_weight for hook in self.hooks) or any(_replaces(hook) for hook in self.hooks)

    @property
    def _weight_order(self) -> tuple[AppliedMethod, ...]:
        """The adapters in the order in which they change the weight."""
        return weight_order([(_replaces(hook), hook.effects, hook) for hook in self.hooks])

    def input(self, use: Use, x: Array) -> Array:
        for hook in reversed(self._weight_order):
            x = hook.input(_with_axes(use, hook.axes), x)
        return x

    def operand(self, use: Operation, x: Array, w: Array) -> Array:
        for hook in reversed(self._weight_order):
            x = hook.operand(_with_axes(use, hook.axes), x, w)
        return x

    def follows(self, primitive: str) -> bool:
        return all(hook.follows(primitive) for hook in self.hooks)

    def follows_use(self, use: Use) -> bool:
        return all(hook.follows_use(use) for hook in self.hooks)

    @property
    def forward(self) -> bool:
        return any(hook.forward for hook in self.hooks)

    @property
    def apart(self) -> bool:
        has_bias = any(hook.by_weight and hook.effects.bias for hook in self.hooks)
        return has_bias or any(hook.apart for hook in self.hooks)

    def output(self, use: Use | Operation, x: Array, y: Array, w: Array) -> Array:
        base = y
        for hook in self.hooks:
            own = _with_axes(use, hook.axes)
            y = y + (hook.output(own, x, base, w) - base) if hook.adds_to_base else hook.output(own, x, y, w)
        return y

    def weight(self, w: Array) -> Array:
        base = w
        for hook in self._weight_order:
            w = w + (hook.weight(base) - base) if hook.adds_to_base else hook.weight(w)
            base = w if _replaces(hook) else base
        return w

    def bias(self, bias: Array) -> Array:
        for hook in self.hooks:
            bias = hook.bias(bias)
        return bias


def _replaces(hook: AppliedMethod) -> bool:
    """Return True for a copy that the layer runs with in place of its weight."""
    return hook.method.copies and hook.by_weight


_T = TypeVar("_T")


def weight_order(changes: Sequence[tuple[bool, Effects, _T]]) -> tuple[_T, ...]:
    """Return adapters in the order in which they change one weight, from (True for a copy of it, effects, adapter).

    Copies come first. Where all others turn the input, the last of them comes next.
    """
    others = [(effects.order, each) for is_copy, effects, each in changes if not is_copy]
    if all(order == "input" for order, _ in others):
        others.reverse()
    return (*(each for is_copy, _, each in changes if is_copy), *(each for _, each in others))


_AnyUse = TypeVar("_AnyUse", bound=Use | Operation)


def _with_axes(use: _AnyUse, axes: Axes) -> _AnyUse:
    """Return a use with the axes of one of several methods, which have the layouts of that method's tensors."""
    return use if use.axes is axes else dataclasses.replace(use, axes=axes)


def refuse_rivals(leaves: Mapping[str, Mapping[str, Method]]) -> None:
    """Raise `AttachError` if several active adapters each replace the same leaf, or the same rows of it.

    Args:
        leaves: `{leaf: {adapter: method}}` of the active adapters.
    """
    conflicts: list[str] = []
    for leaf, methods in leaves.items():
        copies = {name: method for name, method in methods.items() if method.copies}
        pairs = itertools.combinations([m.replaced_rows for m in copies.values()], 2)
        if any(one is None or other is None or not one.isdisjoint(other) for one, other in pairs):
            conflicts.append(f"{leaf}: {', '.join(copies)}")
    raise_listed(
        AttachError,
        "cannot activate these adapters together: several hold a copy of the same weight, or of the same rows of it,"
        " and only one copy can replace it. Activate one of them:",
        conflicts,
    )


def check_biases(hooks: Iterable[AppliedMethod | AppliedMethods], others: Mapping[str, Array]) -> None:
    """Raise `AttachError` if a custom layer may have a bias under another name than "bias", for methods that scale it.

    `others` are the layer's other parameters. One with the size of the output may be added to the output, and the
    method would then have to scale it too; its name does not show that.
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
