"""DEFT: `DeftConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DeftConfig(LayersConfig):
    """DEFT: removes a subspace of the outputs from a weight, and puts a trained matrix in its place.

    Besides the attributes of `Config`:

    Attributes:
        r: the dimension of the subspace; a module with fewer outputs uses all of them.
        target_modules, exclude_modules, modules_to_save, fan_in_fan_out, bias, layers_to_transform, layers_pattern: as
            in `LoraConfig`.
        decomposition_method: "relu" projects with P·relu(P)ᵀ, "qr" with an orthonormal basis of P.
        init_scale: the factor of the initial values of R if `init_weights` is false.
        alpha: R is multiplied by alpha / r; null or 0 for no factor.
        para: true removes the subspace only, without R.
        deft_dropout: the dropout of R's input in training.
        init_weights: true starts without a change of the weight (except with `para`), false with a random one.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> DeftConfig(target_modules=["q_proj"]).decomposition_method
    'relu'
    """

    facts: ClassVar[MethodFacts] = MethodFacts(trains="deft_P, deft_R", rows="call", accuracy=0.482, time=1.1)
    checks: ClassVar[Mapping[str, Any]] = {
        "r": "rank",
        "decomposition_method": ("relu", "qr"),
        "deft_dropout": "probability",
        "bias": ("none", "all", "deft_only"),
        "alpha": "integer",
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "DEFT"
    r: int = 8
    exclude_modules: str | Collection[str] | None = None
    decomposition_method: str = "relu"
    init_scale: float = 1.0
    alpha: int | None = None
    para: bool = False
    fan_in_fan_out: bool = False
    deft_dropout: float = 0.0
    init_weights: bool = True
    bias: str = "none"
