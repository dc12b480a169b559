"""KaSA (Wang et al. 2024, arXiv:2412.06071) with PEFT's conventions: W₋ + s·B·diag(d)·A, d trained with A and B.

W₋ is the base weight without its r smallest singular values. `start` computes it (`factors.truncate_svd`), and
`load(…, base="original")` computes it again. It follows PEFT's `tuners/lora/variants.py`, which supports linear layers
only. `optim.kasa_loss` has the penalties of the paper.
"""

from __future__ import annotations

from jaxadapt.configs import LoraConfig
from jaxadapt.keymaps.keymap import Match
from jaxadapt.keymaps.weight import MethodTensor
from jaxadapt.methods.base import Array, Params

DIAGONAL = "lora_diag"


def diagonal_tensor(r: int) -> MethodTensor:
    """Return the diagonal's tensor: (r)."""
    return MethodTensor(DIAGONAL, f".{DIAGONAL}", ("batch", "r"), (("r",),), (("r", r),), scale_power=0)


def scale_a(params: Params, a: Array) -> Array:
    """Return diag(d)·A for A (batch..., r, in...) and d (batch..., r); return A if there is no d."""
    if DIAGONAL not in params:
        return a
    d = params[DIAGONAL]
    return d.reshape(d.shape + (1,) * (a.ndim - d.ndim)) * a


def list_problems(config: LoraConfig, match: Match) -> list[str]:
    """Return the settings and layers that PEFT does not combine with KaSA."""
    init = config.init_lora_weights
    unsupported = ["use_dora=True"] if config.use_dora else []
    if isinstance(init, str) and init.lower() != "gaussian":
        unsupported.append(f"init_lora_weights={init!r}")
    if match.weight.kind != "linear" or match.weight.fan_in_fan_out:
        unsupported.append("a layer that is not a plain linear one (embedding, convolution, attention, Conv1D)")
    return unsupported
