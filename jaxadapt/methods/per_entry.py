"""Hyperparameters that differ between the entries of one leaf: between stacked layers, or between fused parts.

All layers of a scan run the same code, each with its own slice of every array. A value that differs between layers is
therefore an entry of a constant for all layers, indexed by the layer's number. That number is an array (`LAYER`) that
is stacked and sliced as the parameters are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxadapt.arrays.axes import PerEntry
from jaxadapt.keymaps.weight import Modules


def per_entry(modules: Modules, value: Callable[[str], float], none: float) -> PerEntry:
    """Return `value` of each adapted entry's module, and `none` for the entries that are not adapted."""
    values = np.array(modules.each(value, none), float).reshape(-1, *modules.sizes)
    values = values.transpose(0, *(1 + axis for axis in modules.order if axis >= 0))
    sizes = tuple(modules.sizes[axis] if axis >= 0 else 1 for axis in modules.order)
    return PerEntry(tuple(values.reshape(-1).tolist()), sizes)


def adapted_entries(modules: Modules) -> PerEntry | None:
    """Return 1 for each adapted entry and 0 for the others, or None if all entries are adapted."""
    return None if modules.all else per_entry(modules, lambda _: 1.0, 0.0)


def needs_layer_number(hparams: Any) -> bool:
    """Return True if the arithmetic of a site depends on the layer's number."""
    if isinstance(hparams, PerEntry):
        return hparams.layers > 1
    if not dataclasses.is_dataclass(hparams) or isinstance(hparams, type):
        return False
    return any(needs_layer_number(getattr(hparams, field.name)) for field in dataclasses.fields(hparams))
