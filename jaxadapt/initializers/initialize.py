"""Compute an adapter's initial A and B at each site, and the changed base weights."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxadapt import methods
from jaxadapt.adapters import initial_values, sharding
from jaxadapt.adapters.adapter import Adapter, Recipe
from jaxadapt.adapters.sites import Site
from jaxadapt.arrays import placement, quantized
from jaxadapt.configs import LoraConfig, lora_variants
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, MismatchError
from jaxadapt.initializers import decompositions
from jaxadapt.initializers.decompositions import Factors
from jaxadapt.merging import base_merge
from jaxadapt.merging import factors as low_rank
from jaxadapt.methods.lora import kasa

Array = Any
FactorList = list[Factors]


def init_kind(config: LoraConfig) -> str:
    """Return the initialisation's name; "" for those that need only random numbers."""
    init = config.init_lora_weights
    if config.kasa_config is not None:
        return "kasa"
    if not isinstance(init, str) or init.lower() == "gaussian":
        return ""
    return "pissa_niter" if init.startswith("pissa_niter_") else init.lower()


@dataclasses.dataclass(frozen=True)
class Initialization:
    """An initialisation of one adapter's sites.

    Raises `ConfigError` listing the sites that the initialisation does not support.
    """

    kind: str
    recipe: Recipe
    sites: Sequence[Site]
    weights: Mapping[str, Array]
    key: Any

    def __post_init__(self) -> None:
        problems: list[str] = []
        for b in self.sites if self.kind else ():
            if b.effects.weight != "replaces" and self.kind != "lora_ga" and not self._has_matrices(b):
                problems.append(f"{b.leaf}: PEFT supports it for linear layers only")
        problems += [f"{b.leaf}: {problem}" for b in self.pairs if self.kind for problem in self._obstacles(b)]
        if problems:
            option = lora_variants.init_field(self.recipe.config)
            raise ConfigError(f"{option} is not supported for these weights:\n" + paths.bullets(problems))

    def _obstacles(self, b: Site) -> list[str]:
        """Return the reasons why the initialisation does not support a site."""
        r, leaf = _rank(b), self.weights[b.leaf]
        if isinstance(leaf, jax.ShapeDtypeStruct | Tracer):
            return ["its values are needed, but only its shape is given"]
        if quantized.is_quantized(leaf):
            return ["it is quantised; initialise with the original weights, then quantise the changed base"]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return [f"expected a floating dtype, found {leaf.dtype}"]
        if leaf.dtype.itemsize == 1 and self.kind not in ("eva", "mica"):
            return [f"dtype {leaf.dtype} would round the changed base weights; cast them to 16 bits or more"]
        if self.kind != "eva" and isinstance(b.hparams.scale, methods.PerEntry):
            return ["its layers or parts differ in rank or scale; use an unrolled model"]
        out_size, in_size = low_rank.matrix_sizes(b)
        max_rank = min(out_size, in_size) // (2 if self.kind == "lora_ga" else 1) - (self.kind == "kasa")
        if self.kind == "orthogonal":
            return [f"expected an even rank, found {r}"] if r % 2 else []
        if self.kind in ("olora", "loftq") and b.match.weight.fan_in_fan_out:
            return ["PEFT decomposes a Conv1D's transposed weight, and its layer then fails or is wrong"]
        return [f"rank {r} exceeds {max_rank}, the most for {out_size} x {in_size}"] if r > max_rank else []

    @property
    def pairs(self) -> list[Site]:
        """The sites whose A and B are computed, reduced to these two tensors."""
        return [_pair(b) for b in self.sites if self._has_matrices(b)]

    def _has_matrices(self, b: Site) -> bool:
        kinds = ("linear", "embedding") if self.kind == "mica" else ("linear",)
        return b.effects.weight != "replaces" and b.match.weight.kind in kinds and low_rank.has_one_pair(_pair(b))

    def matrices(self, b: Site) -> Array:
        """Return the weights of a site, (modules, out, in) in float32."""
        return low_rank.weight_matrices(
            self.recipe.keymap, b, methods.at_least_float32(jnp.asarray(self.weights[b.leaf]))
        )

    def keys(self, b: Site, count: int) -> Array:
        """Return `count` random keys for a site, independent of the other sites."""
        return jax.random.split(jax.random.fold_in(self.key, zlib.crc32(b.leaf.encode())), count)

    def factors(self, b: Site) -> FactorList:
        """Compute the factors that depend only on the weights; empty for KaSA, whose factors are random."""
        if self.kind == "kasa":
            return []
        w, r, s = self.matrices(b), _rank(b), b.hparams.scale
        if self.kind == "mica":
            pairs = (decompositions.mica(matrix, r) for matrix in w)
            return [Factors(f.a, f.b.astype(self.weights[b.leaf].dtype)) for f in pairs]
        if self.kind == "pissa":
            return [decompositions.pissa(matrix, r, s) for matrix in w]
        if self.kind == "olora":
            return [decompositions.olora(matrix, r) for matrix in w]
        if self.kind == "loftq":
            options = {"loftq_bits": 4, "loftq_iter": 1} | init_settings(
                self.recipe.config, "loftq_config", ("loftq_bits", "loftq_iter")
            )
            bits, steps = options.values()
            if bits not in (4, 8) or not isinstance(steps, int) or steps < 1:
                expected = "4 or 8 bits and a positive number of iterations"
                raise ConfigError(f"loftq_config: expected {expected}, found {options}")
            return [decompositions.loftq(matrix, r, s, bits, steps) for matrix in w]
        keys = self.keys(b, len(w))
        if self.kind == "pissa_niter":
            steps = int(str(self.recipe.config.get("init_lora_weights")).rpartition("_")[2])
            shape = (min(w.shape[1:]), r)
            omegas = [jax.random.normal(k, shape) for k in keys]
            return [decompositions.pissa_fast(x, s, steps, omega) for x, omega in zip(w, omegas, strict=True)]
        _, out, inputs = w.shape
        dtype = self.weights[b.leaf].dtype
        shapes = ((r, r), (inputs, r // 2), (r // 2, out))
        draws = [map(jax.random.normal, jax.random.split(key, 3), shapes) for key in keys]
        pairs = (decompositions.orthogonal(*normals) for normals in draws)
        return [Factors(f.a.astype(dtype), f.b.astype(dtype)) for f in pairs]

    def corda(self, b: Site, covariances: Mapping[str, Array]) -> FactorList:
        """Compute CorDA's factors from the covariances (in, in) of the modules' inputs."""
        options: Any = self.recipe.config.get("corda_config") or {}
        method = options.get("corda_method", "ipm")
        if method not in ("ipm", "kpm"):
            raise ConfigError(f"corda_config: corda_method: expected 'ipm' or 'kpm', found {method!r}")
        r, s, names = _rank(b), b.hparams.scale, low_rank.site_modules(b, self.recipe.keymap)
        try:
            pairs = zip(names, self.matrices(b), strict=True)
            return [decompositions.corda(w, covariances[m], r, s, method == "kpm") for m, w in pairs]
        except AttachError as error:
            raise AttachError(f"{b.leaf}: {error}") from error

    def lora_ga(self, b: Site, gradients: Mapping[str, Array]) -> FactorList:
        """Compute LoRA-GA's factors from the gradients of the base leaves."""
        how = decompositions.Gradient(
            **init_settings(self.recipe.config, "lora_ga_config", decompositions.Gradient._fields)
        )
        if how.direction not in decompositions.GA_DIRECTIONS or how.scale not in decompositions.GA_SCALES:
            raise ConfigError(
                f"lora_ga_config: expected a direction of {decompositions.GA_DIRECTIONS} and a scale of"
                f" {decompositions.GA_SCALES}, found {how.direction!r} and {how.scale!r}"
            )
        leaf = self.weights[b.leaf]
        gradient = gradients.get(b.leaf)
        if gradient is None or tuple(gradient.shape) != tuple(leaf.shape):
            found = "none" if gradient is None else f"one of shape {tuple(gradient.shape)}"
            raise MismatchError(f"gradients: expected one of shape {tuple(leaf.shape)} for {b.leaf}, found {found}")
        keymap = self.recipe.keymap
        # The leaf is PyTorch's weight times a factor, so PyTorch's gradient is the leaf's gradient times that factor.
        rows = low_rank.weight_matrices(keymap, b, methods.at_least_float32(jnp.asarray(gradient)), scaled=False)
        rows = rows * low_rank.base_factor(keymap, b, leaf.shape)
        w = self.matrices(b)
        # PEFT takes the first axis of the stored weight, which is the input axis of a Conv1D.
        width = w.shape[2] if b.match.weight.fan_in_fan_out else w.shape[1]
        keys = self.keys(b, len(w))
        return [
            decompositions.lora_ga(x, g, _rank(b), b.hparams.scale, how, width, leaf.dtype, k)
            for x, g, k in zip(w, rows, keys, strict=True)
        ]

    def assemble(
        self, factors: Mapping[str, FactorList], dtype: Any, shardings: Mapping[str, Any]
    ) -> tuple[Adapter, dict[str, Any]]:
        """Return the adapter with these factors at its sites, and the changed base weights {leaf: array}.

        Args:
            shardings: of the base leaves, by path.
        """
        config: Any = self.recipe.config
        plain = config.replace(
            init_lora_weights=True if self.kind not in ("", "kasa") else config.init_lora_weights, kasa_config=None
        )
        key = jax.random.key(0) if self.key is None else self.key  # all random values are replaced below
        values = initial_values.init_values(plain, self.sites, key, dtype, base=self.weights, base_shardings=shardings)
        computed = [b for b in self.pairs if factors.get(b.leaf)]
        new: dict[str, Array] = {}
        for b in computed:
            rank = _rank(b)
            padded = [low_rank.pad_rank(jnp.asarray(f.a), jnp.asarray(f.b), rank) for f in factors[b.leaf]]
            a_matrices, b_matrices = (jnp.stack(side) for side in zip(*padded, strict=True))
            new |= low_rank.matrices_to_leaves(b, a_matrices, b_matrices)[1]
        new_dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
        values |= placement.put_on_devices(
            {p: x.astype(new_dtype) for p, x in new.items()}, sharding.adapter_shardings(computed, dict(shardings))
        )
        base: dict[str, Any] = {}
        if self.kind == "loftq":
            for b in computed:
                leaf, rows = self.weights[b.leaf], jnp.stack([jnp.asarray(f.left) for f in factors[b.leaf]])
                base[b.leaf] = low_rank.with_weight_matrices(self.recipe.keymap, b, leaf, rows).astype(leaf.dtype)
        elif self.kind == "kasa":
            for b in self.pairs:
                rows = jnp.stack([decompositions.truncated(w, _rank(b)) for w in self.matrices(b)])
                leaf = self.weights[b.leaf]
                base[b.leaf] = low_rank.with_weight_matrices(self.recipe.keymap, b, leaf, rows).astype(leaf.dtype)
        elif lora_variants.changes_base(config):
            pairs = paths.unflatten({p: values[p] for p in new})
            removed = Adapter(plain.replace(use_dora=False), pairs, self.recipe.keymap)
            with jax.default_matmul_precision("highest"):
                changes = base_merge.plan_changes(self.weights, removed, base_merge.remove_from_weight, lambda a, x: x)
                base = {leaf: changed.value() for leaf, changed in changes.items()}
        for b in (b for b in self.sites if factors.get(b.leaf)):
            derived = [t for t in b.tensors if t.from_base]  # DoRA's magnitudes follow from the changed base
            if derived:
                kept = {paths.join(b.leaf, t.name) for t in b.tensors if not t.from_base}
                pair = {path: values[path] for path in kept}
                w = jnp.asarray(base.get(b.leaf, self.weights[b.leaf]))
                for tensor in derived:
                    path = paths.join(b.leaf, tensor.name)
                    new_values = initial_values.derive_tensor(config, b, tensor, pair, w)
                    values[path] = new_values.astype(values[path].dtype)
        return Adapter(config, paths.unflatten(values), self.recipe.keymap), base


def _pair(b: Site) -> Site:
    """Return a site with A and B only, without derived (DoRA's magnitudes) or random tensors (KaSA's diagonal)."""
    kept = [
        (t, e)
        for t, e in zip(b.tensors, b.entries, strict=True)
        if not t.from_base and t.name not in (kasa.DIAGONAL, "lora_B_bias")
    ]
    tensors, entries = zip(*kept, strict=True) if kept else ((), ())
    return dataclasses.replace(b, tensors=tensors, entries=entries)


def _rank(b: Site) -> int:
    return dict(b.tensors[0].own)["r"]


def init_settings(config: Any, field: str, known: Iterable[str]) -> dict[str, Any]:
    """Return the settings of a configuration's field. Raises `ConfigError` for unknown names."""
    settings: Mapping[str, Any] = config.get(field) or {}
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ConfigError(f"{field}: unknown {', '.join(unknown)}; expected some of {', '.join(known)}")
    return dict(settings)
