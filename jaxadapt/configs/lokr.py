"""LOKR: `LoKrConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.method_config import QUERY_AND_VALUE, RanksConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoKrConfig(RanksConfig):
    """LoKr (arXiv:2309.14859): the change of a weight is the Kronecker product of two small matrices.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank of each factor that is itself a product of two matrices.
        alpha: the change is multiplied by alpha / r.
        rank_dropout, module_dropout: the probability, in each call in training, of a row of the change to be 0, and of
            the whole change of a module.
        use_effective_conv2d: true decomposes the kernels of convolutions over their channels only.
        decompose_both: true also decomposes the first factor, if r is less than half of its larger size.
        decompose_factor: the size of the first factor, or its upper bound if it does not divide a weight's size; -1
            splits each size into two divisors as close to each other as possible.
        rank_dropout_scale: true divides the rows that `rank_dropout` keeps by their share.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern, rank_pattern,
            alpha_pattern: as in `LoraConfig`.
        init_weights: true starts with a first factor of zeros, "lycoris" with a second factor of zeros, and false with
            a random change of the weight.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> LoKrConfig(target_modules=["q_proj"]).decompose_factor
    -1
    """

    new_values: ClassVar[Mapping[str, float]] = {"lokr_w1": 0.0, "lokr_w1_a": 0.0, "lokr_w2": 0.0, "lokr_w2_b": 0.0}
    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="lokr_w1, lokr_w2_a, lokr_w2_b", rows="call", learning_rate=1e-2, accuracy=0.466, time=1.37
    )
    checks: ClassVar[Mapping[str, Any]] = {
        "r": "rank",
        "alpha": "number",
        "rank_dropout": "probability",
        "module_dropout": "probability",
        "init_weights": (True, False, "lycoris"),
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "LOKR"
    alpha_pattern: Mapping[str, float] | None = field(default_factory=FrozenDict)
    alpha: int | float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    exclude_modules: str | Collection[str] | None = None
    init_weights: bool | str = True
