"""VeRA (Kopiczko et al. 2024, arXiv:2310.11454) with PEFT's conventions: W + (b∘B)·(d∘A).

A (r, inputs) and B (outputs, r) are random and belong to the whole adapter, with the sizes of its largest module; each
module uses their first columns and rows. Only the vectors b (out) and d (r) are trained. The projections are PyTorch's
own random numbers (`tuners/vera/model.py`), so a file without them (`save_projection=False`) has the same ones here.
"""

from __future__ import annotations

from jaxadapt.configs.fixed_bases import VeraConfig
from jaxadapt.methods.matrix import Examples, MethodTensor, Projected, Strings, Target, axes_tensor, tensor_roles


class Vera(Projected, peft_type="VERA"):
    """Shared random projections, scaled by two vectors per module."""

    row_padded: frozenset[str] = frozenset({"rank"})
    scaled: frozenset[str] = frozenset({"vera_lambda_b"})
    roles: Strings = tensor_roles(vector="vera_lambda_b vera_lambda_d", frozen="vera_A vera_B")
    examples: Examples = ({"r": 3}, {"r": 4, "save_projection": False, "projection_prng_key": 7})

    def tensors(self, config: VeraConfig, target: Target) -> tuple[MethodTensor, ...]:
        return (
            axes_tensor("vera_lambda_b", "out"),
            axes_tensor("vera_lambda_d", "rank", (("rank", config.r),)),
        )
