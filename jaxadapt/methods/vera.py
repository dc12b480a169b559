"""VeRA (Kopiczko et al. 2024, arXiv:2310.11454) with PEFT's conventions: W + (b∘B)·(d∘A).

A (r, inputs) and B (outputs, r) are random and belong to the whole adapter, with the sizes of its largest module; each
module uses their first columns and rows. Only the vectors b (out) and d (r) are trained. The projections are PyTorch's
own random numbers (`tuners/vera/model.py`), so a file without them (`save_projection=False`) has the same ones here.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxadapt.configs.fixed_bases import VeraConfig
from jaxadapt.methods.families import draw_projections, projections
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    FactoredMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Shapes,
    Start,
    Target,
    Targets,
    axes_tensor,
    tensor_roles,
)


class Vera(FactoredMethod):
    """Shared random projections, scaled by two vectors per module."""

    peft_type = "VERA"
    row_padded = frozenset({"rank"})
    scaled = frozenset({"vera_lambda_b"})
    roles = tensor_roles(vector="vera_lambda_b vera_lambda_d", frozen="vera_A vera_B")
    examples = ({"r": 3}, {"r": 4, "save_projection": False, "projection_prng_key": 7})

    def tensors(self, config: VeraConfig, target: Target) -> tuple[MethodTensor, ...]:
        return (
            axes_tensor("vera_lambda_b", "out"),
            axes_tensor("vera_lambda_d", "rank", (("rank", config.r),)),
        )

    def shared(self, config: VeraConfig, targets: Targets, found: Shapes) -> tuple[MethodTensor, ...]:
        return projections("vera", config, targets, found, config.r)

    def init(self, config: VeraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == "vera_lambda_b":
            return Draw("constant", 0.0 if config.init_weights else 1.0)
        if tensor.name == "vera_lambda_d":
            return Draw("constant", config.d_initial) if config.init_weights else Draw("normal", 1.0)
        a, b = draw_projections(config.projection_prng_key, start.shared["vera_A"], start.shared["vera_B"])
        return a if tensor.name == "vera_A" else b

    def factors(self, own: OwnHparams, params: Params, shape: tuple[int, int]) -> tuple[Array, Array]:
        out, inputs = shape
        a = params["vera_lambda_d"][:, None] * params["vera_A"][:, :inputs]
        return a, params["vera_lambda_b"][:, None] * params["vera_B"][:out]

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        d = params["vera_lambda_d"]
        h = d * jnp.einsum("...i,ri->...r", x.astype(d.dtype), params["vera_A"][:, : x.shape[-1]])
        return y + params["vera_lambda_b"] * jnp.einsum("...r,or->...o", h, params["vera_B"][: y.shape[-1]])
