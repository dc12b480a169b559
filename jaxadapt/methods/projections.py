"""Shared random projections, scaled by trained vectors: VeRA, PVeRA and RandLoRA.

VeRA (Kopiczko et al. 2024, arXiv:2310.11454) with PEFT's conventions: W + (b∘B)·(d∘A).

A (r, inputs) and B (outputs, r) are random and belong to the whole adapter, with the sizes of its largest module; each
module uses their first columns and rows. Only the vectors b (out) and d (r) are trained. The projections are PyTorch's
own random numbers (`tuners/vera/model.py`), so a file without them (`save_projection=False`) has the same ones here.

PVeRA (2025, arXiv:2512.07703) with PEFT's conventions: VeRA whose vector d is a mean and a variance.

The projection A (2r, inputs) and the vector d (2r) have two halves. The first gives the mean of a normal distribution
over the r hidden values, the second the logarithm of its variance. Outside training and in a merge the method computes
with the mean (`tuners/pvera/layer.py`): W + (b∘B)·(d∘A) with the first halves. Training adds noise of that variance,
another one for each module and token, where `models.invoke(model, noise=key)` gives the random key of a step; without
it the second halves keep their values. A new adapter warns of this. `sample_at_inference` is refused, since a call has
no key by itself. The projections are PyTorch's own random numbers, as in VeRA.

RandLoRA (Albert et al. 2025, arXiv:2502.00987) with PEFT's conventions: W + s·B·A of scaled random bases, s = α/r.

With m the smaller and M the larger size of a weight, A is (r·n, m) and B is (M, r·n) for n = ⌈m/r⌉ bases. They are the
first parts of tensors that all modules share; A is scaled by lambda (r, n) and gamma (n, m), the only trained tensors.
The change is B·A, transposed if the outputs are the smaller size (`tuners/randlora/layer.py`). PEFT numbers the rows of
A by rank and then basis, and the columns of B by basis and then rank; the files are of that product.

PEFT draws the bases in bfloat16 or float16, whichever the machine has, so a file without them has no definite meaning
and is refused. PEFT 0.21.2 writes the bases once, and again for each module; jaxadapt writes the same and reads both.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.configs.fixed_bases import PveraConfig, RandLoraConfig, VeraConfig
from jaxadapt.core.errors import ConfigError, MismatchError, raise_listed, warn
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    FactoredMethod,
    MatrixHparams,
    MatrixMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Shapes,
    Start,
    Target,
    Targets,
    TorchRandom,
    axes_tensor,
    own_tensor,
    tensor_roles,
)

# ---------------------------------------------------------------- projections


def draw_projections(seed: int, a: Sequence[int], b: Sequence[int]) -> tuple[Array, Array]:
    """Return projections of these shapes by PyTorch's Kaiming-uniform of the last axis; B's numbers follow A's."""
    random = TorchRandom(seed)
    first, second = (random.uniform(x, -math.sqrt(6 / x[-1]), math.sqrt(6 / x[-1])) for x in (a, b))
    return first, second


def projections(prefix: str, config: Any, targets: Targets, found: Shapes, rows: int) -> tuple[MethodTensor, ...]:
    """Return the specifications of A (rows, inputs) and B (outputs, r), for the largest modules of a new adapter."""
    names, saved = (f"{prefix}_A", f"{prefix}_B"), config.save_projection
    a, b = (found.get(name) for name in names)
    inputs = max(target.in_size for target in targets) if a is None else a[-1]
    outputs = max(target.out_size for target in targets) if b is None else b[0]
    check_projections(
        targets,
        (
            (names[0], inputs, "inputs", lambda target: target.in_size),
            (names[1], outputs, "outputs", lambda target: target.out_size),
        ),
    )
    shapes = zip(names, ((rows, inputs), (outputs, config.r)), strict=True)
    return tuple(own_tensor(name, x, trained=False, optional=True, in_file=saved) for name, x in shapes)


def check_projections(targets: Targets, needs: Sequence[tuple[str, int, str, Callable[[Target], int]]]) -> None:
    """Raise `MismatchError` if shared projections are too small for a module of the base.

    Args:
        needs: `(tensor, size, name of the size, function of the size that a module needs)`.
    """
    raise_listed(
        MismatchError,
        "the adapter's shared tensors are too small for these modules, so the adapter is of another base model:",
        [
            f"{next(iter(target.modules))} has {needed} {axis}, {name} has {size}"
            for target in targets
            if target.is_known
            for name, size, axis, need in needs
            if (needed := need(target)) > size
        ],
    )


# ---------------------------------------------------------------- vera


class Vera(FactoredMethod):
    """Shared random projections, scaled by two vectors per module."""

    peft_type = "VERA"
    row_padded = frozenset({"rank"})
    scaled = frozenset({"vera_lambda_b"})
    roles = tensor_roles(vector="vera_lambda_b vera_lambda_d", frozen="vera_A vera_B")
    examples = ({"r": 3}, {"r": 4, "save_projection": False, "projection_prng_key": 7})

    def tensors(self, config: VeraConfig, target: Target) -> tuple[MethodTensor, ...]:
        return (
            axes_tensor("vera_lambda_b", "out"),
            axes_tensor("vera_lambda_d", "rank", (("rank", config.r),)),
        )

    def shared(self, config: VeraConfig, targets: Targets, found: Shapes) -> tuple[MethodTensor, ...]:
        return projections("vera", config, targets, found, config.r)

    def init(self, config: VeraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == "vera_lambda_b":
            return Draw("constant", 0.0 if config.init_weights else 1.0)
        if tensor.name == "vera_lambda_d":
            return Draw("constant", config.d_initial) if config.init_weights else Draw("normal", 1.0)
        a, b = draw_projections(config.projection_prng_key, start.shared["vera_A"], start.shared["vera_B"])
        return a if tensor.name == "vera_A" else b

    def factors(self, own: OwnHparams, params: Params, shape: tuple[int, int]) -> tuple[Array, Array]:
        out, inputs = shape
        a = params["vera_lambda_d"][:, None] * params["vera_A"][:, :inputs]
        return a, params["vera_lambda_b"][:, None] * params["vera_B"][:out]

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        d = params["vera_lambda_d"]
        h = d * jnp.einsum("...i,ri->...r", x.astype(d.dtype), params["vera_A"][:, : x.shape[-1]])
        return y + params["vera_lambda_b"] * jnp.einsum("...r,or->...o", h, params["vera_B"][: y.shape[-1]])


# ---------------------------------------------------------------- pvera


NOISE = "noise"


class Pvera(FactoredMethod):
    """Shared random projections, scaled by two vectors per module; one is the mean of a distribution."""

    peft_type = "PVERA"
    scaled = frozenset({"pvera_lambda_b"})
    roles = tensor_roles(vector="pvera_lambda_b pvera_lambda_d", frozen="pvera_A pvera_B pvera_place")
    examples = ({"r": 3}, {"r": 4, "save_projection": False, "projection_prng_key": 7})

    def check(self, config: PveraConfig) -> None:
        if config.sample_at_inference:
            raise ConfigError(
                "cannot apply PVERA with sample_at_inference=true: jaxadapt draws from the distribution only in calls"
                " with a random key. Set sample_at_inference to false, and call the model in"
                " jaxadapt.models.invoke(model, noise=key)"
            )

    def tensors(self, config: PveraConfig, target: Target) -> tuple[MethodTensor, ...]:
        return (
            axes_tensor("pvera_lambda_b", "out"),
            own_tensor("pvera_lambda_d", (2 * config.r,)),
            own_tensor("pvera_place", (1,), trained=False, in_file=False, dtype="int32"),
        )

    def shared(self, config: PveraConfig, targets: Targets, found: Shapes) -> tuple[MethodTensor, ...]:
        return projections("pvera", config, targets, found, 2 * config.r)

    def init(self, config: PveraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == "pvera_lambda_b":
            return Draw("constant", 0.0 if config.init_weights else 1.0)
        if tensor.name == "pvera_lambda_d":
            if start.module in start.modules[:1]:  # once for an adapter
                warn(
                    "this PVERA adapter is trained without noise unless each step runs in"
                    " jaxadapt.models.invoke(model, noise=key): without it the variances keep their initial values"
                )
            return Draw("constant", config.d_initial) if config.init_weights else Draw("normal", 1.0)
        if tensor.name == "pvera_place":
            return np.array([zlib.crc32(start.module.encode()) >> 1], np.int32)
        a, b = draw_projections(config.projection_prng_key, start.shared["pvera_A"], start.shared["pvera_B"])
        return a if tensor.name == "pvera_A" else b

    def factors(self, own: OwnHparams, params: Params, shape: tuple[int, int]) -> tuple[Array, Array]:
        out, inputs = shape
        b = params["pvera_B"][:out]
        r = b.shape[1]
        mean = params["pvera_lambda_d"][:r, None] * params["pvera_A"][:r, :inputs]
        return mean, params["pvera_lambda_b"][:, None] * b

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        b = params["pvera_B"][: y.shape[-1]]
        r = b.shape[1]
        d, rows = params["pvera_lambda_d"], params["pvera_A"][:, : x.shape[-1]]
        if NOISE in params:
            h, log_variance = jnp.split(d * jnp.einsum("...i,ri->...r", x.astype(d.dtype), rows), 2, axis=-1)
            key = jax.random.fold_in(jax.random.wrap_key_data(params[NOISE]), params["pvera_place"][0])
            h = h + jnp.exp(0.5 * log_variance) * jax.random.normal(key, h.shape, h.dtype)
        else:
            h = d[:r] * jnp.einsum("...i,ri->...r", x.astype(d.dtype), rows[:r])
        return y + params["pvera_lambda_b"] * jnp.einsum("...r,or->...o", h, b)

    def row_params(self, hparams: MatrixHparams, params: Params, entries: tuple[int, ...]) -> dict[str, Array]:
        found = super().row_params(hparams, params, entries)
        return {name: x for name, x in found.items() if name != "pvera_place"}  # which only noise needs

    def call_data(self, config: PveraConfig, given: Mapping[str, Array]) -> dict[str, Array]:
        return {NOISE: given[NOISE]} if NOISE in given else {}


# ---------------------------------------------------------------- randlora


class Randlora(MatrixMethod):
    """Shared random bases of full rank, scaled by a matrix and a vector per basis."""

    peft_type = "RANDLORA"
    row_numbers = frozenset({"scale"})
    scaled = frozenset({"randlora_lambda"})
    roles = tensor_roles(other="randlora_lambda randlora_gamma", frozen="randlora_A randlora_B")
    examples = ({"r": 3, "randlora_alpha": 6}, {"r": 4, "randlora_alpha": 4, "sparse": True, "projection_prng_key": 7})

    def check(self, config: RandLoraConfig) -> None:
        if not config.save_projection:
            raise ConfigError(
                "cannot apply RANDLORA with save_projection=false: the bases that PEFT draws depend on the machine"
                " (bfloat16 or float16), so the file must contain them. Load the adapter in PEFT on the machine that"
                " trained it, and save it with save_projection=True"
            )

    def tensors(self, config: RandLoraConfig, target: Target) -> tuple[MethodTensor, ...]:
        small = target.own_size("randlora_gamma", 1, lambda: min(target.in_size, target.out_size))
        bases = -(-small // config.r)
        return own_tensor("randlora_lambda", (config.r, bases)), own_tensor("randlora_gamma", (bases, small))

    def shared(self, config: RandLoraConfig, targets: Targets, found: Shapes) -> tuple[MethodTensor, ...]:
        a, b = found.get("randlora_A"), found.get("randlora_B")
        if a is None or b is None:
            sizes = (max(t.out_size for t in targets), max(t.in_size for t in targets))
            a, b = (config.r, 1, min(sizes)), (max(sizes), -(-min(sizes) // config.r), config.r)
        a, b = (config.r, 1, a[-1]), (b[0], b[1] if len(b) == 3 else 0, config.r)
        check_projections(
            targets,
            (
                ("randlora_A", a[2], "as its smaller size", lambda t: min(t.in_size, t.out_size)),
                ("randlora_B", b[0], "as its larger size", lambda t: max(t.in_size, t.out_size)),
                ("randlora_B", b[1], "bases", lambda t: -(-min(t.in_size, t.out_size) // config.r)),
            ),
        )
        return tuple(
            own_tensor(name, shape, trained=False, repeated=True)
            for name, shape in (("randlora_A", a), ("randlora_B", b))
        )

    def own(self, config: RandLoraConfig, target: Target) -> OwnHparams:
        return OwnHparams(config.randlora_alpha / config.r, dropout=config.randlora_dropout)

    def init(self, config: RandLoraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == "randlora_lambda":
            return Draw("constant", 0.0) if config.init_weights else Draw("normal", 1.0)
        if tensor.name == "randlora_gamma":
            larger = max(start.shape) if config.init_weights else start.fan_in  # PEFT's own two choices
            return Draw("constant", 1 / larger)
        random, made = TorchRandom(config.projection_prng_key), {}
        for name in ("randlora_A", "randlora_B"):
            x = random.uniform(start.shared[name], 0.0, 1.0)
            if config.sparse or config.very_sparse:
                zeros = math.sqrt(start.shared["randlora_A"][2]) if config.very_sparse else 3
                x = np.where(x < 1 / (2 * zeros), -1, np.where(x > 1 - 1 / (2 * zeros), 1, 0)).astype("float32")
            else:
                x = x - np.float32(0.5)
            made[name] = x / np.std(x, ddof=1)
        return made[tensor.name]

    def delta(self, own: OwnHparams, params: Params, w: Array) -> Array:
        a, b = _bases(params, *w.shape)
        change = own.scale * (b @ a)
        return change if w.shape[1] <= w.shape[0] else change.T

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        inputs, out = x.shape[-1], y.shape[-1]
        x = x.astype(params["randlora_lambda"].dtype)
        if math.prod(x.shape[:-1]) < len(params["randlora_lambda"]):
            return y + own.scale * _change_few(params, x, out)
        a, b = _bases(params, out, inputs)
        return y + own.scale * ((x @ a.T) @ b.T if inputs <= out else (x @ b) @ a)


def _bases(params: Params, out: int, inputs: int) -> tuple[Array, Array]:
    """Return A (r·n, m), scaled, and B (M, r·n) of a weight (out, inputs)."""
    small, large = min(out, inputs), max(out, inputs)
    bases = params["randlora_gamma"].shape[0]
    a = params["randlora_lambda"][:, :, None] * params["randlora_A"][:, :, :small] * params["randlora_gamma"]
    return a.reshape(-1, small), params["randlora_B"][:large, :bases].reshape(large, -1)


def _change_few(params: Params, x: Array, out: int) -> Array:
    """Return the change of a few outputs without the scaled A, which is as large as the weight."""
    small, large = min(x.shape[-1], out), max(x.shape[-1], out)
    scales, gamma = params["randlora_lambda"], params["randlora_gamma"]
    a, b = params["randlora_A"][:, 0, :small], params["randlora_B"][:large, : len(gamma)].reshape(large, -1)
    if x.shape[-1] <= out:
        h = jnp.einsum("...nm,rm->...rn", x[..., None, :] * gamma, a) * scales
        return h.reshape(*x.shape[:-1], -1) @ b.T
    h = (x @ b).reshape(*x.shape[:-1], *scales.shape) * scales
    return (jnp.einsum("...rn,rm->...nm", h, a) * gamma).sum(-2)
