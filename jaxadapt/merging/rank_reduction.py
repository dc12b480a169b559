"""Another rank for a LoRA adapter, and a plain LoRA out of anything that changes weights, with the error it costs."""

from __future__ import annotations

import math
import numbers
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxadapt import methods
from jaxadapt.adapters import selection, sites
from jaxadapt.adapters.adapter import Adapter
from jaxadapt.configs import Config, LoraConfig, lora_variants, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, MismatchError
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.merging import base_merge, factors
from jaxadapt.merging.factors import FactorRows
from jaxadapt.merging.joint import joint_matrices
from jaxadapt.models import planning

Array = Any


class Reduced(NamedTuple):
    """A plain LoRA adapter, and what it leaves out.

    Attributes:
        adapter: of one rank r and scale 1 (`lora_alpha = r`, no patterns, no rsLoRA).
        error: `{PyTorch module: ‖ΔW − ΔW'‖ / ‖ΔW‖}` in the Frobenius norm; 0 where nothing was lost.
    """

    adapter: Adapter
    error: dict[str, Any]


def resize_rank(adapter: Adapter, r: int, *, key: Any = None) -> Reduced:
    """A LoRA adapter of rank r for every module, its scales multiplied into B.

    A smaller rank keeps the best approximation of ΔW = s·B·A (its SVD, found by QR of the factors: ΔW is never
    formed), as B = U·S and A = Vh. A larger one pads with zeros and changes nothing. With `r` the largest rank the
    adapter has, the result is the same adapter in the form that readers without patterns and rsLoRA understand
    (llama.cpp, TGI, sglang).

    Args:
        key: a JAX random key. New rows of A are then drawn as a fresh adapter's are, so that they can be trained; ΔW is
            the same, as their columns of B are zero.

    Raises `ConfigError` for what is no plain LoRA (`to_lora` makes one).

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(jaxadapt.LoraConfig(r=3, target_modules=["q"]), base, key=jax.random.key(0))
    >>> smaller, error = resize_rank(adapter, 2)
    >>> smaller.config.r, smaller.params["q"]["kernel"]["lora_B"].shape, error
    (2, (6, 2), {'q': 0.0})
    """
    _need_rank(r)
    held = factors.lora_factors(adapter)
    new: dict[str, FactorRows] = {}
    error: dict[str, Any] = {}
    with jax.default_matmul_precision("highest"):
        for whole in joint_matrices([held]):
            pair = whole.factors(held)
            b = pair.b * pair.scale
            if pair.rank <= r:
                a, b = factors.pad_rank(pair.a, b, r)
                if key is not None:
                    mine = jax.random.fold_in(key, zlib.crc32(min(whole.leaves).encode()))  # whatever their order
                    a = a.at[:, pair.rank :].set(_drawn(mine, a[:, pair.rank :].shape))
                lost = jnp.zeros(len(pair.modules))
            else:
                u, s, vh = factors.product_svd(b, pair.a)
                (a, b), lost = factors.truncate_svd(u, s, vh, r), factors.truncation_error(s, r)
            new |= whole.split(FactorRows(pair.modules, a, b), held)
            error |= _by_module(pair.modules, adapter.keymap, lost)
    config: Any = adapter.config.replace(r=r, lora_alpha=r, rank_pattern={}, alpha_pattern={}, use_rslora=False)
    if not lora_variants.changes_base(config):
        config = config.replace(init_lora_weights=True, eva_config=None)  # it says how an adapter began: no more so
    dtype = jnp.result_type(*(x.dtype for x in adapter.flat().values()))
    return Reduced(factors.build_adapter(config, adapter.keymap, held, new, dtype), error)


def to_lora(
    source: Any,
    r: int | None = None,
    *,
    params: Any = None,
    target_modules: Any = "all-linear",
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
) -> Reduced:
    """A plain LoRA that changes the weights as `source` does, as well as rank r can.

    Args:
        source: an `Adapter` of any method that changes weights; or a pair `(base, tuned)` of parameter trees (or NNX
            models), whose difference becomes the adapter.
        r: the rank. For a LoRA adapter without it: the largest rank it has, which costs nothing.
        params: the base parameters (or NNX model), which methods other than plain LoRA need.
        target_modules, keymap: for a pair, which of its weights, under which table's names. Other weights that differ
            are in `error`, with 1.
        dtype: of the new adapter; float32 by default.

    Raises `ConfigError` or `AttachError` where no LoRA can say it (IA3 scales biases too), `MismatchError` for
    trees that do not fit.

    >>> import numpy as np, jaxadapt
    >>> base = {"q": {"kernel": np.zeros((4, 6), "float32")}}
    >>> tuned = {"q": {"kernel": np.outer(np.arange(4.0), np.ones(6)).astype("float32")}}
    >>> adapter, error = to_lora((base, tuned), 1)
    >>> bool(error["q"] < 1e-6), jaxadapt.merge(base, adapter)["q"]["kernel"][2].round(3).tolist()
    (True, [2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    """
    if isinstance(source, Adapter) and not lora_variants.reasons_not_a_product(source.config):
        held = factors.lora_factors(source)
        reduced = resize_rank(source, max(p.rank for p in held.values()) if r is None else r)
        return reduced if dtype is None else Reduced(_cast(reduced.adapter, dtype), reduced.error)
    if r is None:
        raise ConfigError("to_lora: r (the rank) is needed, since the change of the weights has none of its own")
    _need_rank(r)
    if isinstance(source, Adapter):
        if params is None:
            raise AttachError(
                f"to_lora: what {source.config.peft_type} changes depends on the base weights here; pass params=base"
            )
        base = _flat(params)
        config = _like(source.config, r)
        tuned = _merged(base, source)
        table = source.keymap
        bounds = sites.sites_of(source)
        copies = [b.leaf for b in bounds if b.method.copies]
        if copies:
            raise ConfigError(
                "the adapter holds full copies of these, which no LoRA can say:\n" + paths.bullets(copies)
            )
        modules = sorted({m for b in bounds for m in b.modules})
        if not all(matching.matches(config, m) for m in modules):
            config = config.replace(target_modules=modules, exclude_modules=None)
        bounds = selection.select_sites(config, table, {leaf: tuple(base[leaf].shape) for leaf in source.sites})
    else:
        base, tuned = _pair(source)
        config = LoraConfig(r=r, lora_alpha=r, target_modules=target_modules)
        recipe, bounds = planning.plan_adapter(planning.BaseParams.from_tree(paths.unflatten(base)), config, keymap)
        config, table = recipe.config, recipe.keymap
    return _from_change(base, tuned, config, table, bounds, r, jnp.float32 if dtype is None else dtype)


def _need_rank(r: Any) -> None:
    if isinstance(r, bool) or not isinstance(r, numbers.Integral) or r < 1:
        raise ConfigError(f"r: expected a positive integer, found {r!r}")


def _drawn(key: Any, shape: tuple[int, ...]) -> Array:
    bound = 1 / math.sqrt(shape[-1])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _by_module(stems: Any, keymap: KeyMap, values: Array) -> dict[str, Any]:
    found = values if isinstance(values, Tracer) else [float(v) for v in values]
    return {stem.removeprefix(keymap.prefix): value for stem, value in zip(stems, found, strict=True)}


def _cast(adapter: Adapter, dtype: Any) -> Adapter:
    return jax.tree.map(lambda x: x.astype(dtype), adapter)


def _flat(params: Any) -> dict[str, Any]:
    """Base parameters by path, in float32 at least, whatever holds them."""
    return {
        path: methods.at_least_float32(jnp.asarray(x))
        for path, x in planning.BaseParams.from_tree(params).leaves.items()
    }


def _like(config: Config, r: int) -> LoraConfig:
    """A plain LoRA configuration for the same modules of the same base."""
    same = ("task_type", "base_model_name_or_path", "revision", "target_modules", "exclude_modules", "auto_mapping")
    more = ("layers_to_transform", "layers_pattern", "fan_in_fan_out")
    given = {name: value for name in same + more if (value := config.get(name)) is not None}
    return LoraConfig(r=r, lora_alpha=r, **given)


def _merged(base: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    tuned = paths.flatten(base_merge.merge(paths.unflatten(base), adapter))
    other = [p for p, x in tuned.items() if p not in adapter.sites and x is not base[p] and not _equal(x, base[p])]
    if other:
        raise ConfigError(
            f"{adapter.config.peft_type} here changes more than weights, which a plain LoRA cannot say:\n"
            + paths.bullets(other)
        )
    return tuned


def _equal(x: Array, y: Array) -> bool:
    return not isinstance(x, Tracer) and bool(jnp.array_equal(x, y))


def _pair(source: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if not isinstance(source, tuple | list) or len(source) != 2:
        raise AttachError(f"to_lora: expected an Adapter or a pair (base, tuned), found {type(source).__name__}")
    base, tuned = (_flat(tree) for tree in source)
    shapes = [{path: x.shape for path, x in tree.items()} for tree in (base, tuned)]
    differ = [p for p in base.keys() | tuned.keys() if shapes[0].get(p) != shapes[1].get(p)]
    if differ:
        raise MismatchError("the two trees are not of one model; they differ at:\n" + paths.bullets(sorted(differ)))
    return base, tuned


def _from_change(
    base: Mapping[str, Any],
    tuned: Mapping[str, Any],
    config: Config,
    table: KeyMap,
    bounds: Any,
    r: int,
    dtype: Any,
) -> Reduced:
    out: dict[str, Any] = {}
    error: dict[str, Any] = {}
    with jax.default_matmul_precision("highest"):
        for bound in bounds:
            change = factors.weight_matrices(table, bound, tuned[bound.leaf] - base[bound.leaf])
            a, b, lost = _best(change, r)
            modules, leaves = factors.matrices_to_leaves(bound, a, b)
            out |= {path: x.astype(dtype) for path, x in leaves.items()}
            error |= _by_module(modules, table, lost)
    covered = {bound.leaf for bound in bounds}
    error |= {p: 1.0 for p in base if p not in covered and not _equal(tuned[p], base[p])}
    return Reduced(Adapter(config, paths.unflatten(out), table), error)


def _best(change: Array, r: int) -> tuple[Array, Array, Array]:
    def one(w: Array) -> tuple[Array, Array, Array]:
        u, s, vh = jnp.linalg.svd(w, full_matrices=False)
        return *factors.truncate_svd(u, s, vh, r), factors.truncation_error(s, r)

    return jax.lax.map(one, change)  # one layer after the other: an SVD needs a few weights' worth of memory
