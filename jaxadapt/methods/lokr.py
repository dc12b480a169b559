"""LoKr (Yeh et al. 2023, arXiv:2309.14859) with PEFT's conventions: W + s·(w1 ⊗ w2), s = α/r.

w1 is (l, m) and w2 (k, n), with l·k outputs and m·n inputs. Each of them may be a product of two matrices of rank r. A
convolution's window belongs to w2; with `use_effective_conv2d` it has a tensor of its own, T2 (r, r, window), and w2_a
is (r, k). The arithmetic follows PEFT's `tuners/lokr/layer.py`, with its fault: for a 1-D convolution with a full w2,
PEFT multiplies w1 with the last two axes of w2, so the change of the kernel is not that of its channels.
Dropout is that of LoHa, but only `rank_dropout_scale` divides the rows that are kept by their share.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from jaxadapt.configs.low_rank import LoKrConfig
from jaxadapt.core.errors import MismatchError
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    DroppedHparams,
    Examples,
    Lycoris,
    MethodTensor,
    Params,
    Start,
    Strings,
    Target,
    axes_tensor,
    kept_rows,
    split_size,
    tensor_roles,
)


class Lokr(Lycoris, peft_type="LOKR"):
    """The Kronecker product of two matrices."""

    row_numbers: frozenset[str] = frozenset({"scale"})
    scaled: frozenset[str] = frozenset({"lokr_w1", "lokr_w1_a"})
    roles: Strings = tensor_roles(A="lokr_w1_b lokr_w2 lokr_w2_b lokr_t2", B="lokr_w1 lokr_w1_a lokr_w2_a")
    examples: Examples = (
        {"r": 1, "alpha": 3},
        {"r": 4, "alpha": 5, "decompose_factor": 2, "init_weights": "lycoris"},
        {"r": 1, "decompose_both": True, "decompose_factor": 4, "alpha_pattern": {".*[qv](_proj)?": 7}},
    )

    def tensors(self, config: LoKrConfig, target: Target) -> tuple[MethodTensor, ...]:
        ranks = {config.rank_of(module) for module in target.modules}
        axes, *others = (_found_axes(target) or _new_axes(config, target, r) for r in ranks)
        if any(other != axes for other in others) or ("lokr_t2" in axes and len(ranks) > 1):
            raise target.refuse(
                f"the ranks {sorted(ranks)} of its modules decompose their matrices differently; choose ranks that all"
                " decompose the same ones, or use an unrolled model"
            )
        sizes = _sizes(config, target, axes, target.rank(config.rank_of))
        tensors = [axes_tensor(name, text, tuple(sizes[name].items())) for name, text in axes.items()]
        return target.with_ranks(tensors, config.rank_of)

    def init(self, config: LoKrConfig, tensor: MethodTensor, start: Start) -> Draw:
        zeros = ("lokr_w2", "lokr_w2_b") if config.init_weights == "lycoris" else ("lokr_w1", "lokr_w1_a")
        if config.init_weights and tensor.name in zeros:
            return Draw("constant", 0.0)
        return Draw.kaiming(math.prod(start.shape[1:]))

    def delta(self, own: DroppedHparams, params: Params, w: Array) -> Array:
        w1 = params["lokr_w1"] if "lokr_w1" in params else params["lokr_w1_a"] @ params["lokr_w1_b"]
        if "lokr_t2" in params:
            w2 = jnp.einsum("ij...,ik,jn->kn...", params["lokr_t2"], params["lokr_w2_a"], params["lokr_w2_b"])
        else:
            w2 = params["lokr_w2"] if "lokr_w2" in params else params["lokr_w2_a"] @ params["lokr_w2_b"]
        # Of a w2 with three axes, the last two are multiplied, as in PEFT.
        delta = own.scale * jnp.kron(w1[:, :, None, None] if w2.ndim == 4 else w1, w2).reshape(len(w), -1)
        return (delta.T * kept_rows(own, params, len(w))).T.reshape(w.shape)

    def after(self, own: DroppedHparams, params: Params, x: Array, y: Array) -> Array:
        first = [params[n] for n in ("lokr_w1", "lokr_w1_b", "lokr_w1_a") if n in params]
        second = [params[n] for n in ("lokr_w2", "lokr_w2_b", "lokr_w2_a") if n in params]
        h = x.reshape(*x.shape[:-1], first[0].shape[1], second[0].shape[1]).astype(first[0].dtype)
        for factor in second:
            h = jnp.einsum("...mn,kn->...mk", h, factor)
        for factor in first:
            h = jnp.einsum("...mk,lm->...lk", h, factor)
        return y + own.scale * h.reshape(y.shape) * kept_rows(own, params, y.shape[-1])


def _axes(target: Target, full1: bool, full2: bool, has_t2: bool) -> dict[str, str]:
    """Return the axes of the tensors of a module with a full w1 or w2, or with a tensor T2."""
    first = {"lokr_w1": "l m"} if full1 else {"lokr_w1_a": "l r", "lokr_w1_b": "r m"}
    if full2:
        return {**first, "lokr_w2": "k n x y"[: 2 * len(target.match.weight.right) - 1]}
    window = {"lokr_t2": "r r2 x y", "lokr_w2_a": "r k", "lokr_w2_b": "r n"}
    return first | (window if has_t2 else {"lokr_w2_a": "k r", "lokr_w2_b": "r nw"})


def _found_axes(target: Target) -> dict[str, str]:
    """Return the axes of existing tensors; none for a new adapter."""
    found = target.found.keys() & Lokr.roles.keys()
    both = [name for name in ("lokr_w1", "lokr_w2") if {name, f"{name}_a"} <= found]
    if both:
        raise MismatchError(
            f"{target.leaf}: the adapter has {both[0]} and {both[0]}_a, which exclude each other in one module; if its"
            " modules have different ranks, use an unrolled model"
        )
    full1, full2 = (not {f"{name}_a", f"{name}_b"} & found for name in ("lokr_w1", "lokr_w2"))
    return _axes(target, full1, full2, "lokr_t2" in found) if found else {}


def _new_axes(config: LoKrConfig, target: Target, r: int) -> dict[str, str]:
    """Return PEFT's axes of a new module."""
    if len(target.window) > 2:
        raise target.refuse("PEFT implements LOKR for 1-D and 2-D convolutions only; exclude the module")
    sizes = _new_sizes(config, target)
    full2 = r >= max(sizes["k"], sizes["n"]) / 2
    has_t2 = config.use_effective_conv2d and math.prod(target.window) > 1 and not full2
    return _axes(target, not (config.decompose_both and r < max(sizes["l"], sizes["m"]) / 2), full2, has_t2)


def _new_sizes(config: LoKrConfig, target: Target) -> dict[str, int]:
    """Return PEFT's sizes for a new module; "nw" is n with the window."""
    (l, k), (m, n) = (split_size(size, config.decompose_factor) for size in (target.out_size, target.in_size))
    window = (*target.window, 1, 1)
    return {"l": l, "k": k, "m": m, "n": n, "nw": n * math.prod(window), "x": window[0], "y": window[1]}


def _sizes(config: LoKrConfig, target: Target, axes: dict[str, str], r: int) -> dict[str, dict[str, int]]:
    """Return `{tensor: {axis: size}}`, with the sizes of an existing adapter where there is one."""

    def size(tensor: str, position: int, axis: str) -> int:
        return r if axis in ("r", "r2") else target.own_size(tensor, position, lambda: _new_sizes(config, target)[axis])

    by_tensor = {t: {a: size(t, i, a) for i, a in enumerate(text.split())} for t, text in axes.items()}
    sizes = {axis: size for each in by_tensor.values() for axis, size in each.items()}
    if target.is_known and target.found:
        made = sizes["l"] * sizes["k"], sizes["m"] * math.prod(sizes.get(a, 1) for a in ("n", "nw", "x", "y"))
        wanted = target.out_size, target.in_size * math.prod(target.window)
        if made != wanted:
            raise MismatchError(
                f"{target.leaf}: the Kronecker product of the adapter's matrices has shape {made}, but the weight has"
                f" {wanted}; load the adapter into the model that it was trained on"
            )
    return by_tensor
