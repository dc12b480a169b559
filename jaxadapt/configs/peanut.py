"""PEANUT: `PeanutConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PeanutConfig(LayersConfig):
    """PEANuT (arXiv:2410.01870): a small neural network of the weight computes its change.

    Besides the attributes of `Config`:

    Attributes:
        r: the width of the network.
        depth: the number of hidden layers on each side of the network, 0 or more.
        act_fn: the activation function, by its name in transformers. jaxadapt computes with those listed in
            `methods/peanut.py`.
        scaling: the factor of the change.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        init_weights: true starts without a change of the weight, false with a random one.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> PeanutConfig(target_modules=["q_proj"]).r
    32
    """

    new_values: ClassVar[Mapping[str, float]] = {"peanut_B.weight": 0.0}
    facts: ClassVar[MethodFacts] = MethodFacts(trains="peanut_A, peanut_B", accuracy=0.449, time=1.42)
    tensor_parts: ClassVar[tuple[str, ...]] = ("peanut_encoders", "peanut_decoders")
    checks: ClassVar[Mapping[str, Any]] = {"r": "rank", "depth": "size"}
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "PEANUT"
    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    exclude_modules: str | Collection[str] | None = None
    init_weights: bool = True
