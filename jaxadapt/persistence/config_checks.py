"""Checks of a stored configuration, and repairs of values with only one possible meaning."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from typing import Any, cast

from jaxadapt import configs
from jaxadapt.adapters import key_names
from jaxadapt.configs import PEFT_VERSION, Config
from jaxadapt.configs.base import GenericConfig, class_of
from jaxadapt.core.errors import ConfigError
from jaxadapt.persistence.stored_adapter import (
    Finding,
    Fix,
    StoredAdapter,
    count,
    error,
    foreign_config,
    note,
    parse_json,
    warning,
)
from jaxadapt.storage import hub

# Fields of PEFT up to 0.2, with the value that changes nothing.
_OLD_FIELDS: Mapping[str, Any] = {"enable_lora": None, "merge_weights": False}
_MAX_COMMAS = 16  # each costs a reading of the text


def check_config(stored: StoredAdapter) -> tuple[Config | None, list[Finding]]:
    """Return the configuration of stored adapter files, with the fix of its finding, and the findings about it.

    The configuration is None if it cannot be read, even with a fix.
    """
    if stored.text is None:
        return _without_file(stored)
    values, repairs = mend_text(stored.text)
    if values is not None and (foreign := foreign_config(values)) is not None:
        return None, [foreign]
    try:
        config = configs.loads(stored.text, hub.CONFIG)
    except ConfigError as problem:
        found = _unreadable(stored, values or {}, repairs, problem)
        if found.fix is None or (config := found.fix.config) is None:
            return None, [found]
        is_copy = config is stored.header
        return config, [found, *([] if is_copy else _check_alpha(config, values or {})), *_versions(config)]
    findings = [*_check_alpha(config, values or {}), *_versions(config)]
    if stored.header is not None and (changed := config.changed_keys(stored.header)):
        text = f"{hub.CONFIG} differs from the copy in the weights' header in {', '.join(changed)}"
        expected = "two equal configurations: it was edited, or a save was interrupted"
        remedy = "if the edit is intended, write it again: jaxadapt.write(jaxadapt.read(path), path)"
        findings.insert(0, warning("edited", changed, text, expected, remedy))
    return config, findings


_FROM_COPY = f"{hub.CONFIG} written again from the copy in the weights' header"


def _unreadable(stored: StoredAdapter, values: Mapping[str, Any], repairs: list[str], problem: ConfigError) -> Finding:
    """Return the finding for a configuration that PEFT refuses, with the one that it stands for if that is certain."""
    mended, more = mend_values(values, stored.specs or {})
    done, config, remedy = (*repairs, *more), None, "correct the field, or write the configuration again"
    with contextlib.suppress(ConfigError, ValueError):
        config = configs.loads(json.dumps(mended), hub.CONFIG) if done else None
    if config is not None:
        remedy = "jaxadapt repair corrects it"
    elif stored.header is not None:
        remedy = "jaxadapt repair corrects it from the copy in the weights' header"
        config, done = stored.header, (_FROM_COPY,)
    fix = None if config is None else Fix(done, {}, config)
    return error("configuration", (hub.CONFIG,), str(problem), "a configuration that PEFT reads", remedy, fix)


def _check_alpha(config: Config, values: Mapping[str, Any]) -> list[Finding]:
    """Find an alpha that the file does not state, or that makes the adapter change nothing."""
    name = next((name for name in ("lora_alpha", "alpha") if name in config.to_dict()), None)
    if name is None or isinstance(config, GenericConfig):
        return []
    alpha, expected = config.get(name), "the alpha of the training, on which the scale depends"
    if name not in values:
        text = f"{name} is missing: PEFT takes {alpha}"
        return [warning("alpha", (name,), text, expected, f"state {name} as it was in the training")]
    if alpha == 0:
        text = f"{name} is 0: PEFT multiplies the change by 0, so the adapter has no effect"
        return [warning("alpha", (name,), text, expected, f"state {name} as it was in the training")]
    return []


def _without_file(stored: StoredAdapter) -> tuple[Config | None, list[Finding]]:
    if stored.header is not None:
        found = warning(
            "configuration-lost", (hub.CONFIG,), f"there is no {hub.CONFIG}, but the weights' header has a copy",
            f"{hub.CONFIG}, without which PEFT refuses the folder", "jaxadapt repair writes it again",
            Fix((_FROM_COPY,), {}, stored.header),
        )  # fmt: skip
        return stored.header, [found, *_versions(stored.header)]
    if stored.specs is None or any(f.code in ("configuration", "unreadable") for f in stored.findings):
        return None, []
    ranks = sorted({shape[0] for key, (_, shape) in stored.specs.items() if "lora_A" in key.split(".") and shape})
    known = f" (the tensors show rank {', '.join(map(str, ranks))})" if ranks else ""
    text = f"there is no {hub.CONFIG} beside the weights"
    expected = f"{hub.CONFIG}: the tensors do not contain the scale or the method's settings"
    remedy = f"copy it from where the adapter was trained, or write one{known}"
    return None, [error("configuration-missing", (hub.CONFIG,), text, expected, remedy)]


def mend_text(text: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the JSON object of a text without a byte order mark and trailing commas, and a sentence for each repair.

    Returns None for any other text, also for one with a key twice.

    >>> mend_text('{"r": 4, "target_modules": ["q",],}')
    ({'r': 4, 'target_modules': ['q']}, ['2 trailing commas removed'])
    """
    plain = text.removeprefix("\ufeff")
    done = [] if plain == text else ["the byte order mark at the beginning removed"]
    for number in range(_MAX_COMMAS):
        try:
            json.loads(plain)
        except json.JSONDecodeError as problem:
            place = (
                problem.pos if plain[problem.pos : problem.pos + 1] == "," else len(plain[: problem.pos].rstrip()) - 1
            )
            if plain[place : place + 1] == "," and plain[place + 1 :].lstrip()[:1] in ("}", "]"):
                plain = plain[:place] + plain[place + 1 :]
                continue
        except (ValueError, RecursionError):  # `parse_json` returns None for it
            pass
        if number:
            done.append(f"{count(number, 'trailing comma')} removed")
        break
    return parse_json(plain), done


def mend_values(values: Mapping[str, Any], keys: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values with every certain repair, and a sentence for each repair.

    >>> mend_values({"peft_type": "lora", "r": 4.0, "lora_alpha": "16"}, [])[0]
    {'peft_type': 'LORA', 'r': 4, 'lora_alpha': 16}
    """
    mended, done = dict(values), list[str]()
    kind: object = mended.get("peft_type")
    if isinstance(kind, str):
        name = re.sub("[^A-Z0-9]+", "_", kind.removeprefix("PeftType.").upper()).strip("_")
        if name != kind and key_names.is_known_method(name):
            mended["peft_type"] = name
            done.append(f"peft_type: {kind!r} became {name!r}")
    elif kind is None and {"r", "lora_alpha"} <= mended.keys() and any(".lora_A." in key for key in keys):
        mended["peft_type"] = "LORA"
        done.append("peft_type: 'LORA' added")
    cls = class_of(str(mended.get("peft_type")))
    numbers = () if cls is None else (f.name for f in dataclasses.fields(cls) if type(f.default) in (int, float))
    for field in numbers:
        value = _number(mended.get(field), field == "r")
        if type(value) is not type(mended.get(field)):
            done.append(f"{field}: {mended[field]!r} became {value}")
            mended[field] = value
    for field in ("rank_pattern", "alpha_pattern"):
        if field in mended and mended[field] is None:
            mended[field] = {}
            done.append(f"{field}: null became {{}}")
        elif isinstance(mended.get(field), dict):
            items = cast("dict[str, Any]", mended[field]).items()
            found = {name: _number(value, field == "rank_pattern") for name, value in items}
            if any(type(found[name]) is not type(value) for name, value in items):
                mended[field] = found
                done.append(
                    f"{field}: {'ranks became integers' if field == 'rank_pattern' else 'texts became numbers'}"
                )
    return mended, done


def _number(value: Any, is_rank: bool) -> Any:
    """Return the number that a text states, and an integer for a whole rank; any other value as it is."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value, re.ASCII):
        value = float(value) if "." in value else int(value)
    return int(value) if is_rank and isinstance(value, float) and value.is_integer() else value


def _version(text: str) -> tuple[int, ...]:
    match = re.match(r"\d{1,9}(\.\d{1,9})*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def _versions(config: Config) -> list[Finding]:
    """Return findings about the version of PEFT and about fields that this version does not have."""
    findings: list[Finding] = []
    unknown = [] if isinstance(config, GenericConfig) else sorted(config.extra)
    is_newer = _version(config.peft_version or "") > _version(PEFT_VERSION)
    old = [name for name in unknown if name in _OLD_FIELDS and config.extra[name] not in (_OLD_FIELDS[name], False)]
    if old:
        findings.append(
            error(
                "old-layout",
                old,
                f"{', '.join(old)} is set: PEFT before 0.3 wrote it, with a layer of merged"
                " projections whose tensors have another layout",
                "a configuration of PEFT 0.3 or newer",
                "load it with that version of PEFT, merge it, or split the merged projections",
            )
        )
    if is_newer:
        fields = f", with fields unknown here: {', '.join(unknown)}" if unknown else ""
        findings.append(
            warning(
                "newer-peft",
                ("peft_version", *unknown),
                f"PEFT {config.peft_version} wrote the configuration{fields}",
                f"PEFT {PEFT_VERSION} or older, which this version of jaxadapt follows",
                "update jaxadapt, and compare the outputs with PEFT's",
            )
        )
    elif unknown:
        findings.append(
            note(
                "unknown-fields",
                unknown,
                f"PEFT {PEFT_VERSION} ignores the fields {', '.join(unknown)}, which it does not have",
            )
        )
    if not key_names.is_known_method(config.peft_type):
        findings.append(
            warning(
                "unknown-method",
                ("peft_type",),
                f"PEFT {PEFT_VERSION} has no method {config.peft_type}",
                "a method of PEFT",
                "load it with the program that wrote it",
            )
        )
    return findings
