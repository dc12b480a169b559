"""Prompt methods on NNX models: the tensors are attributes of the model itself, whose call adds the virtual tokens.

model.prefix_tuning["default"]["~shared"]    {"prompt_embeddings": SharedAdapterParam}
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from jaxadapt.adapters.adapter import SHARED_NODE
from jaxadapt.core.errors import AttachError
from jaxadapt.methods.base import Method
from jaxadapt.methods.prompt import BaseSizes, PromptMethod
from jaxadapt.models.nnx import graph, survey
from jaxadapt.models.prompt import calling
from jaxadapt.models.prompt.attention import Findable, is_findable
from jaxadapt.models.prompt.rewriting import input_embedding


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


def active_prompt(module: nnx.Module, names: Sequence[str]) -> calling.Prompt | None:
    """Return the active adapter of a prompt method among `names`; None if there is none.

    Raises `AttachError` if there are several.
    """
    prompts: dict[str, calling.Prompt] = {}
    for name, adapters in itertools.product(names, graph.held_adapters(module).values()):
        if tensors := adapters.get(name, {}).get(SHARED_NODE):
            values = {t: var.get_value() for t, var in tensors.items()}
            data = {t: x for t, x in values.items() if isinstance(tensors[t], graph.CallData)}
            params = {t: x for t, x in values.items() if t not in data}
            recipe = next(var.get_metadata()["adapter"].recipe for t, var in tensors.items() if t in params)
            prompts[name] = calling.Prompt(recipe, params, data)
    return calling.only_one(prompts)


def embed_tokens(module: nnx.Module, prompt: calling.Prompt, tokens: Any) -> Any:
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
    prompt: calling.Prompt,
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

    y, changed = calling.call_with_keys(run, prompt, base.__call__, args, kwargs, inputs, base_parameters)
    by_path = dict(nnx.to_flat_state(nnx.state(module)))
    for i, value in changed.items():
        by_path[flat[int(i)][0]].set_value(value)
    return y


def measure_base(model: nnx.Module, example: Sequence[Any]) -> BaseSizes:
    """Return the sizes of a base model that a trace of its call with these inputs shows."""
    copy: Any = nnx.clone(model)
    _find_attention(copy, _mark)
    f, inputs = survey.instrument(copy, (), lambda *_: {}, tuple(example))
    return calling.measure_base(f, inputs)
