"""LOHA: `LoHaConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.method_config import QUERY_AND_VALUE, RanksConfig


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoHaConfig(RanksConfig):
    """LoHa (arXiv:2108.06098): the change of a weight is the elementwise product of two low-rank matrices.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank of both matrices.
        alpha: the change is multiplied by alpha / r.
        rank_dropout, module_dropout: the probability, in each call in training, of a row of the change to be 0, and of
            the whole change of a module.
        use_effective_conv2d: true decomposes the kernels of convolutions over their channels only. PEFT trains such an
            adapter with wrong gradients of `hada_w1_a` and `hada_w2_a`; jaxadapt's are those of the function.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern, rank_pattern,
            alpha_pattern: as in `LoraConfig`.
        init_weights: true starts without a change of the weight, false with a random one.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> LoHaConfig(target_modules=["q_proj"]).alpha
    8
    """

    tensor_prefix: ClassVar[str | None] = "hada_"
    new_values: ClassVar[Mapping[str, float]] = {"hada_w2_b": 0.0}
    tensor_pairs: ClassVar[tuple[tuple[str, str], ...]] = (
        ("hada_w1_a", "hada_w1_b"),
        ("hada_w2_a", "hada_w2_b"),
        ("hada_w1_a", "hada_w2_a"),
    )
    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b", rows="put", learning_rate=2e-2, accuracy=0.393, time=1.48
    )
    checks: ClassVar[Mapping[str, Any]] = {
        "r": "rank",
        "alpha": "number",
        "rank_dropout": "probability",
        "module_dropout": "probability",
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "LOHA"
    alpha_pattern: Mapping[str, float] | None = field(default_factory=FrozenDict)
    alpha: int | float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    exclude_modules: str | Collection[str] | None = None
    init_weights: bool = True
