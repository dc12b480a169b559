"""Warnings about a selection of modules that may be a mistake, and that PEFT accepts silently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxadapt.configs import Config, matching
from jaxadapt.configs.frozen import matching_patterns
from jaxadapt.core import errors

_LIMIT = 8
"""The number of entries of one field that are reported one by one."""


def unmatched_targets(config: Config, names: Sequence[str]) -> tuple[str, ...]:
    """Return the entries of `target_modules` that select none of `names`: misspelt, excluded, or for another model.

    >>> from jaxadapt.configs import LoraConfig
    >>> unmatched_targets(LoraConfig(target_modules=["q", "qq"]), ["a.q", "a.k"])
    ('qq',)
    """
    targets: str | tuple[str, ...] | None = config.get("target_modules")
    if targets is None or matching.is_all_linear(config):
        return ()
    if isinstance(targets, str):
        return () if any(matching.is_target(config, name) for name in names) else (targets,)
    matched: set[str] = set()
    for name in names:
        if not matching.is_target(config, name):
            continue
        matched.add(name)  # an entry may be the full name …
        if matching.in_layers(config, name):
            matched.update(name[i + 1 :] for i, letter in enumerate(name) if letter == ".")  # … or its end
    return tuple(entry for entry in targets if entry not in matched)


def doubtful_selection(config: Config, names: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """Return warnings about a selection that may be a mistake, where PEFT says nothing.

    Args:
        names: the modules that could be adapted.
        chosen: the modules that are adapted.

    >>> from jaxadapt.configs import LoraConfig
    >>> doubtful_selection(LoraConfig(target_modules=["q", "vv"], rank_pattern={"k": 2}), ["a.q", "a.v"], ["a.q"])
    ["target_modules: 'vv' matches no module; near misses: v", "rank_pattern: 'k' matches none of the targets"]
    """
    warnings: list[str] = []
    # "all-linear" becomes a list of all linear modules; modules_to_save and exclude_modules may name some of them.
    rules = {field: None for field in ("modules_to_save", "exclude_modules") if config.get(field)}
    unmatched = unmatched_targets(config.replace(**rules) if rules else config, names)
    warnings += [
        f"target_modules: {entry!r} matches no module" + _near_misses(entry, names) for entry in unmatched[:_LIMIT]
    ]
    warnings += _remaining(unmatched, "target_modules: {} more entries match no module")
    if isinstance(config.get("target_modules"), str):
        parents = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}.difference(names)
        if containers := [name for name in sorted(parents) if matching.is_target(config, name)]:
            warnings.append(
                "target_modules also selects modules that contain modules, which PEFT refuses:"
                f" {errors.quote_list(containers)}"
            )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if field == "rank_pattern" and any(isinstance(value, tuple) for value in patterns.values()):
            masked = {f"{name}.lora_E" for name in chosen}  # AdaLoRA's masks by the tensor's full name, not patterns
            warnings += [f"{field}: {key!r} matches none of the targets" for key in patterns if key not in masked]
            continue
        warnings += _patterns(field, patterns, chosen)
    return warnings


def unmatched_parameters(config: Config, names: Iterable[str]) -> list[str]:
    """Return a warning for each entry of `target_parameters` that names none of the parameters `names`."""
    names = list(names)
    entries: tuple[str, ...] = config.get("target_parameters") or ()
    ends = {*names, *(name[i + 1 :] for name in names for i, letter in enumerate(name) if letter == ".")}
    unmatched = [entry for entry in entries if entry not in ends]
    return [f"target_parameters: {entry!r} matches no parameter" + _near_misses(entry, names) for entry in unmatched]


def unmatched_modules_to_save(config: Config, copied: Iterable[str], tied: Mapping[str, str]) -> list[str]:
    """Return a warning for each entry of `modules_to_save` that copies nothing, so that its module is not trained.

    Args:
        copied: the modules that are copied, with their parameters' names.
        tied: `{head: its token embedding}` for a model without a head of its own.

    The heads that PEFT adds for a task (`matching.HEADS`) are guesses: they are reported only if no entry copies a
    module.
    """
    entries: tuple[str, ...] = config.get("modules_to_save") or ()
    copied = tuple(copied)
    copied += tuple(
        head for head, embedding in tied.items() if any(name.startswith(f"{embedding}.") for name in copied)
    )
    used = set[str]().union(*(matching.saving_entries(config, name) for name in copied))
    heads = matching.HEADS.get(config.task_type or "", ())
    warnings = [
        f"modules_to_save: {entry!r} matches no module" for entry in entries if entry not in used and entry not in heads
    ]
    if not used and not set(heads).isdisjoint(entries):
        names = " or ".join(heads)
        warnings.append(f"task_type: {config.task_type} trains its head, {names}, in full, and the model has none")
    return warnings


def _near_misses(entry: str, names: Sequence[str]) -> str:
    """Return a suggestion of similar names, empty if there are none."""
    near_misses = [
        name for name in errors.close_matches((entry,), names) if name != entry and not name.endswith(f".{entry}")
    ]
    return f"; near misses: {errors.quote_list(near_misses)}" if near_misses else ""


def _patterns(field: str, patterns: Mapping[str, Any], chosen: Sequence[str]) -> list[str]:
    """Return warnings for patterns of one field that match no target, or the same target as another pattern."""
    names_by_pattern: dict[str, list[str]] = {key: [] for key in patterns}
    for name in chosen:
        for key in matching_patterns(patterns, name):
            names_by_pattern[key].append(name)
    unmatched = [
        f"{field}: {key!r} matches none of the targets" for key, names in names_by_pattern.items() if not names
    ]
    first: dict[str, str] = {}
    pairs: dict[tuple[str, str], str] = {}
    for key, names in names_by_pattern.items():
        for name in names:
            other = first.setdefault(name, key)
            if other != key:
                pairs.setdefault((other, key), name)
    ambiguous = [f"{field}: {a!r} and {b!r} both match {name}, where the first wins" for (a, b), name in pairs.items()]
    return [
        *(*unmatched[:_LIMIT], *_remaining(unmatched, field + ": {} more match none of the targets")),
        *(*ambiguous[:_LIMIT], *_remaining(ambiguous, field + ": {} more pairs match one module")),
    ]


def _remaining(warnings: Sequence[str], template: str) -> list[str]:
    """Return one line for the warnings beyond the limit: a tower may be named layer by layer."""
    return [template.format(len(warnings) - _LIMIT)] if len(warnings) > _LIMIT else []
