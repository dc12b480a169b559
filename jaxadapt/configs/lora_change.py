"""The size of LoRA's change of a weight, from its factors, with NumPy.

ΔW = s·B·A is not computed: with B = Qb·Rb and Aᵀ = Qa·Ra, its singular values are those of the small matrix s·Rb·Raᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxadapt.configs.change import Change, effective_rank

if TYPE_CHECKING:
    from jaxadapt.configs.lora import LoraConfig


def describe(config: LoraConfig) -> str:
    """Return a description of the norm."""
    return "‖s·B·A‖, before DoRA's normalization" if config.use_dora else "‖ΔW‖ = ‖s·B·A‖"


def measure(config: LoraConfig, module: str, arrays: Mapping[str, Any]) -> Change | None:
    """Return the size of the change; None if it does not follow from A and B."""
    import numpy as np

    from jaxadapt.configs import matching

    kind = "lora" if "lora_A" in arrays else "lora_embedding"
    if not {f"{kind}_A", f"{kind}_B"} <= arrays.keys() or config.use_qalora or config.use_bdlora:
        return None
    a, b = arrays[f"{kind}_A"], arrays[f"{kind}_B"]
    if min(a.ndim, b.ndim) < 2:
        return None
    a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    if "lora_diag" in arrays:
        a = arrays["lora_diag"][:, None] * a  # KaSA
    rank, scale = config.rank_of(module), config.scale_of(module)
    experts, remainder = divmod(a.shape[0], rank) if matching.is_parameter(config, module) else (1, 0)
    if remainder or b.shape[1] != a.shape[0]:
        return None  # a grouped convolution
    if not (np.isfinite(a).all() and np.isfinite(b).all()):  # a diverged run, on which decompositions fail
        return Change(math.nan, None, a.shape[0] // experts, float(scale))
    # PEFT concatenates the rows of A by expert, and interleaves the columns of B.
    expert_a, expert_b = a.reshape(experts, -1, a.shape[1]), np.moveaxis(b.reshape(b.shape[0], -1, experts), 2, 0)
    r_factors: list[Any] = [np.linalg.qr(x, mode="r") for x in (expert_b, np.swapaxes(expert_a, 1, 2))]
    s = np.linalg.svd(r_factors[0] @ np.swapaxes(r_factors[1], 1, 2), compute_uv=False)
    effective = sum(map(effective_rank, s)) / experts
    return Change(abs(scale) * float(np.sqrt((s**2).sum())), effective, expert_a.shape[1], float(scale))
