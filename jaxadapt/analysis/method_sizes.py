"""The sizes of the adapters of each method on one model, from its shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from jaxadapt.adapters import sites
from jaxadapt.adapters.adapter import Adapter, all_tensors
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config, class_of
from jaxadapt.configs.table import FACTS
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError, TargetError
from jaxadapt.methods.registry import METHODS
from jaxadapt.models import attachment


def count_trained(adapter: Adapter) -> int:
    """Return the number of trained parameters of an adapter, with or without values.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> base = {"q": {"kernel": jax.ShapeDtypeStruct((4, 6), "float32")}}
    >>> count_trained(attachment.init(base, LoraConfig(r=2, target_modules=["q"])))
    20
    """
    trained = {t.name for t in all_tensors(sites.sites_of(adapter)) if t.trained}
    return sum(math.prod(x.shape) for path, x in adapter.flat().items() if path.rpartition(".")[2] in trained)


def method_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int | str]:
    """Return `{type: trained parameters, or the error that prevents an adapter}` for a model `{path: shape}`.

    Each method has its default configuration, with PEFT's default targets for the model's family, or else all linear
    modules.
    """
    base = paths.unflatten({path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()})
    return {peft_type: _size(peft_type, base) for peft_type in sorted(METHODS)}


def _size(peft_type: str, base: Any) -> int | str:
    cls = class_of(peft_type)
    assert cls is not None
    try:
        try:
            return count_trained(attachment.init(base, cls()))
        except TargetError:
            return count_trained(attachment.init(base, _everywhere(cls)))
    except AdapterError as error:
        return str(error).partition("\n")[0]


def _everywhere(cls: type[Config]) -> Config:
    defaults = FACTS[cls.peft_type].default_targets
    fields: dict[str, Any] = {name: () for values in defaults.values() for name in values}
    fields["target_modules"] = matching.ALL_LINEAR
    return cls(**fields)
