"""EVA (arXiv:2410.07170): A begins as the principal components of a layer's inputs; ranks go where they explain most.

As in PEFT 0.21.2 (`tuners/lora/eva.py`): batches are taken, again and again if need be, until the components of every
layer point where they did a batch ago. Where PEFT leaves the order of equal explained variances open, the layer that
comes first wins.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxadapt.adapters import sites
from jaxadapt.configs import LoraConfig, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError, ConfigError
from jaxadapt.initializers.statistics import Components, Observer, Statistic, moments, split_layers, stack_layers

_LIMIT = 1000  # batches; PEFT goes on for ever


@dataclasses.dataclass(frozen=True)
class Settings:
    """PEFT's `EvaConfig`."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True


def components(
    config: LoraConfig,
    bounds: Sequence[sites.Site],
    batches: Iterable[Any],
    watch: Callable[[Sequence[sites.Site], Mapping[str, Statistic]], Observer],
    settings: Settings,
    mask: Callable[[Any], Any] | None = None,
) -> dict[str, np.ndarray]:
    """`{module: (rank, in)}`, ranks redistributed among the modules; 0 for those that get none.

    Args:
        batches: at least one; they may be gone through several times.
        watch: an `Observer` of these sites.
        mask: which tokens of a batch count; by default as PEFT tells from its "attention_mask" and "labels".

    Raises `AttachError` where the components do not settle.
    """
    batches = list(batches)
    if not batches:
        raise AttachError("EVA needs batches=, and there is none")
    tokens = mask or (lambda batch: _mask(batch, settings))
    wanted = {m: matching.pattern_value(config.rank_pattern, m, config.r) for b in bounds for m in b.modules}
    seen = watch(bounds, {b.leaf: Statistic(moments, 3) for b in bounds})({}, batches[0], tokens(batches[0]))
    groups = _alike(bounds, seen)
    most = {m: round(wanted[m] * settings.rho) for m in wanted}
    for group in groups.values():
        most |= dict.fromkeys(group, max(most[m] for m in group))
    where = {m: (b, layer) for b in bounds for m, layer in b.layers.items()}
    mine = [b for b in bounds if not groups.keys().isdisjoint(b.modules)]
    k = {b.leaf: max(most[m] for m in b.modules) for b in mine}
    wide = [f"{b.leaf}: {k[b.leaf]} components of {b.fan_in} inputs" for b in mine if k[b.leaf] > b.fan_in]
    if wide:
        raise ConfigError("r * rho exceeds the inputs of some layers; lower r or rho:\n" + paths.bullets(wide))
    observe = watch(mine, {b.leaf: Statistic(Components(k[b.leaf]), k[b.leaf] + 4) for b in mine})
    states = {b.leaf: np.zeros((_count(b), k[b.leaf] + 4, b.fan_in), "float32") for b in mine}
    settled = {m: np.zeros(most[m], bool) for m in groups}
    ranks = dict(most)

    def of(module: str) -> np.ndarray:
        bound, layer = where[module]
        return states[bound.leaf][layer]

    for batch in itertools.islice(itertools.cycle(batches), _LIMIT):
        done = {m: bool(settled[m][: ranks[m]].all()) for m in groups}
        if all(done.values()):
            return {m: _chosen(of(head), ranks[m], settings) for head, group in groups.items() for m in group}
        new = observe({b.leaf: stack_layers(b, states[b.leaf]) for b in mine}, batch, tokens(batch))
        for bound in mine:
            if float(np.max(split_layers(bound, new[bound.leaf])[:, -1, 0])) > 1:
                raise AttachError(f"{bound.leaf}: is called several times in one pass, which EVA cannot follow here")
        for module in groups:
            if not done[module]:
                bound, layer = where[module]
                before, after = of(module), np.asarray(split_layers(bound, new[bound.leaf])[layer])
                if 0 < before[-1, 1] < after[-1, 1]:
                    settled[module] = _cosines(before, after, most[module]) >= settings.tau
                states[bound.leaf][layer] = after
        if all(of(m)[-1, 1] > 0 for m in groups):
            ranks = _ranks(groups, most, sum(wanted.values()), {m: _explained(of(m), most[m]) for m in groups})
    raise AttachError(f"EVA: after {_LIMIT} batches the components still turn; use larger batches, or a lower tau")


def _count(bound: sites.Site) -> int:
    """How many layers a leaf stacks."""
    sizes = {name: n for e in bound.entries for name, n in zip(e.form.left, e.form.shape, strict=True)}
    return math.prod(sizes[name] for name in bound.match.roles["stack"])


def _alike(bounds: Sequence[sites.Site], seen: Mapping[str, Any]) -> dict[str, list[str]]:
    """`{module: the modules with the very inputs that it has, itself first}`."""
    groups: dict[str, list[str]] = {}
    known: list[tuple[np.ndarray, str]] = []
    for bound in bounds:
        rows = np.asarray(split_layers(bound, seen[bound.leaf]))[:, :, :]
        for module, layer in bound.layers.items():
            row = rows[layer]
            head = next((m for other, m in known if _same(row, other)), None)
            if head is None:
                known.append((row, module))
                head = module
            groups.setdefault(head, []).append(module)
    return groups


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Compilers may sum in another order, but not by more than this."""
    return one.shape == other.shape and np.allclose(one[:2], other[:2], rtol=1e-5, atol=1e-7 * abs(one[:2]).max())


def _cosines(before: np.ndarray, after: np.ndarray, k: int) -> np.ndarray:
    a, b = before[:k], after[:k]
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(lengths, 1e-8)


def _explained(state: np.ndarray, k: int) -> np.ndarray:
    """The share of the variance that each component explains."""
    sigma, variance, seen = state[-4, :k], state[-2], state[-1, 1]
    return sigma**2 / (variance.sum() * seen)


def _ranks(
    groups: Mapping[str, Sequence[str]], most: Mapping[str, int], budget: int, explained: Mapping[str, np.ndarray]
) -> dict[str, int]:
    """The budget, to whichever components explain most."""
    head = {m: first for first, group in groups.items() for m in group}
    order = [*groups, *(m for first, group in groups.items() for m in group if m != first)]
    keys = [m for m in order for _ in range(most[m])]
    values = np.concatenate([explained[head[m]][: most[m]] for m in order])
    counts = dict.fromkeys(order, 0)
    for i in np.argsort(-values, kind="stable")[:budget]:
        counts[keys[i]] += 1
    for m in order[len(groups) :]:  # of modules with equal inputs the first has the most
        if counts[head[m]] < counts[m]:
            counts[head[m]], counts[m] = counts[m], counts[head[m]]
    return counts


def _chosen(state: np.ndarray, rank: int, settings: Settings) -> np.ndarray:
    found = state[:rank]
    # (PEFT divides in place, so modules that share their inputs are whitened once for each of them: a fault, not kept.)
    return found / np.sqrt(state[-4, :rank, None]) if settings.whiten else found


def _mask(batch: Any, settings: Settings) -> Any:
    """The tokens that count: attended to, and with `use_label_mask` those that have a label."""
    if not isinstance(batch, Mapping):
        return None
    given = [np.asarray(batch["attention_mask"]) != 0] if "attention_mask" in batch else []
    if settings.use_label_mask and "labels" in batch:
        given.append(np.asarray(batch["labels"]) != settings.label_mask_value)
    return np.logical_and.reduce(given) if given else None


def redistribute_ranks(config: LoraConfig, found: Mapping[str, np.ndarray], settings: Settings) -> LoraConfig:
    """The configuration with the ranks that EVA found, as PEFT writes it: modules in full, alphas as floats."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, rows in found.items():
        r = matching.pattern_value(config.rank_pattern, module, config.r)
        alpha = matching.pattern_value(config.alpha_pattern, module, config.lora_alpha)
        new = len(rows)
        if new == 0:
            continue
        if new != r and settings.adjust_scaling_factors:
            alpha *= new / r
        if new != config.r:
            ranks[module] = new
        if alpha != config.lora_alpha:
            alphas[module] = alpha
    return config.replace(
        target_modules=sorted(m for m, rows in found.items() if len(rows)),
        rank_pattern=dict(sorted(ranks.items())),
        alpha_pattern=dict(sorted(alphas.items())),
    )
