"""WAVEFT: `WaveFTConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class WaveFTConfig(LayersConfig):
    """WaveFT (arXiv:2505.12532): the change of a weight has a few wavelet coefficients at random positions.

    Besides the attributes of `Config`:

    Attributes:
        n_frequency: the number of coefficients of a module, at most inputs · outputs.
        scaling: the factor of the change.
        wavelet_family: the wavelet. jaxadapt computes with "db1" (Haar) to "db10", "sym2" and "sym3".
        use_idwt: false uses the coefficients as entries of the change, without a wavelet.
        random_loc_seed: the seed of the coefficients' positions, drawn as PyTorch draws them.
        fan_in_fan_out, target_modules, exclude_modules, modules_to_save, bias, layers_to_transform, layers_pattern: as
            in `LoraConfig`.
        n_frequency_pattern: {pattern: number} for modules with another number of coefficients, matched like
            `rank_pattern`.
        proportional_parameters: true gives a module a number of coefficients in proportion to the size of its weight.
        init_weights: true starts with zeros, false with normal values of deviation 0.01, which change the model.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> WaveFTConfig(target_modules=["q_proj"]).wavelet_family
    'db1'
    """

    new_values: ClassVar[Mapping[str, float]] = {"waveft_spectrum": 0.0}
    facts: ClassVar[MethodFacts] = MethodFacts(trains="waveft_spectrum", rows="call", accuracy=0.403, time=2.24)
    checks: ClassVar[Mapping[str, Any]] = {
        "n_frequency": "rank",
        "n_frequency_pattern": "ranks",
        "bias": ("none", "all", "waveft_only"),
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **QUERY_AND_VALUE,
        "gpt2": {"target_modules": ("mlp.c_proj",)},
    }

    peft_type: str = "WAVEFT"
    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    exclude_modules: str | Collection[str] | None = None
    bias: str = "none"
    n_frequency_pattern: Mapping[str, int] | None = field(default_factory=FrozenDict)
    proportional_parameters: bool = False
    init_weights: bool = True
