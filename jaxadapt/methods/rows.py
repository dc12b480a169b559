"""One method on one weight where each row of a batch has an adapter of its own.

The tensors have a leading axis of rows, and the method runs under `jax.vmap`, so no method has code for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxadapt.arrays.axes import Operation, Use
from jaxadapt.core.errors import AttachError
from jaxadapt.methods.applied import AppliedMethod, AppliedMethods
from jaxadapt.methods.base import Array, Params

Hook = AppliedMethod | AppliedMethods


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedRows(AppliedMethod):
    """A method whose tensors have a leading axis: one adapter for each row of the batch.

    The rows are the first axis of the layer's input. Raises `AttachError` where the layer does not see them.

    Attributes:
        shared: the tensors without such an axis, which all rows have in common.
    """

    shared: Params = dataclasses.field(default_factory=dict[str, Array])

    @property
    def by_weight(self) -> bool:
        return False

    @property
    def tensors(self) -> Params:
        """The method's own tensors, all with a leading axis of rows."""
        return self.params

    def input(self, use: Use, x: Array) -> Array:
        row, inner = self._without_rows(use, x)
        axis = use.x.index(row)
        return jax.vmap(lambda params, x: self._one(params).input(inner, x), in_axes=(0, axis), out_axes=axis)(
            self.params, x
        )

    def output(self, use: Use | Operation, x: Array, y: Array, w: Array) -> Array:
        use = self._require_product(use)
        row, inner = self._without_rows(use, x)
        axes = use.x.index(row), use.y.index(row)

        def change(params: Params, x: Array, y: Array) -> Array:
            return self._one(params).output(inner, x, y, w)

        return jax.vmap(change, in_axes=(0, *axes), out_axes=axes[1])(self.params, x, y)

    def follows(self, primitive: str) -> bool:
        return False

    def follows_use(self, use: Use) -> bool:
        return self._one(self.tensors).follows_use(use)

    def weight(self, w: Array) -> Array:
        raise self._refuse(
            "the model uses this weight outside a supported product, so it must be the same for all rows"
        )

    def bias(self, bias: Array) -> Array:
        """Return the bias unchanged, unless the method changes it and it has the size of this output."""
        if self.effects.bias != "scales":
            return bias
        one = self._one(jax.tree.map(lambda x: x[0], self.tensors))
        if one.bias(bias) is not bias:
            raise self._refuse("the method changes the bias, but the layer adds the bias itself")
        return bias

    def _one(self, params: Params) -> AppliedMethod:
        """Return the method of one row."""
        return AppliedMethod(self.method, self.hparams, {**params, **self.shared}, self.axes)

    def _without_rows(self, use: Use, x: Array) -> tuple[str, Use]:
        """Return the letter of the rows in a use, and the use of one row."""
        rows = jax.tree.leaves(self.tensors)[0].shape[0]
        row = use.x[0]
        if row in use.w or row not in use.y or x.shape[0] != rows:
            raise self._refuse(
                f"the layer's input has shape {list(x.shape)}, and its first axis is not the {rows} rows"
            )
        return row, dataclasses.replace(use, x=use.x.replace(row, ""), y=use.y.replace(row, ""))

    def _require_product(self, use: Use | Operation) -> Use:
        if isinstance(use, Operation):
            raise self._refuse("the layer uses the weight in an operation that is not a matrix product")
        return use

    def _refuse(self, problem: str) -> AttachError:
        return AttachError(
            f"cannot apply another {self.method.peft_type} in each row: {problem}. Exclude the layer from the bank, or"
            " merge the adapter"
        )


WEIGHTS = "~weights"
"""The tensor of a route with the weights of each row's adapters."""


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedMixture(AppliedRows):
    """A method that adds to the output, with several adapters a row, (rows, adapters, …), and `WEIGHTS` for them."""

    @property
    def tensors(self) -> Params:
        return {name: x for name, x in self.params.items() if name != WEIGHTS}

    def input(self, use: Use, x: Array) -> Array:
        return x

    def output(self, use: Use | Operation, x: Array, y: Array, w: Array) -> Array:
        use = self._require_product(use)
        row, inner = self._without_rows(use, x)
        axes = use.x.index(row), use.y.index(row)

        def change(params: Params, weights: Array, x: Array, y: Array) -> Array:
            zeros = jnp.zeros(y.shape, jnp.promote_types(y.dtype, jnp.float32))
            changes = jax.vmap(lambda params: self._one(params).output(inner, x, zeros, w))(params)
            return (y + jnp.tensordot(weights.astype(changes.dtype), changes, 1)).astype(y.dtype)

        mapped = jax.vmap(change, in_axes=(0, 0, *axes), out_axes=axes[1])
        return mapped(self.tensors, self.params[WEIGHTS], x, y)


def split_rows(hooks: Mapping[str, Hook]) -> tuple[dict[str, Hook], dict[str, Hook]]:
    """Separate the methods of one layer into those to apply to its whole call, and those to apply inside.

    If a method needs the product without the bias (DoRA), the layer is rewritten, and a bias is then the same for all
    rows. Other rows may scale it (IA3), so these act on the finished output.
    """
    outer: dict[str, Hook] = {}
    inner: dict[str, Hook] = {}
    for leaf, hook in hooks.items():
        each = hook.hooks if isinstance(hook, AppliedMethods) else (hook,)
        outside = [one for one in each if hook.apart and isinstance(one, AppliedRows) and not one.apart]
        for part, chosen in ((outer, outside), (inner, [one for one in each if one not in outside])):
            if chosen:
                part[leaf] = chosen[0] if len(chosen) == 1 else AppliedMethods(tuple(chosen))
    return outer, inner
