"""Values at fixed positions of the weight: SHiRA and Super-Tuning.

SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175) with PEFT's conventions: W plus values at fixed positions.

The number of values is r·(out + in). Their positions (2, values) are rows and columns of PyTorch's weight. A file holds
them; PEFT reads a file without them if `random_seed` is set, and so does jaxadapt. The layer runs with the effective
weight, as in PEFT's `tuners/shira/layer.py`. PEFT also accepts positions from a function of the user, `mask_fn`, which
no file names; jaxadapt applies such a file, and refuses a new adapter of it.

Super-Tuning (2026, arXiv:2607.09287) with PEFT's conventions: W plus values at its largest entries, and LoRA.

The positions are flat indices into PyTorch's weight, of the (1 − sparsity) share of entries with the largest magnitude,
or the smallest. With a rank the change also has LoRA's product s·B·A, s = α/r (`tuners/supertuning/layer.py`). The
layer runs with the effective weight. A file may lack the positions, which then follow from the base weight, in order
of magnitude; PyTorch does not define the order of equal magnitudes. PEFT's dropout of LoRA's input is for training only
and is refused for a new adapter.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxadapt.arrays.random_draws import draw_arrays
from jaxadapt.configs.full_rank import ShiraConfig, SupertuningConfig
from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    MatrixMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Start,
    Target,
    TorchRandom,
    axes_tensor,
    own_tensor,
    tensor_roles,
)

# ---------------------------------------------------------------- shira


class Shira(MatrixMethod):
    """A sparse change at positions that stay fixed."""

    peft_type = "SHIRA"
    scaled = frozenset({"shira_weight"})
    roles = tensor_roles(other="shira_weight", frozen="shira_indices")
    examples = ({"r": 2, "random_seed": 3}, {"r": 1, "init_weights": False})

    def tensors(self, config: ShiraConfig, target: Target) -> tuple[MethodTensor, ...]:
        def count() -> int:
            entries, size = config.r * (target.out_size + target.in_size), target.out_size * target.in_size
            if entries > size:
                raise target.refuse(
                    f"cannot change {entries} entries, r={config.r} times the sum of the weight's sizes, of a weight"
                    f" with {size} entries; choose a smaller r"
                )
            return entries

        n = target.own_size("shira_weight", 0, count)
        is_drawn = config.mask_type == "random" and config.random_seed is not None
        return (
            own_tensor("shira_weight", (n,)),
            own_tensor("shira_indices", (2, n), trained=False, dtype="int32", optional=is_drawn),
        )

    def init(self, config: ShiraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == "shira_weight":
            return Draw("constant", 0.0) if config.init_weights else Draw("normal", 1.0)
        if config.mask_type != "random":
            raise ConfigError(
                f"cannot create an adapter with mask_type={config.mask_type!r}: its positions come from a function that"
                " the configuration does not contain. Set mask_type to 'random'"
            )
        count, columns = start.shape[1], start.fan_in
        size = (count // config.r - columns) * columns
        if config.random_seed is None:
            flat = _positions(start.key, size, count)
        else:
            flat = np.sort(TorchRandom(config.random_seed).permutation(size, count))
        xp: Any = jnp if isinstance(flat, Tracer) else np
        return xp.stack([flat // columns, flat % columns]).astype("int32")

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        rows, columns = params["shira_indices"]
        values = params["shira_weight"]
        return jnp.zeros(w.shape, values.dtype).at[rows, columns].add(values)


def _positions(key: Any, size: int, count: int) -> Array:
    """Return `count` different numbers below `size` in ascending order: the places of the least of `size` draws.

    They are the same inside jit.
    """
    values = draw_arrays(key, {"positions": (Draw("uniform", 1.0), (size,))}, np.float32)["positions"]
    xp: Any = jnp if isinstance(values, Tracer) else np
    bound = xp.partition(values, count - 1)[count - 1]
    equal = values == bound  # several draws may be equal; the first of them count
    chosen = (values < bound) | (equal & (xp.cumsum(equal) <= count - (values < bound).sum()))
    return jnp.flatnonzero(chosen, size=count) if xp is jnp else np.flatnonzero(chosen)


# ---------------------------------------------------------------- supertuning


VALUES, INDICES, LORA_A, LORA_B = (f"supertuning_{name}" for name in ("values", "indices", "lora_A", "lora_B"))


class Supertuning(MatrixMethod):
    """A change of the largest entries of a weight, optionally with LoRA's."""

    peft_type = "SUPERTUNING"
    scaled = frozenset({VALUES, LORA_B})
    roles = tensor_roles(A=LORA_A, B=LORA_B, other=VALUES, frozen=INDICES)
    examples = (
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

        n, saved = target.own_size(VALUES, 0, count), config.save_precomputed_indices
        sides = () if config.r is None else ((LORA_A, "r in"), (LORA_B, "out r"))
        return (
            own_tensor(VALUES, (n,)),
            own_tensor(INDICES, (n,), trained=False, dtype="int32", from_base=True, optional=True, in_file=saved),
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
        if tensor.name == LORA_A or (tensor.name == LORA_B and not config.init_weights):
            return Draw.kaiming(start.shape[1])
        return Draw("constant", 0.0) if config.init_weights else Draw("normal", 1.0)

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        values = params[VALUES]
        change = jnp.zeros(w.size, values.dtype).at[params[INDICES]].add(values).reshape(w.shape)
        return change + own.scale * (params[LORA_B] @ params[LORA_A]) if LORA_A in params else change
