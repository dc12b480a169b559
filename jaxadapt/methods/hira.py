"""HiRA (Huang et al., ICLR 2025, openreview TwJrTz9cRS) with PEFT's conventions: W + W∘(B·A), without a scale.

A is (r, in) and B (out, r). A convolution's window belongs to A, and an embedding's tensors are called
`hira_embedding_A` (r, vocabulary) and `hira_embedding_B` (dimension, r). The layer runs with the effective weight; with
dropout it adds the product with the change, and an embedding multiplies the rows that it looks up.
The arithmetic follows PEFT's `tuners/hira/layer.py`, with its faults:

- PEFT ignores `rank_pattern`. The rank of an existing adapter is that of its tensors; a new adapter may not set it.
- PEFT ignores "gaussian" for convolutions and draws A as by default.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from jaxadapt.arrays import products
from jaxadapt.configs.low_rank import HiraConfig
from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Drop,
    Effects,
    Examples,
    MatrixHparams,
    MatrixMethod,
    MethodTensor,
    Operation,
    OwnHparams,
    Params,
    Start,
    Strings,
    Target,
    Use,
    at_least_float32,
    axes_tensor,
    tensor_roles,
)


class Hira(MatrixMethod, peft_type="HIRA"):
    """The elementwise product of the weight and a low-rank matrix."""

    kinds: frozenset[str] = frozenset({"linear", "embedding", "conv"})
    scaled: frozenset[str] = frozenset({"hira_B", "hira_embedding_B"})
    roles: Strings = tensor_roles(A="hira_A", B="hira_B", embedding="hira_embedding_A hira_embedding_B")
    examples: Examples = ({"r": 2}, {"r": 3, "init_weights": "gaussian"})

    def tensors(self, config: HiraConfig, target: Target) -> tuple[MethodTensor, ...]:
        if target.match.weight.groups > 1:
            raise target.refuse("PEFT does not implement HIRA for convolutions with groups; exclude the module")
        name = "hira_embedding" if target.kind == "embedding" else "hira"
        r = (("r", target.own_size(f"{name}_A", 0, lambda: config.r)),)
        ones = " 1" * (len(target.match.weight.right) - 2 if target.kind == "conv" else 0)
        return axes_tensor(f"{name}_A", "r in", r), axes_tensor(f"{name}_B", f"out r{ones}", r)

    def own(self, config: HiraConfig, target: Target) -> OwnHparams:
        return OwnHparams(kind=target.kind, dropout=0.0 if target.kind == "embedding" else config.hira_dropout)

    def effect(self, own: OwnHparams) -> Effects:
        return Effects("adds", form="use" if own.dropout or own.kind == "embedding" else "weight", reads=True)

    def init(self, config: HiraConfig, tensor: MethodTensor, start: Start) -> Draw:
        if config.rank_pattern:
            raise ConfigError("cannot start HIRA with rank_pattern: PEFT ignores it; unset it")
        if config.init_weights and tensor.name in ("hira_B", "hira_embedding_A"):
            return Draw("constant", 0.0)
        if not config.init_weights or start.hparams.kind == "embedding":
            return Draw("normal", 1.0)
        if config.init_weights == "gaussian" and start.hparams.kind == "linear":
            return Draw("normal", 1 / start.shape[0])
        return Draw.kaiming(math.prod(start.shape[1:]))

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        if own.kind == "embedding":  # PyTorch's table is (vocabulary, dimension)
            return w * (params["hira_embedding_B"] @ params["hira_embedding_A"]).T
        b = params["hira_B"]
        return w * jnp.einsum("or,r...->o...", b.reshape(b.shape[:2]), params["hira_A"])

    def output(
        self,
        hparams: MatrixHparams,
        params: Params,
        use: Use | Operation,
        x: Array,
        y: Array,
        drop: Drop | None,
        w: Array,
    ) -> Array:
        w = at_least_float32(w)
        if hparams.own.kind == "embedding":
            if isinstance(use, Use):
                return y  # the head of a model with tied embeddings: a separate module in PEFT, which is not adapted
            factors = params["hira_embedding_A"], params["hira_embedding_B"]
            rows = use.run(x, w)
            return (y + rows * products.low_rank_delta(use, 1.0, 1, *factors, x, rows)).astype(y.dtype)
        change = self.weight(hparams, params, dataclasses.replace(use.axes, parts=None), w) - w
        x = x if drop is None else drop(x)
        return (y + products.run_use(use, x, change.astype(x.dtype))).astype(y.dtype)
