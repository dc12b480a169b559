"""Settings of a LoRA configuration that are refused, by themselves or at one site."""

from __future__ import annotations

from jaxadapt.configs import LoraConfig
from jaxadapt.configs.lora import fields_set
from jaxadapt.core.errors import ConfigError
from jaxadapt.keymaps.keymap import Match
from jaxadapt.methods.lora import alora, kasa


def check_site(config: LoraConfig, match: Match, r: int) -> None:
    """Raise `ConfigError` for settings that PEFT lacks for the kind of weight at a site."""
    groups, kind = match.weight.groups, match.weight.kind
    if r % groups:
        raise ConfigError(f"{match.leaf}: the rank {r} must be a multiple of the convolution's {groups} groups")
    if groups > 1 and config.use_dora:
        raise ConfigError(
            f"{match.leaf}: use_dora is not supported on a grouped convolution, where PEFT's norm mixes the weights of"
            " several groups; set use_dora=False, or exclude the module"
        )
    asked = [f"{name}={value!r}" for name, value in fields_set(config, "tensor").items()]
    if kind == "attention" and asked:
        raise ConfigError(
            f"{match.leaf}: {', '.join(asked)} is not supported on an nn.MultiheadAttention: PEFT has no such adapter"
            " (its bias there has no effect in the forward pass); remove the setting, or exclude the module"
        )
    conflicts = [f"{name}={value!r}" for name in ("use_dora", "lora_dropout") if (value := config.get(name))]
    if kind == "embedding" and config.ensure_weight_tying and conflicts:
        raise ConfigError(
            f"{match.leaf}: {', '.join(conflicts)} cannot be combined with ensure_weight_tying: PEFT then treats the"
            " lookup and the head differently, but they are one weight; remove one of the settings"
        )
    if config.kasa_config is not None and (problems := kasa.list_problems(config, match)):
        raise ConfigError(f"{match.leaf}: kasa_config with {', '.join(problems)}: PEFT has no such adapter")
    if config.alora_invocation_tokens is not None and (problems := alora.list_problems(config, match)):
        raise ConfigError(f"{match.leaf}: alora_invocation_tokens with {', '.join(problems)}: PEFT has no such adapter")
    if kind == "embedding" and config.lora_bias:
        raise ConfigError(
            f"{match.leaf}: lora_bias=True is not supported on an embedding, which has no output bias; set"
            " lora_bias=False, or exclude the module"
        )


def check_parameter(config: LoraConfig, match: Match) -> None:
    """Raise `ConfigError` for settings that PEFT's ParamWrapper lacks: it computes only W + s·B·A."""
    unsupported = fields_set(config, "tensor", "token")
    unsupported |= {name: value for name in ("lora_dropout", "fan_in_fan_out") if (value := config.get(name))}
    problems = [f"{name}={value!r}" for name, value in unsupported.items() if name != "bias"]
    if problems:
        raise ConfigError(
            f"{match.leaf}: {', '.join(problems)} cannot be combined with target_parameters: PEFT only adds s·B·A to"
            " such a parameter; leave these fields at their defaults"
        )


_PLAIN = "jaxadapt.merging.plain_lora(jaxadapt.read(…)) converts such a file to an equivalent plain LoRA"
REFUSED_FIELDS: dict[str, str] = {
    "use_qalora": f"applies only to bases quantized with GPTQ, and no JAX model is: {_PLAIN}"
    " (with another base the file is a plain LoRA already: set use_qalora=False)",
    "use_bdlora": f"makes A or B block-diagonal, which PEFT uses only to shard a LoRA over devices: {_PLAIN}",
    "arrow_config": "routes each token among other adapters: load those adapters separately",
    "velora_config": f"compresses activations for the backward pass, in training only: {_PLAIN}",
    "monteclora_config": f"redraws its factors, in training only: {_PLAIN}",
    "megatron_config": "is for Megatron's parallel layers: set it to null; the base's shardings determine the layout",
    "enable_lora": "is a field of PEFT 0.2 for layers with several projections: current PEFT drops it and computes"
    " something else",
}
"""Fields that change the computation and are not supported, with the reason; PEFT no longer has the last one."""
