"""A number per entry of a stacked leaf: per layer, and within it per expert and fused part."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxadapt.core.errors import AttachError

if TYPE_CHECKING:
    pass


Array = Any
Params = Mapping[str, Any]

LAYER = "layer"
"""The key of the current layer's number among the parameters of a site whose layers differ."""

USED = "used"
"""The tensor with 1 for each adapted entry and 0 for the others, where every row of a batch has its own adapter."""


@dataclasses.dataclass(frozen=True)
class PerEntry:
    """A number per entry of a leaf: per stacked layer, and within it per expert and fused part.

    It is part of a site's hparams. A layer looks up its own numbers by the layer number in its parameters.

    Attributes:
        values: the numbers, in the order of the stacked axes and then of the batch axes.
        batch: the sizes of the batch axes.
    """

    values: tuple[float, ...]
    batch: tuple[int, ...] = ()

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.values) // math.prod(self.batch)

    def layer_values(self, params: Params) -> Array:
        """Return the values of the current layer, float32 (batch...). Raises `AttachError` without a layer number."""
        by_layer = np.array(self.values, np.float32).reshape(self.layers, *self.batch)
        if self.layers == 1:
            return jnp.asarray(by_layer[0])
        number = params.get(LAYER)
        if number is None or number.size != 1:
            found = "found none" if number is None else f"found numbers of shape {list(number.shape)}"
            raise AttachError(
                f"cannot run a layer: the {self.layers} layers of this adapter differ in rank, scale or selection, so"
                f" each needs its own layer number, but {found}. Make the model's nnx.scan or nnx.vmap split variables"
                " of type jaxadapt.models.LayerNumber along axis 0, as nnx.StateAxes({nnx.Param: 0, ...: 0}) does"
            )
        return jnp.asarray(by_layer)[number.reshape(())]

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"{low:g} to {high:g}"


def entry_values(values: Any, entries: tuple[int, ...]) -> Array:
    """Return one number, or a `PerEntry`, as a float32 array of numpy with the shape `entries`."""
    array = np.asarray(values.values if isinstance(values, PerEntry) else values, np.float32)
    return np.broadcast_to(array, entries) if array.ndim == 0 else array.reshape(entries)


def expand_leading(values: Array, x: Array) -> Array:
    """Reshape values (batch...) to broadcast with an array (batch..., …), and cast them to its dtype."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim)).astype(x.dtype)


def mask_unadapted(used: PerEntry | None, params: Params, x: Array, otherwise: float) -> Array:
    """Return `x` (batch..., …) with the entries that are not adapted set to a constant, which has no gradient."""
    return (
        x
        if used is None
        else jnp.where(expand_leading(used.layer_values(params), x) > 0, x, jnp.array(otherwise, x.dtype))
    )
