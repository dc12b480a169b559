"""The factors that LoRA's initialisations begin with: one weight W (out, in), in float32, to A (r, in) and B (out, r).

As in PEFT 0.21.2 (`tuners/lora/layer.py`, `corda.py`), up to signs and, where it draws random numbers, up to those.
`s` is the scale. Pure functions of arrays in PyTorch's layout; nothing here knows a model.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxadapt.arrays import quantized
from jaxadapt.core.errors import AttachError

Array = Any


class Factors(NamedTuple):
    """A (r, in) and B (out, r); `left`, what remains of W, where that is not W − s·B·A or all of it."""

    a: Array
    b: Array
    left: Array | None = None


def _static(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return functools.partial(jax.jit, static_argnames=names)


@_static("r", "s")
def pissa(w: Array, r: int, s: float) -> Factors:
    """The r largest singular triples of W, over s (arXiv:2404.02948): s·B·A is the best approximation of rank r."""
    u, sigma, vh = jnp.linalg.svd(w, full_matrices=False)
    return _balanced(u[:, :r], sigma[:r] / s, vh[:r])


@_static("s", "steps")
def pissa_fast(w: Array, s: float, steps: int, omega: Array) -> Factors:
    """The same by a randomised SVD with `steps` rounds of subspace iteration from `omega` (min(out, in), r)."""
    u, sigma, vh = svd_lowrank(w, steps, omega)
    return _balanced(u, sigma / s, vh)


@_static("r")
def mica(w: Array, r: int) -> Factors:
    """A is zero, and B the left singular vectors of the r smallest singular values of W (arXiv:2604.01694)."""
    u = jnp.linalg.svd(w, full_matrices=False)[0]
    return Factors(jnp.zeros((r, w.shape[1])), u[:, -r:])


@_static("r")
def truncated(w: Array, r: int) -> Array:
    """W without its r smallest singular values: the base of KaSA (arXiv:2412.06071)."""
    u, sigma, vh = jnp.linalg.svd(w, full_matrices=False)
    return (u[:, :-r] * sigma[None, :-r]) @ vh[:-r]


@_static("r")
def olora(w: Array, r: int) -> Factors:
    """The first columns of Q and rows of R in W = Q·R (arXiv:2406.01775)."""
    q, upper = jnp.linalg.qr(w)
    return Factors(upper[:r], q[:, :r])


@jax.jit
def orthogonal(square: Array, x: Array, y: Array) -> Factors:
    """A and B with B·A = 0, neither of them zero, from normal `square` (r, r), `x` (in, r/2) and `y` (r/2, out).

    Each is spanned by every other row of one orthogonal matrix.
    """
    q = jnp.linalg.qr(square)[0]
    return Factors((x @ q[0::2]).T / 10, y.T @ q[1::2] / 10)


def corda(w: Array, covariance: Array, r: int, s: float, last: bool) -> Factors:
    """Singular triples of W·C (arXiv:2406.05223), C the covariance (in, in) of the inputs, taken back by C⁻¹.

    The largest, or the smallest with `last` (the knowledge-preserved mode). C is damped until it can be inverted.
    """
    damp = 0.01
    while True:
        fixed, inverse, error = _inverted(covariance, damp)
        if error < 0.05:  # not a number counts as no inverse, and doubling will not help then
            break
        if not jnp.isfinite(error) or damp > 1e6:
            raise AttachError("the covariance of its inputs cannot be inverted; are they all zero, or not finite?")
        damp *= 2
    return _corda(w, fixed, inverse, r, s, last)


@jax.jit
def _inverted(covariance: Array, damp: float) -> tuple[Array, Array, Array]:
    eye = jnp.eye(len(covariance), dtype=covariance.dtype)
    fixed = covariance + eye * jnp.mean(jnp.diag(covariance)) * damp
    inverse = jnp.linalg.inv(fixed)
    return fixed, inverse, jnp.linalg.norm(fixed @ inverse - eye)


@_static("r", "s", "last")
def _corda(w: Array, fixed: Array, inverse: Array, r: int, s: float, last: bool) -> Factors:
    u, sigma, vh = jnp.linalg.svd(w @ fixed, full_matrices=False)
    mine = slice(-r, None) if last else slice(r)
    return _balanced(u[:, mine], sigma[mine] / s, (vh @ inverse)[mine])


GA_DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
GA_SCALES = ("stable", "weight_svd", "gd_scale", "unit")


class Gradient(NamedTuple):
    """How LoRA-GA uses a gradient (PEFT's `LoraGAConfig`)."""

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16


@_static("r", "s", "how", "wide", "dtype")
def lora_ga(w: Array, gradient: Array, r: int, s: float, how: Gradient, wide: int, dtype: Any, key: Array) -> Factors:
    """Singular vectors of the gradient (out, in) of W (arXiv:2407.05000).

    Args:
        wide: the size by whose fourth root B grows with the scale "stable".
        dtype: of the base weight, to which A and B are rounded, as what they are taken out of it is.
    """
    keys = jax.random.split(key, 3)
    q = min(4 * r, *gradient.shape)
    u, sigma, vh = svd_lowrank(gradient, 4, jax.random.normal(keys[0], (min(gradient.shape), q)))
    if how.direction == "random":
        mine = theirs = jax.random.permutation(keys[1], 2 * r)[:r]
    else:
        all_ = jnp.arange(2 * r)
        mine, theirs = {
            "ArBr": (all_[1::2], all_[0::2]), "A2rBr": (all_[r:], all_[:r]), "ArB2r": (all_[:r], all_[r:]),
        }[how.direction]  # fmt: skip
    a, b = vh[mine], u[:, theirs] * sigma[theirs][None]
    if how.scale == "stable":
        b = b * (wide**0.25 / how.stable_gamma**0.5)
    elif how.scale == "weight_svd":
        largest = svd_lowrank(w, 4, jax.random.normal(keys[2], (min(w.shape), r)))[1][0]
        first = sigma[theirs[0]]
        b = b * jnp.where(first > 0, largest / jnp.where(first > 0, first, 1), 1)
    elif how.scale == "gd_scale":
        a, b = a / s, b / s
    return Factors(a.astype(dtype).astype(jnp.float32), b.astype(dtype).astype(jnp.float32))


@_static("r", "s", "bits", "steps")
def loftq(w: Array, r: int, s: float, bits: int, steps: int) -> Factors:
    """W ≈ Q + s·B·A, by turns: Q is what remains in nf4 or int8, B·A the best of what that lost (arXiv:2310.08659).

    PEFT's B·A is not over s, so that its sum is near W only where s is 1; here it always is, with the same Q.
    """
    rest = q = w
    product = Factors(jnp.zeros((r, w.shape[1])), jnp.zeros((w.shape[0], r)))
    for _ in range(steps):
        if bits == 8:
            rest = rest.astype(jnp.float16).astype(jnp.float32)  # as bitsandbytes does
        q = quantized.quantize_weight(rest, "nf4" if bits == 4 else "int8").dense()
        u, sigma, vh = jnp.linalg.svd(w - q, full_matrices=False)
        product = _balanced(u[:, :r], sigma[:r], vh[:r])
        rest = w - product.b @ product.a
    root = math.sqrt(s)
    return Factors(product.a / root, product.b / root, q)


def svd_lowrank(w: Array, steps: int, omega: Array) -> tuple[Array, Array, Array]:
    """U, S, Vh by Halko et al. 2009 (algorithms 4.4 and 5.1), as `torch.svd_lowrank` does it, from `omega` (n, q).

    n is the shorter side of w.
    """
    tall = w.shape[0] >= w.shape[1]
    m = w if tall else w.T
    q = jnp.linalg.qr(m @ omega)[0]
    for _ in range(steps):
        q = jnp.linalg.qr(m.T @ q)[0]
        q = jnp.linalg.qr(m @ q)[0]
    u, sigma, vh = jnp.linalg.svd(q.T @ m, full_matrices=False)
    u = q @ u
    return (u, sigma, vh) if tall else (vh.T, sigma, u.T)


def _balanced(u: Array, sigma: Array, vh: Array) -> Factors:
    root = jnp.sqrt(sigma)
    return Factors(root[:, None] * vh, u * root[None])
