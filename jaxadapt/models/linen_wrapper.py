"""Adapters on Linen modules: a wrapper with the module's `init`, `apply` and `bind`.

An adapter is stored in its own collection, `{"params": base, "lora": {name: tree}}`. `init` plans it from a survey of
the module: abstract calls show the roles of weight axes, stacked axes, and obstacles to adapters.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import partial_eval

from jaxadapt.adapters import selection
from jaxadapt.adapters.adapter import Adapter, Recipe, Sites, collection_name, integers_name, is_array
from jaxadapt.adapters.sites import parameter_names
from jaxadapt.arrays import quantized
from jaxadapt.arrays.products import contradiction_message, transposed_axes
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, raise_listed, warn
from jaxadapt.keymaps import families, plan
from jaxadapt.keymaps.keymap import GENERIC, KeyMap, Match, entry_from_axes, fitting_match
from jaxadapt.keymaps.weight import Weight
from jaxadapt.methods.base import get_method
from jaxadapt.methods.prompt import PromptMethod
from jaxadapt.models import attention_calls, call, planning, tracing, trees
from jaxadapt.models.linen_call import (
    DROPOUT,
    MAPPED,
    SEP,
    Overlay,
    add_rows,
    bind_layer,
    build_overlay,
    call_module,
    is_mapped,
    is_own_method,
    key_paths,
    measure_base,
    refuse_mapped,
)

# ---------------------------------------------------------------- one abstract init

PER_CALL = {"cache", "intermediates", "perturbations"}  # the collections that hold nothing between calls
_MARKER_SIZE = 10_007  # larger than any layer count: a transform added each smaller axis of a marker's shape


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
        places: `{leaf: the places of the numbers of stacked axes in its module's path}`, if they are known.
        unknown: `{leaf: reason}` for leaves without roles. A keymap may supply them.
        refused: `{leaf: reason}` for leaves on which no adapter is exact, with or without a keymap.
        tracing: True while a module is traced by itself, so that its submodules are not recorded again.
    """

    shapes: dict[str, tuple[int, ...]]
    collections: frozenset[str]
    stateful: frozenset[str]
    roles: dict[str, call.Roles] = dataclasses.field(default_factory=dict[str, call.Roles])
    certain: set[str] = dataclasses.field(default_factory=set[str])
    stack: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict[str, tuple[int, ...]])
    places: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict[str, tuple[int, ...]])
    vectors: set[str] = dataclasses.field(default_factory=set[str])
    unknown: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    refused: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    tracing: bool = False

    def entries(self, keymap: KeyMap) -> list[Weight]:
        """Return entries for the leaves that the keymap lacks or, if it is the generic one, only guesses.

        Leaves where the keymap contradicts the model are added to `refused`.
        """
        entries: list[Weight] = []
        for leaf, shape in self.shapes.items():
            match = fitting_match(keymap, leaf, shape)
            if match is not None and keymap.name != GENERIC.name:
                self._refuse_contradiction(leaf, match)
            elif leaf in self.roles and leaf not in self.unknown and leaf in self.stack:
                roles, stack = self.roles[leaf], self.stack[leaf]
                if match is None or (match.axes, match.stack) != (roles.axes, stack):
                    entries.append(
                        entry_from_axes(leaf, shape, roles.axes, stack, roles.kind, roles.groups, self.places.get(leaf))
                    )
            elif match is not None and leaf in self.vectors:
                letters = " ".join(f"a{i}" for i in range(len(shape)))
                entries.append(Weight(leaf, leaf, f"{letters} -> {letters}", kind="vector"))
        return entries

    def _refuse_contradiction(self, leaf: str, match: Match) -> None:
        """Add a leaf to `refused` if its entry contradicts the model's calls."""
        stack = self.stack.get(leaf, match.stack)
        if match.stack != stack:
            self.refused[leaf] = f"the keymap stacks its layers on axes {match.stack}, the model on {stack}"
        elif (
            leaf in self.certain
            and leaf not in self.unknown
            and match.weight.kind in ("linear", "fused", self.roles[leaf].kind)
        ):
            shape = [size for axis, size in enumerate(self.shapes[leaf]) if axis not in match.stack]
            # A keymap may order axes differently or split a fused output axis, but the input axes must agree.
            if (axes := transposed_axes(match.axes, [self.roles[leaf].axes], shape)) is not None:
                self.refused[leaf] = contradiction_message(match.axes, axes)

    def check(self, config: Config, keymap: KeyMap) -> None:
        """Raise `AttachError` naming every leaf that the configuration targets and that cannot be adapted."""
        reasons = self.unknown | self.refused if keymap.name == GENERIC.name else self.refused
        problems: list[str] = []
        for leaf, reason in reasons.items():
            match = keymap.match(leaf)
            if match is not None and len(match.weight.left) == len(self.shapes[leaf]):
                sizes = plan.axis_sizes(match, self.shapes[leaf])
                modules = match.modules(sizes).values()
                parameters = parameter_names(match, sizes).values()
            else:
                modules, parameters = [leaf.rpartition(".")[0]], [leaf]
            if any(matching.is_target(config, module) for module in modules) or any(
                matching.is_parameter(config, parameter) for parameter in parameters
            ):
                is_matrix = leaf in self.unknown and len(self.shapes[leaf]) == 2
                remedy = "; or, if it is (in, out), take the adapter from jaxadapt.init(params, config)"
                problems.append(f"{leaf}: {reason}{remedy if is_matrix else ''}")
        raise_listed(AttachError, "these weights cannot carry the adapter:", problems)

    def intercept(self, next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Record the roles of a module's leaves, and add markers beside them.

        The model's transforms stack the markers like the leaves.
        """
        y = next_fun(*args, **kwargs)
        module = context.module
        if self.tracing or not is_own_method(context):
            return y
        layer = bind_layer(module, context.method_name, next_fun)
        for name, value in layer.params.items():
            leaf = ".".join((*module.scope.path, name))
            if leaf not in self.shapes:
                continue
            if is_mapped(module.scope):
                self.refused[leaf] = MAPPED
                continue
            if value.ndim < 2:
                self.vectors.add(leaf)
            elif leaf not in self.unknown:
                self._record_roles(layer, leaf, name, args, kwargs)
            if not module.scope.has_variable("params", name + SEP):
                sizes = tuple(range(_MARKER_SIZE, _MARKER_SIZE + value.ndim + 1))
                markers = {"0": jnp.zeros(sizes[:-1], jnp.bool), "1": jnp.zeros(sizes, jnp.bool)}
                module.scope.put_variable("params", name + SEP, markers)
        return y

    def _record_roles(self, layer: call.Layer, leaf: str, name: str, args: Any, kwargs: Any) -> None:
        """Record the roles of one leaf in one call of its module, or the reason why there are none."""
        equation = call.split_input(args, kwargs)[-1] if layer.known else None
        self.tracing = True
        try:
            roles = call.roles_of(layer.module, layer.method, name, equation)
            if roles is None:
                output = functools.partial(layer.output, **kwargs)
                found = None if layer.known else tracing.uses(output, {name: layer.params[name]}, *args)[name]
                if not found:
                    return  # this method does not use the weight as one that an adapter can follow
                roles = call.Roles(call.infer_axes(found, name))
        except AttachError as error:
            self.unknown[leaf] = str(error)
            return
        finally:
            self.tracing = False
        before = self.roles.get(leaf)
        if before is None or roles.kind != "linear":
            self.roles[leaf] = before = roles
            self.certain.add(leaf)
        elif roles.axes != before.axes:  # a tied weight, used in both directions
            self.certain.discard(leaf)
        old = before.axes
        if roles.axes not in (old, dataclasses.replace(old, in_axes=old.out_axes, out_axes=old.in_axes)):
            self.unknown[leaf] = f"its calls use it in several ways: {old}, and {roles.axes}"


def survey_module(module: nn.Module, rngs: Any, args: Any, kwargs: Any) -> Survey:
    """Survey a module by `jax.eval_shape` of its `init`.

    Two markers are added beside each leaf, one with its number of axes and one with one axis more. The axes that the
    model's transforms add to a marker are those that stack the leaf. If they differ between the two, the transform
    counts its axis from the end.
    """
    variables = dict(trees.unbox_tree(jax.eval_shape(lambda: module.init(rngs, *args, **kwargs))))
    base = paths.flatten(variables.pop("params", {}))
    state = {name: tree for name, tree in variables.items() if name not in PER_CALL}
    stateful = frozenset(leaf.rpartition(".")[0] for tree in state.values() for leaf in paths.flatten(tree))
    survey = Survey({leaf: tuple(spec.shape) for leaf, spec in base.items()}, frozenset(variables), stateful)

    def init_with_markers() -> Any:
        with nn.intercept_methods(survey.intercept):
            return module.init(rngs, *args, **kwargs)

    specs = paths.flatten(trees.unbox_tree(jax.eval_shape(init_with_markers)).get("params", {}))
    for leaf in survey.shapes:
        added = [
            tuple(i for i, size in enumerate(specs[name].shape) if size < _MARKER_SIZE)
            for name in (f"{leaf}{SEP}.0", f"{leaf}{SEP}.1")
            if name in specs
        ]
        if added:
            survey.stack[leaf] = added[0]
        if added and added[0] != added[1]:
            survey.refused[leaf] = (
                "its layers are stacked on a negative axis. Pass a non-negative axis to nn.scan or nn.vmap"
            )
    return survey


# ---------------------------------------------------------------- reads that no adapter can follow


def check_reads(
    run: Callable[..., Any], adapted: Mapping[tuple[str, ...], Sequence[str]], params: Any
) -> set[tuple[str, ...]]:
    """Raise `AttachError` for weights that are read outside their own module's call, where the adapter has no effect.

    Inside its module's call each adapted weight is replaced by a copy. If the output still depends on the weight
    itself, the weight is read elsewhere.

    Args:
        run: `run(params, interceptor)` calls the model and returns its output.
        adapted: `{scope path: leaf names}`.
        params: the base parameters.

    Returns the scope paths of the modules that the call enters.
    """
    stored = {(*path, x): trees.lookup(params, (*path, x)) for path, leaves in adapted.items() for x in leaves}
    called: set[tuple[str, ...]] = set()

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.scope is not None:
            called.add(module.scope.path)
        if not is_own_method(context):
            return next_fun(*args, **kwargs)
        refuse_mapped(context, adapted)
        scope: Any = module.scope
        marked = {x: x + SEP for x in adapted.get(scope.path, ()) if scope.has_variable("params", x + SEP)}
        if not marked:
            return next_fun(*args, **kwargs)
        layer = bind_layer(module, context.method_name, next_fun)
        copies = {leaf: scope.get_variable("params", name) for leaf, name in marked.items()}
        y, changed = layer.run(copies, *args, **kwargs)
        layer.write_back(changed)
        return y

    def output(weights: dict[tuple[str, ...], Any]) -> Any:
        overlaid = trees.overlay(params, {(*keys[:-1], keys[-1] + SEP): x for keys, x in stored.items()} | weights)
        return run(jax.tree.map(quantized.to_dense, overlaid, is_leaf=quantized.is_quantized), intercept)

    live = call.live_weights(output, stored)
    call.refuse_reads_outside(".".join(keys) for keys, is_live in live.items() if is_live)
    return called


# ---------------------------------------------------------------- the wrapper


_CACHE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A Linen module with adapters, with the module's `init`, `apply` and `bind`.

    The wrapper is not an `nn.Module`, so it cannot be a submodule. The module inside it is unchanged.

    Args:
        module: the base module.
        adapters: `((name, config), …)`.
        active: the names of the adapters that `apply` applies, in this order.
        keymap: a family's name, a `KeyMap`, or None to recognize the family.
        dtype: the dtype of new adapter parameters; float32 by default.
        layout: the sites of the bank of adapters, if the module has one; `jaxadapt.serving.attach` sets it.
        rows: the adapters of the rows of the calls; `jaxadapt.serving.route` sets it.
        data: `{adapter: {name: array}}` of the calls, such as an aLoRA's tokens; `jaxadapt.models.invoke` sets it.
        deterministic: True turns the adapters' dropout off. False turns it on, and a call without a random stream
            "dropout" raises. None turns it on in calls whose `rngs` have that stream.

    `deterministic` is a field of the wrapper, which `clone` changes. It is not an argument of `apply`, because `apply`
    passes every argument to the module, which may have an argument `deterministic` too:
    `model.clone(deterministic=True).apply(variables, x, deterministic=False)` turns off only the adapters' dropout.
    """

    module: nn.Module
    adapters: tuple[tuple[str, Config], ...]
    active: tuple[str, ...]
    keymap: KeyMap | str | None = None
    dtype: Any = None
    data: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=dict[str, Mapping[str, Any]], repr=False, compare=False
    )
    deterministic: bool | None = None
    layout: call.RowLayout | None = dataclasses.field(default=None, repr=False)
    rows: call.Rows | None = dataclasses.field(default=None, repr=False, compare=False)
    # Signatures of calls that were checked: they read no adapted weight outside its module.
    _checked: set[Hashable] = dataclasses.field(default_factory=set[Hashable], init=False, repr=False, compare=False)
    # Set after a call with a stream for dropout, or after the warning that there was none. Clones share the flag.
    _warned: call.Warned = dataclasses.field(default_factory=call.Warned, repr=False, compare=False, kw_only=True)

    def clone(self, **changes: Any) -> Adapted:
        """Copy the wrapper with other values for some fields, as `nn.Module.clone` does.

        >>> import jaxadapt
        >>> config = jaxadapt.LoraConfig(r=2, target_modules=["layers_0"], lora_dropout=0.1)
        >>> model = jaxadapt.adapt(nn.Sequential([nn.Dense(2)]), config)
        >>> model.clone(deterministic=True).deterministic
        True
        """
        return dataclasses.replace(self, **changes)

    copy = clone  # the module's own would leave the adapters out

    def with_adapter(self, name: str, config: Config, shared: Mapping[str, Any]) -> Adapted:
        """Return a wrapper with one more adapter. Only the new adapter is active.

        Raises `AttachError` if one of the arguments that all adapters share, in `shared`, is given and another.
        """
        for argument, value in shared.items():
            present = getattr(self, argument)
            if value is not None and value != present:
                raise AttachError(
                    f"cannot use {argument}={value!r}: all adapters of a wrapper share this argument, and this wrapper"
                    f" has {present!r}; leave it out"
                )
        return dataclasses.replace(self, adapters=(*self.adapters, (name, config)), active=(name,))

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the module, for example for `apply(…, method=model.encode)`."""
        # "module" is missing while copy or pickle builds an instance; dunder names are protocol look-ups by Python.
        if name == "module" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AttachError(
            "an adapted Linen module cannot be part of another module; call it with apply(variables, …). To adapt a"
            " part of a model, adapt the outermost module, and select the part's layers with target_modules"
        )

    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Initialize the variables, `{"params": base, …, "lora": {name: tree}}`.

        The base values are bit for bit those of the module's `init`. Under `jax.eval_shape` the result is abstract.
        DoRA, copies (`modules_to_save`) and trained tokens start from these values. For other parameters, make the
        adapter with `jaxadapt.init(params, config, key=key, keymap=jaxadapt.extract(variables).keymap)`.

        Args:
            rngs: a key or `{stream: key}`. The initial values of an adapter come from the stream that is named like its
                collection ("lora"), else from a key folded from "params".
            args: the positional arguments of the module's `init`.
            kwargs: the keyword arguments of the module's `init`.

        Raises `TargetError`, `KeyMapError` or `AttachError` for modules that the configuration selects and that cannot
        be adapted.
        """
        return self.init_with_output(rngs, *args, **kwargs)[1]

    def lazy_init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Initialize the variables from arguments that may be abstract, as the module's `lazy_init` does."""
        return partial_eval.lazy_init(self.init)(rngs, *args, **kwargs)

    def init_with_output(self, rngs: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Return the output of the module's `init_with_output`, without adapters, and the variables as from `init`.

        A new adapter with default initial values does not change the output.
        """
        plans = self._plan_adapters(rngs, args, kwargs)
        y, variables = self.module.init_with_output(rngs, *args, **kwargs)
        out: dict[str, Any] = dict(variables)
        base = planning.BaseParams(paths.flatten(out.get("params", {})), out)
        for name, (recipe, sites) in plans.items():
            key = _adapter_key(rngs, collection_name(recipe.config), name)
            adapter = Adapter.of_leaves(recipe.config, base.new_values(recipe, sites, key, self.dtype), recipe.keymap)
            for collection, tree in trees.box_like_base(adapter, base.held).named(name).items():
                out[collection] = {**out.get(collection, {}), **tree}
        return y, out

    def _plan_adapters(self, rngs: Any, args: Any, kwargs: Any) -> dict[str, tuple[Recipe, Sites]]:
        """Return `{name: (recipe, sites)}` from shapes only, so that all checks run before any computation."""
        model = survey_module(self.module, rngs, args, kwargs)
        own = {collection_name(config) for _, config in self.adapters}
        if occupied := sorted(model.collections & (own | set(map(integers_name, own)))):
            raise AttachError(
                f"cannot add the adapter: the module has a collection {occupied} of its own. Rename that"
                " collection in the module"
            )
        keymap = families.resolve_keymap(self.keymap, model.shapes, model=type(self.module))
        entries = model.entries(keymap)
        plans: dict[str, tuple[Recipe, Sites]] = {}
        for name, config in self.adapters:
            method = get_method(config)
            if isinstance(method, PromptMethod):
                sizes = measure_base(self.module, rngs, args, kwargs)
                config = method.complete(config, attention_calls.with_width(sizes, keymap, model.shapes))
            plans[name] = selection.make_recipe(config, keymap, model.shapes, entries, check=model.check)
        copies = [site for _, sites in plans.values() for site in sites if site.method.copies]
        saved = [site.leaf for site in copies if site.hparams.because == "modules_to_save"]
        raise_listed(
            AttachError,
            "modules_to_save copies only parameters, but the modules of these parameters also have state, which the"
            " adapter's file cannot hold. Remove the modules from modules_to_save:",
            (leaf for leaf in saved if leaf.rpartition(".")[0] in model.stateful),
        )
        return plans

    def apply(self, variables: Mapping[str, Any], *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """Call the module's `apply` with the active adapters.

        The adapters' dropout is on if `rngs` has a stream "dropout", unless the field `deterministic` says otherwise.
        With `deterministic=None` a wrapper warns once if no call so far had that stream.

        Args:
            variables: the variables as from `init`.
            args: the positional arguments of the module's `apply`.
            mutable: as for the module's `apply`. If it includes the adapters' collections, they are returned unchanged.
            kwargs: the keyword arguments of the module's `apply`: `rngs`, `method` and others.

        Returns what the module's `apply` returns.

        Raises `AttachError` if the variables lack an active adapter or its configuration, if the configuration is not
        the wrapper's, if the call uses an adapted weight where no adapter can follow, or if `rngs` has a stream
        "dropout" that an adapted layer with dropout does not see (see `split_rngs` of `nn.scan`).
        """
        overlay = self._make_overlay(variables, kwargs.get("rngs"))
        self._check_reads(overlay, args, kwargs, mutable)

        def call(variables: Any, *args: Any, **kwargs: Any) -> Any:
            with nn.intercept_methods(overlay.intercept):
                return self.module.apply(variables, *args, mutable=mutable, **kwargs)

        variables = overlay.module_variables()
        out = (
            call(variables, *args, **kwargs)
            if overlay.prompt is None
            else call_module(self.module, overlay.prompt, call, variables, args, kwargs)
        )
        return out if mutable is False else (out[0], overlay.restore(out[1], mutable))

    def bind(self, variables: Mapping[str, Any], *args: Any, **options: Any) -> BoundModule:
        """Bind the module and its active adapters to variables, for interactive use.

        Args:
            variables: the variables as from `init`.
            args: the positional arguments of the module's `bind`.
            options: the keyword arguments of the module's `bind`: `rngs` and `mutable`.
        """
        overlay = self._make_overlay(variables, options.get("rngs"))
        if overlay.prompt is not None:
            raise AttachError("cannot bind a module to an adapter with virtual tokens; call apply")

        def check(method: str, args: Any, kwargs: Any) -> None:
            self._check_reads(overlay, args, {**kwargs, "method": method, "rngs": options.get("rngs")}, True)

        return BoundModule(self.module.bind(overlay.module_variables(), *args, **options), overlay, check, self)

    def notes(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, str]:
        """Return `{leaf: note}` on how each adapted weight is followed in one abstract `apply`."""
        overlay = self.clone(deterministic=True)._make_overlay(variables, None)
        notes: dict[str, str] = {}
        with nn.intercept_methods(dataclasses.replace(overlay, notes=notes).intercept):
            jax.eval_shape(lambda: self.module.apply(overlay.module_variables(), *args, **kwargs))
        return notes

    def _make_overlay(self, variables: Mapping[str, Any], rngs: Any) -> Overlay:
        """Return the overlay of one call.

        Raise, or warn once, if adapters have dropout and the call has no random stream for it.
        """
        has_stream = not self.deterministic and isinstance(rngs, Mapping) and DROPOUT in rngs
        overlay = build_overlay(variables, dict(self.adapters), self.active, self.data, has_stream)
        if self.layout is not None:
            add_rows(overlay, self.layout, self.rows)
        if has_stream:
            self._warned.once = True
        elif overlay.with_dropout and not self.deterministic:
            call.report_no_dropout(
                overlay.with_dropout,
                self.deterministic,
                self._warned,
                f'this call has no rngs={{"{DROPOUT}": key}}',
                "Pass that stream to the call",
                "Pass it in training, and evaluate with model.clone(deterministic=True)",
            )
        return overlay

    def _check_reads(self, overlay: Overlay, args: Any, kwargs: Any, mutable: Any) -> None:
        """Raise `AttachError` if a call reads an adapted weight outside the weight's module.

        Each call signature is checked once: the structure and the non-array arguments of a call. Shapes are assumed not
        to select the model's code.
        """
        sites = overlay.sites
        adapted = sorted((*path, leaf) for path, leaves in sites.items() for leaf in leaves)
        leaves, tree = jax.tree.flatten((overlay.base, adapted, args, kwargs, mutable))
        signature = tree, tuple(None if is_array(x) else _hashable(x) for x in leaves)
        if not sites or signature in self._checked:
            return

        def run(params: Any, interceptor: Any) -> Any:
            with nn.intercept_methods(interceptor):
                out = self.module.apply({**overlay.base, "params": params}, *args, mutable=mutable, **kwargs)
            return out if mutable is False else out[0]

        called = check_reads(run, {path: list(leaves) for path, leaves in sites.items()}, overlay.base["params"])
        self._warn_of_missing(overlay, called)
        if len(self._checked) >= _CACHE_SIZE:
            self._checked.clear()
        self._checked.add(signature)

    def _warn_of_missing(self, overlay: Overlay, called: Collection[tuple[str, ...]]) -> None:
        """Warn of targeted weights that a call uses and an adapter lacks.

        An `init` whose call does not reach a layer creates no adapter tensors for it.

        Args:
            called: the scope paths of the modules that the call enters.
        """
        keys_by_leaf = key_paths(overlay.base["params"])
        leaves = paths.flatten(trees.unbox_tree(overlay.base["params"]))
        shapes = {leaf: tuple(x.shape) for leaf, x in leaves.items()}
        for name, adapter in overlay.active.items():
            missing = selection.unselected_matrices(adapter.config, adapter.keymap, shapes, adapter.sites)
            if used := [leaf for leaf in missing if keys_by_leaf[leaf][:-1] in called]:
                warn(
                    "this call uses weights that target_modules selects and that are not adapted, because the adapter"
                    f" {name!r} lacks tensors for them: its init did not call their modules. Call init with arguments"
                    f" that do, or use jaxadapt.init(params, config, key=…):\n{paths.bullets(used)}"
                )


def _hashable(argument: Any) -> Hashable:
    """Return an argument of a call, or its text if it has no hash: a frozen dataclass may hold a list."""
    try:
        hash(argument)
    except TypeError:
        return repr(argument)
    return argument


def _adapter_key(rngs: Any, collection: str, name: str) -> Any:
    """Return the key for an adapter's initial values, from the stream named like its collection or from "params"."""
    if isinstance(rngs, Mapping):
        rngs = rngs[collection] if collection in rngs else rngs.get("params", next(iter(rngs.values())))
    return jax.random.fold_in(rngs, zlib.crc32(f"{collection}.{name}".encode()))


@dataclasses.dataclass(frozen=True)
class BoundModule:
    """A bound module whose calls, and those of its submodules, apply the adapters."""

    module: Any
    overlay: Overlay
    check: Callable[[str, Any, Any], None] | None = None  # None for submodules
    wrapper: Adapted | None = None  # None for submodules

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrap_call(self.module, "__call__")(*args, **kwargs)

    @property
    def variables(self) -> Any:
        """The variables, including the adapters' collections."""
        return self.overlay.restore(self.module.variables, True, self.module.path)

    def unbind(self) -> tuple[Adapted | nn.Module, Any]:
        """Return the adapted module and all variables; of a submodule, the base's module, which applies no adapter."""
        return self.wrapper or self.module.unbind()[0], self.variables

    def __getattr__(self, name: str) -> Any:
        return self._wrap(getattr(self.module, name), name)

    def _wrap(self, value: Any, name: str = "") -> Any:
        """Return an attribute with its modules and functions wrapped, so that their calls apply the adapters."""
        if isinstance(value, nn.Module):
            return BoundModule(value, self.overlay)
        if type(value) in (list, tuple):
            return type(value)(self._wrap(v) for v in value)
        if isinstance(value, Mapping):
            return {k: self._wrap(v) for k, v in value.items()}
        return self._wrap_call(value, name) if callable(value) else value

    def _wrap_call(self, f: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.check is not None and name:
                self.check(name, args, kwargs)
            with nn.intercept_methods(self.overlay.intercept):
                return f(*args, **kwargs)

        return call
