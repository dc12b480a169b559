"""Resolve an adapter's configuration when the JSON and the header of the tensors differ."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping

from jaxadapt.configs import matching
from jaxadapt.configs.base import Config, loads
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core.errors import ConfigError, FormatError, warn
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.persistence import fingerprint, formats
from jaxadapt.storage import location, safetensors
from jaxadapt.storage.location import Location

META = "jaxadapt"
"""The header's metadata key for its copy of the configuration."""


_WAITS = (0.0, 0.0, 0.001, 0.01, 0.05, 0.2)
"""Seconds before each retry if the two files differ: a concurrent save renames one right after the other."""


def resolve_config(path: Location, header: safetensors.Header | None, weights: Location) -> Config:
    """Return the configuration that belongs to the tensors.

    If the JSON at `path` equals jaxadapt's copy in the header, that is it. If the JSON is the one that the save was
    replacing, the save was interrupted between its two files, and the header wins. Otherwise a person edited the JSON,
    and it wins unless the tensors contradict it. A warning reports each difference. Before that both files are read
    again: if another process is saving, the header wins without a warning. If there is no JSON at all, the header wins.

    Args:
        header: as read from `weights`, which may have been replaced since.
    """
    raw = None if header is None else header.metadata.get(META)
    if raw is not None and not location.exists(path):
        warn(
            f"{path} is missing; using the copy of the configuration in the weights' header. PEFT refuses such a"
            " folder: write the file again with jaxadapt.repair or `jaxadapt repair`"
        )
        return parse_copy(raw, weights)[0]
    text = formats.read_text(path)
    if header is None or raw is None or _has_text(raw, text):
        return loads(text, str(path))
    stored, replaces = parse_copy(raw, weights)
    config = None if replaces == text_digest(text) else loads(text, str(path))
    if config is not None and not config.changed_keys(stored):
        return config
    for wait in _WAITS:
        if config is not None and wait:
            break  # no save leaves such a pair of files, so there is none to wait for
        time.sleep(wait)
        current = safetensors.read_header(weights).metadata.get(META)
        if current is None or parse_copy(current, weights)[0].changed_keys(stored) or formats.read_text(path) != text:
            return stored  # a save has finished meanwhile
    if config is None:
        warn(
            f"{path}: a save was interrupted after the weights and before this file; using the configuration"
            " in the weights' header. To repair the file, save again, or write(read(…)).",
        )
        return stored
    changed = config.changed_keys(stored)
    contradiction = _contradiction(config, stored, {k: t.shape for k, t in header.tensors.items()})
    if contradiction:
        warn(
            f"{path} was edited after the weights were written ({', '.join(changed)}), and the tensors"
            f" contradict it ({contradiction}); using the configuration in the weights' header",
        )
        return stored
    warn(
        f"{path} was edited after the weights were written ({', '.join(changed)}); using the edited file",
    )
    return config


def _has_text(raw: str, text: str) -> bool:
    """Return True if a header's copy has the text of the JSON; False for a damaged copy, which `parse_copy` reports.

    Texts tell 1, 1.0 and true apart, and the order of patterns.

    >>> _has_text('{"config": {"r": 1}}', '{\\n  "r": 1\\n}'), _has_text('{"config": {"r": 1}}', '{\\n  "r": true\\n}')
    (True, False)
    """
    try:
        return json.dumps(json.loads(raw)["config"], indent=2) == text
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def parse_copy(raw: str, weights: Location) -> tuple[Config, object]:
    """Parse a header's copy: return the configuration, and the digest of the JSON that its save replaces."""
    try:
        document = json.loads(raw)
        return Config.from_dict(document["config"], "its configuration"), document.get("replaces")
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError, RecursionError) as error:
        raise FormatError(
            f"{weights}: the metadata {META!r} of its header is damaged ({error}); save or fetch it again"
        ) from error


def stored_fingerprint(header: safetensors.Header) -> fingerprint.Fingerprint | None:
    """Return the fingerprint of the base in a header; None if it has none, or a damaged one."""
    raw = header.metadata.get(META)
    if raw is None or fingerprint.FIELD not in raw:
        return None
    try:
        return fingerprint.parse(json.loads(raw).get(fingerprint.FIELD))
    except (ValueError, AttributeError, RecursionError):
        return None


def _contradiction(edited: Config, stored: Config, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return why the tensors contradict an edited configuration; None if they do not."""
    if edited.peft_type != stored.peft_type:
        return f"their type is {stored.peft_type}"
    for key, shape in shapes.items():
        module = tensor_module(stored, key)
        if module is None:
            continue
        if not matching.is_target(edited, module):
            return f"it does not target {key}"
        if isinstance(edited, LoraConfig) and key.endswith(".lora_A.weight"):
            rank = edited.rank_of(module)
            if shape[:1] != (rank,):
                return f"{key} has rank {shape[0]}, not {rank}"
    return None


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text in UTF-8, as 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def tensor_module(config: Config, key: str) -> str | None:
    """Return the module of a tensor: the longest prefix of its key that the configuration targets; else None.

    >>> tensor_module(LoraConfig(target_modules=["q"]), "base_model.model.h.0.q.lora_A.weight")
    'h.0.q'
    """
    parts = key.removeprefix(PEFT_PREFIX).split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        if matching.is_target(config, name):
            return name
    return None
