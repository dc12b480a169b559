"""Combine several adapters of one base into one, and make a LoRA of another rank or of any change of weights.

`combine` is PEFT's `add_weighted_adapter`, for LoRA and IA3. The operators follow PEFT's `utils/merge_utils.py` and
`tuners/lora/model.py`: TIES (Yadav et al. 2023, arXiv:2306.01708), DARE (Yu et al. 2023, arXiv:2311.03099), magnitude
pruning, and weighted sums. They work on pairs of matrices, module by module, for adapters of a model and for PEFT's
tensors.

`resize_rank` changes the rank of a LoRA, and `to_lora` approximates any change of weights by a plain LoRA, each with
the error that it costs. The plain LoRA of a method that computes the factors of its change, such as VeRA or LoHa, is
exact.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp

from jaxadapt.adapters.adapter import Adapter, Sites
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.adapters.sites import sites_of
from jaxadapt.arrays import regions
from jaxadapt.arrays.tensor_source import float_dtype
from jaxadapt.configs import lora, matching
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, KeyMapError, MismatchError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.merging import base_merge, factors
from jaxadapt.merging.pairs import Pair, module_name
from jaxadapt.methods.base import METHODS, Array, at_least_float32
from jaxadapt.models import planning
from jaxadapt.models.carriers import base_params

# ---------------------------------------------------------------- operators


class _Options(NamedTuple):
    """The options of `combine` that a compiled program depends on: the rank is that of the result for each method."""

    method: str
    svd_rank: Any
    density: Any
    majority_sign_method: str


def _combine_matrices(static: tuple[_Options, tuple[float, ...], Any], tree: Any) -> tuple[Array, Array]:
    """Return A (r, in) and B (out, r) of one matrix, or of each expert's, from those of each adapter.

    Args:
        static: the options and the scales; the third value only keeps programs apart.
        tree: the As, the Bs, the weights, and of DARE for each adapter its key, its masks of A and B, or twice the mask
            of its weight change; None for other methods.
    """
    options, scales, _ = static
    a, b, weights, noise = tree
    masks = noise and [
        each if isinstance(each, tuple) else _draw_masks(options, x, y, each)
        for x, y, each in zip(a, b, noise, strict=True)
    ]
    if a[0].ndim == 3:  # one by one: a weight change is as large as its weight
        return jax.lax.map(lambda each: _combine_matrices(static, (each[0], each[1], weights, each[2])), (a, b, masks))
    mask_a, mask_b = zip(*masks, strict=True) if masks else (None, None)
    scaled_weights = [w * s for w, s in zip(weights, scales, strict=True)]
    r = options.svd_rank
    if options.method == "cat":
        # PEFT puts the weight and the scale on A.
        scaled = [x * s for x, s in zip(a, scaled_weights, strict=True)]
        return factors.pad_rank(jnp.concatenate(scaled), jnp.concatenate(b, 1), r)
    if options.method == "svd":
        scaled = [x * s for x, s in zip(b, scaled_weights, strict=True)]
        return factors.truncate_svd(*factors.product_svd(jnp.concatenate(scaled, 1), jnp.concatenate(a)), r)
    if options.method.endswith("_svd"):
        changes = [s * (y @ x) for s, x, y in zip(scales, a, b, strict=True)]
        return factors.truncate_svd(*factors.svd(_combine_tensors(options, changes, weights, mask_a)), r)
    roots = [jnp.sqrt(jnp.abs(s)) for s in scaled_weights]
    # The sign is on A only.
    signed = jnp.stack([root * jnp.where(s >= 0, 1, -1) for root, s in zip(roots, scaled_weights, strict=True)])
    return factors.pad_rank(
        _combine_tensors(options, a, signed, mask_a), _combine_tensors(options, b, jnp.stack(roots), mask_b), r
    )


def _combine_tensors(
    options: _Options, of_adapters: Sequence[Array], weights: Array, masks: Sequence[Array] | None
) -> Array:
    """Combine the adapters' matrices of one module into one."""
    tensors = jnp.stack(of_adapters)
    broadcast_weights = weights.reshape(-1, 1, 1)
    if masks is not None:  # DARE: the kept values are scaled up for the dropped ones
        tensors = tensors * jnp.stack(masks).astype(tensors.dtype) / options.density
    elif options.density < 1:
        tensors = jnp.stack([_keep_largest(tensor, int(options.density * tensor.size)) for tensor in tensors])
    if "ties" not in options.method:
        return jnp.sum(tensors * broadcast_weights, 0)
    # Signs are elected and agreement is counted without the weights, so a negative weight does not change a vote.
    votes = tensors if options.majority_sign_method == "total" else jnp.sign(tensors)
    agree = jnp.sign(tensors) == jnp.where(jnp.sum(votes, 0, keepdims=True) >= 0, 1, -1)
    return jnp.sum(tensors * broadcast_weights * agree, 0) / jnp.maximum(jnp.sum(agree, 0), 1)


def _keep_largest(tensor: Array, k: int) -> Array:
    """Keep the k values of largest magnitude and set the rest to zero; of equal values the first are kept."""
    flat = tensor.reshape(-1)
    indices = jnp.argsort(-jnp.abs(flat), stable=True)[:k]
    return jnp.zeros_like(flat).at[indices].set(flat[indices]).reshape(tensor.shape)


# ---------------------------------------------------------------- combination


OPERATORS = (
    "svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
_PRUNING = ("ties", "dare", "magnitude")
_SIGNS = ("total", "frequency")


def combine(
    adapters: Sequence[factors.Plain],
    weights: Sequence[Any],
    *,
    method: str = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    key: Any = None,
    masks: Sequence[Mapping[str, Any]] | None = None,
) -> factors.Plain:
    """Combine several LoRA adapters of one base into one, as PEFT's `add_weighted_adapter` does.

    For adapters of IA3 the only method is "linear", the weighted sum of their vectors, and all adapt the same modules
    and have no full copies (`modules_to_save`).
    (PEFT takes zeros for the vectors of a module that an adapter leaves alone, which would remove its outputs.)

    Args:
        adapters: plain LoRA adapters, each with its own rank, targets and scale; or adapters of IA3.
        weights: one number for each, negative ones too; under jit they may be traced.
        method: "cat" and "svd" sum the weight changes: exactly with the ranks added up, or as the best sum of rank
            `svd_rank`. "linear", "ties", "dare_linear", "dare_ties" and "magnitude_prune" work on A and on B
            separately, with ±√|weight·scale|, which is fast but approximate; with "_svd" they work on the weight
            changes.
        svd_rank: the rank of the result of "svd" and "…_svd"; by default the largest of the adapters' ranks.
        density: the share of values that pruning keeps, 0 to 1; needed by "ties…", "dare…", "magnitude_prune…".
        majority_sign_method: TIES elects signs by "total" value or by "frequency".
        key: DARE's random key.
        masks: DARE's masks instead of `key`, one tree for each adapter: shaped as its `params`, or for "dare…_svd" with
            one mask (of the base weight's shape) in place of each adapted leaf.

    Leaves that are one matrix in PyTorch are joined: queries, keys and values that share one A, as in PEFT's files. The
    result has scale 1 (`lora_alpha = r`, no patterns, `use_rslora=False`), float32 arithmetic, the adapters' dtype, and
    the union of their targets.

    Deliberate differences from PEFT: PEFT keeps the first adapter's `use_rslora`, which scales the result by √r. It
    uses the first's `exclude_modules` and `layers_to_transform` for all, and drops the modules they leave out. With
    one adapter it ignores the method. PEFT's `svd_clamp` is not supported, since its result depends on the free signs
    of an SVD.

    Raises `ConfigError` for arguments or adapters that cannot be combined, `KeyMapError` or `MismatchError` for
    adapters of different models; each lists all problems of its kind.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> one, two = (jaxadapt.init(base, config, key=jax.random.key(i)) for i in (0, 1))
    >>> both = combine([one, two], [0.7, -0.3], method="cat")
    >>> both.config.r, both.params["q"]["kernel"]["lora_A"].shape
    (4, (4, 4))
    """
    adapters, weights = list(adapters), list(weights)
    options = _Options(method, svd_rank, density, majority_sign_method)
    _check_arguments(adapters, weights, options, key, masks)
    configs: list[Any] = [adapter.config for adapter in adapters]
    first = adapters[0]
    if summed_type(configs) is not None:
        summed = _sum_tensors([a.flat() if isinstance(a, Adapter) else a.tensors for a in adapters], weights, method)
        return dataclasses.replace(
            first, **({"params": paths.unflatten(summed)} if isinstance(first, Adapter) else {"tensors": summed})
        )
    adapters = list(map(factors.normalize, adapters))
    by_adapter = [factors.pairs_of(adapter, f"adapter {i}") for i, adapter in enumerate(adapters)]
    _check_sizes(by_adapter, method)
    ranks = [config.largest_rank for config in configs]
    r = sum(ranks) if method == "cat" else int(svd_rank or max(ranks))
    given_masks = (
        None
        if masks is None
        else [
            _given_masks(adapter, pairs, own_masks, i, method)
            for i, (adapter, pairs, own_masks) in enumerate(zip(adapters, by_adapter, masks, strict=True))
        ]
    )
    options = options._replace(svd_rank=r, density=1.0 if density is None else float(density))
    combined = _combine_pairs(by_adapter, weights, options, key, given_masks)
    return factors.build(combined, _combined_config(configs, r, combined), adapters, "combine")


def _combine_pairs(
    adapters: Sequence[Mapping[str, Pair]],
    weights: Sequence[Any],
    options: _Options,
    key: Any,
    masks: Sequence[Mapping[str, Pair]] | None,
) -> dict[str, Pair]:
    """Return the combined pairs of `{module: pair}` of each adapter, with scale 1.

    Args:
        options: hashable.
        key, masks: DARE's; the masks are pairs of masks, or have the mask of the weight change for both factors.
    """
    elementwise = options.method in ("cat", "linear")  # joining the parts of one matrix makes no difference
    each_alone = {name: [name] for pairs in adapters for name in pairs}
    parts_of = each_alone if elementwise else factors.find_parts(adapters)
    whole = [factors.join_parts(pairs, parts_of) for pairs in adapters]
    whole_masks = None if masks is None else [factors.join_parts(own, parts_of) for own in masks]
    _check_rank(options.svd_rank, [] if elementwise else [pair.sizes for pairs in whole for pair in pairs.values()])
    items: dict[str, Any] = {}
    first: dict[str, Pair] = {}
    for matrix in parts_of:
        having = {i: pairs[matrix] for i, pairs in enumerate(whole) if matrix in pairs}
        noise: Any = (
            None if whole_masks is None else [(whole_masks[i][matrix].a, whole_masks[i][matrix].b) for i in having]
        )
        if key is not None:
            matrix_key = jax.random.fold_in(key, zlib.crc32(matrix.encode()))
            noise = [jax.random.fold_in(matrix_key, i) for i in having]
        scales, a, b = zip(*((pair.scale, pair.a, pair.b) for pair in having.values()), strict=True)
        shares = jnp.stack([jnp.asarray(weights[i], jnp.float32) for i in having])
        # The caller's masks may be as large as the weights. The name keeps their programs apart, so none are stacked.
        static = options, scales, None if whole_masks is None else matrix
        items[matrix] = static, (a, b, shares, noise)
        first[matrix] = next(iter(having.values()))
    with jax.default_matmul_precision("highest"):
        combined = factors.map_equal(_combine_matrices, items)
    new = {matrix: dataclasses.replace(first[matrix], a=a, b=b, scale=1.0) for matrix, (a, b) in combined.items()}
    return factors.split_parts(new, parts_of)


def summed_type(configs: Iterable[Config]) -> str | None:
    """Return the type of adapters that PEFT combines by the weighted sum of their tensors; None for other adapters."""
    types = {config.peft_type for config in configs}
    peft_type = types.pop() if len(types) == 1 else ""
    return peft_type if peft_type in METHODS and METHODS[peft_type].sums else None


def _sum_tensors(tensors: Sequence[Mapping[str, Array]], weights: Sequence[Any], method: str) -> dict[str, Array]:
    """Return the weighted sum of the tensors of several adapters, which all have the same ones, in their dtype.

    Raises `ConfigError` for another method than "linear", `MismatchError` for tensors that differ.
    """
    if method != "linear":
        raise ConfigError(f"method {method!r} is for LoRA adapters; use method='linear' for the sum of vectors")
    shapes = [{name: tuple(x.shape) for name, x in each.items()} for each in tensors]
    names = sorted({name for each in shapes for name in each})
    raise_listed(
        MismatchError,
        "cannot combine these adapters, because they do not adapt the same modules:",
        [
            f"{name}: " + ", ".join(f"{each.get(name, 'none')} in adapter {i}" for i, each in enumerate(shapes))
            for name in names
            if len({each.get(name) for each in shapes}) > 1
        ],
    )
    summed: dict[str, Array] = {}
    for name in names:
        terms = [w * at_least_float32(each[name]) for w, each in zip(weights, tensors, strict=True)]
        summed[name] = sum(terms, jnp.zeros(())).astype(tensors[0][name].dtype)
    return summed


# ---------------------------------------------------------------- checks


def _check_arguments(
    adapters: Sequence[Any], weights: Sequence[Any], options: _Options, key: Any, masks: Sequence[Any] | None
) -> None:
    """Raise one `ConfigError` that lists all invalid arguments and adapters."""
    problems = _argument_problems(options, key, masks, len(weights), len(adapters))
    problems += [
        f"weights: expected finite numbers, found {w!r}"
        for w in weights
        if isinstance(w, str) or (isinstance(w, numbers.Real) and not math.isfinite(w))
    ]
    known = {i: each.config for i, each in enumerate(adapters) if isinstance(each, Adapter | PeftTensors)}
    is_summed = summed_type(known.values()) is not None
    for i, adapter in enumerate(adapters):
        if i not in known:
            problems.append(
                f"adapter {i}: expected an Adapter (jaxadapt.extract takes one out), found {type(adapter).__name__}"
            )
        else:
            label = adapter.source if isinstance(adapter, PeftTensors) else f"adapter {i}"
            copies = [f"{name}={value!r}" for name, value in lora.fields_set(known[i], "copy").items()]
            reasons = copies if is_summed else lora.reasons_not_a_product(known[i])
            problems += [f"{label}: {reason}" for reason in reasons]
            if lora.changes_base(known[i]):
                problems.append(f"{label}: {lora.init_field(known[i])}: its base differs from the others'")
    raise_listed(ConfigError, "cannot combine these adapters:", problems, limit=16)


def _argument_problems(options: _Options, key: Any, masks: Sequence[Any] | None, weights: int, count: int) -> list[str]:
    """Return the problems of the options, and of the numbers of weights and of adapters."""
    method, svd_rank, density, signs = options
    is_svd, prunes = method.endswith("svd"), method.startswith(_PRUNING)
    is_density = isinstance(density, numbers.Real) and 0 <= float(density) <= 1
    is_rank = svd_rank is None or (isinstance(svd_rank, numbers.Integral) and int(svd_rank) > 0)
    trees = count if masks is None else len(masks)
    dare_rules = (
        (density == 0, "density: DARE divides by it, so it cannot be 0"),
        ((key is None) == (masks is None), f"method {method!r} needs key= (a JAX random key) or masks=, and not both"),
        (trees != count, f"masks: expected one tree for each of the {count} adapters, found {trees}"),
    )
    useless = f"key and masks are for DARE; they have no effect with method {method!r}"
    rules = (
        (method not in OPERATORS, f"method: expected one of {', '.join(OPERATORS)}, found {method!r}"),
        (svd_rank is not None and not is_svd, f"svd_rank={svd_rank!r}: has no effect with method {method!r}"),
        (is_svd and not is_rank, f"svd_rank: expected a positive integer, found {svd_rank!r}"),
        (
            prunes and not is_density,
            f"density: method {method!r} needs a number from 0 to 1, found {density!r}",
        ),
        (not prunes and density is not None, f"density={density!r}: has no effect with method {method!r}"),
        (signs not in _SIGNS, f"majority_sign_method: expected 'total' or 'frequency', found {signs!r}"),
        (
            signs == "frequency" and "ties" not in method,
            f"majority_sign_method={signs!r}: has no effect with method {method!r}",
        ),
        *(dare_rules if method.startswith("dare") else [(not (key is None and masks is None), useless)]),
        (count == 0, "adapters: expected at least one"),
        (weights != count, f"weights: expected one for each of the {count} adapters, found {weights}"),
    )
    return [problem for applies, problem in rules if applies]


def _check_sizes(adapters: Sequence[Mapping[str, Pair]], method: str) -> None:
    """Raise an error if the adapters differ in a weight's sizes, or in its rank for methods on A and B separately."""
    problems: list[str] = []
    ranks: list[str] = []
    for name in dict.fromkeys(name for pairs in adapters for name in pairs):
        having = {i: pairs[name] for i, pairs in enumerate(adapters) if name in pairs}
        sizes = {pair.sizes for pair in having.values()}
        if len(sizes) > 1:
            problems.append(f"{name}: sizes (in, out) " + " and ".join(str(list(size)) for size in sorted(sizes)))
        if len({pair.rank for pair in having.values()}) > 1:
            ranks.append(f"{name}: " + ", ".join(f"{pair.rank} in adapter {i}" for i, pair in having.items()))
    raise_listed(
        MismatchError,
        "cannot combine adapters of models of different sizes; convert each for one model with"
        " from_peft(to_peft(adapter), model):",
        problems,
    )
    raise_listed(
        ConfigError,
        f"method {method!r} works on A and B separately, so a weight must have one rank in all adapters:",
        [] if method == "cat" or method.endswith("svd") else ranks,
        '\nUse "cat", "svd" or an "…_svd" method, or bring them to one rank with jaxadapt.merging.resize_rank',
    )


def _combined_config(configs: Sequence[Any], r: int, names: Iterable[str]) -> lora.LoraConfig:
    """Return the first configuration with scale 1 and the union of the targets, in PEFT's form where that is exact.

    Args:
        names: the modules and parameters of all adapters.
    """
    modules = {module_name(name) for name in names}
    parameters = {name for name in modules if any(matching.is_parameter(config, name) for config in configs)}
    modules -= parameters
    first: lora.LoraConfig = configs[0].with_scale_one(r).with_default_init()
    if parameters:
        names = sorted({name for config in configs for name in config.target_parameters or ()})
        first = first.replace(target_parameters=names)
    narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
    equal_fields = all(config.get(name) == first.get(name) for config in configs for name in narrowing)
    union = _union([config.target_modules for config in configs]) if equal_fields else None
    config = first.replace(target_modules=sorted(modules) if union is None else union)
    if union is not None and all(matching.is_target(config, module) for module in modules):
        return config
    return first.replace(target_modules=sorted(modules), **dict.fromkeys(narrowing))


def _union(targets: Sequence[Any]) -> Any:
    """Return targets that select what any of several does; None if one of them would change its meaning."""
    if all(isinstance(target, tuple) for target in targets):
        return sorted({name for names in targets for name in names})
    if not all(isinstance(target, str) for target in targets):
        return None
    first, *others = dict.fromkeys(targets)
    if others and any(re.search(r"\\[1-9]|\(\?[aiLmsuxP]", expression) for expression in targets):
        return None  # group numbers shift, flags and group names clash
    return "|".join(f"({expression})" for expression in (first, *others)) if others else first


# ---------------------------------------------------------------- masks


def _draw_masks(options: _Options, a: Array, b: Array, key: Any) -> tuple[Array, Array]:
    """Return DARE's masks of A and B of one matrix, or twice the mask of its weight change."""
    if options.method.endswith("svd"):
        mask = jax.random.bernoulli(key, options.density, (*b.shape[:-1], a.shape[-1]))
        return mask, mask
    key_a, key_b = jax.random.split(key)
    return (
        jax.random.bernoulli(key_a, options.density, a.shape),
        jax.random.bernoulli(key_b, options.density, b.shape),
    )


def _given_masks(
    adapter: factors.Plain, pairs: Mapping[str, Pair], masks: Mapping[str, Any], i: int, method: str
) -> dict[str, Pair]:
    """Return the caller's masks by module, as `_combine_pairs` takes them.

    Raises `MismatchError` if they are missing or have other shapes.
    """
    assert isinstance(adapter, Adapter)
    sites = sites_of(adapter)
    of_changes = method.endswith("svd")
    raise_listed(
        ConfigError,
        "masks of weight changes are for linear layers and embeddings; leave these out, or pass key=:",
        [site.leaf for site in sites if of_changes and not factors.has_one_pair(site)],
    )
    shapes = {path: x.shape for path, x in adapter.flat().items()}
    flat, expected = paths.flatten(masks), [site.leaf for site in sites] if of_changes else list(shapes)
    missing = [path for path in expected if path not in flat]
    if missing:
        raise MismatchError(f"masks[{i}]: expected a mask at {', '.join(missing)}, found {paths.bullets(flat)}")
    own = {path: jnp.asarray(flat[path], jnp.float32) for path in expected}
    wrong = [path for path, x in own.items() if x.shape != shapes.get(path, x.shape)]
    chosen: dict[str, Pair] = {}
    try:
        if of_changes:
            changes = (factors.site_weights(adapter.keymap, site, own[site.leaf]) for site in sites)
            chosen = {name: Pair(x, x, 1.0) for each in changes for name, x in each.items()}
            wrong += [name for name, pair in chosen.items() if pair.a.shape != pairs[name].sizes[::-1]]
        elif not wrong:
            chosen = factors.site_pairs(adapter.config, sites, own)
    except (ValueError, TypeError, KeyMapError, MismatchError) as error:
        raise MismatchError(f"masks[{i}]: its shape differs from that of the masked tensor ({error})") from error
    raise_listed(MismatchError, f"masks[{i}]: its shape differs from that of the masked tensor at:", wrong)
    # A keymap's factor is for values.
    return {name: dataclasses.replace(pair, a=pair.a != 0, b=pair.b != 0) for name, pair in chosen.items()}


# ---------------------------------------------------------------- rank reduction


class Reduced(NamedTuple, Generic[factors.Plain]):
    """A plain LoRA adapter, and the error of its approximation.

    Attributes:
        adapter: an adapter with one rank r and scale 1 (`lora_alpha = r`, no patterns, no rsLoRA).
        error: `{PyTorch module: ‖ΔW − ΔW'‖ / ‖ΔW‖}` in the Frobenius norm; 0 for an exact result.
    """

    adapter: factors.Plain
    error: dict[str, Any]


def resize_rank(adapter: factors.Plain, r: int, *, key: Any = None) -> Reduced[factors.Plain]:
    """Return a LoRA adapter with rank r for every module, its scales multiplied into B.

    A smaller rank keeps the best approximation of ΔW = s·B·A: its SVD, with B = U·S and A = Vh. ΔW is never formed; the
    SVD comes from QR of the factors. A larger rank pads with zeros and changes nothing. If `r` is the adapter's largest
    rank, the result is the same adapter in the form for readers without patterns and rsLoRA (llama.cpp, TGI, sglang).

    Args:
        key: a JAX random key. If given, new rows of A are drawn as those of a new adapter, so that they can be trained.
            ΔW stays the same, since their columns of B are zero.

    Raises `ConfigError` for an adapter that is not a plain LoRA (`to_lora` makes one), or whose initialization changed
    the base (PiSSA, OLoRA, …), and for an `r` whose A and B would be much larger than the adapted weights.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> adapter = jaxadapt.init(base, jaxadapt.LoraConfig(r=3, target_modules=["q"]), key=jax.random.key(0))
    >>> smaller, error = resize_rank(adapter, 2)
    >>> smaller.config.r, smaller.params["q"]["kernel"]["lora_B"].shape, error
    (2, (6, 2), {'q': 0.0})
    """
    adapter = factors.normalize(adapter)
    pairs = factors.pairs_of(adapter)
    config: Any = adapter.config
    raise_listed(
        ConfigError,
        "cannot change the rank of an adapter whose initialization changed the base: a load takes the part of this rank"
        " and scale out of the base, and of others another part. Convert it to a plain LoRA first"
        " (jaxadapt.initializers.for_original_base):",
        [lora.init_field(config)] if lora.changes_base(config) else [],
    )
    parts_of = factors.find_parts([pairs])
    whole = factors.join_parts(pairs, parts_of)
    _check_rank(r, [pair.sizes for pair in whole.values()])
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
    plain = config.with_scale_one(r).with_default_init()
    return Reduced(factors.build(factors.split_parts(resized, parts_of), plain, [adapter], "resize_rank"), errors)


def _resize_pair(static: tuple[int, float], tree: tuple[Array, Array, Any]) -> tuple[Array, Array, Array]:
    """Return A, B with the scale in it, and the error of a pair at another rank, with new rows of A from a key."""
    r, scale = static
    a, b, key = tree
    b = b * scale
    rank = a.shape[-2]
    if rank > r:
        u, s, vh = factors.product_svd(b, a)
        return *factors.truncate_svd(u, s, vh, r), factors.truncation_error(s, r)
    a, b = factors.pad_rank(a, b, r)
    if key is not None:  # new rows of A are drawn as for a new adapter
        limit = 1 / math.sqrt(a.shape[-1])
        drawn = jax.random.uniform(key, a[..., rank:, :].shape, jnp.float32, -limit, limit)
        a = a.at[..., rank:, :].set(drawn)
    return a, b, jnp.zeros(a.shape[:-2])


def to_lora(
    source: Any,
    r: int | None = None,
    *,
    params: Any = None,
    target_modules: Any = "all-linear",
    keymap: KeyMap | str | None = None,
    dtype: Any = None,
) -> Reduced[Adapter]:
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

    Raises `ConfigError` or `AttachError` if no LoRA expresses the change (IA3 scales biases too) or the adapter's
    initialization changed the base, `MismatchError` for trees that do not fit.

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
    raise_listed(
        ConfigError,
        "to_lora: the initialization of this adapter changed the base, and the change from there is not one of the"
        " original base. Merge the adapter into the changed base, and pass (original, merged):",
        [lora.init_field(adapter.config)] if lora.changes_base(adapter.config) else [],
    )
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


def _cast(reduced: Reduced[Adapter], dtype: Any) -> Reduced[Adapter]:
    return Reduced(regions.cast_tree(reduced.adapter, dtype, "to_lora"), reduced.error)


def _check_rank(r: Any, sizes: Sequence[tuple[int, int]]) -> None:
    """Raise `ConfigError` for a rank that is no positive integer, or whose A and B would fill the memory.

    They may have four times as many values as the adapted matrices, whose sizes are given, or 2**24.
    """
    if isinstance(r, bool) or not isinstance(r, numbers.Integral) or r < 1:
        raise ConfigError(f"r: expected a positive integer, found {r!r}")
    if int(r) > (limit := max(2**24, 4 * sum(x * y for x, y in sizes)) // (sum(map(sum, sizes)) or 1)):
        raise ConfigError(
            f"rank: expected at most {limit}, found {r}; no change of these weights has a rank above"
            f" {max(map(min, sizes), default=0)}, and more would only add zeros"
        )


def _error_by_module(modules: Sequence[str], values: Array) -> dict[str, Any]:
    """Return `{module: value}`, with Python floats unless traced."""
    return dict(zip(modules, values if regions.is_traced(values) else values.tolist(), strict=True))


def _flat_params(params: Any) -> dict[str, Any]:
    """Return base parameters by path, in float32 at least, from any container."""
    return {path: at_least_float32(jnp.asarray(x)) for path, x in base_params(params).leaves.items()}


def _is_equal(x: Array, y: Array) -> bool:
    """Return True if two arrays are equal; False for traced ones."""
    return not regions.is_traced(x) and bool(jnp.array_equal(x, y))


def _flat_pair(source: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the two flat trees; raise `MismatchError` if they are of different models."""
    if not isinstance(source, tuple | list) or len(source) != 2:
        raise AttachError(f"to_lora: expected an Adapter or a pair (base, tuned), found {type(source).__name__}")
    base, tuned = (_flat_params(tree) for tree in source)
    raise_listed(
        MismatchError,
        "to_lora: the two trees are of different models; the second one differs at:",
        map(str, paths.compare(paths.shapes_of(base), paths.shapes_of(tuned))),
    )
    return base, tuned


def _from_change(
    base: Mapping[str, Any],
    tuned: Mapping[str, Any],
    config: Config,
    keymap: KeyMap,
    sites: Any,
    r: int,
) -> Reduced[Adapter]:
    """Return the adapter and its errors, from the difference of two flat trees."""
    raise_listed(
        ConfigError,
        "to_lora: expected one pair of matrices A and B for each module, which convolutions, experts and modules"
        " of several parameters (attention layers, joined projections) do not have; leave these out of target_modules:",
        [site.leaf for site in sites if not factors.has_one_pair(site)],
    )
    _check_rank(r, [factors.matrix_sizes(site) for site in sites])
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
