"""VB-LoRA (Li et al. 2024, arXiv:2405.15179) with PEFT's conventions: W + B·A of vectors from a shared bank.

Each part of `vector_length` numbers of A (r, inputs) and B (outputs, r) is a mix of `topk` vectors of the bank, with
the softmax of their logits as weights (`tuners/vblora/layer.py`). A file has the logits of all vectors, or with
`save_only_topk_weights` the chosen vectors and all their weights but the last, which is 1 minus the others. PEFT does
not train an adapter of the second form, since the choice is fixed; here its weights are frozen too, and a new adapter
of it is refused. PEFT's `topk` must not be larger than `num_vectors`, which PEFT does not check.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxadapt.configs.fixed_bases import VBLoRAConfig
from jaxadapt.core.errors import ConfigError
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
    own_tensor,
    tensor_roles,
)

BANK = "vblora_vector_bank"
INDICES, WEIGHTS = "topk_indices", "topk_weights"


class Vblora(FactoredMethod, peft_type="VBLORA"):
    """Low-rank matrices whose parts are mixes of vectors from one bank."""

    roles: Strings = tensor_roles(
        other=f"vblora_logits_A vblora_logits_B {BANK}",
        frozen=" ".join(f"vblora_logits_{side}_{name}" for side in "AB" for name in (INDICES, WEIGHTS)),
    )
    examples: Examples = (
        {"r": 2, "num_vectors": 9, "vector_length": 4},
        {"r": 3, "num_vectors": 6, "vector_length": 8, "topk": 3, "init_vector_bank_bound": 0.5},
    )

    def tensors(self, config: VBLoRAConfig, target: Target) -> tuple[MethodTensor, ...]:
        def count(size: int) -> int:
            if size % config.vector_length:
                raise target.refuse(
                    f"vector_length={config.vector_length} does not divide {size}, a size of the weight; choose a"
                    " length that divides the inputs and the outputs of every module"
                )
            return size // config.vector_length

        a, b, end = "vblora_logits_A", "vblora_logits_B", f"_{INDICES}" if config.save_only_topk_weights else ""
        shapes = {
            a: (config.r, target.own_size(f"{a}{end}", 1, lambda: count(target.in_size))),
            b: (target.own_size(f"{b}{end}", 0, lambda: count(target.out_size)), config.r),
        }
        if not config.save_only_topk_weights:
            return tuple(own_tensor(name, (*shape, config.num_vectors)) for name, shape in shapes.items())
        dtype = "uint8" if config.num_vectors < 2**8 else "int16" if config.num_vectors < 2**15 else "int32"  # as PEFT
        return tuple(
            tensor
            for name, shape in shapes.items()
            for tensor in (
                own_tensor(f"{name}_{INDICES}", (*shape, config.topk), trained=False, dtype=dtype),
                own_tensor(f"{name}_{WEIGHTS}", (*shape, config.topk - 1), trained=False),
            )
        )

    def shared(self, config: VBLoRAConfig, targets: Targets, found: Shapes) -> tuple[MethodTensor, ...]:
        return (own_tensor(BANK, (config.num_vectors, config.vector_length)),)

    def starts_unchanged(self, config: VBLoRAConfig) -> bool:
        return False

    def own(self, config: VBLoRAConfig, target: Target) -> OwnHparams:
        return OwnHparams(size=config.topk, dropout=config.vblora_dropout)

    def init(self, config: VBLoRAConfig, tensor: MethodTensor, start: Start) -> Draw:
        if config.save_only_topk_weights:
            raise ConfigError(
                "cannot create an adapter with save_only_topk_weights=true: its vectors are chosen in training, which"
                " needs the logits of all of them. Set save_only_topk_weights to false"
            )
        if tensor.name == BANK:
            return Draw("uniform", config.init_vector_bank_bound)
        return Draw("normal", config.init_logits_std)

    def factors(self, own: OwnHparams, params: Params, shape: tuple[int, int]) -> tuple[Array, Array]:
        bank = params[BANK]
        mixed: list[Array] = []
        for side in "AB":
            name = f"vblora_logits_{side}"
            if name in params:
                indices, weights = choose_vectors(params[name], own.size)
            else:
                indices, weights = params[f"{name}_{INDICES}"], params[f"{name}_{WEIGHTS}"]
                weights = jnp.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], axis=-1)
            mixed.append((weights[..., None] * bank[indices]).sum(-2))
        a, b = mixed  # (r, tiles, length), (tiles, r, length)
        return a.reshape(len(a), -1), b.transpose(0, 2, 1).reshape(-1, b.shape[1])


def choose_vectors(logits: Array, topk: int) -> tuple[Array, Array]:
    """Return the indices (…, topk) of the vectors with the largest logits (…, vectors), and their weights (…, topk).

    An adapter with `save_only_topk_weights` stores these indices, and the weights without the last.

    >>> choose_vectors(jnp.array([0.0, 3.0, 3.0]), 2)[1].tolist()
    [0.5, 0.5]
    """
    # XLA sorts arrays of three axes for `top_k` on the CPU, and matrices not.
    chosen = jax.lax.top_k(logits.reshape(-1, logits.shape[-1]), topk)
    largest, indices = (x.reshape(*logits.shape[:-1], topk) for x in chosen)
    powers = jnp.exp(largest - largest[..., :1])
    return indices, powers / powers.sum(-1, keepdims=True)
