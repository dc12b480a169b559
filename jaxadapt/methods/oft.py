"""OFT (Qiu et al. 2023, arXiv:2306.07280) with PEFT's conventions: y = W·(Rᵀ·x) + b, R block-diagonal and orthogonal.

`oft_R` (blocks, b·(b−1)/2) holds the upper triangles of the skew-symmetric K, row by row. R is a series in K, or
exactly (I − K)·(I + K)⁻¹. A convolution's kernel is one matrix (out, channels·window). An embedding's rows are rotated
after the lookup, E·R, with `oft_embedding_R`. The arithmetic follows PEFT's `tuners/oft/layer.py`, with its faults:

- The series approximates (I + K)·(I − K)⁻¹, so the two settings of `use_cayley_neumann` turn in opposite directions.
- The last term of the series has the factor 1, not 2. A series of three terms has the power K³, as that of four terms.
- A block size that does not divide the inputs becomes the nearest one that does; here with a warning.
- PEFT's layer rotates the patches of a convolution's input and adds them up to a new input, in the wrong places: it
  reads (channels, positions, pixels) as (channels, pixels, positions). With a window over several pixels this changes
  the input even with R = I, and no kernel computes it. PEFT's merge turns the kernel instead, whose outputs differ.
  Here the layer is PEFT's, and a merge is refused. The patches are those of the input before the convolution pads it; a
  layer that pads it in a mode of its own (circular, reflect) does so before, and PEFT after.
- PEFT's layer rotates the input by the first of several active adapters first, its merge by the last. Here it is the
  first in both.
- PEFT never applies `module_dropout`. Here it has no effect either, and a new adapter warns.
- PEFT gives `oft_R` of a convolution the square of the window's first size, so only square windows are accepted.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays import products
from jaxadapt.configs.base import release_of
from jaxadapt.configs.full_rank import OFTConfig
from jaxadapt.core.errors import AttachError, ConfigError, bullets, warn
from jaxadapt.methods.matrix import (
    Array,
    Draw,
    Drop,
    Effects,
    Examples,
    MatrixHparams,
    MethodTensor,
    Operation,
    Params,
    Rotation,
    Start,
    Strings,
    Target,
    Use,
    at_least_float32,
    cayley,
    check_window,
    layout_of,
    own_tensor,
    tensor_roles,
    turn,
)


@dataclasses.dataclass(frozen=True)
class OftHparams:
    """The hyperparameters of a site.

    Attributes:
        terms: the terms of the series, 0 for the exact rotation.
        eps: the radius, 0 for none.
        kind: the kind of the weight: rows of an embedding are rotated, and patches of the image of a convolution.
        window: the pixels of a patch, 0 if the base is not known.
    """

    terms: int
    eps: float
    kind: str = "linear"
    window: int = dataclasses.field(default=0, compare=False)


class Oft(Rotation, peft_type="OFT"):
    """A rotation of blocks of the inputs."""

    kinds: frozenset[str] = frozenset({"linear", "conv", "embedding"})
    roles: Strings = tensor_roles(vector="oft_R oft_embedding_R")
    examples: Examples = (
        {"oft_block_size": 2},
        {"oft_block_size": 0, "r": 2, "use_cayley_neumann": False},
        {"oft_block_size": 4, "block_share": True, "coft": True, "eps": 0.3, "num_cayley_neumann_terms": 3},
    )

    def check(self, config: OFTConfig) -> None:
        if config.use_cayley_neumann and release_of(config.peft_version) < (0, 18):
            raise ConfigError(
                "cannot apply OFT with use_cayley_neumann from a PEFT before 0.18, which used another series."
                " Train the adapter again, or set use_cayley_neumann=False if it was trained with False"
            )

    def tensors(self, config: OFTConfig, target: Target) -> tuple[MethodTensor, ...]:
        check_window(target, "OFT")
        name = "oft_embedding_R" if target.kind == "embedding" else "oft_R"
        found = target.found.get(name)
        if found is None:
            size = target.out_size if target.kind == "embedding" else target.in_size * math.prod(target.window)
            wanted = config.oft_block_size or config.r
            divisors = (n for n in range(1, size + 1) if size % n == 0)
            given = min(divisors, key=lambda n: (abs(n - wanted), n))  # as in PEFT, the smaller of two equally near
            if given != wanted:
                warn(f"{target.leaf}: OFT with blocks of {given}, because {wanted} does not divide the size {size}")
            blocks, block = (size // given, given) if config.oft_block_size else (given, size // given)
            found = (1 if config.block_share else blocks, block * (block - 1) // 2)
        return (own_tensor(name, found, f".{name}.weight"),)

    def own(self, config: OFTConfig, target: Target) -> OftHparams:
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
        return OftHparams(terms, config.eps if config.coft else 0.0, target.kind, math.prod(target.window))

    def warnings(self, sites: Mapping[str, MatrixHparams]) -> list[str]:
        leaves = [leaf for leaf, hparams in sites.items() if hparams.own.kind == "conv" and hparams.own.window > 1]
        warning = (
            "OFT on convolutions with a window of several pixels computes what PEFT's layer does, which adds up the"
            " patches of the input in other places: even a new adapter changes the output. No kernel does this, so a"
            f" merge is refused, and PEFT's own merge gives other outputs:\n{bullets(leaves)}"
        )
        return [warning] if leaves else []

    def effect(self, own: OftHparams) -> Effects:
        return Effects("changes", form="use", reads=True, order="weight" if own.kind == "embedding" else "input")

    def init(self, config: OFTConfig, tensor: MethodTensor, start: Start) -> Draw:
        if config.module_dropout:
            warn(
                "OFT: module_dropout has no effect, because PEFT does not apply it; set it to 0.0 to avoid this warning"
            )
        return Draw("constant", 0.0) if config.init_weights else Draw("normal", 0.1)

    def input(self, hparams: MatrixHparams, params: Params, use: Use | Operation, x: Array, w: Array) -> Array:
        """Return rotated inputs: of an image the sum of its patches as PEFT places them; ids of a lookup stay."""
        if hparams.own.kind == "embedding":
            return x
        if isinstance(use, Use):
            return super().input(hparams, params, use, x, w)
        slide, layout = use.slide, layout_of(use.axes)
        window = [layout.left.index(name) for group in layout.right[2:] for name in group]
        if slide is None or window != sorted(window):
            raise AttachError(
                "OFT adapts no convolution with a dilation, as in PEFT, or with a transposed window. Remove the module"
                " from target_modules"
            )
        inputs = layout.weight_to_torch(w).shape[1:]
        size = math.prod(inputs)
        one_hot = dataclasses.replace(layout, scale=None, shift=0.0).weight_from_torch(
            tuple(size if axis in use.axes.out_axes else n for axis, n in enumerate(w.shape)),
            jnp.eye(size, dtype=jnp.promote_types(x.dtype, jnp.float32)).reshape(size, *inputs),
        )

        def change(own: OftHparams, p: Params, x: Array) -> Array:
            wide = x.astype(one_hot.dtype)
            patches = slide(wide, one_hot)
            turned = turn(jnp.moveaxis(patches, 1, -1), _blocks(own, p, size))
            turned = jnp.moveaxis(turned.reshape(*turned.shape[:-1], inputs[0], -1), -2, 1)  # positions before pixels
            placed = turned.reshape(patches.shape).astype(wide.dtype)  # read as pixels before positions
            (summed,) = jax.linear_transpose(lambda x: slide(x, one_hot), wide)(placed)
            return summed

        return self._map(hparams, params, layout, change, (x, False)).astype(x.dtype)

    def output(
        self, hparams: MatrixHparams, params: Params, use: Use | Operation, x: Array, y: Array, drop: Drop | None,
        w: Array,
    ) -> Array:  # fmt: skip
        if hparams.own.kind == "conv":
            return y
        if hparams.own.kind != "embedding":
            return super().output(hparams, params, use, x, y, drop, w)
        if isinstance(use, Use):  # in PEFT the head tied to an embedding is a module of its own, which is not adapted
            return y if use.transposed else products.run_use(use, x, self.weight(hparams, params, use.axes, w))
        rows = jnp.moveaxis(y, use.out, -1)
        return jnp.moveaxis(turn(rows, _blocks(hparams.own, params, rows.shape[-1])), -1, use.out).astype(y.dtype)

    def before(self, own: OftHparams, params: Params, x: Array) -> Array:
        return turn(x, _blocks(own, params, x.shape[-1]))

    def matrix(self, own: OftHparams, params: Params, w: Array) -> Array:
        if math.prod(w.shape[2:]) > 1:
            raise AttachError(
                "OFT on a convolution with a window has no effective kernel: its layer changes the whole input, as"
                " PEFT's does, whose own merge gives other outputs. Keep the adapter beside the model"
            )
        return super().matrix(own, params, w)

    def turned(self, own: OftHparams, params: Params, flat: Array, undo: bool) -> Array:
        blocks = _blocks(own, params, flat.shape[1])
        blocks = jnp.linalg.inv(blocks) if undo else blocks
        return turn(flat, blocks if own.kind == "embedding" else blocks.swapaxes(1, 2))


def _blocks(own: OftHparams, params: Params, size: int) -> Array:
    """Return the blocks of R, (size/b, b, b)."""
    k = skew(params["oft_embedding_R" if own.kind == "embedding" else "oft_R"])
    if own.eps:  # PEFT projects the parameters themselves, so the gradient does not see it
        norm, limit = jnp.linalg.norm(k, axis=(1, 2), keepdims=True), own.eps / math.sqrt(len(k))
        k = k + jax.lax.stop_gradient(jnp.where(norm <= limit, k, k * (limit / norm)) - k)
    r = cayley_series(k, own.terms) if own.terms else cayley(k)
    return jnp.broadcast_to(r, (size // r.shape[-1], *r.shape[1:]))


def skew(vectors: Array) -> Array:
    """Return the skew-symmetric blocks (blocks, b, b) with these upper triangles (blocks, b·(b−1)/2), row by row.

    The result is float32 or wider, because there is no inverse in 16 bits.

    >>> skew(jnp.array([[5.0]])).tolist()
    [[[0.0, 5.0], [-5.0, 0.0]]]
    """
    size = round((1 + math.sqrt(1 + 8 * vectors.shape[-1])) / 2)
    rows, columns = np.triu_indices(size, 1)
    vectors = at_least_float32(vectors)
    upper = jnp.zeros((len(vectors), size, size), vectors.dtype).at[:, rows, columns].set(vectors)
    return upper - jnp.swapaxes(upper, 1, 2)


def cayley_series(k: Array, terms: int) -> Array:
    """Return PEFT's series for (I + K)·(I − K)⁻¹: I + 2·K + 2·K² + … + Kⁿ, with the factor 1 for the last power.

    It has the power K³ with three terms, as with four.
    """
    identity = jnp.broadcast_to(jnp.eye(k.shape[-1], dtype=k.dtype), k.shape)
    if terms < 3:
        return identity + 2 * k if terms > 1 else identity
    *powers, last = itertools.accumulate([k] * max(3, terms - 1), jnp.matmul)
    return sum((2 * power for power in powers), identity) + last
