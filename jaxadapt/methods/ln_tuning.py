"""LN_TUNING (Zhao et al. 2023, arXiv:2312.11420) with PEFT's conventions: full copies of the targets, mostly norms.

The file has the copies as `<module>.ln_tuning_layers.weight` and `.bias`, for any kind of module. The copies of the
active adapter replace the parameters, and only one such adapter can be active (`tuners/ln_tuning/layer.py`). A merge
keeps the copies; unmerging is refused, because they replaced the originals. PEFT keeps both and swaps them.
"""

from __future__ import annotations

from jaxadapt.configs.full_rank import LNTuningConfig
from jaxadapt.methods.base import Examples
from jaxadapt.methods.copies import CopyingMethod, FullCopy


class LnTuning(CopyingMethod, peft_type="LN_TUNING"):
    """Full training of norms."""

    examples: Examples = ({"target_modules": ["input_layernorm", "norm"]}, {"target_modules": r".*(layernorm|v_proj)"})

    def copy_of(self, config: LNTuningConfig, parameter: str, lookup: bool) -> FullCopy:
        return FullCopy("target_modules", ".ln_tuning_layers", lookup)
