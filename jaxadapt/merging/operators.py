"""The operators that combine the factors of several LoRA adapters, leaf by leaf.

They follow PEFT's `utils/merge_utils.py`: TIES (Yadav et al. 2023, arXiv:2306.01708), DARE (Yu et al. 2023,
arXiv:2311.03099), magnitude pruning, and weighted sums.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.merging import factors
from jaxadapt.merging.factors import FactorRows, Factors

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
