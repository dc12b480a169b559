"""RandLoRA (Albert et al. 2025, arXiv:2502.00987) with PEFT's conventions: W + s·B·A of scaled random bases, s = α/r.

With m the smaller and M the larger size of a weight, A is (r·n, m) and B is (M, r·n) for n = ⌈m/r⌉ bases. They are the
first parts of tensors that all modules share; A is scaled by lambda (r, n) and gamma (n, m), the only trained tensors.
The change is B·A, transposed if the outputs are the smaller size (`tuners/randlora/layer.py`). PEFT numbers the rows of
A by rank and then basis, and the columns of B by basis and then rank; the files are of that product.

PEFT draws the bases in bfloat16 or float16, whichever the machine has, so a file without them has no definite meaning
and is refused. PEFT 0.21.2 writes the bases once, and again for each module; jaxadapt writes the same and reads both.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from jaxadapt.configs.fixed_bases import RandLoraConfig
from jaxadapt.core.errors import ConfigError
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Examples,
    MatrixMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Shapes,
    Start,
    Strings,
    Target,
    Targets,
    TorchRandom,
    check_projections,
    own_tensor,
    tensor_roles,
)


class Randlora(MatrixMethod, peft_type="RANDLORA"):
    """Shared random bases of full rank, scaled by a matrix and a vector per basis."""

    row_numbers: frozenset[str] = frozenset({"scale"})
    scaled: frozenset[str] = frozenset({"randlora_lambda"})
    roles: Strings = tensor_roles(other="randlora_lambda randlora_gamma", frozen="randlora_A randlora_B")
    examples: Examples = (
        {"r": 3, "randlora_alpha": 6},
        {"r": 4, "randlora_alpha": 4, "sparse": True, "projection_prng_key": 7},
    )

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
            weight = start.target
            # PEFT begins with one of two values.
            sizes = start.shape if config.init_weights or weight is None else (weight.in_size, weight.out_size)
            return Draw("constant", 1 / max(sizes))
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
