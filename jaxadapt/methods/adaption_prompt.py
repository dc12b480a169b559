"""ADAPTION_PROMPT (LLaMA-Adapter, arXiv:2303.16199; PEFT's `tuners/adaption_prompt/layer.py`).

A layer's keys and values of the trained tokens P come from its own projections, without rotation. Its attention output
becomes softmax(QKᵀ/√d)·V + gate · softmax(Q(P·W_k)ᵀ/√d)·(P·W_v), before the output projection. The gate starts at 0.

A file has the tensors "adaption_prompt" (1, adapter_len, width) and "adaption_gate" (1) of each layer. Here the name of
a tensor is that of the file, with ":" for ".".

PEFT applies the bias of an output projection once more to the adapter's part; such models are refused. Its GPT-2 form,
which adds the adapter's part after the output projection, is not computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxadapt.arrays import quantized
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError, TargetError, raise_listed
from jaxadapt.keymaps import plan
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.methods.prompt import (
    Array,
    BaseSizes,
    Draw,
    Examples,
    MethodTensor,
    Params,
    PromptMethod,
    Shapes,
    Targets,
    own_tensor,
)

PROMPT, GATE = "adaption_prompt", "adaption_gate"
KEYS, VALUES, OUTPUT = "k_proj", "v_proj", "o_proj"
_WEIGHT = MethodTensor("copy", "", (), (), is_copy=True, scale_power=1)


class AdaptionPrompt(PromptMethod, peft_type="ADAPTION_PROMPT"):
    """Trained tokens that the attention of the last layers reads through a gate."""

    adds = "attention"
    key_prefix = PEFT_PREFIX
    examples: Examples = ({"adapter_len": 4, "adapter_layers": 1},)

    def complete(self, config: Any, sizes: BaseSizes) -> Config:
        return config.replace(target_modules="self_attn") if config.target_modules is None else config

    def reads(self, config: Any, module: str) -> bool:
        parent, _, name = module.rpartition(".")
        return name == KEYS and (parent == config.target_modules or parent.endswith(f".{config.target_modules}"))

    def names_in_file(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        return {
            key.removeprefix(PEFT_PREFIX).replace(".", ":"): shape
            for key, shape in shapes.items()
            if key.rpartition(".")[2].startswith("adaption_")
        }

    def shared(self, config: Any, targets: Targets, found: Shapes) -> tuple[MethodTensor, ...]:
        shapes = dict(found)
        if not found:
            missing = [name for name in ("adapter_len", "adapter_layers") if config.get(name) is None]
            if missing:
                raise ConfigError(f"ADAPTION_PROMPT: {', '.join(missing)} must be set for a new adapter")
            widths = _attention_widths(config, targets, config.adapter_layers, "adapter_layers=")
            for module in list(widths)[-config.adapter_layers :]:
                own = {PROMPT: (1, config.adapter_len, widths[module]), GATE: (1,)}
                shapes |= {f"{module}.{name}".replace(".", ":"): shape for name, shape in own.items()}
        return tuple(
            own_tensor(name, shape, PEFT_PREFIX + name.replace(":", ".")) for name, shape in sorted(shapes.items())
        )

    def check_targets(self, config: Any, targets: Targets, found: Shapes) -> None:
        _attention_widths(config, targets, 1 + max(map(layer_number, found), default=-1), "")

    def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
        raise NotImplementedError("the shapes follow from the base; see `shared`")

    def draw(self, config: Any, name: str) -> Draw:
        return Draw("constant", 0.0) if name.endswith(GATE) else Draw("normal", 1.0)

    def stored(self, config: Any, shared: Params) -> dict[str, Array]:
        return {}

    def starts_unchanged(self, config: Any) -> bool:
        return True

    def layers(
        self, config: Any, keymap: KeyMap, params: Mapping[str, Array], base: Mapping[str, Array]
    ) -> dict[str, Array]:
        weights = _projections(keymap, base)
        modules = {name.rpartition(".")[0] for name, _ in weights if self.reads(config, name)}
        by_layer = paths.nest((layer_number(name), name.rpartition(":")[2], x) for name, x in params.items())
        problems = [
            f"layer {i}: the base has no {config.target_modules} with {KEYS}" for i in by_layer if i >= len(modules)
        ]
        biased = [f"{module}.{OUTPUT}" for module in modules if (f"{module}.{OUTPUT}", "bias") in weights]
        problems += [f"{name} has a bias, which PEFT adds once more" for name in sorted(biased, key=layer_number)]
        raise_listed(AttachError, "ADAPTION_PROMPT: cannot apply the adapter to this model:", problems)
        first = next(iter(by_layer.values()))[PROMPT]
        none = {PROMPT: jnp.zeros_like(first), GATE: jnp.zeros(1, first.dtype)}
        rows = [(module, by_layer.get(i, none)) for i, module in enumerate(sorted(modules, key=layer_number))]
        return {
            "keys": jnp.stack([_project(weights, f"{module}.{KEYS}", own[PROMPT][0]) for module, own in rows]),
            "values": jnp.stack([_project(weights, f"{module}.{VALUES}", own[PROMPT][0]) for module, own in rows]),
            "gate": jnp.stack([own[GATE][0] for _, own in rows]),
        }

    def attend(self, attention: Callable[..., Array], arrays: Mapping[str, Any], layer: Mapping[str, Array]) -> Array:
        key, value = (
            jnp.broadcast_to(new.reshape(-1, *x.shape[-2:]), (*x.shape[:-3], len(new), *x.shape[-2:])).astype(x.dtype)
            for new, x in ((layer["keys"], arrays["key"]), (layer["values"], arrays["value"]))
        )
        others = {name: x for name, x in arrays.items() if name not in ("mask", "bias")}
        y, more = attention(arrays), attention({**others, "key": key, "value": value}, is_causal=False)
        return y + (layer["gate"] * more).astype(y.dtype)


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


def _attention_widths(config: Any, targets: Targets, count: int, field: str) -> dict[str, int]:
    """Return `{attention module: its inputs}` in the order of layers; raise `TargetError` if there are too few."""
    widths = {name.rpartition(".")[0]: t.in_size for t in targets for name in t.modules}
    if len(widths) < count:
        raise TargetError(
            f"ADAPTION_PROMPT: expected at least {field}{count} attention modules whose names end in"
            f" {config.target_modules!r} and that have {KEYS}, {VALUES} and {OUTPUT}, as in Llama, found {len(widths)}"
        )
    return {name: widths[name] for name in sorted(widths, key=layer_number)}


def layer_number(name: str) -> int:
    """Return the first number of a module's name, which numbers its layer.

    >>> layer_number("model.layers.12.self_attn"), layer_number("model:layers:3:self_attn:adaption_gate")
    (12, 3)
    """
    found = re.search(r"(?:^|[.:])(\d+)[.:]", name)
    if found is None:
        raise TargetError(f"{name}: expected the name of a module in a numbered layer, found no number")
    return int(found[1])
