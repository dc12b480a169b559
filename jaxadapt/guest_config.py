"""The configuration of another library's LoRA: what its tree tells, and what only its user knows."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

from jaxadapt import methods, paths, targets
from jaxadapt.configs import Config, LoraConfig
from jaxadapt.dialect import Dialect
from jaxadapt.errors import ConfigError
from jaxadapt.guests import Guests

_DEFAULT = LoraConfig()


def need_alpha(dialect: Dialect, call: str) -> ConfigError:
    """The error for a missing scale, with a line to copy. `call` is the user's own: "save(tree, path"."""
    return ConfigError(
        f"{dialect.name} scales by alpha/r and stores no alpha in its tree: pass {dialect.scale}, as in\n"
        f"  jaxadapt.{call}, lora_alpha=16)"
    )


def infer(
    guests: Guests, config: Config | None = None, lora_alpha: float | None = None, call: str = "save(tree, path"
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
    dialect = guests.dialect
    problems: list[str] = []
    alpha: float | None = None if config is None else config.lora_alpha
    if lora_alpha is not None:
        if config is not None and config.lora_alpha not in (_DEFAULT.lora_alpha, lora_alpha):
            problems.append(f"lora_alpha={lora_alpha} is passed, and the configuration says {config.lora_alpha}")
        alpha = lora_alpha
    if alpha is None and not dialect.unscaled:
        raise need_alpha(dialect, call)
    config = config or LoraConfig()
    if config.use_rslora:
        problems.append(f"use_rslora=True, but {dialect.name} divides by r, not by its square root")
    problems += [
        f"{name}={config.get(name)!r}, which {dialect.name} has no tensors for"
        for name in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")
        if config.get(name)
    ]
    rank, ranks = _ranks(guests)
    said = bool(config.rank_pattern) or config.r != _DEFAULT.r
    if said:
        problems += [
            f"{module}: rank {found} in the tree, {want} in the configuration"
            for module, found in guests.ranks.items()
            if (want := targets.pattern_value(config.rank_pattern, module, config.r)) != found
        ]
    else:
        config = config.replace(r=rank, rank_pattern=ranks)
    if dialect.unscaled:
        given = lora_alpha is not None or config.lora_alpha != _DEFAULT.lora_alpha or bool(config.alpha_pattern)
        if given:
            wrong = [
                m
                for m, r in guests.ranks.items()
                if (alpha if not config.alpha_pattern else targets.pattern_value(config.alpha_pattern, m, alpha)) != r
            ]
            problems += [
                f"lora_alpha is given, but {dialect.name} does not scale: it equals the rank, {r}; leave it out"
                for r in sorted({guests.ranks[m] for m in wrong})
            ]
        config = config.replace(lora_alpha=config.r, alpha_pattern=config.rank_pattern)
    else:
        config = config.replace(lora_alpha=alpha)
    config, more = _targeted(guests, config)
    if problems or more:
        raise ConfigError(
            f"the configuration and the {dialect.name} tree contradict each other:\n" + paths.listing(problems + more)
        )
    methods.of(config)
    return config


def _ranks(guests: Guests) -> tuple[int, dict[str, int]]:
    """The rank that most modules have, and the others' by full name."""
    counts = collections.Counter(guests.ranks.values())
    most = max(counts, key=lambda r: (counts[r], r))
    return most, {m: r for m, r in sorted(guests.ranks.items()) if r != most}


def _targeted(guests: Guests, config: LoraConfig) -> tuple[LoraConfig, list[str]]:
    """The configuration with its target_modules, and what is wrong with those it has."""
    mine = list(guests.ranks)
    if any(guest.site.weight.fan_in_fan_out for guest in guests.guests):
        config = config.replace(fan_in_fan_out=True)  # PEFT does, for Conv1D
    if config.target_modules is None or targets.is_all_linear(config):
        others = guests.modules - set(mine)
        # Without the base nobody knows which other modules a short name would mean as well.
        names = targets.shortest(sorted(mine), others) if guests.modules else sorted(mine)
        return config.replace(target_modules=names), []
    unnamed = [m for m in mine if not targets.matches(config, m)]
    left_out = [f"{m}: adapted in the tree, not named by target_modules" for m in unnamed]
    empty = [
        f"{m}: named by target_modules, without LoRA leaves in the tree"
        for m in sorted(guests.modules - set(mine))
        if targets.matches(config, m)
    ]
    return config, left_out + empty


def ratios(guests: Guests, config: Config, lora_alpha: float | None, call: str) -> dict[str, float]:
    """`{module: a file's scale over the tree's own}`, of the tree's modules that the file's configuration targets.

    Raises `ConfigError` where the tree's scale is not known.
    """
    dialect = guests.dialect
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"a {config.peft_type} adapter cannot go into {dialect.name} leaves, which are LoRA")
    method = methods.of(config)
    if dialect.unscaled and lora_alpha is not None:
        off = sorted({r for r in guests.ranks.values() if r != lora_alpha})
        if off:
            raise ConfigError(
                f"lora_alpha={lora_alpha}: {dialect.name} does not scale: it equals the rank, {off}; leave it out"
            )
    if not dialect.unscaled and lora_alpha is None:
        r, alpha = config.r, config.lora_alpha
        raise ConfigError(f"{need_alpha(dialect, call)}\n(The file says lora_alpha={alpha:g}, r={r}.)")
    out: dict[str, float] = {}
    for module, rank in guests.ranks.items():
        if targets.matches(config, module):
            static: Any = method.static(config, (module,))
            own = 1.0 if dialect.unscaled or lora_alpha is None else lora_alpha / rank
            out[module] = static.scale / own
    return out


def inexact(ratios: Mapping[str, float]) -> float | None:
    """The first factor that is no power of two, so that multiplying by it rounds; None if all are exact."""
    return next((f for f in ratios.values() if not _power_of_two(f)), None)


def _power_of_two(value: float) -> bool:
    return value > 0 and (value / 2 ** _exponent(value)) == 1.0


def _exponent(value: float) -> int:
    import math

    return math.frexp(value)[1] - 1
