"""The configuration of another library's LoRA: what its tree tells, and what only its user knows."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import Any

from jaxadapt import methods
from jaxadapt.configs import Config, FrozenDict, LoraConfig, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError
from jaxadapt.keymaps.generic import with_layout
from jaxadapt.models.foreign.dialect import Dialect
from jaxadapt.models.foreign.survey import ForeignSites

_DEFAULT = LoraConfig()


def missing_alpha(dialect: Dialect, call: str) -> ConfigError:
    """The error for a missing scale, with a line to copy. `call` is the user's own: "save(tree, path"."""
    return ConfigError(
        f"{dialect.name} scales by alpha/r and stores no alpha in its tree: pass {dialect.scale}, as in\n"
        f"  jaxadapt.{call}, lora_alpha=16)"
    )


def resolve_alpha(config: Config | None, lora_alpha: float | None) -> float | None:
    """The alpha that somebody says, beside a configuration or in it; `ConfigError` where the two differ."""
    held = None if config is None else config.get("lora_alpha")
    held = None if held == _DEFAULT.lora_alpha else held
    if lora_alpha is not None and held not in (None, lora_alpha):
        raise ConfigError(f"lora_alpha={lora_alpha} is passed, and the configuration says {held}; say one of them")
    return held if lora_alpha is None else lora_alpha


def infer_config(
    guests: ForeignSites, config: Config | None = None, lora_alpha: float | None = None, call: str = "save(tree, path"
) -> LoraConfig:
    """The configuration that a tree's LoRA leaves have, completed by what the caller says.

    Args:
        config: everything a tree cannot tell (task type, dropout, …). What is left at PEFT's default in it (r=8,
            lora_alpha=8, target_modules=None) counts as not said, wherever the tree or the dialect says it.
        lora_alpha: the alpha alone.

    Raises `ConfigError` if no alpha is known, or what is said contradicts the tree.
    """
    if config is not None and not isinstance(config, LoraConfig):
        raise ConfigError(f"{guests.dialect.name} trains LoRA; expected a LoraConfig, found {type(config).__name__}")
    dialect, stored = guests.dialect, guests.alphas
    problems: list[str] = []
    given = resolve_alpha(config, lora_alpha)
    if not stored and config is None and lora_alpha is None:
        raise missing_alpha(dialect, call)
    config = config or LoraConfig()
    if config.use_rslora:
        problems.append(f"use_rslora=True, but {dialect.name} divides by r, not by its square root")
    if config.alora_invocation_tokens:
        problems.append(f"alora_invocation_tokens, but {dialect.name} adapts every token")
    asked = [n for n in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias") if config.get(n)]
    asked += [n for n, unset in (("bias", "none"), ("kasa_config", None)) if config.get(n) != unset]
    problems += [f"{name}={config.get(name)!r}, which {dialect.name} has no tensors for" for name in asked]
    if config.rank_pattern or config.r != _DEFAULT.r:
        problems += _contradictions("rank", guests.ranks, config.rank_pattern, config.r)
    else:
        rank, pattern = _patterned(guests.ranks)
        config = config.replace(r=rank, rank_pattern=pattern)
        problems += _contradictions("rank", guests.ranks, pattern, rank)
    if not stored:
        config = config.replace(lora_alpha=_DEFAULT.lora_alpha if given is None else given)
    else:
        if given is not None or config.alpha_pattern:
            default = config.lora_alpha if given is None else given
            found = _contradictions("lora_alpha", stored, config.alpha_pattern, default)
            why = "does not scale, so that lora_alpha equals the rank" if dialect.unscaled else "stores its alpha"
            problems += [f"{problem} ({dialect.name} {why}; leave it out)" for problem in found]
        alpha, pattern = _patterned(stored)
        config = config.replace(lora_alpha=alpha, alpha_pattern=pattern)
        problems += _contradictions("lora_alpha", stored, pattern, alpha)
    config, more = _targeted(guests, config)
    if problems or more:
        raise ConfigError(
            f"the configuration and the {dialect.name} tree contradict each other:\n" + paths.bullets(problems + more)
        )
    methods.get_method(config)
    return config


def _patterned(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value that most modules have, and a pattern for each other one."""
    counts = collections.Counter(values.values())
    most = max(counts, key=lambda value: (counts[value], value))
    patterns: dict[str, Any] = {}
    for value in counts:
        if value != most:
            mine = sorted(m for m, v in values.items() if v == value)
            others = [m for m, v in values.items() if v != value]
            patterns |= dict.fromkeys(matching.shortest_suffixes(mine, others), value)
    return most, dict(sorted(patterns.items()))


def _contradictions(what: str, values: Mapping[str, Any], patterns: Mapping[str, Any], default: Any) -> list[str]:
    if not isinstance(patterns, FrozenDict):
        patterns = FrozenDict(patterns)  # names are looked up in it, not tried one by one
    return [
        f"{module}: {what} {found:g} in the tree, {want:g} in the configuration"
        for module, found in values.items()
        if (want := matching.pattern_value(patterns, module, default)) != found
    ]


def _targeted(guests: ForeignSites, config: LoraConfig) -> tuple[LoraConfig, list[str]]:
    """The configuration with its target_modules, and what is wrong with those it has."""
    mine = list(guests.ranks)
    config = with_layout(config, guests.keymap, [guest.match for guest in guests.sites])
    if config.target_modules is None or matching.is_all_linear(config):
        others = guests.modules - set(mine)
        # Without the base nobody knows which other modules a short name would mean as well.
        names = matching.shortest_suffixes(sorted(mine), others) if guests.modules else sorted(mine)
        return config.replace(target_modules=names), []
    unnamed = [m for m in mine if not matching.matches(config, m)]
    left_out = [f"{m}: adapted in the tree, not named by target_modules" for m in unnamed]
    empty = [
        f"{m}: named by target_modules, without LoRA leaves in the tree"
        for m in sorted(guests.modules - set(mine))
        if matching.matches(config, m)
    ]
    return config, left_out + empty


def scale_ratios(guests: ForeignSites, config: Config, lora_alpha: float | None, call: str) -> dict[str, float]:
    """`{module: a file's scale over the tree's own}`, of the tree's modules that the file's configuration targets.

    Raises `ConfigError` where the tree's scale is not known.
    """
    dialect = guests.dialect
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"a {config.peft_type} adapter cannot go into {dialect.name} leaves, which are LoRA")
    methods.get_method(config)
    more = [name for name in ("use_dora", "lora_bias", "modules_to_save") if config.get(name)]
    more += [] if config.bias == "none" else ["bias"]
    if more:
        raise ConfigError(f"{dialect.name} leaves hold A and B alone, and this adapter has {', '.join(more)} too")
    if config.alora_invocation_tokens:
        raise ConfigError(
            "alora_invocation_tokens: this adapter leaves the tokens before them as they are, and"
            f" {dialect.name} adapts every token"
        )
    stored = guests.alphas
    off = sorted({alpha for alpha in stored.values() if lora_alpha not in (None, alpha)})
    if off:
        why = "does not scale, so that it equals the rank" if dialect.unscaled else "stores its own"
        raise ConfigError(f"lora_alpha={lora_alpha}: {dialect.name} {why}, {off}; leave it out")
    if not stored and lora_alpha is None:
        r, alpha = config.r, config.lora_alpha
        raise ConfigError(f"{missing_alpha(dialect, call)}\n(The file says lora_alpha={alpha:g}, r={r}.)")
    if not all(stored.values()) or lora_alpha == 0:
        raise ConfigError(f"lora_alpha=0: {dialect.name} leaves that count for nothing can hold no adapter")
    out: dict[str, float] = {}
    for module, rank in guests.ranks.items():
        if matching.matches(config, module):
            ratio = methods.lora_scale(config, module) / (stored.get(module, lora_alpha or 0.0) / rank)
            out[module] = 1.0 if abs(ratio - 1) < 2**-23 else ratio  # no float32 tells them apart
    return out


def first_inexact(ratios: Mapping[str, float]) -> float | None:
    """The first factor that is no power of two, so that multiplying by it rounds; None if all are exact."""
    return next((f for f in ratios.values() if math.frexp(f)[0] != 0.5), None)
