"""The initializations of LoRA that read the base, data or gradients: what each needs, computes and leaves of the base.

A new initialization is a function from `SiteValues` to factors, and its entry in `KINDS`. `Initialization` computes A
and B at each site, and the changed base weights.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxadapt.adapters import initial_values
from jaxadapt.adapters.adapter import Adapter, Recipe
from jaxadapt.adapters.site import Site
from jaxadapt.arrays import quantized, regions
from jaxadapt.arrays.per_entry import PerEntry
from jaxadapt.configs import lora
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, MismatchError, raise_listed
from jaxadapt.initializers import decompositions
from jaxadapt.initializers.decompositions import Factors
from jaxadapt.merging import base_merge, factors
from jaxadapt.merging.pairs import Pair
from jaxadapt.methods.applied import AppliedMethod
from jaxadapt.methods.base import at_least_float32
from jaxadapt.methods.lora import DIAGONAL

# ---------------------------------------------------------------- kinds


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
        InitKind("loftq", _loftq, base=lambda x, pairs: [pair.left for pair in pairs], conv1d=False),
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
            base=lambda x, pairs: [decompositions.truncated(w, x.r) for w in x.weights],
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


# ---------------------------------------------------------------- initialize


@dataclasses.dataclass(frozen=True)
class Initialization:
    """An initialisation of one adapter's sites.

    Raises `ConfigError` listing the sites that the initialisation does not support.
    """

    kind: InitKind
    recipe: Recipe
    sites: Sequence[Site]
    weights: Mapping[str, Array]
    key: Any

    def __post_init__(self) -> None:
        if not self.kind.name:
            return
        others = (b for b in self.sites if self.kind.only_matrices and b.effects.weight != "replaces")
        problems = [f"{b.leaf}: PEFT supports it for linear layers only" for b in others if not self._has_matrices(b)]
        problems += [f"{b.leaf}: {problem}" for b in self.pairs for problem in self._obstacles(b)]
        option = lora.init_field(self.recipe.config)
        raise_listed(ConfigError, f"{option} is not supported for these weights:", problems)

    def _obstacles(self, b: Site) -> list[str]:
        """Return the reasons why the initialisation does not support a site."""
        r, leaf = _rank(b), self.weights[b.leaf]
        if isinstance(leaf, jax.ShapeDtypeStruct | Tracer):
            return ["its values are needed, but only its shape is given"]
        if quantized.is_quantized(leaf):
            return ["it is quantized; initialize with the original weights, then quantize the changed base"]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return [f"expected a floating dtype, found {leaf.dtype}"]
        if leaf.dtype.itemsize == 1 and not self.kind.in_8_bits:
            return [f"dtype {leaf.dtype} would round the changed base weights; cast them to 16 bits or more"]
        if not self.kind.per_entry and isinstance(b.hparams.scale, PerEntry):
            return ["its layers or parts differ in rank or scale; use an unrolled model"]
        out_size, in_size = factors.matrix_sizes(b)
        if self.kind.limit is None:
            return [f"expected an even rank, found {r}"] if r % 2 else []
        if not self.kind.conv1d and b.match.weight.fan_in_fan_out:
            return ["PEFT decomposes a Conv1D's transposed weight, and its layer then fails or is wrong"]
        max_rank = self.kind.limit(min(out_size, in_size))
        return [f"rank {r} exceeds {max_rank}, the most for {out_size} x {in_size}"] if r > max_rank else []

    @property
    def pairs(self) -> list[Site]:
        """The sites whose A and B are computed, reduced to these two tensors."""
        return [_pair(b) for b in self.sites if self._has_matrices(b)]

    def _has_matrices(self, b: Site) -> bool:
        replaces = b.effects.weight == "replaces"
        return not replaces and b.match.weight.kind in self.kind.kinds and factors.has_one_pair(_pair(b))

    def site_values(self, b: Site, data: Mapping[str, Array] = MappingProxyType({})) -> SiteValues:
        """Return the values of a site that the initialization reads; `data` are those of each module."""
        leaf, config, keymap, keys = self.weights[b.leaf], self.recipe.config, self.recipe.keymap, None
        assert isinstance(config, LoraConfig)
        if self.key is not None:  # independent of the other sites
            site_key = jax.random.fold_in(self.key, zlib.crc32(b.leaf.encode()))
            keys = jax.random.split(site_key, len(b.modules))

        def read() -> Array:
            weights = factors.site_weights(keymap, b, at_least_float32(jnp.asarray(leaf)))
            return jnp.stack(list(weights.values()))

        out, turned = factors.matrix_sizes(b)[0], b.match.weight.fan_in_fan_out
        own = [data[module] for module in b.modules if module in data]
        return SiteValues(config, read, out, leaf.dtype, _rank(b), b.hparams.scale, keys, own, turned)

    def factors(self, data: Mapping[str, Array] = MappingProxyType({})) -> dict[str, Factors]:
        """Compute the factors of each module; empty if they are random.

        Args:
            data: `{module: array}`: covariances, gradients or components.

        Raises `AttachError` naming the leaf whose data no factors fit.
        """
        out: dict[str, Factors] = {}
        compute = self.kind.factors
        if compute is None:
            return out
        for b in self.pairs:
            try:
                out |= zip(b.modules, compute(self.site_values(b, data)), strict=True)
            except AttachError as error:
                raise AttachError(f"{b.leaf}: {error}") from error
        return out

    def gradients(self, leaves: Mapping[str, Array]) -> dict[str, Array]:
        """Return the gradient (out, in) of each module's PyTorch weight from the gradients of the base leaves."""
        out: dict[str, Array] = {}
        for b in self.pairs:
            expected, found = tuple(self.weights[b.leaf].shape), leaves.get(b.leaf)
            if found is None or tuple(found.shape) != expected:
                text = "none" if found is None else f"one of shape {tuple(found.shape)}"
                raise MismatchError(f"gradients: expected one of shape {expected} for {b.leaf}, found {text}")
            wide = at_least_float32(jnp.asarray(found))
            out |= factors.site_weights(self.recipe.keymap, b, wide, power=-1)
        return out

    def assemble(
        self, computed: Mapping[str, Factors], dtype: Any, shardings: Mapping[str, Any]
    ) -> tuple[Adapter, dict[str, Any]]:
        """Return the adapter with these factors of modules, and the changed base weights {leaf: array}.

        Args:
            shardings: of the base leaves, by path.
        """
        config: Any = self.recipe.config
        init = True if self.kind.factors is not None else config.init_lora_weights
        plain = config.replace(init_lora_weights=init, kasa_config=None)
        key = jax.random.key(0) if self.key is None else self.key  # all random values are replaced below
        values = initial_values.init_values(plain, self.sites, key, dtype, base=self.weights, base_shardings=shardings)
        pairs = {
            module: Pair(*factors.pad_rank(jnp.asarray(f.a), jnp.asarray(f.b), config.rank_of(module)), 1.0)
            for module, f in computed.items()
        }
        started = self.pairs if computed else []
        new = {path: x.astype(values[path].dtype) for path, x in factors.pair_leaves(started, pairs).items()}
        values |= regions.put_on_devices(new, initial_values.adapter_shardings(started, dict(shardings)))
        base = self._changed_base(plain, computed, paths.unflatten({path: values[path] for path in new}))
        for b, tensor in [(site, t) for site in self.sites for t in site.tensors if computed and t.from_base]:
            # DoRA's magnitudes follow from the changed base
            pair = {e.path: values[e.path] for t, e in zip(b.tensors, b.entries, strict=True) if not t.from_base}
            path, w = paths.join(b.leaf, tensor.name), jnp.asarray(base.get(b.leaf, self.weights[b.leaf]))
            values[path] = initial_values.derive_tensor(config, b, tensor, pair, w).astype(values[path].dtype)
        return Adapter(config, paths.unflatten(values), self.recipe.keymap), base

    def _changed_base(
        self, plain: LoraConfig, computed: Mapping[str, Factors], pairs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the base weights {leaf: array} that the initialization changes; `pairs` is the tree of As and Bs."""
        keymap, base = self.recipe.keymap, dict[str, Any]()
        if self.kind.base is not None:
            for b in self.pairs:
                own = [computed[module] for module in b.modules if module in computed]
                weights = dict(zip(b.modules, self.kind.base(self.site_values(b), own), strict=True))
                base[b.leaf] = factors.with_site_weights(keymap, b, self.weights[b.leaf], weights)
        elif lora.changes_base(self.recipe.config):
            removed = Adapter(plain.replace(use_dora=False), pairs, keymap)
            with jax.default_matmul_precision("highest"):
                changes = base_merge.plan_changes(self.weights, removed, AppliedMethod.unweight, lambda _, x: x)
                base = {leaf: changed.value() for leaf, changed in changes.items()}
        return base


def _pair(b: Site) -> Site:
    """Return a site with A and B only, without derived (DoRA's magnitudes) or random tensors (KaSA's diagonal)."""
    kept = [
        (t, e)
        for t, e in zip(b.tensors, b.entries, strict=True)
        if not t.from_base and t.name not in (DIAGONAL, "lora_B_bias")
    ]
    tensors, entries = zip(*kept, strict=True) if kept else ((), ())
    return dataclasses.replace(b, tensors=tensors, entries=entries)


def _rank(b: Site) -> int:
    return dict(b.tensors[0].own)["r"]
