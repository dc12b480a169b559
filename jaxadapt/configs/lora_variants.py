"""What the variants of LoRA do beyond adding B·A to a weight."""

from __future__ import annotations

from jaxadapt.configs import Config, LoraConfig
from jaxadapt.core.errors import ConfigError

# With any of these the change of the weight is not s·B·A alone, or not of one weight.
_MORE_THAN_A_PRODUCT = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "use_qalora", "layer_replication",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config", "megatron_config", "ensure_weight_tying",
)  # fmt: skip


# An unconverted adapter of these belongs to a base weight that its own initialisation changed.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def changes_base(config: Config) -> bool:
    """Whether an adapter of this configuration takes something out of the base weights as it begins."""
    init = config.get("init_lora_weights")
    begins = isinstance(init, str) and init.lower().startswith(CHANGES_THE_BASE)
    return begins or config.get("kasa_config") is not None


def init_field(config: Config) -> str:
    """The field that says how an adapter begins, for messages."""
    if config.get("kasa_config") is not None:
        return "kasa_config"
    return f"init_lora_weights={config.get('init_lora_weights')!r}"


def require_original_base(config: Config, source: str, way_out: str = "") -> None:
    """Raise `ConfigError` where an adapter belongs to a base that its initialisation changed."""
    if changes_base(config):
        raise ConfigError(
            f"{source}: {init_field(config)}: this adapter belongs to a base from which its initialisation took a"
            f" part, and is another one on the original{way_out or '; ' + _CONVERT}"
        )


_CONVERT = (
    "convert it where it was trained (jaxadapt.initializers.for_original_base; in PEFT save_pretrained with"
    " path_initial_model_for_weight_conversion), or merge it there, which is KaSA's only way"
)


def reasons_not_a_product(config: Config) -> list[str]:
    """Why an adapter of this configuration is not W + s·B·A on its weights and nothing else."""
    if not isinstance(config, LoraConfig):
        return [f"peft_type is {config.peft_type}"]
    found = [f"{name}={value!r}" for name in _MORE_THAN_A_PRODUCT if (value := config.get(name))]
    if config.bias != "none":
        found.append(f"bias={config.bias!r}")
    return found
