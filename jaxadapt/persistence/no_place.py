"""Modules of an adapter that a model or a base has no place for, and routed experts that an adapter leaves out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from jaxadapt.adapters import routed_experts
from jaxadapt.configs.base import Config
from jaxadapt.core.name_groups import group_names
from jaxadapt.keymaps import pytorch
from jaxadapt.persistence.formats import Finding, warning

_SINGLE = re.compile(r".+\.experts\.\d+\.\w+")


def first_line(source: str, keys: Iterable[str], config: Config) -> str:
    """Return the line that tells which modules of a file a model has no place for; "" if there are none.

    Args:
        source: the file.
        keys: the keys of the tensors without a place.
        config: the configuration, which names the parameters that the keys stand for.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> first_line("out/", [f"base_model.model.h.{l}.q.lora_A.weight" for l in range(3)], LoraConfig())
    'out/: the model has no place for h.0-2.q (3)\\n'
    """
    modules = dict.fromkeys(pytorch.named_parameter(config, module) for module in pytorch.adapted_keys(keys))
    return f"{source}: the model has no place for {group_names(modules)}\n" if modules else ""


def in_base(source: str, missing: Sequence[str], of: str) -> str:
    """Return the same line for a base of files; `of` is the number of all modules in words."""
    return f"{source} has no place for {len(missing)} of {of}: {group_names(missing)}"


def find_left_out(config: Config, modules: Sequence[str], keys: Iterable[str]) -> Iterator[Finding]:
    """Find routed experts of a base that an adapter leaves out although its targets name their matrices.

    Args:
        config: the configuration.
        modules: the adapted modules.
        keys: the keys of the base's tensors.
    """
    for text in routed_experts.left_out(config, modules, routed_experts.list_in_files(keys)):
        yield warning(
            "experts", (), text, "an adapter of the routed experts", "train it again if they were meant; else nothing"
        )


def without_single(modules: Iterable[str], adapted: Iterable[str]) -> list[str]:
    """Return modules without those of single experts, unless such ones are adapted.

    transformers 5 joins them on loading, so that `target_modules` does not select them.
    """
    has_single = any(map(_SINGLE.fullmatch, adapted))
    return [module for module in modules if has_single or not _SINGLE.fullmatch(module)]
