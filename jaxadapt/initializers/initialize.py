"""What each initialisation makes of the sites of one adapter: A and B, and what becomes of the base weights."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxadapt import methods
from jaxadapt.adapters import initial_values, sharding, sites
from jaxadapt.adapters.adapter import Adapter, Recipe
from jaxadapt.arrays import placement, quantized
from jaxadapt.configs import LoraConfig, lora_variants
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, MismatchError
from jaxadapt.initializers import decompositions
from jaxadapt.initializers.decompositions import Factors
from jaxadapt.merging import base_merge
from jaxadapt.merging import factors as products
from jaxadapt.methods.lora import kasa

Array = Any
Rows = list[Factors]


def init_kind(config: LoraConfig) -> str:
    """The initialisation, "" for those that need nothing but random numbers."""
    init = config.init_lora_weights
    if config.kasa_config is not None:
        return "kasa"
    if not isinstance(init, str) or init.lower() == "gaussian":
        return ""
    return "pissa_niter" if init.startswith("pissa_niter_") else init.lower()


@dataclasses.dataclass(frozen=True)
class Initialization:
    """The sites of an adapter that is to begin in one of these ways."""

    kind: str
    recipe: Recipe
    bounds: tuple[sites.Site, ...] | Sequence[sites.Site]
    weights: Mapping[str, Array]
    key: Any

    def __post_init__(self) -> None:
        problems: list[str] = []
        for b in self.bounds if self.kind else ():
            if not b.method.replaces and self.kind != "lora_ga" and not self._has_matrices(b):
                problems.append(f"{b.leaf}: PEFT begins embeddings, convolutions and the like in no such way")
        problems += [f"{b.leaf}: {why}" for b in self.pairs if self.kind for why in self._obstacles(b)]
        if problems:
            what = lora_variants.init_field(self.recipe.config)
            raise ConfigError(f"{what} is not to be had here:\n" + paths.bullets(problems))

    def _obstacles(self, b: sites.Site) -> list[str]:
        r, leaf = _rank(b), self.weights[b.leaf]
        if isinstance(leaf, jax.ShapeDtypeStruct | Tracer):
            return ["its values are needed, and only its shape is here"]
        if quantized.is_quantized(leaf):
            return ["it is quantised, and this begins from the weights as they were: quantise what is left of them"]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return [f"its values are of dtype {leaf.dtype}"]
        if leaf.dtype.itemsize == 1 and self.kind not in ("eva", "mica"):
            return [f"its values are of dtype {leaf.dtype}, to which what is left of them would be rounded: widen them"]
        if self.kind != "eva" and isinstance(b.hparams.scale, methods.PerEntry):
            return ["its layers or parts differ in rank or scale, and it begins in one way: use an unrolled model"]
        outs, inns = products.matrix_sizes(b)
        most = min(outs, inns) // (2 if self.kind == "lora_ga" else 1) - (self.kind == "kasa")
        if self.kind == "orthogonal":
            return [f"the rank has to be even, and is {r}"] if r % 2 else []
        if self.kind in ("olora", "loftq") and b.match.weight.fan_in_fan_out:
            return ["PEFT decomposes a Conv1D's weight the wrong way round, and its layer then fails or is another one"]
        return [f"of {outs} x {inns} numbers, rank {r} (at most {most} here)"] if r > most else []

    @property
    def pairs(self) -> list[sites.Site]:
        """The sites whose A and B are more than random numbers, with these two alone."""
        return [_pair(b) for b in self.bounds if self._has_matrices(b)]

    def _has_matrices(self, b: sites.Site) -> bool:
        kinds = ("linear", "embedding") if self.kind == "mica" else ("linear",)
        return not b.method.replaces and b.match.weight.kind in kinds and products.has_one_pair(_pair(b))

    def matrices(self, b: sites.Site) -> Array:
        """The weights of a site, (modules, out, in) in float32."""
        return products.weight_matrices(
            self.recipe.keymap, b, methods.at_least_float32(jnp.asarray(self.weights[b.leaf]))
        )

    def keys(self, b: sites.Site, count: int) -> Array:
        return jax.random.split(jax.random.fold_in(self.key, zlib.crc32(b.leaf.encode())), count)

    def rows(self, b: sites.Site) -> Rows:
        """The factors that need the weights alone; none where they are but random numbers."""
        if self.kind == "kasa":
            return []
        w, r, s = self.matrices(b), _rank(b), b.hparams.scale
        if self.kind == "mica":
            made = (decompositions.mica(one, r) for one in w)
            return [Factors(f.a, f.b.astype(self.weights[b.leaf].dtype)) for f in made]
        if self.kind == "pissa":
            return [decompositions.pissa(one, r, s) for one in w]
        if self.kind == "olora":
            return [decompositions.olora(one, r) for one in w]
        if self.kind == "loftq":
            given = {"loftq_bits": 4, "loftq_iter": 1} | init_settings(
                self.recipe.config, "loftq_config", ("loftq_bits", "loftq_iter")
            )
            bits, steps = given.values()
            if bits not in (4, 8) or not isinstance(steps, int) or steps < 1:
                expected = "4 or 8 bits and a positive number of iterations"
                raise ConfigError(f"loftq_config: expected {expected}, found {given}")
            return [decompositions.loftq(one, r, s, bits, steps) for one in w]
        keys = self.keys(b, len(w))
        if self.kind == "pissa_niter":
            steps = int(str(self.recipe.config.get("init_lora_weights")).rpartition("_")[2])
            shape = (min(w.shape[1:]), r)
            omegas = [jax.random.normal(k, shape) for k in keys]
            return [decompositions.pissa_fast(x, s, steps, omega) for x, omega in zip(w, omegas, strict=True)]
        _, out, inputs = w.shape
        dtype = self.weights[b.leaf].dtype
        shapes = ((r, r), (inputs, r // 2), (r // 2, out))
        drawn = [map(jax.random.normal, jax.random.split(key, 3), shapes) for key in keys]
        made = (decompositions.orthogonal(*each) for each in drawn)
        return [Factors(f.a.astype(dtype), f.b.astype(dtype)) for f in made]

    def corda(self, b: sites.Site, covariances: Mapping[str, Array]) -> Rows:
        given: Any = self.recipe.config.get("corda_config") or {}
        method = given.get("corda_method", "ipm")
        if method not in ("ipm", "kpm"):
            raise ConfigError(f"corda_config: corda_method: expected 'ipm' or 'kpm', found {method!r}")
        r, s, names = _rank(b), b.hparams.scale, products.site_modules(b, self.recipe.keymap)
        try:
            pairs = zip(names, self.matrices(b), strict=True)
            return [decompositions.corda(w, covariances[m], r, s, method == "kpm") for m, w in pairs]
        except AttachError as error:
            raise AttachError(f"{b.leaf}: {error}") from error

    def lora_ga(self, b: sites.Site, gradients: Mapping[str, Array]) -> Rows:
        how = decompositions.Gradient(
            **init_settings(self.recipe.config, "lora_ga_config", decompositions.Gradient._fields)
        )
        if how.direction not in decompositions.GA_DIRECTIONS or how.scale not in decompositions.GA_SCALES:
            raise ConfigError(
                f"lora_ga_config: expected a direction of {decompositions.GA_DIRECTIONS} and a scale of"
                f" {decompositions.GA_SCALES},"
                f" found {how.direction!r} and {how.scale!r}"
            )
        leaf = self.weights[b.leaf]
        slope = gradients.get(b.leaf)
        if slope is None or tuple(slope.shape) != tuple(leaf.shape):
            found = "none" if slope is None else f"one of shape {tuple(slope.shape)}"
            raise MismatchError(f"gradients: for {b.leaf} {tuple(leaf.shape)} there is {found}")
        table = self.recipe.keymap
        # The leaf is PyTorch's weight times a factor, so PyTorch's gradient is the leaf's times that factor.
        rows = products.weight_matrices(table, b, methods.at_least_float32(jnp.asarray(slope)), scaled=False)
        rows = rows * products.base_factor(table, b, leaf.shape)
        w = self.matrices(b)
        # For a Conv1D PEFT takes the first axis of what it stores, which there is the input's.
        wide = w.shape[2] if b.match.weight.fan_in_fan_out else w.shape[1]
        keys = self.keys(b, len(w))
        return [
            decompositions.lora_ga(x, g, _rank(b), b.hparams.scale, how, wide, leaf.dtype, k)
            for x, g, k in zip(w, rows, keys, strict=True)
        ]

    def assembled(
        self, made: Mapping[str, Rows], dtype: Any, where: Mapping[str, Any]
    ) -> tuple[Adapter, dict[str, Any]]:
        """The adapter with these factors at its sites, and the base weights that it changes."""
        config: Any = self.recipe.config
        plain = config.replace(
            init_lora_weights=True if self.kind not in ("", "kasa") else config.init_lora_weights, kasa_config=None
        )
        key = jax.random.key(0) if self.key is None else self.key  # (then everything drawn is replaced below)
        values = initial_values.init_values(plain, self.bounds, key, dtype, base=self.weights, where=where)
        mine = [b for b in self.pairs if made.get(b.leaf)]
        new: dict[str, Array] = {}
        for b in mine:
            rank = _rank(b)
            each = [products.pad_rank(jnp.asarray(f.a), jnp.asarray(f.b), rank) for f in made[b.leaf]]
            a, bb = (jnp.stack(side) for side in zip(*each, strict=True))
            new |= products.matrices_to_leaves(b, a, bb)[1]
        kind = jnp.dtype(jnp.float32 if dtype is None else dtype)
        values |= placement.put_on_devices(
            {p: x.astype(kind) for p, x in new.items()}, sharding.adapter_shardings(mine, dict(where))
        )
        base: dict[str, Any] = {}
        if self.kind == "loftq":
            for b in mine:
                leaf, rows = self.weights[b.leaf], jnp.stack([jnp.asarray(f.left) for f in made[b.leaf]])
                base[b.leaf] = products.with_weight_matrices(self.recipe.keymap, b, leaf, rows).astype(leaf.dtype)
        elif self.kind == "kasa":
            for b in self.pairs:
                rows = jnp.stack([decompositions.truncated(w, _rank(b)) for w in self.matrices(b)])
                leaf = self.weights[b.leaf]
                base[b.leaf] = products.with_weight_matrices(self.recipe.keymap, b, leaf, rows).astype(leaf.dtype)
        elif lora_variants.changes_base(config):
            pairs = paths.unflatten({p: values[p] for p in new})
            taken = Adapter(plain.replace(use_dora=False), pairs, self.recipe.keymap)
            with jax.default_matmul_precision("highest"):
                changes = base_merge.plan_changes(self.weights, taken, base_merge.remove_from_weight, lambda a, x: x)
                base = {leaf: changed.value() for leaf, changed in changes.items()}
        for b in (b for b in self.bounds if made.get(b.leaf)):
            derived = [t.name for t in b.tensors if t.from_base]  # the magnitudes of DoRA, of what they start from
            if derived:
                pair = {t.name: values[paths.join(b.leaf, t.name)] for t in b.tensors if not t.from_base}
                w = jnp.asarray(base.get(b.leaf, self.weights[b.leaf]))
                found = sites.map_stack(b, lambda a, w: a.from_base(w), pair, w)
                for name in derived:
                    at = paths.join(b.leaf, name)
                    values[at] = found[name].astype(values[at].dtype)
        return Adapter(config, paths.unflatten(values), self.recipe.keymap), base


def _pair(b: sites.Site) -> sites.Site:
    """A site's A and B, without what follows from them and the base (DoRA's magnitudes) or is but drawn (KaSA's)."""
    both = zip(b.tensors, b.entries, strict=True)
    kept = [(t, e) for t, e in both if not t.from_base and t.name not in (kasa.DIAGONAL, "lora_B_bias")]
    tensors, entries = zip(*kept, strict=True) if kept else ((), ())
    return dataclasses.replace(b, tensors=tensors, entries=entries)


def _rank(b: sites.Site) -> int:
    return dict(b.tensors[0].own)["r"]


def init_settings(config: Any, field: str, known: Iterable[str]) -> dict[str, Any]:
    given: Mapping[str, Any] = config.get(field) or {}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"{field}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    return dict(given)
