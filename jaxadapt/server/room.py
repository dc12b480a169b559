"""Choose the configurations for which a server's bank has room, from the adapters of its folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jaxadapt
from jaxadapt import methods, serving
from jaxadapt.adapters.sites import sites_of
from jaxadapt.core.errors import AdapterError, warn
from jaxadapt.merging.rank_reduction import plain_config
from jaxadapt.serving.layout import becomes_lora
from jaxadapt.serving.shared import compare_shared

Room = jaxadapt.Config | jaxadapt.Adapter


def make_room(model: Any, folders: Iterable[Path], rank: int, targets: Sequence[str]) -> list[Room]:
    """Return what to give `serving.create`: room for plain LoRAs, and for each other kind of adapter in the folders.

    Args:
        model: the base.
        folders: the adapters that are there at the start. One that cannot be read counts for nothing; a request for it
            gets the error.
        rank: the least rank to have room for.
        targets: the modules that adapters may change.
    """
    kinds: dict[tuple[str, bool, bool], list[Any]] = {}
    whole: dict[str, list[jaxadapt.Adapter]] = {}
    for path in folders:
        try:
            info = jaxadapt.inspect(path)
            config: Any = info.config
            largest = max((size for _, shape in info.tensors.values() for size in shape), default=0)
            # A number in a JSON file must not take all memory.
            if config.facts.rows == "no" or max(_ranks(config), default=0) > largest:
                continue
            if becomes_lora(config):
                config = plain_config(config, methods.get_method(config).plain_rank(config) or rank)
            if methods.get_method(config).has_shared:
                adapter = jaxadapt.from_peft(jaxadapt.read(path), model)
                whole.setdefault(config.peft_type, []).append(adapter)
                continue
        except AdapterError:
            continue
        kind = (config.peft_type, bool(config.get("use_dora")), bool(config.get("lora_bias")))
        kinds.setdefault(kind, []).append(config)
    lora = jaxadapt.LoraConfig(r=rank, target_modules=list(targets))
    kinds.setdefault(("LORA", False, False), [])
    wanted: list[Room] = []
    for (peft_type, dora, bias), found in kinds.items():
        ranks = [r for config in found for r in _ranks(config)]
        if peft_type == "LORA":
            wanted.append(lora.replace(r=max([rank, *ranks]), use_dora=dora, lora_bias=bias))
        elif peft_type == "IA3":
            wanted.append(
                jaxadapt.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
            )
        else:
            wanted.append(found[0].replace(target_modules=list(targets), **({"r": max(ranks)} if ranks else {})))
    wanted += [each for adapters in whole.values() for each in _different(adapters)]
    room: list[Room] = []
    for made in wanted:
        try:
            serving.create(model, made, slots=2)
        except AdapterError as error:
            peft_type = (made.config if isinstance(made, jaxadapt.Adapter) else made).peft_type
            warn(f"requests for adapters of the kind {peft_type} will fail: {error}")
        else:
            room.append(made)
    return room


def _ranks(config: jaxadapt.Config) -> list[int]:
    """Return the ranks that a configuration states, as far as it states them by `r` and `rank_pattern`."""
    patterns: Any = config.get("rank_pattern") or {}
    return [r for r in (config.get("r"), *patterns.values()) if isinstance(r, int)]


def _different(adapters: Sequence[jaxadapt.Adapter]) -> list[jaxadapt.Adapter]:
    """Return one adapter for all those with the same shared tensors: the largest, with the targets of all."""
    groups: list[list[jaxadapt.Adapter]] = []
    for adapter in sorted(adapters, key=lambda adapter: -sum(x.size for x in adapter.shared.values())):
        group = next((each for each in groups if not compare_shared(each[0].shared, adapter.shared)), None)
        if group is None:
            groups.append([adapter])
        else:
            group.append(adapter)
    made: list[jaxadapt.Adapter] = []
    for first, *others in groups:
        modules = {module for adapter in (first, *others) for site in sites_of(adapter) for module in site.modules}
        made.append(dataclasses.replace(first, config=first.config.with_targets(sorted(modules))))
    return made
