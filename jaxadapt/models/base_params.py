"""The base parameters of a model or of a tree, by dotted path, traversed once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxadapt.adapters.adapter import is_array
from jaxadapt.arrays import quantized
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.models.linen import collections
from jaxadapt.models.nnx import attach, graph, survey


@dataclasses.dataclass(frozen=True)
class BaseParams:
    """Base parameters from a tree, and the model or variables that hold them."""

    held: Mapping[str, Any]
    """`{path: leaf}` with boxes (`nn.Partitioned`, …); of a model `{path: (module, attribute)}`."""
    target: Any
    """The model or variables, which may have adapters."""
    walked: graph.ModelWalk | None = None
    """The result of the traversal, for a model only."""

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """`{path: array or spec}`, without boxes."""
        return {path: collections.unbox_tree(leaf) for path, leaf in self.held.items()}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`{path: shape}`."""
        return {path: tuple(leaf.shape) for path, leaf in self.leaves.items()}

    @functools.cached_property
    def shardings(self) -> dict[str, Any]:
        """`{path: sharding}`; None for a leaf without a sharding."""
        return collections.base_shardings(self.held)

    @functools.cached_property
    def keymap(self) -> KeyMap | None:
        """The keymap of an adapter that the variables have, if any."""
        for collection in collections.adapter_collections(self.target).values():
            for name, tree in collection.items():
                return collections.read_adapter(tree, name).keymap
        return None


class ModelParams(BaseParams):
    """Base parameters of an NNX model."""

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """`{path: array or spec}`."""
        return survey.base_values(self.held)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`{path: shape}`."""
        return survey.base_shapes(self.held)

    @functools.cached_property
    def shardings(self) -> dict[str, Any]:
        """`{path: sharding}`; None for a leaf without a sharding."""
        return dict(attach.base_shardings(self.held))

    @functools.cached_property
    def keymap(self) -> KeyMap | None:
        """The keymap of an adapter that the model has, if any."""
        adapters = attach.adapter_variables(self.walked or self.target)
        known = (var for by_path in adapters.values() for var in by_path.values())
        return next((var.get_metadata()["adapter"].recipe.keymap for var in known), None)


def read_params(params: Any, target: Any = None) -> BaseParams:
    """Return the base parameters in nested mappings. Raises `AttachError` if a leaf is not an array."""
    base = BaseParams(paths.flatten(params), target)
    odd = [
        f"{path}: {type(leaf).__name__}"
        for path, leaf in base.leaves.items()
        if not (is_array(leaf) or quantized.is_quantized(leaf))
    ]
    raise_listed(
        AttachError, 'expected base parameters as nested mappings of arrays (a list as {"0": …, "1": …}), found:', odd
    )
    return base
