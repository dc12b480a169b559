"""Read adapter files with findings in place of errors, and repair them while they are read.

path ──open_stored──► StoredAdapter ──read_stored──► Reading ──fixes of its findings──► PeftTensors

What `read` refuses is read too, and the reason is a finding. A finding with one possible remedy carries it as its fix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from typing import Any, cast

from jaxadapt.adapters import peft_tensors
from jaxadapt.arrays.tensor_source import Kinds, as_source, rename
from jaxadapt.configs.base import PEFT_VERSION, Config, GenericConfig, class_of, loads, release_of
from jaxadapt.core.errors import AdapterError, ConfigError, FileError, FormatError, Report, bullets, no_report, warn
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.persistence import formats, run_folder
from jaxadapt.persistence.formats import Finding, Fix, Place, count, error, note, peft_folder, warning
from jaxadapt.storage import location

# ---------------------------------------------------------------- files


def open_stored(
    path: str | os.PathLike[str] | Place, stack: contextlib.ExitStack, report: Report = no_report
) -> peft_folder.StoredAdapter:
    """Open an adapter's folder or file without the demands of `read`. Tensors are read on demand, one at a time.

    The files are open until `stack` closes them. Raises `FileError` if nothing at the path can be read at all.
    """
    place = formats.look(path, report)
    source, at = os.fspath(place.path), place.at
    if place.names is None and at.suffix == ".json":
        return peft_folder.StoredAdapter(source, lambda: formats.read_text(at))
    if place.names is None and (step := run_folder.number_in(at.name)) is not None:
        finding = error(
            "training-run", (at.name,), f"{at.name} is a training checkpoint of jaxadapt, in the model's own layout",
            formats.EXPECTED, f"run: jaxadapt checkpoints {at.parent} --step {step} --export OUT",
        )  # fmt: skip
        return peft_folder.StoredAdapter(source, findings=(finding,))
    # A file with PEFT's name is PEFT's, whatever its keys are.
    file_format = None if place.names is None and at.name in location.WEIGHTS else formats.find(place)
    if file_format is None or file_format is peft_folder.FORMAT:
        stored = peft_folder.open_files(place, stack)
        file_format = peft_folder.other_format(place, stored.header)
        if file_format is None:
            return stored
    try:
        opened = stack.enter_context(file_format.open(place))
    except AdapterError as problem:
        if file_format.describe is None:
            raise
        return peft_folder.StoredAdapter(source, findings=(file_format.describe(source, problem),))
    found = () if file_format.describe is None else (file_format.describe(source, opened),)
    return peft_folder.StoredAdapter(
        source, opened.tensors.config.to_json, as_source(opened.tensors.tensors), findings=found
    )


# ---------------------------------------------------------------- configuration


# Fields of PEFT up to 0.2, with the value that changes nothing.
_OLD_FIELDS: Mapping[str, Any] = {"enable_lora": None, "merge_weights": False}
_MAX_COMMAS = 16  # each costs a reading of the text


def check_config(stored: peft_folder.StoredAdapter) -> tuple[Config | None, list[Finding]]:
    """Return the configuration of stored adapter files, with the fix of its finding, and the findings about it.

    The configuration is None if it cannot be read, even with a fix.
    """
    copy, found = _header_copy(stored)
    if stored.text is None and copy is not None:
        found.append(warning(
            "configuration-lost", (location.CONFIG,),
            f"there is no {location.CONFIG}, but the weights' header has a copy",
            f"{location.CONFIG}, without which PEFT refuses the folder", "jaxadapt repair writes it again",
            Fix((_FROM_COPY,), {}, copy),
        ))  # fmt: skip
    if stored.text is None:
        return copy, [*found, *([] if copy is None else _check_values(copy, None))]
    values: dict[str, Any] | None = None
    repairs: list[str] = []
    try:
        text = stored.text()
        values, repairs = mend_text(text)
        if values is not None and (foreign := formats.foreign_config(values)) is not None:
            return None, [*found, foreign]
        config = loads(text, location.CONFIG)
    except (ConfigError, FileError) as problem:
        found.append(_unreadable(stored, copy, values or {}, repairs, problem))
        config = found[-1].fix and found[-1].fix.config
        if config is None:
            return None, found
    else:
        if copy is not None and (changed := config.changed_keys(copy)):
            found.append(warning(
                "edited", changed,
                f"{location.CONFIG} differs from the copy in the weights' header in {', '.join(changed)}",
                "two equal configurations: it was edited, or a save was interrupted",
                "if the edit is intended, write it again: jaxadapt.write(jaxadapt.read(path), path)",
            ))  # fmt: skip
    return config, [*found, *_check_values(config, None if config is copy else values or {})]


def _header_copy(stored: peft_folder.StoredAdapter) -> tuple[Config | None, list[Finding]]:
    """Return jaxadapt's copy of the configuration, if the header has one that can be read."""
    if stored.weights is None or stored.header is None or not peft_folder.has_copy(stored.header):
        return None, []
    try:
        return peft_folder.parse_copy(stored.header.metadata[peft_folder.META], stored.weights)[0], []
    except AdapterError as problem:
        return None, [
            warning("header", (stored.weights.name,), str(problem), "a copy of the configuration", "save it again")
        ]


_FROM_COPY = f"{location.CONFIG} written again from the copy in the weights' header"


def _unreadable(
    stored: peft_folder.StoredAdapter,
    copy: Config | None,
    values: Mapping[str, Any],
    repairs: list[str],
    problem: AdapterError,
) -> Finding:
    """Return the finding for a configuration that PEFT refuses, with the one that it stands for if that is certain."""
    mended, more = mend_values(values, stored.specs)
    done, config, remedy = (*repairs, *more), None, "correct the field, or write the configuration again"
    with contextlib.suppress(ConfigError, ValueError):
        config = loads(json.dumps(mended), location.CONFIG) if done else None
    if config is not None:
        remedy = "jaxadapt repair corrects it"
    elif copy is not None:
        remedy = "jaxadapt repair corrects it from the copy in the weights' header"
        config, done = copy, (_FROM_COPY,)
    return error(
        "configuration", (location.CONFIG,), str(problem), "a configuration that PEFT reads", remedy,
        None if config is None else Fix(done, {}, config),
    )  # fmt: skip


def mend_text(text: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the JSON object of a text without a byte order mark and trailing commas, and a sentence for each repair.

    Returns None for any other text, also for one with a key twice.

    >>> mend_text('{"r": 4, "target_modules": ["q",],}')
    ({'r': 4, 'target_modules': ['q']}, ['2 trailing commas removed'])
    """
    plain, removed = text.removeprefix("\ufeff"), 0
    done = [] if plain == text else ["the byte order mark at the beginning removed"]
    while removed < _MAX_COMMAS and (place := _trailing_comma(plain)) is not None:
        plain, removed = plain[:place] + plain[place + 1 :], removed + 1
    if removed:
        done.append(f"{count(removed, 'trailing comma')} removed")
    return peft_folder.parse_json(plain), done


def _trailing_comma(text: str) -> int | None:
    """Return the position of the comma before a bracket at which JSON ends to be valid; None for another fault."""
    try:
        json.loads(text)
    except json.JSONDecodeError as problem:
        is_there = text[problem.pos : problem.pos + 1] == ","
        place = problem.pos if is_there else len(text[: problem.pos].rstrip()) - 1
        return place if re.match(r",\s*[}\]]", text[max(place, 0) :]) else None
    except (ValueError, RecursionError):  # `parse_json` returns None for it
        return None


def mend_values(values: Mapping[str, Any], keys: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values with every certain repair, and a sentence for each repair.

    >>> mend_values({"peft_type": "lora", "r": 4.0, "lora_alpha": "16"}, [])
    ({'peft_type': 'LORA', 'r': 4, 'lora_alpha': 16},
     ["peft_type: 'lora' became 'LORA'", 'r: 4.0 became 4', "lora_alpha: '16' became 16"])
    """
    kind = _meant_type(values, keys)
    cls = class_of(str(kind))
    numbers = [] if cls is None else [f.name for f in dataclasses.fields(cls) if type(f.default) in (int, float)]
    meant = {"peft_type": kind} | {field: _number(values[field], field == "r") for field in numbers if field in values}
    for field in sorted(_PATTERNS.keys() & values.keys(), reverse=True):
        items = cast("dict[str, Any]", values[field]).items() if isinstance(values[field], dict) else ()
        if items or values[field] is None:
            meant[field] = {name: _number(value, field == "rank_pattern") for name, value in items}
    changed = {field: value for field, value in meant.items() if json.dumps(value) != json.dumps(values.get(field))}
    return {**values, **changed}, [_describe(field, values.get(field), value) for field, value in changed.items()]


def _meant_type(values: Mapping[str, Any], keys: Collection[str]) -> Any:
    """Return the type that a configuration means, or its own value if that is not certain."""
    kind = values.get("peft_type")
    if kind is None and {"r", "lora_alpha"} <= values.keys() and any(".lora_A." in key for key in keys):
        return "LORA"
    name = re.sub("[^A-Z0-9]+", "_", str(kind).removeprefix("PeftType.").upper()).strip("_")
    return name if isinstance(kind, str) and peft_tensors.is_known_method(name) else kind


_PATTERNS = {"rank_pattern": "ranks became integers", "alpha_pattern": "texts became numbers"}


def _describe(field: str, found: Any, value: Any) -> str:
    if found is None:
        return f"{field}: {'null became {}' if value == {} else f'{value!r} added'}"
    return f"{field}: {_PATTERNS.get(field, f'{found!r} became {value!r}')}"


def _number(value: Any, is_rank: bool) -> Any:
    """Return the number that a text states, and an integer for a whole rank; any other value as it is."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value, re.ASCII):
        value = float(value) if "." in value else int(value)
    return int(value) if is_rank and isinstance(value, float) and value.is_integer() else value


# ---------------------------------------------------------------- versions and scales


def _check_values(config: Config, values: Mapping[str, Any] | None) -> list[Finding]:
    """Find values that PEFT takes, and that are suspicious.

    Args:
        config: the configuration.
        values: those that its file states; None for a copy of the configuration.
    """
    is_known = not isinstance(config, GenericConfig)
    is_newer = release_of(config.peft_version) > release_of(PEFT_VERSION)
    alpha = next((name for name in ("lora_alpha", "alpha") if name in config.to_dict()), "")
    is_stated = alpha in (values or {})
    zero = f"{alpha} is 0: PEFT multiplies the change by 0, so the adapter has no effect"
    unknown = sorted(config.extra) if is_known else []
    old = [name for name in unknown if name in _OLD_FIELDS and config.extra[name] not in (_OLD_FIELDS[name], False)]
    rows = (
        (is_known and alpha and values is not None and (not is_stated or config.get(alpha) == 0), warning(
            "alpha", (alpha,), zero if is_stated else f"{alpha} is missing: PEFT takes {config.get(alpha)}",
            "the alpha of the training, on which the scale depends", f"state {alpha} as it was in the training",
        )),
        (old, error(
            "old-layout", old, f"{', '.join(old)} is set: PEFT before 0.3 wrote it, with a layer of merged"
            " projections whose tensors have another layout", "a configuration of PEFT 0.3 or newer",
            "load it with that version of PEFT, merge it, or split the merged projections",
        )),
        (is_newer, warning(
            "newer-peft", ("peft_version", *unknown), f"PEFT {config.peft_version} wrote the configuration"
            + (f", with fields unknown here: {', '.join(unknown)}" if unknown else ""),
            f"PEFT {PEFT_VERSION} or older, which this version of jaxadapt follows",
            "update jaxadapt, and compare the outputs with PEFT's",
        )),
        (unknown and not is_newer, note(
            "unknown-fields", unknown,
            f"PEFT {PEFT_VERSION} ignores the fields {', '.join(unknown)}, which it does not have",
        )),
        (not peft_tensors.is_method_of_peft(config.peft_type), warning(
            "unknown-method", ("peft_type",), f"PEFT {PEFT_VERSION} has no method {config.peft_type}",
            "a method of PEFT", "load it with the program that wrote it",
        )),
    )  # fmt: skip
    return [finding for is_met, finding in rows if is_met]


# ---------------------------------------------------------------- keys


@dataclasses.dataclass(frozen=True)
class Reading:
    """Adapter files under PEFT's names, read with the fixes of the findings.

    Attributes:
        findings: the findings about the files, the configuration and the keys.
        config: the configuration; None if it cannot be read, even with fixes.
        keys: {PEFT's name: key of the file}; empty if the tensors are not those of an adapter.
        has_several: True for the tensors of several adapters.
    """

    findings: tuple[Finding, ...]
    config: Config | None = None
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    has_several: bool = False

    @property
    def is_certain(self) -> bool:
        """True if the files have one meaning."""
        twice = any((found.code, found.fix) == ("duplicate", None) for found in self.findings)
        return self.config is not None and bool(self.keys) and not self.has_several and not twice


def read_stored(stored: peft_folder.StoredAdapter) -> Reading:
    """Read the configuration and the keys of adapter files, with findings in place of errors."""
    if stored.tensors is None and stored.text is None:
        return Reading(stored.findings)
    config, about_config = check_config(stored)
    found = (*stored.findings, *about_config)
    if not stored.specs:
        return Reading(found, config)
    passes = config is not None and config.peft_type == formats.OPAQUE  # the names of its own program are right
    foreign = None if passes else _foreign_tensors(stored, config)
    if foreign is not None:
        return Reading((*[f for f in found if f.code not in ("configuration-missing", foreign.code)], foreign), config)
    kind = guess_method(stored.specs) if config is None else config.peft_type
    names = (
        peft_tensors.NormalKeys({key: key for key in stored.specs})
        if passes
        else peft_tensors.normalize_keys(stored.specs, kind)
    )
    left_out = left_out_by_peft(names, config)
    found += tuple(_check_names(names, stored, left_out, has_config=config is not None))
    keys = {name: key for name, key in names.keys_of().items() if key not in left_out}
    return Reading(found, config, keys, names.has_several)


def _foreign_tensors(stored: peft_folder.StoredAdapter, config: Config | None) -> Finding | None:
    """Return a finding if the tensors are not those of an adapter of PEFT."""
    foreign = formats.foreign_library(stored.specs, config is not None)
    is_known = config is None or peft_tensors.is_known_method(config.peft_type)
    return formats.not_an_adapter(stored.specs, stored.source) if foreign is None and is_known else foreign


def left_out_by_peft(names: peft_tensors.NormalKeys, config: Config | None) -> set[str]:
    """Return the keys of a complete PEFT model's state dict that PEFT does not save, such as the base's weights."""
    if config is None or not names.owners:
        return set()
    return {key for key, name in names.names.items() if name is None or not peft_tensors.is_saved_by_peft(name, config)}


def _check_names(
    names: peft_tensors.NormalKeys, stored: peft_folder.StoredAdapter, left_out: Collection[str], *, has_config: bool
) -> Iterator[Finding]:
    """Return the findings about the keys."""
    if names.models:
        several = ", ".join(f"{name}.{PEFT_PREFIX}".lstrip(".") for name in names.models)
        yield error(
            "several-adapters",
            names.models,
            f"the keys are those of several PEFT models: {several}",
            "one adapter in a file",
            "keep the keys of one of them in the file",
        )
        return
    mend = "jaxadapt repair renames them" if has_config else "add the configuration; jaxadapt repair then renames them"
    for rule, changed in names.steps:
        is_name = rule is peft_tensors.ADAPTER_NAME
        if is_name and names.has_several:
            yield error(
                "several-adapters",
                names.adapters,
                f"the keys contain the names of several adapters: {', '.join(names.adapters)}",
                "one adapter in a file",
                f"save one in PyTorch: model.save_pretrained(folder, selected_adapters=[{names.adapters[0]!r}])",
            )
            continue
        keys = [key for key, name in changed.items() if name is not None]
        done = [f"{len(keys)} keys: {rule.done}"]
        if is_name and left_out:
            done.append(f"{len(left_out)} tensors of the base left out, which PEFT does not save")
        changed = {**changed, **dict.fromkeys(left_out)}
        fix = Fix(tuple(done), names=changed) if has_config and not names.has_several else None
        found = rule.found.format(wrappers=", ".join(peft_tensors.wrappers_in(keys)), adapter="".join(names.adapters))
        yield (warning if is_name or rule is peft_tensors.MAGNITUDE else error)(
            rule.code,
            keys,
            f"{len(keys)} of {len(names.names)} keys {found}, such as {keys[0]}",
            rule.expected,
            mend,
            fix,
        )
    duplicates = peft_tensors.find_duplicates({k: name for k, name in names.names.items() if k not in left_out})
    if duplicates and not names.has_several:
        yield _duplicate(duplicates, stored, has_config=has_config)


def _duplicate(
    duplicates: Mapping[str, Sequence[str]], stored: peft_folder.StoredAdapter, *, has_config: bool
) -> Finding:
    tensors, specs = stored.tensors or {}, stored.specs
    equal = has_config and all(  # tensors of different dtypes or shapes are not read
        len({specs[key] for key in keys}) == 1 and len({tensors[key].tobytes() for key in keys}) == 1
        for keys in duplicates.values()
    )
    name, keys = next(iter(duplicates.items()))
    again = {key: None for keys in duplicates.values() for key in keys[1:]}
    done = f"{len(duplicates)} tensors that were stored twice with equal values kept once"
    return error(
        "duplicate",
        duplicates,
        f"{len(duplicates)} tensors are stored twice: {name} as {' and '.join(keys)}, with"
        f" {'equal' if equal else 'different'} values",
        "each tensor once",
        "jaxadapt repair keeps one" if equal else "remove the wrong one of each",
        Fix((done,), names=again) if equal else None,
    )


def guess_method(specs: Kinds) -> str:
    """Return the method that the tensor names of a file without a configuration show; "" if none."""
    if any("lora_A" in key.split(".") or "lora_embedding_A" in key for key in specs):
        return "LORA"
    return "PROMPT_TUNING" if "prompt_embeddings" in specs else ""


# ---------------------------------------------------------------- fixes


def apply_fixes(stored: peft_folder.StoredAdapter) -> tuple[peft_tensors.PeftTensors | None, tuple[str, ...]]:
    """Return the adapter with the fixes of all findings, and a sentence for each; None if it has no certain reading."""
    reading = read_stored(stored)
    fixes = [found.fix for found in reading.findings if found.fix is not None]
    if stored.tensors is None or reading.config is None or not reading.is_certain:
        return None, ()
    names: dict[str, str | None] = {key: key for key in stored.specs}
    for fix in fixes:
        names |= fix.names
    keys = {name: key for key, name in names.items() if name is not None}
    if fixes and peft_tensors.normalize_keys(keys, reading.config.peft_type).steps:
        return None, ()  # keys with two readings, such as a module that is called lora_A
    tensors = peft_tensors.PeftTensors(reading.config, rename(stored.tensors, keys), stored.source, stored.fingerprint)
    return tensors, tuple(sentence for fix in fixes for sentence in fix.done)


@contextlib.contextmanager
def open_repaired(place: Place) -> Generator[peft_tensors.PeftTensors]:
    """Open an adapter with every certain repair, and warn of each.

    A file that no repair helps raises the error of its format.
    """
    with contextlib.ExitStack() as stack:
        tensors, done = None, ()
        with contextlib.suppress(FileError, FormatError):
            tensors, done = apply_fixes(open_stored(place, stack))
        if tensors is None or not done:
            yield stack.enter_context(formats.open_place(place)).tensors
            return
        warn(f"{os.fspath(place.path)}: repaired while reading; the files are unchanged:\n" + bullets(done))
        yield tensors
