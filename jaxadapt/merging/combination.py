"""Combine several adapters of one base into one, as PEFT's `add_weighted_adapter` does.

PEFT has it for LoRA and IA3. The operators follow PEFT's `utils/merge_utils.py` and `tuners/lora/model.py`: TIES (Yadav
et al. 2023, arXiv:2306.01708), DARE (Yu et al. 2023, arXiv:2311.03099), magnitude pruning, and weighted sums.

The operators that combine the factors of several LoRA adapters, leaf by leaf.

They follow PEFT's `utils/merge_utils.py`: TIES (Yadav et al. 2023, arXiv:2306.01708), DARE (Yu et al. 2023,
arXiv:2311.03099), magnitude pruning, and weighted sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt import methods
from jaxadapt.adapters.adapter import Adapter
from jaxadapt.configs import lora, matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, KeyMapError, MismatchError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.merging import factors
from jaxadapt.merging.factors import FactorRows, Factors, JointMatrix, joint_matrices
from jaxadapt.methods.base import at_least_float32

# ---------------------------------------------------------------- operators


Array = Any


@dataclasses.dataclass(frozen=True)
class Combination:
    """The static arguments of a combination. `total`: TIES votes by value, not by count."""

    method: str
    r: int
    density: float
    total: bool


def combine_leaf(
    factors_of: Mapping[int, Factors], weights: Sequence[Any], combination: Combination, noise: Any
) -> FactorRows:
    """Return the new matrices of one leaf, from the factors of the adapters (by index) that have it.

    Modules with the same adapters, ranks and scales are computed together.
    """
    groups: dict[tuple[tuple[int, int, float], ...], list[str]] = {}
    for module in dict.fromkeys(module for leaf_factors in factors_of.values() for module in leaf_factors.modules):
        present = {i: leaf_factors for i, leaf_factors in factors_of.items() if module in leaf_factors.modules}
        signature = tuple(
            (i, leaf_factors.rank_of(module), leaf_factors.scales_of([module])[0])
            for i, leaf_factors in present.items()
        )
        groups.setdefault(signature, []).append(module)
    rows: list[FactorRows] = []
    for signature, modules in groups.items():
        indices, ranks, scales = zip(*signature, strict=True)
        pairs = [factors_of[i] for i in indices]
        a = tuple(one_factors.rows_of("a", modules)[:, :r] for one_factors, r in zip(pairs, ranks, strict=True))
        b = tuple(one_factors.rows_of("b", modules)[:, :, :r] for one_factors, r in zip(pairs, ranks, strict=True))
        chosen_masks = [noise[i] for i in indices] if noise else None
        masks = chosen_masks and [
            tuple(one_factors.rows_at(mask, modules) for mask in mask_rows)
            for mask_rows, one_factors in zip(chosen_masks, pairs, strict=True)
        ]
        if masks and not combination.method.endswith("svd"):
            masks = [(mask_a[:, :r], mask_b[:, :, :r]) for (mask_a, mask_b), r in zip(masks, ranks, strict=True)]
        module_weights = jnp.stack([jnp.asarray(weights[i], jnp.float32) for i in indices])
        rows.append(FactorRows(tuple(modules), *_combine_modules(combination, scales, a, b, module_weights, masks)))
    return FactorRows.concatenate(rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _combine_modules(
    combination: Combination, scales: tuple[float, ...], a: Any, b: Any, weights: Array, masks: Any
) -> tuple[Array, Array]:
    """Return A (n, r, in) and B (n, out, r) of n modules, from those of each adapter."""
    scaled_weights = [w * s for w, s in zip(weights, scales, strict=True)]
    if combination.method == "cat":
        # PEFT puts the weight and the scale on A.
        scaled = [x * s for x, s in zip(a, scaled_weights, strict=True)]
        return factors.pad_rank(jnp.concatenate(scaled, 1), jnp.concatenate(b, 2), combination.r)
    if combination.method == "svd":
        stacked = jnp.concatenate([x * s for x, s in zip(b, scaled_weights, strict=True)], 2), jnp.concatenate(a, 1)
        u, s, vh = factors.product_svd(*stacked)
        return factors.truncate_svd(u, s, vh, combination.r)
    if combination.method.endswith("_svd"):

        def combine_module(row: Any) -> tuple[Array, Array]:
            a, b, masks = row
            deltas = jnp.stack([s * (y @ x) for s, x, y in zip(scales, a, b, strict=True)])
            mixed = _combine_tensors(
                combination, deltas, weights, None if masks is None else jnp.stack([m for (m,) in masks])
            )
            u, s, vh = factors.svd(mixed)
            return factors.truncate_svd(u, s, vh, combination.r)

        return jax.lax.map(combine_module, (a, b, masks))  # one by one: a change is as large as its weight
    roots = [jnp.sqrt(jnp.abs(s)) for s in scaled_weights]
    # The sign is on A only.
    signed_roots = jnp.stack([r * jnp.where(s >= 0, 1, -1) for r, s in zip(roots, scaled_weights, strict=True)])
    combined: list[Array] = []
    for side, tensors, side_weights in ((0, a, signed_roots), (1, b, jnp.stack(roots))):
        side_masks = None if masks is None else jnp.stack([m[side] for m in masks], 1)
        combined.append(
            jax.vmap(functools.partial(_combine_tensors, combination), (0, None, 0))(
                jnp.stack(tensors, 1), side_weights, side_masks
            )
        )
    return factors.pad_rank(combined[0], combined[1], combination.r)


def _combine_tensors(combination: Combination, tensors: Array, weights: Array, masks: Array | None) -> Array:
    """Combine the adapters' tensors (k, …) of one module into one."""
    broadcast_weights = weights.reshape((-1,) + (1,) * (tensors.ndim - 1))
    if masks is not None:  # DARE: the kept values are scaled up for the dropped ones
        tensors = tensors * masks.astype(tensors.dtype) / combination.density
    elif combination.density < 1:
        tensors = jnp.stack([_keep_largest(tensor, int(combination.density * tensor.size)) for tensor in tensors])
    if "ties" not in combination.method:
        return jnp.sum(tensors * broadcast_weights, 0)
    # Signs are elected and agreement is counted without the weights, so a negative weight does not change a vote.
    vote = jnp.sum(tensors if combination.total else jnp.sign(tensors), 0, keepdims=True)
    agree = jnp.sign(tensors) == jnp.where(vote >= 0, 1, -1)
    return jnp.sum(tensors * broadcast_weights * agree, 0) / jnp.maximum(jnp.sum(agree, 0), 1)


def _keep_largest(tensor: Array, k: int) -> Array:
    """Keep the k values of largest magnitude and set the rest to zero; of equal values the first are kept."""
    flat = tensor.reshape(-1)
    indices = jnp.argsort(-jnp.abs(flat), stable=True)[:k]
    return jnp.zeros_like(flat).at[indices].set(flat[indices]).reshape(tensor.shape)


# ---------------------------------------------------------------- combination


METHODS = (
    "svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
_SIGNS = ("total", "frequency")


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[Any],
    *,
    method: str = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    key: Any = None,
    masks: Sequence[Mapping[str, Any]] | None = None,
) -> Adapter:
    """Combine several LoRA adapters of one base into one, as PEFT's `add_weighted_adapter` does.

    For adapters of IA3 the only method is "linear", the weighted sum of their vectors, and all adapt the same modules.
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

    Leaves that are one matrix in PyTorch are joined (queries, keys and values that share one A, as in PEFT's files; see
    `joint`). The result has scale 1 (`lora_alpha = r`, no patterns, `use_rslora=False`), float32 arithmetic, the
    adapters' dtype, and the union of their targets.

    Deliberate differences from PEFT: PEFT keeps the first adapter's `use_rslora`, which scales the result by √r. It
    uses the first's `exclude_modules` and `layers_to_transform` for all, and drops the modules they leave out. With
    one adapter it ignores the method. PEFT's `svd_clamp` is not supported, since its result depends on the free signs
    of an SVD.

    Raises `ConfigError` for arguments or adapters that cannot be combined, `KeyMapError` or `MismatchError` for
    adapters of different models; each lists all problems of its kind.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> one, two = (jaxadapt.init(config, base, key=jax.random.key(i)) for i in (0, 1))
    >>> both = combine([one, two], [0.7, -0.3], method="cat")
    >>> both.config.r, both.params["q"]["kernel"]["lora_A"].shape
    (4, (4, 4))
    """
    adapters, weights = list(adapters), list(weights)
    _check_arguments(adapters, weights, method, svd_rank, density, majority_sign_method, key, masks)
    if summed_type(adapter.config for adapter in adapters) is not None:
        flat = [adapter.flat() for adapter in adapters]
        return dataclasses.replace(adapters[0], params=paths.unflatten(sum_tensors(flat, weights, method)))
    by_adapter = [factors.lora_factors(adapter, f"adapter {i}") for i, adapter in enumerate(adapters)]
    keymap = factors.common_keymap(
        (adapter.keymap for adapter in adapters), (leaf for by_leaf in by_adapter for leaf in by_leaf)
    )
    leaf_factors = {
        leaf: [by_leaf[leaf] for by_leaf in by_adapter if leaf in by_leaf] for by_leaf in by_adapter for leaf in by_leaf
    }
    _check_sizes(leaf_factors, by_adapter, method)
    configs: list[Any] = [adapter.config for adapter in adapters]
    ranks = [config.largest_rank for config in configs]
    r = sum(ranks) if method == "cat" else int(svd_rank) if svd_rank and method.endswith("svd") else max(ranks)

    combination = Combination(method, r, 1.0 if density is None else float(density), majority_sign_method == "total")
    rows: dict[str, FactorRows] = {}
    with jax.default_matmul_precision("highest"):
        first = {leaf: several_factors[0] for leaf, several_factors in leaf_factors.items()}
        elementwise = method in ("cat", "linear")  # joining the leaves of one matrix makes no difference
        for matrix in [JointMatrix((leaf,)) for leaf in leaf_factors] if elementwise else joint_matrices(by_adapter):
            present = {i: matrix.factors(by_leaf) for i, by_leaf in enumerate(by_adapter) if matrix.is_present(by_leaf)}
            svd = method.endswith("svd")
            noise = (
                _dare_masks(matrix, by_adapter, keymap, svd, float(density or 0), key, masks)
                if method.startswith("dare")
                else {}
            )
            rows |= matrix.split(combine_leaf(present, weights, combination, noise), first)
    named_modules = [
        (module, site_factors.site.method.on_parameters)
        for several_factors in leaf_factors.values()
        for site_factors in several_factors
        for module in site_factors.site.modules
    ]
    modules, parameters = (
        [module for module, is_parameter in dict.fromkeys(named_modules) if is_parameter == wanted]
        for wanted in (False, True)
    )
    config = _combined_config(configs, r, modules, parameters)
    dtype = jnp.result_type(*(x.dtype for adapter in adapters for x in adapter.flat().values()))
    return factors.build_adapter(config, keymap, first, rows, dtype)


def summed_type(configs: Iterable[Config]) -> str | None:
    """Return the type of adapters that PEFT combines by the weighted sum of their tensors; None for other adapters."""
    types = {config.peft_type for config in configs}
    peft_type = types.pop() if len(types) == 1 else ""
    return peft_type if peft_type in methods.METHODS and methods.METHODS[peft_type].sums else None


def sum_tensors(tensors: Sequence[Mapping[str, Array]], weights: Sequence[Any], method: str) -> dict[str, Array]:
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
        total: Any = sum(w * at_least_float32(each[name]) for w, each in zip(weights, tensors, strict=True))
        summed[name] = total.astype(tensors[0][name].dtype)
    return summed


# ---------------------------------------------------------------- checks


def _check_arguments(
    adapters: Sequence[Any],
    weights: Sequence[Any],
    method: str,
    svd_rank: Any,
    density: Any,
    signs: str,
    key: Any,
    masks: Any,
) -> None:
    """Raise one `ConfigError` that lists all invalid arguments and adapters."""
    prunes, is_dare = method.startswith(("ties", "dare", "magnitude")), method.startswith("dare")
    is_density = isinstance(density, numbers.Real) and 0 <= float(density) <= 1
    is_rank = isinstance(svd_rank, numbers.Integral) and int(svd_rank) > 0
    invalid = [w for w in weights if isinstance(w, str) or (isinstance(w, numbers.Real) and not math.isfinite(w))]
    count, has_noise = len(adapters), key is not None or masks is not None
    masks_found = count if masks is None else len(masks)
    rules = {
        "adapters: expected at least one": not adapters,
        f"weights: expected one for each of the {count} adapters, found {len(weights)}": len(weights) != count,
        **{f"weights: expected finite numbers, found {w!r}": True for w in invalid},
        f"method: expected one of {', '.join(METHODS)}, found {method!r}": method not in METHODS,
        f"svd_rank={svd_rank!r}: has no effect with method {method!r}": svd_rank is not None
        and not method.endswith("svd"),
        f"svd_rank: expected a positive integer, found {svd_rank!r}": method.endswith("svd")
        and svd_rank is not None
        and not is_rank,
        f"density: method {method!r} needs a number from 0 to 1, found {density!r}": prunes and not is_density,
        f"density={density!r}: has no effect with method {method!r}": not prunes and density is not None,
        "density: DARE divides by it, so it cannot be 0": is_dare and density == 0,
        f"method {method!r} needs key= (a JAX random key) or masks=, and not both": is_dare
        and (key is None) == (masks is None),
        f"masks: expected one tree for each of the {count} adapters, found {masks_found}": is_dare
        and masks_found != count,
        f"key and masks are for DARE; they have no effect with method {method!r}": has_noise and not is_dare,
        f"majority_sign_method: expected 'total' or 'frequency', found {signs!r}": signs not in _SIGNS,
        f"majority_sign_method={signs!r}: has no effect with method {method!r}": signs == "frequency"
        and "ties" not in method,
    }
    problems = [problem for problem, applies in rules.items() if applies]
    is_summed = summed_type(x.config for x in adapters if isinstance(x, Adapter)) is not None
    for i, adapter in enumerate(adapters):
        if isinstance(adapter, Adapter):
            if is_summed:
                continue
            reasons = lora.reasons_not_a_product(adapter.config)
            if isinstance(adapter.config, LoraConfig) and lora.changes_base(adapter.config):
                reasons.append(f"{lora.init_field(adapter.config)}: its base differs from the others'")
            problems += [f"adapter {i}: {reason}" for reason in reasons]
        else:
            type_name = type(adapter).__name__
            problems.append(f"adapter {i}: expected an Adapter (jaxadapt.extract takes one out), found {type_name}")
    raise_listed(ConfigError, "cannot combine these adapters:", problems, limit=16)


def _check_sizes(
    leaf_factors: Mapping[str, Sequence[Factors]], by_adapter: Sequence[Mapping[str, Factors]], method: str
) -> None:
    """Raise an error if the adapters differ in a weight's sizes, or in its rank for methods on A and B separately."""
    problems: list[str] = []
    ranks: list[str] = []
    for leaf, several_factors in leaf_factors.items():
        sizes = {(one_factors.a.shape[2], one_factors.b.shape[1]) for one_factors in several_factors}
        if len(sizes) > 1:
            problems.append(f"{leaf}: sizes (in, out) " + " and ".join(str(list(size)) for size in sorted(sizes)))
        if method == "cat" or method.endswith("svd"):
            continue
        ranks_of: dict[str, set[int]] = {}
        for module, rank in (
            (module, rank)
            for one_factors in several_factors
            for module, rank in zip(one_factors.modules, one_factors.ranks, strict=True)
        ):
            ranks_of.setdefault(module, set()).add(rank)
        if any(len(module_ranks) > 1 for module_ranks in ranks_of.values()):
            leaf_ranks = [
                (i, sorted(set(by_leaf[leaf].ranks))) for i, by_leaf in enumerate(by_adapter) if leaf in by_leaf
            ]
            ranks.append(
                f"{leaf}: " + ", ".join(f"{' or '.join(map(str, values))} in adapter {i}" for i, values in leaf_ranks)
            )
    raise_listed(MismatchError, "cannot combine adapters of models of different sizes:", problems)
    raise_listed(
        ConfigError,
        f"method {method!r} works on A and B separately, so a weight must have one rank in all adapters:",
        ranks,
        '\nUse "cat", "svd" or an "…_svd" method, or bring them to one rank with jaxadapt.merging.resize_rank',
    )


def _combined_config(configs: Sequence[Any], r: int, modules: list[str], parameters: list[str]) -> LoraConfig:
    """Return the first configuration with scale 1 and the union of the targets, in PEFT's form where that is exact."""
    first: LoraConfig = configs[0].with_scale_one(r).with_default_init()
    if parameters:
        names = sorted({name for config in configs for name in config.target_parameters or ()})
        first = first.replace(target_parameters=names)
    narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
    equal_fields = all(config.get(name) == first.get(name) for config in configs for name in narrowing)
    targets = [config.target_modules for config in configs]
    union: Any = None
    if equal_fields and all(isinstance(target, tuple) for target in targets):
        union = sorted({name for names in targets for name in names})
    elif equal_fields and all(isinstance(target, str) for target in targets):
        union = _join_expressions(list(dict.fromkeys(targets)))
    if union is not None:
        config = first.replace(target_modules=union)
        if all(matching.is_target(config, module) for module in modules):
            return config
    return first.replace(target_modules=sorted(modules), **dict.fromkeys(narrowing))


def _join_expressions(expressions: Sequence[str]) -> str | None:
    """Return one regular expression that matches if any of several does; None if joining would change their meaning."""
    if len(expressions) == 1:
        return expressions[0]
    if any(re.search(r"\\[1-9]|\(\?[aiLmsuxP]", expression) for expression in expressions):
        return None  # group numbers shift, flags and group names clash
    return "|".join(f"({expression})" for expression in expressions)


# ---------------------------------------------------------------- masks


def _dare_masks(
    matrix: JointMatrix,
    by_adapter: Sequence[Mapping[str, Factors]],
    keymap: KeyMap,
    svd: bool,
    density: float,
    key: Any,
    masks: Any,
) -> dict[int, tuple[Array, ...]]:
    """Return DARE's masks of one matrix: for each adapter those of A and B, or that of the weight change."""
    masks_of: dict[int, tuple[Array, ...]] = {}
    for i, by_leaf in enumerate(by_adapter):
        if not matrix.is_present(by_leaf):
            continue
        joint = matrix.factors(by_leaf)
        if masks is not None:
            flat = paths.flatten(masks[i])
            parts = [_given_masks(leaf, by_leaf[leaf], keymap, svd, i, flat) for leaf in matrix.leaves]
            masks_of[i] = parts[0] if svd else matrix.join(*zip(*parts, strict=True))
            continue
        shapes = [(len(joint.modules), joint.b.shape[1], joint.a.shape[2])] if svd else [joint.a.shape, joint.b.shape]
        matrix_key = jax.random.fold_in(jax.random.fold_in(key, i), zlib.crc32(matrix.leaves[0].encode()))
        keys = jax.random.split(matrix_key, len(shapes))
        masks_of[i] = tuple(jax.random.bernoulli(k, density, shape) for k, shape in zip(keys, shapes, strict=True))
    return masks_of


def _given_masks(
    leaf: str, leaf_factors: Factors, keymap: KeyMap, svd: bool, i: int, flat: Mapping[str, Any]
) -> tuple[Array, ...]:
    """Return the caller's masks of one leaf, as matrices.

    Raises `MismatchError` if they are missing or have other shapes.
    """
    expected = [leaf] if svd else [entry.path for entry in leaf_factors.entries]
    missing = [path for path in expected if path not in flat]
    if missing:
        raise MismatchError(f"masks[{i}]: expected a mask at {', '.join(missing)}, found {paths.bullets(flat)}")
    try:
        if svd:
            mask = factors.weight_matrices(keymap, leaf_factors.site, jnp.asarray(flat[leaf]), scaled=False)
            leaf_masks, shapes = (
                (mask,),
                [(len(leaf_factors.modules), leaf_factors.b.shape[1], leaf_factors.a.shape[2])],
            )
        else:
            leaf_masks = factors.site_matrices(
                leaf_factors.site, {path.rpartition(".")[2]: jnp.asarray(flat[path]) for path in expected}, False
            )
            shapes = [leaf_factors.a.shape, leaf_factors.b.shape]
    except (ValueError, TypeError, KeyMapError) as error:
        raise MismatchError(
            f"masks[{i}] at {leaf}: its shape differs from that of the masked tensor ({error})"
        ) from error
    if [mask.shape for mask in leaf_masks] != shapes:
        raise MismatchError(f"masks[{i}] at {leaf}: its shape differs from that of the masked tensor")
    return leaf_masks
