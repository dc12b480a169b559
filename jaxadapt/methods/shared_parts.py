"""The parts that several methods share: projections, rotations of inputs, spectra, and the factors of LyCORIS."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.core.errors import MismatchError, raise_listed
from jaxadapt.methods.matrix import (
    CALL_KEY,
    Array,
    Draw,
    Effects,
    FactoredMethod,
    MatrixMethod,
    MethodTensor,
    OwnHparams,
    Params,
    Shapes,
    Start,
    Target,
    Targets,
    TorchRandom,
    at_least_float32,
    axes_tensor,
    own_tensor,
)

# ---------------------------------------------------------------- random projections


class Projected(FactoredMethod):
    """A change from random projections that all modules share, W + (b∘B)·(d∘A), with the vectors b and d of a module.

    A has `parts` times r rows, and d as many values; the first r of them give the change.
    """

    parts = 1

    def shared(self, config: Any, targets: Targets, found: Shapes) -> tuple[MethodTensor, ...]:
        a, b = (found.get(self._name(side)) for side in "AB")
        inputs = max(target.in_size for target in targets) if a is None else a[-1]
        outputs = max(target.out_size for target in targets) if b is None else b[0]
        check_projections(
            targets,
            (
                (self._name("A"), inputs, "inputs", lambda target: target.in_size),
                (self._name("B"), outputs, "outputs", lambda target: target.out_size),
            ),
        )
        shapes, saved = {"A": (self.parts * config.r, inputs), "B": (outputs, config.r)}, config.save_projection
        return tuple(
            own_tensor(self._name(side), shape, trained=False, optional=True, in_file=saved)
            for side, shape in shapes.items()
        )

    def init(self, config: Any, tensor: MethodTensor, start: Start) -> Draw | Array:
        if tensor.name == self._name("lambda_b"):
            return Draw("constant", 0.0 if config.init_weights else 1.0)
        if tensor.name == self._name("lambda_d"):
            return Draw("constant", config.d_initial) if config.init_weights else Draw("normal", 1.0)
        # PyTorch's Kaiming-uniform (a = 0) of the last axis; B's numbers follow A's.
        random, shapes = TorchRandom(config.projection_prng_key), {n: start.shared[n] for n in map(self._name, "AB")}
        drawn = {name: random.uniform(x, -math.sqrt(6 / x[-1]), math.sqrt(6 / x[-1])) for name, x in shapes.items()}
        return drawn[tensor.name]

    def factors(self, own: OwnHparams, params: Params, shape: tuple[int, int]) -> tuple[Array, Array]:
        out, inputs = shape
        b = params[self._name("B")][:out]
        d = params[self._name("lambda_d")][: b.shape[1], None]
        return d * params[self._name("A")][: len(d), :inputs], params[self._name("lambda_b")][:, None] * b

    def after(self, own: OwnHparams, params: Params, x: Array, y: Array) -> Array:
        b = params[self._name("B")][: y.shape[-1]]
        return y + params[self._name("lambda_b")] * jnp.einsum("...r,or->...o", self.hidden(params, x, b.shape[1]), b)

    def hidden(self, params: Params, x: Array, rows: int) -> Array:
        """Return the first values of d∘(A·x), (…, rows)."""
        d, a = params[self._name("lambda_d")][:rows], params[self._name("A")][:rows, : x.shape[-1]]
        return d * jnp.einsum("...i,ri->...r", x.astype(d.dtype), a)

    def _name(self, end: str) -> str:
        return f"{self.peft_type.lower()}_{end}"


def check_projections(targets: Targets, needs: Sequence[tuple[str, int, str, Callable[[Target], int]]]) -> None:
    """Raise `MismatchError` if shared projections are too small for a module of the base.

    Args:
        needs: `(tensor, size, name of the size, function of the size that a module needs)`.
    """
    raise_listed(
        MismatchError,
        "the adapter's shared tensors are too small for these modules, so the adapter is of another base model:",
        [
            f"{next(iter(target.modules))} has {needed} {axis}, {name} has {size}"
            for target in targets
            if target.is_known
            for name, size, axis, need in needs
            if (needed := need(target)) > size
        ],
    )


# ---------------------------------------------------------------- rotations


def check_window(target: Target, method: str) -> None:
    """Raise `ConfigError` for the convolutions whose inputs PEFT does not rotate."""
    window, groups = target.window, target.match.weight.groups
    if window and (len(window) != 2 or window[0] != window[1] or groups > 1):
        raise target.refuse(
            f"{method} adapts 2-D convolutions with a square window and one group; found window {window} and"
            f" {groups} groups. Remove the module from target_modules"
        )


def cayley(k: Array) -> Array:
    """Return the orthogonal blocks (I − K)·(I + K)⁻¹ of skew-symmetric blocks (blocks, b, b)."""
    eye = jnp.broadcast_to(jnp.eye(k.shape[-1], dtype=k.dtype), k.shape)
    return jnp.linalg.solve(eye + k, eye - k)


def turn(rows: Array, blocks: Array) -> Array:
    """Return the rows (…, n) times the block-diagonal matrix of blocks (n/b, b, b)."""
    split = rows.reshape(*rows.shape[:-1], len(blocks), -1).astype(blocks.dtype)
    return jnp.einsum("...rk,rkc->...rc", split, blocks).reshape(rows.shape)


class Rotation(MatrixMethod):
    """A rotation of the inputs. A convolution's kernel is one matrix (out, channels·window)."""

    kinds = frozenset({"linear", "conv"})
    changes = Effects("changes", form="use", reads=True)

    @abc.abstractmethod
    def turned(self, own: Any, params: Params, flat: Array, undo: bool) -> Array:
        """Return the effective weight of a weight (out, in), or with `undo` the weight of an effective one."""

    def matrix(self, own: Any, params: Params, w: Array) -> Array:
        return self.turned(own, params, w.reshape(len(w), -1), undo=False).reshape(w.shape)

    def unmatrix(self, own: Any, params: Params, w: Array) -> Array:
        return self.turned(own, params, w.reshape(len(w), -1), undo=True).reshape(w.shape)


# ---------------------------------------------------------------- spectra


@dataclasses.dataclass(frozen=True)
class SpectrumHparams:
    """The hyperparameters of a site.

    Attributes:
        count: the number of values, a number or a `PerEntry`.
        scaling: the factor of the change.
        seed: the seed of the positions.
        order: half the length of the wavelet's filters; 0 for no wavelet.
    """

    count: Any
    scaling: float
    seed: int
    order: int = 0


class Spectrum(MatrixMethod):
    """A change with trained values at few random positions of its spectrum; `scaled` is the tensor of the values."""

    row_numbers = frozenset({"count", "scaling"})
    row_padded = frozenset({"r"})

    @abc.abstractmethod
    def count(self, config: Any, target: Target, module: str) -> int:
        """Return the number of values of a module."""

    def tensors(self, config: Any, target: Target) -> tuple[MethodTensor, ...]:
        count = functools.partial(self.count, config, target)
        size = target.rank(count)
        if target.is_known and size > target.in_size * target.out_size:
            raise target.refuse(
                f"expected an n_frequency of at most {target.in_size * target.out_size}, the number of entries of the"
                f" weight, found {size}"
            )
        return target.with_ranks([axes_tensor(name, "r", (("r", size),)) for name in self.scaled], count)

    def own(self, config: Any, target: Target) -> SpectrumHparams:
        return SpectrumHparams(
            target.value(functools.partial(self.count, config, target)), config.scaling, config.random_loc_seed
        )


@functools.lru_cache(maxsize=64)
def positions(seed: int, outputs: int, inputs: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the first `count` entries of PyTorch's permutation of a weight's entries."""
    return np.divmod(TorchRandom(seed).permutation(outputs * inputs, count), inputs)


def used_values(values: Array, count: Any) -> Array:
    """Return the values of one module in float32; those beyond its own number are zero and get no gradient."""
    return jnp.where(np.arange(len(values)) < count, at_least_float32(values), 0)


# ---------------------------------------------------------------- lycoris


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

    def own(self, config: Any, target: Target) -> DroppedHparams:
        def scale(module: str) -> float:
            return find_pattern_value(config.alpha_pattern, module, config.alpha) / config.rank_of(module)

        return DroppedHparams(
            target.value(scale),
            config.rank_dropout,
            config.module_dropout,
            unscaled_dropout=not config.get("rank_dropout_scale", True),
        )


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
