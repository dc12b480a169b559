"""The fields of a LoRA configuration that make an adapter more than W + s·B·A."""

from __future__ import annotations

from jaxadapt.configs import Config, LoraConfig
from jaxadapt.core.errors import ConfigError

# With any of these fields the adapter does more than add s·B·A to each target.
_BEYOND_A_PRODUCT = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "use_qalora", "layer_replication",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config", "megatron_config", "ensure_weight_tying",
)  # fmt: skip


# These initializations change the base weights. Unless it is converted, the adapter belongs to the changed base.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    reasons = [f"{name}={value!r}" for name in _BEYOND_A_PRODUCT if (value := config.get(name))]
    if config.bias != "none":
        reasons.append(f"bias={config.bias!r}")
    return reasons
