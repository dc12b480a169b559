"""One method on one weight where each row of a batch, or each token, has an adapter of its own.

For rows, the tensors have a leading axis of rows, and the method runs under `jax.vmap`, so no method has code for it.

For tokens that choose among all slots of a bank, the tensors have a leading axis of slots. `AppliedMask` computes every
slot for every token, so its cost grows with the slots. `AppliedSegments` sorts the tokens by slot and calls a grouped
product, such as `lax.ragged_dot`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.arrays.products import LETTERS, RANK, Operation, Use, einsum, expand_to_letters
from jaxadapt.core.errors import AttachError
from jaxadapt.methods.applied import Applicable, AppliedMethod, AppliedMethods, together
from jaxadapt.methods.base import Array, Params

# ---------------------------------------------------------------- rows


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
                part[leaf] = together(chosen)
    return outer, inner


# ---------------------------------------------------------------- slots


Grouped = Callable[[Array, Array, Array], Array]
"""A grouped product with the signature of `jax.lax.ragged_dot`: (lhs, rhs, group_sizes)."""

Implementation = str | Grouped
"""The way in which rows take adapters: "gather", "layer", "mixture", "mask", or a grouped product for sorted rows."""

IDS, ORDER, INVERSE, SIZES = "~ids", "~order", "~inverse", "~sizes"
"""The tensors of a route: the slot of each row or token, their order by slot, its inverse, and each slot's number."""


def apply_rows(site: Applicable, how: Implementation, params: Params, shared: Params) -> AppliedRows:
    """Return a site's method where each row, or token, of a batch has an adapter of its own.

    `shared` are the tensors that all rows have in common.
    """
    kinds: Mapping[Any, type[AppliedRows]] = {"mixture": AppliedMixture, "mask": AppliedMask}
    if how == "gather":
        params = {name: jnp.moveaxis(x, 1, -1) if name in site.method.row_turned else x for name, x in params.items()}
    if how == "layer":
        params = {name: take_slots(x, params[IDS], 0) for name, x in params.items() if name != IDS}
    if callable(how):
        return AppliedSegments(site.method, site.hparams, params, site.axes, shared=shared, grouped=how)
    return kinds.get(how, AppliedRows)(site.method, site.hparams, params, site.axes, shared=shared)


def take_slots(x: Array, ids: Array, axis: int) -> Array:
    """Return the slots of these ids, with the axes of `ids` in place of `axis`; NaN where an id is no slot."""
    # JAX would take -1 for the last slot. An index that is too large gives NaN.
    return jnp.take(x, jnp.where(ids < 0, x.shape[axis], ids), axis, mode="fill", fill_value=jnp.nan)


def sort_ids(ids: Array, slots: int) -> dict[str, Array]:
    """Return `ORDER`, `INVERSE` and `SIZES` of the ids of a batch; an id that is no slot counts as slot 0."""
    flat = jnp.where((ids >= 0) & (ids < slots), ids, 0).reshape(-1)
    order = jnp.argsort(flat)
    return {ORDER: order, INVERSE: jnp.argsort(order), SIZES: jnp.bincount(flat, length=slots).astype(jnp.int32)}


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedMask(AppliedRows):
    """A method with the tensors of all slots, and `IDS` of shape (rows) or (rows, time); NaN where an id is no slot.

    A low-rank pair is one product with the ranks of all slots side by side, masked. Other methods take one slot after
    another.
    """

    @property
    def tensors(self) -> Params:
        return {name: x for name, x in self.params.items() if not name.startswith("~")}

    def input(self, use: Use, x: Array) -> Array:
        if self._pair is not None:
            return x
        self._letters(use, x)
        return self._choose(use.x, x, lambda one: one.input(use, x), use)

    def output(self, use: Use | Operation, x: Array, y: Array, w: Array) -> Array:
        use = self._require_product(use)
        letters = self._letters(use, x)
        if self._pair is None or self.axes.parts is not None or use.transposed:
            return self._choose(use.y, y, lambda one: one.output(use, x, y, w), use)
        (scale, a, b), is_right = self._finite_pair()
        slot = next(c for c in reversed(LETTERS) if c not in use.x + use.w + use.y)
        batch, inputs, out = use.letters("batch"), use.letters("in"), use.letters("out")
        mid = "".join(c for c in use.y if c not in out) + "".join(c for c in batch if c not in use.y) + slot + RANK
        h = einsum(f"{use.x},{slot}{batch}{RANK}{inputs}->{mid}", x.astype(a.dtype), a)
        numbers = jnp.arange(len(scale)).reshape(*[1] * self._ids.ndim, -1)
        chosen = (self._ids[..., None] == numbers).astype(h.dtype)
        chosen = jnp.where(is_right[..., None], chosen, jnp.nan)
        h = h * expand_to_letters(scale.astype(h.dtype), slot + batch, mid)
        h = h * expand_to_letters(chosen, letters + slot, mid)
        return (y + einsum(f"{mid},{slot}{batch}{out}{RANK}->{use.y}", h, b)).astype(y.dtype)

    @property
    def _ids(self) -> Array:
        return self.params[IDS]

    @property
    def _slots(self) -> int:
        return jax.tree.leaves(self.tensors)[0].shape[0]

    @property
    def _valid(self) -> Array:
        return (self._ids >= 0) & (self._ids < self._slots)

    @property
    def _pair(self) -> tuple[Array, Array, Array] | None:
        return self.method.row_pair(self.hparams, self.tensors)

    def _finite_pair(self) -> tuple[tuple[Array, Array, Array], Array]:
        """Return the pair with zeros in slots that are not finite, and True for each token of an existing finite slot.

        A product over all slots would carry NaN and infinities, as 0 · NaN, to the tokens of other slots.
        """
        pair = self._pair
        assert pair is not None
        finite = jnp.stack([jnp.isfinite(x).reshape(len(x), -1).all(1) for x in pair]).all(0)
        scale, a, b = (jnp.where(finite.reshape(-1, *[1] * (x.ndim - 1)), x, 0) for x in pair)
        return (scale, a, b), self._valid & jnp.take(finite, self._ids, mode="clip")

    def _letters(self, use: Use, x: Array) -> str:
        """Return the letters of the axes of `IDS`; raise `AttachError` if the input does not begin with these axes."""
        count = self._ids.ndim
        letters = use.x[:count]
        if x.shape[:count] != self._ids.shape or set(letters) & set(use.w) or not set(letters) <= set(use.y):
            kind = "rows" if count == 1 else "rows and tokens"
            raise self._refuse(
                f"the layer's input has shape {list(x.shape)}, and its first axes are not the {kind}"
                f" {list(self._ids.shape)}"
            )
        return letters

    def _choose(self, over: str, value: Array, change: Callable[[AppliedMethod], Array], use: Use) -> Array:
        """Return for each token the result of its slot's method, computed for one slot after another."""
        ids = expand_to_letters(self._ids, use.x[: self._ids.ndim], over)

        def step(chosen: Array, slot: tuple[Array, Params]) -> tuple[Array, None]:
            number, params = slot
            return jnp.where(ids == number, change(self._one(params)).astype(chosen.dtype), chosen), None

        start = jnp.full_like(value, jnp.nan)
        return jax.lax.scan(step, start, (jnp.arange(self._slots), self.tensors))[0]


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedSegments(AppliedMask):
    """Low-rank pairs of all slots, for tokens that are sorted by slot once for the whole batch."""

    grouped: Grouped = jax.lax.ragged_dot

    def input(self, use: Use, x: Array) -> Array:
        return x

    def output(self, use: Use | Operation, x: Array, y: Array, w: Array) -> Array:
        use = self._require_product(use)
        if use.transposed or use.axes.batch_axes or self._pair is None:
            raise self._refuse(
                "sorted segments are for low-rank pairs of one matrix, without fused parts. Use implementation='gather'"
                " or 'mask'"
            )
        (scale, a, b), is_right = self._finite_pair()
        letters, inputs, out = self._letters(use, x), use.letters("in"), use.letters("out")
        rest = "".join(c for c in use.x if c not in letters + inputs)
        sizes = dict(zip(use.x, x.shape, strict=True)) | dict(zip(use.y, y.shape, strict=True))
        count, each = self._ids.size, math.prod(sizes[c] for c in rest)
        x = x.transpose([use.x.index(c) for c in letters + rest + inputs]).astype(a.dtype)
        x = jnp.take(x.reshape(count, -1), self.params[ORDER], 0).reshape(count * each, -1)
        a = a.reshape(*a.shape[:2], -1) * scale[:, None, None].astype(a.dtype)
        b = b.reshape(len(b), -1, b.shape[-1])
        groups = self.params[SIZES] * each
        change = self.grouped(self.grouped(x, a.swapaxes(1, 2), groups), b.swapaxes(1, 2), groups)
        front = letters + rest + out
        change = jnp.take(change.reshape(count, -1), self.params[INVERSE], 0).reshape([sizes[c] for c in front])
        change = change.transpose([front.index(c) for c in use.y])
        return jnp.where(expand_to_letters(is_right, letters, use.y), y + change, jnp.nan).astype(y.dtype)
