"""Low-rank matrices from vectors that modules share: TinyLoRA, Uni-LoRA and VB-LoRA.

TinyLoRA (arXiv:2602.04118) with PEFT's conventions: W + B·R·A, where R = Σ v_i·P_i has a tiny trained vector v.

A = √S·Vᵀ (r, inputs) and B = U·√S (outputs, r) are the largest singular vectors of the weight; an embedding's are those
of its table (vocabulary, dimension). P (u, r, r) is random. Files have A and B, whose signs the weight does not
determine, and P with `save_projection`. A group of modules, which are neighbours in the order of PyTorch's modules,
shares one v: the tensor `tinylora_v` (groups, u), which a file has as `tinylora_v.0`, `tinylora_v.1` and so on
(`tuners/tinylora/model.py`). PEFT numbers the modules in the same order for the seeds of P.

Uni-LoRA (arXiv:2506.00799) with PEFT's conventions: W + B·A, whose entries are those of one trained vector.

Each entry of A (r, inputs) and B (outputs, r) is θ[k]·c[k], with an index k of the shared vector θ and c[k] = 1/√n for
its n uses. The indices are a shuffled list of all indices, each as often as the others, dealt to the modules in
PyTorch's order, to A before B (`tuners/unilora/model.py`), by NumPy's generator as in PEFT. With `save_indices` a file
has the indices and the factors, and no order is needed. PEFT writes such indices as int64; here they are int32, which
PEFT reads.

VB-LoRA (Li et al. 2024, arXiv:2405.15179) with PEFT's conventions: W + B·A of vectors from a shared bank.

Each part of `vector_length` numbers of A (r, inputs) and B (outputs, r) is a mix of `topk` vectors of the bank, with
the softmax of their logits as weights (`tuners/vblora/layer.py`). A file has the logits of all vectors, or with
`save_only_topk_weights` the chosen vectors and all their weights but the last, which is 1 minus the others. PEFT does
not train an adapter of the second form, since the choice is fixed; here its weights are frozen too, and a new adapter
of it is refused. PEFT's `topk` must not be larger than `num_vectors`, which PEFT does not check.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays import products
from jaxadapt.configs.fixed_bases import TinyLoraConfig, UniLoraConfig, VBLoRAConfig
from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Drop,
    FactoredMethod,
    MatrixHparams,
    MethodTensor,
    Operation,
    OwnHparams,
    Params,
    Shapes,
    Start,
    Target,
    Targets,
    TorchRandom,
    Use,
    axes_tensor,
    own_tensor,
    tensor_roles,
)

# ---------------------------------------------------------------- tinylora


class TinyLora(FactoredMethod):
    """A change between the weight's own singular vectors."""

    peft_type = "TINYLORA"
    ordered = True
    kinds = frozenset({"linear", "embedding"})
    roles = tensor_roles(vector="tinylora_v", frozen="tinylora_A tinylora_B tinylora_P tinylora_group")
    examples = (
        {"u": 5, "init_weights": "uniform"},
        {"r": 3, "u": 4, "weight_tying": 0.6, "save_projection": False, "projection_seed": 7},
    )

    def tensors(self, config: TinyLoraConfig, target: Target) -> tuple[MethodTensor, ...]:
        if target.kind == "embedding" and config.tinylora_dropout:
            raise target.refuse("tinylora_dropout is not implemented for embeddings; set it to 0")
        rank = target.own_size(
            "tinylora_A", 0, lambda: target.cap_rank("TINYLORA", config.r, min(target.in_size, target.out_size))
        )
        first, last = ("out", "in") if target.kind == "embedding" else ("in", "out")
        frozen: dict[str, Any] = {"own": (("r", rank),), "trained": False, "from_base": True}
        return (
            axes_tensor("tinylora_A", f"r {first}", **frozen),
            axes_tensor("tinylora_B", f"{last} r", **frozen),
            own_tensor(
                "tinylora_P", (config.u, rank, rank), trained=False, optional=True, in_file=config.save_projection
            ),
            own_tensor("tinylora_group", (1,), trained=False, in_file=False, dtype="int32"),
        )

    def shared(self, config: TinyLoraConfig, targets: Targets, found: Shapes) -> tuple[MethodTensor, ...]:
        count = sum(len(tuple(target.modules)) for target in targets)
        # The trained parameters alone are v, without the modules.
        groups = _groups(config, count) if targets else found["tinylora_v"][0]
        return (own_tensor("tinylora_v", (groups, config.u), numbered=True),)

    def starts_unchanged(self, config: TinyLoraConfig) -> bool:
        return config.init_weights != "uniform"

    def own(self, config: TinyLoraConfig, target: Target) -> OwnHparams:
        return OwnHparams(kind=target.kind, dropout=0.0 if target.kind == "embedding" else config.tinylora_dropout)

    def init(self, config: TinyLoraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == "tinylora_v":
            return Draw("uniform", config.init_v_bound) if config.init_weights == "uniform" else Draw("constant", 0.0)
        if tensor.name == "tinylora_A":
            _, s, v = jnp.linalg.svd(start.w.astype("float32"), full_matrices=False)
            return (jnp.sqrt(s)[:, None] * v)[: start.shape[0]]
        if tensor.name == "tinylora_B":  # U·√S = W·V/√S
            a = start.params["tinylora_A"]
            values = jnp.square(a).sum(1)
            return start.w.astype(a.dtype) @ a.T / jnp.where(values > 0, values, 1)[None]
        modules = list(start.ordered_modules)
        place = modules.index(start.module)
        if tensor.name == "tinylora_P":
            return TorchRandom(config.projection_seed + place).normal(start.shape) / np.float32(start.shape[1] ** 0.5)
        groups = _groups(config, len(modules))
        return np.array([min(place // (len(modules) // groups), groups - 1)], np.int32)

    def factors(self, own: OwnHparams, params: Params, shape: tuple[int, int]) -> tuple[Array, Array]:
        return _middle(params) @ params["tinylora_A"], params["tinylora_B"]

    def output(
        self,
        hparams: MatrixHparams,
        params: Params,
        use: Use | Operation,
        x: Array,
        y: Array,
        drop: Drop | None,
        w: Array,
    ) -> Array:
        if hparams.own.kind != "embedding":
            return super().output(hparams, params, use, x, y, drop, w)
        if isinstance(use, Use):
            return y  # the head of a model with tied embeddings: a separate module in PEFT, which is not adapted
        rows, columns = params["tinylora_B"].T, (_middle(params) @ params["tinylora_A"]).T
        return (y + products.low_rank_delta(use, 1.0, 1, rows, columns, x, y)).astype(y.dtype)

    def describe_change(self, config: TinyLoraConfig) -> None:
        return None


def _groups(config: TinyLoraConfig, modules: int) -> int:
    """Return the number of groups of modules, as PEFT rounds it."""
    return max(1, round(modules * (1.0 - config.weight_tying)))


def _middle(params: Params) -> Array:
    """Return R (r, r)."""
    v = params["tinylora_v"][params["tinylora_group"][0]]
    return jnp.einsum("u,uij->ij", v, params["tinylora_P"].astype(v.dtype))


# ---------------------------------------------------------------- unilora


THETA = "unilora_theta_d"


class UniLora(FactoredMethod):
    """Low-rank matrices of the entries of one vector."""

    peft_type = "UNILORA"
    ordered = True
    roles = tensor_roles(
        vector=THETA, frozen=" ".join(f"unilora_{name}_{side}" for name in ("indices", "scales") for side in "AB")
    )
    examples = ({"theta_d_length": 11}, {"r": 2, "theta_d_length": 40, "proj_seed": 3, "init_theta_d_bound": 0.5})

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

    def describe_change(self, config: UniLoraConfig) -> None:
        return None


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


# ---------------------------------------------------------------- vblora


BANK = "vblora_vector_bank"
INDICES, WEIGHTS = "topk_indices", "topk_weights"


@dataclasses.dataclass(frozen=True)
class VbloraHparams:
    """The hyperparameters of a site: the number of mixed vectors, and the dropout rate."""

    topk: int
    dropout: float


class Vblora(FactoredMethod):
    """Low-rank matrices whose parts are mixes of vectors from one bank."""

    peft_type = "VBLORA"
    roles = tensor_roles(
        other=f"vblora_logits_A vblora_logits_B {BANK}",
        frozen=" ".join(f"vblora_logits_{side}_{name}" for side in "AB" for name in (INDICES, WEIGHTS)),
    )
    examples = (
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

    def own(self, config: VBLoRAConfig, target: Target) -> VbloraHparams:
        return VbloraHparams(config.topk, config.vblora_dropout)

    def init(self, config: VBLoRAConfig, tensor: MethodTensor, start: Start) -> Draw:
        if config.save_only_topk_weights:
            raise ConfigError(
                "cannot create an adapter with save_only_topk_weights=true: its vectors are chosen in training, which"
                " needs the logits of all of them. Set save_only_topk_weights to false"
            )
        if tensor.name == BANK:
            return Draw("uniform", config.init_vector_bank_bound)
        return Draw("normal", config.init_logits_std)

    def factors(self, own: VbloraHparams, params: Params, shape: tuple[int, int]) -> tuple[Array, Array]:
        bank = params[BANK]
        mixed: list[Array] = []
        for side in "AB":
            name = f"vblora_logits_{side}"
            if name in params:
                indices, weights = choose_vectors(params[name], own.topk)
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
