"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512) with PEFT's conventions: W + s·B·(E∘A), s = α / (init_r + 10⁻⁵).

E (r, 1) holds the singular values. Training keeps the rank `init_r` everywhere and sets the least important entries of
E to 0 (`allocate_ranks`); a file holds only the other ranks (`prune`). The scale keeps `init_r`. A convolution's kernel
is one matrix (out, channels·window). A stacked leaf holds modules of rank 0 only if all its modules have rank 0.

The arithmetic follows PEFT's `tuners/adalora/layer.py`, with its faults:

- PEFT ignores `use_rslora`, `alpha_pattern`, `r` and other fields of LoRA in a file; a new adapter may not set them.
- PEFT's allocator raises an error while the budget is still that of the start; here no entry is set to 0 then.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.configs.low_rank import AdaLoraConfig
from jaxadapt.core.errors import ConfigError, MismatchError
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
    tensor_roles,
)

__all__ = ["Allocation", "allocate_ranks", "orthogonality_loss", "prune"]

_PREFIX = "base_model.model."


class Adalora(MatrixMethod, peft_type="ADALORA"):
    """A singular value decomposition of the change; training removes its least important parts."""

    row_numbers: frozenset[str] = frozenset({"scale"})
    row_padded: frozenset[str] = frozenset({"r"})
    kinds: frozenset[str] = frozenset({"linear", "conv"})
    scaled: frozenset[str] = frozenset({"lora_E"})
    roles: Strings = tensor_roles(A="lora_A", B="lora_B", vector="lora_E")
    examples: Examples = ({"init_r": 3, "total_step": 10}, {"init_r": 2, "lora_alpha": 5, "total_step": 9, "tfinal": 2})

    def tensors(self, config: AdaLoraConfig, target: Target) -> tuple[MethodTensor, ...]:
        def rank(module: str) -> int:
            return sum(config.mask_of(module))

        ranks = {rank(module) for module in target.modules}
        if 0 in ranks and len(ranks) > 1:
            raise target.refuse(
                "the adapter has rank 0 in some of its modules and another rank in others, which one stacked or fused"
                " parameter cannot hold; use an unrolled model"
            )
        r = (("r", target.rank(rank)),)
        a = axes_tensor("lora_A", "r in", r)
        if target.kind == "conv":
            if len(target.match.weight.right) != 4 or target.match.weight.groups > 1:
                raise target.refuse("PEFT implements ADALORA for 2-D convolutions without groups; exclude the module")
            size = target.own_size("lora_A", -1, lambda: target.in_size * math.prod(target.window))
            a = axes_tensor("lora_A", "r i", (*r, ("i", size)))
        return target.with_ranks((a, axes_tensor("lora_B", "out r", r), axes_tensor("lora_E", "r 1", r)), rank)

    def starts_unchanged(self, config: AdaLoraConfig) -> bool:
        return bool(config.init_lora_weights)

    def own(self, config: AdaLoraConfig, target: Target) -> OwnHparams:
        def scale(module: str) -> float:
            alpha = config.lora_alpha if config.lora_alpha > 0 else sum(config.mask_of(module))
            return alpha / (config.init_r + 1e-5)

        return OwnHparams(target.value(scale), dropout=config.lora_dropout)

    def init(self, config: AdaLoraConfig, tensor: MethodTensor, start: Start) -> Draw:
        defaults = AdaLoraConfig()
        wrong = [name for name in config.ignored if config.get(name) != defaults.get(name)]
        wrong += [] if isinstance(config.init_lora_weights, bool) else ["init_lora_weights"]
        if wrong:
            raise ConfigError(f"cannot start ADALORA with {', '.join(wrong)}: the method ignores it; leave it out")
        if config.total_step is None:
            raise ConfigError("cannot start ADALORA without total_step, which PEFT needs to load the file; set it")
        if not config.init_lora_weights:
            return Draw("normal", 1.0)
        return Draw("constant", 0.0) if tensor.name == "lora_E" else Draw("normal", 0.02)

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        return own.scale * (params["lora_B"] @ (params["lora_A"] * params["lora_E"])).reshape(w.shape)

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        a = params["lora_A"] * params["lora_E"]
        h = jnp.einsum("...i,ri->...r", x.astype(a.dtype), a)
        return y + own.scale * jnp.einsum("...r,or->...o", h, params["lora_B"])


# ---------------------------------------------------------------- training


def orthogonality_loss(tensors: Mapping[str, Array]) -> Array:
    """Return the mean of ‖A·Aᵀ − I‖ and ‖Bᵀ·B − I‖ (Frobenius norms), to add to the loss times `orth_reg_weight`.

    It follows the paper's equation 4 and PEFT's `tuners/adalora/model.py`.

    Args:
        tensors: `{key: array}` of an adapter, lora_A (r, in) and lora_B (out, r), as `to_peft(…).tensors` has them,
            also inside jit; other tensors are ignored.

    >>> float(orthogonality_loss({"q.lora_A": jnp.eye(2, 4), "q.lora_B": 2 * jnp.eye(4, 2)}))
    2.1213202476501465
    """
    a = [x @ x.T for key, x in tensors.items() if key.rpartition(".")[2] == "lora_A"]
    b = [x.T @ x for key, x in tensors.items() if key.rpartition(".")[2] == "lora_B"]
    squares = [jnp.sum((x - jnp.eye(len(x), dtype=x.dtype)) ** 2) for x in (*a, *b)]
    if not squares:
        raise MismatchError("cannot compute the orthogonality loss: there is no tensor lora_A or lora_B")
    # The gradient of a norm of 0 is 0, as in PyTorch.
    norms = [jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0) for square in squares]
    return sum(norms[1:], norms[0]) / len(norms)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Allocation:
    """The state of the allocator between two steps; a pytree, to store in a checkpoint.

    Attributes:
        importance: `{key: array}`, the average of |parameter·gradient|, in the tensor's shape.
        uncertainty: `{key: array}`, the average deviation from that average.
        masks: `{path of lora_E: booleans (r,)}` of the last allocation; empty before the first.
    """

    importance: Mapping[str, Array]
    uncertainty: Mapping[str, Array]
    masks: Mapping[str, Array]

    @staticmethod
    def start(tensors: Mapping[str, Array]) -> Allocation:
        """Return the state before the first step, for the tensors of `allocate_ranks`."""
        zeros = {key: jnp.zeros(x.shape, x.dtype) for key, x in tensors.items() if _kind(key)}
        return Allocation(zeros, dict(zeros), {})


def rank_budget(config: AdaLoraConfig, step: int, start: int, target: int) -> int:
    """Return the number of ranks that may remain after a step: a cubic decrease from `start` to `target`.

    >>> [rank_budget(AdaLoraConfig(total_step=10, tfinal=2), step, 24, 8) for step in (0, 4, 8, 9)]
    [24, 10, 8, 8]
    """
    assert config.total_step is not None
    last = config.total_step - config.tfinal
    if step <= config.tinit:
        return start
    left = 1 - (step - config.tinit) / (last - config.tinit)
    return target if step > last else int((start - target) * left**3 + target)


def allocate_ranks(
    config: AdaLoraConfig,
    state: Allocation,
    step: int,
    tensors: Mapping[str, Array],
    gradients: Mapping[str, Array],
) -> tuple[Allocation, dict[str, Array]]:
    """Return the next state, and the tensors with the least important entries of E set to 0.

    Call it after each update, with the step's number. It follows the paper's algorithm 1 and PEFT's `RankAllocator`.

    Args:
        state: `Allocation.start(tensors)` before the first step.
        step: the number of the step; PEFT's examples count from 0. It decides the operations, so it is static in jit.
        tensors: `{key: array}` of the whole adapter in PyTorch's layout, as `to_peft(…).tensors` has them.
        gradients: the gradients of the loss in this step, with the same keys.

    Raises:
        ConfigError: `total_step` is missing, or `target_r` is larger than `init_r`.
    """
    if config.total_step is None or config.target_r > config.init_r:
        raise ConfigError(
            f"cannot allocate ranks with total_step={config.total_step}, target_r={config.target_r} and"
            f" init_r={config.init_r}: set total_step to the number of updates, and target_r to at most init_r"
        )
    last = config.total_step - config.tfinal
    importance, uncertainty, masks = dict(state.importance), dict(state.uncertainty), state.masks
    if step < last:
        for key in importance:
            now = jnp.abs(tensors[key] * gradients[key])
            importance[key] = config.beta1 * importance[key] + (1 - config.beta1) * now
            uncertainty[key] = config.beta2 * uncertainty[key] + (1 - config.beta2) * jnp.abs(now - importance[key])
    if step == last or (config.tinit < step < last and step % config.deltaT == 0):
        scores = _scores({key: importance[key] * uncertainty[key] for key in importance})
        start = sum(len(score) for score in scores.values())
        removed = start - rank_budget(config, step, start, config.target_r * len(scores))
        if removed:
            threshold = jnp.sort(jnp.concatenate(list(scores.values())))[removed - 1]
            masks = {name: score > threshold for name, score in scores.items()}
    if step == last:
        importance, uncertainty = (
            {key: jnp.zeros_like(x) for key, x in each.items()} for each in (importance, uncertainty)
        )
    is_masked = masks and (step >= last or masks is not state.masks)
    masked = {
        key: jnp.where(masks[key.removeprefix(_PREFIX)][:, None], tensors[key], 0)
        for key in importance
        if is_masked and _kind(key) == "lora_E"
    }
    return Allocation(importance, uncertainty, masks), {**tensors, **masked}


def prune(
    config: AdaLoraConfig, tensors: Mapping[str, Array], masks: Mapping[str, Array]
) -> tuple[AdaLoraConfig, dict[str, Array]]:
    """Return the configuration and the tensors of a file that holds only the ranks which `masks` keep.

    Args:
        tensors: `{key: array}` of the whole adapter in PyTorch's layout.
        masks: `Allocation.masks`.

    >>> tensors = {"base_model.model.q.lora_E": np.ones((2, 1)), "base_model.model.q.lora_A": np.ones((2, 4))}
    >>> config, tensors = prune(AdaLoraConfig(init_r=2), tensors, {"q.lora_E": np.array([True, False])})
    >>> config.mask_of("q"), {key: x.shape for key, x in tensors.items()}
    ((True, False), {'base_model.model.q.lora_E': (1, 1), 'base_model.model.q.lora_A': (1, 4)})
    """
    kept = {name: np.asarray(mask) for name, mask in masks.items()}
    out = dict(tensors)
    for key, x in tensors.items():
        mask = kept.get(key.removeprefix(_PREFIX).rpartition(".")[0] + ".lora_E")
        if _kind(key) and mask is not None:
            out[key] = np.asarray(x)[:, mask] if _kind(key) == "lora_B" else np.asarray(x)[mask]
    return config.replace(rank_pattern={name: mask.tolist() for name, mask in kept.items()}), out


def _kind(key: str) -> str:
    name = key.rpartition(".")[2]
    return name if name in Adalora.roles else ""


def _scores(elements: Mapping[str, Array]) -> dict[str, Array]:
    """Return the importance of each rank, `{path of lora_E: (r,)}`, from that of each element."""
    scores: dict[str, Array] = {}
    for key, x in elements.items():
        name = key.removeprefix(_PREFIX).rpartition(".")[0] + ".lora_E"
        score = x[:, 0] if _kind(key) == "lora_E" else x.mean(0 if _kind(key) == "lora_B" else 1)
        scores[name] = scores[name] + score if name in scores else score
    return scores
