"""EVA (arXiv:2410.07170): A starts as the principal components of a layer's inputs. Ranks follow the variance.

Follows PEFT 0.21.2 (`tuners/lora/eva.py`): iterates over the batches, repeatedly if necessary, until the components of
every layer converge from one batch to the next. PEFT leaves the order of equal explained variances open; here the
first layer wins.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxadapt.adapters import sites
from jaxadapt.configs import LoraConfig
from jaxadapt.core.errors import AttachError, ConfigError, raise_listed
from jaxadapt.initializers.statistics import Components, Observer, Statistic, moments, split_layers, stack_layers

_LIMIT = 1000  # batches; PEFT has no limit


@dataclasses.dataclass(frozen=True)
class Settings:
    """PEFT's `EvaConfig`."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True


def find_components(
    config: LoraConfig,
    adapter_sites: Sequence[sites.Site],
    batches: Iterable[Any],
    watch: Callable[[Sequence[sites.Site], Mapping[str, Statistic]], Observer],
    settings: Settings,
    mask: Callable[[Any], Any] | None = None,
) -> dict[str, np.ndarray]:
    """Return {module: components (rank, in)} with ranks redistributed among the modules; rank 0 for some.

    Args:
        batches: at least one; iterated over several times if necessary.
        watch: makes an `Observer` of the given sites.
        mask: selects the tokens of a batch that count; by default from its "attention_mask" and "labels", as in PEFT.

    Raises `AttachError` if the components do not converge.
    """
    batches = list(batches)
    if not batches:
        raise AttachError("EVA needs at least one batch: batches= is empty")
    tokens = mask or (lambda batch: _token_mask(batch, settings))
    wanted = {m: config.rank_of(m) for b in adapter_sites for m in b.modules}
    seen = watch(adapter_sites, {b.leaf: Statistic(moments, 3) for b in adapter_sites})(
        {}, batches[0], tokens(batches[0])
    )
    groups = _group_equal_inputs(adapter_sites, seen)
    most = {m: round(wanted[m] * settings.rho) for m in wanted}
    for group in groups.values():
        most |= dict.fromkeys(group, max(most[m] for m in group))
    places = {m: (site, layer) for site in adapter_sites for m, layer in site.layers.items()}
    group_sites = [b for b in adapter_sites if not groups.keys().isdisjoint(b.modules)]
    k = {b.leaf: max(most[m] for m in b.modules) for b in group_sites}
    raise_listed(
        ConfigError,
        "r * rho exceeds the inputs of these layers; lower r or rho:",
        [f"{b.leaf}: {k[b.leaf]} components of {b.fan_in} inputs" for b in group_sites if k[b.leaf] > b.fan_in],
    )
    observe = watch(group_sites, {b.leaf: Statistic(Components(k[b.leaf]), k[b.leaf] + 4) for b in group_sites})
    states = {b.leaf: np.zeros((math.prod(b.stack_sizes), k[b.leaf] + 4, b.fan_in), "float32") for b in group_sites}
    converged = {m: np.zeros(most[m], bool) for m in groups}
    ranks = dict(most)

    def state_of(module: str) -> np.ndarray:
        site, layer = places[module]
        return states[site.leaf][layer]

    for batch in itertools.islice(itertools.cycle(batches), _LIMIT):
        done = {m: bool(converged[m][: ranks[m]].all()) for m in groups}
        if all(done.values()):
            return {
                m: _select_components(state_of(head), ranks[m], settings)
                for head, group in groups.items()
                for m in group
            }
        new = observe({b.leaf: stack_layers(b, states[b.leaf]) for b in group_sites}, batch, tokens(batch))
        for site in group_sites:
            if float(np.max(split_layers(site, new[site.leaf])[:, -1, 0])) > 1:
                raise AttachError(
                    f"{site.leaf}: EVA does not support a layer that runs several times in one call of the model;"
                    " exclude it with exclude_modules"
                )
        for module in groups:
            if not done[module]:
                site, layer = places[module]
                before, after = state_of(module), np.asarray(split_layers(site, new[site.leaf])[layer])
                if 0 < before[-1, 1] < after[-1, 1]:
                    converged[module] = _cosines(before, after, most[module]) >= settings.tau
                states[site.leaf][layer] = after
        if all(state_of(m)[-1, 1] > 0 for m in groups):
            ranks = _distribute_ranks(
                groups, most, sum(wanted.values()), {m: _explained_variance(state_of(m), most[m]) for m in groups}
            )
    raise AttachError(f"EVA: the components did not converge after {_LIMIT} batches; use larger batches or a lower tau")


def _group_equal_inputs(adapter_sites: Sequence[sites.Site], seen: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return {module: the modules with the same inputs, itself first}."""
    groups: dict[str, list[str]] = {}
    known: list[tuple[np.ndarray, str]] = []
    for site in adapter_sites:
        rows = np.asarray(split_layers(site, seen[site.leaf]))[:, :, :]
        for module, layer in site.layers.items():
            row = rows[layer]
            head = next((m for other, m in known if _equal_inputs(row, other)), None)
            if head is None:
                known.append((row, module))
                head = module
            groups.setdefault(head, []).append(module)
    return groups


def _equal_inputs(one: np.ndarray, other: np.ndarray) -> bool:
    """Return True if two statistics are equal up to the order of summation."""
    return one.shape == other.shape and np.allclose(one[:2], other[:2], rtol=1e-5, atol=1e-7 * abs(one[:2]).max())


def _cosines(before: np.ndarray, after: np.ndarray, k: int) -> np.ndarray:
    a, b = before[:k], after[:k]
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(lengths, 1e-8)


def _explained_variance(state: np.ndarray, k: int) -> np.ndarray:
    """Return the share of the variance that each component explains."""
    sigma, variance, seen = state[-4, :k], state[-2], state[-1, 1]
    return sigma**2 / (variance.sum() * seen)


def _distribute_ranks(
    groups: Mapping[str, Sequence[str]], most: Mapping[str, int], budget: int, explained: Mapping[str, np.ndarray]
) -> dict[str, int]:
    """Distribute the budget to the components that explain the most variance; return {module: rank}."""
    head = {m: first for first, group in groups.items() for m in group}
    order = [*groups, *(m for first, group in groups.items() for m in group if m != first)]
    keys = [m for m in order for _ in range(most[m])]
    values = np.concatenate([explained[head[m]][: most[m]] for m in order])
    counts = dict.fromkeys(order, 0)
    for i in np.argsort(-values, kind="stable")[:budget]:
        counts[keys[i]] += 1
    for m in order[len(groups) :]:  # among modules with equal inputs the first gets the largest rank
        if counts[head[m]] < counts[m]:
            counts[head[m]], counts[m] = counts[m], counts[head[m]]
    return counts


def _select_components(state: np.ndarray, rank: int, settings: Settings) -> np.ndarray:
    # PEFT whitens in place, so it whitens shared inputs once for each module. That error is not repeated here.
    return state[:rank] / np.sqrt(state[-4, :rank, None]) if settings.whiten else state[:rank]


def _token_mask(batch: Any, settings: Settings) -> Any:
    """Return the mask of tokens that are attended to and, with `use_label_mask`, have a label; None: all."""
    if not isinstance(batch, Mapping):
        return None
    masks = [np.asarray(batch["attention_mask"]) != 0] if "attention_mask" in batch else []
    if settings.use_label_mask and "labels" in batch:
        masks.append(np.asarray(batch["labels"]) != settings.label_mask_value)
    return np.logical_and.reduce(masks) if masks else None


def redistribute_ranks(config: LoraConfig, rows_by_module: Mapping[str, np.ndarray], settings: Settings) -> LoraConfig:
    """Return the configuration with EVA's ranks, as PEFT writes it: full module names, alphas as floats."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, rows in rows_by_module.items():
        r, alpha, new = config.rank_of(module), config.alpha_of(module), len(rows)
        if new == 0:
            continue
        if new != r and settings.adjust_scaling_factors:
            alpha *= new / r
        if new != config.r:
            ranks[module] = new
        if alpha != config.lora_alpha:
            alphas[module] = alpha
    return config.replace(
        target_modules=sorted(m for m, rows in rows_by_module.items() if len(rows)),
        rank_pattern=dict(sorted(ranks.items())),
        alpha_pattern=dict(sorted(alphas.items())),
    )
