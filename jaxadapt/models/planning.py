"""Planning of an adapter: binds a configuration to a model or to a tree of base parameters, for NNX and Linen.

`BaseParams` has the base parameters of a model or of a tree by dotted path, traversed once. The classes of Flax's own
NNX layers show the roles of their weights' axes. Abstract calls of a model show those of custom layers, and which uses
no adapter can follow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
from flax import nnx

from jaxadapt.adapters import initial_values, selection
from jaxadapt.adapters.adapter import SHARED_NODE, Recipe, Site, Sites, is_array
from jaxadapt.arrays import quantized
from jaxadapt.arrays.layout import Axes
from jaxadapt.arrays.products import contradiction_message, transposed_axes
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, TargetError, raise_listed
from jaxadapt.keymaps import families
from jaxadapt.keymaps.keymap import GENERIC, KeyMap, entry_from_axes, linen_example
from jaxadapt.keymaps.weight import Weight
from jaxadapt.methods.applied import AppliedMethod
from jaxadapt.methods.base import get_method
from jaxadapt.methods.prompt import BaseSizes, PromptMethod
from jaxadapt.models import attention_calls, call, graph, jaxprs, tracing, trees

# ---------------------------------------------------------------- base params


@dataclasses.dataclass(frozen=True)
class BaseParams:
    """Base parameters from a tree, and the model or variables that hold them."""

    held: Mapping[str, Any]
    """`{path: leaf}` with boxes (`nn.Partitioned`, …); of a model `{path: (module, attribute)}`."""
    target: Any
    """The model or variables, which may have adapters."""
    walked: graph.ModelWalk | None = None
    """The result of the traversal, for a model only."""
    assumes_flax: ClassVar[bool] = True
    """True if a kernel whose layer is not known is taken for one of Flax's."""

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """`{path: array or spec}`, without boxes."""
        if self.walked is not None:
            return graph.base_values(self.held)
        return {path: trees.unbox_tree(leaf) for path, leaf in self.held.items()}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`{path: shape}`."""
        return {path: tuple(leaf.shape) for path, leaf in self.leaves.items()}

    @functools.cached_property
    def shardings(self) -> dict[str, Any]:
        """`{path: sharding}`; None for a leaf without a sharding."""
        return trees.base_shardings(self.held) if self.walked is None else graph.base_shardings(self.held, self.leaves)

    @functools.cached_property
    def keymap(self) -> KeyMap | None:
        """The keymap of an adapter that the model or the variables have, if any."""
        if self.walked is not None:
            known = (var for by_path in self.walked.adapters.values() for var in by_path.values())
            return next((var.get_metadata()["adapter"].recipe.keymap for var in known), None)
        held = trees.variable_adapters(self.target)
        return next((trees.read_adapter(tree, name).keymap for name, tree in held), None)

    def plan(
        self,
        config: Config,
        keymap: KeyMap,
        stack_axes: Sequence[int] | None,
        example: Sequence[Any] | None,
        found: Mapping[str, tuple[int, ...]] | None,
    ) -> tuple[Recipe, Sites]:
        """Return the recipe and sites of `plan_adapter`."""
        method = get_method(config)
        if isinstance(method, PromptMethod):
            sizes = BaseSizes() if example is None else measure_base(self.target, example)
            config = method.complete(config, attention_calls.with_width(sizes, keymap, self.shapes))
            return selection.make_recipe(config, keymap, self.shapes, found=found)
        if self.walked is not None:
            return _plan_on_model(self, self.walked, config, keymap, stack_axes, example, found)
        return selection.make_recipe(config, keymap, self.shapes, found=found, weights=lambda: self.leaves)

    def new_values(
        self,
        recipe: Recipe,
        sites: Sites,
        key: Any,
        dtype: Any,
        needs: str = "",
        given: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the initial values of a new adapter of these sites, `{path: array}`, or specs if `key` is None.

        Args:
            needs: what to pass for a key, for the error without one; "" if values are not needed. A base with leaves
                that are specs needs none.
            given: `{path: array}` of tensors that exist already and are not created.

        Raises `AttachError` without the key that the values need.
        """
        if needs and key is None and not any(isinstance(x, jax.ShapeDtypeStruct) for x in self.leaves.values()):
            raise AttachError(f"cannot draw the adapter's initial values without {needs}")
        return initial_values.init_values(
            recipe.config, sites, key, dtype, key is None, self.leaves, self.shardings, given or {}
        )

    def resolve_keymap(self, keymap: KeyMap | str | None) -> KeyMap:
        """Return a keymap as it is; look up the name of one, or recognize the model."""
        return (
            keymap
            if isinstance(keymap, KeyMap)
            else families.resolve_keymap(keymap, self.shapes, model=type(self.target))
        )


def read_params(params: Any, target: Any = None) -> BaseParams:
    """Return the base parameters in nested mappings. Raises `AttachError` if a leaf is not an array."""
    base = BaseParams(paths.flatten(params), target)
    raise_listed(
        AttachError,
        'expected base parameters as nested mappings of arrays (a list as {"0": …, "1": …}), found:',
        [
            f"{path}: {type(leaf).__name__}"
            for path, leaf in base.leaves.items()
            if not (is_array(leaf) or quantized.is_quantized(leaf))
        ],
    )
    return base


# ---------------------------------------------------------------- Flax's own layer classes


def base_class(module: nnx.Module) -> type[nnx.Module]:
    """Return a layer's own class, whether the layer is adapted or not."""
    cls = type(module)
    return cls.base if isinstance(cls, graph.AdaptedMeta) else cls


_NEVER_LINEAR = (nnx.Embed.__call__, nnx.Conv.__call__, nnx.ConvTranspose.__call__)
"""The calls of Flax's own layers that "all-linear" does not select."""
_SHAPES: dict[Any, Callable[[Any], Sequence[int]]] = {
    nnx.Linear.__call__: lambda m: (m.in_features, m.out_features),
    nnx.LinearGeneral.__call__: lambda m: (*m.batch_axis.values(), *m.in_features, *m.out_features),
    nnx.Embed.__call__: lambda m: (m.num_embeddings, m.features),
    nnx.Einsum.__call__: lambda m: m.kernel_shape,
    nnx.Conv.__call__: lambda m: m.kernel_shape,
}
"""The shapes without stacked layers of the weights whose roles `call.roles_of` knows."""


def kernel_roles(module: nnx.Module, attr: str) -> call.Roles | None:
    """Return the roles of a weight if its layer class is one of Flax's own, else None.

    Raises `AttachError` for an einsum equation that no adapter can follow.
    """
    return call.roles_of(module, base_class(module).__call__, attr)


def list_contradictions(adapter_sites: Sequence[Site], owners: Mapping[str, graph.Owner]) -> list[str]:
    """Return a message for each site whose keymap entry and layer class disagree about the input axes."""
    problems: list[str] = []
    for site in adapter_sites:
        try:
            roles = (
                None
                if site.effects.weight == "replaces" and site.effects.form == "weight"
                else kernel_roles(*owners[site.leaf])
            )
        except AttachError as error:
            problems.append(f"{site.leaf}: {error}")
            continue
        # A keymap may order axes differently or split a fused output axis, but the input axes must agree.
        if roles is not None and set(roles.axes.in_axes) != set(site.axes.in_axes):
            problems.append(f"{site.leaf}: {contradiction_message(site.axes, roles.axes)}")
    return problems


# ---------------------------------------------------------------- entries for leaves without one


def _find_stack(
    leaf: str, shape: tuple[int, ...], layer_shape: tuple[int, ...], stack_axes: Sequence[int] | None
) -> tuple[int, ...]:
    """Return the axes of a leaf that stack layers, given the unstacked shape of one layer.

    Raises `AttachError` if the shapes do not determine the axes, or contradict `stack_axes`.
    """
    extra = len(shape) - len(layer_shape)
    if extra == 0:
        return ()
    if stack_axes is not None and len(stack_axes) == extra:
        chosen = tuple(sorted(a % len(shape) for a in stack_axes))
        if tuple(size for i, size in enumerate(shape) if i not in chosen) == layer_shape:
            return chosen
        raise AttachError(
            f"{leaf!r} has shape {shape}, which is not {layer_shape} stacked on stack_axes={tuple(stack_axes)}"
        )
    candidates = [i for i in range(len(shape)) if extra == 1 and shape[:i] + shape[i + 1 :] == layer_shape]
    if len(candidates) == 1:
        return (candidates[0],)
    raise AttachError(
        f"{leaf!r} has shape {shape}, and one layer has {layer_shape}, so the axis that stacks the layers is unclear."
        " Pass it, for example stack_axes=(0,)"
    )


def class_entries(
    owners: Mapping[str, graph.Owner],
    shapes: Mapping[str, tuple[int, ...]],
    keymap: KeyMap,
    stack_axes: Sequence[int] | None = None,
) -> list[Weight]:
    """Return keymap entries for the leaves that a keymap does not cover, from their layer's class."""
    entries: list[Weight] = []
    for leaf, (module, attr) in owners.items():
        shape = shapes[leaf]
        match = None if attr == "bias" else keymap.match(leaf)
        if attr == "bias" or (match is not None and len(match.weight.left) == len(shape)):
            continue
        try:
            roles = kernel_roles(module, attr)
        except AttachError:
            continue  # `attach` raises it again if the leaf is targeted
        if roles is not None:
            stack = _find_stack(leaf, shape, tuple(_SHAPES[base_class(module).__call__](module)), stack_axes)
            entries.append(entry_from_axes(leaf, shape, roles.axes, stack, roles.kind, roles.groups))
    return entries


def custom_leaves(owners: Mapping[str, graph.Owner], leaves: Iterable[str]) -> list[str]:
    """Return the matrices among these leaves whose axis roles only a trace can show."""
    owned = [(leaf, *owners[leaf]) for leaf in leaves]
    matrices = [(leaf, m, attr) for leaf, m, attr in owned if attr != "bias" and len(vars(m)[attr].shape) >= 2]
    # The roles of a kernel are known from its class, even those that no adapter can follow.
    return [
        leaf
        for leaf, module, attr in matrices
        if (attr != "kernel" or base_class(module).__call__ not in call.KERNELS) and kernel_roles(module, attr) is None
    ]


# ---------------------------------------------------------------- the model's leaves


_REWRITERS = (nnx.WeightNorm, nnx.SpectralNorm)
"""Modules that change the parameters inside them, adapters included, at every call."""


def find_obstacles(walk: graph.ModelWalk, leaves: Sequence[str], saved: Collection[str] = ()) -> dict[str, str]:
    """Return `{leaf: reason}` for the given leaves that cannot carry an adapter of any method.

    Args:
        saved: the leaves that `modules_to_save` copies. Their modules must not keep state besides parameters.
    """
    problems: dict[str, str] = {}
    for path, node in walk.modules:
        if isinstance(node, _REWRITERS):
            inside = [leaf for leaf in leaves if not path or leaf.startswith(f"{path}.")]
            problem = f"{type(node).__name__} rewrites the parameters inside it at every call"
            problems |= {leaf: f"{leaf}: {problem}" for leaf in inside}
    holders = _list_holders(walk, map(walk.leaves.__getitem__, leaves))
    for leaf in leaves:
        module, attr = walk.leaves[leaf]
        other_paths = [path for path in holders[id(vars(module)[attr])] if path != leaf]
        if other_paths:  # an adapter would apply in one of the modules, but a merged weight in all of them
            problem = f"{leaf}: several modules hold this weight, also as {', '.join(other_paths)}"
            problems[leaf] = f"{problem}; share the module instead of the weight, or leave it out"
        state = graph.layer_state(module).values() if leaf in saved else ()
        if types := sorted({type(v).__name__ for v in state if not isinstance(v, nnx.RngState)}):
            name = base_class(module).__name__
            problems[leaf] = f"{leaf}: {name} keeps state besides its parameters ({', '.join(types)}); leave it out"
    return problems


def _list_holders(walk: graph.ModelWalk, owners: Iterable[graph.Owner]) -> dict[int, list[str]]:
    """Return `{id of a leaf's parameter: every path of an attribute that holds it}`."""
    holders: dict[int, list[str]] = {id(vars(module)[attr]): [] for module, attr in owners}
    for path, node in walk.modules:
        for attr, var in vars(node).items():
            if id(var) in holders:
                holders[id(var)].append(paths.join(path, attr))
    return holders


# ---------------------------------------------------------------- abstract call


Observe = Callable[[str, str, call.Layer, call.Args, Mapping[str, Any]], Mapping[str, Any] | None]
"""`observe(leaf, attribute, layer, args, kwargs)` sees a call of a leaf's layer, and may return values to replace."""


def instrument(model: nnx.Module, leaves: Sequence[str], observe: Observe) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return `(f, values)`: `f(values, *args)` calls a copy of the model and lets `observe` see its layers' calls.

    Args:
        leaves: the leaves whose layers are observed.

    `values` holds every array of the model by its path.
    """
    copy, variables = graph.open_copy(model)

    def f(values: Mapping[str, Any], *args: Any) -> Any:
        called = copy(values)
        for leaf, (module, attr) in graph.walk_model(called).leaves.items():
            if leaf in leaves:
                base = base_class(module)
                body = {name: _observed(leaf, attr, base, f, observe) for name, f in graph.entry_points(base).items()}
                graph.set_class(module, type(base.__name__, (base,), body))
        return called(*args)

    return f, variables


def _observed(leaf: str, attr: str, base: type[nnx.Module], f: Callable[..., Any], observe: Observe) -> Any:
    """Return the method that runs in place of a layer's own."""

    def method(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        values = observe(leaf, attr, graph.bind_layer(self, base, f), args, kwargs)
        return f(graph.plain_view(self, base, values or {}), *args, **kwargs)

    return method


def trace_axes(
    model: nnx.Module, walk: graph.ModelWalk, args: call.Args, leaves: Sequence[str], required: bool
) -> tuple[dict[str, tuple[Axes, tuple[int, ...]]], set[str]]:
    """Trace the axis roles of custom layers' leaves in one abstract call of the model.

    Returns `{leaf: (traced axes, the shape that the layer's call sees)}`, and the leaves that are used but have no
    single set of roles. Leaves that the call does not use are in neither.

    Raises `AttachError` if `required` and the roles of any leaf are not found, listing all such leaves.
    """
    blocked = find_obstacles(walk, leaves)
    raise_listed(AttachError, "these layers cannot carry the adapter:", blocked.values() if required else ())
    leaves = [leaf for leaf in leaves if leaf not in blocked]
    if not leaves:
        return {}, set()
    traced: dict[str, tuple[Axes, tuple[int, ...]]] = {}
    problems: dict[str, str] = {}

    def observe(leaf: str, attr: str, layer: call.Layer, args: call.Args, kwargs: Mapping[str, Any]) -> None:
        weight = layer.params[attr]
        try:
            found = tracing.uses(functools.partial(layer.output, **kwargs), {attr: weight}, *args)[attr]
            seen = call.infer_axes(found, attr), tuple(weight.shape)
            if traced.setdefault(leaf, seen) != seen:
                problems[leaf] = f"its calls show several axes and shapes: {traced[leaf]}, and {seen}"
        except AttachError as error:
            problems[leaf] = str(error)

    jaxprs.trace(*instrument(model, leaves, observe), args)
    not_called = "its module's __call__ never ran with these inputs"
    unclear = {leaf: problems.get(leaf, not_called) for leaf in leaves if leaf in problems or leaf not in traced}
    raise_listed(
        AttachError,
        "jaxadapt could not find which axes of these weights are inputs:",
        (f"{leaf}: {reason}" for leaf, reason in unclear.items() if required),
    )
    return {leaf: axes for leaf, axes in traced.items() if leaf not in unclear}, set(problems)


def describe_uses(walk: graph.ModelWalk | None, inputs: call.Args) -> dict[str, str]:
    """Return `{leaf: how the use of a weight is found}`: from its layer's class, or by tracing the layer's call.

    With the `inputs` of one call, the call's trace shows how the adapters follow the weights of custom layers. Nothing
    is known without a walk over a model.
    """
    if walk is None:
        return {}
    classes = {leaf: base_class(module) for leaf, (module, _) in walk.leaves.items()}
    notes = {
        leaf: f"{base.__name__}'s own call" if base.__call__ in call.KERNELS else f"traced {base.__name__}"
        for leaf, base in classes.items()
    }
    if not inputs:
        return notes
    attached = {
        path.rpartition(".")[0]: var.get_metadata()["adapter"]
        for by_path in walk.adapters.values()
        for path, var in by_path.items()
    }
    attached.pop(SHARED_NODE, None)
    hooks = {leaf: AppliedMethod(x.method, x.hparams, {}, x.axes) for leaf, x in attached.items()}
    custom = custom_leaves(walk.leaves, [leaf for leaf, hook in hooks.items() if not hook.by_weight])
    notes |= {leaf: f"{classes[leaf].__name__}, not called with these inputs" for leaf in custom}

    def observe(leaf: str, attr: str, layer: call.Layer, args: call.Args, kwargs: Mapping[str, Any]) -> None:
        notes[leaf] = call.describe(layer.name, layer, {attr: hooks[leaf]}, args, kwargs)[attr]

    jaxprs.trace(*instrument(walk.model, custom, observe), inputs)
    return notes


def _check_calls(model: nnx.Module, sites: Sites, example: Sequence[Any] | None) -> None:
    """Raise `AttachError` for uses of the sites' weights, in a call with these inputs, that no adapter can follow.

    These are a weight read outside its own module's call, dropout on a weight whose use is not a product along its
    axis roles, and a keymap entry that swaps a layer's inputs and outputs.
    """
    if example is None:
        return
    adapted = {site.leaf: AppliedMethod(site.method, site.hparams, {}, site.axes) for site in sites}
    dropped = {site.leaf for site in sites if site.method.drops == "input" and site.method.dropout(site.hparams)}
    stray_uses: dict[str, str] = {}
    products: dict[str, list[Axes]] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def observe(
        leaf: str, attr: str, layer: call.Layer, args: call.Args, kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        weight = layer.params[attr]
        tracing.require_cover(leaf, weight.shape, adapted[leaf].axes)
        # The module reads a copy, so only reads outside its call keep the weight itself live.
        alias = jax.numpy.zeros(weight.shape, weight.dtype)
        if not layer.known:
            uses = tracing.uses(functools.partial(layer.output, **kwargs), {attr: alias}, *args)[attr]
            shapes[leaf] = weight.shape
            products.setdefault(leaf, []).extend(use for use in uses if isinstance(use, Axes))
            unfollowed = call.unfollowed_uses(uses, adapted[leaf])
            if leaf in dropped and unfollowed:
                stray_uses[leaf] = ", ".join(unfollowed)
        return {attr: alias}

    live = call.live_weights(*instrument(model, list(adapted), observe), *example)
    own = {
        leaf: transposed_axes(hook.axes, products[leaf], shapes[leaf])
        for leaf, hook in adapted.items()
        if hook.forward and leaf in products
    }
    raise_listed(
        AttachError,
        "these layers cannot carry the adapter:",
        (
            f"{leaf}: {contradiction_message(adapted[leaf].axes, axes)}"
            for leaf, axes in own.items()
            if axes is not None
        ),
    )
    call.refuse_reads_outside(leaf for leaf in adapted if live[leaf])
    raise_listed(
        AttachError,
        "dropout cannot be applied, because these layers use their weight in an operation other than a"
        " matmul, where jaxadapt can only replace the whole weight:",
        (f"{leaf}: {reason}" for leaf, reason in stray_uses.items()),
        "\nSet the dropout of the configuration to 0.0, or exclude them with exclude_modules",
    )


def measure_base(model: nnx.Module, example: Sequence[Any]) -> BaseSizes:
    """Return the sizes of a base model that a trace of its call with these inputs shows."""
    copy: Any = nnx.clone(model)
    mark_attention(copy)
    return attention_calls.measure_base(*instrument(copy, (), lambda *_: {}), *example)


def mark_attention(model: nnx.Module) -> None:
    """Let a trace find the calls of the attention layers."""
    for _, node in graph.walk_model(model).modules:
        if isinstance(node, nnx.MultiHeadAttention) and not attention_calls.is_findable(node.attention_fn):
            node.attention_fn = attention_calls.Findable(node.attention_fn)


# ---------------------------------------------------------------- planning


def plan_adapter(
    base: BaseParams,
    config: Config,
    keymap: KeyMap | str | None,
    stack_axes: Sequence[int] | None = None,
    example: Sequence[Any] | None = None,
    found: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Recipe, Sites]:
    """Return the recipe and sites of a configuration on a model, or on a tree of base parameters.

    `found` are the shapes of the tensors of an adapter file, by key, if the sites are for a file.
    """
    if example is not None and not isinstance(example, list | tuple):
        raise AttachError(
            f"example: expected a list of the inputs of one call, as in example=[x], found {type(example).__name__}"
        )
    return base.plan(config, base.resolve_keymap(keymap), stack_axes, example, found)


def check_kernels(config: Config, base: BaseParams, sites: Sequence[Site]) -> None:
    """Raise `AttachError` if a keymap takes the outputs of a kernel for its inputs.

    Parameters without a model have no layers that define the layout, so every kernel is assumed to be one of Flax's,
    which are (in, out). A layer with another layout declares it in the collection that `adapt` creates.
    """
    if base.walked is not None:
        raise_listed(
            AttachError, "these layers cannot carry the adapter:", list_contradictions(sites, base.walked.leaves)
        )
        return
    if not base.assumes_flax:
        return
    attached = base.keymap
    reverse: list[str] = []
    for site in sites:
        known = None if attached is None else attached.match(site.leaf)
        is_linear = site.match.weight.kind in ("linear", "fused") and not site.match.weight.fan_in_fan_out
        if (
            site.leaf.rpartition(".")[2] != "kernel"
            or not is_linear
            or site.method.copies
            or site.axes.rank != 2
            or (known is not None and known.axes == site.axes)
        ):
            continue
        shape = [size for axis, size in enumerate(base.shapes[site.leaf]) if axis not in site.match.stack]
        if (own := transposed_axes(site.axes, [call.DENSE], shape)) is not None:
            reverse.append(f"{site.leaf}: {contradiction_message(site.axes, own)}")
    raise_listed(
        AttachError,
        "these weights cannot carry the adapter if they belong to Flax's own layers:",
        reverse,
        "\nFor custom layers, create the collection with the adapted module, which records their layout:"
        + linen_example(config),
    )


def _plan_on_model(
    base: BaseParams,
    walked: graph.ModelWalk,
    config: Config,
    keymap: KeyMap,
    stack_axes: Sequence[int] | None,
    example: Sequence[Any] | None,
    found: Mapping[str, tuple[int, ...]] | None,
) -> tuple[Recipe, Sites]:
    owners, shapes = walked.leaves, base.shapes
    all_linear = matching.is_all_linear(config)
    never_linear = {leaf for leaf in shapes if base_class(owners[leaf][0]).__call__ in _NEVER_LINEAR}
    entries, traced = class_entries(owners, base.shapes, keymap, stack_axes), {}
    if example is not None:
        # A trace is more reliable than the generic keymap, and a family's keymap is more reliable than a trace.
        known = dataclasses.replace(keymap, weights=()) if keymap == GENERIC else keymap
        wanted = [
            leaf
            for leaf in selection.unselected_matrices(config, known.with_entries(entries), shapes)
            if not all_linear or leaf not in never_linear
        ]
        traced, others = trace_axes(
            base.target, walked, example, custom_leaves(owners, wanted), required=not all_linear
        )
        never_linear |= others
        for leaf, (axes, layer_shape) in traced.items():
            stack = _find_stack(leaf, base.shapes[leaf], layer_shape, stack_axes)
            entries.append(entry_from_axes(leaf, base.shapes[leaf], axes, stack))
    # The generic keymap holds for Flax's own layers; a custom layer may transpose its kernel.
    unsure = frozenset(custom_leaves(owners, shapes)) if keymap == GENERIC else selection.NONE

    def check(config: Config, _: KeyMap) -> None:
        config = dataclasses.replace(config, target_modules=".*") if all_linear else config
        matrices = [leaf for leaf, shape in walked.unowned.items() if len(shape) > 1]
        if untraceable := [leaf for leaf in matrices if matching.is_target(config, leaf.rpartition(".")[0])]:
            raise_listed(
                AttachError,
                "cannot adapt these parameters: they are not direct attributes of an nnx.Module (for example inside a"
                " dict), so their use cannot be traced. Store each in a module, or leave it out of target_modules, or"
                " pass exclude_modules:",
                untraceable,
            )

    try:
        recipe, sites = selection.make_recipe(
            config,
            keymap,
            shapes,
            entries,
            unsure=unsure - {entry.leaf for entry in entries},
            never_linear=never_linear,
            found=found,
            check=check,
            weights=lambda: base.leaves,
        )
    except TargetError as error:
        _raise_for_qwix(walked, error)
        raise
    if not all_linear and (ambiguous := traced.keys() - {site.leaf for site in sites}):
        raise_listed(
            TargetError,
            "target_modules is ambiguous: several weights share a module. Give the full names of the weights to adapt:",
            sorted(ambiguous),
        )
    _check_calls(base.target, sites, example)
    return recipe, sites


def _raise_for_qwix(walked: graph.ModelWalk, error: TargetError) -> None:
    """Raise `AttachError` if `error` comes from a model whose weights Qwix holds."""
    if any(quantized.is_qwix_parameter(x) for _, node in walked.modules for x in vars(node).values()):
        raise AttachError(
            f"{error}\nQwix intercepts the calls of this model, and would also quantize the adapter's inputs."
            " Convert the model with jaxadapt.models.from_qwix(model), which keeps the quantized weights"
        ) from error
