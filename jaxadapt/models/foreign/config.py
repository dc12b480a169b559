"""Configuration of a foreign tree's LoRA: inferred from the tree, completed with the user's values."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

from jaxadapt.configs import Config, FrozenDict, LoraConfig, matching
from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.configs.lora import fields_set
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError
from jaxadapt.keymaps.generic import with_layout
from jaxadapt.methods.registry import get_method
from jaxadapt.models.foreign.dialect import Dialect
from jaxadapt.models.foreign.survey import ForeignSites

_DEFAULT = LoraConfig()


def missing_alpha(dialect: Dialect) -> ConfigError:
    """Return the error for a missing scale."""
    return ConfigError(
        f"the alpha of this tree is unknown: {dialect.name} scales by alpha/r and stores no alpha. Pass"
        f" {dialect.scale}, for example jaxadapt.models.LoraTree(tree, lora_alpha=16) instead of the tree (jaxadapt"
        " convert: --lora-alpha 16)"
    )


def resolve_alpha(config: Config | None, lora_alpha: float | None) -> float | None:
    """Return the alpha passed in `lora_alpha` or in a configuration; raise `ConfigError` if the two differ."""
    from_config = (config or _DEFAULT).get("lora_alpha")
    from_config = None if from_config == _DEFAULT.lora_alpha else from_config
    if lora_alpha is not None and from_config not in (None, lora_alpha):
        raise ConfigError(
            f"lora_alpha={lora_alpha} contradicts lora_alpha={from_config} of the configuration; pass one of them"
        )
    return from_config if lora_alpha is None else lora_alpha


def infer_config(sites: ForeignSites, config: Config | None = None, lora_alpha: float | None = None) -> LoraConfig:
    """Return the configuration of a tree's LoRA leaves, completed with the caller's values.

    Args:
        config: fields that the tree does not show (task type, dropout, …). Fields at PEFT's default (r=8,
            lora_alpha=8, target_modules=None) count as unset if the tree or the dialect defines them.
        lora_alpha: only the alpha, instead of `config`.

    Raises `ConfigError` if the alpha is unknown, or `config` or `lora_alpha` contradicts the tree.
    """
    if config is not None and not isinstance(config, LoraConfig):
        raise ConfigError(
            f"expected a LoraConfig, because {sites.dialect.name} trains LoRA, found {type(config).__name__}"
        )
    dialect, stored = sites.dialect, sites.alphas
    problems: list[str] = []
    given = resolve_alpha(config, lora_alpha)
    if not stored and config is None and lora_alpha is None:
        raise missing_alpha(dialect)
    config = config or LoraConfig()
    problems += _unsupported(config, dialect)
    if config.rank_pattern or config.r != _DEFAULT.r:
        problems += _contradictions("rank", sites.ranks, config.rank_pattern, config.r)
    else:
        rank, pattern = _factor_patterns(sites.ranks)
        config = config.replace(r=rank, rank_pattern=pattern)
        problems += _contradictions("rank", sites.ranks, pattern, rank)
    if not stored:
        config = config.replace(lora_alpha=_DEFAULT.lora_alpha if given is None else given)
    else:
        problems += _contradicted_alphas(config, given, stored, dialect)
        alpha, pattern = _factor_patterns(stored)
        config = config.replace(lora_alpha=alpha, alpha_pattern=pattern)
        problems += _contradictions("lora_alpha", stored, pattern, alpha)
    config, target_problems = _complete_targets(sites, config)
    if problems or target_problems:
        raise ConfigError(
            f"the configuration and the {dialect.name} tree contradict each other:\n"
            + paths.bullets(problems + target_problems)
        )
    get_method(config)
    return config


def _contradicted_alphas(
    config: LoraConfig, given: float | None, stored: Mapping[str, float], dialect: Dialect
) -> list[str]:
    """Return the alphas of the tree that the caller's contradict."""
    if given is None and not config.alpha_pattern:
        return []
    default = config.lora_alpha if given is None else given
    why = "does not scale, so that lora_alpha equals the rank" if dialect.unscaled else "stores its alpha"
    differences = _contradictions("lora_alpha", stored, config.alpha_pattern, default)
    return [f"{problem} ({dialect.name} {why}; leave it out)" for problem in differences]


def _unsupported(config: LoraConfig, dialect: Dialect) -> list[str]:
    """Return what a configuration asks for that no tree of the dialect has."""
    rslora = [f"use_rslora=True, but {dialect.name} divides by r, not by its square root"] if config.use_rslora else []
    tokens = [f"{name}, but {dialect.name} adapts every token" for name in fields_set(config, "token")]
    others = fields_set(config, "tensor", "copy").items()
    return [
        *rslora,
        *tokens,
        *(f"{name}={value!r}, but {dialect.name} has no tensors for it" for name, value in others),
    ]


def _factor_patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most common value, and a pattern for each other value."""
    counts = collections.Counter(values.values())
    most_common = max(counts, key=lambda value: (counts[value], value))
    patterns: dict[str, Any] = {}
    for value in counts:
        if value != most_common:
            modules = sorted(m for m, v in values.items() if v == value)
            others = [m for m, v in values.items() if v != value]
            patterns |= dict.fromkeys(matching.shortest_suffixes(modules, others), value)
    return most_common, dict(sorted(patterns.items()))


def _contradictions(field: str, values: Mapping[str, Any], patterns: Mapping[str, Any], default: Any) -> list[str]:
    if not isinstance(patterns, FrozenDict):
        patterns = FrozenDict(patterns)  # its lookups do not try every pattern
    return [
        f"{module}: {field} {found:g} in the tree, {want:g} in the configuration"
        for module, found in values.items()
        if (want := find_pattern_value(patterns, module, default)) != found
    ]


def _complete_targets(sites: ForeignSites, config: LoraConfig) -> tuple[LoraConfig, list[str]]:
    """Return the configuration with target_modules, and the problems of the target_modules passed in it."""
    adapted = list(sites.ranks)
    config = with_layout(config, sites.keymap, [guest.match for guest in sites.sites])
    if config.target_modules is None or matching.is_all_linear(config):
        others = sites.modules - set(adapted)
        # Without the base, a short name might also match other modules.
        names = matching.shortest_suffixes(sorted(adapted), others) if sites.modules else sorted(adapted)
        return config.replace(target_modules=names), []
    unnamed = [m for m in adapted if not matching.is_target(config, m)]
    left_out = [f"{m}: adapted in the tree, but not in target_modules" for m in unnamed]
    empty = [
        f"{m}: in target_modules, but has no LoRA leaves in the tree"
        for m in sorted(sites.modules - set(adapted))
        if matching.is_target(config, m)
    ]
    return config, left_out + empty


def scale_ratios(sites: ForeignSites, config: Config, lora_alpha: float | None) -> dict[str, float]:
    """Return `{module: the file's scale / the tree's scale}` of the tree's modules that the file adapts.

    Raises `ConfigError` if the tree's scale is unknown.
    """
    dialect = sites.dialect
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"cannot store a {config.peft_type} adapter in {dialect.name} leaves: they hold only LoRA")
    get_method(config)
    if unsupported := fields_set(config, "tensor", "copy"):
        raise ConfigError(
            f"cannot store this adapter in {dialect.name} leaves: they hold only A and B, and it has"
            f" {', '.join(unsupported)}"
        )
    if fields_set(config, "token"):
        raise ConfigError(
            f"cannot store this adapter in {dialect.name} leaves: alora_invocation_tokens limits it to some tokens, and"
            f" {dialect.name} adapts every token"
        )
    _require_alphas(sites, config, lora_alpha)
    out: dict[str, float] = {}
    for module, rank in sites.ranks.items():
        if matching.is_target(config, module):
            ratio = config.scale_of(module) / (sites.alphas.get(module, lora_alpha or 0.0) / rank)
            out[module] = 1.0 if abs(ratio - 1) < 2**-23 else ratio  # equal in float32
    return out


def _require_alphas(sites: ForeignSites, config: LoraConfig, lora_alpha: float | None) -> None:
    """Raise `ConfigError` unless the alpha of each site is known, by one of the tree and the caller, and not 0."""
    dialect, stored = sites.dialect, sites.alphas
    contradicting = sorted({alpha for alpha in stored.values() if lora_alpha not in (None, alpha)})
    if contradicting:
        why = "does not scale, so that it equals the rank" if dialect.unscaled else "stores its own"
        raise ConfigError(
            f"lora_alpha={lora_alpha} contradicts the tree: {dialect.name} {why}, {contradicting}; leave it out"
        )
    if not stored and lora_alpha is None:
        r, alpha = config.r, config.lora_alpha
        raise ConfigError(f"{missing_alpha(dialect)}\n(The file has lora_alpha={alpha:g}, r={r}.)")
    if not all(stored.values()) or lora_alpha == 0:
        raise ConfigError(
            f"cannot store an adapter in {dialect.name} leaves with lora_alpha=0, which multiplies them by 0"
        )
