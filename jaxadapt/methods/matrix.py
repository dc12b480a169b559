"""Methods in PyTorch's layout: one weight (out, in) and tensors in the shapes of their files.

`MatrixMethod` converts a site's arrays to PyTorch's layout inside the computation, so that a method is written as its
paper or PEFT writes it, and works for every keymap: split heads, fused parts, scaled and interleaved weights.

Its subclasses here are the kinds of such methods: changes that are a product B·A of two matrices, random projections,
rotations of the inputs, spectra, and LyCORIS, whose training drops rows of the change.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays import products
from jaxadapt.arrays.layout import TorchLayout
from jaxadapt.configs.base import change_of_matrix
from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.core.errors import AttachError, MismatchError, raise_listed
from jaxadapt.methods.base import (
    CALL_KEY,
    Array,
    Axes,
    Change,
    Draw,
    Drop,
    Effects,
    Examples,
    Floats,
    Method,
    MethodTensor,
    Operation,
    Params,
    PerEntry,
    Shapes,
    Start,
    Strings,
    Target,
    Targets,
    TorchRandom,
    Use,
    adapted_entries,
    at_least_float32,
    axes_tensor,
    file_sizes,
    own_tensor,
    shared_value,
    tensor_roles,
)

# The file of a method imports these names from here, wherever they are defined.
__all__ = [
    "CALL_KEY", "Array", "Draw", "Drop", "DroppedHparams", "Effects", "Examples", "FactoredMethod", "Floats",
    "Lycoris", "MatrixHparams", "MatrixMethod", "MethodTensor", "Operation", "OwnHparams", "Params", "Projected",
    "Rotation", "Shapes", "Spectrum", "SpectrumHparams", "Start", "Strings", "Target", "Targets", "TorchRandom",
    "Use", "at_least_float32", "axes_tensor", "cayley", "check_projections", "check_window", "kept_rows",
    "layout_of", "own_tensor", "positions", "shared_value", "split_size", "tensor_roles", "turn", "used_values",
]  # fmt: skip

# ---------------------------------------------------------------- matrix


@dataclasses.dataclass(frozen=True)
class MatrixHparams:
    """The hyperparameters of a site.

    Attributes:
        own: the method's own, a dataclass; its `PerEntry` fields become the number of the current module.
        used: 1 for each adapted entry and 0 for the others; None if all are adapted.
        rows: True if `used` and the numbers of `row_numbers` are tensors, as the rows of a batch have them.
    """

    own: Any
    used: PerEntry | None = None
    rows: bool = False

    def layer_values(self, params: Params) -> tuple[dict[str, Any], Any]:
        """Return the numbers of `own` that differ between entries, and `used`, of the layer that a call is in."""
        fields = vars(self.own) if dataclasses.is_dataclass(self.own) else {}
        own = {name: value.layer_values(params) for name, value in fields.items() if isinstance(value, PerEntry)}
        return own, None if self.used is None else self.used.layer_values(params)


@dataclasses.dataclass(frozen=True)
class OwnHparams:
    """Own hyperparameters of a method.

    Attributes:
        scale: the scale s, a number or a `PerEntry`.
        kind: the weight's kind.
        dropout: the dropout rate.
        variant: the variant of the computation, for methods with several.
        size: a number of the method's own, such as its rank, if the arithmetic needs it; a number or a `PerEntry`.
    """

    scale: Any = None
    kind: str = ""
    dropout: float = 0.0
    variant: str = ""
    size: Any = 0


class MatrixMethod(Method):
    """A method written in PyTorch's layout.

    A subclass defines `delta` (if `Effects.weight` is "adds") or `matrix`. If there is a cheaper way than the effective
    weight, it also defines `before` or `after`, and sets `Effects.form` to "use". All of them get the site's own
    hyperparameters, the tensors in the shapes of one module's file tensors, and the weight in PyTorch's shape.
    """

    torch_layout = True

    row_numbers: frozenset[str] = frozenset()
    """The fields of the method's own hyperparameters that are numbers, and may differ between the rows of a batch."""

    changes: Effects | None = None
    """The effects of the method, if every site has the same ones; None where `effect` decides for each site."""

    def own(self, config: Any, target: Target) -> Hashable:
        """Return the hyperparameters of a site: a frozen dataclass, or None.

        If it has a field `dropout`, that is the dropout rate of the input. By default that is the configuration's field
        with the name of the type, such as `vera_dropout`, or 0. If `output` handles convolutions or lookups, it has a
        field `kind`, the kind of the weight.
        """
        return OwnHparams(dropout=getattr(config, f"{self.peft_type.lower()}_dropout", 0.0))

    def effect(self, own: Any) -> Effects:
        """Return what the method changes at a site.

        By default that is `changes`; without it the method adds to the weight, at each use if it has `after`.
        """
        return self.changes or Effects("adds", form="weight" if type(self).after is MatrixMethod.after else "use")

    def init(self, config: Any, tensor: MethodTensor, start: Start) -> Draw | Array:
        """Return the initial values of one tensor of a module, as an array or a distribution.

        By default the tensors of `scaled` are 0 if `init_weights` is set. Other matrices are drawn as the weights of
        PyTorch's linear layers, and vectors are normal.
        """
        if tensor.name in self.scaled and config.init_weights:
            return Draw("constant", 0.0)
        return Draw.kaiming(start.shape[1]) if len(start.shape) > 1 else Draw("normal", 1.0)

    def delta(self, own: Any, params: Params, w: Array) -> Array:
        """Return the change of the weight, (out, in), for methods that add to the weight."""
        raise NotImplementedError  # a method that adds defines this, another one `matrix`

    def matrix(self, own: Any, params: Params, w: Array) -> Array:
        """Return the effective weight (out, in)."""
        return w + self.delta(own, params, w)

    def unmatrix(self, own: Any, params: Params, w: Array) -> Array:
        """Return the weight (out, in) of an effective weight; raise `AttachError` if it is lost."""
        if self.effect(own).weight != "adds" or self.effect(own).reads:
            raise AttachError(
                f"cannot unmerge {self.peft_type}: its change of a weight depends on the original weight, which a merge"
                " overwrites. Keep the parameters from before the merge"
            )
        return w - self.delta(own, params, w)

    def before(self, own: Any, params: Params, x: Array) -> Array:
        """Return the input that the module gets in place of `x` (…, in)."""
        return x

    def after(self, own: Any, params: Params, x: Array, y: Array) -> Array:
        """Return the output in place of `y` (…, out), for an input `x` (…, in), which is after dropout."""
        return y

    def shift(self, own: Any, params: Params, bias: Array, undo: bool) -> Array:
        """Return the module's bias (out) as the adapter changes it, or its inverse. Needed if `effect` says `bias`."""
        raise AttachError(f"{self.peft_type}: its effect changes the layer's bias, so the method must define `shift`")

    def describe_change(self, config: Any) -> str | None:
        # A module's part of the tensors that all modules share depends on its sizes in the base.
        return None if type(self).delta is MatrixMethod.delta or type(self).shared is not Method.shared else "‖ΔW‖"

    def measure_change(self, config: Any, module: str, arrays: Mapping[str, Any]) -> Change | None:
        """Return the size of `delta`, if it does not read the weight and the file tensors determine its shape."""
        found = {name: tuple(x.shape) for name, x in arrays.items()}
        target = Target.of_file(module, found)
        own, tensors = self.own(config, target), self.tensors(config, target)
        needed = {tensor.name for tensor in tensors if tensor.in_file and not tensor.optional}
        shape = file_sizes(self, config, module, found)
        complete = needed <= arrays.keys() <= {tensor.name for tensor in tensors}
        if self.effect(own).reads or not complete or not all(shape):
            return None
        sizes = {"out": shape[0] or 0, "in": shape[1] or 0}
        if any(found[each.name] != _file_shape(each, sizes) for each in tensors if each.name in found):
            return None
        delta = self.delta(own, {name: jnp.asarray(x) for name, x in arrays.items()}, jnp.zeros(shape))
        return change_of_matrix(np.asarray(delta).astype(np.float64), config.get("r"))

    # ------------------------------------------------------------ the interface

    def hparams(self, config: Any, target: Target) -> MatrixHparams:
        return MatrixHparams(self.own(config, target), adapted_entries(target.modules))

    def effects(self, hparams: MatrixHparams) -> Effects:
        return self.effect(hparams.own)

    def own_hparams(self, hparams: MatrixHparams) -> Any:
        return hparams.own

    def follows_use(self, hparams: MatrixHparams, use: Use) -> bool:
        # A tied head uses the weight in reverse, and fused parts with one input cannot each change it.
        changes_input = type(self).before is not MatrixMethod.before
        fits = not use.transposed and not (changes_input and not set(use.letters("batch")) <= set(use.x))
        return fits or self.kind(hparams) == "embedding"

    def input(self, hparams: MatrixHparams, params: Params, use: Use | Operation, x: Array, w: Array) -> Array:
        if type(self).before is MatrixMethod.before or isinstance(use, Operation):
            return x
        layout = layout_of(use.axes)
        letters = dict(zip(layout.left, use.w, strict=True))
        rows = layout.rows_to_torch("in", letters, x, use.x)

        has_batch = bool(set(use.letters("batch")) & set(use.x))
        changed = self._map(hparams, params, layout, self.before, (rows, has_batch))
        return layout.rows_from_torch("in", letters, x, use.x, changed).astype(x.dtype)

    def output(
        self,
        hparams: MatrixHparams,
        params: Params,
        use: Use | Operation,
        x: Array,
        y: Array,
        drop: Drop | None,
        w: Array,
    ) -> Array:
        if self.effect(hparams.own).form == "weight":  # beside an adapter that changes each use
            new = self.weight(hparams, params, dataclasses.replace(use.axes, parts=None), w)
            return (y + products.run_use(use, x, (new - w).astype(x.dtype))).astype(y.dtype)
        if type(self).after is MatrixMethod.after:
            return y
        assert isinstance(use, Use)
        layout = layout_of(use.axes)
        letters, factor = dict(zip(layout.left, use.w, strict=True)), layout.factor(w.shape)
        x_rows = layout.rows_to_torch("in", letters, x if drop is None else drop(x), use.x)
        y_rows = layout.rows_to_torch("out", letters, y, use.y)
        y_rows = y_rows if factor == 1 else y_rows / factor

        batch = set(use.letters("batch"))
        changed = self._map(hparams, params, layout, self.after, (x_rows, bool(batch & set(use.x))), (y_rows, True))
        changed = changed if factor == 1 else changed * factor
        return layout.rows_from_torch("out", letters, y, use.y, changed).astype(y.dtype)

    def row_hparams(self, hparams: MatrixHparams) -> MatrixHparams:
        own = hparams.own
        if not dataclasses.is_dataclass(own) or isinstance(own, type):
            return MatrixHparams(own, rows=True)
        changes: dict[str, Any] = dict.fromkeys(self.row_numbers)
        changes |= {field.name: 0.0 for field in dataclasses.fields(own) if field.name.endswith("dropout")}
        return MatrixHparams(dataclasses.replace(own, **changes), rows=True)

    def row_params(self, hparams: MatrixHparams, params: Params, entries: tuple[int, ...]) -> dict[str, Array]:
        numbers = {name: getattr(hparams.own, name) for name in self.row_numbers} | {products.USED: hparams.used or 1.0}
        return dict(params) | {name: products.entry_values(x, entries) for name, x in numbers.items()}

    def weight(self, hparams: MatrixHparams, params: Params, axes: Axes, w: Array) -> Array:
        return self._on_weight(hparams, params, axes, w, self.matrix)

    def unweight(self, hparams: MatrixHparams, params: Params, axes: Axes, w: Array) -> Array:
        return self._on_weight(hparams, params, axes, w, self.unmatrix)

    def bias(self, hparams: MatrixHparams, params: Params, axes: Axes, bias: Array, undo: bool = False) -> Array:
        if self.effect(hparams.own).bias is None:
            return bias
        layout = layout_of(axes)
        if self.effect(hparams.own).bias == "adds" and layout.scale is not None:
            raise AttachError(
                f"cannot change the layer's bias with {self.peft_type}: the model stores the layer's weight times a"
                " factor, and the bias may not have it. Keep the adapter beside the model, or exclude the module"
            )
        letters = dict(zip(layout.left, products.LETTERS, strict=False))
        over = "".join(products.LETTERS[i] for i in range(axes.rank) if i not in axes.in_axes)
        mismatch = (
            f"cannot change the layer's bias of shape {bias.shape}: it is not that of the output. Exclude the module"
        )
        if bias.ndim != len(over):
            raise AttachError(mismatch)
        rows = layout.rows_to_torch("out", letters, bias, over)

        try:
            changed = self._map(hparams, params, layout, functools.partial(self.shift, undo=undo), (rows, True))
        except (TypeError, ValueError) as error:  # another size
            raise AttachError(mismatch) from error
        return layout.rows_from_torch("out", letters, bias, over, changed).astype(bias.dtype)

    def _on_weight(self, hparams: MatrixHparams, params: Params, axes: Axes, w: Array, function: Any) -> Array:
        layout = layout_of(axes)
        params = {name: x if name in (products.LAYER, CALL_KEY) else at_least_float32(x) for name, x in params.items()}
        changed = self._map(hparams, params, layout, function, (layout.weight_to_torch(at_least_float32(w)), True))
        return layout.weight_from_torch(w.shape, changed).astype(w.dtype)

    def _map(
        self, hparams: MatrixHparams, params: Params, layout: TorchLayout, change: Any, *arrays: tuple[Array, bool]
    ) -> Array:
        """Return `change(own, params, *arrays)`, mapped over the weight's batch axes.

        An entry that the adapter leaves out keeps the values of the last array.

        Args:
            arrays: the arrays, each with True if it has the batch axes.
        """

        def call(values: Mapping[str, Any], *arrays: Array) -> Array:
            own = dataclasses.replace(hparams.own, **values["own"]) if values["own"] else hparams.own
            with jax.numpy_rank_promotion("allow"):  # a method may multiply rows by a vector
                new, old, used = change(own, values["tensors"], *arrays), arrays[-1], values["used"]
                # NaN stays, where an id is no slot.
                return new if used is None else jnp.where(used != 0, new, old.astype(new.dtype))

        values, mapped = self._module_values(hparams, params, layout), call
        has_batch = {name: 0 if name == CALL_KEY or layout.has_batch(name) else None for name in values["tensors"]}
        axes = ({"own": 0, "used": 0, "tensors": has_batch}, *(0 if has else None for _, has in arrays))
        for _ in layout.batch:
            mapped = jax.vmap(mapped, in_axes=axes)
        return mapped(values, *(x for x, _ in arrays))

    def _module_values(self, hparams: MatrixHparams, params: Params, layout: TorchLayout) -> dict[str, Any]:
        """Return a site's own numbers that differ, its adapted entries and its tensors, with the batch axes first."""
        others = {*self.row_numbers, products.USED} if hparams.rows else {products.LAYER, CALL_KEY}
        tensors = {name: layout.to_torch(name, x) for name, x in params.items() if name not in others}
        tensors |= {name: jax.lax.stop_gradient(x) for name, x in tensors.items() if self.roles.get(name) == "frozen"}
        if CALL_KEY in params:  # another key for each module
            sizes = {x.shape[: len(layout.batch)] for name, x in tensors.items() if layout.has_batch(name)}
            tensors[CALL_KEY] = jax.random.split(params[CALL_KEY], sizes.pop()) if sizes else params[CALL_KEY]
        if hparams.rows:
            own, used = {name: params[name] for name in self.row_numbers}, params[products.USED]
        else:
            own, used = hparams.layer_values(params)
        return {"own": own, "used": used, "tensors": tensors}


def layout_of(axes: Axes) -> TorchLayout:
    """Return PyTorch's layout of a weight."""
    if axes.torch is None:  # made by hand, without a keymap: the order of the axes is PyTorch's
        letters = products.LETTERS[: axes.rank]
        inputs, outputs, batch = (
            tuple(letters[i] for i in role) for role in (axes.in_axes, axes.out_axes, axes.batch_axes)
        )
        return TorchLayout(tuple(letters), (outputs, inputs), batch, inputs, outputs)
    return axes.torch


def _file_shape(tensor: MethodTensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a tensor in a file, from the sizes of the weight's axes."""
    sizes = {**sizes, **dict(tensor.own)}
    return tuple(math.prod(sizes.get(name, 0) for name in group) for group in tensor.torch)


# ---------------------------------------------------------------- factored


class FactoredMethod(MatrixMethod):
    """A method with W + B·A. A subclass defines `factors`, and `delta` or `after` only where they are cheaper."""

    @abc.abstractmethod
    def factors(self, own: Any, params: Params, shape: tuple[int, int]) -> tuple[Array, Array]:
        """Return A (r, in) and B (out, r), with the scale, of a linear weight of the given shape (out, in)."""

    def delta(self, own: Any, params: Params, w: Array) -> Array:
        a, b = self.factors(own, params, w.shape)
        return b @ a

    def after(self, own: Any, params: Params, x: Array, y: Array) -> Array:
        a, b = self.factors(own, params, (y.shape[-1], x.shape[-1]))
        return y + (x.astype(a.dtype) @ a.T) @ b.T

    def plain_rank(self, config: Any) -> int:
        return int(config.r)


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
        shapes = {"A": (self.parts * config.r, inputs), "B": (outputs, config.r)}
        return tuple(
            own_tensor(self._name(side), shape, trained=False, optional=True, in_file=config.save_projection)
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
        d = params[self._name("lambda_d")][:rows]
        return d * jnp.einsum("...i,ri->...r", x.astype(d.dtype), params[self._name("A")][:rows, : x.shape[-1]])

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
    window = target.window
    if window and (len(window) != 2 or window[0] != window[1] or target.match.weight.groups > 1):
        raise target.refuse(
            f"{method} adapts 2-D convolutions with a square kernel and one group; found the kernel {window} and"
            f" {target.match.weight.groups} groups. Remove the module from target_modules"
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

    kinds: frozenset[str] = frozenset({"linear", "conv"})
    changes: Effects | None = Effects("changes", form="use", reads=True)

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

    row_numbers: frozenset[str] = frozenset({"count", "scaling"})
    row_padded: frozenset[str] = frozenset({"r"})

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

    drops: ClassVar[Literal["input", "change"]] = "change"
    kinds: frozenset[str] = frozenset({"linear", "conv"})

    def own(self, config: Any, target: Target) -> DroppedHparams:
        return DroppedHparams(
            target.value(
                lambda module: find_pattern_value(config.alpha_pattern, module, config.alpha) / config.rank_of(module)
            ),
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
