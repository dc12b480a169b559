"""ADAPTION_PROMPT (LLaMA-Adapter, arXiv:2303.16199; PEFT's `tuners/adaption_prompt/layer.py`).

A layer's keys and values of the trained tokens P come from its own projections, without rotation. Its attention output
becomes softmax(QKᵀ/√d)·V + gate · softmax(Q(P·W_k)ᵀ/√d)·(P·W_v), before the output projection. The gate starts at 0.

A file has the tensors "adaption_prompt" (1, adapter_len, width) and "adaption_gate" (1) of each layer. Here the name of
a tensor is that of the file, with ":" for ".".

PEFT applies the bias of an output projection once more to the adapter's part; such models are refused. Its GPT-2 form,
which adds the adapter's part after the output projection, is not computed.
"""

from __future__ import annotations

from typing import Any

from jaxadapt.arrays.random_draws import Draw
from jaxadapt.configs.base import Config
from jaxadapt.core.errors import ConfigError, TargetError
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.keymaps.weight import MethodTensor, own_tensor
from jaxadapt.methods.base import Array, Params, Shapes, Targets
from jaxadapt.methods.prompt import GATE, KEYS, OUTPUT, PROMPT, VALUES, BaseSizes, PromptMethod, layer_number


class AdaptionPrompt(PromptMethod):
    """Trained tokens that the attention of the last layers reads through a gate."""

    peft_type = "ADAPTION_PROMPT"
    adds = "attention"
    key_prefix = PEFT_PREFIX
    examples = ({"adapter_len": 4, "adapter_layers": 1},)

    def complete(self, config: Any, sizes: BaseSizes) -> Config:
        return config.replace(target_modules="self_attn") if config.target_modules is None else config

    def reads(self, config: Any, module: str) -> bool:
        parent, _, name = module.rpartition(".")
        return name == KEYS and (parent == config.target_modules or parent.endswith(f".{config.target_modules}"))

    def names_in_file(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        own = {key: shape for key, shape in shapes.items() if key.rpartition(".")[2].startswith("adaption_")}
        return {key.removeprefix(PEFT_PREFIX).replace(".", ":"): shape for key, shape in own.items()}

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


def _attention_widths(config: Any, targets: Targets, count: int, field: str) -> dict[str, int]:
    """Return `{attention module: its inputs}` in the order of layers; raise `TargetError` if there are too few."""
    widths = {name.rpartition(".")[0]: t.in_size for t in targets for name in t.modules}
    if len(widths) < count:
        raise TargetError(
            f"ADAPTION_PROMPT: expected at least {field}{count} attention modules whose names end in"
            f" {config.target_modules!r} and that have {KEYS}, {VALUES} and {OUTPUT}, as in Llama, found {len(widths)}"
        )
    return {name: widths[name] for name in sorted(widths, key=layer_number)}


METHOD = AdaptionPrompt()
