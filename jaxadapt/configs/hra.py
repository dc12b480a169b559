"""HRA: `HRAConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HRAConfig(LayersConfig):
    """HRA (arXiv:2405.17484): a chain of r reflections of the inputs of a module.

    Besides the attributes of `Config`:

    Attributes:
        r: the number of reflections. An even number starts without a change.
        apply_GS: true makes the reflections orthogonal to each other (Gram-Schmidt).
        target_modules, exclude_modules, layers_to_transform, layers_pattern, bias, modules_to_save: as in `LoraConfig`.
        init_weights: true starts with pairs of equal reflections, which cancel, if r is even; false with random ones.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> HRAConfig(target_modules=["q_proj"]).r
    8
    """

    facts: ClassVar[MethodFacts] = MethodFacts(trains="hra_u", rows="call")
    checks: ClassVar[Mapping[str, Any]] = {"r": "rank", "bias": ("none", "all", "hra_only")}
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "HRA"
    r: int = 8
    apply_GS: bool = False
    exclude_modules: str | Collection[str] | None = None
    init_weights: bool = True
    bias: str = "none"
