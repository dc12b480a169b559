"""The names of the tensors in the files of all methods."""

from __future__ import annotations

from functools import cache

from jaxadapt.configs import registry
from jaxadapt.configs.base import Config, class_of


def prefix_of(cls: type[Config]) -> str | None:
    """Return the start of the names of a method's tensors in modules; None if no module has any.

    >>> from jaxadapt.configs import LoHaConfig, PrefixTuningConfig
    >>> prefix_of(LoHaConfig), prefix_of(PrefixTuningConfig)
    ('hada_', None)
    """
    return None if cls.file_tensors else cls.tensor_prefix or f"{cls.peft_type.lower()}_"


def tensor_prefixes() -> tuple[str, ...]:
    """Return the first parts of the names of all methods' file tensors, the longest first.

    >>> {"lora_", "ia3_", "vera_"} <= set(tensor_prefixes())
    True
    """
    return _names_of(tuple(Config.classes))[0]


def file_tensors() -> frozenset[str]:
    """Return the keys of all methods' file tensors that belong to no module.

    >>> "prompt_embeddings" in file_tensors()
    True
    """
    return _names_of(tuple(Config.classes))[2]


def tensors_with_parts() -> frozenset[str]:
    """Return the names of all methods' file tensors that consist of parts.

    >>> "osf_svd_params" in tensors_with_parts()
    True
    """
    return _names_of(tuple(Config.classes))[1]


def has_fractions(key: str) -> bool:
    """Return True for a tensor of floating-point numbers: each tensor of a method but its indices.

    >>> has_fractions("base_model.model.q.shira_weight"), has_fractions("base_model.model.q.shira_indices")
    (True, False)
    """
    return any(part.startswith(tensor_prefixes()) and "indices" not in part for part in key.split("."))


@cache
def _names_of(loaded: tuple[str, ...]) -> tuple[tuple[str, ...], frozenset[str], frozenset[str]]:
    """Return the three results, for the types of the table and the loaded ones."""
    types = dict.fromkeys([*registry.config_classes(), *loaded])
    classes = {name: cls for name in types if (cls := class_of(name)) is not None}
    prefixes = {prefix for cls in classes.values() if (prefix := prefix_of(cls)) is not None}
    parts = frozenset(part for cls in classes.values() for part in cls.tensor_parts)
    whole = frozenset(key for cls in classes.values() for key in cls.file_tensors)
    return tuple(sorted(prefixes, key=lambda prefix: (-len(prefix), prefix))), parts, whole
