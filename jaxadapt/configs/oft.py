"""OFT: `OFTConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.method_config import QUERY_AND_VALUE, LayersConfig
from jaxadapt.configs.validation import Problems


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OFTConfig(LayersConfig):
    """OFT (arXiv:2306.07280): an orthogonal matrix of equal diagonal blocks rotates the inputs of a module.

    Besides the attributes of `Config`:

    Attributes:
        r: the number of blocks; 0 if `oft_block_size` is given.
        oft_block_size: the size of a block; 0 if `r` is given.
        module_dropout: the dropout of blocks in training, which PEFT does not apply, and neither does jaxadapt.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern, fan_in_fan_out, bias: as
            in `LoraConfig`.
        init_weights: true starts with the identity, false with random rotations.
        coft: true limits the rotation to a ball of radius eps / √blocks around the identity.
        eps: the radius.
        block_share: true uses the same rotation in all blocks.
        use_cayley_neumann: true approximates the rotation by a series, which in PEFT turns the other way than the exact
            rotation.
        num_cayley_neumann_terms: the number of terms of the series.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> OFTConfig(target_modules=["q_proj"]).oft_block_size
    32
    """

    main_fields: ClassVar[tuple[str, ...]] = ("r", "oft_block_size")
    new_values: ClassVar[Mapping[str, float]] = {"oft_R.weight": 0.0}
    facts: ClassVar[MethodFacts] = MethodFacts(trains="oft_R", rows="call", accuracy=0.491, time=1.27)
    checks: ClassVar[Mapping[str, Any]] = {
        "module_dropout": "probability",
        "bias": ("none", "all", "oft_only"),
        "num_cayley_neumann_terms": "rank",
    }
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = QUERY_AND_VALUE

    peft_type: str = "OFT"
    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    exclude_modules: str | Collection[str] | None = None
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        if (self.r == 0) == (self.oft_block_size == 0):
            problems.add("r", "0 if oft_block_size is given, else the number of blocks", self.r, "set one of them to 0")
