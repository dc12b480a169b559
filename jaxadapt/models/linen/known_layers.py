"""The roles of a weight's axes, and its use, in the layer classes of Flax: these need no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from jaxadapt.arrays.axes import Axes, Use
from jaxadapt.keymaps.weight import Kind
from jaxadapt.models import layers


def _tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _einsum_str(m: Any, rest: Sequence[Any]) -> str:
    return rest[0] if rest and rest[0] is not None else m.einsum_str


def _general_axes(m: Any, _: Sequence[Any]) -> Axes:
    return layers.general_axes(len(_tuple(m.axis)), len(_tuple(m.features)), len(_tuple(m.batch_dims)))


Roles = Callable[[Any, Sequence[Any]], Axes]


ToUse = Callable[[Any, Any, Sequence[Any], Axes], Use]


_KNOWN: dict[type[nn.Module], tuple[Roles, ToUse]] = {
    nn.Dense: (lambda m, _: layers.DENSE, lambda m, x, _, axes: layers.dense_use(x.ndim, axes)),
    nn.DenseGeneral: (
        _general_axes,
        lambda m, x, _, axes: layers.general_use(x.ndim, axes.rank, _tuple(m.axis), _tuple(m.batch_dims), axes),
    ),
    nn.Einsum: (
        lambda m, rest: layers.einsum_axes(_einsum_str(m, rest)),
        lambda m, x, rest, axes: layers.einsum_use(_einsum_str(m, rest), x.ndim, axes),
    ),
}


def known_use(module: nn.Module, method: str) -> tuple[Roles, ToUse] | None:
    """Return the kernel's roles and use if the method is one of Flax's own `__call__`s, else None: it is traced."""
    if method != "__call__":
        return None
    owner = next((c for c in type(module).__mro__ if "__call__" in vars(c)), None)
    return _KNOWN.get(owner) if owner is not None else None


def known_roles(module: nn.Module, method: str, leaf: str) -> tuple[Axes, Kind, int] | None:
    """Return axes, kind and groups of the weight of Flax's own Conv or Embed, else None."""
    owner = next((c for c in type(module).__mro__ if method in vars(c)), None)
    m: Any = module
    if owner in (nn.Conv, nn.Conv.__mro__[1]) and isinstance(m, nn.Conv) and leaf == "kernel" and m.mask is None:
        window = (m.kernel_size,) if isinstance(m.kernel_size, int) else tuple(m.kernel_size)
        return layers.conv_axes(len(window) + 2), "conv", m.feature_group_count
    if owner is nn.Embed and leaf == "embedding":
        return layers.EMBEDDING, "embedding", 1
    return None
