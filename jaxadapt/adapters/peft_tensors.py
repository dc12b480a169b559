"""The content of a PEFT file, as a value. This module imports neither JAX nor numpy: to inspect files takes neither."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxadapt.configs import matching
from jaxadapt.configs.base import Config, class_of
from jaxadapt.core.errors import MismatchError, raise_listed
from jaxadapt.storage.strided import is_float


@dataclasses.dataclass(frozen=True, eq=False)
class PeftTensors:
    """An adapter as a PEFT file holds it: PEFT's tensor names, PyTorch's layout.

    Args:
        config: the configuration of `adapter_config.json`.
        tensors: `{key: array}`; the mapping may read its values on demand.
        source: the place it was read from, for messages.
        fingerprint: that of the base it was trained on (`persistence.fingerprint`); None if it is not known.
        change_base: for an adapter whose initialization took a part out of the base weights (PiSSA, OLoRA, …). True:
            `load` takes that part out of the model's weights, as PEFT does. False: the model's weights are changed
            already. None: `load` and `from_peft` refuse such an adapter.
        fit_vocabulary: True if `load` and `from_peft` may resize tensors for another vocabulary to the model's.

    >>> import numpy as np, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> PeftTensors(config, {"base_model.model.q.lora_A.weight": np.ones((2, 4))})
    PeftTensors(LORA, 1 tensors, from these tensors)
    """

    config: Config
    tensors: Mapping[str, Any]
    source: str = "these tensors"
    fingerprint: Mapping[str, Any] | None = None
    change_base: bool | None = None
    fit_vocabulary: bool = False

    def __repr__(self) -> str:
        return f"PeftTensors({self.config.peft_type}, {len(self.tensors)} tensors, from {self.source})"


def require_floats(config: Config, specs: Mapping[str, Any], target: object) -> None:
    """Raise `MismatchError` listing the integers and complex numbers among `{key: array or spec}` to be written.

    Indices are integers, and so may be tensors of a type that only passes through. `target` is the path that messages
    name.
    """
    if class_of(config.peft_type) is None:
        return
    wrong = [f"{k}: {x.dtype}" for k, x in specs.items() if matching.has_fractions(k) and not is_float(x.dtype)]
    raise_listed(MismatchError, f"{target}: cannot write these tensors: expected floating-point numbers, found:", wrong)
