"""ADALORA: `AdaLoraConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig
from jaxadapt.configs.validation import CHECKS, Problems

_TARGETS: Mapping[str, Mapping[str, Any]] = {
    "mt5": {"target_modules": ("q", "k", "v", "o", "wi_0", "wi_1", "wo")},
    "t5": {"target_modules": ("q", "k", "v", "o", "wi", "wo")},
    "roberta": {"target_modules": ("query", "key", "value", "dense")},
    **QUERY_AND_VALUE,
}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AdaLoraConfig(LayersConfig):
    """AdaLoRA (arXiv:2303.10512): LoRA with a diagonal E between A and B, whose ranks shrink during training.

    The fields are those of `LoraConfig` and the schedule of the allocator. PEFT ignores some of the former. Besides the
    attributes of `Config`:

    Attributes:
        r: not used; the rank is `init_r`. A new adapter needs the default 8.
        init_r: the rank of every module at the start. The scale is lora_alpha / init_r, also after ranks shrank.
        target_r: the average rank at the end.
        tinit: the number of first steps, in which no rank shrinks.
        tfinal: the number of last steps, in which the ranks stay as they are.
        deltaT: the number of steps between two allocations of ranks.
        beta1, beta2: the decay of the averages of the sensitivity and of its uncertainty, in (0, 1).
        orth_reg_weight: the weight of `methods.adalora.orthogonality_loss` in the loss.
        total_step: the number of steps of the training. PEFT opens no file without it, and a new adapter needs it.
        rank_pattern: `{path of lora_E: list of booleans}`, the ranks that remain of `init_r` in the tensors of a file.
            None if all remain.
        target_modules, exclude_modules, lora_alpha, lora_dropout, fan_in_fan_out, bias, modules_to_save,
            layers_to_transform, layers_pattern, trainable_token_indices, layer_replication, ensure_weight_tying: as in
            `LoraConfig`.
        init_lora_weights: true starts with an E of zeros, false with random values everywhere.
        use_dora, loftq_config: refused, as in PEFT.
        use_rslora, alpha_pattern, megatron_config, megatron_core, eva_config, corda_config, lora_ga_config,
            velora_config, alora_invocation_tokens, use_qalora, qalora_group_size, monteclora_config, lora_bias,
            target_parameters, use_bdlora, arrow_config, kasa_config: fields of `LoraConfig` that PEFT keeps in the file
            and ignores. A new adapter needs their defaults.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> AdaLoraConfig(target_modules=["q_proj"], total_step=100).init_r
    12
    """

    new_values: ClassVar[Mapping[str, float]] = {"lora_E": 0.0}
    tensor_pairs: ClassVar[tuple[tuple[str, str], ...]] = (("lora_A", "lora_B"), ("lora_A", "lora_E"))
    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="lora_A, lora_B, lora_E", rows="call", learning_rate=3e-2, accuracy=0.373, time=1.24
    )
    tensor_prefix: ClassVar[str | None] = "lora_"
    checks: ClassVar[Mapping[str, Any]] = {
        **dict.fromkeys(("r", "target_r", "init_r", "deltaT"), "rank"),
        "rank_pattern": "any",
        "total_step": "any",
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = _TARGETS
    ignored: ClassVar[tuple[str, ...]] = (
        "r", "use_rslora", "alpha_pattern", "megatron_config", "eva_config", "corda_config", "lora_ga_config",
        "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "lora_bias", "use_bdlora",
        "arrow_config", "kasa_config",
    )  # fmt: skip

    peft_type: str = "ADALORA"
    r: int = 8
    exclude_modules: str | Collection[str] | None = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool | None = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, Collection[bool]] | None = None
    alpha_pattern: Mapping[str, int | float] | None = field(default_factory=FrozenDict)
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
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def mask_of(self, module: str) -> tuple[bool, ...]:
        """Return for each of the first ranks of a PyTorch module if it remains in the tensors of a file.

        >>> AdaLoraConfig(init_r=3, rank_pattern={"0.q.lora_E": [True, False, True]}).mask_of("0.q")
        (True, False, True)
        """
        masks = self.rank_pattern or {}
        return tuple(masks.get(f"{module}.lora_E", (True,) * self.init_r))

    def _check_field(self, problems: Problems, name: str, value: Any) -> None:
        if name in CHECKS and name not in self.checks:
            problems.check(name, value)
        else:
            super()._check_field(problems, name, value)

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        for name in ("use_dora", "loftq_config"):
            if self.get(name):
                problems.add(name, "no value with ADALORA", self.get(name), "unset it, or use LORA")
        if not isinstance(cast("object", self.init_lora_weights), bool | str):
            problems.add("init_lora_weights", "true or false", self.init_lora_weights)
        for name in ("tinit", "tfinal", "orth_reg_weight"):
            if name not in problems and self.get(name) < 0:
                problems.add(name, "a number of at least 0", self.get(name))
        for name in ("beta1", "beta2"):
            if name not in problems and not 0 < self.get(name) < 1:
                problems.add(name, "a number in (0, 1)", self.get(name))
        steps: Any = self.total_step
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            problems.add("total_step", "a positive integer or null", steps)
        elif steps and not ("tinit" in problems or "tfinal" in problems) and self.tinit >= steps - self.tfinal:
            way_out = "decrease tinit or tfinal, or increase total_step"
            problems.add("tinit", "less than total_step - tfinal", self.tinit, way_out)
        self._check_masks(problems)

    def _check_masks(self, problems: Problems) -> None:
        masks: Any = self.rank_pattern
        if masks is not None and not isinstance(masks, FrozenDict):
            problems.add("rank_pattern", "an object of module.lora_E -> list of booleans, or null", masks)
            return
        for key, mask in (masks or {}).items():
            if not isinstance(mask, tuple) or not all(isinstance(kept, bool) for kept in cast("tuple[Any, ...]", mask)):
                problems.add(f"rank_pattern[{key!r}]", "a list of booleans", mask)
            elif len(cast("tuple[Any, ...]", mask)) != self.init_r or not f".{key}".endswith(".lora_E"):
                problems.add(f"rank_pattern[{key!r}]", f"init_r = {self.init_r} booleans for a path of lora_E", mask)
