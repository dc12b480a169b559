"""Super-Tuning (2026, arXiv:2607.09287) with PEFT's conventions: W plus values at its largest entries, and LoRA.

The positions are flat indices into PyTorch's weight, of the (1 − sparsity) share of entries with the largest magnitude,
or the smallest. With a rank the change also has LoRA's product s·B·A, s = α/r (`tuners/supertuning/layer.py`). The
layer runs with the effective weight. A file may lack the positions, which then follow from the base weight, in order
of magnitude; PyTorch does not define the order of equal magnitudes. PEFT's dropout of LoRA's input is for training only
and is refused for a new adapter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxadapt.configs.full_rank import SupertuningConfig
from jaxadapt.core.errors import ConfigError
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
    axes_tensor,
    own_tensor,
    tensor_roles,
)

VALUES, INDICES, LORA_A, LORA_B = (f"supertuning_{name}" for name in ("values", "indices", "lora_A", "lora_B"))


class Supertuning(MatrixMethod, peft_type="SUPERTUNING"):
    """A change of the largest entries of a weight, optionally with LoRA's."""

    scaled: frozenset[str] = frozenset({VALUES, LORA_B})
    roles: Strings = tensor_roles(A=LORA_A, B=LORA_B, other=VALUES, frozen=INDICES)
    examples: Examples = (
        {"sparsity": 0.8},
        {"sparsity": 0.9, "select_top": False, "r": 2, "lora_alpha": 3.0, "save_precomputed_indices": False},
    )

    def tensors(self, config: SupertuningConfig, target: Target) -> tuple[MethodTensor, ...]:
        def count() -> int:
            size = target.out_size * target.in_size
            entries = int(size * (1 - config.sparsity))
            if entries < 1:
                raise target.refuse(
                    f"sparsity={config.sparsity} leaves none of the weight's {size} entries to train; choose a smaller"
                    " sparsity"
                )
            return entries

        n = target.own_size(VALUES, 0, count)
        sides = () if config.r is None else ((LORA_A, "r in"), (LORA_B, "out r"))
        return (
            own_tensor(VALUES, (n,)),
            own_tensor(
                INDICES,
                (n,),
                trained=False,
                dtype="int32",
                from_base=True,
                optional=True,
                in_file=config.save_precomputed_indices,
            ),
            *(axes_tensor(name, axes, (("r", config.r or 0),), f".{name}.weight") for name, axes in sides),
        )

    def own(self, config: SupertuningConfig, target: Target) -> OwnHparams:
        return OwnHparams(0.0 if config.r is None else float(config.lora_alpha or 0) / config.r)

    def init(self, config: SupertuningConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if config.r is not None and config.lora_dropout:
            raise ConfigError(
                "cannot train SUPERTUNING with lora_dropout: the layer runs with the effective weight, which has no"
                " dropout; set lora_dropout to 0.0"
            )
        if tensor.name == INDICES:
            scores = jnp.abs(start.w).reshape(-1)
            return jax.lax.top_k(scores if config.select_top else -scores, start.shape[0])[1]
        return super().init(config, tensor, start)

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        values = params[VALUES]
        change = jnp.zeros(w.size, values.dtype).at[params[INDICES]].add(values).reshape(w.shape)
        return change + own.scale * (params[LORA_B] @ params[LORA_A]) if LORA_A in params else change
