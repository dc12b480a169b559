"""Names of a package that load on first use (PEP 562), so that importing the package stays fast.

Names of PEFT, Tunix and Qwix with their counterparts in jaxadapt, for error messages.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

# ---------------------------------------------------------------- lazy


def lazy_names(
    package: str, others: Iterable[tuple[str, str]] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` for the names that a package imports under `TYPE_CHECKING`.

    A package lists each public name once, as an import that only type checkers follow. This function reads these
    imports from the package's source and runs each import on first use of its name.

    Args:
        package: the package's `__name__`. Its `__init__.py` holds one `if TYPE_CHECKING:` block, whose imports have the
            form `from module import name as name`. An import of `*` there only serves type checkers.
        others: the (module, name) of the names that `*` stands for.

    >>> import jaxadapt.core
    >>> load, names, public = lazy_names("jaxadapt")
    >>> "Config" in public, load("Config").__name__
    (True, 'Config')
    """
    homes = typed_imports(package) | {name: (module, name) for module, name in others}
    public = sorted(homes)

    def load(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            hint = _explain(name, public) if package == "jaxadapt" else ""
            text = f"module {package!r} has no attribute {name!r}{hint}"
            # `from jaxadapt import name` calls this first, and would drop the text of an AttributeError.
            caller = sys._getframe(1).f_globals.get("__name__")  # pyright: ignore[reportPrivateUsage]
            if hint and caller in ("importlib._bootstrap", "_frozen_importlib"):
                raise ImportError(text, name=package)
            raise AttributeError(text, name=name)
        module, attribute = home
        if module == package:  # a package or module inside this one
            value = importlib.import_module(f"{module}.{attribute}")
        else:
            source = importlib.import_module(module)
            is_loaded = attribute in vars(source)
            value = vars(source)[attribute] if is_loaded else importlib.import_module(f"{module}.{attribute}")
        setattr(sys.modules[package], name, value)  # the next use does not call this function
        return value

    return load, lambda: [*public, "__version__"] if package == "jaxadapt" else public, public


def _explain(name: str, public: list[str]) -> str:
    """Return a hint with the jaxadapt name for `name` of PEFT, Tunix or Qwix; "" for an unknown name."""

    if name in OTHER_NAMES:
        return f"; here it is {OTHER_NAMES[name]}"
    similar = next((known for known in public if known.lower() == name.lower()), None)
    return f"; did you mean {similar!r}?" if similar else ""


def typed_imports(package: str) -> dict[str, tuple[str, str]]:
    """Return {name: (module, name there)} of the imports in a module's `if TYPE_CHECKING:` block."""
    spec = sys.modules[package].__spec__
    loader: Any = spec.loader if spec else None
    homes: dict[str, tuple[str, str]] = {}
    for node in ast.parse(loader.get_source(package)).body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for statement in node.body:
                if isinstance(statement, ast.ImportFrom) and statement.module:
                    homes |= {a.asname or a.name: (statement.module, a.name) for a in statement.names if a.name != "*"}
    return homes


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
        "delete_adapter delete_adapters": "jaxadapt.delete(model, name)",
        "merge_and_unload merge_adapter": "jaxadapt.merge(model)",
        "unmerge_adapter": "jaxadapt.unmerge(model, adapter)",
        "unload": "jaxadapt.detach(model)",
        "add_weighted_adapter": "jaxadapt.combine(adapters, weights, method=…)",
        "print_trainable_parameters get_nb_trainable_parameters get_model_status get_layer_status": "print(jaxadapt"
        ".summary(model))",
        "get_peft_model_state_dict": "jaxadapt.to_peft(model).tensors",
        "set_peft_model_state_dict": "jaxadapt.inject(jaxadapt.from_peft(tensors, model), model)",
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
}
"""{name in the other library: the call or class of jaxadapt}."""
