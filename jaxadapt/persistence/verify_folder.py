"""Verify the files of an adapter, alone or by its base, and repair them.

path ──reading──► Reading ──checks of tensors, values, base──► findings
                  Reading ──fixes of its findings──► PeftTensors ──write──► a copy

The base is that of a model, or the names of a family: the names and sizes of the adapter's modules are compared with
the base's, and the fingerprint in the file with a few of the base's values. `repair` applies the fixes in order, and
verifies the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jaxadapt.adapters import peft_tensors
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core import errors, paths
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.persistence import fingerprint, folder, tensor_checks
from jaxadapt.persistence.expert_keys import SINGLE
from jaxadapt.persistence.formats import SEVERITIES, Finding, count, error, first, note, warning, with_subjects
from jaxadapt.persistence.formats.peft_folder import StoredAdapter
from jaxadapt.persistence.reading import Reading, apply_fixes, guess_method, open_stored, read_stored
from jaxadapt.storage import hf_model, location, safetensors

# ---------------------------------------------------------------- the base


# Renames of transformers between versions: (prefix of the older names, prefix of the newer ones).
_RENAMES = (
    ("language_model.model.", "model.language_model."),  # 4.52, vision-language models
    ("language_model.lm_head.", "lm_head."),
    ("model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("visual.", "model.visual."),
)
# The first parts of names that transformers leaves out in the files of models without their heads (base_model_prefix).
_LEFT_OUT = frozenset(
    ("model transformer backbone bert roberta distilbert electra albert deberta mpnet esm gpt_neox vit deit beit dinov2"
     " swin clip siglip wav2vec2 hubert wavlm").split()
)  # fmt: skip
_EMBEDDINGS = ("embed", "wte", "lm_head", "shared", "word_embeddings")  # parts of their names
_IS_THE_BASE = "check that the adapter belongs to this base model"


def base_shapes(base: Any) -> tensor_checks.Shapes | KeyMap:
    """Return the shapes of a base's PyTorch parameters by key, or the keymap of a family. Reads no tensor.

    Args:
        base: the folder of a Hugging Face model, one file of its weights, a .json file {key: shape}, a mapping of keys
            to shapes or arrays, or the name of a family (`jaxadapt families`).

    Raises `FileError` if there is no model at the path, and `KeyMapError` for an unknown family.
    """
    if isinstance(base, Mapping):
        items = cast("Mapping[str, Any]", base).items()
        return {key: tuple(value) if isinstance(value, list | tuple) else tuple(value.shape) for key, value in items}
    place = location.to_location(cast("str | os.PathLike[str]", base))
    if location.exists(place):
        return hf_model.read_shapes(place)
    if isinstance(place, Path) and len(place.parts) == 1:
        from jaxadapt.keymaps import families

        with errors.raise_as(errors.FileError, f"{base}: no such folder or file", errors.KeyMapError):
            return families.get_family(str(base))
    raise errors.FileError(f"{base}: no such folder or file; pass the folder of the base model, or a family's name")


def base_family(base: Any, known: tensor_checks.Shapes | KeyMap | None) -> str:
    """Return the model type that a base's config.json states, or the name of its family; "" if neither is known.

    Args:
        base: as in `base_shapes`.
        known: its result.
    """
    if isinstance(known, KeyMap):
        return known.name
    if not isinstance(base, str | os.PathLike):
        return ""
    place = location.to_location(cast("str | os.PathLike[str]", base))
    with contextlib.suppress(errors.FormatError):  # the shapes may be sound without it
        return str(
            (hf_model.read_model_config(place if location.is_dir(place) else place.parent) or {}).get("model_type")
            or ""
        )
    return ""


# ---------------------------------------------------------------- findings about the base


def check_base(
    shapes: tensor_checks.Shapes,
    adapted: Sequence[str],
    config: Config,
    base: tensor_checks.Shapes | KeyMap,
    source: str,
) -> Iterator[Finding]:
    """Find the modules of an adapter that do not fit the base.

    Args:
        shapes: the adapter's tensors, by PEFT's names.
        adapted: the adapted modules, by PEFT's names.
        config: the configuration.
        base: the shapes of the base's parameters, or the keymap of its family.
        source: the base, for messages.
    """
    if peft_tensors.has_no_modules(config.peft_type):
        return
    modules = list(dict.fromkeys(m.replace(".base_layer", "") for m in adapted))  # as the base names them
    if isinstance(base, KeyMap):
        yield from _check_family(modules, base)
        return
    is_tied = not any(key.endswith("lm_head.weight") for key in base)  # such a file does not repeat the embedding
    missing = [m for m in modules if not _has_module(base, m) and not (is_tied and m.rpartition(".")[2] == "lm_head")]
    names = (names_in_base(modules, base) or {}) if missing else {}
    if missing:
        yield _explain_missing(modules, missing, names, base, source)
    yield from _check_shapes(shapes, config, base, names)
    if not missing:
        yield from (
            warning("experts", (), text, "an adapter of the routed experts",
                    "train it again if they were meant; else nothing")
            for text in pytorch.routed_left_out(config, modules, pytorch.routed_experts(base))
        )  # fmt: skip
        yield from _check_completeness(modules, config, base, source)


def _has_module(base: tensor_checks.Shapes, module: str) -> bool:
    # The parameters of stacked experts have no ".weight"; their module is a prefix of the key.
    return f"{module}.weight" in base or any(key.startswith(f"{module}.") for key in base)


def _explain_missing(
    modules: Sequence[str], missing: Sequence[str], names: Mapping[str, str], base: tensor_checks.Shapes, source: str
) -> Finding:
    """Return the finding for modules that the base lacks; `names` are those that it has in their place, if known."""
    first = missing[0]
    if names and names == _renamed_modules(modules, base):
        return error(
            "renamed", missing, f"{source} has these modules under other names of transformers: {first} is"
            f" {names[first]} there", "the names of the transformers version that loads the base",
            "rename them (jaxadapt rename --base), or load the adapter with the transformers version of its training",
        )  # fmt: skip
    if names:
        return _explain_prefix(first, names, missing, source)
    experts = [m for m in missing if (e := SINGLE.match(m)) and any(key.startswith(f"{e['owner']}.") for key in base)]
    if len(experts) == len(missing):
        return error(
            "renamed", missing, f"{source} stores its experts in joint tensors, and the adapter has one for each"
            f" expert, such as {first}", "target_parameters, as transformers 5 names experts",
            "transformers 5 converts such an adapter on loading; jaxadapt loads it into"
            " jaxadapt.models.LoraTree(model, on_shared='concat')",
        )  # fmt: skip
    close = errors.close_matches(missing[:3], [key.removesuffix(".weight") for key in base if key.endswith(".weight")])
    text = _no_place(source, missing, modules)
    text += f"; it has {', '.join(close[:4])}" if close else ""
    return error("base", missing, text, "modules of this base", _IS_THE_BASE)


def _no_place(source: str, missing: Sequence[str], modules: Collection[str]) -> str:
    return f"{source} has no place for {len(missing)} of {count(modules, 'module')}: {paths.group_names(missing)}"


def _explain_prefix(first: str, names: Mapping[str, str], missing: Sequence[str], source: str) -> Finding:
    """Return the finding for modules whose names begin otherwise in the base."""
    there = names[first]
    text = f"the names have another prefix in {source}: {first} is {there} there"
    if len(there) > len(first):
        return error(
            "prefix",
            missing,
            text,
            "PEFT's names of the whole model, with its head",
            f"put {there.removesuffix(first)!r} before the names, after {PEFT_PREFIX!r}: jaxadapt rename --base",
        )
    prefix = first.removesuffix(there).rstrip(".")
    is_whole = {name.partition(".")[0] for name in names.values()} <= {"model", "transformer"}
    if prefix in _LEFT_OUT and not is_whole:  # transformers writes the files of a model without its head like this
        return note("other-prefix", missing, f"{text}, as in files of a model without its head")
    found = error if is_whole else warning  # a class that is not known here may leave out its prefix
    return found(
        "prefix", missing, text, "the names of the base's modules. With others, PEFT loads an adapter without effect",
        f"take {prefix + '.'!r} off the names: jaxadapt rename --base",
    )  # fmt: skip


def names_in_base(modules: Sequence[str], base: tensor_checks.Shapes | KeyMap) -> dict[str, str] | None:
    """Return {module: its name in the base}, also where transformers renamed it; None if one is not there.

    Args:
        modules: PyTorch's names of modules.
        base: as in `check_base`; a family's modules are recognized in each of its spellings, and keep their names.
    """
    if isinstance(base, KeyMap):
        return {m: m for m in modules} if all(_is_known(base, m) for m in modules) else None
    if all(_has_module(base, m) for m in modules):
        return {m: m for m in modules}
    keys = pytorch.match_model_keys(base, modules)  # with one beginning added to or removed from all
    by_name = {key.removesuffix(".weight"): leaf.removesuffix(".weight") for leaf, key in keys.items()}
    prefixed = {m: by_name[m] for m in modules} if all(m in by_name for m in modules) else None
    return _renamed_modules(modules, base) or prefixed


def _renamed_modules(modules: Sequence[str], base: tensor_checks.Shapes) -> dict[str, str] | None:
    """Return {module: its name in the base} by the renames of transformers; None if one has no or two counterparts."""
    names: dict[str, str] = {}
    for module in modules:
        candidates = {module} | {
            after + module.removeprefix(before)
            for pair in _RENAMES
            for before, after in (pair, pair[::-1])
            if module.startswith(before)
        }
        found = [name for name in candidates if _has_module(base, name)]
        if len(found) != 1:
            return None
        names[module] = found[0]
    return names


def _check_shapes(
    shapes: tensor_checks.Shapes, config: Config, base: tensor_checks.Shapes, names: Mapping[str, str]
) -> list[Finding]:
    """Compare the sizes of the tensors with the base's weights."""
    compared: list[tuple[str, str, tuple[int, ...], tuple[int, ...], str]] = []
    has_own_layout = config.get("use_qalora") or config.get("use_bdlora")
    by_tensors = pytorch.weight_shapes(shapes) if config.peft_type == "LORA" and not has_own_layout else {}
    for key, shape in by_tensors.items():
        module = key.removesuffix(".weight")
        have = base.get(f"{names.get(module, module)}.weight", shape)
        if sorted(have) != sorted(shape) and len(have) == len(shape):
            compared.append((module, module, shape, have, "by its tensors"))
    for key, shape in shapes.items():
        name = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(".token_adapter.", ".")
        have = base.get(name, shape)
        if tuple(have) != tuple(shape):
            compared.append((name, name.rpartition(".")[0], shape, have, "in the file"))
    texts: dict[bool, list[str]] = {True: [], False: []}
    for label, module, shape, have, where in compared:
        is_vocabulary = any(word in module.rpartition(".")[2] for word in _EMBEDDINGS) and have[1:] == shape[1:]
        texts[is_vocabulary].append(f"{label}: {list(shape)} {where}, {list(have)} in the base")
    return with_subjects(
        error(
            "vocabulary", texts[True], f"embeddings of another vocabulary: {first(texts[True])}",
            "as many rows as the base has tokens", "resize the base's embeddings to the adapter's number of rows"
            " before loading (resize_token_embeddings), or read with fit_vocabulary=True",
        ),
        error(
            "shape", texts[False], f"{count(texts[False], 'size')} unlike the base: {first(texts[False])}",
            "sizes of the base's weights", _IS_THE_BASE,
        ),
    )  # fmt: skip


def _check_completeness(
    modules: Collection[str], config: Config, base: tensor_checks.Shapes, source: str
) -> list[Finding]:
    """Find targets of the configuration in the base for which the file has no tensors."""
    if config.get("target_modules") is None or matching.is_all_linear(config) or config.peft_type != "LORA":
        return []
    candidates = [key.removesuffix(".weight") for key, s in base.items() if key.endswith(".weight") and len(s) > 1]
    absent = [m for m in candidates if m not in modules and matching.is_target(config, m)]
    if not any(map(SINGLE.fullmatch, modules)):  # transformers 5 joins single experts, and target_modules selects none
        absent = [m for m in absent if not SINGLE.fullmatch(m)]
    return with_subjects(error(
        "missing", absent, f"the file lacks {count(absent, 'module')} of {source} that target_modules selects",
        "tensors for every target",
        "save the adapter again where it was trained, or name the adapted modules exactly in target_modules",
    ))  # fmt: skip


def _check_family(modules: Sequence[str], keymap: KeyMap) -> Iterator[Finding]:
    """Compare the modules with the names of a family, in the spelling that fits best."""
    spellings = [keymap, *(keymap.with_spelling(name) for name, _ in keymap.spellings)]
    unknown = {s.name: [m for m in modules if not _is_known(s, m)] for s in spellings}
    best = min(unknown, key=lambda name: len(unknown[name]))
    if missing := unknown[best]:
        yield error(
            "base",
            missing,
            _no_place(keymap.name, missing, modules),
            "PyTorch's module names of the family",
            f"check the family and the prefix of the keys; `jaxadapt families {keymap.name}` lists the names",
        )
    elif best != keymap.name:
        yield note("renamed", modules, f"the names are those of {best}")


def _is_known(keymap: KeyMap, module: str) -> bool:
    heads = {head.removesuffix(".weight") for head, _ in keymap.tied}
    return module in heads or any(w.match_key(f"{module}.weight") is not None for w in keymap.weights)


# ---------------------------------------------------------------- base identity


def weight_names(stored: fingerprint.Fingerprint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str] | None:
    """Return {weight of a fingerprint: its name in a base}; None if the base lacks one."""
    names = names_in_base([key.removesuffix(".weight") for key in stored], shapes)
    return None if names is None else {f"{module}.weight": f"{name}.weight" for module, name in names.items()}


def check_identity(
    stored: fingerprint.Fingerprint, shapes: Mapping[str, tuple[int, ...]], base: str | os.PathLike[str]
) -> Iterator[Finding]:
    """Tell whether a base has the values of the base of the training.

    Args:
        stored: the fingerprint in the adapter's file.
        shapes: the shapes of the base's parameters.
        base: the folder or file of the base; a few values are read.
    """
    place = location.to_location(base)
    if place.suffix == ".json":
        return
    keys, found = weight_names(stored, shapes), None
    # The other checks report an error of the files, or the base is quantized.
    with contextlib.suppress(errors.FileError, errors.FormatError):
        if keys is not None:
            with hf_model.open_model(place) as tensors:
                hf_model.refuse_packed(tensors)
                found = fingerprint.of_file(tensors, keys)
    if found is None:
        yield note(
            "base-not-compared",
            stored,
            f"the values of {base} were not compared: it is quantized or lacks modules of the adapter",
        )
    elif different := fingerprint.differences(stored, found):
        yield error(
            "other-base", different, f"the adapter was trained on another base than {base}: {len(different)} of"
            f" {len(stored)} compared weights differ, such as {different[0]}", "the base of the training",
            "find the base that the adapter was trained on; on this one its outputs may be wrong",
        )  # fmt: skip
    else:
        yield note("base", stored, f"{base} is the base of the training, by {len(stored)} of its weights")


# ---------------------------------------------------------------- verify


def verify(path: str | os.PathLike[str], base: Any = None, *, progress: errors.Progress = None) -> list[Finding]:
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
        The findings, errors first. A sound adapter has only notes, about its method, ranks and scales.

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
    known_base = None if base is None else base_shapes(base)
    name = os.fspath(base) if isinstance(base, str | os.PathLike) else "the base"
    with errors.reporter(progress) as report, contextlib.ExitStack() as stack:
        stored = open_stored(path, stack, report)
        reading = read_stored(stored)
        found = [*reading.findings, *_check_content(stored, reading, base, known_base, name, report)]
        if isinstance(base, str | os.PathLike) and stored.fingerprint and not isinstance(known_base, KeyMap):
            found += check_identity(stored.fingerprint, known_base or {}, base)
    return sorted(found, key=lambda each: SEVERITIES.index(each.severity))


def _check_content(
    stored: StoredAdapter, reading: Reading, base: Any, known_base: Any, base_name: str, report: errors.Report
) -> list[Finding]:
    """Check the tensors, by their names in PEFT, and describe the adapter."""
    specs, tensors, config, keys = stored.specs, stored.tensors, reading.config, reading.keys
    if tensors is None or not keys:
        return [] if config is None or tensors is not None else [_describe_method(config, "the configuration of a ")]
    shapes = {name: specs[key][1] for name, key in keys.items()}
    dtypes = {name: specs[key][0] for name, key in keys.items()}
    # A .bin file may have the dtype C128, which safetensors lacks.
    sizes = [math.prod(shapes[name]) * safetensors.BITS.get(dtype, 128) // 8 for name, dtype in dtypes.items()]
    progress = errors.byte_counter(report, "verify", sum(sizes))

    def get(key: str) -> Any:
        value = tensors[key]
        progress(value.nbytes)
        return value

    if config is None:
        found = [_describe_tensors(guess_method(specs), shapes), *tensor_checks.check_empty(shapes)]
        return [*found, *tensor_checks.check_values(keys, {}, get, None)]
    modules, _ = tensor_checks.split_modules(shapes, config)
    adapted = [module for module in modules if module and module != "base_model"]
    found: list[Finding] = []
    if not reading.has_several:
        found += tensor_checks.check_tensors(shapes, config, base_family(base, known_base))
        if known_base is not None:
            found += check_base(shapes, adapted, config, known_base, base_name)
    found += tensor_checks.check_dtypes(dtypes, config)
    found += tensor_checks.check_values(keys, modules, get, config)
    text = f", {count(adapted, 'adapted module')}" if adapted else ""
    method = _describe_method(config, after=f", {count(shapes, 'tensor')}{text}")
    return [*found, method, *_describe_scales(modules, config)]


# ---------------------------------------------------------------- facts


def _describe_method(config: Config, before: str = "", after: str = "") -> Finding:
    base = f" for {config.base_model_name_or_path}" if config.base_model_name_or_path else ""
    return note("method", (config.peft_type,), f"{before}{config.peft_type} adapter{base}{after}")


def _describe_tensors(kind: str, shapes: tensor_checks.Shapes) -> Finding:
    """Describe the tensors of a file without a configuration."""
    splits = [split for key in shapes if (split := peft_tensors.split_key(key, kind)) is not None]
    ranks = sorted({shape[0] for key, shape in shapes.items() if shape and "lora_A" in key.split(".")})
    text = f", {len({module for module, _ in splits})} modules" if kind == "LORA" else ""
    text += f", rank {', '.join(map(str, ranks))}" if ranks else ""
    return note("method", (kind,), f"{len(shapes)} tensors of {kind or 'an unknown method'}{text}")


def _describe_scales(modules: tensor_checks.Modules, config: Config) -> Iterator[Finding]:
    """Yield one note for each pair of rank and scale."""
    settings = tensor_checks.module_settings(modules, config)
    for (rank, scale), members in sorted(
        paths.group((setting, module) for module, setting in settings.items()).items()
    ):
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in members}))
        yield note("scale", members, f"rank {rank} and scale {scale:.6g} in {count(members, 'module')} ({ends})")


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


def repair(
    path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, progress: errors.Progress = None
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
    with errors.reporter(progress) as report, contextlib.ExitStack() as stack:
        tensors, done = apply_fixes(open_stored(path, stack, report))
        if tensors is None:
            raise errors.MismatchError(
                f"{os.fspath(path)}: cannot be repaired with certainty:\n"
                + errors.bullets(f"{found.found}; {found.remedy}" for found in _problems(path))
            )
        if not done:
            return Repaired(None, (), _problems(path))
        new, old = (location.absolute(location.to_location(each)) for each in (target, path))
        if new in (old, old.parent if location.is_file(old) else old):  # the file is replaced
            tensors = dataclasses.replace(tensors, tensors=dict(tensors.tensors))
            stack.close()
        elif any(location.exists(location.to_location(target) / name) for name in (location.CONFIG, *location.WEIGHTS)):
            raise errors.FileError(
                f"{os.fspath(target)}: cannot write the repaired adapter here: the folder contains an adapter;"
                " choose another folder with out="
            )
        folder.write(tensors, target, progress=report)
    return Repaired(os.fspath(target), done, _problems(target))


def _default_target(path: str | os.PathLike[str]) -> str:
    if location.is_hub_address(path):
        raise errors.FileError(f"{os.fspath(path)}: pass out=, the folder to write the repaired adapter to")
    place = location.to_location(path)
    folder_path = place.parent if location.is_file(place) else place
    if isinstance(folder_path, Path) and folder_path.name in ("", ".."):  # "." and ".." have no name to add to
        folder_path = folder_path.resolve()
    return f"{os.fspath(folder_path).rstrip('/')}-repaired"


def _problems(path: str | os.PathLike[str]) -> tuple[Finding, ...]:
    return tuple(found for found in verify(path) if found.severity != "note")
