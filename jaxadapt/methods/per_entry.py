"""What differs between the entries of one leaf: between the layers it stacks, and in them between fused parts.

A layer inside a scan runs the same code as the others, with its own cut of every array. So what differs from layer to
layer is looked up there, in a constant of all layers, by the layer's own number: an array that is stacked and cut as
the parameters are (`LAYER` among them).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxadapt.arrays.per_entry import PerEntry
from jaxadapt.keymaps.tensor_spec import Modules


def per_entry(modules: Modules, value: Callable[[str], float], none: float) -> PerEntry:
    """A value of each entry, and `none` of those that are not adapted."""
    table = np.array(modules.each(value, none), float).reshape(-1, *modules.sizes)
    table = table.transpose(0, *(1 + at for at in modules.order if at >= 0))
    sizes = tuple(modules.sizes[at] if at >= 0 else 1 for at in modules.order)
    return PerEntry(tuple(table.reshape(-1).tolist()), sizes)


def adapted_entries(modules: Modules) -> PerEntry | None:
    """1 for each entry that is adapted and 0 for the others; None if all are."""
    return None if modules.all else per_entry(modules, lambda _: 1.0, 0.0)


def needs_layer(static: Any) -> bool:
    """Whether the arithmetic of a site depends on the number of the layer."""
    fields = dataclasses.fields(static) if dataclasses.is_dataclass(static) else ()
    values = (getattr(static, field.name) for field in fields)
    return any(isinstance(value, PerEntry) and value.layers > 1 for value in values)
