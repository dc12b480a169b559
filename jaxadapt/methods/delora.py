"""DeLoRA (Bini et al. 2025, arXiv:2503.18225) with PEFT's conventions: W + (B·diag(λ / (r·‖a‖·‖b‖))·A)∘n.

‖a‖ and ‖b‖ are the norms of A's rows and B's columns, at least 1e-4; n has the norms of the original weight's columns.
PEFT saves n, and so does jaxadapt; a file without it gets the norms of the base. The arithmetic follows PEFT's
`tuners/delora/layer.py`. Its `module_dropout` drops entries of the input, not modules, and so it does here.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.configs.low_rank import DeloraConfig
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
    at_least_float32,
    axes_tensor,
    own_tensor,
    tensor_roles,
)


class Delora(MatrixMethod, peft_type="DELORA"):
    """A low-rank change of unit components, with one strength."""

    row_numbers: frozenset[str] = frozenset({"size"})
    row_padded: frozenset[str] = frozenset({"r"})
    scaled: frozenset[str] = frozenset({"delora_lambda"})
    roles: Strings = tensor_roles(A="delora_A", B="delora_B", vector="delora_lambda", frozen="delora_w_norm")
    examples: Examples = (
        {"r": 2},
        {
            "r": 3,
            "delora_lambda": 4,
            "init_weights": False,
            "rank_pattern": {".*q(_proj)?": 2},
            "lambda_pattern": {".*[qv](_proj)?": 7.5},
        },
    )

    def tensors(self, config: DeloraConfig, target: Target) -> tuple[MethodTensor, ...]:
        r = (("r", target.rank(config.rank_of)),)
        return target.with_ranks(
            (
                axes_tensor("delora_A", "r in", r),
                axes_tensor("delora_B", "out r", r),
                own_tensor("delora_lambda", (1,)),
                axes_tensor("delora_w_norm", "in", from_base=True, trained=False, optional=True),
            ),
            config.rank_of,
        )

    def own(self, config: DeloraConfig, target: Target) -> OwnHparams:
        return OwnHparams(size=target.value(config.rank_of), dropout=config.module_dropout)

    def init(self, config: DeloraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        match tensor.name:
            case "delora_lambda":
                return Draw(
                    "constant", float(find_pattern_value(config.lambda_pattern, start.module, config.delora_lambda))
                )
            case "delora_w_norm":
                return jnp.linalg.norm(at_least_float32(start.w), axis=0)
            case "delora_B" if config.init_weights:
                return Draw("constant", 0.0)
            case _:
                return Draw.kaiming(start.shape[1])

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        change = (params["delora_B"] * _strengths(own, params)[None]) @ params["delora_A"]
        return change * params["delora_w_norm"][None]

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        a, b = params["delora_A"], params["delora_B"]
        h = jnp.einsum("...i,ri->...r", x.astype(a.dtype) * params["delora_w_norm"], a)
        return y + jnp.einsum("...r,or->...o", h * _strengths(own, params), b)


def _strengths(own: OwnHparams, params: Params) -> Array:
    """Return λ / (r·‖a‖·‖b‖) of each component; below the least norm, the norms get no gradient."""
    a, b = params["delora_A"], params["delora_B"]
    norms = [jnp.sqrt(jnp.maximum((x * x).sum(axis), 1e-8)) for x, axis in ((a, 1), (b, 0))]
    return params["delora_lambda"] / own.size / (norms[0] * norms[1])
