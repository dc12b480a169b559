"""Interception of method calls inside a Linen model: to apply adapters and dequantise weights, and to survey the model.

Abstract calls show the roles of weight axes, stacked axes, and obstacles to adapters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta, unfreeze
from flax.core.scope import Scope, subtract_filters

from jaxadapt.adapters import sites
from jaxadapt.arrays import quantized
from jaxadapt.arrays.products import contradiction_message, transposed_axes
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.generic import GENERIC, entry_from_axes
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.weight import Weight
from jaxadapt.methods.applied import Applicable, AppliedMethod, AppliedMethods, together
from jaxadapt.methods.base import Drop
from jaxadapt.models import call
from jaxadapt.models.call import Roles
from jaxadapt.models.linen.collections import lookup, overlay, unbox_tree
from jaxadapt.models.tracing import uses

SEP = "~"  # marks the names of leaves that are added to `params` for one call and never stored
DROPOUT = "dropout"  # the random stream that `flax.linen.Dropout` uses


# ---------------------------------------------------------------- intercepted calls


def is_own_method(context: Any) -> bool:
    """Return True if the call is of a method of a bound module's class, other than `setup`.

    A function that `nn.scan`, `nn.cond` … runs on the module's scope is not a method; the calls in it are intercepted.
    """
    name, module = context.method_name, context.module
    is_method = any(name in vars(c) for c in type(module).__mro__)
    return is_method and name != "setup" and module.scope is not None


def refuse_mapped(context: Any, adapted: Mapping[tuple[str, ...], Iterable[str]]) -> None:
    """Raise `AttachError` if a module with adapted leaves is called with transformed variables (`nn.map_variables`)."""
    module = context.module
    if isinstance(module, nn.WeightNorm | nn.SpectralNorm):
        inner = module.layer_instance.scope
        prefix = inner.path if inner is not None else None
        mapped = [path for path in adapted if prefix is not None and path[: len(prefix)] == prefix]
    else:
        mapped = [module.scope.path] if is_mapped(module.scope) and module.scope.path in adapted else []
    leaves = [".".join((*path, leaf)) for path in mapped for leaf in adapted[path]]
    if leaves:
        raise AttachError(f"{', '.join(leaves)}: {MAPPED}. Exclude the layer with exclude_modules")


MAPPED = (
    "its weight passes through nn.map_variables (which nn.WeightNorm and nn.SpectralNorm also use),"
    " which would change the adapter too"
)


def is_mapped(scope: Scope) -> bool:
    """Return True if a scope's variables pass through `nn.map_variables`, which Flax records in `debug_path`."""
    return any("map_variables(" in part for part in scope.debug_path)


def bind_layer(module: nn.Module, method: str, plain: Callable[..., Any]) -> call.Layer:
    """Return one method of a module as a layer that an adapter can run.

    Its `run` works on a copy of the module's scope without the leaves marked with `SEP`, and draws the same random
    numbers as the plain call. The changed state is that of the mutable collections other than "params", such as a cache
    or batch statistics.
    """
    scope = module.scope
    assert scope is not None
    mutable = subtract_filters(scope.mutable, "params")

    def run(weights: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        variables: dict[str, Any] = unfreeze(dict(scope.variables()))
        stored = {k: v for k, v in variables.get("params", {}).items() if SEP not in k}
        variables["params"] = {**stored, **weights}
        # A scope belongs to the trace that creates it, so it is created here and not outside `run`.
        copy = Scope(variables, scope.rngs, scope.name, mutable, path=scope.path, flags=scope.flags)
        copy.rng_counters = scope.rng_counters
        y = getattr(module.copy(parent=copy), method)(*args, **kwargs)
        captured = copy.get_variable("intermediates", method)
        # The outer call captures this output too (capture_intermediates), so it is removed here.
        if isinstance(captured, tuple) and captured and captured[-1] is y:
            copy.put_variable("intermediates", method, captured[:-1])
        return y, {k: v for k, v in copy.mutable_variables().items() if k != "params"}

    def write_back(changed: Mapping[str, Any]) -> None:
        for collection, tree in changed.items():
            for key, value in unfreeze(dict(tree)).items():
                scope.put_variable(collection, key, value)

    own = {k: v for k, v in scope.variables().get("params", {}).items() if not isinstance(v, Mapping) and SEP not in k}
    params = {k: meta.unbox(v) for k, v in own.items()}
    function = getattr(type(module), method)
    return call.Layer(".".join(scope.path), module, function, method == "__call__", params, plain, run, write_back)


# ---------------------------------------------------------------- one call of a module with adapted leaves


@dataclasses.dataclass(frozen=True)
class LeafAdapter:
    """One adapter, or those of a batch's rows, at one leaf.

    Attributes:
        site: the method at this leaf.
        keys: the names in `params` of its tensors during the call.
        shared: the names in `params` of the tensors that all layers and all rows have in common.
        whole: such tensors that are not in `params`, because the model's scan would slice them there.
    """

    site: Applicable
    keys: Mapping[str, str]
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    whole: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    @property
    def rate(self) -> float:
        """The dropout rate."""
        return self.site.method.dropout(self.site.hparams)

    def make_hook(self, scope: Any, drop: Drop | None) -> AppliedMethod:
        """Return the method with the tensors that `scope` holds."""
        if self.whole and any("jit(" in part for part in scope.debug_path):
            raise AttachError(
                f"{'.'.join(scope.path)}: cannot pass {', '.join(self.whole)}, which belong to the whole adapter, into"
                " nn.jit around or inside a scan over layers: its compiled function would keep the first values. Remove"
                " that nn.jit, and compile the whole call with jax.jit"
            )
        tensors, shared = (
            {tensor: scope.get_variable("params", key) for tensor, key in keys.items()}
            for keys in (self.keys, self.shared)
        )
        shared |= self.whole
        if isinstance(self.site, call.RowSite):
            return self.site.apply(tensors, shared)
        return AppliedMethod.in_call(self.site, {**tensors, **shared}, drop)


@dataclasses.dataclass(frozen=True)
class Interceptor:
    """Applies adapters, and dequantises weights, in the calls of a model's modules.

    Args:
        sites: `{scope path: {leaf: one LeafAdapter per adapter}}`.
        quantized_scopes: the scope paths of modules with quantised parameters.
        dropout: True if the call has a random stream "dropout". Each site with a dropout rate then draws from it.
        running: the scope paths of modules whose plain call is in progress. The methods that such a call uses are not
            intercepted.
    """

    sites: Mapping[tuple[str, ...], Mapping[str, Sequence[LeafAdapter]]]
    quantized_scopes: frozenset[tuple[str, ...]] = frozenset()
    dropout: bool = False
    running: list[tuple[str, ...]] = dataclasses.field(default_factory=list[tuple[str, ...]])

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not self._intercepts(context):
            return next_fun(*args, **kwargs)
        refuse_mapped(context, self.sites)
        hooks = self._active_hooks(module.scope)
        if not hooks and module.scope.path not in self.quantized_scopes:
            return next_fun(*args, **kwargs)

        def plain(*args: Any, **kwargs: Any) -> Any:
            self.running.append(module.scope.path)
            try:
                return next_fun(*args, **kwargs)
            finally:
                self.running.pop()

        return call.apply(bind_layer(module, context.method_name, plain), hooks, args, kwargs)

    def _intercepts(self, context: Any) -> bool:
        return is_own_method(context) and context.module.scope.path not in self.running

    def _active_hooks(self, scope: Any) -> dict[str, AppliedMethod | AppliedMethods]:
        """Return `{leaf: hook}` for the adapters of one module."""
        hooks: dict[str, AppliedMethod | AppliedMethods] = {}
        for leaf, adapters in self.sites.get(scope.path, {}).items():
            if not scope.has_variable("params", next(iter(adapters[0].keys.values()))):
                continue  # a copy of the scope, whose caller applies the adapters
            applied = tuple(each.make_hook(scope, self._make_dropout(each.rate, scope)) for each in adapters)
            hooks[leaf] = together(applied)
        return hooks

    def _make_dropout(self, rate: float, scope: Scope) -> Drop | None:
        """Return a dropout with a key from the scope's stream, or None if dropout is off."""
        if not rate or not self.dropout:
            return None
        if not scope.has_rng(DROPOUT):
            raise AttachError(
                f'the call has rngs={{"{DROPOUT}": …}}, but these layers with dropout do not get it:\n'
                + paths.bullets(self._layers_without_stream(scope))
                + f'\nPass split_rngs={{"params": True, "{DROPOUT}": True}} to the nn.scan (or nn.vmap, …) around them,'
                " or turn the adapters' dropout off with model.clone(deterministic=True)"
            )
        key = scope.make_rng(DROPOUT)
        return Drop(rate, lambda: key)

    def _layers_without_stream(self, scope: Scope) -> list[str]:
        """Return the layers with dropout in the scope's lifted transform, which all see the same random streams."""
        prefix = scope.root.path
        layers_inside = {path: leaves.values() for path, leaves in self.sites.items() if path[: len(prefix)] == prefix}
        return [
            ".".join(path)
            for path, leaves in layers_inside.items()
            if any(each.rate for adapters in leaves for each in adapters)
        ]


@dataclasses.dataclass(frozen=True)
class UseRecorder(Interceptor):
    """Records for `summary` how each adapted weight is followed, as `{dotted leaf: note}`."""

    notes: dict[str, str] = dataclasses.field(default_factory=dict[str, str])

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, method = context.module, context.method_name
        if self._intercepts(context) and (hooks := self._active_hooks(module.scope)):
            name = f"{type(module).__name__}.{method}".removesuffix(".__call__")
            notes = call.describe(name, bind_layer(module, method, next_fun), hooks, args, kwargs)
            self.notes.update({".".join((*module.scope.path, leaf)): note for leaf, note in notes.items()})
        return super().__call__(next_fun, args, kwargs, context)


def intercept(sites: Mapping[tuple[str, ...], Mapping[str, Sequence[LeafAdapter]]]) -> AbstractContextManager[None]:
    """Return a context in which the calls of Linen modules apply these adapters."""
    return nn.intercept_methods(Interceptor(sites))


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
        if self.tracing or not is_own_method(context):
            return y
        layer = bind_layer(module, context.method_name, next_fun)
        for name, value in layer.params.items():
            leaf = ".".join((*module.scope.path, name))
            if leaf not in self.survey.shapes:
                continue
            if is_mapped(module.scope):
                self.survey.refused[leaf] = MAPPED
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
        if not is_own_method(context):
            return next_fun(*args, **kwargs)
        refuse_mapped(context, adapted)
        names_here = adapted.get(module.scope.path, ())
        leaves = [leaf for leaf in names_here if module.scope.has_variable("params", leaf + SEP)]
        if not leaves:
            return next_fun(*args, **kwargs)
        layer = bind_layer(module, context.method_name, next_fun)
        copies = {leaf: module.scope.get_variable("params", leaf + SEP) for leaf in leaves}
        y, changed = layer.run(copies, *args, **kwargs)
        layer.write_back(changed)
        return y

    def output(weights: Mapping[str, Any]) -> Any:
        copies = {(*keys[:-1], keys[-1] + SEP): stored[name] for keys, name in names.items()}
        overlaid = overlay(params, {**copies, **{keys: weights[name] for keys, name in names.items()}})
        return run(jax.tree.map(quantized.to_dense, overlaid, is_leaf=quantized.is_quantized), intercept)

    call.refuse_reads_outside(leaf for leaf, is_live in call.live_weights(output, values).items() if is_live)
