"""Changes that depend on the weight: DeLoRA, HiRA, PEANuT, DEFT and OSF.

DeLoRA (Bini et al. 2025, arXiv:2503.18225) with PEFT's conventions: W + (B·diag(λ / (r·‖a‖·‖b‖))·A)∘n.

‖a‖ and ‖b‖ are the norms of A's rows and B's columns, at least 1e-4; n has the norms of the original weight's columns.
PEFT saves n, and so does jaxadapt; a file without it gets the norms of the base. The arithmetic follows PEFT's
`tuners/delora/layer.py`. Its `module_dropout` drops entries of the input, not modules, and so it does here.

HiRA (Huang et al., ICLR 2025, openreview TwJrTz9cRS) with PEFT's conventions: W + W∘(B·A), without a scale.

A is (r, in) and B (out, r). A convolution's window belongs to A, and an embedding's tensors are called
`hira_embedding_A` (r, vocabulary) and `hira_embedding_B` (dimension, r). The layer runs with the effective weight; with
dropout it adds the product with the change, and an embedding multiplies the rows that it looks up.
The arithmetic follows PEFT's `tuners/hira/layer.py`, with its faults:

- PEFT ignores `rank_pattern`. The rank of an existing adapter is that of its tensors; a new adapter may not set it.
- PEFT ignores "gaussian" for convolutions and draws A as by default.

PEANuT (Zhong et al. 2024, arXiv:2410.01870) with PEFT's conventions: W + s·(net(Wᵀ)·Bᵀ)ᵀ.

The network's rows are the weight's columns: h = f(Wᵀ·Aᵀ), then `depth` encoders h = f(h·Eᵀ) and `depth` decoders
h = f(h·Dᵀ) + the input of the encoder on the other side. Because the change is a function of the whole weight, the
layer runs with the effective weight. The arithmetic follows PEFT's `tuners/peanut/layer.py`. An activation of
transformers that is not in `ACTIVATIONS` is refused, such as those with parameters of their own.

DEFT with PEFT's conventions: W + L·(s·R − Gᵀ·W), which replaces a subspace of the outputs.

L and G (out, r) follow from P (out, r): L = P and G = relu(P), or L = G = Q of the decomposition P = Q·U. The signs of
Q's columns are those of Householder's method, as in PyTorch. s = α / r with the rank that the module has (at most its
number of outputs), or 1 without α. With `para`, there is no R. The arithmetic follows PEFT's `tuners/deft/layer.py`.
Two low-rank products change each use of the weight, one of the output without its bias and without dropout, and one of
the input. Several active adapters each project the output of the base weight.

OSF (Nayak et al. 2025, arXiv:2504.07097) with PEFT's conventions: the low part of the decomposition of W is trained.

W = U_high·diag(S_high)·V_high + U_low·diag(S_low)·V_low, with the `effective_rank` largest singular values in the first
term. It stays; the file has the second term, `osf_svd_params.U_low` (out, k), `S_low` (k) and `V_low` (k, in). The
first term is U_high·U_highᵀ·W, which does not depend on the signs of singular vectors, so a use of the weight costs a
projection of its output and a product of rank k. No file has U_high and V_high. The gradients of U_low and V_low are
projected off U_high and V_high. The arithmetic follows PEFT's `tuners/osf/layer.py`, with its faults:

- PEFT applies only the first of several active adapters; here each changes what the one before it gives.
- PEFT's `unmerge` warns and does nothing; here it is an error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.nn as functions
import jax.numpy as jnp

from jaxadapt.arrays import products
from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.configs.full_rank import OSFConfig
from jaxadapt.configs.low_rank import DeftConfig, DeloraConfig, HiraConfig, PeanutConfig
from jaxadapt.configs.validation import compile_pattern
from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Drop,
    Effects,
    MatrixHparams,
    MatrixMethod,
    MethodTensor,
    Operation,
    OwnHparams,
    Params,
    Start,
    Target,
    Use,
    at_least_float32,
    axes_tensor,
    own_tensor,
    shared_value,
    tensor_roles,
)

# ---------------------------------------------------------------- delora


@dataclasses.dataclass(frozen=True)
class DeloraHparams:
    """The hyperparameters of a site: the rank, a number or a `PerEntry`; the dropout rate."""

    rank: Any
    dropout: float


class Delora(MatrixMethod):
    """A low-rank change of unit components, with one strength."""

    peft_type = "DELORA"
    row_numbers = frozenset({"rank"})
    row_padded = frozenset({"r"})
    scaled = frozenset({"delora_lambda"})
    roles = tensor_roles(A="delora_A", B="delora_B", vector="delora_lambda", frozen="delora_w_norm")
    examples = (
        {"r": 2},
        {
            "r": 3,
            "delora_lambda": 4,
            "init_weights": False,
            "rank_pattern": {".*q(_proj)?": 2},
            "lambda_pattern": {".*[qv](_proj)?": 7.5},
        },
    )

    def tensors(self, config: DeloraConfig, target: Target) -> tuple[MethodTensor, ...]:
        r = (("r", target.rank(config.rank_of)),)
        return target.with_ranks(
            (
                axes_tensor("delora_A", "r in", r),
                axes_tensor("delora_B", "out r", r),
                own_tensor("delora_lambda", (1,)),
                axes_tensor("delora_w_norm", "in", from_base=True, trained=False, optional=True),
            ),
            config.rank_of,
        )

    def own(self, config: DeloraConfig, target: Target) -> DeloraHparams:
        return DeloraHparams(target.value(config.rank_of), config.module_dropout)

    def init(self, config: DeloraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        match tensor.name:
            case "delora_lambda":
                strength = find_pattern_value(config.lambda_pattern, start.module, config.delora_lambda)
                return Draw("constant", float(strength))
            case "delora_w_norm":
                return jnp.linalg.norm(at_least_float32(start.w), axis=0)
            case "delora_B" if config.init_weights:
                return Draw("constant", 0.0)
            case _:
                return Draw.kaiming(start.shape[1])

    def delta(self, own: DeloraHparams, params: Params, w: Array) -> Array:
        change = (params["delora_B"] * _strengths(own, params)[None]) @ params["delora_A"]
        return change * params["delora_w_norm"][None]

    def after(self, own: DeloraHparams, params: Params, x: Array, y: Array) -> Array:
        a, b = params["delora_A"], params["delora_B"]
        h = jnp.einsum("...i,ri->...r", x.astype(a.dtype) * params["delora_w_norm"], a)
        return y + jnp.einsum("...r,or->...o", h * _strengths(own, params), b)


def _strengths(own: DeloraHparams, params: Params) -> Array:
    """Return λ / (r·‖a‖·‖b‖) of each component; below the least norm, the norms get no gradient."""
    a, b = params["delora_A"], params["delora_B"]
    norms = [jnp.sqrt(jnp.maximum((x * x).sum(axis), 1e-8)) for x, axis in ((a, 1), (b, 0))]
    return params["delora_lambda"] / own.rank / (norms[0] * norms[1])


# ---------------------------------------------------------------- hira


class Hira(MatrixMethod):
    """The elementwise product of the weight and a low-rank matrix."""

    peft_type = "HIRA"
    kinds = frozenset({"linear", "embedding", "conv"})
    scaled = frozenset({"hira_B", "hira_embedding_B"})
    roles = tensor_roles(A="hira_A", B="hira_B", embedding="hira_embedding_A hira_embedding_B")
    examples = ({"r": 2}, {"r": 3, "init_weights": "gaussian"})

    def tensors(self, config: HiraConfig, target: Target) -> tuple[MethodTensor, ...]:
        if target.match.weight.groups > 1:
            raise target.refuse("PEFT does not implement HIRA for convolutions with groups; exclude the module")
        name = "hira_embedding" if target.kind == "embedding" else "hira"
        r = (("r", target.own_size(f"{name}_A", 0, lambda: config.r)),)
        ones = " 1" * (len(target.match.weight.right) - 2 if target.kind == "conv" else 0)
        return axes_tensor(f"{name}_A", "r in", r), axes_tensor(f"{name}_B", f"out r{ones}", r)

    def own(self, config: HiraConfig, target: Target) -> OwnHparams:
        return OwnHparams(kind=target.kind, dropout=0.0 if target.kind == "embedding" else config.hira_dropout)

    def effect(self, own: OwnHparams) -> Effects:
        return Effects("adds", form="use" if own.dropout or own.kind == "embedding" else "weight", reads=True)

    def init(self, config: HiraConfig, tensor: MethodTensor, start: Start) -> Draw:
        if config.rank_pattern:
            raise ConfigError("cannot start HIRA with rank_pattern: PEFT ignores it; unset it")
        if tensor.name.startswith("hira_embedding"):
            is_zero = config.init_weights is not False and tensor.name == "hira_embedding_A"
            return Draw("constant", 0.0) if is_zero else Draw("normal", 1.0)
        if not config.init_weights:
            return Draw("normal", 1.0)
        if tensor.name == "hira_B":
            return Draw("constant", 0.0)
        if config.init_weights == "gaussian" and start.hparams.kind == "linear":
            return Draw("normal", 1 / start.shape[0])
        return Draw.kaiming(math.prod(start.shape[1:]))

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        if own.kind == "embedding":  # PyTorch's table is (vocabulary, dimension)
            return w * (params["hira_embedding_B"] @ params["hira_embedding_A"]).T
        b = params["hira_B"]
        return w * jnp.einsum("or,r...->o...", b.reshape(b.shape[:2]), params["hira_A"])

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
        w = at_least_float32(w)
        if hparams.own.kind == "embedding":
            if isinstance(use, Use):
                return y  # the head of a model with tied embeddings: a separate module in PEFT, which is not adapted
            factors = params["hira_embedding_A"], params["hira_embedding_B"]
            rows = use.run(x, w)
            return (y + rows * products.low_rank_delta(use, 1.0, 1, *factors, x, rows)).astype(y.dtype)
        change = self.weight(hparams, params, dataclasses.replace(use.axes, parts=None), w) - w
        x = x if drop is None else drop(x)
        return (y + products.run_use(use, x, change.astype(x.dtype))).astype(y.dtype)


# ---------------------------------------------------------------- peanut


def _gelu(x: Array) -> Array:
    return functions.gelu(x, approximate=False)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        **dict.fromkeys(("gelu", "gelu_python"), _gelu),
        **dict.fromkeys(
            ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), functions.gelu
        ),
        "gelu_10": lambda x: jnp.clip(_gelu(x), -10, 10),
        "hardswish": functions.hard_swish,
        "leaky_relu": functions.leaky_relu,
        "linear": lambda x: x,
        "mish": functions.mish,
        "quick_gelu": lambda x: x * functions.sigmoid(1.702 * x),
        "relu": functions.relu,
        "relu2": lambda x: functions.relu(x) ** 2,
        "relu6": functions.relu6,
        "sigmoid": functions.sigmoid,
        **dict.fromkeys(("silu", "swish"), functions.silu),
        "tanh": jnp.tanh,
    }
)
"""The activation functions by their names in transformers."""


@dataclasses.dataclass(frozen=True)
class PeanutHparams:
    """The hyperparameters of a site: the number of encoders, the name of the activation, the factor."""

    depth: int
    activation: str
    scaling: float


class Peanut(MatrixMethod):
    """A network that computes the change from the weight."""

    peft_type = "PEANUT"
    scaled = frozenset({"peanut_B"})
    roles = tensor_roles(A="peanut_A", B="peanut_B")
    examples = ({"r": 3}, {"r": 4, "depth": 2, "act_fn": "silu", "scaling": 0.5, "init_weights": False})

    def check(self, config: PeanutConfig) -> None:
        if config.act_fn not in ACTIVATIONS:
            raise ConfigError(
                f"cannot apply PEANUT with act_fn {config.act_fn!r}; jaxadapt has {', '.join(sorted(ACTIVATIONS))}"
            )

    def tensors(self, config: PeanutConfig, target: Target) -> tuple[MethodTensor, ...]:
        r = (("r", config.r),)
        hidden = [f"{side}.{i}" for side in ("peanut_encoders", "peanut_decoders") for i in range(config.depth)]
        return (
            axes_tensor("peanut_A", "r out", r, suffix=".peanut_A.weight"),
            *(own_tensor(name.replace(".", "_"), (config.r, config.r), f".{name}.weight") for name in hidden),
            axes_tensor("peanut_B", "out r", r, suffix=".peanut_B.weight"),
        )

    def own(self, config: PeanutConfig, target: Target) -> PeanutHparams:
        return PeanutHparams(config.depth, config.act_fn, config.scaling)

    def effect(self, own: PeanutHparams) -> Effects:
        return Effects("adds", form="weight", reads=True)

    def init(self, config: PeanutConfig, tensor: MethodTensor, start: Start) -> Draw:
        if tensor.name == "peanut_B" and config.init_weights:
            return Draw("constant", 0.0)
        return Draw.kaiming(start.shape[1])

    def delta(self, own: PeanutHparams, params: Params, w: Array) -> Array:
        f = ACTIVATIONS[own.activation]
        h = f(w.T @ params["peanut_A"].T)
        inputs: list[Array] = []
        for i in range(own.depth):
            inputs.append(h)
            h = f(h @ params[f"peanut_encoders_{i}"].T)
        for i in range(own.depth):
            h = f(h @ params[f"peanut_decoders_{i}"].T) + inputs.pop()
        return own.scaling * (h @ params["peanut_B"].T).T


# ---------------------------------------------------------------- deft


@dataclasses.dataclass(frozen=True)
class DeftHparams:
    """The hyperparameters of a site: the factor s, the decomposition "relu" or "qr", the dropout rate."""

    scale: float
    decomposition: str
    dropout: float


class Deft(MatrixMethod):
    """The removal of a subspace, and a trained matrix in its place."""

    peft_type = "DEFT"
    row_numbers = frozenset({"scale"})
    roles = tensor_roles(B="deft_P", A="deft_R")
    examples = (
        {"r": 2},
        {"r": 3, "decomposition_method": "qr", "alpha": 5},
        {"r": 2, "para": True},
        {"r": 2, "para": True, "decomposition_method": "qr"},
        {"r": 2, "init_weights": False},
    )

    def tensors(self, config: DeftConfig, target: Target) -> tuple[MethodTensor, ...]:
        r = (("r", _rank(config, target)),)
        removed = axes_tensor("deft_P", "out r", r)
        return (removed,) if config.para else (removed, axes_tensor("deft_R", "r in", r, from_base=config.init_weights))

    def starts_unchanged(self, config: DeftConfig) -> bool:
        return config.init_weights and not config.para

    def own(self, config: DeftConfig, target: Target) -> DeftHparams:
        scale = config.alpha / _rank(config, target) if config.alpha else 1.0
        return DeftHparams(scale, config.decomposition_method, config.deft_dropout)

    def effect(self, own: DeftHparams) -> Effects:
        return Effects("adds", form="use", reads=True, sees="product")

    def init(self, config: DeftConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == "deft_P":
            return Draw("normal", 0.02)
        if not config.init_weights:
            return Draw("normal", 0.02 * config.init_scale)
        _, right = _sides(start.hparams, start.params)
        return right.T @ at_least_float32(start.w) / start.hparams.scale

    def delta(self, own: DeftHparams, params: Params, w: Array) -> Array:
        left, right = _sides(own, params)
        removed = right.T @ w
        return left @ (own.scale * params["deft_R"] - removed if "deft_R" in params else -removed)

    def after(self, own: DeftHparams, params: Params, x: Array, y: Array) -> Array:
        left, right = _sides(own, params)
        h = -jnp.einsum("...o,or->...r", y.astype(right.dtype), right)
        if "deft_R" in params:
            h = h + own.scale * jnp.einsum("...i,ri->...r", x.astype(right.dtype), params["deft_R"])
        return y + jnp.einsum("...r,or->...o", h, left)


def _rank(config: DeftConfig, target: Target) -> int:
    return target.own_size("deft_P", -1, lambda: target.cap_rank("DEFT", config.r, target.out_size))


def _sides(own: DeftHparams, params: Params) -> tuple[Array, Array]:
    """Return L and G (out, r) in float32."""
    p = at_least_float32(params["deft_P"])
    if own.decomposition == "relu":
        return p, functions.relu(p)
    q = jnp.linalg.qr(p)[0]
    return q, q


# ---------------------------------------------------------------- osf


_P = "osf_svd_params_"


class Osf(MatrixMethod):
    """Training of the small singular directions."""

    peft_type = "OSF"
    roles = tensor_roles(A=f"{_P}V_low", B=f"{_P}U_low", vector=f"{_P}S_low", frozen="osf_U_high osf_V_high")
    examples = ({}, {"effective_rank": 3, "init_weights": False})

    def tensors(self, config: OSFConfig, target: Target) -> tuple[MethodTensor, ...]:
        smaller = min(_sizes(target))
        kept = {module: min(smaller, _kept_rank(config, module, smaller)) for module in target.modules}
        high = int(shared_value("effective_rank", kept))
        if not 0 < high < smaller:
            raise target.refuse(
                f"OSF needs an effective_rank from 1 to {smaller - 1}, less than the smaller size of the weight, so"
                f" that directions remain to train; found {high}"
            )
        r, k = (("r", smaller - high),), (("k", high),)
        suffix = ".osf_svd_params."
        frozen: dict[str, Any] = {"from_base": True, "trained": False, "in_file": False}
        return (
            axes_tensor("osf_U_high", "out k", k, **frozen),
            axes_tensor("osf_V_high", "k in", k, **frozen),
            axes_tensor(f"{_P}U_low", "out r", r, suffix=f"{suffix}U_low", from_base=True),
            axes_tensor(f"{_P}S_low", "r", r, suffix=f"{suffix}S_low", from_base=True),
            axes_tensor(f"{_P}V_low", "r in", r, suffix=f"{suffix}V_low", from_base=True),
        )

    def starts_unchanged(self, config: OSFConfig) -> bool:
        return config.init_weights is not False

    def effect(self, own: OwnHparams) -> Effects:
        return Effects("changes", form="use", reads=True, sees="product")

    def init(self, config: OSFConfig, tensor: MethodTensor, start: Start) -> Array:
        if config.init_weights is False and tensor.trained:
            return jax.random.normal(start.key, start.shape)
        part, level = tensor.name.removeprefix(_P).removeprefix("osf_").split("_")
        u, s, v = jnp.linalg.svd(at_least_float32(jnp.asarray(start.w)), full_matrices=False)
        count = dict(tensor.own)["k" if level == "high" else "r"]
        chosen = slice(None, count) if level == "high" else slice(len(s) - count, None)
        return {"U": u[:, chosen], "S": s[chosen], "V": v[chosen]}[part]

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        high = params["osf_U_high"]
        u, s, v = _low(params)
        kept = (y.astype(high.dtype) @ high) @ high.T
        return kept + ((x.astype(u.dtype) @ v.T) * s) @ u.T

    def matrix(self, own: OwnHparams, params: Params, w: Array) -> Array:
        high = params["osf_U_high"]
        u, s, v = _low(params)
        return high @ (high.T @ w) + (u * s) @ v


def _low(params: Params) -> tuple[Array, Array, Array]:
    """Return U_low, S_low and V_low, whose gradients have no part in the kept directions."""
    u, s, v = (params[f"{_P}{name}_low"] for name in "USV")
    high_u, high_v = (jax.lax.stop_gradient(params[f"osf_{name}_high"]).astype(u.dtype) for name in "UV")
    return _move_off(u, high_u), s, _move_off(v.T, high_v.T).T


@jax.custom_jvp
def _move_off(x: Array, kept: Array) -> Array:
    """Return x; its change is projected off the orthonormal columns of `kept`, in both modes of differentiation."""
    return x


@_move_off.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    x, kept = primals
    return x, tangents[0] - kept @ (kept.T @ tangents[0])


def _kept_rank(config: OSFConfig, module: str, smaller: int) -> int:
    """Return the number of singular directions that PEFT keeps in a module."""
    # PEFT searches; it does not match the end.
    patterns = (config.rank_pattern or {}).items()
    found = (rank for pattern, rank in patterns if compile_pattern("target_modules", pattern).search(module))
    value = next(found, config.effective_rank)
    if value is None:
        return smaller // 2
    return int(smaller * value) if isinstance(value, float) and value <= 1 else int(value)


def _sizes(target: Target) -> tuple[int, int]:
    """Return the numbers of outputs and inputs, from the tensors if the base is not known."""
    u, v = target.found.get(f"{_P}U_low"), target.found.get(f"{_P}V_low")
    if u is None or v is None:
        return target.out_size, target.in_size
    return math.prod(u[:-1]), math.prod(v[1:])
