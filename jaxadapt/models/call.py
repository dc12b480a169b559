"""One call of a layer with adapters on its weights, for NNX and Linen alike.

The two libraries only say how to get a layer's parameters, how to run its method without changing the layer, and how to
write back the state that such a run changes: see `Layer`. Flax's own layers run as they are, with the adapter applied
around the call. In all other layers the uses of adapted weights are rewritten.

The roles of the axes of Flax's own weights follow from their layer classes, without a trace: see `KERNELS`.

Each row of a batch may have its own adapter: `RowSite` is one method at one leaf for rows, and `Rows` holds the tensors
of one batch's rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr

from jaxadapt.arrays import quantized
from jaxadapt.arrays.layout import Axes
from jaxadapt.arrays.products import LETTERS, Use, contradiction_message
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_as, raise_listed, warn
from jaxadapt.keymaps.weight import Kind
from jaxadapt.methods.applied import (
    AppliedMethod,
    Hook,
    Implementation,
    check_biases,
    split_rows,
)
from jaxadapt.methods.base import Method
from jaxadapt.models import jaxprs, tracing

# ---------------------------------------------------------------- flax's own layer classes


DENSE = Axes(in_axes=(0,), out_axes=(1,))
_MANY = 16  # more axes than the input of a layer has, where only the roles of its kernel are asked

Letters = tuple[str, str, str]
"""The letters of the axes of a layer's input, its kernel and its output."""


@functools.cache  # asked for each layer of a model
def general_letters(x_ndim: int, axis: Sequence[int], batch: Sequence[int], outputs: int) -> Letters:
    """Return the letters of DenseGeneral: it sums over x's axes `axis`, and its kernel has x's axes `batch` too.

    The kernel is (batch..., in..., out...). Flax sorts both by their position in x, whatever their order in the
    arguments.

    >>> general_letters(4, (-1, -2), (), 1)
    ('abcd', 'cde', 'abe')
    """
    x = LETTERS[:x_ndim]
    summed, lead = ("".join(x[i] for i in sorted(a % x_ndim for a in axes_of_x)) for axes_of_x in (axis, batch))
    rest = "".join(c for c in x if c not in summed + lead)
    outs = LETTERS[x_ndim : x_ndim + outputs]
    return x, lead + summed + outs, lead + rest + outs


def einsum_letters(einsum_str: str, x_ndim: int) -> Letters:
    """Return the letters of an einsum layer, whose kernel is the second operand.

    >>> einsum_letters("...F,NFH->...NH", 3)
    ('dea', 'bac', 'debc')
    """
    operands, arrow, y = einsum_str.replace(" ", "").partition("->")
    x, comma, w = operands.partition(",")
    if not arrow or not comma or "," in w or "..." in w:
        raise AttachError(
            f"cannot adapt the einsum {einsum_str!r}: expected the form 'x,w->y' with every axis of w named"
        )
    dots = x_ndim - len(x.replace("...", ""))
    names = "".join(dict.fromkeys(c for c in x + w + y if c != "."))
    fresh = dict(zip(names, LETTERS, strict=False))
    spare = LETTERS[len(names) : len(names) + dots] if "..." in x else ""

    def letters(part: str) -> str:
        return "".join(fresh.get(c, c) for c in part).replace("...", spare)

    return letters(x), letters(w), letters(y)


@functools.cache
def axes_from_letters(x: str, w: str, y: str) -> Axes:
    """Return the roles of a kernel's axes: those summed over are inputs, those that x and y have are batch axes."""
    role = {i: "batch" if c in x and c in y else "in" if c in x else "out" for i, c in enumerate(w)}
    ins, out, batch = (tuple(i for i, r in role.items() if r == which) for which in ("in", "out", "batch"))
    return Axes(ins, out, batch)


def einsum_axes(einsum_str: str) -> Axes:
    """Return the roles of the axes of an einsum's second operand.

    >>> einsum_axes("BTNH,NHD->BTD")
    Axes(in_axes=(0, 1), out_axes=(2,), batch_axes=(), parts=None)
    """
    x, w, y = einsum_letters(einsum_str, _MANY)
    if alone := [c for c in w if c not in x + y]:
        raise AttachError(
            f"cannot adapt the einsum {einsum_str!r}: axis {alone[0]!r} of its weight is summed and not in x"
        )
    return axes_from_letters(x, w, y)


# ---------------------------------------------------------------- the classes


@dataclasses.dataclass(frozen=True)
class Roles:
    """The roles of a weight's axes, and the kind and groups of its keymap entry."""

    axes: Axes
    kind: Kind = "linear"
    groups: int = 1


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _nnx_einsum_letters(m: Any, x_ndim: int, equation: str | None) -> Letters:
    """Return the letters of a call of `nnx.Einsum`, whose adapter has the roles of the layer's own equation."""
    if equation and equation != m.einsum_str:
        called, adapted = einsum_axes(equation), einsum_axes(m.einsum_str)
        if set(called.in_axes) != set(adapted.in_axes) or set(called.batch_axes) != set(adapted.batch_axes):
            raise AttachError(
                f"an Einsum was adapted with the equation {m.einsum_str!r} and is called with {equation!r},"
                " whose input or batch axes differ. Exclude it with exclude_modules"
            )
    return einsum_letters(equation or m.einsum_str, x_ndim)


KERNELS: dict[Any, Callable[[Any, int, str | None], Letters]] = {
    nnx.Linear.__call__: lambda m, n, _: general_letters(n, (-1,), (), 1),
    nn.Dense.__call__: lambda m, n, _: general_letters(n, (-1,), (), 1),
    nnx.LinearGeneral.__call__: lambda m, n, _: general_letters(n, m.axis, tuple(m.batch_axis), len(m.out_features)),
    nn.DenseGeneral.__call__: lambda m, n, _: general_letters(
        n, _tuple(m.axis), _tuple(m.batch_dims), len(_tuple(m.features))
    ),
    nnx.Einsum.__call__: _nnx_einsum_letters,
    nn.Einsum.__call__: lambda m, n, equation: einsum_letters(equation or m.einsum_str, n),
}
"""`letters(layer, number of the input's axes, equation)` of Flax's own layer classes, by their calls.

The equation is the one that a call of an einsum layer passes, None for the layer's own.
"""


def _kernel_axes(layer: Any, method: Callable[..., Any], equation: str | None) -> Axes:
    """Return the roles of the axes of the kernel of one of Flax's own layers."""
    if isinstance(layer, nnx.Einsum | nn.Einsum):
        return einsum_axes(equation or str(layer.einsum_str))
    return axes_from_letters(*KERNELS[method](layer, _MANY, equation))


def roles_of(layer: Any, method: Callable[..., Any], leaf: str, equation: str | None = None) -> Roles | None:
    """Return the roles of a layer's weight if its class fixes them in this method, else None.

    Raises `AttachError` for an einsum equation that no adapter can follow.
    """
    if leaf == "embedding" and method in (nnx.Embed.__call__, nn.Embed.__call__, nn.Embed.attend):
        return Roles(DENSE, "embedding")
    if leaf != "kernel":
        return None
    # Linen's ConvLocal has the call of Conv, and another kernel.
    is_conv = method in (nnx.Conv.__call__, nn.Conv.__call__) and isinstance(layer, nnx.Conv | nn.Conv)
    if is_conv and layer.mask is None:
        # The kernel is (window..., in, out); the channels come first among the inputs, as in PyTorch.
        n = len(_tuple(layer.kernel_size))
        return Roles(Axes((n, *range(n)), (n + 1,)), "conv", layer.feature_group_count)
    return Roles(_kernel_axes(layer, method, equation)) if method in KERNELS else None


# ---------------------------------------------------------------- the call of a layer


Hooks = Mapping[str, Hook]
"""`{leaf: the adapters on it}` of one layer."""
Args = Sequence[Any]
Kwargs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One method of one layer, ready to be called.

    Attributes:
        name: names the layer in messages.
        module: the layer, for its configuration.
        method: the method, as the layer's class has it.
        is_call: True for `__call__`. Other methods may use a weight in reverse, as a tied output head does.
        params: `{leaf: array}` of the layer's own parameters, quantized ones as they are stored.
        plain: runs the method on the layer itself.
        run: `run(weights, *args, **kwargs)` runs the method with other values for some parameters, and leaves the
            layer unchanged. Returns the output, and the state that the run changed.
        write_back: writes the changed state into the layer.
    """

    name: str
    module: Any
    method: Callable[..., Any]
    is_call: bool
    params: Mapping[str, Any]
    plain: Callable[..., Any]
    run: Callable[..., tuple[Any, Mapping[str, Any]]]
    write_back: Callable[[Mapping[str, Any]], None]

    @property
    def known(self) -> bool:
        """True if the method is one of Flax's own calls, whose use of the kernel is known; False if it is traced."""
        return self.method in KERNELS

    def output(self, weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `run` returns as the output."""
        return self.run(weights, *args, **kwargs)[0]


def split_input(args: Args, kwargs: Kwargs) -> tuple[Any, Args, Kwargs, str | None]:
    """Return the input of a call of one of Flax's layers, the other arguments, and an einsum's equation among them."""
    if "inputs" in kwargs:
        args, kwargs = (kwargs["inputs"], *args), {name: x for name, x in kwargs.items() if name != "inputs"}
    x, *rest = args
    return x, rest, kwargs, rest[0] if rest else kwargs.get("einsum_str")


def apply(layer: Layer, hooks: Hooks, args: Args, kwargs: Kwargs) -> Any:
    """Call a layer's method with its adapters applied and its quantized weights made dense."""
    outer, inner = split_rows(hooks)
    use = _known_use(layer, outer, args, kwargs)
    if use is None:
        return _apply_inside(layer, hooks, args, kwargs)
    return _call_around(
        outer["kernel"], use, layer.params["kernel"], lambda *a, **k: _apply_inside(layer, inner, a, k), args, kwargs
    )


def _apply_inside(layer: Layer, hooks: Hooks, args: Args, kwargs: Kwargs) -> Any:
    stored = {leaf: x for leaf, x in layer.params.items() if quantized.is_quantized(x)}
    if not stored and not hooks:
        return layer.plain(*args, **kwargs)
    # A random stream cannot advance inside `jax.checkpoint`, so its key is drawn here.
    ready = {leaf: hook.map(AppliedMethod.with_key) for leaf, hook in hooks.items()} if stored else hooks

    def run(stored: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        return run_adapted(layer, ready, {leaf: quantized.to_dense(x) for leaf, x in stored.items()}, args, kwargs)

    # The backward pass dequantizes again, so that the dense weights do not stay in memory between the passes.
    y, changed = (jax.checkpoint(run) if stored else run)(stored)
    layer.write_back(changed)
    return y


def run_adapted(
    layer: Layer, hooks: Mapping[str, Hook], dense: Mapping[str, Any], args: Args, kwargs: Kwargs
) -> tuple[Any, Mapping[str, Any]]:
    """Run a method of a layer, or of a whole model, with changed weights or rewritten uses of them.

    `dense` are the dense values of quantized parameters. Returns the output, and the state that the run changed.
    """
    params = {**layer.params, **dense}
    fixed = {**dense, **{leaf: hook.weight(params[leaf]) for leaf, hook in hooks.items() if hook.by_weight}}
    by_use: dict[str, Any] = {leaf: hook for leaf, hook in hooks.items() if not hook.by_weight}
    use = None if not layer.known or any(x.apart for x in by_use.values()) else _known_use(layer, by_use, args, kwargs)
    if use is not None:  # the output has the bias, so the adapter changes both; such a layer of Flax has no state
        run = functools.partial(layer.output, fixed) if fixed else layer.plain
        return _call_around(by_use["kernel"], use, params["kernel"], run, args, kwargs), {}
    fixed |= _changed_biases(layer.name, hooks, {**params, **fixed})
    if not by_use:
        return layer.run(fixed, *args, **kwargs)
    return _run_rewritten(layer, by_use, params, fixed, args, kwargs)


def _run_rewritten(
    layer: Layer,
    hooks: Mapping[str, Hook],
    params: Mapping[str, Any],
    fixed: Mapping[str, Any],
    args: Args,
    kwargs: Kwargs,
) -> tuple[Any, Mapping[str, Any]]:
    """Run a layer's method on its parameters, with `fixed` in place of some, and with rewritten uses of the others."""
    kept = {leaf: x for leaf, x in fixed.items() if leaf not in hooks}
    forward = [leaf for leaf, hook in hooks.items() if hook.forward and layer.is_call]

    def run(weights: Mapping[str, Any], *args: Any) -> tuple[Any, Mapping[str, Any]]:
        return layer.run({**kept, **weights}, *args, **kwargs)

    with raise_as(AttachError, layer.name, AttachError):
        return tracing.rewrite(run, {leaf: params[leaf] for leaf in hooks}, hooks, *args, forward=forward)


def _changed_biases(layer: str, hooks: Mapping[str, Hook], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the biases beside adapted weights that a call must use, if the adapters change them.

    Raises `AttachError` for another parameter of such a module that may be a bias, which the adapter should change.

    Args:
        layer: the name of the layer, or of the model, whose hooks and parameters have paths then.
    """
    modules = paths.nest((path.rpartition(".")[0], path.rpartition(".")[2], x) for path, x in params.items())
    fixed: dict[str, Any] = {}
    for module in dict.fromkeys(leaf.rpartition(".")[0] for leaf in hooks):
        values, label = modules[module], paths.join(layer, module)
        own = {name: hooks[path] for name in values if (path := paths.join(module, name)) in hooks}
        fixed |= {paths.join(module, name): x for name, x in _changed_bias(label, own, values.get("bias")).items()}
        followed = {name: hook for name, hook in own.items() if not hook.by_weight}
        others = {name: x for name, x in values.items() if name not in followed and name != "bias"}
        with raise_as(AttachError, label, AttachError):
            check_biases(followed.values(), others)
    return fixed


def _changed_bias(module: str, hooks: Mapping[str, Hook], bias: Any) -> dict[str, Any]:
    """Return the bias that a module must use, if the adapters of its weights change it; `bias` is None without one."""
    changed = {leaf: hook.bias(bias) for leaf, hook in hooks.items() if leaf != "bias" and bias is not None}
    changed = {leaf: new for leaf, new in changed.items() if new is not bias}
    if len(changed) > 1:
        raise AttachError(
            f"{module}: the adapter scales the module's bias, but it is unknown to which of the adapted weights"
            f" {list(changed)} the bias belongs. Adapt only one of them"
        )
    return {} if not changed else {"bias": next(iter(changed.values()))}


def _known_use(layer: Layer, hooks: Hooks, args: Args, kwargs: Kwargs) -> Use | None:
    """Return the use of the kernel in a call of one of Flax's layers; None if the adapter cannot follow it there."""
    if not layer.known or list(hooks) != ["kernel"]:
        return None
    hook, (x, _, _, equation) = hooks["kernel"], split_input(args, kwargs)
    use = Use(*KERNELS[layer.method](layer.module, x.ndim, equation), hook.axes)
    # A layer that gets its equation as an argument may also get the reverse one.
    if hook.forward and use.transposed and not equation:
        own = _kernel_axes(layer.module, layer.method, equation)
        raise AttachError(f"{layer.name}: {contradiction_message(hook.axes, own)}")
    # The adapter follows a contraction over exactly all input axes, or exactly all output axes.
    in_axes, out_axes = set(use.letters("in")), set(use.letters("out"))
    is_along_roles = (in_axes | out_axes) & set(use.x) in (in_axes, out_axes)
    return use if is_along_roles and hook.follows_use(use) else None


def _call_around(
    hook: Hook,
    use: Use,
    weight: Any,
    call: Callable[..., Any],
    args: Args,
    kwargs: Kwargs,
) -> Any:
    """Call one of Flax's layers, and apply the adapter of its kernel to its input and output."""
    x, rest, kwargs, _ = split_input(args, kwargs)
    x = hook.input(use, x, weight)
    return hook.output(use, x, call(x, *rest, **kwargs), weight)


def describe(name: str, layer: Layer, hooks: Hooks, args: Args, kwargs: Kwargs) -> dict[str, str]:
    """Return `{leaf: note}` on how each adapter follows its weight in a call of the method called `name`."""
    if layer.known:
        return dict.fromkeys(hooks, f"{name}'s own call")
    weights = {leaf: quantized.to_dense(layer.params[leaf]) for leaf in hooks}
    uses = tracing.uses(functools.partial(layer.output, **kwargs), weights, *args)
    unfollowed = {leaf: ", ".join(dict.fromkeys(unfollowed_uses(uses[leaf], hook))) for leaf, hook in hooks.items()}
    return {
        leaf: f"effective weight in {name} ({each})" if each else f"traced {name}" for leaf, each in unfollowed.items()
    }


# ---------------------------------------------------------------- dropout without random numbers


class Warned:
    """A flag: a model has warned of dropout that is off. All flags are equal: none makes jit compile again."""

    once: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Warned)

    def __hash__(self) -> int:
        return 0


def report_no_dropout(
    names: Iterable[str], deterministic: bool | None, warned: Warned, why: str, way_out: str, advice: str
) -> None:
    """Raise `AttachError` if a call cannot apply the dropout that `deterministic=False` asks for; else warn once.

    Args:
        names: the adapters with dropout.
        why: the reason.
        way_out: the end of the error.
        advice: the end of the warning.
    """
    problem = f"the adapter {', '.join(names)}: dropout is off, because {why}"
    if deterministic is False:
        raise AttachError(f"{problem}, but deterministic=False asks for it. {way_out}")
    if not warned.once:
        warned.once = True
        warn(f"{problem}. {advice}")


# ---------------------------------------------------------------- conclusions from the uses of a weight


def unfollowed_uses(found: Iterable[tracing.WeightUse], hook: Hook) -> list[str]:
    """Return the uses that need the effective weight, in a few words each."""
    axes = hook.axes
    along = (set(axes.in_axes), set(axes.out_axes))
    return [
        use.primitive if isinstance(use, tracing.OtherUse) else f"a sum over axes {list(use.in_axes)}"
        for use in found
        if (isinstance(use, tracing.OtherUse) and not hook.follows(use.primitive))
        or (
            isinstance(use, Axes) and (set(use.in_axes) not in along or not set(use.batch_axes) <= set(axes.batch_axes))
        )
    ]


def infer_axes(found: Iterable[tracing.WeightUse], name: str) -> Axes:
    """Infer the axis roles of the weight `name` from its uses in a function.

    Inputs and outputs are in the weight's axis order. A trace cannot distinguish a fused axis (k and v in one array)
    from an output axis.

    Raises:
        AttachError: the weight is not used, is used in several ways, or in an operation other than `dot_general`.

    >>> import jax, jax.numpy as jnp
    >>> w, x = jax.ShapeDtypeStruct((3, 4, 5), "float32"), jax.ShapeDtypeStruct((2, 3), "float32")
    >>> found = tracing.uses(lambda weights, x: jnp.einsum("bd,dnh->bnh", x, weights["w"]), {"w": w}, x)
    >>> infer_axes(found["w"], "w")
    Axes(in_axes=(0,), out_axes=(1, 2), batch_axes=(), parts=None)
    """
    distinct = list(dict.fromkeys(found))
    match distinct:
        case [Axes() as axes]:
            return axes
        case []:
            problem = "is never used"
        case [tracing.OtherUse(primitive)]:
            problem = f"is used by {primitive}, and only a matrix product shows which axes are inputs"
        case _:
            ways = "; ".join(map(_describe_use, distinct))
            problem = f"is used in several ways ({ways}), so that its inputs and outputs are ambiguous"
    raise AttachError(f"cannot infer the axis roles of {name!r}: it {problem}. Pass a KeyMap with an entry for it")


def _describe_use(use: tracing.WeightUse) -> str:
    if isinstance(use, tracing.OtherUse):
        return f"by {use.primitive}"
    shared = f", with {list(use.batch_axes)} in both" if use.batch_axes else ""
    return f"summed over axes {list(use.in_axes)}, leaving {list(use.out_axes)}{shared}"


# ---------------------------------------------------------------- dependence on a weight, without running


def refuse_reads_outside(leaves: Iterable[str]) -> None:
    """Raise `AttachError` if there are weights that the model reads outside their own module's call."""
    raise_listed(
        AttachError,
        "these weights are read outside their own module's call, where an adapter cannot follow:",
        leaves,
        "\nExclude them with exclude_modules, or change the reader to call the module",
    )


def live_weights(f: Callable[..., Any], weights: Mapping[Any, Any], *args: Any) -> dict[Any, bool]:
    """Return `{name: True if the outputs of f(weights, *args) depend on it}`, without computing anything.

    A weight is an array, a `ShapeDtypeStruct`, or a tree of them, as a quantized one is.

    >>> import jax.numpy as jnp
    >>> live_weights(lambda w: w["a"] * 2, {"a": jnp.ones(3), "b": jnp.ones(3)})
    {'a': True, 'b': False}
    """
    jaxpr = jaxprs.trace(f, weights, args).closed.jaxpr
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    structure = jax.tree.structure(list(weights.values()))
    live = structure.unflatten(used[: structure.num_leaves])
    return {name: any(jax.tree.leaves(arrays)) for name, arrays in zip(weights, live, strict=True)}


# ---------------------------------------------------------------- rows of a batch


@dataclasses.dataclass(frozen=True)
class RowSite:
    """One method on one base leaf, for rows.

    Attributes:
        leaf: the path of the base leaf.
        stack: the axes of the leaf that stack layers.
        method: the method.
        hparams: the hyperparameters that all rows share.
        axes: the roles of the weight's axes.
        how: how the rows take their adapters; see `methods.applied.apply_rows`.
        shared: the number of the tensors in `Rows.shared` that the method uses beside those of the rows; None if it
            uses none.
    """

    leaf: str
    stack: tuple[int, ...]
    method: Method
    hparams: Any
    axes: Axes
    how: Implementation = "gather"
    shared: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class RowLayout:
    """The sites of one bank. It is compared by identity, so a compiled program recognizes it without a comparison."""

    sites: tuple[RowSite, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The adapters of the rows of one batch: a pytree of arrays.

    Attributes:
        arrays: `{tensor: array}` of each site. A layer's slice of an array has the rows first, or the slots where the
            layers choose among them; stacked axes have their places in the base leaf.
        layout: the sites.
        how: how the rows take their adapters; see `methods.applied.apply_rows`.
        shared: `{tensor: array}` of the tensors that all rows and all layers have in common; see `RowSite.shared`.
    """

    arrays: Sequence[Mapping[str, Any]]
    layout: RowLayout = dataclasses.field(metadata={"static": True})
    how: Implementation = dataclasses.field(default="gather", metadata={"static": True})
    shared: Sequence[Mapping[str, Any]] = ()

    @property
    def sites(self) -> list[RowSite]:
        """The sites, with the way in which the rows take their adapters."""
        return [dataclasses.replace(site, how=self.how) for site in self.layout.sites]

    def check_layout(self, layout: RowLayout) -> None:
        """Raise `AttachError` if these rows are of another bank than the attached one."""
        if self.layout is not layout:
            raise AttachError("the route has rows of another bank than the one that the model was banked with")


NO_ROUTE = (
    "the model has a bank of adapters, and this call has no route to choose an adapter for each row. Call it within"
    " jaxadapt.serving.route(model, bank.select(ids)); slot 0 is the base"
)
