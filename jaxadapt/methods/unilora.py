"""Uni-LoRA (arXiv:2506.00799) with PEFT's conventions: W + B·A, whose entries are those of one trained vector.

Each entry of A (r, inputs) and B (outputs, r) is θ[k]·c[k], with an index k of the shared vector θ and c[k] = 1/√n for
its n uses. The indices are a shuffled list of all indices, each as often as the others, dealt to the modules in
PyTorch's order, to A before B (`tuners/unilora/model.py`), by NumPy's generator as in PEFT. With `save_indices` a file
has the indices and the factors, and no order is needed. PEFT writes such indices as int64; here they are int32, which
PEFT reads.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from jaxadapt.configs.fixed_bases import UniLoraConfig
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Examples,
    FactoredMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Shapes,
    Start,
    Strings,
    Target,
    Targets,
    axes_tensor,
    own_tensor,
    tensor_roles,
)

THETA = "unilora_theta_d"


class UniLora(FactoredMethod, peft_type="UNILORA"):
    """Low-rank matrices of the entries of one vector."""

    ordered = True
    roles: Strings = tensor_roles(
        vector=THETA, frozen=" ".join(f"unilora_{name}_{side}" for name in ("indices", "scales") for side in "AB")
    )
    examples: Examples = (
        {"theta_d_length": 11},
        {"r": 2, "theta_d_length": 40, "proj_seed": 3, "init_theta_d_bound": 0.5},
    )

    def tensors(self, config: UniLoraConfig, target: Target) -> tuple[MethodTensor, ...]:
        options: dict[str, Any] = {"own": (("r", config.r),), "optional": True, "in_file": config.save_indices}
        return tuple(
            axes_tensor(f"unilora_{name}_{side}", axes, dtype=dtype, trained=False, **options)
            for name, dtype in (("indices", "int32"), ("scales", None))
            for side, axes in (("A", "r in"), ("B", "out r"))
        )

    def shared(self, config: UniLoraConfig, targets: Targets, found: Shapes) -> tuple[MethodTensor, ...]:
        return (own_tensor(THETA, (config.theta_d_length,)),)

    def starts_unchanged(self, config: UniLoraConfig) -> bool:
        return False

    def init(self, config: UniLoraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == THETA:
            return Draw("uniform", config.init_theta_d_bound) if config.init_weights else Draw("normal", 1.0)
        first, total = 0, 0
        for module, (inputs, outputs) in start.ordered_modules.items():
            if module == start.module:
                first = total + (config.r * inputs if tensor.name.endswith("B") else 0)
            total += config.r * (inputs + outputs)
        indices, scales = deal_indices(total, config.theta_d_length, config.proj_seed)
        own = indices[first : first + int(np.prod(start.shape))].reshape(start.shape)
        return own if "indices" in tensor.name else scales[own]

    def factors(self, own: OwnHparams, params: Params, shape: tuple[int, int]) -> tuple[Array, Array]:
        return _factor(params, "A"), _factor(params, "B")


@functools.lru_cache(maxsize=2)  # each module takes its own part
def deal_indices(total: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices (total) of all entries in PyTorch's order, int32, and the factor of each index (length).

    >>> deal_indices(5, 2, 0)[0].tolist()  # three times 1, twice 0
    [1, 1, 1, 0, 0]
    """
    random = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), total // length)
    if total % length:
        indices = np.concatenate([indices, random.choice(length, size=total % length, replace=False)])
    random.shuffle(indices)
    counts = np.bincount(indices, minlength=length).astype(np.float32)
    return indices.astype(np.int32), np.where(counts > 0, 1 / np.sqrt(np.maximum(counts, 1)), 0).astype(np.float32)


def _factor(params: Params, side: str) -> Array:
    """Return A or B."""
    return params[THETA][params[f"unilora_indices_{side}"]] * params[f"unilora_scales_{side}"]
