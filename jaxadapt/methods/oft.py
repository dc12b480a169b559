"""OFT (Qiu et al. 2023, arXiv:2306.07280) with PEFT's conventions: y = W·(Rᵀ·x) + b, R block-diagonal and orthogonal.

`oft_R` (blocks, b·(b−1)/2) holds the upper triangles of the skew-symmetric K, row by row. R is a series in K, or
exactly (I − K)·(I + K)⁻¹. The arithmetic follows PEFT's `tuners/oft/layer.py`, with its faults:

- The series approximates (I + K)·(I − K)⁻¹, so the two settings of `use_cayley_neumann` turn in opposite directions.
- The last term of the series has the factor 1, not 2. A series of three terms has the power K³, as that of four terms.
- A block size that does not divide the inputs becomes the nearest one that does; here with a warning.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs.oft import OFTConfig
from jaxadapt.core.errors import ConfigError, warn
from jaxadapt.keymaps.tensor_spec import MethodTensor, own_tensor
from jaxadapt.methods.base import Array, Effects, Params, Start, Target, at_least_float32
from jaxadapt.methods.matrix import MatrixMethod


@dataclasses.dataclass(frozen=True)
class OftHparams:
    """The hyperparameters of a site: the terms of the series, 0 for the exact rotation; the radius, 0 for none."""

    terms: int
    eps: float


class Oft(MatrixMethod):
    """A rotation of blocks of the inputs."""

    peft_type = "OFT"
    roles = MappingProxyType({"oft_R": "vector"})

    def check(self, config: OFTConfig) -> None:
        version = [int(n) for n in re.findall(r"\d+", config.peft_version or "0")[:2]]
        if config.use_cayley_neumann and version < [0, 18]:
            raise ConfigError(
                "cannot apply OFT with use_cayley_neumann of a PEFT before 0.18, whose series was another one; train"
                " the adapter again, or set use_cayley_neumann=False if it was trained so"
            )

    def tensors(self, config: OFTConfig, target: Target) -> tuple[MethodTensor, ...]:
        found = target.found.get("oft_R")
        if found is None:
            size = _nearest_divisor(target, config.oft_block_size or config.r)
            blocks, block = (target.in_size // size, size) if config.oft_block_size else (size, target.in_size // size)
            found = (1 if config.block_share else blocks, block * (block - 1) // 2)
        return (own_tensor("oft_R", found, ".oft_R.weight"),)

    def starts_unchanged(self, config: OFTConfig) -> bool:
        return config.init_weights

    def own(self, config: OFTConfig, target: Target) -> OftHparams:
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        return OftHparams(terms, config.eps if config.coft else 0.0)

    def effect(self, own: OftHparams) -> Effects:
        return Effects("changes", form="use", reads=True)

    def init(self, config: OFTConfig, tensor: MethodTensor, start: Start) -> Draw:
        if config.module_dropout:
            raise ConfigError("cannot train OFT with module_dropout: jaxadapt does not drop blocks; set it to 0.0")
        return Draw("constant", 0.0) if config.init_weights else Draw("normal", 0.1)

    def before(self, own: OftHparams, params: Params, x: Array) -> Array:
        blocks = _rotation(own, params["oft_R"], x.shape[-1])
        split = x.reshape(*x.shape[:-1], blocks.shape[0], -1).astype(blocks.dtype)
        return jnp.einsum("...rk,rkc->...rc", split, blocks).reshape(x.shape)

    def matrix(self, own: OftHparams, params: Params, w: Array) -> Array:
        return self._turned(w, _rotation(own, params["oft_R"], w.shape[-1]))

    def unmatrix(self, own: OftHparams, params: Params, w: Array) -> Array:
        return self._turned(w, jnp.linalg.inv(_rotation(own, params["oft_R"], w.shape[-1])))

    @staticmethod
    def _turned(w: Array, blocks: Array) -> Array:
        split = w.reshape(w.shape[0], blocks.shape[0], -1)
        return jnp.einsum("orc,rkc->ork", split, blocks).reshape(w.shape)

    def examples(self) -> Sequence[Mapping[str, Any]]:
        return (
            {"oft_block_size": 2},
            {"oft_block_size": 0, "r": 2, "use_cayley_neumann": False},
            {"oft_block_size": 4, "block_share": True, "coft": True, "eps": 0.3, "num_cayley_neumann_terms": 3},
        )


def _rotation(own: OftHparams, vectors: Array, inputs: int) -> Array:
    """Return the blocks of R, (blocks, b, b)."""
    size = round((1 + math.sqrt(1 + 8 * vectors.shape[-1])) / 2)
    rows, columns = np.triu_indices(size, 1)
    vectors = at_least_float32(vectors)  # there is no inverse in 16 bits
    upper = jnp.zeros((len(vectors), size, size), vectors.dtype).at[:, rows, columns].set(vectors)
    k = upper - jnp.swapaxes(upper, 1, 2)
    if own.eps:  # PEFT projects the parameters themselves, so the gradient does not see it
        norm, limit = jnp.linalg.norm(k, axis=(1, 2), keepdims=True), own.eps / math.sqrt(len(vectors))
        k = k + jax.lax.stop_gradient(jnp.where(norm <= limit, k, k * (limit / norm)) - k)
    eye = jnp.broadcast_to(jnp.eye(size, dtype=k.dtype), k.shape)
    if not own.terms:
        r = jnp.linalg.solve(jnp.swapaxes(eye + k, 1, 2), jnp.swapaxes(eye - k, 1, 2)).swapaxes(1, 2)
    else:
        r = eye + 2 * k if own.terms > 1 else eye
        if own.terms > 2:
            power = k @ k
            r = r + 2 * power
            for _ in range(3, own.terms - 1):
                power = power @ k
                r = r + 2 * power
            r = r + power @ k
    return jnp.broadcast_to(r, (inputs // size, size, size))


def _nearest_divisor(target: Target, wanted: int) -> int:
    """Return the divisor of the inputs that PEFT uses for `wanted`, the smaller one of two equally near."""
    inputs = target.in_size
    divisors = [n for n in range(1, inputs + 1) if inputs % n == 0]
    best = min(divisors, key=lambda n: (abs(n - wanted), n))
    if best != wanted:
        warn(f"{target.leaf}: OFT with blocks of {best}, because {wanted} does not divide the {inputs} inputs")
    return best


METHOD = Oft()
