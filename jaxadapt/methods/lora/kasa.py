"""KaSA (Wang et al. 2024, arXiv:2412.06071) with PEFT's conventions: W₋ + s·B·diag(d)·A, d trained with A and B.

W₋ is the base weight without its r smallest singular values, which `start` makes of it (`factors.truncate_svd`), and
`load(…, base="original")` does again. As in PEFT's `tuners/lora/variants.py`, where only linear layers have it; the
penalties of the paper are `optim.kasa_loss`.
"""

from __future__ import annotations

from jaxadapt.configs import LoraConfig
from jaxadapt.keymaps.keymap import Match
from jaxadapt.keymaps.tensor_spec import MethodTensor
from jaxadapt.methods.base import Array, Params

DIAGONAL = "lora_diag"


def tensor(r: int) -> MethodTensor:
    """The diagonal's tensor: (r)."""
    return MethodTensor(DIAGONAL, f".{DIAGONAL}", ("batch", "r"), (("r",),), (("r", r),), scale_power=0)


def in_a(params: Params, a: Array) -> Array:
    """diag(d)·A, of A (batch..., r, in...) and d (batch..., r); A where there is no d."""
    if DIAGONAL not in params:
        return a
    d = params[DIAGONAL]
    return d.reshape(d.shape + (1,) * (a.ndim - d.ndim)) * a


def problems(config: LoraConfig, site: Match) -> list[str]:
    """What PEFT has no KaSA for."""
    init = config.init_lora_weights
    found = ["use_dora=True"] if config.use_dora else []
    if isinstance(init, str) and init.lower() != "gaussian":
        found.append(f"init_lora_weights={init!r}")
    if site.weight.kind != "linear" or site.weight.fan_in_fan_out:
        found.append("a layer that is no plain linear one (embedding, convolution, attention, Conv1D)")
    return found
