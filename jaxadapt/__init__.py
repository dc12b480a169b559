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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxadapt import optim as optim

    # Type checkers and editors read these; tests/test_public.py holds them equal to `_HOME`.
    from jaxadapt.adapter import Adapter
    from jaxadapt.attach import (
        activate,
        adapt,
        delete,
        detach,
        disable,
        extract,
        init,
        inject,
    )
    from jaxadapt.bases import export_base, import_base
    from jaxadapt.checkpoint import CheckpointManager
    from jaxadapt.combining import combine
    from jaxadapt.configs import Config, IA3Config, LoraConfig
    from jaxadapt.errors import (
        AdapterError,
        AttachError,
        ConfigError,
        FileError,
        FormatError,
        KeyMapError,
        MismatchError,
        TargetError,
    )
    from jaxadapt.exchange import from_peft, to_peft
    from jaxadapt.folder import inspect, read, read_config, write
    from jaxadapt.foreign import slot
    from jaxadapt.hub import pull
    from jaxadapt.invoking import invoke
    from jaxadapt.keymap import KeyMap
    from jaxadapt.merging import merge, unmerge
    from jaxadapt.nnx_params import AdapterParam, BaseParam, LayerNumber
    from jaxadapt.originals import for_original_base
    from jaxadapt.peft_tensors import PeftTensors
    from jaxadapt.plain import plain_lora
    from jaxadapt.quantizing import dequantize, from_qwix, quantize
    from jaxadapt.reducing import resize_rank, to_lora
    from jaxadapt.report import summary
    from jaxadapt.rescaling import rescale
    from jaxadapt.sharing import push
    from jaxadapt.starting import start
    from jaxadapt.store import load, save
    from jaxadapt.weight import Weight

__version__ = "0.1.0"

# public name -> the module that defines it
_HOME = {
    name: module
    for module, names in {
        "configs": "Config LoraConfig IA3Config",
        "adapter": "Adapter",
        "peft_tensors": "PeftTensors",
        "keymap": "KeyMap",
        "weight": "Weight",
        "nnx_params": "AdapterParam BaseParam LayerNumber",
        "attach": "adapt init extract inject activate disable delete detach",
        "report": "summary",
        "bases": "export_base import_base",
        "merging": "merge unmerge",
        "combining": "combine",
        "reducing": "resize_rank to_lora",
        "plain": "plain_lora",
        "quantizing": "quantize dequantize from_qwix",
        "rescaling": "rescale",
        "invoking": "invoke",
        "exchange": "to_peft from_peft",
        "foreign": "slot",
        "originals": "for_original_base",
        "starting": "start",
        "store": "save load",
        "checkpoint": "CheckpointManager",
        "folder": "read write inspect read_config",
        "hub": "pull",
        "sharing": "push",
        "errors": "AdapterError ConfigError FileError FormatError KeyMapError MismatchError TargetError AttachError",
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


def __getattr__(name: str) -> Any:
    if name == "optim":  # the one module whose functions are called through it, as optax's are
        return importlib.import_module(f"{__name__}.{name}")
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return [*__all__, "optim", "__version__"]
