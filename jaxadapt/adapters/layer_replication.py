"""`layer_replication`: PEFT builds a model from a base by repeating layers, each repetition with its own adapter.

Here the model comes with its layers already repeated, so the adapter fits it as any other, and fits the base in PEFT.
This module checks that the model has as many layers, and that layers which repeat one layer of the base are equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, raise_listed, warn
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap

_LAYER = re.compile(r"(?:^|\.)(?:layers|encoder\.layer|h)\.(\d+)\.")  # the names that PEFT's replicate_layers knows


def base_layers(config: Config) -> list[int]:
    """Return for each layer of the model the layer of the base that it repeats; empty without `layer_replication`."""
    return [layer for start, end in config.get("layer_replication") or () for layer in range(start, end)]


def check_layers(config: Config, modules: Iterable[str]) -> None:
    """Raise `ConfigError` if a model with these modules lacks the layers that the configuration makes."""
    order = base_layers(config)
    if not order:
        return
    layers = {int(match[1]) for name in modules if (match := _LAYER.search(name))}
    if layers != set(range(len(order))):
        raise ConfigError(
            f"layer_replication: expected a model of {len(order)} layers, found {len(layers)}."
            f" Build it with the base's layers in this order: {order}. (Layers are recognized as in PEFT, below"
            ' "layers", "encoder.layer" or "h".)'
        )


def check_values(config: Config, keymap: KeyMap, base: Callable[[], Mapping[str, Any]]) -> None:
    """Raise `ConfigError` if layers that repeat one layer of the base differ.

    Args:
        base: a function that returns `{leaf: array or spec}` of the base parameters.
    """
    order = base_layers(config)
    if not order:
        return
    first: dict[str, Any] = {}
    different: list[str] = []
    without_values = False
    for leaf, array in base().items():
        match = keymap.match(leaf)
        if match is None or len(match.weight.left) != len(array.shape):
            continue
        has_values = isinstance(array, np.ndarray | jax.Array) and not isinstance(array, Tracer)
        without_values |= not has_values
        for index, parameter in match.parameters(plan.axis_sizes(match, array.shape)).items():
            name = paths.join(*parameter)
            layer = _LAYER.search(name)
            if layer is None or not has_values or int(layer[1]) >= len(order):
                continue
            slices: list[Any] = [slice(None)] * len(array.shape)
            for axis, position in zip(match.braced, index, strict=True):
                slices[match.weight.left.index(axis)] = position
            layer_value = array[tuple(slices)]
            base_name = f"{name[: layer.start(1)]}{order[int(layer[1])]}{name[layer.end(1) :]}"
            if not np.array_equal(np.asarray(first.setdefault(base_name, layer_value)), np.asarray(layer_value)):
                different.append(name)
    raise_listed(
        ConfigError,
        f"layer_replication repeats layers of the base ({order}), and these parameters differ from those of the"
        " layer they repeat. Build the model with copies of the base's layers:",
        different,
    )
    if without_values:
        warn("layer_replication: the base has only shapes here, so the repeated layers could not be compared")
