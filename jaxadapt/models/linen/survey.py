"""How a Linen model uses its weights, found without running it: roles, stacked axes, obstacles."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from jaxadapt import methods
from jaxadapt.adapters import target_parameters
from jaxadapt.arrays import quantized
from jaxadapt.arrays.axes import Axes, find_contradiction, transposed_axes
from jaxadapt.configs import Config, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.generic import GENERIC, entry_from_axes
from jaxadapt.keymaps.keymap import KeyMap, Match
from jaxadapt.keymaps.weight import Weight
from jaxadapt.models.linen import collections as linen_tree
from jaxadapt.models.linen import interceptor as calls
from jaxadapt.models.linen.interceptor import SEP
from jaxadapt.models.tracing import rewrite
from jaxadapt.models.tracing import uses as used
from jaxadapt.models.tracing.liveness import live_weights

_WITHIN_ONE_CALL = {"cache", "intermediates", "perturbations"}
_MARK = 10_007  # no real layer count: what else a marker's shape shows, a transform added

# ---------------------------------------------------------------- one abstract init


@dataclasses.dataclass
class Survey:
    """What one abstract `init` showed.

    Args:
        shapes: of every base leaf.
        roles: a known class's or a trace's, by leaf.
        kinds: kind and groups of the leaves that are no plain matrices.
        told: the leaves whose roles their class says, or all their calls; a table that says others is wrong.
        stack: the axes on which each leaf (seen in a call) is stacked.
        vectors: leaves that have fewer than two axes inside their own module.
        unknown: why there are no roles for a leaf; a table may supply them.
        refused: why no adapter can be exact at a leaf, table or not.
        collections: what `init` makes besides "params".
        stateful: the paths of the modules that keep a state in these from call to call, as `nn.BatchNorm` does.
    """

    shapes: dict[str, tuple[int, ...]]
    collections: frozenset[str]
    stateful: frozenset[str]
    roles: dict[str, Axes] = dataclasses.field(default_factory=dict[str, Axes])
    kinds: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict[str, tuple[str, int]])
    told: set[str] = dataclasses.field(default_factory=set[str])
    stack: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict[str, tuple[int, ...]])
    vectors: set[str] = dataclasses.field(default_factory=set[str])
    unknown: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    refused: dict[str, str] = dataclasses.field(default_factory=dict[str, str])

    def lines(self, keymap: KeyMap) -> list[Weight]:
        """The lines that the table lacks or, if generic, only guesses; checks the others' stacks."""
        guesses = keymap.name == GENERIC.name
        out: list[Weight] = []
        for leaf, shape in self.shapes.items():
            site = keymap.match(leaf)
            fits = site is not None and len(site.weight.left) == len(shape)
            stack = self.stack.get(leaf)
            if site is not None and fits and not guesses:
                if stack is not None and site.stack != stack:
                    self.refused[leaf] = f"the table stacks its layers on axes {site.stack}, the model on {stack}"
                # A table may order axes otherwise, or know that an output axis is a fused one; never which is an input.
                elif leaf in self.told and (own := self._turned(leaf, site)) is not None:
                    self.refused[leaf] = find_contradiction(site.axes, own)
            elif leaf in self.roles and leaf not in self.unknown and stack is not None:
                kind = self.kinds.get(leaf, ("linear", 1))
                if site is None or not fits or (site.axes, site.stack) != (self.roles[leaf], stack):
                    out.append(entry_from_axes(leaf, shape, self.roles[leaf], stack, *kind))
            elif fits and leaf in self.vectors:
                axes = " ".join(f"a{i}" for i in range(len(shape)))
                out.append(Weight(leaf, leaf, f"{axes} -> {axes}", kind="vector"))
        return out

    def _turned(self, leaf: str, site: Match) -> Axes | None:
        """The roles that a layer's own calls show, where a table takes its outputs for its inputs."""
        if site.weight.kind not in ("linear", self.kinds.get(leaf, ("linear", 1))[0]) or leaf in self.unknown:
            return None
        shape = [size for axis, size in enumerate(self.shapes[leaf]) if axis not in site.stack]
        return transposed_axes(site.axes, [self.roles[leaf]], shape)

    def check(self, config: Config, table: KeyMap) -> None:
        """Raise `AttachError` naming every leaf that the configuration means and that cannot be adapted."""
        guesses = table.name == GENERIC.name
        bad: list[str] = []
        for leaf, why in ({**self.unknown, **self.refused} if guesses else self.refused).items():
            site = table.match(leaf)
            if site is not None and len(site.weight.left) == len(self.shapes[leaf]):
                sizes = plan.axis_sizes(site, self.shapes[leaf])
                names, own = site.modules(sizes).values(), target_parameters.parameter_names(site, sizes).values()
            else:
                names, own = [leaf.rpartition(".")[0]], [leaf]
            if any(matching.matches(config, m) for m in names) or any(matching.is_parameter(config, p) for p in own):
                plain = leaf in self.unknown and len(self.shapes[leaf]) == 2
                way = "; or, if it is (in, out), take the adapter from jaxadapt.init(config, params)" if plain else ""
                bad.append(f"{leaf}: {why}{way}")
        if bad:
            raise AttachError("these weights cannot carry the adapter:\n" + paths.bullets(bad))

    def check_saved(self, leaves: Sequence[str]) -> None:
        """Raise `AttachError` for leaves of which a copy is not the whole of what their module would be trained in."""
        bad = [leaf for leaf in leaves if leaf.rpartition(".")[0] in self.stateful]
        if bad:
            raise AttachError(
                "modules_to_save means all of a module, and these keep a state besides their parameters, which the"
                " adapter's file would lack; leave them out:\n" + paths.bullets(bad)
            )


@dataclasses.dataclass
class _Marking:
    """The interceptor of the survey: notes roles, and lays markers that the model's transforms stack."""

    survey: Survey
    tracing: bool = False  # inside a module being traced alone, whose parts are not to be noted again

    def __call__(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = next_fun(*args, **kwargs)
        module = context.module
        if self.tracing or not calls.is_own_method(context):
            return y
        for name, value in calls.direct_params(module).items():
            leaf, value = ".".join((*module.scope.path, name)), meta.unbox(value)
            if SEP in name or leaf not in self.survey.shapes:
                continue
            if calls.is_mapped(module.scope):
                self.survey.refused[leaf] = calls.MAPPED
                continue
            if value.ndim < 2:
                self.survey.vectors.add(leaf)
            elif leaf not in self.survey.unknown:
                self._roles(module, context.method_name, leaf, name, value, args, kwargs)
            if not module.scope.has_variable("params", _marker(name, 0)):
                for extra in (0, 1):
                    shape = tuple(_MARK + i for i in range(value.ndim + extra))
                    module.scope.put_variable("params", _marker(name, extra), jnp.zeros(shape, jnp.bool))
        return y

    def _roles(self, module: Any, method: str, leaf: str, name: str, value: Any, args: Any, kwargs: Any) -> None:
        if (said := calls.known_roles(module, method, name)) is not None:
            self.survey.roles[leaf], kind, groups = said
            self.survey.kinds[leaf] = (kind, groups)
            self.survey.told.add(leaf)
            return
        roles_of = calls.known_use(module, method)
        if roles_of is not None and name != "kernel":
            return
        self.tracing = True
        try:
            if roles_of is not None:
                axes = roles_of[0](module, calls.call_input(args, kwargs)[1])
            else:
                call, weights = calls.isolate_method(module, method), {name: value}
                if not rewrite.uses(lambda w, *a: call(w, *a, **kwargs)[0], weights, *args)[name]:
                    return  # a method that does something else; another one tells
                axes = used.infer_axes(lambda w, *a: call(w, *a, **kwargs)[0], weights, name, *args)
        except AttachError as error:
            self.survey.unknown[leaf] = str(error)
            return
        finally:
            self.tracing = False
        before = self.survey.roles.get(leaf)
        if before is None:
            self.survey.roles[leaf] = before = axes
            self.survey.told.add(leaf)
        elif axes != before:  # a tied weight, which runs both ways
            self.survey.told.discard(leaf)
        if axes not in (before, dataclasses.replace(before, in_axes=before.out_axes, out_axes=before.in_axes)):
            self.survey.unknown[leaf] = f"its calls use it in several ways: {before}, and {axes}"


def _marker(name: str, extra: int) -> str:
    return f"{name}{SEP}{extra}"


def survey_module(module: nn.Module, rngs: Any, args: Any, kwargs: Any) -> Survey:
    """Everything an adapter has to know about a model, from `jax.eval_shape` of its `init`."""
    plain = dict(linen_tree.unbox_tree(jax.eval_shape(lambda: module.init(rngs, *args, **kwargs))))
    base = paths.flatten(plain.pop("params", {}))
    state = [leaf for name in plain.keys() - _WITHIN_ONE_CALL for leaf in paths.flatten(plain[name])]
    stateful = frozenset(leaf.rpartition(".")[0] for leaf in state)
    found = Survey({leaf: tuple(spec.shape) for leaf, spec in base.items()}, frozenset(plain), stateful)

    def marked() -> Any:
        with nn.intercept_methods(_Marking(found)):
            return module.init(rngs, *args, **kwargs)

    shapes = paths.flatten(linen_tree.unbox_tree(jax.eval_shape(marked)).get("params", {}))
    for leaf in found.shapes:
        marks = [shapes[m].shape for extra in (0, 1) if (m := _marker(leaf, extra)) in shapes]
        if len(marks) != 2:
            continue
        added = [tuple(i for i, n in enumerate(shape) if n < _MARK) for shape in marks]
        found.stack[leaf] = added[0]
        if added[0] != added[1]:
            found.refused[leaf] = (
                "its layers are stacked on a negative axis; give nn.scan or nn.vmap a non-negative one"
            )
    return found


# ---------------------------------------------------------------- reads that no adapter can follow


def called_scopes(run: Callable[..., Any], params: Any) -> set[tuple[str, ...]]:
    """The scope paths of the modules that a call enters; `run` as in `check_reads`."""
    seen: set[tuple[str, ...]] = set()

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.scope is not None:
            seen.add(context.module.scope.path)
        return next_fun(*args, **kwargs)

    jax.eval_shape(lambda p: run(p, intercept), params)
    return seen


def check_reads(run: Callable[..., Any], adapted: Mapping[tuple[str, ...], Sequence[str]], params: Any) -> None:
    """Refuse weights that are read outside their own module's call: the adapter would miss that use.

    Args:
        run: `run(params, interceptor)` calls the model and returns its output.
        adapted: leaf names by scope path.
        params: the base parameters.

    Inside its module's call each adapted weight is replaced by a copy; whatever still reaches the output
    from the weight itself was read elsewhere.
    """
    names = {(*path, leaf): ".".join((*path, leaf)) for path, leaves in adapted.items() for leaf in leaves}
    held = {name: lookup(params, keys) for keys, name in names.items()}
    # (A quantised weight is made dense within the trace, where that costs nothing.)
    values = {
        name: jax.eval_shape(quantized.to_dense, x) if quantized.is_quantized(x) else x for name, x in held.items()
    }

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not calls.is_own_method(context):
            return next_fun(*args, **kwargs)
        calls.refuse_mapped(context, adapted)
        here = adapted.get(module.scope.path, ())
        leaves = [leaf for leaf in here if module.scope.has_variable("params", leaf + SEP)]
        if not leaves:
            return next_fun(*args, **kwargs)
        layer = calls.known_use(module, context.method_name)
        if layer is not None and leaves == ["kernel"]:  # any output of this shape that depends on x will do
            x, rest = calls.call_input(args, kwargs)
            use = layer[1](module, x, rest, layer[0](module, rest))
            w = meta.unbox(module.scope.get_variable("params", "kernel" + SEP))
            y = jnp.einsum(f"{use.x},{use.w}->{use.y}", x, methods.as_computable(w))
            return y if module.dtype is None else y.astype(module.dtype)
        call = calls.isolate_method(module, context.method_name)
        copied = {leaf: module.scope.get_variable("params", leaf + SEP) for leaf in leaves}
        y, changed = call(copied, *args, **kwargs)
        calls.write_back(module.scope, changed)
        return y

    def output(weights: Mapping[str, Any]) -> Any:
        copies = {(*keys[:-1], keys[-1] + SEP): held[name] for keys, name in names.items()}
        laid = overlay(params, {**copies, **{keys: weights[name] for keys, name in names.items()}})
        return run(jax.tree.map(quantized.to_dense, laid, is_leaf=quantized.is_quantized), intercept)

    outside = [leaf for leaf, used in live_weights(output, values).items() if used]
    if outside:
        raise AttachError(
            "these weights are read outside their own module's call, where an adapter cannot follow:\n"
            + paths.bullets(outside)
            + "\nLeave them out with exclude_modules, or let the reader call the module"
        )


def lookup(tree: Any, keys: Sequence[str]) -> Any:
    """What lies at these keys of nested mappings."""
    return functools.reduce(lambda node, key: node[key], keys, tree)


def overlay(tree: Mapping[str, Any], extra: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Nested mappings with further (or other) leaves at these keys; what is not on the way is shared."""
    inside: dict[str, dict[tuple[str, ...], Any]] = {}
    out = dict(tree)
    for (first, *rest), value in extra.items():
        if rest:
            inside.setdefault(first, {})[tuple(rest)] = value
        else:
            out[first] = value
    return {**out, **{key: overlay(out.get(key, {}), below) for key, below in inside.items()}}
