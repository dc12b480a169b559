"""A number for each entry of a stacked leaf: each layer, and in it each expert and fused part."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxadapt.core.errors import AttachError

Array = Any
Params = Mapping[str, Any]

LAYER = "layer"
"""Among the params of a site whose layers differ: the number of the layer that is being computed."""


@dataclasses.dataclass(frozen=True)
class PerEntry:
    """A number of each entry of a leaf: of each layer it stacks, and in it of each expert and fused part.

    Part of a site's static values. The layer itself looks up its own ones, by the number that comes with the params.
    `values` are in the order of the stacked axes, then of the role "batch", whose sizes are `batch`.
    """

    values: tuple[float, ...]
    batch: tuple[int, ...] = ()

    @property
    def layers(self) -> int:
        """How many layers they are for."""
        return len(self.values) // math.prod(self.batch)

    def layer_values(self, params: Params) -> Array:
        """The layer's own values, float32 (batch...). Raises `AttachError` where it does not know which it is."""
        table = np.array(self.values, np.float32).reshape(self.layers, *self.batch)
        if self.layers == 1:
            return jnp.asarray(table[0])
        number = params.get(LAYER)
        if number is None or number.size != 1:
            found = "none" if number is None else f"{list(number.shape)} of them"
            raise AttachError(
                f"this adapter's {self.layers} layers differ in rank, scale or selection, so a layer needs its own"
                f" number, and here has {found}: the model's nnx.scan or nnx.vmap must cut variables of type"
                " jaxadapt.LayerNumber on axis 0, as nnx.StateAxes({nnx.Param: 0, ...: 0}) does"
            )
        return jnp.asarray(table)[number.reshape(())]

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"{low:g} to {high:g}"


def expand_leading(values: Array, x: Array) -> Array:
    """Values (batch...), shaped to broadcast against an array (batch..., …), in its dtype."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim)).astype(x.dtype)


def only_adapted(used: PerEntry | None, params: Params, x: Array, otherwise: float) -> Array:
    """`x` (batch..., …) in entries that are adapted, and a constant in the others, which gives no gradient."""
    return (
        x
        if used is None
        else jnp.where(expand_leading(used.layer_values(params), x) > 0, x, jnp.array(otherwise, x.dtype))
    )
