"""Change the rank of a LoRA adapter, and approximate any change of weights by a plain LoRA, with the error it costs.

The plain LoRA of a method that computes the factors of its change, such as VeRA or LoHa, is exact.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxadapt.adapters.adapter import Adapter
from jaxadapt.adapters.site import Sites
from jaxadapt.adapters.sites import sites_of
from jaxadapt.arrays import finite
from jaxadapt.arrays.tensor_source import float_dtype
from jaxadapt.configs import lora
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, MismatchError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.merging import base_merge, factors
from jaxadapt.merging.pairs import Pair
from jaxadapt.methods.base import at_least_float32
from jaxadapt.models import planning
from jaxadapt.models.carriers import base_params

Array = Any
Shapes = Mapping[str, tuple[int, ...]]


# ---------------------------------------------------------------- rank reduction


class Reduced(NamedTuple):
    """A plain LoRA adapter, and the error of its approximation.

    Attributes:
        adapter: an adapter with one rank r and scale 1 (`lora_alpha = r`, no patterns, no rsLoRA).
        error: `{PyTorch module: ‖ΔW − ΔW'‖ / ‖ΔW‖}` in the Frobenius norm; 0 for an exact result.
    """

    adapter: Adapter
    error: dict[str, Any]


def resize_rank(adapter: Adapter, r: int, *, key: Any = None) -> Reduced:
    """Return a LoRA adapter with rank r for every module, its scales multiplied into B.

    A smaller rank keeps the best approximation of ΔW = s·B·A: its SVD, with B = U·S and A = Vh. ΔW is never formed; the
    SVD comes from QR of the factors. A larger rank pads with zeros and changes nothing. If `r` is the adapter's largest
    rank, the result is the same adapter in the form for readers without patterns and rsLoRA (llama.cpp, TGI, sglang).

    Args:
        key: a JAX random key. If given, new rows of A are drawn as those of a new adapter, so that they can be trained.
            ΔW stays the same, since their columns of B are zero.

    Raises `ConfigError` for an adapter that is not a plain LoRA (`to_lora` makes one).

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(base, jaxadapt.LoraConfig(r=3, target_modules=["q"]), key=jax.random.key(0))
    >>> smaller, error = resize_rank(adapter, 2)
    >>> smaller.config.r, smaller.params["q"]["kernel"]["lora_B"].shape, error
    (2, (6, 2), {'q': 0.0})
    """
    return Reduced(*resize_plain(adapter, r, key))


def resize_plain(adapter: factors.Plain, r: int, key: Any = None) -> tuple[factors.Plain, dict[str, Any]]:
    """Resize a plain LoRA as `resize_rank` does, in a model's layout or as PEFT's tensors; return the errors too."""
    _check_rank(r)
    adapter = factors.normalize(adapter)
    pairs = factors.pairs_of(adapter)
    parts_of = factors.find_parts([pairs])
    whole = factors.join_parts(pairs, parts_of)
    keys = {name: None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode())) for name in whole}
    items = {name: ((r, pair.scale), (pair.a, pair.b, keys[name])) for name, pair in whole.items()}
    resized: dict[str, Pair] = {}
    errors: dict[str, Any] = {}
    with jax.default_matmul_precision("highest"):
        computed = factors.map_equal(_resize_pair, items)
    for matrix, (a, b, error) in computed.items():
        resized[matrix] = dataclasses.replace(whole[matrix], a=a, b=b, scale=1.0)
        names = [matrix] if error.ndim == 0 else [f"{matrix}#{expert}" for expert in range(len(error))]
        errors |= _error_by_module(names, error.reshape(-1))
    config: Any = adapter.config
    config = config.with_scale_one(r) if lora.changes_base(config) else config.with_scale_one(r).with_default_init()
    return factors.build(factors.split_parts(resized, parts_of), config, [adapter], "resize_rank"), errors


def _resize_pair(static: tuple[int, float], tree: tuple[Array, Array, Any]) -> tuple[Array, Array, Array]:
    """Return A, B with the scale in it, and the error of a pair at another rank, with new rows of A from a key."""
    (r, scale), (a, b, key) = static, tree
    b, rank = b * scale, a.shape[-2]
    if rank > r:
        u, s, vh = factors.product_svd(b, a)
        return *factors.truncate_svd(u, s, vh, r), factors.truncation_error(s, r)
    a, b = factors.pad_rank(a, b, r)
    if key is not None:  # new rows of A are drawn as for a new adapter
        limit, shape = 1 / math.sqrt(a.shape[-1]), a[..., rank:, :].shape
        a = a.at[..., rank:, :].set(jax.random.uniform(key, shape, jnp.float32, -limit, limit))
    return a, b, jnp.zeros(a.shape[:-2])


def to_lora(
    source: Any,
    r: int | None = None,
    *,
    params: Any = None,
    target_modules: Any = "all-linear",
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
) -> Reduced:
    """Return a plain LoRA that approximates the weight change of `source` as well as rank r allows.

    Args:
        source: an `Adapter` of any method that changes weights; or a pair `(base, tuned)` of parameter trees (or NNX
            models), whose difference becomes the adapter.
        r: the rank. The default for a LoRA adapter is its largest rank, which loses nothing. So it is for a method that
            computes the factors of its change: r for VERA, PVERA, VBLORA, UNILORA and TINYLORA, r² for LOHA.
        params: the base parameters (or NNX model), needed for methods other than plain LoRA; shapes are enough for
            those that compute their factors.
        target_modules, keymap: for a pair, the weights to adapt, under the names of this keymap. Other weights that
            differ are in `error`, with 1.
        dtype: the dtype of the new adapter; float32 by default.

    Raises `ConfigError` or `AttachError` if no LoRA expresses the change (IA3 scales biases too), `MismatchError` for
    trees that do not fit.

    >>> import numpy as np, jaxadapt
    >>> base = {"q": {"kernel": np.zeros((4, 6), "float32")}}
    >>> tuned = {"q": {"kernel": np.outer(np.arange(4.0), np.ones(6)).astype("float32")}}
    >>> adapter, error = to_lora((base, tuned), 1)
    >>> bool(error["q"] < 1e-6), jaxadapt.merge(base, adapter)["q"]["kernel"][2].round(3).tolist()
    (True, [2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    """
    dtype = None if dtype is None else float_dtype(dtype)
    plain = _as_product(source, params) if isinstance(source, Adapter) else None
    if plain is not None:
        ranks = [pair.rank for pair in factors.pairs_of(plain).values()]
        reduced = resize_rank(plain, max(ranks) if r is None else r)
        return reduced if dtype is None else _cast(reduced, dtype)
    if r is None:
        raise ConfigError("to_lora: pass r (the rank); a change of weights has no rank of its own")
    _check_rank(r)
    if isinstance(source, Adapter):
        change = _change_by_adapter(source, params, r)
    else:
        base, tuned = _flat_pair(source)
        config = lora.LoraConfig(r=r, lora_alpha=r, target_modules=target_modules)
        recipe, sites = planning.plan_adapter(base_params(paths.unflatten(base)), config, keymap)
        change = base, tuned, recipe.config, recipe.keymap, sites
    return _cast(_from_change(*change, r), dtype or float_dtype("float32"))


def _as_product(adapter: Adapter, params: Any) -> Adapter | None:
    """Return an adapter as a plain LoRA that computes exactly the same; None if there is none."""
    if not lora.reasons_not_a_product(adapter.config):
        return adapter
    if params is None:
        raise AttachError(
            f"to_lora: the weight change of {adapter.config.peft_type} depends on the base weights here, or at least on"
            " their shapes; pass params=base"
        )
    return factors.low_rank_form(adapter, base_params(params).shapes)


def _change_by_adapter(
    adapter: Adapter, params: Any, r: int
) -> tuple[dict[str, Any], dict[str, Any], Config, KeyMap, Sites]:
    """Return the base, the merged parameters, and the configuration, the keymap and the sites of the new LoRA."""
    base, sites = _flat_params(params), sites_of(adapter)
    tuned = paths.flatten(base_merge.merge(paths.unflatten(base), adapter))
    raise_listed(
        ConfigError,
        f"to_lora: {adapter.config.peft_type} changes more than weights here, which no plain LoRA expresses:",
        [
            path
            for path, x in tuned.items()
            if path not in adapter.sites and x is not base[path] and not _is_equal(x, base[path])
        ],
    )
    raise_listed(
        ConfigError,
        "to_lora: the adapter holds full copies of these weights, which no LoRA expresses. Remove them from"
        " modules_to_save or bias:",
        [site.leaf for site in sites if site.method.copies],
    )
    config, sites = factors.plain_sites(adapter, sites, r, {leaf: tuple(x.shape) for leaf, x in base.items()})
    return base, tuned, config, adapter.keymap, sites


def _cast(reduced: Reduced, dtype: Any) -> Reduced:
    return Reduced(finite.cast_tree(reduced.adapter, dtype, "to_lora"), reduced.error)


def _check_rank(r: Any) -> None:
    """Raise `ConfigError` for a rank that is not a positive integer."""
    if isinstance(r, bool) or not isinstance(r, numbers.Integral) or r < 1:
        raise ConfigError(f"r: expected a positive integer, found {r!r}")


def _error_by_module(modules: Sequence[str], values: Array) -> dict[str, Any]:
    """Return `{module: value}`, with Python floats unless traced."""
    return dict(zip(modules, values if isinstance(values, Tracer) else values.tolist(), strict=True))


def _flat_params(params: Any) -> dict[str, Any]:
    """Return base parameters by path, in float32 at least, from any container."""
    return {path: at_least_float32(jnp.asarray(x)) for path, x in base_params(params).leaves.items()}


def _is_equal(x: Array, y: Array) -> bool:
    """Return True if two arrays are equal; False for traced ones."""
    return not isinstance(x, Tracer) and bool(jnp.array_equal(x, y))


def _flat_pair(source: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the two flat trees; raise `MismatchError` if they are of different models."""
    if not isinstance(source, tuple | list) or len(source) != 2:
        raise AttachError(f"to_lora: expected an Adapter or a pair (base, tuned), found {type(source).__name__}")
    base, tuned = (_flat_params(tree) for tree in source)
    shapes = [{path: x.shape for path, x in tree.items()} for tree in (base, tuned)]
    raise_listed(
        MismatchError,
        "to_lora: the two trees are of different models; their shapes differ at:",
        sorted([path for path in base.keys() | tuned.keys() if shapes[0].get(path) != shapes[1].get(path)]),
    )
    return base, tuned


def _from_change(
    base: Mapping[str, Any],
    tuned: Mapping[str, Any],
    config: Config,
    keymap: KeyMap,
    sites: Any,
    r: int,
) -> Reduced:
    """Return the adapter and its errors, from the difference of two flat trees."""
    raise_listed(
        ConfigError,
        "to_lora: expected one pair of matrices A and B for each module, which convolutions, experts and attention"
        " layers of several leaves do not have; leave these leaves out of target_modules:",
        [site.leaf for site in sites if not factors.has_one_pair(site)],
    )
    pairs: dict[str, Pair] = {}
    error: dict[str, Any] = {}
    with jax.default_matmul_precision("highest"):
        for site in sites:
            for module, w in factors.site_weights(keymap, site, tuned[site.leaf] - base[site.leaf]).items():
                u, s, vh = factors.svd(w)
                pairs[module] = Pair(*factors.truncate_svd(u, s, vh, r), 1.0)
                error |= _error_by_module([module], factors.truncation_error(s, r).reshape(1))
    covered = {site.leaf for site in sites}
    error |= {path: 1.0 for path in base if path not in covered and not _is_equal(tuned[path], base[path])}
    return Reduced(Adapter(config, paths.unflatten(factors.pair_leaves(sites, pairs)), keymap), error)
