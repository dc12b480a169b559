"""The configuration that an adapter's files mean, where the JSON and the header of the tensors say different things."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping

from jaxadapt import configs
from jaxadapt.configs import Config, matching
from jaxadapt.core.errors import ConfigError, FormatError, warn
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.storage import location, safetensors
from jaxadapt.storage.location import Place

META = "jaxadapt"
"""What the header calls its copy of the configuration."""


def read_text(path: Place) -> str:
    try:
        return location.read_text_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


_WAITS = (0.0, 0.0, 0.001, 0.01, 0.05, 0.2)
"""Seconds before each new look at two files that differ: a save that is under way renames one right after the other."""


def resolve_config(path: Place, header: safetensors.Header | None, weights: Place) -> Config:
    """The configuration that belongs to the tensors, where the JSON and our header may differ.

    `header` is what was read of `weights`, which may have been replaced since.

    Equal: fine. The JSON is the one this save was replacing: the save was interrupted between its two
    files, and the header wins. Otherwise a person edited the JSON, and it wins, unless the tensors
    contradict it. Whatever is not plain is said in a warning. Before that both files are read again: another
    process may be saving, and then the header wins, silently.
    """
    text = read_text(path)
    raw = None if header is None else header.metadata.get(META)
    if header is None or raw is None:
        return configs.loads(text, str(path))
    own, replaces = _copy(raw, weights)
    config = None if replaces == text_digest(text) else configs.loads(text, str(path))
    if config is not None and not config.changed_keys(own):
        return config
    for wait in _WAITS:
        if config is not None and wait:
            break  # no save leaves the two files like this, so that none is waited for
        time.sleep(wait)
        now = safetensors.read_header(weights).metadata.get(META)
        if now is None or _copy(now, weights)[0].changed_keys(own) or read_text(path) != text:
            return own  # a save has ended meanwhile
    if config is None:
        warn(
            f"{path}: a save was interrupted after the weights and before this file; using the configuration"
            " that the weights carry. Save again, or write(read(…)), to mend it.",
        )
        return own
    changed = config.changed_keys(own)
    contradiction = _contradiction(config, own, {k: t.shape for k, t in header.tensors.items()})
    if contradiction:
        warn(
            f"{path} was edited after the weights were written ({', '.join(changed)}), and the tensors"
            f" contradict it ({contradiction}); using the configuration that the weights carry",
        )
        return own
    warn(
        f"{path} was edited after the weights were written ({', '.join(changed)}); using it as it stands now",
    )
    return config


def _copy(raw: str, weights: Place) -> tuple[Config, object]:
    """The configuration in a header, and the digest of the JSON that its save replaces."""
    try:
        held = json.loads(raw)
        return Config.from_dict(held["config"], "its configuration"), held.get("replaces")
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError, RecursionError) as error:
        raise FormatError(
            f"{weights}: the metadata {META!r} of its header is damaged ({error}); save or fetch it again"
        ) from error


def _contradiction(edited: Config, own: Config, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why these tensors cannot be what an edited configuration describes; None if they can."""
    if edited.peft_type != own.peft_type:
        return f"they are of type {own.peft_type}"
    for key, shape in shapes.items():
        module = tensor_module(own, key)
        if module is None:
            continue
        if not matching.matches(edited, module):
            return f"{key} is there, which it does not target"
        if edited.get("r") is not None and key.endswith(".lora_A.weight"):
            rank = matching.pattern_value(edited.get("rank_pattern") or {}, module, edited.get("r"))
            if shape[:1] != (rank,):
                return f"{key} has rank {shape[0]}, not {rank}"
    return None


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tensor_module(config: Config, key: str) -> str | None:
    """The module a tensor belongs to: the longest beginning of its key that the configuration targets.

    >>> tensor_module(configs.LoraConfig(target_modules=["q"]), "base_model.model.h.0.q.lora_A.weight")
    'h.0.q'
    """
    parts = key.removeprefix(PEFT_PREFIX).split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        if matching.matches(config, name):
            return name
    return None
