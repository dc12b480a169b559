"""Methods in PyTorch's layout: one weight (out, in) and tensors in the shapes of their files.

`MatrixMethod` converts a site's arrays to PyTorch's layout inside the computation, so that a method is written as its
paper or PEFT writes it, and works for every keymap: split heads, fused parts, scaled and interleaved weights. Methods
whose change of a weight is a product B·A of two matrices compute only these.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.arrays import products
from jaxadapt.arrays.layout import TorchLayout
from jaxadapt.configs.base import change_of_matrix
from jaxadapt.core.errors import AttachError
from jaxadapt.methods.base import (
    CALL_KEY,
    PRIMITIVES,
    Array,
    Axes,
    Change,
    Draw,
    Drop,
    Effects,
    Method,
    MethodTensor,
    Operation,
    Params,
    PerEntry,
    Shapes,
    Start,
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
    "CALL_KEY", "Array", "Draw", "Drop", "Effects", "FactoredMethod", "MatrixHparams", "MatrixMethod", "MethodTensor",
    "Operation", "OwnHparams", "Params", "Shapes", "Start", "Target", "Targets", "TorchRandom", "Use",
    "at_least_float32", "axes_tensor", "layout_of", "own_tensor", "shared_value", "tensor_roles",
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
    """

    scale: Any = None
    kind: str = ""
    dropout: float = 0.0
    variant: str = ""


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
        return None if type(self).delta is MatrixMethod.delta else "‖ΔW‖"

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

    def dropout(self, hparams: MatrixHparams) -> float:
        return getattr(hparams.own, "dropout", 0.0)

    def follows(self, hparams: MatrixHparams, primitive: str) -> bool:
        return PRIMITIVES.get(_kind(hparams)) == primitive

    def follows_use(self, hparams: MatrixHparams, use: Use) -> bool:
        # A tied head uses the weight in reverse, and fused parts with one input cannot each change it.
        changes_input = type(self).before is not MatrixMethod.before
        fits = not use.transposed and not (changes_input and not set(use.letters("batch")) <= set(use.x))
        return fits or _kind(hparams) == "embedding"

    def forward(self, hparams: MatrixHparams) -> bool:
        return _kind(hparams) != "embedding"  # whose product is that of a tied head

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


def _kind(hparams: MatrixHparams) -> str:
    return getattr(hparams.own, "kind", "")


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
