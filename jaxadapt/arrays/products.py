"""The uses of a weight in a computation, and the products that methods compute with them.

`Use` describes one product `y = x · w` letter by letter, from the roles of the weight's axes (`layout.Axes`).
Methods compute from these two values, so one implementation serves `nnx.Linear`, `nn.DenseGeneral`, an einsum, and a
`dot_general` in a custom module. `PerEntry` is a number per layer of a stacked leaf, and within it per expert and
fused part.

`lora_A` is (batch..., r, groups, in...) and `lora_B` is (batch..., out..., r), for all variants of LoRA. Only
grouped convolutions have the axis of groups: A takes all input channels, and B gives the output channels of its
group.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays.layout import Axes
from jaxadapt.core.errors import AttachError

# ---------------------------------------------------------------- uses of a weight


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXY"
RANK = "Z"  # the letter of the rank axis, which only the adapter has; not one of LETTERS


@dataclasses.dataclass(frozen=True)
class Use:
    """One product `y = einsum("x,w->y", x, w)`, with a letter for each axis of `x`, `w` and `y`.

    The axes of `x` and `y` are split so that each corresponds to at most one axis of `w`. A plain layer sums over the
    letters of `axes.in_axes`. A tied weight may be used transposed (`transposed`).

    >>> use = Use("bd", "dnh", "bnh", Axes((0,), (1, 2)))
    >>> use.letters("in"), use.letters("out"), use.transposed
    ('d', 'nh', False)
    """

    x: str
    w: str
    y: str
    axes: Axes

    def letters(self, role: str) -> str:
        """Return the letters of the weight axes of `role` ("in", "out" or "batch")."""
        return "".join(self.w[i] for i in getattr(self.axes, f"{role}_axes"))

    @property
    def transposed(self) -> bool:
        """True if the product sums over the output axes, as a tied embedding's `attend` does."""
        return not set(self.letters("in")) <= set(self.x)


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One use of a weight in a convolution, a lookup or a ragged product, as a function of the weight.

    Attributes:
        run: `run(x, w)` computes the use with any weight of the same axes. The size of the output axis may differ; in a
            grouped convolution also that of the input channels, in a ragged product that of the inputs.
        out: the position of the output axis in the result.
        axes: the roles of the weight's axes.
        transposed: True if a ragged product sums over the output axis instead of the input axis.
        slide: `slide(x, w)` is a convolution with stride 1 and without padding. Its result is (batch, out,
            positions...), with the positions in the order of the weight's axes. None for other uses and for dilated
            convolutions.
    """

    run: Callable[[Any, Any], Any]
    out: int
    axes: Axes
    transposed: bool = False
    slide: Callable[[Any, Any], Any] | None = None


def contradiction_message(keymap_axes: Axes, layer_axes: Axes) -> str:
    """Return the message for a keymap that swaps the input and output axes of a layer."""
    return (
        f"the keymap's {keymap_axes} contradicts the layer's own {layer_axes}; pass a KeyMap with the right axes, or"
        " keymap='generic' to take the axes from the layers. With the generic keymap, create the adapter from the"
        " model's call: by the init of the adapted Linen module, or with example=[…] for an NNX model. For a PyTorch"
        " parameter stored as (in, out), such as a Conv1D's, set fan_in_fan_out=True on its entry"
    )


def transposed_axes(axes: Axes, products: Sequence[Axes], shape: Sequence[int]) -> Axes | None:
    """Return the axes by a weight's products, if no product sums over the input axes of `axes`; else None.

    A product is given as the weight's summed, free and shared axes: `in_axes`, `out_axes` and `batch_axes`.
    Axes of size 1 are ignored. The shape of a square matrix does not reveal its input axis, and with the wrong axes its
    update would be saved transposed.

    >>> straight, back = Axes(in_axes=(0,), out_axes=(1,)), Axes(in_axes=(1,), out_axes=(0,))
    >>> transposed_axes(straight, [back], (4, 4))
    Axes(in_axes=(1,), out_axes=(0,), batch_axes=(), parts=None)
    >>> transposed_axes(straight, [straight, back], (4, 4))
    """
    long = {axis for axis, size in enumerate(shape) if size != 1}
    if not products or any(set(use.in_axes) & long == set(axes.in_axes) & long for use in products):
        return None
    return Axes(products[0].in_axes, products[0].out_axes, products[0].batch_axes)


# ---------------------------------------------------------------- a number per entry


Array = Any
Params = Mapping[str, Any]

LAYER = "layer"
"""The key of the current layer's number among the parameters of a site whose layers differ."""

USED = "used"
"""The tensor with 1 for each adapted entry and 0 for the others, where every row of a batch has its own adapter."""


@dataclasses.dataclass(frozen=True)
class PerEntry:
    """A number per entry of a leaf: per stacked layer, and within it per expert and fused part.

    It is part of a site's hparams. A layer looks up its own numbers by the layer number in its parameters.

    Attributes:
        values: the numbers, in the order of the stacked axes and then of the batch axes.
        batch: the sizes of the batch axes.
    """

    values: tuple[float, ...]
    batch: tuple[int, ...] = ()

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.values) // math.prod(self.batch)

    def layer_values(self, params: Params) -> Array:
        """Return the values of the current layer, float32 (batch...). Raises `AttachError` without a layer number."""
        by_layer = np.array(self.values, np.float32).reshape(self.layers, *self.batch)
        if self.layers == 1:
            return jnp.asarray(by_layer[0])
        number = params.get(LAYER)
        if number is None or number.size != 1:
            found = "found none" if number is None else f"found numbers of shape {list(number.shape)}"
            raise AttachError(
                f"cannot run a layer: the {self.layers} layers of this adapter differ in rank, scale or selection, so"
                f" each needs its own layer number, but {found}. Make the model's nnx.scan or nnx.vmap split variables"
                " of type jaxadapt.models.LayerNumber along axis 0, as nnx.StateAxes({nnx.Param: 0, ...: 0}) does"
            )
        return jnp.asarray(by_layer)[number.reshape(())]

    def __str__(self) -> str:
        return f"{min(self.values):g} to {max(self.values):g}"


def needs_layer_number(hparams: Any) -> bool:
    """Return True if the arithmetic of a site depends on the layer's number."""
    if isinstance(hparams, PerEntry):
        return hparams.layers > 1
    if not dataclasses.is_dataclass(hparams) or isinstance(hparams, type):
        return False
    return any(needs_layer_number(getattr(hparams, field.name)) for field in dataclasses.fields(hparams))


def entry_values(values: Any, entries: tuple[int, ...]) -> Array:
    """Return one number, or a `PerEntry`, as a float32 array of numpy with the shape `entries`."""
    array = np.asarray(values.values if isinstance(values, PerEntry) else values, np.float32)
    return np.broadcast_to(array, entries) if array.ndim == 0 else array.reshape(entries)


def expand_leading(values: Array, x: Array) -> Array:
    """Reshape values (batch...) to broadcast with an array (batch..., …), and cast them to its dtype."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim)).astype(x.dtype)


def mask_unadapted(used: PerEntry | None, params: Params, x: Array, otherwise: float) -> Array:
    """Return `x` (batch..., …) with the entries that are not adapted set to a constant, which has no gradient."""
    return (
        x
        if used is None
        else jnp.where(expand_leading(used.layer_values(params), x) > 0, x, jnp.array(otherwise, x.dtype))
    )


# ---------------------------------------------------------------- fourier transforms


def transform(function: Callable[[Array], Array], x: Array) -> Array:
    """Return `function(x)` for a transform over the last axes, also in the gradient.

    >>> transform(jnp.fft.rfft, jnp.ones(4)).shape
    (3,)
    """
    return _row_major(function(_row_major(x)))


def _row_major(x: Array) -> Array:
    return jax.lax.optimization_barrier(jnp.ravel(x)).reshape(x.shape)


# ---------------------------------------------------------------- low-rank factors


def low_rank_delta(
    use: Use | Operation, scale: float | Array, groups: int, a: Array, b: Array, x: Array, y: Array
) -> Array:
    """Return s·B·A·x in the common dtype of x and the factors, with the sharding of `y`.

    Args:
        use: the product, or the operation, that uses the weight.
        scale: s, one number or an array (batch...).
        groups: the number of groups of a convolution; 1 otherwise.
        a, b: the factors.
        x, y: the input and the output of the use.
    """
    if isinstance(use, Use):
        is_number = isinstance(scale, float)
        return _use_delta(use, scale if is_number else 1.0, None if is_number else scale, a, b, x, y)
    if not isinstance(scale, float):
        a, scale = scale_factor(scale, a), 1.0
    if use.axes.batch_axes:
        factors = _batched_as_weight(use.axes, a, use.axes.out_axes), _batched_as_weight(use.axes, b, use.axes.in_axes)
        first, last = factors[::-1] if use.transposed else factors
        return use.run(use.run(x.astype(first.dtype), first) * scale, last)
    h = use.run(x.astype(a.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, _as_weight(use.axes, groups, a))
    h = jnp.moveaxis(h * scale, use.out, -1)
    if groups > 1:
        h = h.reshape(*h.shape[:-1], groups, -1)
        b = b.reshape(groups, -1, b.shape[-1])
        h = einsum("...gr,gor->...go", h, b).reshape(*h.shape[:-2], -1)
    else:
        h = h @ b.T
    return jnp.moveaxis(h, -1, use.out)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _use_delta(use: Use, scale: float, scales: Array | None, a: Array, b: Array, x: Array, y: Array) -> Array:
    """Return s·B·A·x for a product, with s a number `scale` or an array `scales` (batch...).

    Jitted, so that a model of many equal layers traces and linearizes it once. Inlined, so that the compiled program is
    the same as without jit.
    """
    batch = use.letters("batch")
    factors = (a, batch + RANK + use.letters("in")), (b, batch + use.letters("out") + RANK)
    first, last = factors[::-1] if use.transposed else factors
    free = set(use.w) - set(use.x) - set(batch)
    mid = "".join(c for c in use.y if c not in free)
    mid += "".join(c for c in batch if c not in mid) + RANK
    x = x.astype(first[0].dtype)
    h = einsum(f"{use.x},{first[1]}->{mid}", x, first[0], on=explicit_sharding(mid, (x, use.x), first))
    h = h * scale if scales is None else h * expand_to_letters(scales, batch, mid).astype(h.dtype)
    return einsum(f"{mid},{last[1]}->{use.y}", h, last[0], on=explicit_sharding(use.y, (y, use.y)))


def scale_factor(scale: float | Array, factor: Array) -> Array:
    """Multiply a factor (batch..., …) by the scale, one number or an array (batch...)."""
    return scale * factor if isinstance(scale, float) else expand_leading(scale, factor) * factor


def _as_weight(axes: Axes, groups: int, a: Array) -> Array:
    """Transpose A to the weight's axis order, with r in place of the output axes."""
    if groups > 1:
        a = a.reshape(a.shape[0], groups * a.shape[2], *a.shape[3:])
    return a.transpose([0 if i in axes.out_axes else 1 + axes.in_axes.index(i) for i in range(axes.rank)])


def _batched_as_weight(axes: Axes, factor: Array, replaced: tuple[int, ...]) -> Array:
    """Transpose A or B of experts to the weight's axis order, with r in place of the axes `replaced`."""
    order = axes.batch_axes + (replaced + axes.in_axes if replaced == axes.out_axes else axes.out_axes + replaced)
    return factor.transpose([order.index(i) for i in range(axes.rank)])


def multiply_factors(axes: Axes, a: Array, b: Array) -> Array:
    """Compute B·A in the weight's axis order."""
    batch, inputs, out = map(_letters, (axes.batch_axes, axes.in_axes, axes.out_axes))
    return einsum(f"{batch}{RANK}{inputs},{batch}{out}{RANK}->{LETTERS[: axes.rank]}", a, b)


def add_product(axes: Axes, w: Array, scale: float | Array, a: Array, b: Array) -> Array:
    """Compute W + scale·B·A for a weight that is computed once and kept.

    Up to rank `_MAX_TERMS`, the rank-one terms are added in one expression. Under jit that is one pass over the weight,
    without another array of its size. For larger ranks a product is faster; it is stored in float32 before it is added.
    A sum over an axis r is not used: XLA on CPU gives it to YNNPACK, which in jaxlib 0.10.2 reads the wrong rows of a
    factor for many shapes, such as 256 × 256 in PyTorch's layout. benchmarks/README.md lists the other alternatives.
    """
    rank_axis = len(axes.batch_axes)
    if not isinstance(scale, float):
        a, scale = scale_factor(scale, a), 1.0
    if a.shape[rank_axis] > _MAX_TERMS:
        return w + scale * multiply_factors(axes, a, b)
    # r precedes the other axes, so that each term is contiguous. The barrier keeps this transpose out of the sum.
    a, b = jax.lax.optimization_barrier((scale * a, jnp.moveaxis(b, -1, rank_axis)))
    over, batch = LETTERS[: axes.rank], _letters(axes.batch_axes)
    terms = [
        expand_to_letters(jax.lax.index_in_dim(a, k, rank_axis, keepdims=False), batch + _letters(axes.in_axes), over)
        * expand_to_letters(
            jax.lax.index_in_dim(b, k, rank_axis, keepdims=False), batch + _letters(axes.out_axes), over
        )
        for k in range(a.shape[rank_axis])
    ]
    return w + functools.reduce(jnp.add, terms)


_MAX_TERMS = 16  # the largest rank for which the terms are faster than a product


def _letters(axes: Sequence[int]) -> str:
    return "".join(LETTERS[i] for i in axes)


def run_use(use: Use | Operation, x: Array, w: Array) -> Array:
    """Compute a use with another weight of the same shape."""
    return use.run(x, w) if isinstance(use, Operation) else einsum(f"{use.x},{use.w}->{use.y}", x, w)


def expand_to_letters(vector: Array, letters: str, over: str) -> Array:
    """Reshape `vector`, whose axes are `letters`, to broadcast with an array whose axes are `over`."""
    order = sorted(range(len(letters)), key=lambda i: over.index(letters[i]))
    sizes = dict(zip(letters, vector.shape, strict=True))
    return vector.transpose(order).reshape([sizes.get(c, 1) for c in over])


@dataclasses.dataclass(frozen=True)
class AxisLayout:
    """The layout of a view of a weight: for each axis of the view, the axes of the weight merged in it.

    Reshapes add and remove axes of size 1, so such weight axes are listed only if they can be tracked.
    """

    name: str
    sizes: tuple[int, ...]  # the weight's own shape
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def identity(cls, name: str, shape: tuple[int, ...]) -> AxisLayout:
        """Return the layout of the weight itself."""
        return cls(name, shape, tuple((i,) for i in range(len(shape))))

    def weight_axes(self, axes: Iterable[int]) -> tuple[int, ...]:
        """Return the weight's axes that these axes of the view contain."""
        return tuple(a for i in axes for a in self.groups[i])

    def spell(self, axes: Iterable[int], unit: bool = False) -> list[tuple[str, int]]:
        """Return the letters and sizes of some of the weight's axes: of those of size 1, or of all others."""
        return [(LETTERS[a], self.sizes[a]) for a in axes if (self.sizes[a] == 1) == unit]

    def reshaped(self, shape: Sequence[int]) -> AxisLayout | None:
        """Return the layout after a row-major reshape to `shape`; None if that splits an axis of the weight."""
        rest = list(self.weight_axes(range(len(self.groups))))
        groups: list[tuple[int, ...]] = []
        for size in shape:
            group: list[int] = []
            if size == 1 and rest and self.sizes[rest[0]] == 1:
                group.append(rest.pop(0))
            while rest and math.prod(self.sizes[a] for a in group) < size:
                axis = rest.pop(0)
                if self.sizes[axis] != 1:
                    group.append(axis)
            if math.prod(self.sizes[a] for a in group) != size:
                return None
            groups.append(tuple(group))
        return dataclasses.replace(self, groups=tuple(groups))


def expand_over_outputs(use: Use | Operation, vector: Array, y_ndim: int) -> Array:
    """Reshape `vector` (batch..., out...) to broadcast with the result of a use."""
    if isinstance(use, Use):
        return expand_to_letters(vector, use.letters("batch") + use.letters("out"), use.y)
    return vector.reshape([-1 if i == use.out else 1 for i in range(y_ndim)])


def expand_over_weight(axes: Axes, vector: Array) -> Array:
    """Reshape `vector` (batch..., out...) to broadcast with the weight."""
    return expand_to_letters(vector, "".join(LETTERS[i] for i in axes.batch_axes + axes.out_axes), LETTERS[: axes.rank])


def einsum(subscripts: str, *operands: Array, on: jax.sharding.NamedSharding | None = None) -> Array:
    """Compute `jax.numpy.einsum`, with the result under the sharding `on` if there is one."""
    return jax.numpy.einsum(subscripts, *operands, out_sharding=on)


def explicit_sharding(letters: str, *operands: tuple[Array, str]) -> jax.sharding.NamedSharding | None:
    """Return the sharding of a product whose axes are `letters`, each sharded as in the first operand that has it.

    Meshes with explicit axes require it for a sum over axes that are sharded in both operands. On other meshes the
    compiler chooses the sharding, and the result is None.
    """
    mesh = jax.typeof(operands[0][0]).sharding.mesh
    if mesh.empty or not mesh.are_all_axes_explicit:
        return None
    specs: dict[str, Any] = {}
    for array, axes in reversed(operands):
        specs |= dict(zip(axes, jax.typeof(array).sharding.spec, strict=True))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(specs.get(letter) for letter in letters)))
