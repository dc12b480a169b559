"""PVeRA (2025, arXiv:2512.07703) with PEFT's conventions: VeRA whose vector d is a mean and a variance.

The projection A (2r, inputs) and the vector d (2r) have two halves. The first gives the mean of a normal distribution
over the r hidden values, the second the logarithm of its variance. jaxadapt computes with the mean, as PEFT does
outside training and in a merge (`tuners/pvera/layer.py`): W + (b∘B)·(d∘A) with the first halves. PEFT's training adds
noise of that variance, which is not implemented here: a new adapter warns of this, and its second halves keep their
values. `sample_at_inference` is refused. The projections are PyTorch's own random numbers, as in VeRA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp

from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs.pvera import PveraConfig
from jaxadapt.core.errors import ConfigError, warn
from jaxadapt.keymaps.tensor_spec import MethodTensor, own_tensor
from jaxadapt.methods.base import Array, Effects, Params, Start, Target
from jaxadapt.methods.matrix import MatrixMethod
from jaxadapt.methods.vera import check_projections, draw_projections, projection_needs


@dataclasses.dataclass(frozen=True)
class PveraHparams:
    """The hyperparameters of a site: the dropout rate."""

    dropout: float


class Pvera(MatrixMethod):
    """Shared random projections, scaled by two vectors per module; one is the mean of a distribution."""

    peft_type = "PVERA"
    scaled = frozenset({"pvera_lambda_b"})
    roles = MappingProxyType(
        {"pvera_lambda_b": "vector", "pvera_lambda_d": "vector", "pvera_A": "frozen", "pvera_B": "frozen"}
    )

    def check(self, config: PveraConfig) -> None:
        if config.sample_at_inference:
            raise ConfigError(
                "cannot apply PVERA with sample_at_inference=true: jaxadapt computes with the mean of the distribution"
                " and draws nothing from it. Set sample_at_inference to false"
            )

    def tensors(self, config: PveraConfig, target: Target) -> tuple[MethodTensor, ...]:
        return (
            MethodTensor("pvera_lambda_b", ".pvera_lambda_b", ("batch", "out"), (("out",),), scale_power=0),
            own_tensor("pvera_lambda_d", (2 * config.r,)),
        )

    def shared(
        self, config: PveraConfig, targets: Sequence[Target], found: Mapping[str, tuple[int, ...]]
    ) -> tuple[MethodTensor, ...]:
        a, b = found.get("pvera_A"), found.get("pvera_B")
        a = (2 * config.r, max(t.in_size for t in targets) if a is None else a[-1])
        b = (max(t.out_size for t in targets) if b is None else b[0], config.r)
        check_projections(targets, projection_needs("pvera", a[1], b[0]))
        saved = config.save_projection
        return tuple(
            own_tensor(name, shape, trained=False, optional=True, in_file=saved)
            for name, shape in (("pvera_A", a), ("pvera_B", b))
        )

    def starts_unchanged(self, config: PveraConfig) -> bool:
        return config.init_weights

    def own(self, config: PveraConfig, target: Target) -> PveraHparams:
        return PveraHparams(config.pvera_dropout)

    def effect(self, own: PveraHparams) -> Effects:
        return Effects("adds", form="use")

    def rate(self, own: PveraHparams) -> float:
        return own.dropout

    def init(self, config: PveraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == "pvera_lambda_b":
            return Draw("constant", 0.0 if config.init_weights else 1.0)
        if tensor.name == "pvera_lambda_d":
            if start.module in start.modules[:1]:  # once for an adapter
                warn(
                    "this PVERA adapter is trained without the noise that PEFT adds in training: jaxadapt computes with"
                    " the mean of the distribution, so the variances keep their initial values. Train in PEFT for"
                    " PVeRA's own training; a file of PEFT computes the same here"
                )
            return Draw("constant", config.d_initial) if config.init_weights else Draw("normal", 1.0)
        a, b = draw_projections(config.projection_prng_key, start.shared["pvera_A"], start.shared["pvera_B"])
        return a if tensor.name == "pvera_A" else b

    def delta(self, own: PveraHparams, params: Params, w: Array) -> Array:
        out, inputs = w.shape
        b = params["pvera_B"][:out]
        r = b.shape[1]
        mean = params["pvera_lambda_d"][:r, None] * params["pvera_A"][:r, :inputs]
        return (params["pvera_lambda_b"][:, None] * b) @ mean

    def after(self, own: PveraHparams, params: Params, x: Array, y: Array) -> Array:
        b = params["pvera_B"][: y.shape[-1]]
        r = b.shape[1]
        d = params["pvera_lambda_d"][:r]
        h = d * jnp.einsum("...i,ri->...r", x.astype(d.dtype), params["pvera_A"][:r, : x.shape[-1]])
        return y + params["pvera_lambda_b"] * jnp.einsum("...r,or->...o", h, b)

    def examples(self) -> Sequence[Mapping[str, Any]]:
        return ({"r": 3}, {"r": 4, "save_projection": False, "projection_prng_key": 7})


METHOD = Pvera()
