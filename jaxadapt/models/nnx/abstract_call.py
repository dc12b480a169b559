"""Abstract calls of an NNX model: what its layers do with their weights, and what an adapter could not follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxadapt.arrays import quantized
from jaxadapt.arrays.axes import find_contradiction, transposed_axes
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.models.nnx import survey
from jaxadapt.models.tracing import rewrite
from jaxadapt.models.tracing import uses as used
from jaxadapt.models.tracing.liveness import live_weights

Args = Sequence[Any]
Recorder = Callable[[str, str, type[nnx.Module], Callable[..., Any]], Callable[..., Any]]


def _instrumented(
    model: nnx.Module, leaves: Sequence[str], recorder: Recorder, args: Args
) -> tuple[Callable[[Mapping[str, Any]], list[Any]], dict[str, Any]]:
    """`(f, inputs)`: `f(inputs)` calls a copy of the model with the owners of `leaves` under `recorder`'s call.

    Inputs are every array of the model, under its leaf's path where it is one of `leaves`, and the arrays
    among `args`; other arguments stay what they are.
    """
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    names = [paths.join(*map(str, path)) for path, _ in flat]
    inputs: dict[str, Any] = {}
    for name, (_, var) in zip(names, flat, strict=True):
        inputs[name] = var.get_value() if isinstance(var, nnx.Variable) else var
    values, tree = jax.tree.flatten(tuple(args))
    moving = {f"~{i}": v for i, v in enumerate(values) if isinstance(v, jax.Array | jax.ShapeDtypeStruct)}

    def f(given: Mapping[str, Any]) -> list[Any]:
        filled = [
            (path, var.copy(given[name]) if isinstance(var, nnx.Variable) else given[name])
            for name, (path, var) in zip(names, flat, strict=True)
        ]
        copy: Any = nnx.merge(graphdef, nnx.from_flat_state(filled))
        for leaf, (module, attr) in survey.base_leaves(copy).items():
            if leaf in leaves:
                base = survey.base_class(module)
                body = {name: recorder(leaf, attr, base, f) for name, f in survey.entry_points(base).items()}
                survey.swap(module, type(base.__name__, (base,), body))
        out = copy(*tree.unflatten([given.get(f"~{i}", v) for i, v in enumerate(values)]))
        return [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array)]

    return f, inputs | moving


def _pure(module: nnx.Module, base: type[nnx.Module], f: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    """A layer's function of its weights and inputs alone, that leaves the layer as it is."""
    held = {path: var.get_value() for path, var in survey.layer_state(module).items()}
    return lambda weights, *args: survey.run_pure(module, base, f, weights, held, args, kwargs)[0]


def trace_axes(
    model: nnx.Module, walked: survey.ModelWalk, args: Args, wanted: Sequence[str], required: bool
) -> tuple[dict[str, survey.TracedAxes], set[str]]:
    """Axis roles of leaves held by custom layers, from one abstract call of the model.

    Also the leaves that were used, but not in one product. Raises `AttachError`, listing them, if there are
    any and all are `required`; else those that never were used are in neither result.
    """
    blocked = survey.obstacles(walked, wanted)
    if blocked and required:
        raise AttachError("these layers cannot carry the adapter:\n" + paths.bullets(blocked.values()))
    wanted = [leaf for leaf in wanted if leaf not in blocked]
    if not wanted:
        return {}, set()
    found: dict[str, survey.TracedAxes] = {}
    problems: dict[str, str] = {}

    def recorder(leaf: str, attr: str, base: type[nnx.Module], f: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            call = _pure(self, base, f, kwargs)
            weight = vars(self)[attr].get_value()
            try:
                now = survey.TracedAxes(used.infer_axes(call, {attr: weight}, attr, *args), tuple(weight.shape))
                if found.setdefault(leaf, now) != now:
                    problems[leaf] = f"one call shows {found[leaf]}, another {now}"
            except AttachError as error:
                problems[leaf] = str(error)
            return f(survey.plain_view(self, base, {}), *args, **kwargs)

        return __call__

    run, inputs = _instrumented(model, wanted, recorder, args)
    jax.eval_shape(run, inputs)
    never = "its module's __call__ never ran with these inputs"
    unclear = {leaf: problems.get(leaf, never) for leaf in wanted if leaf in problems or leaf not in found}
    if unclear and required:
        listed = [f"{leaf}: {why}" for leaf, why in unclear.items()]
        raise AttachError("the axis roles of these weights could not be traced:\n" + paths.bullets(listed))
    return {leaf: traced for leaf, traced in found.items() if leaf not in unclear}, set(problems)


def record_uses(model: nnx.Module, adapted: Mapping[str, rewrite.Hook], args: Args) -> dict[str, str]:
    """How the weight of each custom layer is followed, `{leaf: note}`, seeing one abstract call of the model."""
    found: dict[str, str] = {}
    owners = survey.base_leaves(model)
    traced = survey.custom_leaves(owners, adapted)

    def recorder(leaf: str, attr: str, base: type[nnx.Module], f: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            call = _pure(self, base, f, kwargs)
            uses = rewrite.uses(call, {attr: quantized.to_dense(vars(self)[attr].get_value())}, *args)[attr]
            found[leaf] = used.describe_uses(base.__name__, uses, adapted[leaf])
            return f(survey.plain_view(self, base, {}), *args, **kwargs)

        return __call__

    run, inputs = _instrumented(model, traced, recorder, args)
    jax.eval_shape(run, inputs)
    names = {leaf: survey.base_class(owners[leaf][0]).__name__ for leaf in traced}
    never = {leaf: f"{name}, not called with these inputs" for leaf, name in names.items()}
    return never | found


def check_calls(
    model: nnx.Module,
    adapted: Mapping[str, rewrite.Hook],
    dropped: Sequence[str],
    forward: Sequence[str],
    args: Args,
) -> None:
    """Refuse what an adapter cannot follow, seeing one abstract call of the model.

    That is a weight read outside its own module's call, dropout (`dropped`) on a weight that is used otherwise than
    in a product along its roles, and a table that takes a layer's outputs for its inputs.
    """
    uneven: dict[str, str] = {}
    products: dict[str, list[rewrite.Contraction]] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def recorder(leaf: str, attr: str, base: type[nnx.Module], f: Callable[..., Any]) -> Callable[..., Any]:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            weight = vars(self)[attr].get_value()
            alias = jnp.zeros(weight.shape, weight.dtype)  # what the module itself reads counts for nothing
            if survey.kernel_use(self) is None:
                found = rewrite.uses(_pure(self, base, f, kwargs), {attr: alias}, *args)[attr]
                shapes[leaf] = weight.shape
                products.setdefault(leaf, []).extend(use for use in found if isinstance(use, rewrite.Contraction))
                stray = used.unfollowed_uses(found, adapted[leaf])
                if leaf in dropped and stray:
                    uneven[leaf] = ", ".join(stray)

            return f(survey.plain_view(self, base, {attr: alias}), *args, **kwargs)

        return __call__

    run, inputs = _instrumented(model, list(adapted), recorder, args)
    read = live_weights(run, inputs)
    reverse = [
        f"{leaf}: {find_contradiction(axes, own)}"
        for leaf in forward
        if leaf in products
        and (own := transposed_axes(axes := adapted[leaf].axes, products[leaf], shapes[leaf])) is not None
    ]
    if reverse:
        raise AttachError("these layers cannot carry the adapter:\n" + paths.bullets(reverse))
    outside = [leaf for leaf in adapted if read[leaf]]
    if outside:
        raise AttachError(
            "these weights are read outside their own module's call, where an adapter cannot follow:\n"
            + paths.bullets(outside)
            + "\nLeave them out with exclude_modules, or let the reader call the module"
        )
    if uneven:
        raise AttachError(
            "dropout was asked for where the weight is used in a way that only the effective weight can follow:\n"
            + paths.bullets(f"{leaf}: {why}" for leaf, why in uneven.items())
            + "\nSet lora_dropout=0.0, or leave these out with exclude_modules"
        )
