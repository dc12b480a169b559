"""The fields of a LoRA configuration that make an adapter more than W + s·B·A, and what each of them changes."""

from __future__ import annotations

from typing import Any, Literal

from jaxadapt.configs import Config, LoraConfig
from jaxadapt.configs.base import class_of
from jaxadapt.core.errors import ConfigError

Effect = Literal["base", "copy", "layout", "model", "tensor", "token", "training"]

EFFECTS: dict[str, tuple[Effect, ...]] = {
    "use_dora": ("tensor",),
    "lora_bias": ("tensor",),
    "bias": ("tensor",),
    "modules_to_save": ("copy",),
    "trainable_token_indices": ("copy",),
    "kasa_config": ("tensor", "base"),
    "alora_invocation_tokens": ("token",),
    "layer_replication": ("model",),
    "ensure_weight_tying": ("model",),
    "arrow_config": ("model",),
    "megatron_config": ("model",),
    "use_qalora": ("layout",),
    "use_bdlora": ("layout",),
    "velora_config": ("training",),
    "monteclora_config": ("training",),
}
"""{field: its effects}.

| effect | with the field |
|---|---|
| base | the adapter belongs to a base whose weights its initialization changed |
| tensor | an adapted module has trained tensors besides A and B |
| copy | other modules, or rows of them, are trained in full |
| token | the adapter applies to some tokens only |
| model | the model or its other adapters take part in the computation |
| layout | A or B is stored in another form than a matrix (r, in) or (out, r) |
| training | only training differs; a trained adapter is a plain LoRA with unused tensors |
"""

# These initializations change the base weights. Unless it is converted, the adapter belongs to the changed base.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def fields_set(config: Config, *effects: Effect) -> dict[str, Any]:
    """Return `{field: value}` of the fields with one of these effects that the configuration sets; of all by default.

    An empty list counts as unset, an empty object as set (`kasa_config={}` is KaSA with PEFT's defaults).

    >>> fields_set(LoraConfig(use_dora=True, bias="all", layer_replication=[[0, 2]]), "tensor")
    {'use_dora': True, 'bias': 'all'}
    """
    values = {name: config.get(name) for name, of in EFFECTS.items() if not effects or not set(effects).isdisjoint(of)}
    return {name: value for name, value in values.items() if value not in (None, False, "none", ())}


def changes_base(config: Config) -> bool:
    """Return True if the initialization of this configuration changes the base weights."""
    init = config.get("init_lora_weights")
    by_init = isinstance(init, str) and init.lower().startswith(CHANGES_THE_BASE)
    return by_init or config.get("kasa_config") is not None


def init_field(config: Config) -> str:
    """Return the field that selects the initialization, for messages."""
    if config.get("kasa_config") is not None:
        return "kasa_config"
    return f"init_lora_weights={config.get('init_lora_weights')!r}"


def require_original_base(config: Config, source: str) -> None:
    """Raise `ConfigError` if the adapter belongs to a base that its initialization changed."""
    if changes_base(config):
        raise ConfigError(
            f"{source}: {init_field(config)}: the initialization of this adapter took a part out of the base"
            " weights, so it does not fit the original base. Load it into a model with base='original', which takes"
            " that part out of the model's weights as PEFT does on loading, or with base='changed' if they are changed"
            " already. Or convert it to a plain LoRA with the base it was trained on"
            " (jaxadapt.initializers.for_original_base; in PEFT, save_pretrained with"
            " path_initial_model_for_weight_conversion), or merge it into that base (the only way for KaSA)"
        )


def reasons_not_a_product(config: Config) -> list[str]:
    """Return the fields that make an adapter more than W + s·B·A; an empty list if there are none."""
    if not isinstance(config, LoraConfig):
        return [f"peft_type is {config.peft_type}"]
    return [f"{name}={value!r}" for name, value in fields_set(config).items()]


def merge_advice(config: Config) -> str:
    """Return how a program gets the effect of an adapter that it has no file for; for messages.

    >>> merge_advice(LoraConfig(bias="all"))
    'merge the adapter (`jaxadapt merge BASE ADAPTER --out FOLDER`)'
    """
    cls = class_of(config.peft_type)
    if cls is None:
        return "only PEFT runs this method"
    if not cls.facts.merges:
        return "it changes no weight, so that no merged model has its effect either; PEFT and jaxadapt.load run it"
    if config.get("alora_invocation_tokens") is not None:
        return "it changes some tokens only, so that no merged model has its effect; PEFT and jaxadapt.load run it"
    if config.get("target_parameters") or config.get("layer_replication") or not cls.facts.merges_files:
        return "merge it into its model in memory (jaxadapt.export.export_base(model, folder, adapter))"
    if config.get("kasa_config") is not None:
        return 'merge it into its base in memory (jaxadapt.load(…, base="original"), jaxadapt.merge)'
    merge = "merge the adapter (`jaxadapt merge BASE ADAPTER --out FOLDER`)"
    if config.get("lora_bias"):
        return f"{merge} if the adapted modules of the base have biases; else only PEFT and jaxadapt.load run it"
    nearest = ", or approximate it by a plain LoRA (`jaxadapt export … --rank R --base BASE`)"
    return f"{merge}{nearest if config.get('use_dora') else ''}"
