"""Attention to trained tokens beside a layer's own, through a gate (ADAPTION_PROMPT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxadapt.adapters.adapter import Recipe
from jaxadapt.arrays import quantized
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.keymaps.weight import MethodTensor
from jaxadapt.methods.adaption_prompt import GATE, KEYS, OUTPUT, PROMPT, VALUES, layer_number
from jaxadapt.models.prompt.attention import AttentionCall

Array = Any

_WEIGHT = MethodTensor("copy", "", (), (), is_copy=True, scale_power=1)


def gated_layers(recipe: Recipe, params: Mapping[str, Array], base: Mapping[str, Array]) -> dict[str, Array]:
    """Return the keys, the values and the gate of every attention layer; the gate is 0 where a layer has no tokens.

    Args:
        recipe: the adapter's recipe.
        params: its tensors.
        base: `{leaf: array}` of the base parameters.

    Returns "keys" and "values" (layers, n, heads · size) and "gate" (layers,). Raises `AttachError` for a base that
    lacks the projections of a layer, or whose output projections have a bias.
    """
    weights = _projections(recipe.keymap, base)
    modules = sorted({name.rpartition(".")[0] for name, _ in weights if name.endswith(f".{KEYS}")}, key=layer_number)
    target = recipe.config.get("target_modules")
    modules = [module for module in modules if module.rpartition(".")[2] == target or module.endswith(f".{target}")]
    by_layer: dict[int, dict[str, Array]] = {}
    for name, x in params.items():
        by_layer.setdefault(layer_number(name), {})[name.rpartition(":")[2]] = x
    problems = [f"layer {i}: the base has no {target} with {KEYS}" for i in by_layer if i >= len(modules)]
    problems += [
        f"{module}.{OUTPUT} has a bias, which PEFT adds once more"
        for module in modules
        if (f"{module}.{OUTPUT}", "bias") in weights
    ]
    if problems:
        raise AttachError("ADAPTION_PROMPT: cannot apply the adapter to this model:\n" + paths.bullets(problems))
    first = next(iter(by_layer.values()))[PROMPT]
    rows: dict[str, list[Array]] = {"keys": [], "values": [], "gate": []}
    for i, module in enumerate(modules):
        own = by_layer.get(i)
        x = jnp.zeros_like(first[0]) if own is None else own[PROMPT][0]
        rows["keys"].append(_project(weights, f"{module}.{KEYS}", x))
        rows["values"].append(_project(weights, f"{module}.{VALUES}", x))
        rows["gate"].append(jnp.zeros((), x.dtype) if own is None else own[GATE][0])
    return {name: jnp.stack(each) for name, each in rows.items()}


def _project(weights: Mapping[tuple[str, str], Array], module: str, x: Array) -> Array:
    y = x.astype(jnp.promote_types(x.dtype, weights[module, "weight"].dtype)) @ weights[module, "weight"].T
    bias = weights.get((module, "bias"))
    return y if bias is None else y + bias[None]


def _projections(keymap: KeyMap, base: Mapping[str, Array]) -> dict[tuple[str, str], Array]:
    """Return `{(module, parameter): array}` of the keys', values' and output projections, as in PyTorch."""
    found: dict[tuple[str, str], Array] = {}
    for leaf, x in base.items():
        match = keymap.match(leaf)
        if match is None or not any(f".{name}." in match.weight.file_key for name in (KEYS, VALUES, OUTPUT)):
            continue
        dense = quantized.to_dense(x)
        sizes = plan.axis_sizes(match, dense.shape)
        entry = plan.plan_entry(keymap, match, _WEIGHT, sizes)
        for i, (module, parameter) in enumerate(match.parameters(sizes).values()):
            if module.rpartition(".")[2] in (KEYS, VALUES) or parameter == "bias":
                found[module, parameter] = entry.form.encode(dense, i)
    return found


def add_gated(call: AttentionCall, arrays: Mapping[str, Any], layer: Mapping[str, Array]) -> Array:
    """Return an attention's result, plus that of attending to a layer's tokens times its gate.

    Args:
        call: the call.
        arrays: its arrays: query (..., T, H, h), key (..., S, K, h), value (..., S, K, v).
        layer: the keys and values, (n, K · h), and the gate, a scalar.
    """
    key, value = (
        jnp.broadcast_to(new.reshape(-1, *x.shape[-2:]), (*x.shape[:-3], len(new), *x.shape[-2:])).astype(x.dtype)
        for new, x in ((layer["keys"], arrays["key"]), (layer["values"], arrays["value"]))
    )
    y = call.run(arrays)
    others = {name: x for name, x in arrays.items() if name not in ("mask", "bias")}
    more = call.run({**others, "key": key, "value": value}, is_causal=False)
    return y + (layer["gate"] * more).astype(y.dtype)
