"""The initializations of LoRA, and the decompositions that give the initial factors.

`KINDS` lists the initializations that read the base, data or gradients: what each needs, computes and leaves of the
base. A new one is a function from `ModuleValues` to factors, and its entry. `Initialization` in `start_adapter.py`
computes A and B of each module, and the changed base weights.

The decompositions are pure functions from one float32 weight W (out, in) to A (r, in) and B (out, r), in PyTorch's
layout; `s` is the scale. They follow PEFT 0.21.2 (`tuners/lora/layer.py`, `corda.py`), up to signs and random numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxadapt.arrays import quantized
from jaxadapt.configs import lora
from jaxadapt.core.errors import AttachError, ConfigError

# ---------------------------------------------------------------- decompositions


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
    """Compute `pissa` by a randomized SVD with `steps` rounds of subspace iteration from `omega` (min(out, in), r)."""
    u, sigma, vh = svd_lowrank(w, steps, omega)
    return _balanced(u, sigma / s, vh)


@_static("r", "dtype")
def mica(w: Array, r: int, dtype: Any) -> Factors:
    """Return A = 0, and as B the left singular vectors of the r smallest singular values of W (arXiv:2604.01694).

    B is rounded to `dtype`, the base weight's.
    """
    return Factors(jnp.zeros((r, w.shape[1])), jnp.linalg.svd(w, full_matrices=False)[0][:, -r:].astype(dtype))


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
    for doublings in range(28):  # up to 10⁶
        fixed, inverse, error = _inverted(covariance, 0.01 * 2**doublings)
        if error < 0.05:
            return _corda_factors(w, fixed, inverse, r, s, last)
        if not jnp.isfinite(error):  # doubling the damping does not help
            break
    raise AttachError("cannot invert the covariance of the inputs; check that they are finite and not all zero")


@jax.jit
def _inverted(covariance: Array, damp: float) -> tuple[Array, Array, Array]:
    eye = jnp.eye(len(covariance), dtype=covariance.dtype)
    fixed = covariance + eye * jnp.mean(jnp.diag(covariance)) * damp
    inverse = jnp.linalg.inv(fixed)
    return fixed, inverse, jnp.linalg.norm(fixed @ inverse - eye)


@_static("r", "s", "last")
def _corda_factors(w: Array, fixed: Array, inverse: Array, r: int, s: float, last: bool) -> Factors:
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


# ---------------------------------------------------------------- kinds


@dataclasses.dataclass(frozen=True)
class ModuleValues:
    """The values of one module that an initialization reads; the matrices are PyTorch's.

    Attributes:
        config: the configuration.
        read: returns W (out, in) of each module of the leaf, in float32.
        module: the module.
        out: the number of outputs.
        dtype: the dtype of the base leaf.
        r, s: the rank and the scale.
        key: the module's own random key; None if there is no key.
        data: the module's covariance (in, in), gradient (out, in) or components (r, in); None if there are no data.
        fan_in_fan_out: True if PyTorch stores the weight as (in, out).
    """

    config: lora.LoraConfig
    read: Callable[[], Mapping[str, Array]]
    module: str
    out: int
    dtype: Any
    r: int
    s: float
    key: Array
    data: Array
    fan_in_fan_out: bool

    @property
    def w(self) -> Array:
        """W (out, in) in float32."""
        return self.read()[self.module]


def init_settings(config: lora.LoraConfig, field: str, known: Iterable[str]) -> dict[str, Any]:
    """Return the settings of a configuration's field. Raises `ConfigError` for unknown names."""
    settings: Mapping[str, Any] = config.get(field) or {}
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigError(f"{field}: unknown {', '.join(unknown)}; expected some of {', '.join(known)}")
    return dict(settings)


@dataclasses.dataclass(frozen=True)
class InitKind:
    """One initialization.

    Attributes:
        name: the name in messages; "" for initializations that need only random numbers.
        needs: what it needs of `start`: "key", and as `data` "batches" or "gradients".
        factors: returns A (r, in) and B (out, r) of a module; None if they are random.
        base: returns the base weight of a module, from its values and factors. By default the base becomes
            W − s·B·A if the initialization changes it, and stays W if not.
        kinds: the kinds of weight that it supports.
        only_matrices: True to refuse adapters that have other weights.
        in_8_bits: True if the base may have 8 bits, because it stays W.
        per_entry: True if the layers or parts of a leaf may differ in rank or scale.
        conv1d: True if PEFT supports it for weights stored as (in, out).
        limit: returns the largest rank for the smaller side of W; None for no limit, but an even rank.
        divides: True if it divides A and B by the root of the scale.
        from_run: why `load` cannot repeat it; "" if it can.
    """

    name: str
    factors: Callable[[ModuleValues], Factors] | None = None
    needs: tuple[str, ...] = ()
    base: Callable[[ModuleValues, Factors | None], Array] | None = None
    kinds: tuple[str, ...] = ("linear",)
    only_matrices: bool = True
    in_8_bits: bool = False
    per_entry: bool = False
    conv1d: bool = True
    limit: Callable[[int], int] | None = int
    divides: bool = False
    from_run: str = ""


def _pissa_fast(x: ModuleValues) -> Factors:
    steps = int(str(x.config.init_lora_weights).rpartition("_")[2])
    return pissa_fast(x.w, x.s, steps, jax.random.normal(x.key, (min(x.w.shape), x.r)))


def _loftq(x: ModuleValues) -> Factors:
    options = {"loftq_bits": 4, "loftq_iter": 1} | init_settings(x.config, "loftq_config", ("loftq_bits", "loftq_iter"))
    bits, steps = options.values()
    if bits not in (4, 8) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"loftq_config: expected 4 or 8 bits and a positive number of iterations, found {options}")
    return loftq(x.w, x.r, x.s, bits, steps)


def _orthogonal(x: ModuleValues) -> Factors:
    out, inputs = x.w.shape
    shapes = ((x.r, x.r), (inputs, x.r // 2), (x.r // 2, out))
    pair = orthogonal(*map(jax.random.normal, jax.random.split(x.key, 3), shapes))
    return Factors(pair.a.astype(x.dtype), pair.b.astype(x.dtype))


def _corda(x: ModuleValues) -> Factors:
    options: Any = x.config.corda_config or {}
    method = options.get("corda_method", "ipm")
    if method not in ("ipm", "kpm"):
        raise ConfigError(f"corda_config: corda_method: expected 'ipm' or 'kpm', found {method!r}")
    return corda(x.w, x.data, x.r, x.s, method == "kpm")


def _lora_ga(x: ModuleValues) -> Factors:
    how = Gradient(**init_settings(x.config, "lora_ga_config", Gradient._fields))
    if how.direction not in GA_DIRECTIONS or how.scale not in GA_SCALES:
        raise ConfigError(
            f"lora_ga_config: expected a direction of {GA_DIRECTIONS} and a scale of"
            f" {GA_SCALES}, found {how.direction!r} and {how.scale!r}"
        )
    # PEFT takes the first axis of the stored weight, which is the input axis of a Conv1D.
    return lora_ga(x.w, x.data, x.r, x.s, how, x.w.shape[1 if x.fan_in_fan_out else 0], x.dtype, x.key)


KINDS: Mapping[str, InitKind] = {
    kind.name: kind
    for kind in (
        InitKind("", needs=("key",)),
        InitKind("pissa", lambda x: pissa(x.w, x.r, x.s), divides=True),
        InitKind(
            "pissa_niter",
            _pissa_fast,
            ("key",),
            divides=True,
            from_run="a randomized SVD, which differs in each run",
        ),
        InitKind("olora", lambda x: olora(x.w, x.r), conv1d=False),
        InitKind(
            "mica",
            lambda x: mica(x.w, x.r, x.dtype),
            kinds=("linear", "embedding"),
            in_8_bits=True,
        ),
        InitKind(
            "loftq",
            _loftq,
            base=lambda x, pair: None if pair is None else pair.left,
            conv1d=False,
            divides=True,
        ),
        InitKind("orthogonal", _orthogonal, ("key",), limit=None),
        InitKind("corda", _corda, ("batches",), divides=True, from_run="the initialization's data"),
        InitKind(
            "eva",
            lambda x: Factors(x.data, jnp.zeros((x.out, len(x.data)))),
            ("batches",),
            in_8_bits=True,
            per_entry=True,
        ),
        InitKind(
            "lora_ga",
            _lora_ga,
            ("gradients", "key"),
            only_matrices=False,
            limit=lambda size: size // 2,
            from_run="the initialization's gradients",
        ),
        InitKind(
            "kasa",
            needs=("key",),
            base=lambda x, pair: truncated(x.w, x.r),
            limit=lambda size: size - 1,
        ),
    )
}
"""{name: initialization}."""


def init_kind(config: lora.LoraConfig) -> InitKind:
    """Return the initialization that a configuration asks for."""
    name = re.sub(r"_\d+$", "", str(config.init_lora_weights).lower())
    random = KINDS[""] if config.kasa_config is None else KINDS["kasa"]
    return random if name in ("true", "false", "gaussian") else KINDS[name]
