"""Names of a package (PEP 562) and modules that load on first use, so that importing the package stays fast.

`OTHER_NAMES` has the names of PEFT, Tunix and Qwix, and those that the root once had, with their counterparts in
jaxadapt, for error messages.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

# ---------------------------------------------------------------- lazy


def lazy_names(
    package: str, names: Mapping[str, str], packages: str = "", others: Iterable[tuple[str, str]] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package whose names load on first use.

    The package's `__init__.pyi` lists the same names for type checkers.

    Args:
        package: the package's `__name__`.
        names: `{module below jaxadapt: its public names, separated by spaces}`. A name may be a module in that package.
        packages: the public packages inside this one, separated by spaces.
        others: `(module, name)` of further names.

    >>> load, names, public = lazy_names("jaxadapt", {"configs.lora": "LoraConfig"})
    >>> public, load("LoraConfig").__name__
    (['LoraConfig'], 'LoraConfig')
    """
    homes = (
        {name: f"jaxadapt.{module}" for module, words in names.items() for name in words.split()}
        | {name: module for module, name in others}
        | dict.fromkeys(packages.split(), package)
    )
    public = sorted(homes)

    def load(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            hint = _explain(name, public, package)
            text = f"module {package!r} has no attribute {name!r}{hint}"
            # `from jaxadapt import name` calls this first, and would drop the text of an AttributeError.
            caller = sys._getframe(1).f_globals.get("__name__")  # pyright: ignore[reportPrivateUsage]
            if hint and caller in ("importlib._bootstrap", "_frozen_importlib"):
                raise ImportError(text, name=package)
            raise AttributeError(text, name=name)
        found = {} if home == package else vars(importlib.import_module(home))
        value = found[name] if name in found else importlib.import_module(f"{home}.{name}")
        setattr(sys.modules[package], name, value)  # the next use does not call this function
        return value

    return load, lambda: [*public, "__version__"] if package == "jaxadapt" else public, public


class LazyModule(ModuleType):
    """A module that is imported when one of its names is first used.

    >>> LazyModule("math").sqrt(4.0)
    2.0
    """

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)  # the next use does not call this function
        return value


# Imported from here by modules whose first functions do without these libraries.
if TYPE_CHECKING:
    import jax  # pyright: ignore[reportUnusedImport]
    import numpy as np  # pyright: ignore[reportUnusedImport]
    import numpy.typing as npt  # pyright: ignore[reportUnusedImport]
else:
    jax, np, npt = map(LazyModule, ("jax", "numpy", "numpy.typing"))


def _explain(name: str, public: list[str], package: str) -> str:
    """Return a hint with the jaxadapt name for `name` of PEFT, Tunix, Qwix or the root; "" for an unknown name."""
    if package != "jaxadapt":
        return f"; here it is jaxadapt.{name}" if name in sys.modules["jaxadapt"].__all__ else ""
    if name in OTHER_NAMES:
        return f"; here it is {OTHER_NAMES[name]}"
    similar = next((known for known in public if known.lower() == name.lower()), None)
    return f"; did you mean {similar!r}?" if similar else ""


# ---------------------------------------------------------------- other names


_ADAPT, _LOAD = "jaxadapt.adapt(model, config, rngs=nnx.Rngs(0))", "jaxadapt.load(path, model)"
OTHER_NAMES = {
    name: counterpart
    for names, counterpart in {
        "get_peft_model inject_adapter_in_model add_adapter apply_lora_to_model": _ADAPT,
        "PeftModel PeftModelForCausalLM PeftMixedModel PeftAdapterMixin": f"{_LOAD}, or {_ADAPT}",
        "AutoPeftModelForCausalLM AutoPeftModel": f"jaxadapt.export.import_base(path, model), then {_LOAD}",
        "from_pretrained load_adapter load_pretrained load_peft_weights": _LOAD,
        "save_pretrained save_adapter save_lora save_lora_weights save_peft_weights": "jaxadapt.save(model, path)",
        "push_to_hub": "jaxadapt.push(model, 'org/name')",
        "set_adapter set_adapters enable_adapters": "jaxadapt.activate(model, name)",
        "disable_adapter disable_adapters disable_adapter_layers": "with jaxadapt.disable(model)",
        "delete_adapter delete_adapters": "jaxadapt.delete(model, name=name)",
        "merge_and_unload merge_adapter": "jaxadapt.merge(model)",
        "unmerge_adapter": "jaxadapt.unmerge(model, adapter)",
        "unload": "jaxadapt.detach(model)",
        "add_weighted_adapter": "jaxadapt.combine(adapters, weights, method=…)",
        "print_trainable_parameters get_nb_trainable_parameters get_model_status get_layer_status": "print(jaxadapt"
        ".summary(model))",
        "get_peft_model_state_dict": "jaxadapt.to_peft(model).tensors",
        "set_peft_model_state_dict": "jaxadapt.inject(model, jaxadapt.from_peft(tensors, model))",
        "rescale_adapter_scale": "with jaxadapt.models.rescale(model, factor)",
        "convert_to_lora": "jaxadapt.merging.to_lora",
        "prepare_model_for_kbit_training": "jaxadapt.models.quantize(model, 'nf4')",
        "replace_lora_weights_loftq initialize_lora_eva_weights": "jaxadapt.initializers.start",
        "LoRAConfig LoRaConfig LoraProvider DoraConfig RsLoraConfig QLoraConfig": "jaxadapt.LoraConfig(r=8, "
        "target_modules=[…])",
        "Ia3Config": "jaxadapt.IA3Config",
        "PeftConfig": "jaxadapt.Config; read one with jaxadapt.read_config(path)",
        "TaskType PeftType": "a string, such as task_type='CAUSAL_LM'",
        "LoRAParam LoraParam LoRA Lora": "jaxadapt.AdapterParam, the type of the trained parameters",
        "TrainerCallback PeftSavingCallback": "jaxadapt.CheckpointManager",
    }.items()
    for name in names.split()
} | {
    name: f"jaxadapt.models.{name}" for name in ("BaseParam", "FrozenParam", "LayerNumber", "SharedParam", "attention")
}
"""{name in the other library, or once in the root: the call or class of jaxadapt}."""
