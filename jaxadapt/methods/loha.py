"""LoHa (Hyeon-Woo et al. 2022, arXiv:2108.06098) with PEFT's conventions: W + s·(W1a·W1b)∘(W2a·W2b), s = α/r.

A convolution's kernel is one matrix (out, channels·window). With `use_effective_conv2d` its window has tensors of its
own, T1 and T2 (r, r, window), and W1a is (r, out). The arithmetic follows PEFT's `tuners/loha/layer.py`, but the
gradients of W1a and W2a with T1 and T2 are those of the function: PEFT computes each with the other's tensors.
In training, `rank_dropout` drops rows of the change and `module_dropout` the whole change of a module, for all rows of
a batch. The rows that are kept are divided by their share. If no row is kept, PEFT's outputs are NaN; here the module
is not changed.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from jaxadapt.configs.low_rank import LoHaConfig
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    DroppedHparams,
    Effects,
    Examples,
    FactoredMethod,
    Lycoris,
    MethodTensor,
    Params,
    Start,
    Strings,
    Target,
    axes_tensor,
    kept_rows,
    shared_value,
    tensor_roles,
)


class Loha(Lycoris, FactoredMethod, peft_type="LOHA"):
    """The elementwise product of two low-rank matrices."""

    scaled: frozenset[str] = frozenset({"hada_w1_a"})
    roles: Strings = tensor_roles(B="hada_w1_a hada_w2_a", A="hada_w1_b hada_w2_b hada_t1 hada_t2")
    examples: Examples = (
        {"r": 2, "alpha": 3},
        {"r": 3, "alpha": 5, "rank_pattern": {".*q(_proj)?": 2}, "alpha_pattern": {".*[qv](_proj)?": 7}},
    )
    changes: Effects | None = Effects("adds", form="weight")

    def tensors(self, config: LoHaConfig, target: Target) -> tuple[MethodTensor, ...]:
        r, is_conv = (("r", target.rank(config.rank_of)),), target.kind == "conv"
        if target.found:  # the base may be unknown
            effective, window = "hada_t1" in target.found, target.found.get("hada_t1", ())[2:]
        else:
            window = (*target.window, 1)[:2] if is_conv else ()
            effective = config.use_effective_conv2d and math.prod(window) > 1
        if effective:
            shared_value("rank_pattern", {module: config.rank_of(module) for module in target.modules})
        made: list[MethodTensor] = []
        for i in "12":
            a, b, own = "out r", "r in", r
            if effective:
                made.append(
                    axes_tensor(f"hada_t{i}", "r r2 x y", (*r, ("r2", r[0][1]), *zip("xy", window, strict=True)))
                )
                a, b = "r out", "r channels"
            elif is_conv:
                inputs = target.own_size(f"hada_w{i}_b", -1, lambda: target.in_size * math.prod(target.window))
                b, own = "r i", (*r, ("i", inputs))
            made += [axes_tensor(f"hada_w{i}_a", a, r), axes_tensor(f"hada_w{i}_b", b, own)]
        return target.with_ranks(made, config.rank_of)

    def init(self, config: LoHaConfig, tensor: MethodTensor, start: Start) -> Draw:
        if tensor.name == "hada_w2_b" and config.init_weights:
            return Draw("constant", 0.0)
        return Draw.kaiming(math.prod(start.shape[1:]))

    def plain_rank(self, config: LoHaConfig) -> int:
        return max([config.r, *(config.rank_pattern or {}).values()]) ** 2

    def factors(self, own: DroppedHparams, params: Params, shape: tuple[int, int]) -> tuple[Array, Array]:
        # The rows of A are the products of each row of W1b with each row of W2b, and so are the columns of B.
        a = params["hada_w1_b"][:, None] * params["hada_w2_b"][None]
        b = params["hada_w1_a"][:, :, None] * params["hada_w2_a"][:, None]
        return a.reshape(-1, shape[1]), own.scale * b.reshape(shape[0], -1)

    def delta(self, own: DroppedHparams, params: Params, w: Array) -> Array:
        if "hada_t1" in params:
            sides = [
                jnp.einsum("rj...,jp,ri->ip...", params[f"hada_t{i}"], params[f"hada_w{i}_b"], params[f"hada_w{i}_a"])
                for i in "12"
            ]
        else:
            sides = [params[f"hada_w{i}_a"] @ params[f"hada_w{i}_b"] for i in "12"]
        delta = own.scale * (sides[0] * sides[1]).reshape(len(w), -1)
        return (delta.T * kept_rows(own, params, len(w))).T.reshape(w.shape)
