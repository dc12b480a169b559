"""The rows of a batch, from a bank and the ids of slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.methods import Implementation
from jaxadapt.methods.rows import IDS, WEIGHTS, sort_ids, take_slots
from jaxadapt.models.row_sites import Rows
from jaxadapt.serving.layout import Place, Tensors

if TYPE_CHECKING:
    from jaxadapt.serving.bank import Bank

_NAMES = ("gather", "layer", "mask", "sorted")


def select(bank: Bank, ids: Any, weights: Any, implementation: Implementation | None) -> Rows:
    """Return the result of `Bank.select`."""
    ids = _as_int32(ids, bank.slots)
    if ids.ndim not in (1, 2) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise AttachError(
            "ids: expected integers of shape (rows) or (rows, time), or (rows, adapters) with weights, found"
            f" {ids.dtype} of shape {list(ids.shape)}"
        )
    if implementation is not None and implementation not in _NAMES and not callable(implementation):
        raise AttachError(
            f"implementation: expected one of {', '.join(_NAMES)} or a function, found {implementation!r}"
        )
    layout = bank.layout
    if weights is not None:
        mixed = _mix(bank, ids, _check_mixture(bank, ids, weights, implementation))
        return Rows(mixed, layout.rows, "mixture", bank.shared)
    if implementation is None:
        implementation = "gather" if ids.ndim == 1 else "mask"
    if implementation == "gather" and ids.ndim == 1:
        return Rows(_gather_rows(bank, ids), layout.rows, shared=bank.shared)
    if implementation in ("gather", "layer") and ids.ndim == 2:
        raise AttachError(
            f"implementation={implementation!r} takes one adapter for each row, but the ids have the shape"
            f" {list(ids.shape)}. Use 'mask' for ids of tokens, or pass weights for several adapters in each row"
        )
    data: Tensors = {IDS: ids}
    if implementation not in ("layer", "mask"):
        data |= _sort(ids, bank.slots)
        implementation = _require_grouped(bank, implementation)
    arrays = [
        {name: _to_leaf(place, x) for name, x in tensors.items()}
        | {name: _repeat(place, x) for name, x in data.items()}
        for place, tensors in zip(layout.places, bank.arrays, strict=True)
    ]
    return Rows(tuple(arrays), layout.rows, implementation, bank.shared)


def _as_int32(ids: Any, slots: int) -> Any:
    """Return ids as an array of JAX, which would cut the upper bits of an integer of 64 bits: those are no slot."""
    if any(isinstance(each, jax.Array) for each in jax.tree.leaves(ids)):
        return jnp.asarray(ids)
    found = np.asarray(ids)
    if not np.issubdtype(found.dtype, np.integer):
        return found
    return jnp.asarray(np.where((found < 0) | (found >= slots), slots, found.astype(np.int64)).astype(np.int32))


def _require_grouped(bank: Bank, implementation: Implementation) -> Implementation:
    """Return the grouped product; raise `AttachError` if the bank or the platform does not have one."""
    if others := sorted({p.row.method.peft_type for p in bank.layout.places if not _is_pair(p)}):
        raise AttachError(
            f"sorted segments need low-rank pairs; the bank has room for other forms of {', '.join(others)} (a DoRA, a"
            " bias, a vector). Use implementation='gather' or 'mask'"
        )
    if callable(implementation):
        return implementation
    if jax.default_backend() == "cpu":
        raise AttachError(
            "implementation='sorted': jax.lax.ragged_dot multiplies every token by all slots on CPU. Use 'gather', or"
            " pass a grouped product of your own"
        )
    return jax.lax.ragged_dot


def _is_pair(place: Place) -> bool:
    specs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in place.kept.items()}
    return place.row.method.row_pair(place.row.hparams, specs) is not None


def _check_mixture(bank: Bank, ids: Any, weights: Any, implementation: Implementation | None) -> Any:
    weights = jnp.asarray(weights, jnp.float32)
    if ids.ndim != 2 or weights.shape != ids.shape:
        raise AttachError(
            f"weights: expected the shape of ids, (rows, adapters), found {list(weights.shape)} for ids of shape"
            f" {list(ids.shape)}"
        )
    if implementation not in (None, "gather"):
        raise AttachError(f"implementation={implementation!r} takes no weights; leave the implementation out")
    places = [place.row for place in bank.layout.places]
    if others := [row for row in places if row.method.effects(row.hparams).weight != "adds"]:
        raise AttachError(
            "a row can mix only adapters whose changes add up; the bank has room for others:\n"
            + paths.bullets([f"{row.leaf}: {row.method.peft_type}" for row in others])
        )
    return weights


def _to_leaf(place: Place, x: Any) -> Any:
    """Return the stacked axes, which come first, to their places in the base leaf."""
    first = tuple(range(place.layers))
    return x if place.row.stack == first else jnp.moveaxis(x, first, place.row.stack)


def _repeat(place: Place, x: Any) -> Any:
    """Repeat an array for each of the stacked layers."""
    sizes = [place.weight.shape[axis] for axis in place.row.stack]
    return _to_leaf(place, jnp.broadcast_to(x, (*sizes, *x.shape)))


@jax.jit
def _gather_rows(bank: Bank, ids: Any) -> Sequence[Tensors]:
    """Gather the slot of each row, with the axes of the tensors in the order that products need."""

    def gather(place: Place, name: str, x: Any) -> Any:
        taken = take_slots(x, ids, place.layers)
        turned = name in place.row.method.row_turned
        return _to_leaf(place, jnp.moveaxis(taken, -1, place.layers + 1) if turned else taken)

    return tuple(
        {name: gather(place, name, x) for name, x in arrays.items()}
        for place, arrays in zip(bank.layout.places, bank.arrays, strict=True)
    )


@jax.jit
def _mix(bank: Bank, ids: Any, weights: Any) -> Sequence[Tensors]:
    """Gather the slots of each row's adapters, and repeat the weights for all layers."""
    return tuple(
        {name: _to_leaf(place, take_slots(x, ids, place.layers)) for name, x in arrays.items()}
        | {WEIGHTS: _repeat(place, weights)}
        for place, arrays in zip(bank.layout.places, bank.arrays, strict=True)
    )


_sort = jax.jit(sort_ids, static_argnums=1)
