"""Abstract calls of an NNX model: they show how its layers use their weights, and which uses no adapter can follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxadapt.arrays import quantized
from jaxadapt.arrays.axes import contradiction_message, transposed_axes
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.models.nnx import graph, survey
from jaxadapt.models.tracing import hook, rewrite
from jaxadapt.models.tracing.liveness import live_weights, refuse_reads_outside
from jaxadapt.models.tracing.uses import describe_uses, infer_axes, unfollowed_uses

Args = Sequence[Any]
Recorder = Callable[[str, str, type[nnx.Module], Callable[..., Any]], Callable[..., Any]]
"""`recorder(leaf, attribute, class, method)` returns the method that runs in place of a layer's own."""


def instrument(
    model: nnx.Module, leaves: Sequence[str], recorder: Recorder, args: Args
) -> tuple[Callable[[Mapping[str, Any]], list[Any]], dict[str, Any]]:
    """Return `(f, inputs)`, where `f(inputs)` calls a copy of the model whose layers run `recorder`'s methods.

    Args:
        leaves: the leaves whose owners get `recorder`'s methods.

    `inputs` holds every array of the model by its path, and the arrays among `args`. The other arguments are constants.
    """
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    names = [paths.join(*map(str, path)) for path, _ in flat]
    inputs: dict[str, Any] = {}
    for name, (_, var) in zip(names, flat, strict=True):
        inputs[name] = var.get_value() if isinstance(var, nnx.Variable) else var
    values, tree = jax.tree.flatten(tuple(args))
    arrays = {f"~{i}": v for i, v in enumerate(values) if isinstance(v, jax.Array | jax.ShapeDtypeStruct)}

    def f(inputs: Mapping[str, Any]) -> list[Any]:
        filled = [
            (path, var.copy(inputs[name]) if isinstance(var, nnx.Variable) else inputs[name])
            for name, (path, var) in zip(names, flat, strict=True)
        ]
        copy: Any = nnx.merge(graphdef, nnx.from_flat_state(filled))
        for leaf, (module, attr) in survey.base_leaves(copy).items():
            if leaf in leaves:
                base = survey.base_class(module)
                body = {name: recorder(leaf, attr, base, f) for name, f in survey.entry_points(base).items()}
                survey.set_class(module, type(base.__name__, (base,), body))
        outputs = copy(*tree.unflatten([inputs.get(f"~{i}", v) for i, v in enumerate(values)]))
        return [x for x in jax.tree.leaves(outputs) if isinstance(x, jax.Array)]

    return f, inputs | arrays


def _bind_pure(module: nnx.Module, base: type[nnx.Module], f: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    """Return `call(weights, *args)`, which runs a layer's method without changing the layer."""
    state = {path: var.get_value() for path, var in survey.layer_state(module).items()}
    return lambda weights, *args: survey.run_pure(module, base, f, weights, state, args, kwargs)[0]


def trace_axes(
    model: nnx.Module, walk: graph.ModelWalk, args: Args, leaves: Sequence[str], required: bool
) -> tuple[dict[str, survey.TracedAxes], set[str]]:
    """Trace the axis roles of custom layers' leaves in one abstract call of the model.

    Returns `{leaf: traced axes}`, and the leaves that are used but have no single set of roles. Leaves that the call
    does not use are in neither.

    Raises `AttachError` if `required` and the roles of any leaf are not found, listing all such leaves.
    """
    blocked = survey.find_obstacles(walk, leaves)
    if blocked and required:
        raise AttachError("these layers cannot carry the adapter:\n" + paths.bullets(blocked.values()))
    leaves = [leaf for leaf in leaves if leaf not in blocked]
    if not leaves:
        return {}, set()
    traced: dict[str, survey.TracedAxes] = {}
    problems: dict[str, str] = {}

    def recorder(leaf: str, attr: str, base: type[nnx.Module], f: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            call = _bind_pure(self, base, f, kwargs)
            weight = vars(self)[attr].get_value()
            try:
                axes = survey.TracedAxes(infer_axes(call, {attr: weight}, attr, *args), tuple(weight.shape))
                if traced.setdefault(leaf, axes) != axes:
                    problems[leaf] = f"one call shows {traced[leaf]}, another {axes}"
            except AttachError as error:
                problems[leaf] = str(error)
            return f(survey.plain_view(self, base, {}), *args, **kwargs)

        return __call__

    run, inputs = instrument(model, leaves, recorder, args)
    jax.eval_shape(run, inputs)
    not_called = "its module's __call__ never ran with these inputs"
    unclear = {leaf: problems.get(leaf, not_called) for leaf in leaves if leaf in problems or leaf not in traced}
    if unclear and required:
        listed = [f"{leaf}: {reason}" for leaf, reason in unclear.items()]
        raise AttachError("the axis roles of these weights could not be traced:\n" + paths.bullets(listed))
    return {leaf: axes for leaf, axes in traced.items() if leaf not in unclear}, set(problems)


def record_uses(model: nnx.Module, adapted: Mapping[str, hook.Hook], args: Args) -> dict[str, str]:
    """Return `{leaf: note}` on how the adapter follows each custom layer's weight in one abstract call of the model."""
    notes: dict[str, str] = {}
    owners = survey.base_leaves(model)
    leaves = survey.custom_leaves(owners, adapted)

    def recorder(leaf: str, attr: str, base: type[nnx.Module], f: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            call = _bind_pure(self, base, f, kwargs)
            uses = rewrite.uses(call, {attr: quantized.to_dense(vars(self)[attr].get_value())}, *args)[attr]
            notes[leaf] = describe_uses(base.__name__, uses, adapted[leaf])
            return f(survey.plain_view(self, base, {}), *args, **kwargs)

        return __call__

    run, inputs = instrument(model, leaves, recorder, args)
    jax.eval_shape(run, inputs)
    names = {leaf: survey.base_class(owners[leaf][0]).__name__ for leaf in leaves}
    not_called = {leaf: f"{name}, not called with these inputs" for leaf, name in names.items()}
    return not_called | notes


def check_calls(
    model: nnx.Module,
    adapted: Mapping[str, hook.Hook],
    dropped: Sequence[str],
    forward: Sequence[str],
    args: Args,
) -> None:
    """Raise `AttachError` for uses that an adapter cannot follow in one abstract call of the model.

    These are a weight read outside its own module's call, dropout on a weight whose use is not a product along its
    axis roles, and a keymap entry that swaps a layer's inputs and outputs.

    Args:
        dropped: the leaves whose adapter has dropout.
        forward: the leaves whose axis roles are checked against their layer's products.
    """
    stray_uses: dict[str, str] = {}
    products: dict[str, list[rewrite.Contraction]] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def recorder(leaf: str, attr: str, base: type[nnx.Module], f: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            weight = vars(self)[attr].get_value()
            # The module reads a copy, so only reads outside its call keep the weight itself live.
            alias = jnp.zeros(weight.shape, weight.dtype)
            if survey.kernel_use(self) is None:
                uses = rewrite.uses(_bind_pure(self, base, f, kwargs), {attr: alias}, *args)[attr]
                shapes[leaf] = weight.shape
                products.setdefault(leaf, []).extend(use for use in uses if isinstance(use, rewrite.Contraction))
                unfollowed = unfollowed_uses(uses, adapted[leaf])
                if leaf in dropped and unfollowed:
                    stray_uses[leaf] = ", ".join(unfollowed)

            return f(survey.plain_view(self, base, {attr: alias}), *args, **kwargs)

        return __call__

    run, inputs = instrument(model, list(adapted), recorder, args)
    live = live_weights(run, inputs)
    contradictions = [
        f"{leaf}: {contradiction_message(axes, layer_axes)}"
        for leaf in forward
        if leaf in products
        and (layer_axes := transposed_axes(axes := adapted[leaf].axes, products[leaf], shapes[leaf])) is not None
    ]
    raise_listed(AttachError, "these layers cannot carry the adapter:", contradictions)
    refuse_reads_outside(leaf for leaf in adapted if live[leaf])
    raise_listed(
        AttachError,
        "dropout cannot be applied, because these layers use their weight outside a supported product, where only"
        " an effective weight can replace it:",
        (f"{leaf}: {reason}" for leaf, reason in stray_uses.items()),
        "\nSet the dropout of the configuration to 0.0, or exclude them with exclude_modules",
    )
