"""The call of an adapted NNX layer: its own function, with active adapters applied and quantised weights made dense.

The tensors of a prompt method are attributes of the model itself, whose call adds the virtual tokens:

    model.prefix_tuning["default"]["~shared"]    {"prompt_embeddings": SharedAdapterParam}
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from jaxadapt.adapters.adapter import SHARED_NODE, Recipe
from jaxadapt.arrays.layout import Axes
from jaxadapt.core.errors import AttachError
from jaxadapt.methods.applied import AppliedMethod, AppliedMethods, together
from jaxadapt.methods.base import Drop, Method
from jaxadapt.methods.prompt import BaseSizes, PromptMethod
from jaxadapt.models import call, prompts
from jaxadapt.models.attention_calls import Findable, input_embedding, is_findable
from jaxadapt.models.nnx import graph, survey
from jaxadapt.models.prompts import Prompt, only_one

# ---------------------------------------------------------------- prompts


def prepare_model(model: nnx.Module, collection: str, method: Method) -> None:
    """Prepare a model for an adapter of a prompt method: a trace must find the calls of its attention layers.

    Raises `AttachError` for a model with an attribute called like the method's collection.
    """
    if not isinstance(vars(model).get(collection, {}), Mapping):
        raise AttachError(f"cannot attach the adapter: the model has an attribute {collection!r} of its own")
    if isinstance(method, PromptMethod) and method.adds != "embeddings":
        _find_attention(model, _mark)


def _mark(function: Any) -> Any:
    return function if is_findable(function) else Findable(function)


def restore_attention(model: nnx.Module) -> None:
    """Give the attention layers their own functions back, if a model has no adapter of a prompt method."""
    held = graph.held_adapters(model)
    if not any(SHARED_NODE in adapter for adapters in held.values() for adapter in adapters.values()):
        _find_attention(model, lambda f: f.function if isinstance(f, Findable) else f)


def _find_attention(model: nnx.Module, change: Callable[[Any], Any]) -> None:
    for _, node in graph.walk_model(model).modules:
        if isinstance(node, nnx.MultiHeadAttention):
            node.attention_fn = change(node.attention_fn)


def active_prompt(module: nnx.Module, names: Sequence[str]) -> Prompt | None:
    """Return the active adapter of a prompt method among `names`; None if there is none.

    Raises `AttachError` if there are several.
    """
    prompts: dict[str, Prompt] = {}
    for name, adapters in itertools.product(names, graph.held_adapters(module).values()):
        if tensors := adapters.get(name, {}).get(SHARED_NODE):
            values = {t: var.get_value() for t, var in tensors.items()}
            data = {t: x for t, x in values.items() if isinstance(tensors[t], graph.CallData)}
            params = {t: x for t, x in values.items() if t not in data}
            recipe = next(var.get_metadata()["adapter"].recipe for t, var in tensors.items() if t in params)
            prompts[name] = Prompt(recipe, params, data)
    return only_one(prompts)


def embed_tokens(module: nnx.Module, prompt: Prompt, tokens: Any) -> Any:
    """Return the embeddings of tokens, by the model's own layer."""
    owners = graph.walk_model(module).leaves
    leaf = input_embedding(prompt.recipe.keymap, owners)
    layer = None if leaf is None else owners[leaf][0]
    if not isinstance(layer, nnx.Embed):
        raise AttachError(
            f"{prompt.method.peft_type}: the nnx.Embed that embeds the tokens is unclear"
            f" ({'none or several are candidates' if leaf is None else f'{leaf} is of another class'}). Pass embeddings"
            " to the call in place of tokens"
        )
    return layer(tokens)


def call_with_keys(
    module: nnx.Module,
    prompt: Prompt,
    base: type[nnx.Module],
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Return `call(module, args, kwargs)` with keys and values of an adapter in every attention layer.

    Raises `AttachError` if the call adds variables to the model.
    """
    # The model's transforms (nnx.scan, nnx.remat) write to all variables, so they must belong to the current trace.
    graphdef, variables = nnx.split(survey.plain_view(module, base, {}))
    flat = nnx.to_flat_state(variables)
    inputs = {str(i): var.get_value() for i, (_, var) in enumerate(flat)}

    def run(inputs: Mapping[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        copies = [(path, var.copy(inputs[str(i)])) for i, (path, var) in enumerate(flat)]
        copy = nnx.merge(graphdef, nnx.from_flat_state(copies))
        y = call(copy, args, kwargs)
        after = nnx.to_flat_state(nnx.state(copy))
        if [path for path, _ in after] != [path for path, _ in flat]:
            raise AttachError(
                f"{base.__name__} adds variables while it is called, so an adapter cannot run its call. Create them in"
                " __init__"
            )
        return y, {str(i): x for i, (_, var) in enumerate(after) if (x := var.get_value()) is not inputs[str(i)]}

    def base_parameters() -> dict[str, Any]:
        return graph.base_values(graph.walk_model(module).leaves)

    y, changed = prompts.call_with_keys(run, prompt, base.__call__, args, kwargs, inputs, base_parameters)
    by_path = dict(nnx.to_flat_state(nnx.state(module)))
    for i, value in changed.items():
        by_path[flat[int(i)][0]].set_value(value)
    return y


def measure_base(model: nnx.Module, example: Sequence[Any]) -> BaseSizes:
    """Return the sizes of a base model that a trace of its call with these inputs shows."""
    copy: Any = nnx.clone(model)
    _find_attention(copy, _mark)
    f, inputs = survey.instrument(copy, (), lambda *_: {}, tuple(example))
    return prompts.measure_base(f, inputs)


# ---------------------------------------------------------------- the call of a layer


ACTIVE = "active_adapters"
ROWS = "adapter_rows"
"""The attribute of a layer with a bank: `{leaf: {number of the site: {tensor: RowParam}}}`, empty without a route."""


@dataclasses.dataclass(frozen=True, eq=False)
class Attached:
    """The metadata of an `AdapterParam`: its adapter's recipe, and the method, axes and hyperparameters of its site."""

    recipe: Recipe
    method: Method = dataclasses.field(repr=False)
    axes: Axes = dataclasses.field(repr=False)
    hparams: Any

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.recipe, self.method, self.axes, self.hparams))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Attached)
            and self.recipe == other.recipe
            and self.method == other.method
            and self.axes == other.axes
            and self.hparams == other.hparams
        )


def attached_to(tensors: Mapping[str, nnx.Variable[Any]]) -> Attached:
    """Return the metadata of one adapter at one leaf.

    Only its own tensors carry this metadata. Shared tensors carry their adapter's, and `LayerNumber`s carry none.
    """
    param = next(
        var for var in tensors.values()
        if isinstance(var, graph.AdapterParam | graph.FrozenParam) and not isinstance(var, graph.SharedParam)
    )  # fmt: skip
    attached: Attached = param.get_metadata()["adapter"]
    return attached


# ---------------------------------------------------------------- the run-time subclass


@functools.cache
def adapted_class(base: type[nnx.Module]) -> type[nnx.Module]:
    """Return the subclass of a layer class whose entry points (see `entry_points`) apply the active adapters."""

    def wrap(f: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(f)
        def method(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            return _call_adapted(self, base, f, args, kwargs)

        return method

    body: dict[str, Any] = {name: wrap(f) for name, f in survey.entry_points(base).items()}
    body |= {"base": base, "__module__": base.__module__, "__doc__": base.__doc__}
    subclass: Any = survey.AdaptedMeta(f"Adapted{base.__name__}", (base,), body)
    return subclass


copyreg.pickle(survey.AdaptedMeta, lambda cls: (adapted_class, (cls.base,)))  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------- calling


def adapters_on(layer: nnx.Module, names: Iterable[str]) -> Iterator[tuple[str, str, Mapping[str, nnx.Variable[Any]]]]:
    """Yield (adapter, leaf, tensors) for these adapters of one layer's weights."""
    held = graph.held_adapters(layer)
    for name, adapters in itertools.product(names, held.values()):
        for leaf, tensors in adapters.get(name, {}).items():
            if leaf != SHARED_NODE:  # a prompt's tensors: see `prompt`
                yield name, leaf, tensors


def _active_hooks(module: nnx.Module) -> dict[str, AppliedMethod | AppliedMethods]:
    """Return `{leaf: hook}` for the active adapters of one layer."""
    hooks: dict[str, list[AppliedMethod]] = {}
    attributes = vars(module)
    for name, leaf, tensors in adapters_on(module, attributes.get(ACTIVE, ())):
        params = {tensor: _value_of(tensor, var) for tensor, var in tensors.items()}
        hook = AppliedMethod.in_call(attached_to(tensors), params, _active_dropout(module, name))
        hooks.setdefault(leaf, []).append(hook)
    for leaf, sites in attributes.get(ROWS, {}).items():
        if not sites:
            raise AttachError(call.NO_ROUTE)
        hooks.setdefault(leaf, []).extend(map(_row_hook, sites.values()))
    return {leaf: together(each) for leaf, each in hooks.items()}


def _active_dropout(module: nnx.Module, name: str) -> Drop | None:
    """Return the dropout of an adapter; None if it has none, or if the layer is in evaluation mode."""
    dropouts = vars(module).get(survey.DROPOUT, ())
    if name not in dropouts or (dropout := dropouts[name]).deterministic:
        return None
    if dropout.rngs is None:
        raise AttachError(
            f"the adapter {name!r} has dropout but no random stream, because it was loaded without rngs."
            " Load it with load(…, rngs=nnx.Rngs(seed)) to train it, or call model.eval() to use it"
        )
    return Drop(dropout.rate, dropout.rngs)


def _row_hook(tensors: Mapping[str, nnx.Variable[Any]]) -> AppliedMethod:
    """Return the method of a bank's site with the tensors of a batch's rows."""
    shared = {name: _value_of(name, var) for name, var in tensors.items() if isinstance(var, graph.SharedParam)}
    own = {name: var for name, var in tensors.items() if name not in shared}
    site: call.RowSite = next(iter(own.values())).get_metadata()["row_site"]
    return site.apply({name: _value_of(name, var) for name, var in own.items()}, shared)


def _value_of(tensor: str, variable: nnx.Variable[Any]) -> Any:
    """Return a variable's value; raise `AttachError` for a slice of a shared tensor."""
    value = variable.get_value()
    if isinstance(variable, graph.SharedParam) and value.shape != (shape := variable.get_metadata()["whole"]):
        raise AttachError(
            f"cannot run a layer: {tensor} belongs to the whole adapter and has shape {list(shape)}, but this layer got"
            f" {list(value.shape)}. Make the model's nnx.scan or nnx.vmap leave variables of type"
            " jaxadapt.models.SharedParam whole: nnx.StateAxes({jaxadapt.models.SharedParam: None, nnx.Param: 0,"
            " ...: 0})"
        )
    return value


def _call_adapted(module: Any, base: Any, f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of a layer with its active adapters applied and its quantised weights made dense."""
    if f is base.__call__ and (virtual := active_prompt(module, vars(module).get(ACTIVE, ()))) is not None:
        if (hooked := prompts.hooked_call(module, virtual)) is not None:
            name, first = hooked
            return getattr(base, name)(survey.plain_view(module, base, {}), *first, *args, **kwargs)
        if virtual.method.adds != "embeddings":
            run: Any = functools.partial(_call_layer, base, f)
            return call_with_keys(module, virtual, base, run, args, kwargs)
        embed = functools.partial(embed_tokens, module, virtual)
        args, kwargs = prompts.with_embeddings(virtual, base.__call__, args, kwargs, embed)
    return _call_layer(base, f, module, args, kwargs)


def _call_layer(base: Any, f: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a method of a layer with the adapters of its own weights."""
    return call.apply(survey.bind_layer(module, base, f), _active_hooks(module), args, kwargs)
