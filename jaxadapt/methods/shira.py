"""SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175) with PEFT's conventions: W plus values at fixed positions.

The number of values is r·(out + in). Their positions (2, values) are rows and columns of PyTorch's weight. A file holds
them; PEFT reads a file without them if `random_seed` is set, and so does jaxadapt. The layer runs with the effective
weight, as in PEFT's `tuners/shira/layer.py`. PEFT also accepts positions from a function of the user, `mask_fn`, which
no file names; jaxadapt applies such a file, and refuses a new adapter of it.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.arrays.random_draws import draw_arrays
from jaxadapt.configs.full_rank import ShiraConfig
from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Examples,
    MatrixMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Start,
    Strings,
    Target,
    TorchRandom,
    own_tensor,
    tensor_roles,
)


class Shira(MatrixMethod, peft_type="SHIRA"):
    """A sparse change at positions that stay fixed."""

    scaled: frozenset[str] = frozenset({"shira_weight"})
    roles: Strings = tensor_roles(other="shira_weight", frozen="shira_indices")
    examples: Examples = ({"r": 2, "random_seed": 3}, {"r": 1, "init_weights": False})

    def tensors(self, config: ShiraConfig, target: Target) -> tuple[MethodTensor, ...]:
        def count() -> int:
            entries, size = config.r * (target.out_size + target.in_size), target.out_size * target.in_size
            if entries > size:
                raise target.refuse(
                    f"cannot change {entries} entries, r={config.r} times the sum of the weight's sizes, of a weight"
                    f" with {size} entries; choose a smaller r"
                )
            return entries

        n = target.own_size("shira_weight", 0, count)
        is_drawn = config.mask_type == "random" and config.random_seed is not None
        return (
            own_tensor("shira_weight", (n,)),
            own_tensor("shira_indices", (2, n), trained=False, dtype="int32", optional=is_drawn),
        )

    def init(self, config: ShiraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == "shira_weight":
            return Draw("constant", 0.0) if config.init_weights else Draw("normal", 1.0)
        if config.mask_type != "random":
            raise ConfigError(
                f"cannot create an adapter with mask_type={config.mask_type!r}: its positions come from a function that"
                " the configuration does not contain. Set mask_type to 'random'"
            )
        count, columns = start.shape[1], start.fan_in
        size = (count // config.r - columns) * columns
        seed = config.random_seed
        flat = (
            _positions(start.key, size, count) if seed is None else np.sort(TorchRandom(seed).permutation(size, count))
        )
        xp: Any = jnp if isinstance(flat, Tracer) else np
        return xp.stack([flat // columns, flat % columns]).astype("int32")

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        rows, columns = params["shira_indices"]
        values = params["shira_weight"]
        return jnp.zeros(w.shape, values.dtype).at[rows, columns].add(values)


def _positions(key: Any, size: int, count: int) -> Array:
    """Return `count` different numbers below `size` in ascending order: the places of the least of `size` draws.

    They are the same inside jit.
    """
    values = draw_arrays(key, {"positions": (Draw("uniform", 1.0), (size,))}, np.float32)["positions"]
    xp: Any = jnp if isinstance(values, Tracer) else np
    bound = xp.partition(values, count - 1)[count - 1]
    equal = values == bound  # several draws may be equal; the first of them count
    chosen = (values < bound) | (equal & (xp.cumsum(equal) <= count - (values < bound).sum()))
    return jnp.flatnonzero(chosen, size=count) if xp is jnp else np.flatnonzero(chosen)
