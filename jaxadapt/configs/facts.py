"""Facts about a method besides its computation: for `jaxadapt methods`, the demo and servers. No JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxadapt.configs.frozen import FrozenDict


@dataclasses.dataclass(frozen=True)
class MethodFacts:
    """The facts of one method, a class variable `facts` of its configuration.

    PEFT's figures are those of its benchmark `method_comparison/MetaMathQA`: Llama 3.2 3B, 5,000 steps of 4 examples.

    Attributes:
        trains: the trained tensors of the demo's configuration; "" if not stated.
        rows: "call" if the rows of a batch may each have their own adapter, chosen in the call; "put" if a server must
            prepare the adapter for it; "no" if they cannot.
        merges: False if no weight has the method's effect.
        merges_files: False if only a model in memory can be merged: the change depends on the order of the modules, or
            starts from values of the base.
        learning_rate: AdamW's peak learning rate in `jaxadapt demo`.
        demo: the fields of the configuration there, besides the targets.
        accuracy: the share of right answers in PEFT's benchmark; None if it has no figure. LoRA's is 0.478.
        time: the training time in PEFT's benchmark, divided by LoRA's; None if it has no figure.
    """

    trains: str = ""
    rows: Literal["call", "put", "no"] = "no"
    merges: bool = True
    merges_files: bool = True
    learning_rate: float = 1e-3
    demo: Mapping[str, Any] = FrozenDict()
    accuracy: float | None = None
    time: float | None = None
