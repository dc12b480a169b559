"""PVeRA (2025, arXiv:2512.07703) with PEFT's conventions: VeRA whose vector d is a mean and a variance.

The projection A (2r, inputs) and the vector d (2r) have two halves. The first gives the mean of a normal distribution
over the r hidden values, the second the logarithm of its variance. Outside training and in a merge the method computes
with the mean (`tuners/pvera/layer.py`): W + (b∘B)·(d∘A) with the first halves. Training adds noise of that variance,
another one for each module and token, where `models.invoke(model, noise=key)` gives the random key of a step; without
it the second halves keep their values. A new adapter warns of this. `sample_at_inference` is refused, since a call has
no key by itself. The projections are PyTorch's own random numbers, as in VeRA.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.configs.fixed_bases import PveraConfig
from jaxadapt.core.errors import ConfigError, warn
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Examples,
    MatrixHparams,
    MethodTensor,
    Params,
    Projected,
    Start,
    Strings,
    Target,
    axes_tensor,
    own_tensor,
    tensor_roles,
)

NOISE = "noise"


class Pvera(Projected, peft_type="PVERA"):
    """Shared random projections, scaled by two vectors per module; one is the mean of a distribution."""

    parts = 2
    scaled: frozenset[str] = frozenset({"pvera_lambda_b"})
    roles: Strings = tensor_roles(vector="pvera_lambda_b pvera_lambda_d", frozen="pvera_A pvera_B pvera_place")
    examples: Examples = ({"r": 3}, {"r": 4, "save_projection": False, "projection_prng_key": 7})

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

    def init(self, config: PveraConfig, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == "pvera_place":
            return np.array([zlib.crc32(start.module.encode()) >> 1], np.int32)
        if tensor.name == "pvera_lambda_d" and start.module in start.modules[:1]:  # once for an adapter
            warn(
                "this PVERA adapter is trained without noise unless each step runs in"
                " jaxadapt.models.invoke(model, noise=key): without it the variances keep their initial values"
            )
        return super().init(config, tensor, start)

    def hidden(self, params: Params, x: Array, rows: int) -> Array:
        if NOISE not in params:
            return super().hidden(params, x, rows)
        mean, log_variance = jnp.split(super().hidden(params, x, self.parts * rows), 2, axis=-1)
        key = jax.random.fold_in(jax.random.wrap_key_data(params[NOISE]), params["pvera_place"][0])
        return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)

    def row_params(self, hparams: MatrixHparams, params: Params, entries: tuple[int, ...]) -> dict[str, Array]:
        found = super().row_params(hparams, params, entries)
        return {name: x for name, x in found.items() if name != "pvera_place"}  # which only noise needs

    def call_data(self, config: PveraConfig, given: Mapping[str, Array]) -> dict[str, Array]:
        return {NOISE: given[NOISE]} if NOISE in given else {}
