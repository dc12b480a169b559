"""`layer_replication`: PEFT makes a model of a base by repeating layers, each with an adapter of its own.

Here a model is its own code, so it comes with its layers repeated; the adapter then fits it as any other, and in PEFT
the base. What is checked: that there are as many layers, and that those which repeat one layer hold the same.
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
from jaxadapt.core.errors import ConfigError, warn
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap

_LAYER = re.compile(r"(?:^|\.)(?:layers|encoder\.layer|h)\.(\d+)\.")  # where PEFT's replicate_layers finds them


def base_layers(config: Config) -> list[int]:
    """For each layer of the model the layer of the base that it repeats; empty where nothing is repeated."""
    return [layer for start, end in config.get("layer_replication") or () for layer in range(start, end)]


def check_layers(config: Config, modules: Iterable[str]) -> None:
    """Raise `ConfigError` unless a model of these modules has the layers that the configuration makes."""
    order = base_layers(config)
    if not order:
        return
    found = {int(match[1]) for name in modules if (match := _LAYER.search(name))}
    if found != set(range(len(order))):
        raise ConfigError(
            f"layer_replication makes a model of {len(order)} layers out of the base's, and this one has {len(found)}:"
            f" build it with the base's layers in this order: {order}. (They are looked for where PEFT does, under"
            ' "layers", "encoder.layer" or "h".)'
        )


def check_values(config: Config, keymap: KeyMap, base: Callable[[], Mapping[str, Any]]) -> None:
    """Raise `ConfigError` where layers that repeat one layer of the base differ.

    Args:
        base: gives `{leaf: array or spec}` of the base parameters.
    """
    order = base_layers(config)
    if not order:
        return
    first: dict[str, Any] = {}
    apart: list[str] = []
    hollow = False
    for leaf, array in base().items():
        site = keymap.match(leaf)
        if site is None or len(site.weight.left) != len(array.shape):
            continue
        values = isinstance(array, np.ndarray | jax.Array) and not isinstance(array, Tracer)
        hollow |= not values
        for index, parameter in site.parameters(plan.axis_sizes(site, array.shape)).items():
            name = paths.join(*parameter)
            match = _LAYER.search(name)
            if match is None or not values or int(match[1]) >= len(order):
                continue
            where: list[Any] = [slice(None)] * len(array.shape)
            for axis, at in zip(site.braced, index, strict=True):
                where[site.weight.left.index(axis)] = at
            piece = array[tuple(where)]
            same = f"{name[: match.start(1)]}{order[int(match[1])]}{name[match.end(1) :]}"
            if not np.array_equal(np.asarray(first.setdefault(same, piece)), np.asarray(piece)):
                apart.append(name)
    if apart:
        raise ConfigError(
            f"layer_replication repeats layers of the base ({order}), and these parameters differ from those of the"
            " layer they repeat:\n" + paths.bullets(apart)
        )
    if hollow:
        warn("layer_replication: the base has no values to compare the repeated layers by")
