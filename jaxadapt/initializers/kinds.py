"""The initializations of LoRA that read the base, data or gradients: what each needs, computes and leaves of the base.

A new initialization is a function from `SiteValues` to factors, and its entry in `KINDS`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.configs import LoraConfig
from jaxadapt.core.errors import ConfigError
from jaxadapt.initializers import decompositions
from jaxadapt.initializers.decompositions import Factors

Array = Any


@dataclasses.dataclass(frozen=True)
class SiteValues:
    """The values of one site that an initialization reads; the matrices are PyTorch's, one for each module.

    Attributes:
        config: the configuration.
        read: returns W (modules, out, in) in float32.
        out: the number of outputs.
        dtype: the dtype of the base leaf.
        r, s: the rank and the scale.
        keys: one random key for each module; None if there is no key.
        data: one array for each module: covariances (in, in), gradients (out, in) or components (r, in).
        fan_in_fan_out: True if PyTorch stores the weight as (in, out).
    """

    config: LoraConfig
    read: Callable[[], Array]
    out: int
    dtype: Any
    r: int
    s: float
    keys: Array
    data: Sequence[Array]
    fan_in_fan_out: bool

    @functools.cached_property
    def weights(self) -> Array:
        """W (modules, out, in) in float32, read on first use."""
        return self.read()


def init_settings(config: LoraConfig, field: str, known: Iterable[str]) -> dict[str, Any]:
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
        needs: the arguments of `start` that it needs.
        takes: further arguments that it uses.
        factors: returns A (r, in) and B (out, r) of each module; None if they are random.
        base: returns the base weight of each module, from its values and factors. By default the base becomes
            W − s·B·A if the initialization changes it, and stays W if not.
        kinds: the kinds of weight that it supports.
        only_matrices: True to refuse adapters that have other weights.
        in_8_bits: True if the base may have 8 bits, because it stays W.
        per_entry: True if the layers or parts of a leaf may differ in rank or scale.
        conv1d: True if PEFT supports it for weights stored as (in, out).
        limit: returns the largest rank for the smaller side of W; None for no limit, but an even rank.
        from_run: why `load` cannot repeat it; "" if it can.
    """

    name: str
    factors: Callable[[SiteValues], list[Factors]] | None = None
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    base: Callable[[SiteValues, Sequence[Factors]], list[Array]] | None = None
    kinds: tuple[str, ...] = ("linear",)
    only_matrices: bool = True
    in_8_bits: bool = False
    per_entry: bool = False
    conv1d: bool = True
    limit: Callable[[int], int] | None = int
    from_run: str = ""


def _pissa_fast(x: SiteValues) -> list[Factors]:
    steps = int(str(x.config.init_lora_weights).rpartition("_")[2])
    omegas = [jax.random.normal(key, (min(x.weights.shape[1:]), x.r)) for key in x.keys]
    return [decompositions.pissa_fast(w, x.s, steps, omega) for w, omega in zip(x.weights, omegas, strict=True)]


def _mica(x: SiteValues) -> list[Factors]:
    pairs = (decompositions.mica(w, x.r) for w in x.weights)
    return [Factors(pair.a, pair.b.astype(x.dtype)) for pair in pairs]


def _loftq(x: SiteValues) -> list[Factors]:
    options = {"loftq_bits": 4, "loftq_iter": 1} | init_settings(x.config, "loftq_config", ("loftq_bits", "loftq_iter"))
    bits, steps = options.values()
    if bits not in (4, 8) or not isinstance(steps, int) or steps < 1:
        expected = "4 or 8 bits and a positive number of iterations"
        raise ConfigError(f"loftq_config: expected {expected}, found {options}")
    return [decompositions.loftq(w, x.r, x.s, bits, steps) for w in x.weights]


def _orthogonal(x: SiteValues) -> list[Factors]:
    _, out, inputs = x.weights.shape
    shapes = ((x.r, x.r), (inputs, x.r // 2), (x.r // 2, out))
    draws = [map(jax.random.normal, jax.random.split(key, 3), shapes) for key in x.keys]
    pairs = (decompositions.orthogonal(*normals) for normals in draws)
    return [Factors(pair.a.astype(x.dtype), pair.b.astype(x.dtype)) for pair in pairs]


def _corda(x: SiteValues) -> list[Factors]:
    options: Any = x.config.corda_config or {}
    method = options.get("corda_method", "ipm")
    if method not in ("ipm", "kpm"):
        raise ConfigError(f"corda_config: corda_method: expected 'ipm' or 'kpm', found {method!r}")
    pairs = zip(x.weights, x.data, strict=True)
    return [decompositions.corda(w, covariance, x.r, x.s, method == "kpm") for w, covariance in pairs]


def _lora_ga(x: SiteValues) -> list[Factors]:
    how = decompositions.Gradient(**init_settings(x.config, "lora_ga_config", decompositions.Gradient._fields))
    if how.direction not in decompositions.GA_DIRECTIONS or how.scale not in decompositions.GA_SCALES:
        raise ConfigError(
            f"lora_ga_config: expected a direction of {decompositions.GA_DIRECTIONS} and a scale of"
            f" {decompositions.GA_SCALES}, found {how.direction!r} and {how.scale!r}"
        )
    # PEFT takes the first axis of the stored weight, which is the input axis of a Conv1D.
    width = x.weights.shape[2 if x.fan_in_fan_out else 1]
    return [
        decompositions.lora_ga(w, gradient, x.r, x.s, how, width, x.dtype, key)
        for w, gradient, key in zip(x.weights, x.data, x.keys, strict=True)
    ]


def _eva(x: SiteValues) -> list[Factors]:
    return [Factors(a, jnp.zeros((x.out, len(a)))) for a in x.data]


KINDS: Mapping[str, InitKind] = {
    kind.name: kind
    for kind in (
        InitKind("", needs=("key",)),
        InitKind("pissa", lambda x: [decompositions.pissa(w, x.r, x.s) for w in x.weights]),
        InitKind("pissa_niter", _pissa_fast, ("key",), from_run="a randomised SVD, which differs in each run"),
        InitKind("olora", lambda x: [decompositions.olora(w, x.r) for w in x.weights], conv1d=False),
        InitKind("mica", _mica, kinds=("linear", "embedding"), in_8_bits=True),
        InitKind("loftq", _loftq, base=lambda x, factors: [pair.left for pair in factors], conv1d=False),
        InitKind("orthogonal", _orthogonal, ("key",), limit=None),
        InitKind("corda", _corda, ("batches",), from_run="the initialization's data"),
        InitKind("eva", _eva, ("batches",), ("mask",), in_8_bits=True, per_entry=True),
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
            base=lambda x, factors: [decompositions.truncated(w, x.r) for w in x.weights],
            limit=lambda size: size - 1,
        ),
    )
}
"""{name: initialization}."""


def init_kind(config: LoraConfig) -> InitKind:
    """Return the initialization that a configuration asks for."""
    name = re.sub(r"_\d+$", "", str(config.init_lora_weights).lower())
    random = KINDS[""] if config.kasa_config is None else KINDS["kasa"]
    return random if name in ("true", "false", "gaussian") else KINDS[name]
