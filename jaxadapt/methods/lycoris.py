"""The elementwise and the Kronecker product of low-rank matrices: LoHa and LoKr.

LoHa (Hyeon-Woo et al. 2022, arXiv:2108.06098) with PEFT's conventions: W + s·(W1a·W1b)∘(W2a·W2b), s = α/r.

A convolution's kernel is one matrix (out, channels·window). With `use_effective_conv2d` its window has tensors of its
own, T1 and T2 (r, r, window), and W1a is (r, out). The arithmetic follows PEFT's `tuners/loha/layer.py`, but the
gradients of W1a and W2a with T1 and T2 are those of the function: PEFT computes each with the other's tensors.
In training, `rank_dropout` drops rows of the change and `module_dropout` the whole change of a module, for all rows of
a batch. The rows that are kept are divided by their share. If no row is kept, PEFT's outputs are NaN; here the module
is not changed.

LoKr (Yeh et al. 2023, arXiv:2309.14859) with PEFT's conventions: W + s·(w1 ⊗ w2), s = α/r.

w1 is (l, m) and w2 (k, n), with l·k outputs and m·n inputs. Each of them may be a product of two matrices of rank r. A
convolution's window belongs to w2; with `use_effective_conv2d` it has a tensor of its own, T2 (r, r, window), and w2_a
is (r, k). The arithmetic follows PEFT's `tuners/lokr/layer.py`, with its fault: for a 1-D convolution with a full w2,
PEFT multiplies w1 with the last two axes of w2, so the change of the kernel is not that of its channels.
Dropout is that of LoHa, but only `rank_dropout_scale` divides the rows that are kept by their share.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.configs.low_rank import LoHaConfig, LoKrConfig
from jaxadapt.core.errors import MismatchError
from jaxadapt.methods.matrix import (
    CALL_KEY,
    Array,
    Draw,
    Effects,
    FactoredMethod,
    MatrixMethod,
    MethodTensor,
    Params,
    Start,
    Target,
    axes_tensor,
    shared_value,
    tensor_roles,
)

# ---------------------------------------------------------------- dropped rows


@dataclasses.dataclass(frozen=True)
class DroppedHparams:
    """The hyperparameters of a site.

    Attributes:
        scale: the scale s, a number or a `PerEntry`.
        rank_dropout: the probability of a row of the change to be 0.
        module_dropout: the probability of the whole change to be 0.
        unscaled_dropout: True if the rows that are kept are not divided by their share.
    """

    scale: Any
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    unscaled_dropout: bool = False

    @property
    def dropout(self) -> float:
        """The larger rate, 0 if nothing is dropped."""
        return max(self.rank_dropout, self.module_dropout)


def kept_rows(own: DroppedHparams, params: Params, rows: int) -> Array | float:
    """Return the factor of each row of the change in this call (rows); 1 without dropout."""
    if CALL_KEY not in params:
        return 1.0
    row_key, module_key = jax.random.split(params[CALL_KEY])
    kept = jax.random.bernoulli(row_key, 1 - own.rank_dropout, (rows,)).astype("float32")
    kept = kept if own.unscaled_dropout else kept / jnp.maximum(kept.mean(), 1 / rows)
    return kept * jax.random.bernoulli(module_key, 1 - own.module_dropout)


class Lycoris(MatrixMethod):
    """A method whose training drops rows of the change, or the whole change of a module."""

    drops = "change"
    kinds = frozenset({"linear", "conv"})

    def own(self, config: LoHaConfig | LoKrConfig, target: Target) -> DroppedHparams:
        def scale(module: str) -> float:
            return find_pattern_value(config.alpha_pattern, module, config.alpha) / config.rank_of(module)

        is_unscaled = not config.get("rank_dropout_scale", True)
        return DroppedHparams(target.value(scale), config.rank_dropout, config.module_dropout, is_unscaled)


# ---------------------------------------------------------------- loha


class Loha(Lycoris, FactoredMethod):
    """The elementwise product of two low-rank matrices."""

    peft_type = "LOHA"
    scaled = frozenset({"hada_w1_a"})
    roles = tensor_roles(B="hada_w1_a hada_w2_a", A="hada_w1_b hada_w2_b hada_t1 hada_t2")
    examples = (
        {"r": 2, "alpha": 3},
        {"r": 3, "alpha": 5, "rank_pattern": {".*q(_proj)?": 2}, "alpha_pattern": {".*[qv](_proj)?": 7}},
    )

    def tensors(self, config: LoHaConfig, target: Target) -> tuple[MethodTensor, ...]:
        r, is_conv = (("r", target.rank(config.rank_of)),), target.kind == "conv"
        if target.found:  # the base may be unknown
            effective, window = "hada_t1" in target.found, target.found.get("hada_t1", ())[2:]
        else:
            window = (*target.window, 1)[:2] if is_conv else ()
            effective = config.use_effective_conv2d and math.prod(window) > 1
        if effective:
            shared_value("rank_pattern", {module: config.rank_of(module) for module in target.modules})
        made: list[MethodTensor] = []
        for i in "12":
            a, b, own = "out r", "r in", r
            if effective:
                made.append(
                    axes_tensor(f"hada_t{i}", "r r2 x y", (*r, ("r2", r[0][1]), *zip("xy", window, strict=True)))
                )
                a, b = "r out", "r channels"
            elif is_conv:
                inputs = target.own_size(f"hada_w{i}_b", -1, lambda: target.in_size * math.prod(target.window))
                b, own = "r i", (*r, ("i", inputs))
            made += [axes_tensor(f"hada_w{i}_a", a, r), axes_tensor(f"hada_w{i}_b", b, own)]
        return target.with_ranks(made, config.rank_of)

    def init(self, config: LoHaConfig, tensor: MethodTensor, start: Start) -> Draw:
        if tensor.name == "hada_w2_b" and config.init_weights:
            return Draw("constant", 0.0)
        return Draw.kaiming(math.prod(start.shape[1:]))

    def effect(self, own: DroppedHparams) -> Effects:
        return Effects("adds", form="weight")

    def plain_rank(self, config: LoHaConfig) -> int:
        return max([config.r, *(config.rank_pattern or {}).values()]) ** 2

    def factors(self, own: DroppedHparams, params: Params, shape: tuple[int, int]) -> tuple[Array, Array]:
        # The rows of A are the products of each row of W1b with each row of W2b, and so are the columns of B.
        a = params["hada_w1_b"][:, None] * params["hada_w2_b"][None]
        b = params["hada_w1_a"][:, :, None] * params["hada_w2_a"][:, None]
        return a.reshape(-1, shape[1]), own.scale * b.reshape(shape[0], -1)

    def delta(self, own: DroppedHparams, params: Params, w: Array) -> Array:
        if "hada_t1" in params:
            sides = [
                jnp.einsum("rj...,jp,ri->ip...", params[f"hada_t{i}"], params[f"hada_w{i}_b"], params[f"hada_w{i}_a"])
                for i in "12"
            ]
        else:
            sides = [params[f"hada_w{i}_a"] @ params[f"hada_w{i}_b"] for i in "12"]
        delta = own.scale * (sides[0] * sides[1]).reshape(len(w), -1)
        return (delta.T * kept_rows(own, params, len(w))).T.reshape(w.shape)


# ---------------------------------------------------------------- lokr


def split_size(size: int, factor: int = -1) -> tuple[int, int]:
    """Return PEFT's two factors of a size, the smaller one first unless `factor` divides the size.

    >>> split_size(4096), split_size(4096, 16), split_size(576, 7), split_size(6, 3)
    ((64, 64), (16, 256), (6, 96), (3, 2))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = min(math.isqrt(size), size if factor == -1 else factor)
    first = max([m for m in range(2, limit + 1) if size % m == 0], default=1)
    return first, size // first


@dataclasses.dataclass(frozen=True)
class _Form:
    """The tensors of a module: True for a full w1 or w2, and for a tensor T2."""

    full1: bool
    full2: bool
    has_t2: bool


class Lokr(Lycoris):
    """The Kronecker product of two matrices."""

    peft_type = "LOKR"
    row_numbers = frozenset({"scale"})
    scaled = frozenset({"lokr_w1", "lokr_w1_a"})
    roles = tensor_roles(A="lokr_w1_b lokr_w2 lokr_w2_b lokr_t2", B="lokr_w1 lokr_w1_a lokr_w2_a")
    examples = (
        {"r": 1, "alpha": 3},
        {"r": 4, "alpha": 5, "decompose_factor": 2, "init_weights": "lycoris"},
        {"r": 1, "decompose_both": True, "decompose_factor": 4, "alpha_pattern": {".*[qv](_proj)?": 7}},
    )

    def tensors(self, config: LoKrConfig, target: Target) -> tuple[MethodTensor, ...]:
        ranks = {config.rank_of(module) for module in target.modules}
        forms = {_found_form(target) or _new_form(config, target, r) for r in ranks}
        form = forms.pop()
        if forms or (form.has_t2 and len(ranks) > 1):
            raise target.refuse(
                f"the ranks {sorted(ranks)} of its modules decompose their matrices differently; choose ranks that all"
                " decompose the same ones, or use an unrolled model"
            )
        axes = _axes(config, target, form, target.rank(config.rank_of))
        tensors = [axes_tensor(name, " ".join(sizes), tuple(sizes.items())) for name, sizes in axes.items()]
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


def _found_form(target: Target) -> _Form | None:
    """Return the form of existing tensors; None for a new adapter."""
    found = target.found.keys() & Lokr.roles.keys()
    both = [name for name in ("lokr_w1", "lokr_w2") if {name, f"{name}_a"} <= found]
    if both:
        raise MismatchError(
            f"{target.leaf}: the adapter has {both[0]} and {both[0]}_a, which exclude each other in one module; if its"
            " modules have different ranks, use an unrolled model"
        )
    full1, full2 = (not {f"{name}_a", f"{name}_b"} & found for name in ("lokr_w1", "lokr_w2"))
    return _Form(full1, full2, "lokr_t2" in found) if found else None


def _new_form(config: LoKrConfig, target: Target, r: int) -> _Form:
    """Return PEFT's form of a new module."""
    if len(target.window) > 2:
        raise target.refuse("PEFT implements LOKR for 1-D and 2-D convolutions only; exclude the module")
    sizes = _new_sizes(config, target)
    full2 = r >= max(sizes["k"], sizes["n"]) / 2
    has_t2 = config.use_effective_conv2d and math.prod(target.window) > 1 and not full2
    return _Form(not (config.decompose_both and r < max(sizes["l"], sizes["m"]) / 2), full2, has_t2)


def _new_sizes(config: LoKrConfig, target: Target) -> dict[str, int]:
    """Return PEFT's sizes for a new module; "nw" is n with the window."""
    (l, k), (m, n) = (split_size(size, config.decompose_factor) for size in (target.out_size, target.in_size))
    window = (*target.window, 1, 1)
    return {"l": l, "k": k, "m": m, "n": n, "nw": n * math.prod(window), "x": window[0], "y": window[1]}


def _axes(config: LoKrConfig, target: Target, form: _Form, r: int) -> dict[str, dict[str, int]]:
    """Return `{tensor: {axis: size}}`, with the sizes of an existing adapter where there is one."""
    names = {"lokr_w1": "l m"} if form.full1 else {"lokr_w1_a": "l r", "lokr_w1_b": "r m"}
    if form.full2:
        names |= {"lokr_w2": "k n x y"[: 2 * len(target.match.weight.right) - 1]}
    elif form.has_t2:
        names |= {"lokr_t2": "r r2 x y", "lokr_w2_a": "r k", "lokr_w2_b": "r n"}
    else:
        names |= {"lokr_w2_a": "k r", "lokr_w2_b": "r nw"}

    def size(tensor: str, position: int, axis: str) -> int:
        return r if axis in ("r", "r2") else target.own_size(tensor, position, lambda: _new_sizes(config, target)[axis])

    axes = {t: {a: size(t, i, a) for i, a in enumerate(text.split())} for t, text in names.items()}
    sizes = {axis: size for each in axes.values() for axis, size in each.items()}
    if target.is_known and target.found:
        made = sizes["l"] * sizes["k"], sizes["m"] * math.prod(sizes.get(a, 1) for a in ("n", "nw", "x", "y"))
        wanted = target.out_size, target.in_size * math.prod(target.window)
        if made != wanted:
            raise MismatchError(
                f"{target.leaf}: the Kronecker product of the adapter's matrices has shape {made}, but the weight has"
                f" {wanted}; load the adapter into the model that it was trained on"
            )
    return axes
