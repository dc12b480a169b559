"""RoAd (Liao & Monz 2024, arXiv:2409.00119) with PEFT's conventions: R·(W·x + b), where R turns pairs of outputs.

In each group of `group_size` outputs, output n of the first half is paired with output n of the second half. A pair
(y, z) becomes (c·y − s·z, c'·z + s'·y), with c = α·cos θ and s = α·sin θ. `road_theta` and `road_alpha` have out/2
values for road_1 (c = c', s = s'), out for road_2, and 2·out for road_4, where c and s have angles and scales of their
own. R acts on the output, so the cost of a use does not depend on the inputs. The arithmetic follows PEFT's
`tuners/road/layer.py`; a merge changes the bias too.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxadapt.configs.full_rank import RoadConfig
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Effects,
    Examples,
    MatrixMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Start,
    Strings,
    Target,
    own_tensor,
    tensor_roles,
)

_SHAPES = {"road_1": (1, 1), "road_2": (1, 2), "road_4": (2, 2)}
"""{variant: the number of (θ and α apart for c and s, outputs of a pair apart)}."""


class Road(MatrixMethod, peft_type="ROAD"):
    """A rotation and scaling of pairs of outputs."""

    roles: Strings = tensor_roles(vector="road_theta road_alpha")
    examples: Examples = (
        {"group_size": 4},
        {"variant": "road_2", "group_size": 8},
        {"variant": "road_4", "group_size": 2, "init_weights": False},
    )
    changes: Effects | None = Effects("changes", form="use", reads=True, bias="scales")

    def tensors(self, config: RoadConfig, target: Target) -> tuple[MethodTensor, ...]:
        ratio = math.prod(_SHAPES[config.variant]) / 2  # values for each output
        sizes = {
            name: target.own_size(name, 0, lambda: int(target.out_size * ratio))
            for name in ("road_theta", "road_alpha")
        }
        outputs = sizes["road_theta"] / ratio
        if outputs % config.group_size:
            raise target.refuse(
                f"ROAD needs a group_size that divides the {outputs:g} outputs; found {config.group_size}"
            )
        return tuple(own_tensor(name, (size,)) for name, size in sizes.items())

    def own(self, config: RoadConfig, target: Target) -> OwnHparams:
        return OwnHparams(variant=config.variant, size=config.group_size)

    def init(self, config: RoadConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        mean = 1.0 if tensor.name == "road_alpha" else 0.0
        return Draw("constant", mean) if config.init_weights else mean + 0.5 * jax.random.normal(start.key, start.shape)

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        return self.shift(own, params, y, undo=False)

    def matrix(self, own: OwnHparams, params: Params, w: Array) -> Array:
        return self.shift(own, params, w.T, undo=False).T

    def unmatrix(self, own: OwnHparams, params: Params, w: Array) -> Array:
        return self.shift(own, params, w.T, undo=True).T

    def shift(self, own: OwnHparams, params: Params, bias: Array, undo: bool) -> Array:
        half = own.size // 2
        pairs = bias.reshape(*bias.shape[:-1], -1, 2, half)
        y, z = pairs[..., 0, :], pairs[..., 1, :]
        theta, alpha = (params[x].reshape(-1, *_SHAPES[own.variant], half) for x in ("road_theta", "road_alpha"))
        theta, alpha = (jnp.broadcast_to(x, (len(x), 2, 2, half)) for x in (theta, alpha))
        c, s = alpha[:, 0] * jnp.cos(theta[:, 0]), alpha[:, 1] * jnp.sin(theta[:, 1])
        (c1, c2), (s1, s2) = (c[:, 0], c[:, 1]), (s[:, 0], s[:, 1])
        if undo:
            scale = 1 / (c1 * c2 + s1 * s2)
            new = (c2 * y + s1 * z) * scale, (c1 * z - s2 * y) * scale
        else:
            new = c1 * y - s1 * z, c2 * z + s2 * y
        return jnp.stack(new, axis=-2).reshape(bias.shape)
