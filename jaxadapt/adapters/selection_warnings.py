"""What of a selection of modules may be a mistake, though PEFT takes it without a word: for warnings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxadapt.configs import Config, matching
from jaxadapt.core import suggest

_SAID = 8
"""Entries of one field that are said one by one."""


def unmatched_targets(config: Config, names: Sequence[str]) -> tuple[str, ...]:
    """The entries of `target_modules` that select none of `names`: misspelt, excluded, or for another model.

    >>> from jaxadapt.configs import LoraConfig
    >>> unmatched_targets(LoraConfig(target_modules=["q", "qq"]), ["a.q", "a.k"])
    ('qq',)
    """
    wanted: str | tuple[str, ...] | None = config.get("target_modules")
    if wanted is None or matching.is_all_linear(config):
        return ()
    if isinstance(wanted, str):
        return () if any(matching.matches(config, name) for name in names) else (wanted,)
    hit: set[str] = set()
    for name in names:
        if not matching.matches(config, name):
            continue
        hit.add(name)  # an entry may be the whole name, …
        if matching.in_layers(config, name):
            hit.update(name[i + 1 :] for i, letter in enumerate(name) if letter == ".")  # … or end it
    return tuple(entry for entry in wanted if entry not in hit)


def doubtful_selection(config: Config, names: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """What of a selection may be a mistake, though PEFT says nothing: for a warning.

    Args:
        names: the modules that could be adapted.
        chosen: those that are.

    >>> from jaxadapt.configs import LoraConfig
    >>> doubtful_selection(LoraConfig(target_modules=["q", "vv"], rank_pattern={"k": 2}), ["a.q", "a.v"], ["a.q"])
    ["target_modules: 'vv' matches no module; near misses: v", "rank_pattern: 'k' matches none of the targets"]
    """
    lines: list[str] = []
    # "all-linear" becomes a list of all. That modules_to_save or exclude_modules has some of them is no mistake.
    rules = {field: None for field in ("modules_to_save", "exclude_modules") if config.get(field)}
    lost = unmatched_targets(config.replace(**rules) if rules else config, names)
    lines += [f"target_modules: {entry!r} matches no module" + _beside(entry, names) for entry in lost[:_SAID]]
    lines += _more(lost, "target_modules: {} more entries match no module")
    if isinstance(config.get("target_modules"), str):
        holders = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}.difference(names)
        if held := [name for name in sorted(holders) if matching.matches(config, name)]:
            lines.append(
                f"target_modules selects also what holds modules, which PEFT refuses: {suggest.quote_list(held)}"
            )
    for field in ("rank_pattern", "alpha_pattern"):
        lines += _patterns(field, config.get(field) or {}, chosen)
    return lines


def unmatched_parameters(config: Config, names: Iterable[str]) -> list[str]:
    """The entries of `target_parameters` that name none of the parameters `names`, in a few words each."""
    names = list(names)
    entries: tuple[str, ...] = config.get("target_parameters") or ()
    ends = {*names, *(name[i + 1 :] for name in names for i, letter in enumerate(name) if letter == ".")}
    lost = [entry for entry in entries if entry not in ends]
    return [f"target_parameters: {entry!r} matches no parameter" + _beside(entry, names) for entry in lost]


def unmatched_modules_to_save(config: Config, copied: Iterable[str], tied: Mapping[str, str]) -> list[str]:
    """The entries of `modules_to_save` that copy nothing, in a few words each: what they mean is not trained.

    Args:
        copied: the modules that are copied, with their parameters' names.
        tied: `{head: the table of tokens that it is}` of a model without a head of its own.

    The heads that PEFT adds by itself for a task (`targets.HEADS`) are guesses: any other entry that copies will do.
    """
    entries: tuple[str, ...] = config.get("modules_to_save") or ()
    copied = tuple(copied)
    copied += tuple(head for head, table in tied.items() if any(name.startswith(f"{table}.") for name in copied))
    hit = set[str]().union(*(matching.saving(config, name) for name in copied))
    heads = matching.HEADS.get(config.task_type or "", ())
    lines = [f"modules_to_save: {e!r} matches no module" for e in entries if e not in hit and e not in heads]
    if not hit and not set(heads).isdisjoint(entries):
        names = " or ".join(heads)
        lines.append(f"task_type: {config.task_type} has a head trained in full, called {names}, and none is here")
    return lines


def _beside(entry: str, names: Sequence[str]) -> str:
    close = [
        name for name in suggest.close_matches((entry,), names) if name != entry and not name.endswith(f".{entry}")
    ]
    return f"; near misses: {suggest.quote_list(close)}" if close else ""


def _patterns(field: str, patterns: Mapping[str, Any], chosen: Sequence[str]) -> list[str]:
    hits: dict[str, list[str]] = {key: [] for key in patterns}
    for name in chosen:
        for key in matching.matching(patterns, name):
            hits[key].append(name)
    lost = [f"{field}: {key!r} matches none of the targets" for key, names in hits.items() if not names]
    first: dict[str, str] = {}
    pairs: dict[tuple[str, str], str] = {}
    for key, names in hits.items():
        for name in names:
            other = first.setdefault(name, key)
            if other != key:
                pairs.setdefault((other, key), name)
    both = [f"{field}: {a!r} and {b!r} both match {name}, where the first wins" for (a, b), name in pairs.items()]
    return [
        *(*lost[:_SAID], *_more(lost, field + ": {} more match none of the targets")),
        *(*both[:_SAID], *_more(both, field + ": {} more pairs match one module")),
    ]


def _more(found: Sequence[str], what: str) -> list[str]:
    """Of a whole tower, named layer by layer, that a model lacks."""
    return [what.format(len(found) - _SAID)] if len(found) > _SAID else []
