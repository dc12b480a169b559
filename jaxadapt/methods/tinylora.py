"""TinyLoRA (arXiv:2602.04118) with PEFT's conventions: W + B·R·A, where R = Σ v_i·P_i has a tiny trained vector v.

A = √S·Vᵀ (r, inputs) and B = U·√S (outputs, r) are the largest singular vectors of the weight; an embedding's are those
of its table (vocabulary, dimension). P (u, r, r) is random. Files have A and B, whose signs the weight does not
determine, and P with `save_projection`. A group of modules, which are neighbors in the order of PyTorch's modules,
shares one v: the tensor `tinylora_v` (groups, u), which a file has as `tinylora_v.0`, `tinylora_v.1` and so on
(`tuners/tinylora/model.py`). PEFT numbers the modules in the same order for the seeds of P.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays import products
from jaxadapt.configs.fixed_bases import TinyLoraConfig
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Drop,
    Examples,
    FactoredMethod,
    MatrixHparams,
    MethodTensor,
    Operation,
    OwnHparams,
    Params,
    Shapes,
    Start,
    Strings,
    Target,
    Targets,
    TorchRandom,
    Use,
    axes_tensor,
    own_tensor,
    tensor_roles,
)


class TinyLora(FactoredMethod, peft_type="TINYLORA"):
    """A change between the weight's own singular vectors."""

    ordered = True
    kinds: frozenset[str] = frozenset({"linear", "embedding"})
    roles: Strings = tensor_roles(vector="tinylora_v", frozen="tinylora_A tinylora_B tinylora_P tinylora_group")
    examples: Examples = (
        {"u": 5, "init_weights": "uniform"},
        {"r": 3, "u": 4, "weight_tying": 0.6, "save_projection": False, "projection_seed": 7},
    )

    def tensors(self, config: TinyLoraConfig, target: Target) -> tuple[MethodTensor, ...]:
        if target.kind == "embedding" and config.tinylora_dropout:
            raise target.refuse("tinylora_dropout is not implemented for embeddings; set it to 0")
        rank = target.own_size(
            "tinylora_A", 0, lambda: target.cap_rank("TINYLORA", config.r, min(target.in_size, target.out_size))
        )
        first, last = ("out", "in") if target.kind == "embedding" else ("in", "out")
        frozen: dict[str, Any] = {"own": (("r", rank),), "trained": False, "from_base": True}
        return (
            axes_tensor("tinylora_A", f"r {first}", **frozen),
            axes_tensor("tinylora_B", f"{last} r", **frozen),
            own_tensor(
                "tinylora_P", (config.u, rank, rank), trained=False, optional=True, in_file=config.save_projection
            ),
            own_tensor("tinylora_group", (1,), trained=False, in_file=False, dtype="int32"),
        )

    def shared(self, config: TinyLoraConfig, targets: Targets, found: Shapes) -> tuple[MethodTensor, ...]:
        # The trained parameters alone are v, without the modules.
        groups = _groups(config, sum(len(tuple(t.modules)) for t in targets)) if targets else found["tinylora_v"][0]
        return (own_tensor("tinylora_v", (groups, config.u), numbered=True),)

    def starts_unchanged(self, config: TinyLoraConfig) -> bool:
        return config.init_weights != "uniform"

    def own(self, config: TinyLoraConfig, target: Target) -> OwnHparams:
        return OwnHparams(kind=target.kind, dropout=0.0 if target.kind == "embedding" else config.tinylora_dropout)

    def init(self, config: TinyLoraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == "tinylora_v":
            return Draw("uniform", config.init_v_bound) if config.init_weights == "uniform" else Draw("constant", 0.0)
        if tensor.name == "tinylora_A":
            _, s, v = jnp.linalg.svd(start.w.astype("float32"), full_matrices=False)
            return (jnp.sqrt(s)[:, None] * v)[: start.shape[0]]
        if tensor.name == "tinylora_B":  # U·√S = W·V/√S
            a = start.params["tinylora_A"]
            values = jnp.square(a).sum(1)
            return start.w.astype(a.dtype) @ a.T / jnp.where(values > 0, values, 1)[None]
        modules = list(start.ordered_modules)
        place = modules.index(start.module)
        if tensor.name == "tinylora_P":
            return TorchRandom(config.projection_seed + place).normal(start.shape) / np.float32(start.shape[1] ** 0.5)
        groups = _groups(config, len(modules))
        return np.array([min(place // (len(modules) // groups), groups - 1)], np.int32)

    def factors(self, own: OwnHparams, params: Params, shape: tuple[int, int]) -> tuple[Array, Array]:
        return _middle(params) @ params["tinylora_A"], params["tinylora_B"]

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
        if hparams.own.kind != "embedding":
            return super().output(hparams, params, use, x, y, drop, w)
        if isinstance(use, Use):
            return y  # the head of a model with tied embeddings: a separate module in PEFT, which is not adapted
        rows = (_middle(params) @ params["tinylora_A"]).T
        return (y + products.low_rank_delta(use, 1.0, 1, params["tinylora_B"].T, rows, x, y)).astype(y.dtype)


def _groups(config: TinyLoraConfig, modules: int) -> int:
    """Return the number of groups of modules, as PEFT rounds it."""
    return max(1, round(modules * (1.0 - config.weight_tying)))


def _middle(params: Params) -> Array:
    """Return R (r, r)."""
    v = params["tinylora_v"][params["tinylora_group"][0]]
    return jnp.einsum("u,uij->ij", v, params["tinylora_P"].astype(v.dtype))
