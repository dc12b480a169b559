"""Several LoRA adapters of one base into one. PEFT calls it `add_weighted_adapter`.

The operators follow PEFT's `utils/merge_utils.py` and `tuners/lora/model.py`: TIES (Yadav et al. 2023,
arXiv:2306.01708), DARE (Yu et al. 2023, arXiv:2311.03099), magnitude pruning, and weighted sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.adapters.adapter import Adapter
from jaxadapt.configs import LoraConfig, lora_variants, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, KeyMapError, MismatchError
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.merging import factors
from jaxadapt.merging.factors import FactorRows, Factors
from jaxadapt.merging.joint import JointMatrix, joint_matrices

Array = Any

METHODS = (
    "svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
_SIGNS = ("total", "frequency")


@dataclasses.dataclass(frozen=True)
class _Combination:
    """What is static in a combination: `total` is TIES' vote by value, not by count."""

    method: str
    r: int
    density: float
    total: bool


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
    """One LoRA adapter out of several of the same base, as PEFT's `add_weighted_adapter` makes it.

    Args:
        adapters: plain LoRA, each of its own rank, targets and scale.
        weights: one number each, negative ones too; traced ones are fine under jit.
        method: "cat" and "svd" sum the weight changes: exact with the ranks added up, or the best sum of rank
            `svd_rank`. "linear", "ties", "dare_linear", "dare_ties" and "magnitude_prune" work on A and on B by
            themselves, with ±√|weight·scale|, which is fast and rough; with "_svd" on the weight changes.
        svd_rank: of the result of "svd" and "…_svd"; the largest of the adapters' ranks by default.
        density: which share of the values survives pruning, 0 to 1; needed by "ties…", "dare…", "magnitude_prune…".
        majority_sign_method: TIES elects signs by "total" value or by "frequency".
        key: DARE's random key.
        masks: DARE's masks instead of `key`, one tree an adapter: shaped as its `params`, or for "dare…_svd" with one
            mask (the base weight's shape) in the place of each adapted leaf.

    What is one matrix in PyTorch is one here (queries, keys and values with one A, as in a file of PEFT's; `wholes`).
    The result has scale 1 (`lora_alpha = r`, no patterns, `use_rslora=False`), float32 arithmetic, the adapters' dtype,
    and targets the union of their modules. Where PEFT is wrong this differs on purpose: PEFT keeps the first adapter's
    `use_rslora`, which scales the result by √r; it takes the first's `exclude_modules` and `layers_to_transform` for
    all, and drops what they leave out; with one adapter it ignores the method. PEFT's `svd_clamp` does not exist here:
    its outcome depends on the signs an SVD is free to choose.

    Raises `ConfigError` for arguments or adapters that do not go together, `KeyMapError` or `MismatchError` for
    adapters of different models; each lists everything of its kind.

    >>> import jax, jaxadapt
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> one, two = (jaxadapt.init(config, base, key=jax.random.key(i)) for i in (0, 1))
    >>> both = combine([one, two], [0.7, -0.3], method="cat")
    >>> both.config.r, both.params["q"]["kernel"]["lora_A"].shape
    (4, (4, 4))
    """
    adapters, weights = list(adapters), list(weights)
    _check(adapters, weights, method, svd_rank, density, majority_sign_method, key, masks)
    held = [factors.lora_factors(adapter, f"adapter {i}") for i, adapter in enumerate(adapters)]
    table = factors.common_keymap((a.keymap for a in adapters), (leaf for found in held for leaf in found))
    like = {leaf: [found[leaf] for found in held if leaf in found] for found in held for leaf in found}
    _fit(like, held, method)
    ranks = [_largest_rank(adapter.config) for adapter in adapters]
    r = sum(ranks) if method == "cat" else int(svd_rank) if svd_rank and method.endswith("svd") else max(ranks)

    how = _Combination(method, r, 1.0 if density is None else float(density), majority_sign_method == "total")
    new: dict[str, FactorRows] = {}
    with jax.default_matmul_precision("highest"):
        first = {leaf: pairs[0] for leaf, pairs in like.items()}
        apart = method in ("cat", "linear")  # number by number: what is one matrix makes no difference
        for whole in [JointMatrix((leaf,)) for leaf in like] if apart else joint_matrices(held):
            mine = {i: whole.factors(found) for i, found in enumerate(held) if whole.is_present(found)}
            svd = method.endswith("svd")
            noise = (
                _noise(whole, held, table, svd, float(density or 0), key, masks) if method.startswith("dare") else {}
            )
            new |= whole.split(_rows(mine, weights, how, noise), first)
    by_name = [
        (m, p.site.method.wrapper_depth is not None) for pairs in like.values() for p in pairs for m in p.site.modules
    ]
    modules, parameters = ([m for m, named in dict.fromkeys(by_name) if named == of] for of in (False, True))
    config = _config([a.config for a in adapters], r, modules, parameters)
    dtype = jnp.result_type(*(x.dtype for adapter in adapters for x in adapter.flat().values()))
    return factors.build_adapter(config, table, first, new, dtype)


# ---------------------------------------------------------------- what goes together


def _check(
    adapters: Sequence[Any],
    weights: Sequence[Any],
    method: str,
    svd_rank: Any,
    density: Any,
    signs: str,
    key: Any,
    masks: Any,
) -> None:
    problems: list[str] = []
    if not adapters:
        problems.append("adapters: expected at least one")
    if len(weights) != len(adapters):
        problems.append(f"weights: expected one for each of the {len(adapters)} adapters, found {len(weights)}")
    odd = [w for w in weights if isinstance(w, str) or (isinstance(w, numbers.Real) and not math.isfinite(w))]
    problems += [f"weights: expected finite numbers, found {w!r}" for w in odd]
    if method not in METHODS:
        problems.append(f"method: expected one of {', '.join(METHODS)}, found {method!r}")
    prunes = method.startswith(("ties", "dare", "magnitude"))
    if svd_rank is not None and not method.endswith("svd"):
        problems.append(f"svd_rank={svd_rank!r}: has no effect with method {method!r}")
    elif svd_rank is not None and not (isinstance(svd_rank, numbers.Integral) and int(svd_rank) > 0):
        problems.append(f"svd_rank: expected a positive integer, found {svd_rank!r}")
    if prunes and not (isinstance(density, numbers.Real) and 0 <= float(density) <= 1):
        problems.append(f"density: method {method!r} needs a number from 0 to 1, found {density!r}")
    elif not prunes and density is not None:
        problems.append(f"density={density!r}: has no effect with method {method!r}")
    if method.startswith("dare"):
        if density == 0:
            problems.append("density: DARE divides by it, so it cannot be 0")
        if (key is None) == (masks is None):
            problems.append(f"method {method!r} needs key= (a JAX random key) or masks=, and not both")
        if masks is not None and len(masks) != len(adapters):
            problems.append(f"masks: expected one tree for each of the {len(adapters)} adapters, found {len(masks)}")
    elif key is not None or masks is not None:
        problems.append(f"key and masks are for DARE; they have no effect with method {method!r}")
    if signs not in _SIGNS:
        problems.append(f"majority_sign_method: expected 'total' or 'frequency', found {signs!r}")
    elif signs != "total" and "ties" not in method:
        problems.append(f"majority_sign_method={signs!r}: has no effect with method {method!r}")
    for i, adapter in enumerate(adapters):
        if isinstance(adapter, Adapter):
            why = lora_variants.reasons_not_a_product(adapter.config)
            if isinstance(adapter.config, LoraConfig) and lora_variants.changes_base(adapter.config):
                why.append(f"{lora_variants.init_field(adapter.config)}: it belongs to a base of its own")
            problems += [f"adapter {i}: {reason}" for reason in why]
        else:
            what = type(adapter).__name__
            problems.append(f"adapter {i}: expected an Adapter (jaxadapt.extract takes one out), found {what}")
    if problems:
        raise ConfigError("these adapters cannot be combined so:\n" + paths.bullets(problems, 16))


def _fit(like: Mapping[str, Sequence[Factors]], held: Sequence[Mapping[str, Factors]], method: str) -> None:
    """Adapters of one model agree in the sizes of its weights; methods on A and B alone need equal ranks too."""
    problems: list[str] = []
    ranks: list[str] = []
    for leaf, pairs in like.items():
        sizes = {(p.a.shape[2], p.b.shape[1]) for p in pairs}
        if len(sizes) > 1:
            problems.append(f"{leaf}: (in, out) is " + " and ".join(str(list(s)) for s in sorted(sizes)))
        if method == "cat" or method.endswith("svd"):
            continue
        of: dict[str, set[int]] = {}
        for module, rank in ((m, rank) for p in pairs for m, rank in zip(p.modules, p.ranks, strict=True)):
            of.setdefault(module, set()).add(rank)
        if any(len(several) > 1 for several in of.values()):
            mine = [(i, sorted(set(found[leaf].ranks))) for i, found in enumerate(held) if leaf in found]
            ranks.append(f"{leaf}: " + ", ".join(f"{' or '.join(map(str, some))} in adapter {i}" for i, some in mine))
    if problems:
        raise MismatchError("the adapters are of models of different sizes:\n" + paths.bullets(problems))
    if ranks:
        raise ConfigError(
            f"method {method!r} works on A and B by themselves, so a weight must have one rank in all adapters:\n"
            + paths.bullets(ranks)
            + '\nUse "cat", "svd" or an "…_svd" method, or bring them to one rank with jaxadapt.merging.resize_rank'
        )


def _largest_rank(config: Any) -> int:
    return max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r


def _config(configs: Sequence[Any], r: int, modules: list[str], parameters: list[str]) -> LoraConfig:
    """The first configuration with scale 1 and the union of the targets, said as PEFT says it where that is exact."""
    first: LoraConfig = configs[0].replace(
        r=r, lora_alpha=r, rank_pattern={}, alpha_pattern={}, use_rslora=False, init_lora_weights=True, eva_config=None,
        lora_ga_config=None,
    )  # fmt: skip
    if parameters:
        names = sorted({name for c in configs for name in c.target_parameters or ()})
        first = first.replace(target_parameters=names)
    narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
    alike = all(c.get(name) == first.get(name) for c in configs for name in narrowing)
    wanted = [c.target_modules for c in configs]
    union: Any = None
    if alike and all(isinstance(w, tuple) for w in wanted):
        union = sorted({name for names in wanted for name in names})
    elif alike and all(isinstance(w, str) for w in wanted):
        union = _either(list(dict.fromkeys(wanted)))
    if union is not None:
        config = first.replace(target_modules=union)
        if all(matching.matches(config, m) for m in modules):
            return config
    return first.replace(target_modules=sorted(modules), **dict.fromkeys(narrowing))


def _either(expressions: Sequence[str]) -> str | None:
    """One regular expression for any of several; None where joining would change what they mean."""
    if len(expressions) == 1:
        return expressions[0]
    if any(re.search(r"\\[1-9]|\(\?[aiLmsuxP]", e) for e in expressions):
        return None  # group numbers shift, flags and group names clash
    return "|".join(f"({e})" for e in expressions)


# ---------------------------------------------------------------- the arithmetic of one leaf


def _rows(there: Mapping[int, Factors], weights: Sequence[Any], how: _Combination, noise: Any) -> FactorRows:
    """The new matrices of one leaf, from the pairs of the adapters (by number) that have it.

    Modules that the same adapters have, at the same ranks and scales, are computed together.
    """
    groups: dict[tuple[tuple[int, int, float], ...], list[str]] = {}
    for module in dict.fromkeys(m for pair in there.values() for m in pair.modules):
        mine = {i: pair for i, pair in there.items() if module in pair.modules}
        alike = tuple((i, pair.rank_of(module), pair.scales_of([module])[0]) for i, pair in mine.items())
        groups.setdefault(alike, []).append(module)
    made: list[FactorRows] = []
    for alike, modules in groups.items():
        who, ranks, scales = zip(*alike, strict=True)
        pairs = [there[i] for i in who]
        a = tuple(p.rows_of("a", modules)[:, :r] for p, r in zip(pairs, ranks, strict=True))
        b = tuple(p.rows_of("b", modules)[:, :, :r] for p, r in zip(pairs, ranks, strict=True))
        drawn = [noise[i] for i in who] if noise else None
        masks = drawn and [tuple(p.rows_at(m, modules) for m in ms) for ms, p in zip(drawn, pairs, strict=True)]
        if masks and not how.method.endswith("svd"):
            masks = [(of_a[:, :r], of_b[:, :, :r]) for (of_a, of_b), r in zip(masks, ranks, strict=True)]
        by = jnp.stack([jnp.asarray(weights[i], jnp.float32) for i in who])
        made.append(FactorRows(tuple(modules), *_mixed(how, scales, a, b, by, masks)))
    return FactorRows.concatenate(made)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mixed(
    how: _Combination, scales: tuple[float, ...], a: Any, b: Any, weights: Array, masks: Any
) -> tuple[Array, Array]:
    """A (n, r, in) and B (n, out, r) of n modules, from each adapter's."""
    each = [w * s for w, s in zip(weights, scales, strict=True)]
    if how.method == "cat":
        # PEFT puts the weight and the scale on A.
        scaled = [x * s for x, s in zip(a, each, strict=True)]
        return factors.pad_rank(jnp.concatenate(scaled, 1), jnp.concatenate(b, 2), how.r)
    if how.method == "svd":
        stacked = jnp.concatenate([x * s for x, s in zip(b, each, strict=True)], 2), jnp.concatenate(a, 1)
        u, s, vh = factors.product_svd(*stacked)
        return factors.truncate_svd(u, s, vh, how.r)
    if how.method.endswith("_svd"):

        def one(row: Any) -> tuple[Array, Array]:
            a, b, masks = row
            deltas = jnp.stack([s * (y @ x) for s, x, y in zip(scales, a, b, strict=True)])
            mixed = _operate(how, deltas, weights, None if masks is None else jnp.stack([m for (m,) in masks]))
            u, s, vh = jnp.linalg.svd(mixed, full_matrices=False)
            return factors.truncate_svd(u, s, vh, how.r)

        return jax.lax.map(one, (a, b, masks))  # one after the other: a change is as large as its weight
    root = [jnp.sqrt(jnp.abs(s)) for s in each]
    sign = jnp.stack([r * jnp.where(s >= 0, 1, -1) for r, s in zip(root, each, strict=True)])  # on A only
    made: list[Array] = []
    for side, tensors, by in ((0, a, sign), (1, b, jnp.stack(root))):
        mine = None if masks is None else jnp.stack([m[side] for m in masks], 1)
        made.append(jax.vmap(functools.partial(_operate, how), (0, None, 0))(jnp.stack(tensors, 1), by, mine))
    return factors.pad_rank(made[0], made[1], how.r)


def _operate(how: _Combination, tensors: Array, weights: Array, masks: Array | None) -> Array:
    """The adapters' tensors (k, …) of one module into one."""
    by = weights.reshape((-1,) + (1,) * (tensors.ndim - 1))
    if masks is not None:  # DARE: what is kept stands in for what is dropped
        tensors = tensors * masks.astype(tensors.dtype) / how.density
    elif how.density < 1:
        tensors = jnp.stack([_largest(t, int(how.density * t.size)) for t in tensors])
    if "ties" not in how.method:
        return jnp.sum(tensors * by, 0)
    # The sign is elected, and agreement counted, before the weights come in: a negative weight casts no other vote.
    vote = jnp.sum(tensors if how.total else jnp.sign(tensors), 0, keepdims=True)
    agree = jnp.sign(tensors) == jnp.where(vote >= 0, 1, -1)
    return jnp.sum(tensors * by * agree, 0) / jnp.maximum(jnp.sum(agree, 0), 1)


def _largest(tensor: Array, k: int) -> Array:
    """The k values of largest magnitude, the rest zero; of equal ones the first."""
    flat = tensor.reshape(-1)
    at = jnp.argsort(-jnp.abs(flat), stable=True)[:k]
    return jnp.zeros_like(flat).at[at].set(flat[at]).reshape(tensor.shape)


def _noise(
    whole: JointMatrix,
    held: Sequence[Mapping[str, Factors]],
    table: KeyMap,
    svd: bool,
    density: float,
    key: Any,
    masks: Any,
) -> dict[int, tuple[Array, ...]]:
    """DARE's masks of one leaf: for each adapter those of A and B, or that of the weight change."""
    out: dict[int, tuple[Array, ...]] = {}
    for i, found in enumerate(held):
        if not whole.is_present(found):
            continue
        pair = whole.factors(found)
        if masks is not None:
            flat = paths.flatten(masks[i])
            parts = [_given(leaf, found[leaf], table, svd, i, flat) for leaf in whole.leaves]
            out[i] = parts[0] if svd else whole.join(*zip(*parts, strict=True))
            continue
        shapes = [(len(pair.modules), pair.b.shape[1], pair.a.shape[2])] if svd else [pair.a.shape, pair.b.shape]
        mine = jax.random.fold_in(jax.random.fold_in(key, i), zlib.crc32(whole.leaves[0].encode()))
        keys = jax.random.split(mine, len(shapes))
        out[i] = tuple(jax.random.bernoulli(k, density, shape) for k, shape in zip(keys, shapes, strict=True))
    return out


def _given(leaf: str, pair: Factors, table: KeyMap, svd: bool, i: int, flat: Mapping[str, Any]) -> tuple[Array, ...]:
    want = [leaf] if svd else [e.path for e in pair.entries]
    missing = [path for path in want if path not in flat]
    if missing:
        raise MismatchError(f"masks[{i}]: expected a mask at {', '.join(missing)}, found {paths.bullets(flat)}")
    try:
        if svd:
            mask = factors.weight_matrices(table, pair.site, jnp.asarray(flat[leaf]), scaled=False)
            found, shapes = (mask,), [(len(pair.modules), pair.b.shape[1], pair.a.shape[2])]
        else:
            found = factors.site_matrices(
                pair.site, {path.rpartition(".")[2]: jnp.asarray(flat[path]) for path in want}, False
            )
            shapes = [pair.a.shape, pair.b.shape]
    except (ValueError, TypeError, KeyMapError) as error:
        raise MismatchError(f"masks[{i}] at {leaf}: not of the shape of what it masks ({error})") from error
    if [m.shape for m in found] != shapes:
        raise MismatchError(f"masks[{i}] at {leaf}: not of the shape of what it masks")
    return found
