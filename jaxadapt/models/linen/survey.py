"""Survey of a Linen model by abstract calls: the roles of weight axes, stacked axes, and obstacles to adapters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxadapt.adapters import sites
from jaxadapt.arrays import quantized
from jaxadapt.arrays.axes import contradiction_message, transposed_axes
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.generic import GENERIC, entry_from_axes
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.weight import Weight
from jaxadapt.models import call
from jaxadapt.models.call import Roles
from jaxadapt.models.linen import interceptor
from jaxadapt.models.linen.collections import lookup, overlay, unbox_tree
from jaxadapt.models.linen.interceptor import SEP
from jaxadapt.models.tracing import uses

_PER_CALL_COLLECTIONS = {"cache", "intermediates", "perturbations"}
_MARKER_SIZE = 10_007  # larger than any layer count: a transform added each smaller axis of a marker's shape

# ---------------------------------------------------------------- one abstract init


@dataclasses.dataclass
class Survey:
    """The results of one abstract `init` of a model.

    Args:
        shapes: `{leaf: shape}` for every base leaf.
        collections: the names of the collections that `init` creates besides "params".
        stateful: the paths of modules that keep state between calls in these collections, as `nn.BatchNorm` does.
        roles: `{leaf: roles}` from the layer's class or a trace.
        certain: the leaves whose roles their class fixes, or all calls agree on. A keymap must not contradict them.
        stack: `{leaf: axes that stack layers}` for the leaves that a call reaches.
        vectors: the leaves that have fewer than two axes inside their own module.
        unknown: `{leaf: reason}` for leaves without roles. A keymap may supply them.
        refused: `{leaf: reason}` for leaves on which no adapter is exact, with or without a keymap.
    """

    shapes: dict[str, tuple[int, ...]]
    collections: frozenset[str]
    stateful: frozenset[str]
    roles: dict[str, Roles] = dataclasses.field(default_factory=dict[str, Roles])
    certain: set[str] = dataclasses.field(default_factory=set[str])
    stack: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict[str, tuple[int, ...]])
    vectors: set[str] = dataclasses.field(default_factory=set[str])
    unknown: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    refused: dict[str, str] = dataclasses.field(default_factory=dict[str, str])

    def entries(self, keymap: KeyMap) -> list[Weight]:
        """Return entries for the leaves that the keymap lacks or, if it is the generic one, only guesses.

        Leaves where the keymap contradicts the model are added to `refused`.
        """
        entries: list[Weight] = []
        for leaf, shape in self.shapes.items():
            match = keymap.match(leaf)
            fits = match is not None and len(match.weight.left) == len(shape)
            if match is not None and fits and keymap.name != GENERIC.name:
                self._refuse_contradiction(leaf, match)
            elif leaf in self.roles and leaf not in self.unknown and leaf in self.stack:
                roles, stack = self.roles[leaf], self.stack[leaf]
                if match is None or not fits or (match.axes, match.stack) != (roles.axes, stack):
                    entries.append(entry_from_axes(leaf, shape, roles.axes, stack, roles.kind, roles.groups))
            elif fits and leaf in self.vectors:
                letters = " ".join(f"a{i}" for i in range(len(shape)))
                entries.append(Weight(leaf, leaf, f"{letters} -> {letters}", kind="vector"))
        return entries

    def _refuse_contradiction(self, leaf: str, match: Match) -> None:
        """Add a leaf to `refused` if its entry contradicts the model's calls."""
        stack = self.stack.get(leaf)
        if stack is not None and match.stack != stack:
            self.refused[leaf] = f"the keymap stacks its layers on axes {match.stack}, the model on {stack}"
            return
        if leaf not in self.certain or leaf in self.unknown:
            return
        roles = self.roles[leaf]
        shape = [size for axis, size in enumerate(self.shapes[leaf]) if axis not in match.stack]
        axes = transposed_axes(match.axes, [roles.axes], shape) if match.weight.kind in ("linear", roles.kind) else None
        # A keymap may order axes differently or split a fused output axis, but the input axes must agree.
        if axes is not None:
            self.refused[leaf] = contradiction_message(match.axes, axes)

    def check(self, config: Config, keymap: KeyMap) -> None:
        """Raise `AttachError` naming every leaf that the configuration targets and that cannot be adapted."""
        guesses = keymap.name == GENERIC.name
        problems: list[str] = []
        for leaf, reason in ({**self.unknown, **self.refused} if guesses else self.refused).items():
            match = keymap.match(leaf)
            if match is not None and len(match.weight.left) == len(self.shapes[leaf]):
                sizes = plan.axis_sizes(match, self.shapes[leaf])
                modules = match.modules(sizes).values()
                parameters = sites.parameter_names(match, sizes).values()
            else:
                modules, parameters = [leaf.rpartition(".")[0]], [leaf]
            if any(matching.is_target(config, module) for module in modules) or any(
                matching.is_parameter(config, parameter) for parameter in parameters
            ):
                is_matrix = leaf in self.unknown and len(self.shapes[leaf]) == 2
                remedy = "; or, if it is (in, out), take the adapter from jaxadapt.init(params, config)"
                problems.append(f"{leaf}: {reason}{remedy if is_matrix else ''}")
        raise_listed(AttachError, "these weights cannot carry the adapter:", problems)

    def check_saved(self, leaves: Sequence[str]) -> None:
        """Raise `AttachError` for leaves in `modules_to_save` whose module keeps state besides its parameters."""
        stateful = [leaf for leaf in leaves if leaf.rpartition(".")[0] in self.stateful]
        raise_listed(
            AttachError,
            "modules_to_save copies only parameters, but the modules of these parameters also have state, which the"
            " adapter's file cannot hold. Remove the modules from modules_to_save:",
            stateful,
        )


@dataclasses.dataclass
class _SurveyInterceptor:
    """Records the roles of leaves, and adds markers beside them, which the model's transforms stack like the leaves."""

    survey: Survey
    tracing: bool = False  # True while a module is traced by itself, so that its submodules are not recorded again

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        module = context.module
        if self.tracing or not interceptor.is_own_method(context):
            return y
        layer = interceptor.bind_layer(module, context.method_name, next_fun)
        for name, value in layer.params.items():
            leaf = ".".join((*module.scope.path, name))
            if leaf not in self.survey.shapes:
                continue
            if interceptor.is_mapped(module.scope):
                self.survey.refused[leaf] = interceptor.MAPPED
                continue
            if value.ndim < 2:
                self.survey.vectors.add(leaf)
            elif leaf not in self.survey.unknown:
                self._record_roles(layer, leaf, name, args, kwargs)
            if not module.scope.has_variable("params", _marker_name(name, 0)):
                for extra in (0, 1):
                    shape = tuple(_MARKER_SIZE + i for i in range(value.ndim + extra))
                    module.scope.put_variable("params", _marker_name(name, extra), jnp.zeros(shape, jnp.bool))
        return y

    def _record_roles(self, layer: call.Layer, leaf: str, name: str, args: Any, kwargs: Any) -> None:
        """Record the roles of one leaf in one call of its module, or the reason why there are none."""
        equation = call.split_input(args, kwargs)[-1] if layer.kernel is not None else None
        self.tracing = True
        try:
            roles = call.roles_of(layer.module, layer.method, name, equation)
            if roles is None:
                output, weights = functools.partial(layer.output, **kwargs), {name: layer.params[name]}
                if layer.kernel is not None or not uses(output, weights, *args)[name]:
                    return  # this method does not use the weight as one that an adapter can follow
                roles = Roles(call.infer_axes(output, weights, name, *args))
        except AttachError as error:
            self.survey.unknown[leaf] = str(error)
            return
        finally:
            self.tracing = False
        before = self.survey.roles.get(leaf)
        if before is None or roles.kind != "linear":
            self.survey.roles[leaf] = before = roles
            self.survey.certain.add(leaf)
        elif roles.axes != before.axes:  # a tied weight, used in both directions
            self.survey.certain.discard(leaf)
        old, axes = before.axes, roles.axes
        if axes not in (old, dataclasses.replace(old, in_axes=old.out_axes, out_axes=old.in_axes)):
            self.survey.unknown[leaf] = f"its calls use it in several ways: {old}, and {axes}"


def _marker_name(name: str, extra: int) -> str:
    return f"{name}{SEP}{extra}"


def survey_module(module: nn.Module, rngs: Any, args: Any, kwargs: Any) -> Survey:
    """Survey a module by `jax.eval_shape` of its `init`.

    A marker with no extra axis and one with one extra axis are added beside each leaf. The axes that the model's
    transforms add to a marker are those that stack the leaf. If they differ between the two, the transform counts its
    axis from the end.
    """
    variables = dict(unbox_tree(jax.eval_shape(lambda: module.init(rngs, *args, **kwargs))))
    base = paths.flatten(variables.pop("params", {}))
    state = [leaf for name in variables.keys() - _PER_CALL_COLLECTIONS for leaf in paths.flatten(variables[name])]
    stateful = frozenset(leaf.rpartition(".")[0] for leaf in state)
    survey = Survey({leaf: tuple(spec.shape) for leaf, spec in base.items()}, frozenset(variables), stateful)

    def init_with_markers() -> Any:
        with nn.intercept_methods(_SurveyInterceptor(survey)):
            return module.init(rngs, *args, **kwargs)

    specs = paths.flatten(unbox_tree(jax.eval_shape(init_with_markers)).get("params", {}))
    for leaf in survey.shapes:
        markers = [specs[marker].shape for extra in (0, 1) if (marker := _marker_name(leaf, extra)) in specs]
        if len(markers) != 2:
            continue
        added = [tuple(i for i, size in enumerate(shape) if size < _MARKER_SIZE) for shape in markers]
        survey.stack[leaf] = added[0]
        if added[0] != added[1]:
            survey.refused[leaf] = (
                "its layers are stacked on a negative axis. Pass a non-negative axis to nn.scan or nn.vmap"
            )
    return survey


# ---------------------------------------------------------------- reads that no adapter can follow


def called_scopes(run: Callable[..., Any], params: Any) -> set[tuple[str, ...]]:
    """Return the scope paths of the modules that a call enters; `run` is as in `check_reads`."""
    scope_paths: set[tuple[str, ...]] = set()

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.scope is not None:
            scope_paths.add(context.module.scope.path)
        return next_fun(*args, **kwargs)

    jax.eval_shape(lambda p: run(p, intercept), params)
    return scope_paths


def check_reads(run: Callable[..., Any], adapted: Mapping[tuple[str, ...], Sequence[str]], params: Any) -> None:
    """Raise `AttachError` for weights that are read outside their own module's call, where the adapter has no effect.

    Inside its module's call each adapted weight is replaced by a copy. If the output still depends on the weight
    itself, the weight is read elsewhere.

    Args:
        run: `run(params, interceptor)` calls the model and returns its output.
        adapted: `{scope path: leaf names}`.
        params: the base parameters.
    """
    names = {(*path, leaf): ".".join((*path, leaf)) for path, leaves in adapted.items() for leaf in leaves}
    stored = {name: lookup(params, keys) for keys, name in names.items()}
    # A quantised weight is made dense within the trace, where nothing is computed.
    values = {
        name: jax.eval_shape(quantized.to_dense, x) if quantized.is_quantized(x) else x for name, x in stored.items()
    }

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not interceptor.is_own_method(context):
            return next_fun(*args, **kwargs)
        interceptor.refuse_mapped(context, adapted)
        names_here = adapted.get(module.scope.path, ())
        leaves = [leaf for leaf in names_here if module.scope.has_variable("params", leaf + SEP)]
        if not leaves:
            return next_fun(*args, **kwargs)
        layer = interceptor.bind_layer(module, context.method_name, next_fun)
        copies = {leaf: module.scope.get_variable("params", leaf + SEP) for leaf in leaves}
        y, changed = layer.run(copies, *args, **kwargs)
        layer.write_back(changed)
        return y

    def output(weights: Mapping[str, Any]) -> Any:
        copies = {(*keys[:-1], keys[-1] + SEP): stored[name] for keys, name in names.items()}
        overlaid = overlay(params, {**copies, **{keys: weights[name] for keys, name in names.items()}})
        return run(jax.tree.map(quantized.to_dense, overlaid, is_leaf=quantized.is_quantized), intercept)

    call.refuse_reads_outside(leaf for leaf, is_live in call.live_weights(output, values).items() if is_live)
