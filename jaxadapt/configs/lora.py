"""LORA: `LoraConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from jaxadapt.configs.base import Config
from jaxadapt.configs.frozen import Frozen, FrozenDict, Patterns
from jaxadapt.configs.validation import Problems

BIASES = ("none", "all", "lora_only")

# "pissa_niter_16" and the like come on top. PEFT compares some of them without regard to case and some not.
INITS = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica", "lora_ga")
_CASELESS = ("gaussian", "olora", "mica")

_SPELLINGS = {
    **dict.fromkeys(("rank", "lora_rank", "lora_r"), "r"),
    **dict.fromkeys(("alpha", "loraalpha"), "lora_alpha"),
    **dict.fromkeys(("dropout", "dropout_rate", "lora_drop"), "lora_dropout"),
    **dict.fromkeys(("module_path", "modules", "targets", "lora_target_modules"), "target_modules"),
    **dict.fromkeys(("rslora", "use_rs_lora", "rank_stabilized"), "use_rslora"),
    **dict.fromkeys(("dora", "use_weight_decomposition"), "use_dora"),
    "init_weights": "init_lora_weights",
}
"""Words that other libraries and papers have for these fields."""

# Settings of variants; each is an object (PEFT: a dataclass of its own) or null.
_SUBCONFIGS = (
    "megatron_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config",
    "use_bdlora", "arrow_config", "kasa_config",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoraConfig(Config):
    """Low-rank adaptation: y = W x + s · B A x with s = lora_alpha / r (or / √r with `use_rslora`).

    The fields are PEFT's; here are those that are used most.

    Attributes:
        r: the rank of A and B.
        target_modules: a list of names (each matches the module of that path, or whose path ends in it), a
            regular expression for the whole path, or "all-linear".
        lora_alpha: the numerator of the scale; an int or a float, kept as it is.
        lora_dropout: probability with which an input of A is dropped in training.
        rank_pattern, alpha_pattern: another rank or alpha for the modules a pattern matches. Patterns are
            tried in the order given; where two match one module, the first counts, and a warning names both.
        modules_to_save: modules trained in full and saved beside the adapter.
        exclude_modules: like `target_modules`; it wins over it.

    Sub-configurations of variants (`eva_config`, `use_bdlora`, …) are objects kept as they are read.

    Raises:
        ConfigError: everything that is wrong or contradictory, in one error.

    >>> LoraConfig(r=16, target_modules=["q_proj", "v_proj"]).lora_alpha
    8
    >>> LoraConfig(r=4.0)
    Traceback (most recent call last):
    ...
    jaxadapt.core.errors.ConfigError: LoraConfig: r: expected a positive integer, found 4.0; write 4
    """

    _type: ClassVar[str | None] = "LORA"
    _spellings: ClassVar[Mapping[str, str]] = _SPELLINGS

    peft_type: str = "LORA"
    r: int = 8
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool | None = False  # null in some files; says how torch stores W
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Collection[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: int | Collection[int] | None = None
    layers_pattern: str | Collection[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenDict)
    alpha_pattern: Mapping[str, int | float] = field(default_factory=FrozenDict)
    megatron_config: Mapping[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: Collection[int] | Mapping[str, Collection[int]] | None = None
    loftq_config: Mapping[str, Any] | None = field(default_factory=FrozenDict)
    eva_config: Mapping[str, Any] | None = None
    corda_config: Mapping[str, Any] | None = None
    lora_ga_config: Mapping[str, Any] | None = None
    use_dora: bool = False
    velora_config: Mapping[str, Any] | None = None
    alora_invocation_tokens: Collection[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Mapping[str, Any] | None = None
    layer_replication: Collection[Collection[int]] | None = None
    lora_bias: bool = False
    target_parameters: Collection[str] | None = None
    use_bdlora: Mapping[str, Any] | None = None
    arrow_config: Mapping[str, Any] | None = None
    kasa_config: Mapping[str, Any] | None = None
    ensure_weight_tying: bool = False

    def _freeze(self, name: str, value: object) -> Frozen:
        if name in ("rank_pattern", "alpha_pattern") and isinstance(value, Mapping):
            return Patterns(cast("Mapping[str, Any]", value))
        return super()._freeze(name, value)

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        problems.rank("r", self.r)
        problems.number("lora_alpha", self.lora_alpha)
        problems.probability("lora_dropout", self.lora_dropout)
        problems.one_of("bias", self.bias, BIASES)
        problems.selection("target_modules", self.target_modules)
        problems.selection("exclude_modules", self.exclude_modules)
        problems.expressions("modules_to_save", self.modules_to_save)
        problems.strings("target_parameters", self.target_parameters)
        problems.integers("alora_invocation_tokens", self.alora_invocation_tokens)
        problems.patterns("rank_pattern", self.rank_pattern)
        problems.patterns("alpha_pattern", self.alpha_pattern)
        problems.text("megatron_core", self.megatron_core)
        problems.rank("qalora_group_size", self.qalora_group_size)
        problems.flag("fan_in_fan_out", self.fan_in_fan_out, optional=True)
        for name in ("use_rslora", "use_dora", "use_qalora", "lora_bias", "ensure_weight_tying"):
            problems.flag(name, getattr(self, name))
        for name in (*_SUBCONFIGS, "loftq_config"):
            problems.mapping(name, getattr(self, name))
        self._check_init(problems)
        self._check_layers(problems)
        problems.tokens("trainable_token_indices", self.trainable_token_indices)
        if self.use_dora and self.megatron_config:
            problems.add("use_dora", "false with a megatron_config", True, "unset one of them")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            way_out = "unset lora_bias or use the default initialization"
            problems.add("lora_bias", "false unless init_lora_weights is true or false", True, way_out)
        if self.lora_bias and self.use_dora:
            problems.add("lora_bias", "false with use_dora", True, "unset one of them")

    def _check_init(self, problems: Problems) -> None:
        init = cast("object", self.init_lora_weights)
        if isinstance(init, bool):
            return
        if isinstance(init, str) and (
            init in INITS or init.lower() in _CASELESS or re.fullmatch(r"pissa_niter_\d+", init)
        ):
            if init == "loftq" and not self.loftq_config:
                problems.add("loftq_config", 'an object with init_lora_weights "loftq"', self.loftq_config)
            return
        known = ", ".join(f'"{name}"' for name in INITS)
        problems.add("init_lora_weights", f'true, false, {known} or "pissa_niter_<number>"', init)

    def _check_layers(self, problems: Problems) -> None:
        layers = self.layers_to_transform
        problems.layers("layers_to_transform", layers)
        pattern: object = self.layers_pattern
        problems.expression_or_list("layers_pattern", pattern)
        if pattern and layers is None:
            way_out = "say which layers in layers_to_transform, or leave the pattern out"
            problems.add("layers_pattern", "null where layers_to_transform is null", pattern, way_out)
        if isinstance(self.target_modules, str):
            way_out = "name the layers in the expression itself, or make target_modules a list"
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    problems.add(name, "null where target_modules is a string", getattr(self, name), way_out)
        problems.pairs("layer_replication", self.layer_replication)
