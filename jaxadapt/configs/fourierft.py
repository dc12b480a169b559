"""FOURIERFT: `FourierFTConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.c3a import refuse_alternatives
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig
from jaxadapt.configs.validation import Problems


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FourierFTConfig(LayersConfig):
    """FourierFT (arXiv:2405.03003): the change of a weight has a sparse spectrum at random frequencies.

    Besides the attributes of `Config`:

    Attributes:
        n_frequency: the number of frequencies of a module, at most inputs · outputs.
        scaling: the factor of the change.
        random_loc_seed: the seed of the frequencies' positions, drawn as PyTorch draws them.
        fan_in_fan_out, target_modules, exclude_modules, modules_to_save, bias, layers_to_transform, layers_pattern: as
            in `LoraConfig`.
        n_frequency_pattern: {pattern: number} for modules with another number of frequencies, matched like
            `rank_pattern`. PEFT does not group a pattern, so alternatives at its top level ("q|v") are refused.
        init_weights: true starts with zeros, false with normal values, which change the model.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> FourierFTConfig(target_modules=["q_proj"]).n_frequency
    1000
    """

    new_values: ClassVar[Mapping[str, float]] = {"fourierft_spectrum": 0.0}
    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="fourierft_spectrum", rows="call", learning_rate=0.1, accuracy=0.096, time=1.83
    )
    checks: ClassVar[Mapping[str, Any]] = {
        "n_frequency": "rank",
        "n_frequency_pattern": "ranks",
        "bias": ("none", "all", "fourier_only"),
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **QUERY_AND_VALUE,
        "gpt2": {"target_modules": ("mlp.c_proj",)},
    }

    peft_type: str = "FOURIERFT"
    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    exclude_modules: str | Collection[str] | None = None
    bias: str = "none"
    n_frequency_pattern: Mapping[str, int] | None = field(default_factory=FrozenDict)
    init_weights: bool = False

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        if "n_frequency_pattern" not in problems:
            refuse_alternatives(problems, "n_frequency_pattern", self.n_frequency_pattern)
