"""LoRA's initial factors: from one float32 weight W (out, in) to A (r, in) and B (out, r).

Follows PEFT 0.21.2 (`tuners/lora/layer.py`, `corda.py`), up to signs and random numbers. `s` is the scale. These are
pure functions of arrays in PyTorch's layout.
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
    """A (r, in), B (out, r) and the remaining base weight `left`; None: W − s·B·A, or W itself."""

    a: Array
    b: Array
    left: Array | None = None


def _static(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return functools.partial(jax.jit, static_argnames=names)


@_static("r", "s")
def pissa(w: Array, r: int, s: float) -> Factors:
    """Return the r largest singular triples of W, over s (arXiv:2404.02948): s·B·A is the best rank-r approximation."""
    u, sigma, vh = jnp.linalg.svd(w, full_matrices=False)
    return _balanced(u[:, :r], sigma[:r] / s, vh[:r])


@_static("s", "steps")
def pissa_fast(w: Array, s: float, steps: int, omega: Array) -> Factors:
    """Compute `pissa` by a randomised SVD with `steps` rounds of subspace iteration from `omega` (min(out, in), r)."""
    u, sigma, vh = svd_lowrank(w, steps, omega)
    return _balanced(u, sigma / s, vh)


@_static("r")
def mica(w: Array, r: int) -> Factors:
    """Return A = 0, and as B the left singular vectors of the r smallest singular values of W (arXiv:2604.01694)."""
    u = jnp.linalg.svd(w, full_matrices=False)[0]
    return Factors(jnp.zeros((r, w.shape[1])), u[:, -r:])


@_static("r")
def truncated(w: Array, r: int) -> Array:
    """Return W without its r smallest singular values: the base of KaSA (arXiv:2412.06071)."""
    u, sigma, vh = jnp.linalg.svd(w, full_matrices=False)
    return (u[:, :-r] * sigma[None, :-r]) @ vh[:-r]


@_static("r")
def olora(w: Array, r: int) -> Factors:
    """Return the first r rows of R as A and columns of Q as B, W = Q·R (arXiv:2406.01775)."""
    q, upper = jnp.linalg.qr(w)
    return Factors(upper[:r], q[:, :r])


@jax.jit
def orthogonal(square: Array, x: Array, y: Array) -> Factors:
    """Return nonzero A and B with B·A = 0, from normal `square` (r, r), `x` (in, r/2) and `y` (r/2, out).

    A uses the even rows of one orthogonal matrix, B the odd rows.
    """
    q = jnp.linalg.qr(square)[0]
    return Factors((x @ q[0::2]).T / 10, y.T @ q[1::2] / 10)


def corda(w: Array, covariance: Array, r: int, s: float, last: bool) -> Factors:
    """Return singular triples of W·C, multiplied by C⁻¹ (arXiv:2406.05223); C is the inputs' covariance (in, in).

    Takes the largest triples, or with `last` the smallest (knowledge-preserved mode). Damps C until it is invertible.
    Raises `AttachError` if no damping makes it invertible.
    """
    damp = 0.01
    while True:
        fixed, inverse, error = _inverted(covariance, damp)
        if error < 0.05:  # False for NaN, for which doubling the damping does not help
            break
        if not jnp.isfinite(error) or damp > 1e6:
            raise AttachError("cannot invert the covariance of the inputs; check that they are finite and not all zero")
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
    kept = slice(-r, None) if last else slice(r)
    return _balanced(u[:, kept], sigma[kept] / s, (vh @ inverse)[kept])


GA_DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
GA_SCALES = ("stable", "weight_svd", "gd_scale", "unit")


class Gradient(NamedTuple):
    """LoRA-GA's use of a gradient (PEFT's `LoraGAConfig`)."""

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16


@_static("r", "s", "how", "width", "dtype")
def lora_ga(w: Array, gradient: Array, r: int, s: float, how: Gradient, width: int, dtype: Any, key: Array) -> Factors:
    """Return singular vectors of the gradient (out, in) of W (arXiv:2407.05000).

    Args:
        width: with the scale "stable", B is multiplied by the fourth root of this size.
        dtype: the base weight's dtype; A and B are rounded to it, as the changed base weight is.
    """
    keys = jax.random.split(key, 3)
    q = min(4 * r, *gradient.shape)
    u, sigma, vh = svd_lowrank(gradient, 4, jax.random.normal(keys[0], (min(gradient.shape), q)))
    if how.direction == "random":
        a_rows = b_rows = jax.random.permutation(keys[1], 2 * r)[:r]
    else:
        order = jnp.arange(2 * r)
        a_rows, b_rows = {
            "ArBr": (order[1::2], order[0::2]), "A2rBr": (order[r:], order[:r]), "ArB2r": (order[:r], order[r:]),
        }[how.direction]  # fmt: skip
    a, b = vh[a_rows], u[:, b_rows] * sigma[b_rows][None]
    if how.scale == "stable":
        b = b * (width**0.25 / how.stable_gamma**0.5)
    elif how.scale == "weight_svd":
        largest = svd_lowrank(w, 4, jax.random.normal(keys[2], (min(w.shape), r)))[1][0]
        first = sigma[b_rows[0]]
        b = b * jnp.where(first > 0, largest / jnp.where(first > 0, first, 1), 1)
    elif how.scale == "gd_scale":
        a, b = a / s, b / s
    return Factors(a.astype(dtype).astype(jnp.float32), b.astype(dtype).astype(jnp.float32))


@_static("r", "s", "bits", "steps")
def loftq(w: Array, r: int, s: float, bits: int, steps: int) -> Factors:
    """Approximate W ≈ Q + s·B·A alternately: Q = quantize(W − s·B·A), s·B·A = best of W − Q (arXiv:2310.08659).

    Q is in nf4 or int8. PEFT does not divide B·A by s, so its sum approximates W only for s = 1. Here it always does,
    with the same Q.
    """
    residual = q = w
    product = Factors(jnp.zeros((r, w.shape[1])), jnp.zeros((w.shape[0], r)))
    for _ in range(steps):
        if bits == 8:
            residual = residual.astype(jnp.float16).astype(jnp.float32)  # as bitsandbytes does
        q = quantized.quantize_weight(residual, "nf4" if bits == 4 else "int8").dense()
        u, sigma, vh = jnp.linalg.svd(w - q, full_matrices=False)
        product = _balanced(u[:, :r], sigma[:r], vh[:r])
        residual = w - product.b @ product.a
    root = math.sqrt(s)
    return Factors(product.a / root, product.b / root, q)


def svd_lowrank(w: Array, steps: int, omega: Array) -> tuple[Array, Array, Array]:
    """Return U, S, Vh by Halko et al. 2009 (algorithms 4.4 and 5.1), as `torch.svd_lowrank` does.

    Args:
        omega: normal (n, q); n is the shorter side of w.
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
