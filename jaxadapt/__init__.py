"""Parameter-efficient fine-tuning for Flax whose adapters are PEFT's own files.

Everything public is named here and loaded when it is first used (PEP 562), so `import jaxadapt` and
`jaxadapt inspect FILE` import neither jax nor numpy.

>>> import jaxadapt
>>> config = jaxadapt.LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
>>> config.r
16
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Type checkers and editors read these; tests/system/test_public.py holds them equal to `_HOME`.
    from jaxadapt.adapters.adapter import Adapter
    from jaxadapt.adapters.peft_tensors import PeftTensors
    from jaxadapt.configs import Config, IA3Config, LoraConfig
    from jaxadapt.core.errors import (
        AdapterError,
        AttachError,
        ConfigError,
        FileError,
        FormatError,
        KeyMapError,
        MismatchError,
        TargetError,
    )
    from jaxadapt.export.base_weights import export_base, import_base
    from jaxadapt.initializers.original_base import for_original_base
    from jaxadapt.initializers.start_adapter import start
    from jaxadapt.keymaps.keymap import KeyMap
    from jaxadapt.keymaps.weight import Weight
    from jaxadapt.merging.base_merge import merge, unmerge
    from jaxadapt.merging.combination import combine
    from jaxadapt.merging.plain import plain_lora
    from jaxadapt.merging.rank_reduction import resize_rank, to_lora
    from jaxadapt.models.adapter_scale import rescale
    from jaxadapt.models.attachment import activate, adapt, delete, detach, disable, extract, init, inject
    from jaxadapt.models.foreign.tree import slot
    from jaxadapt.models.invocation import invoke
    from jaxadapt.models.nnx.params import AdapterParam, BaseParam, LayerNumber
    from jaxadapt.models.quantization import dequantize, from_qwix, quantize
    from jaxadapt.models.summary_table import summary
    from jaxadapt.persistence.folder import inspect, read, read_config, write
    from jaxadapt.persistence.peft import from_peft, to_peft
    from jaxadapt.persistence.store import load, save
    from jaxadapt.persistence.upload import push
    from jaxadapt.storage.hub import pull
    from jaxadapt.training import optim as optim
    from jaxadapt.training.checkpoint.manager import CheckpointManager

__version__ = "0.1.0"

# public name -> the module that defines it
_HOME = {
    name: module
    for module, names in {
        "configs": "Config LoraConfig IA3Config",
        "adapters.adapter": "Adapter",
        "adapters.peft_tensors": "PeftTensors",
        "keymaps.keymap": "KeyMap",
        "keymaps.weight": "Weight",
        "models.nnx.params": "AdapterParam BaseParam LayerNumber",
        "models.attachment": "adapt init extract inject activate disable delete detach",
        "models.summary_table": "summary",
        "export.base_weights": "export_base import_base",
        "merging.base_merge": "merge unmerge",
        "merging.combination": "combine",
        "merging.rank_reduction": "resize_rank to_lora",
        "merging.plain": "plain_lora",
        "models.quantization": "quantize dequantize from_qwix",
        "models.adapter_scale": "rescale",
        "models.invocation": "invoke",
        "persistence.peft": "to_peft from_peft",
        "models.foreign.tree": "slot",
        "initializers.original_base": "for_original_base",
        "initializers.start_adapter": "start",
        "persistence.store": "save load",
        "training.checkpoint.manager": "CheckpointManager",
        "persistence.folder": "read write inspect read_config",
        "storage.hub": "pull",
        "persistence.upload": "push",
        "core.errors": "AdapterError ConfigError FileError FormatError KeyMapError MismatchError TargetError AttachError",
    }.items()
    for name in names.split()
}

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterParam",
    "AttachError",
    "BaseParam",
    "CheckpointManager",
    "Config",
    "ConfigError",
    "FileError",
    "FormatError",
    "IA3Config",
    "KeyMap",
    "KeyMapError",
    "LayerNumber",
    "LoraConfig",
    "MismatchError",
    "PeftTensors",
    "TargetError",
    "Weight",
    "activate",
    "adapt",
    "combine",
    "delete",
    "dequantize",
    "detach",
    "disable",
    "export_base",
    "extract",
    "for_original_base",
    "from_peft",
    "from_qwix",
    "import_base",
    "init",
    "inject",
    "inspect",
    "invoke",
    "load",
    "merge",
    "plain_lora",
    "pull",
    "push",
    "quantize",
    "read",
    "read_config",
    "rescale",
    "resize_rank",
    "save",
    "slot",
    "start",
    "summary",
    "to_lora",
    "to_peft",
    "unmerge",
    "write",
]


_ADAPT, _LOAD = "jaxadapt.adapt(model, config, rngs=nnx.Rngs(0))", "jaxadapt.load(path, model)"
_ELSEWHERE = {
    name: meant
    for names, meant in {
        "get_peft_model inject_adapter_in_model add_adapter apply_lora_to_model": _ADAPT,
        "PeftModel PeftModelForCausalLM PeftMixedModel PeftAdapterMixin": f"{_LOAD}, or {_ADAPT}",
        "AutoPeftModelForCausalLM AutoPeftModel": f"jaxadapt.import_base(path, model), then {_LOAD}",
        "from_pretrained load_adapter load_pretrained load_peft_weights": _LOAD,
        "save_pretrained save_adapter save_lora save_lora_weights save_peft_weights": "jaxadapt.save(model, path)",
        "push_to_hub": "jaxadapt.push(model, 'org/name')",
        "set_adapter set_adapters enable_adapters": "jaxadapt.activate(model, name)",
        "disable_adapter disable_adapters disable_adapter_layers": "with jaxadapt.disable(model)",
        "delete_adapter delete_adapters": "jaxadapt.delete(model, name)",
        "merge_and_unload merge_adapter": "jaxadapt.merge(model)",
        "unmerge_adapter": "jaxadapt.unmerge(model, adapter)",
        "unload": "jaxadapt.detach(model)",
        "add_weighted_adapter": "jaxadapt.combine(adapters, weights, method=…)",
        "print_trainable_parameters get_nb_trainable_parameters get_model_status get_layer_status": "print(jaxadapt"
        ".summary(model))",
        "get_peft_model_state_dict": "jaxadapt.to_peft(model).tensors",
        "set_peft_model_state_dict": "jaxadapt.inject(jaxadapt.from_peft(tensors, model), model)",
        "rescale_adapter_scale": "with jaxadapt.rescale(model, factor)",
        "convert_to_lora": "jaxadapt.to_lora",
        "prepare_model_for_kbit_training": "jaxadapt.quantize(model, 'nf4')",
        "replace_lora_weights_loftq initialize_lora_eva_weights": "jaxadapt.start",
        "LoRAConfig LoRaConfig LoraProvider DoraConfig RsLoraConfig QLoraConfig": "jaxadapt.LoraConfig(r=8, "
        "target_modules=[…])",
        "Ia3Config": "jaxadapt.IA3Config",
        "PeftConfig": "jaxadapt.Config; jaxadapt.read_config(path) reads one",
        "TaskType PeftType": "a string, such as task_type='CAUSAL_LM'",
        "LoRAParam LoraParam LoRA Lora": "jaxadapt.AdapterParam, the type of the parameters that are trained",
        "TrainerCallback PeftSavingCallback": "jaxadapt.CheckpointManager",
    }.items()
    for name in names.split()
}
"""What PEFT, Tunix and Qwix call what is here."""


def _unknown(name: str) -> str:
    said = f"module {__name__!r} has no attribute {name!r}"
    if name in _ELSEWHERE:
        return f"{said}; here it is {_ELSEWHERE[name]}"
    meant = next((own for own in __all__ if own.lower() == name.lower()), None)
    return f"{said}; did you mean {meant!r}?" if meant else said


def __getattr__(name: str) -> Any:
    if name == "optim":  # the one module whose functions are called through it, as optax's are
        return importlib.import_module(f"{__name__}.training.{name}")
    module = _HOME.get(name)
    if module is None:
        text = _unknown(name)
        # `from jaxadapt import name` asks here first, and would drop the text of an AttributeError.
        asks = sys._getframe(1).f_globals.get("__name__")  # pyright: ignore[reportPrivateUsage]
        if name in _ELSEWHERE and asks in ("importlib._bootstrap", "_frozen_importlib"):
            raise ImportError(text, name=__name__)
        raise AttributeError(text, name=name)
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return [*__all__, "optim", "__version__"]
