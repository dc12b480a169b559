"""Read adapter files with findings in place of errors, verify them, and repair them.

path ──open_stored──► StoredAdapter ──read_stored──► Reading ──checks of tensors, values, base──► findings
                                                     Reading ──fixes of its findings──► PeftTensors ──write──► a copy

What `read` refuses is read too, and the reason is a finding. A finding with one possible remedy carries it as its fix.
`repair` applies the fixes in order, and verifies the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jaxadapt.adapters import key_names
from jaxadapt.adapters.key_names import NormalKeys
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs.base import PEFT_VERSION, Config, GenericConfig, class_of, loads
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError, ConfigError, FileError, FormatError, MismatchError, warn
from jaxadapt.core.progress import Progress, Report, byte_counter, no_report, reporter
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.persistence import base_checks, findings, folder, formats, reconcile, run_folder, tensor_checks
from jaxadapt.persistence.findings import SEVERITIES, Finding, Fix, count, error, note, warning
from jaxadapt.persistence.formats import Place, peft_folder
from jaxadapt.persistence.formats.image_names import LYCORIS
from jaxadapt.persistence.formats.peft_folder import StoredAdapter
from jaxadapt.storage import hub, location
from jaxadapt.storage.safetensors import BITS
from jaxadapt.storage.source import Kinds, as_source, rename

# ---------------------------------------------------------------- files


@contextlib.contextmanager
def open_stored(path: str | os.PathLike[str] | Place, report: Report = no_report) -> Generator[StoredAdapter]:
    """Open an adapter's folder or file without the demands of `read`. Tensors are read on demand, one at a time.

    Raises `FileError` if nothing at the path can be read at all.
    """
    with contextlib.ExitStack() as stack:
        yield _open(formats.look(path, report), stack)


def _open(place: Place, stack: contextlib.ExitStack) -> StoredAdapter:
    source, at = os.fspath(place.path), place.at
    if place.names is None and at.suffix == ".json":
        return StoredAdapter(source, lambda: reconcile.read_text(at))
    if place.names is None and run_folder.NAME.fullmatch(at.name):
        return StoredAdapter(source, findings=(findings.training_step(at.parent, at.name),))
    is_named = place.names is None and at.name in hub.WEIGHTS  # a file with PEFT's name, whatever its keys are
    file_format = None if is_named else formats.find(place)
    if file_format is None or file_format is peft_folder.FORMAT:
        return peft_folder.open_files(place, stack)
    try:
        opened = stack.enter_context(file_format.open(place))
    except AdapterError as problem:
        if file_format.describe is None:
            raise
        return StoredAdapter(source, findings=(file_format.describe(source, problem),))
    found = () if file_format.describe is None else (file_format.describe(source, opened),)
    return StoredAdapter(source, opened.tensors.config.to_json, as_source(opened.tensors.tensors), findings=found)


# ---------------------------------------------------------------- configuration


# Fields of PEFT up to 0.2, with the value that changes nothing.
_OLD_FIELDS: Mapping[str, Any] = {"enable_lora": None, "merge_weights": False}
_MAX_COMMAS = 16  # each costs a reading of the text


def check_config(stored: StoredAdapter) -> tuple[Config | None, list[Finding]]:
    """Return the configuration of stored adapter files, with the fix of its finding, and the findings about it.

    The configuration is None if it cannot be read, even with a fix.
    """
    copy, found = _header_copy(stored)
    if stored.text is None:
        return copy, [*found, *([] if copy is None else [_lost(copy), *_check_values(copy, None)])]
    values: dict[str, Any] | None = None
    repairs: list[str] = []
    try:
        text = stored.text()
        values, repairs = mend_text(text)
        if values is not None and (foreign := findings.foreign_config(values)) is not None:
            return None, [*found, foreign]
        config = loads(text, hub.CONFIG)
    except (ConfigError, FileError) as problem:
        found.append(_unreadable(stored, copy, values or {}, repairs, problem))
        config = found[-1].fix and found[-1].fix.config
        if config is None:
            return None, found
    else:
        if copy is not None and (changed := config.changed_keys(copy)):
            text = f"{hub.CONFIG} differs from the copy in the weights' header in {', '.join(changed)}"
            expected = "two equal configurations: it was edited, or a save was interrupted"
            remedy = "if the edit is intended, write it again: jaxadapt.write(jaxadapt.read(path), path)"
            found.append(warning("edited", changed, text, expected, remedy))
    return config, [*found, *_check_values(config, None if config is copy else values or {})]


def _header_copy(stored: StoredAdapter) -> tuple[Config | None, list[Finding]]:
    """Return jaxadapt's copy of the configuration, if the header has one that can be read."""
    if stored.weights is None or stored.header is None or not peft_folder.has_copy(stored.header):
        return None, []
    try:
        return reconcile.parse_copy(stored.header.metadata[reconcile.META], stored.weights)[0], []
    except AdapterError as problem:
        return None, [
            warning("header", (stored.weights.name,), str(problem), "a copy of the configuration", "save it again")
        ]


def _lost(copy: Config) -> Finding:
    return warning(
        "configuration-lost", (hub.CONFIG,), f"there is no {hub.CONFIG}, but the weights' header has a copy",
        f"{hub.CONFIG}, without which PEFT refuses the folder", "jaxadapt repair writes it again",
        Fix((_FROM_COPY,), {}, copy),
    )  # fmt: skip


_FROM_COPY = f"{hub.CONFIG} written again from the copy in the weights' header"


def _unreadable(
    stored: StoredAdapter, copy: Config | None, values: Mapping[str, Any], repairs: list[str], problem: AdapterError
) -> Finding:
    """Return the finding for a configuration that PEFT refuses, with the one that it stands for if that is certain."""
    mended, more = mend_values(values, stored.specs)
    done, config, remedy = (*repairs, *more), None, "correct the field, or write the configuration again"
    with contextlib.suppress(ConfigError, ValueError):
        config = loads(json.dumps(mended), hub.CONFIG) if done else None
    if config is not None:
        remedy = "jaxadapt repair corrects it"
    elif copy is not None:
        remedy = "jaxadapt repair corrects it from the copy in the weights' header"
        config, done = copy, (_FROM_COPY,)
    fix = None if config is None else Fix(done, {}, config)
    return error("configuration", (hub.CONFIG,), str(problem), "a configuration that PEFT reads", remedy, fix)


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
        is_rank = field == "rank_pattern"
        pattern = {name: _number(value, is_rank) for name, value in items}
        meant[field] = pattern if items or values[field] is None else values[field]
    changed = {field: value for field, value in meant.items() if _is_other(value, values.get(field))}
    return {**values, **changed}, [_describe(field, values.get(field), value) for field, value in changed.items()]


def _meant_type(values: Mapping[str, Any], keys: Collection[str]) -> Any:
    """Return the type that a configuration means, or its own value if that is not certain."""
    kind = values.get("peft_type")
    if kind is None and {"r", "lora_alpha"} <= values.keys() and any(".lora_A." in key for key in keys):
        return "LORA"
    name = re.sub("[^A-Z0-9]+", "_", str(kind).removeprefix("PeftType.").upper()).strip("_")
    return name if isinstance(kind, str) and key_names.is_known_method(name) else kind


_PATTERNS = {"rank_pattern": "ranks became integers", "alpha_pattern": "texts became numbers"}


def _is_other(value: Any, found: Any) -> bool:
    """Return True for another value, or an equal one of another type."""
    return json.dumps(value) != json.dumps(found)


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


def _check_values(config: Config, values: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Find values that PEFT takes, and that are suspicious.

    Args:
        config: the configuration.
        values: those that its file states; None for a copy of the configuration.
    """
    name = next((name for name in ("lora_alpha", "alpha") if name in config.to_dict()), None)
    if values is not None and name is not None and not isinstance(config, GenericConfig):
        text = f"{name} is 0: PEFT multiplies the change by 0, so the adapter has no effect"
        text = text if name in values else f"{name} is missing: PEFT takes {config.get(name)}"
        if name not in values or config.get(name) == 0:
            yield warning(
                "alpha",
                (name,),
                text,
                "the alpha of the training, on which the scale depends",
                f"state {name} as it was in the training",
            )
    unknown = [] if isinstance(config, GenericConfig) else sorted(config.extra)
    old = [name for name in unknown if name in _OLD_FIELDS and config.extra[name] not in (_OLD_FIELDS[name], False)]
    if old:
        yield error(
            "old-layout",
            old,
            f"{', '.join(old)} is set: PEFT before 0.3 wrote it, with a layer of merged"
            " projections whose tensors have another layout",
            "a configuration of PEFT 0.3 or newer",
            "load it with that version of PEFT, merge it, or split the merged projections",
        )
    if _version(config.peft_version or "") > _version(PEFT_VERSION):
        fields = f", with fields unknown here: {', '.join(unknown)}" if unknown else ""
        yield warning(
            "newer-peft",
            ("peft_version", *unknown),
            f"PEFT {config.peft_version} wrote the configuration{fields}",
            f"PEFT {PEFT_VERSION} or older, which this version of jaxadapt follows",
            "update jaxadapt, and compare the outputs with PEFT's",
        )
    elif unknown:
        yield note(
            "unknown-fields",
            unknown,
            f"PEFT {PEFT_VERSION} ignores the fields {', '.join(unknown)}, which it does not have",
        )
    if not key_names.is_known_method(config.peft_type):
        text = f"PEFT {PEFT_VERSION} has no method {config.peft_type}"
        yield warning(
            "unknown-method", ("peft_type",), text, "a method of PEFT", "load it with the program that wrote it"
        )


def _version(text: str) -> tuple[int, ...]:
    match = re.match(r"\d{1,9}(\.\d{1,9})*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


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


def read_stored(stored: StoredAdapter) -> Reading:
    """Read the configuration and the keys of adapter files, with findings in place of errors."""
    if stored.tensors is None and stored.text is None:
        return Reading(stored.findings)
    config, about_config = check_config(stored)
    found = (*stored.findings, *about_config)
    if not stored.specs:
        return Reading(found, config)
    passes = config is not None and config.peft_type == LYCORIS  # the names of its own program are right
    foreign = None if passes else _foreign_tensors(stored, config)
    if foreign is not None:
        others = [f for f in found if f.code not in ("configuration-missing", foreign.code)]
        return Reading((*others, foreign), config)
    kind = guess_method(stored.specs) if config is None else config.peft_type
    names = NormalKeys({key: key for key in stored.specs}) if passes else key_names.normalize_keys(stored.specs, kind)
    left_out = left_out_by_peft(names, config)
    found += tuple(_check_names(names, stored, left_out, has_config=config is not None))
    keys = {name: key for name, key in names.keys_of().items() if key not in left_out}
    return Reading(found, config, keys, names.has_several)


def _foreign_tensors(stored: StoredAdapter, config: Config | None) -> Finding | None:
    """Return a finding if the tensors are not those of an adapter of PEFT."""
    foreign = findings.foreign_library(stored.specs, config is not None)
    is_known = config is None or key_names.is_known_method(config.peft_type)
    return findings.not_an_adapter(stored.specs, stored.source) if foreign is None and is_known else foreign


def left_out_by_peft(names: NormalKeys, config: Config | None) -> set[str]:
    """Return the keys of a complete PEFT model's state dict that PEFT does not save, such as the base's weights."""
    if config is None or not names.owners:
        return set()
    return {key for key, name in names.names.items() if name is None or not key_names.is_saved_by_peft(name, config)}


def _check_names(
    names: NormalKeys, stored: StoredAdapter, left_out: Collection[str], *, has_config: bool
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
        is_name = rule is key_names.ADAPTER_NAME
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
        found = rule.found.format(wrappers=", ".join(key_names.wrappers_in(keys)), adapter="".join(names.adapters))
        yield (warning if is_name else error)(
            rule.code,
            keys,
            f"{len(keys)} of {len(names.names)} keys {found}, such as {keys[0]}",
            rule.expected,
            mend,
            fix,
        )
    duplicates = key_names.find_duplicates({k: name for k, name in names.names.items() if k not in left_out})
    if duplicates and not names.has_several:
        yield _duplicate(duplicates, stored, has_config=has_config)


def _duplicate(duplicates: Mapping[str, Sequence[str]], stored: StoredAdapter, *, has_config: bool) -> Finding:
    equal = has_config and all(_are_equal(keys, stored) for keys in duplicates.values())
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


def _are_equal(keys: Sequence[str], stored: StoredAdapter) -> bool:
    """Return True if tensors have equal shapes, dtypes and bytes."""
    tensors, specs = stored.tensors or {}, stored.specs
    first = tensors[keys[0]].tobytes()
    return len({specs[key] for key in keys}) == 1 and all(tensors[key].tobytes() == first for key in keys[1:])


def guess_method(specs: Kinds) -> str:
    """Return the method that the tensor names of a file without a configuration show; "" if none."""
    if any("lora_A" in key.split(".") or "lora_embedding_A" in key for key in specs):
        return "LORA"
    return "PROMPT_TUNING" if "prompt_embeddings" in specs else ""


# ---------------------------------------------------------------- verify


def verify(path: str | os.PathLike[str], base: Any = None, *, progress: Progress = None) -> list[Finding]:
    """Check the files of an adapter and return every problem and the main facts as values.

    Reads also damaged files and those of other libraries that are easily taken for PEFT's. One tensor is in memory at a
    time (all of a `.bin` file), and torch is not needed.

    Args:
        path: the adapter's folder; one of its files; an address of an object store or of the Hub.
        base: the base model, to check names and sizes: its Hugging Face folder or a file of its weights (only names,
            shapes and the few values of the adapter's fingerprint are read), a .json file {key: shape}, a mapping
            {key: shape or array} of PyTorch's parameters, or the name of a family ("llama").
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("verify", bytes done, bytes in
            all).

    Returns:
        The findings, errors first. A sound adapter has only notes: its method, ranks and scales.

    Raises `FileError` if the path, or the base, cannot be read at all.

    >>> import tempfile, jax, jaxadapt
    >>> base = {"q": {"kernel": jax.numpy.ones((4, 6))}}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> adapter = jaxadapt.init(base, config, key=jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxadapt.save(adapter, folder)
    ...     findings = verify(folder, {"q.weight": (6, 5)})
    >>> [(finding.severity, finding.code) for finding in findings]
    [('error', 'shape'), ('warning', 'untrained'), ('note', 'method'), ('note', 'scale')]
    >>> findings[0].subjects
    ('q: [6, 4] by its tensors, [6, 5] in the base',)
    """
    known_base = None if base is None else base_checks.base_shapes(base)
    name = os.fspath(base) if isinstance(base, str | os.PathLike) else "the base"
    with reporter(progress) as report, open_stored(path, report) as stored:
        reading = read_stored(stored)
        found = [*reading.findings, *_check_content(stored, reading, base, known_base, name, report)]
        if isinstance(base, str | os.PathLike) and stored.fingerprint and not isinstance(known_base, KeyMap):
            found += base_checks.check_identity(stored.fingerprint, known_base or {}, base)
    return sorted(found, key=lambda each: SEVERITIES.index(each.severity))


def _check_content(
    stored: StoredAdapter, reading: Reading, base: Any, known_base: Any, base_name: str, report: Report
) -> list[Finding]:
    """Check the tensors, by their names in PEFT, and describe the adapter."""
    specs, tensors, config, keys = stored.specs, stored.tensors, reading.config, reading.keys
    if tensors is None or not keys:
        return [] if config is None or tensors is not None else [_describe_method(config, None)]
    shapes = {name: specs[key][1] for name, key in keys.items()}
    dtypes = {name: specs[key][0] for name, key in keys.items()}
    sizes = [math.prod(shapes[name]) * BITS.get(dtype, 128) // 8 for name, dtype in dtypes.items()]  # C128 of .bin
    progress = byte_counter(report, "verify", sum(sizes))

    def get(key: str) -> Any:
        value = tensors[key]
        progress(value.nbytes)
        return value

    if config is None:
        found = [_describe_tensors(guess_method(specs), shapes), *tensor_checks.check_empty(shapes)]
        return [*found, *tensor_checks.check_values(keys, shapes, get, None)]
    found: list[Finding] = []
    if not reading.has_several:
        found += tensor_checks.check_tensors(shapes, config, base_checks.base_family(base, known_base))
        if known_base is not None:
            found += base_checks.check_base(shapes, config, known_base, base_name)
    found += tensor_checks.check_dtypes(dtypes, config)
    found += tensor_checks.check_values(keys, shapes, get, config)
    return [*found, _describe_method(config, shapes), *_describe_scales(shapes, config)]


# ---------------------------------------------------------------- facts


def _describe_method(config: Config, shapes: tensor_checks.Shapes | None) -> Finding:
    base = f" for {config.base_model_name_or_path}" if config.base_model_name_or_path else ""
    if shapes is None:
        return note("method", (config.peft_type,), f"the configuration of a {config.peft_type} adapter{base}")
    modules, _ = tensor_checks.split_modules(shapes, config)
    number = len([module for module in modules if module and module != "base_model"])
    text = f", {count(number, 'adapted module')}" if number else ""
    return note("method", (config.peft_type,), f"{config.peft_type} adapter{base}, {count(shapes, 'tensor')}{text}")


def _describe_tensors(kind: str, shapes: tensor_checks.Shapes) -> Finding:
    """Describe the tensors of a file without a configuration."""
    splits = [split for key in shapes if (split := key_names.split_key(key, kind)) is not None]
    ranks = sorted({shape[0] for key, shape in shapes.items() if shape and "lora_A" in key.split(".")})
    text = f", {len({module for module, _ in splits})} modules" if kind == "LORA" else ""
    text += f", rank {', '.join(map(str, ranks))}" if ranks else ""
    return note("method", (kind,), f"{len(shapes)} tensors of {kind or 'an unknown method'}{text}")


def _describe_scales(shapes: tensor_checks.Shapes, config: Config) -> list[Finding]:
    """Return one note for each pair of rank and scale."""
    modules, _ = tensor_checks.split_modules(shapes, config)
    groups: dict[tuple[int, float], list[str]] = {}
    for module, setting in tensor_checks.module_settings(modules, config).items():
        groups.setdefault(setting, []).append(module)
    notes: list[Finding] = []
    for (rank, scale), members in sorted(groups.items()):
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in members}))
        text = f"rank {rank} and scale {scale:.6g} in {count(members, 'module')} ({ends})"
        notes.append(note("scale", members, text))
    return notes


# ---------------------------------------------------------------- repair


@dataclasses.dataclass(frozen=True)
class Repaired:
    """The result of `repair`.

    Attributes:
        path: the folder written; None if there was nothing to repair, and nothing was written.
        done: a sentence for each repair.
        remaining: the errors and warnings that cannot be repaired with certainty.
    """

    path: str | None
    done: tuple[str, ...]
    remaining: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"path": self.path, "done": list(self.done), "remaining": [f.to_dict() for f in self.remaining]}


_NAMES = (hub.CONFIG, *hub.WEIGHTS)


def repair(
    path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, progress: Progress = None
) -> Repaired:
    """Write a repaired copy of an adapter's folder, if something in it can be repaired with certainty.

    Repairs the findings of `verify` that are `repairable`: keys with the names of wrappers (_orig_mod., module.), of
    the adapter (.default.), or without PEFT's prefix; tensors stored twice with equal values; values of the
    configuration with one possible meaning (peft_type "lora", r 4.0 or "4"), trailing commas and a byte order mark; a
    configuration that is lost but for the copy in the weights' header. The values of tensors never change. One tensor
    is in memory at a time (all of a `.bin` file).

    Args:
        path: the adapter's folder or file of weights, or an address.
        out: the folder to write to; by default the name of `path` with "-repaired" added. It must not contain an
            adapter, except that `out` equal to `path` replaces the adapter.
        progress: None, True (a bar on a terminal or in a notebook) or a function of ("save", bytes done, bytes in all).

    Returns:
        The folder, a sentence for each repair, and the problems that remain.

    Raises `FileError` if the path cannot be read or `out` cannot be written, and `MismatchError` if the path holds no
    adapter that can be repaired.

    >>> import tempfile, numpy as np, jaxadapt
    >>> a, b = np.ones((2, 4), "float32"), np.ones((6, 2), "float32")
    >>> tensors = {"q.lora_A.weight": a, "q.lora_B.weight": b}
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     jaxadapt.write(jaxadapt.PeftTensors(config, tensors), f"{folder}/found")
    ...     result = repair(f"{folder}/found")
    ...     keys = sorted(jaxadapt.read(f"{folder}/found-repaired").tensors)
    >>> result.done, keys[0]
    (('2 keys: the prefix base_model.model. added',), 'base_model.model.q.lora_A.weight')
    """
    target = _default_target(path) if out is None else out
    if hub.is_address(target):
        raise FileError(f"{target}: expected a local folder; pass out=, then upload it with jaxadapt.push")
    with reporter(progress) as report:
        with open_stored(path, report) as stored:
            tensors, done = _apply_fixes(stored)
            if tensors is None:
                lines = [f"{found.found}; {found.remedy}" for found in _problems(path)]
                raise MismatchError(f"{os.fspath(path)}: cannot be repaired with certainty:\n" + paths.bullets(lines))
            if not done:
                return Repaired(None, (), _problems(path))
            is_same = _is_same(target, path)
            if not is_same and any(location.exists(location.to_location(target) / name) for name in _NAMES):
                raise FileError(
                    f"{os.fspath(target)}: cannot write the repaired adapter here: the folder contains an adapter;"
                    " choose another folder with out="
                )
            if is_same:  # the file is replaced
                tensors = dataclasses.replace(tensors, tensors=dict(tensors.tensors))
            else:
                folder.write(tensors, target, progress=report)
        if is_same:
            folder.write(tensors, target, progress=report)
    return Repaired(os.fspath(target), done, _problems(target))


def _default_target(path: str | os.PathLike[str]) -> str:
    if hub.is_address(path):
        raise FileError(f"{os.fspath(path)}: pass out=, the folder to write the repaired adapter to")
    place = location.to_location(path)
    folder_path = place.parent if location.is_file(place) else place
    if isinstance(folder_path, Path) and folder_path.name in ("", ".."):  # "." and ".." have no name to add to
        folder_path = folder_path.resolve()
    return f"{os.fspath(folder_path).rstrip('/')}-repaired"


def _is_same(target: str | os.PathLike[str], path: str | os.PathLike[str]) -> bool:
    one, other = location.absolute(location.to_location(target)), location.absolute(location.to_location(path))
    return one in (other, other.parent if location.is_file(other) else other)


def _problems(path: str | os.PathLike[str]) -> tuple[Finding, ...]:
    return tuple(found for found in verify(path) if found.severity != "note")


def _apply_fixes(stored: StoredAdapter) -> tuple[PeftTensors | None, tuple[str, ...]]:
    """Return the adapter with the fixes of all findings, and a sentence for each; None if it has no certain reading."""
    reading = read_stored(stored)
    fixes = [found.fix for found in reading.findings if found.fix is not None]
    uncertain = any((found.code, found.fix) == ("duplicate", None) for found in reading.findings)
    if stored.tensors is None or reading.config is None or not reading.keys or reading.has_several or uncertain:
        return None, ()
    names: dict[str, str | None] = {key: key for key in stored.specs}
    for fix in fixes:
        names |= fix.names
    keys = {name: key for key, name in names.items() if name is not None}
    if fixes and key_names.normalize_keys(keys, reading.config.peft_type).steps:
        return None, ()  # keys with two readings, such as a module that is called lora_A
    tensors = PeftTensors(reading.config, rename(stored.tensors, keys), stored.source, stored.fingerprint)
    return tensors, tuple(sentence for fix in fixes for sentence in fix.done)


@contextlib.contextmanager
def open_repaired(path: Place) -> Generator[PeftTensors]:
    """Open an adapter like `folder.open_adapter`, with every certain repair, and warn of each.

    A file that no repair helps raises the error that `open_adapter` raises.
    """
    with contextlib.ExitStack() as stack:
        tensors, done = None, ()
        with contextlib.suppress(FileError, FormatError):
            tensors, done = _apply_fixes(stack.enter_context(open_stored(path, no_report)))
        if tensors is None or not done:
            yield stack.enter_context(folder.open_adapter(path))
            return
        warn(f"{os.fspath(path.path)}: repaired while reading; the files are unchanged:\n" + paths.bullets(done))
        yield tensors
