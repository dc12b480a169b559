"""Merge adapters into the files of models, with PyTorch's names and without a model.

PEFT adapts the token embedding and the head as two modules, although they share one weight in many models. A merged
weight that is correct for one of them is wrong for the other, so the merged model needs two tensors.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from jaxadapt.adapters import sites
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.arrays import regions
from jaxadapt.arrays.tensor_source import (
    TensorSource,
    as_source,
    bitwise_same,
    dtype_name,
    float_dtype,
    is_float,
    numpy_dtype,
    rename,
)
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import (
    LOGGER,
    ConfigError,
    FileError,
    FormatError,
    MismatchError,
    Progress,
    Report,
    met,
    reporter,
)
from jaxadapt.export import base_files, conversion, gguf_files
from jaxadapt.keymaps import families, pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.merging import base_merge
from jaxadapt.persistence import fingerprint, folder, load_adapter, verify_folder
from jaxadapt.storage import atomic, hf_model, location

# ---------------------------------------------------------------- tied embeddings


_HEADLESS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
"""Suffixes of transformers' classes without a head over the tokens."""

Pairs = tuple[tuple[str, str], ...]
"""`((head key, embedding key), …)`."""


@dataclasses.dataclass(frozen=True)
class UntiedBase:
    """The tensors of a model's folder, untied if the adapter needs it.

    Attributes:
        tensors: the tensors, with a separate head if `is_untied`.
        tied: `(head, embedding)` of the tensors that stay tied, with the adapter's names.
        is_untied: True if the head has a separate tensor, so that config.json must not tie it.
    """

    tensors: TensorSource
    tied: Pairs = ()
    is_untied: bool = False


def untie_base(
    base_tensors: TensorSource, path: location.Location, adapter: PeftTensors, ties_head: bool | None = None
) -> UntiedBase:
    """Return the tensors of a model's folder, with a separate head if the adapter changes only the head or embedding.

    Args:
        base_tensors: the folder's tensors.
        path: its config.json, which may be missing.
        adapter: the adapter to merge.
        ties_head: True if the head is tied to the embedding. Default: as config.json states.

    Raises:
        MismatchError: the folder does not state whether the two are tied, or the head's name is unknown.
    """
    adapted = pytorch.adapted_shapes(as_source(adapter.tensors).shapes)
    adapter_names = _adapter_names(base_tensors.shapes, adapted)
    known = _find_group(adapter_names)
    if known is None:
        return _without_group(base_tensors, path, adapter, adapted, adapter_names)
    group, names = known
    file_keys = {name: key for key, name in adapter_names.items()}
    without_head = tuple(pair for pair in group if pair[0] not in file_keys)
    pairs = [pair for pair in group if pair[0].endswith(".weight")]
    changed, rows = _changed_weights(adapter, adapted, pairs)
    if not changed and rows.isdisjoint(dict(pairs).values()):
        return UntiedBase(base_tensors, without_head)
    tied = hf_model.read_tied(path) if ties_head is None else ties_head
    equal, different = _compare_heads(base_tensors, pairs, file_keys)
    outcome = _decide(
        tied=tied,
        changes=_describe_change(changed, rows, pairs, bool(adapter.config.get("ensure_weight_tying"))),
        head=_HEADS[bool(equal), bool(different)],
        more=len(pairs) > 1 and _place_of_changed(changed, without_head),
    )
    if outcome in _PROBLEMS:
        reason = _PROBLEMS[outcome](path, pairs, (different or pairs)[0])
        weights = " and ".join(sorted(changed or rows))
        raise MismatchError(f"{adapter.source}: cannot merge changes of {weights}, because {reason}")
    if outcome == "tie":
        return _tie(base_tensors, without_head, equal, file_keys)
    is_headless = ties_head is None and pairs[0][0] not in changed and _is_headless(path)
    if outcome == "keep" or (outcome == "add" and is_headless):
        return UntiedBase(base_tensors)
    if outcome == "add":
        more = {head: file_keys[table] for head, table in without_head}
        base_tensors = rename(base_tensors, {name: leaf for leaf, name in names.items()} | more)
    return UntiedBase(base_tensors, is_untied=True)


def _compare_heads(
    base_tensors: TensorSource, pairs: Sequence[tuple[str, str]], keys: Mapping[str, str]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the heads in the folder that equal their embeddings, and those that differ; `keys` are the folder's."""
    stored = {
        pair: bitwise_same(base_tensors[keys[pair[0]]], base_tensors[keys[pair[1]]])
        for pair in pairs
        if pair[0] in keys
    }
    return [pair for pair, same in stored.items() if same], [pair for pair, same in stored.items() if not same]


def _tie(
    base_tensors: TensorSource, absent: Pairs, equal: Sequence[tuple[str, str]], keys: Mapping[str, str]
) -> UntiedBase:
    """Return the tensors without the heads that equal their embeddings; `keys` are those of the folder."""
    duplicates = {keys[head] for head, _ in equal}
    return UntiedBase(
        rename(base_tensors, {key: key for key in base_tensors if key not in duplicates}), (*absent, *equal)
    )


def _decide(tied: bool | None, changes: str, head: str, more: bool | str) -> str:
    """Return what becomes of a head: the outcome of the first row of the table whose values include the case.

    Args:
        tied: what config.json states; None if it is ambiguous.
        changes: "together", of head and embedding as of one (PEFT recognizes embeddings by two names only, and writes
            those that it ties under both names); "rows", of the embedding alone, which the head shares; "apart rows",
            of the embedding, beside other changes; "apart".
        head: the head in the folder beside the embedding: "absent", "equal", "different", or "both" for several heads.
        more: for more heads than one: "absent" if a changed one is absent, else "stored"; False for one head.
    """
    case = {"tied": tied, "changes": changes, "head": head, "more": more}
    return next(outcome for values, outcome in _OUTCOMES if all(case[name] in of for name, of in values.items()))


_HEADS = {
    (False, False): "absent", (True, False): "equal", (False, True): "different", (True, True): "both",
}  # fmt: skip
_TOGETHER = ("together", "rows")
_OUTCOMES: tuple[tuple[Mapping[str, tuple[Any, ...]], str], ...] = (
    ({"tied": (False,), "changes": ("together",)}, "keep"),
    ({"tied": (False,), "more": (False, "stored")}, "keep"),
    ({"tied": (True,), "head": ("different", "both")}, "contradiction"),
    ({"tied": (None,), "changes": _TOGETHER, "head": ("equal", "both")}, "ambiguous"),
    ({"changes": _TOGETHER}, "tie"),
    ({"more": ("absent", "stored")}, "shared"),
    ({"changes": ("apart rows",)}, "shared rows"),
    ({"head": ("equal", "different")}, "untie"),
    ({"tied": (None,)}, "ambiguous"),
    ({}, "add"),
)
"""The first row whose values include the case decides: tie the head, keep the tensors, untie or add the head."""

_Problem = Callable[[location.Location, Sequence[tuple[str, str]], tuple[str, str]], str]
_PROBLEMS: Mapping[str, _Problem] = {
    "ambiguous": lambda path, pairs, _: (
        f"{path} does not state whether {' and '.join(dict.fromkeys(key for pair in pairs for key in pair))} are tied."
        f" Set {hf_model.TIE_FIELD} in it to true or false (also in its text_config, if it has one)"
    ),
    "contradiction": lambda path, _, pair: (
        f"the base's folder contradicts itself: {path} ties the head to the embedding ({hf_model.TIE_FIELD}), but"
        f" {' and '.join(pair)} differ. Set {hf_model.TIE_FIELD} to false to keep {pair[0]}, or remove that tensor"
    ),
    "shared": lambda *_: (
        "other modules share this weight and no config.json unties all of them in such a model. Keep the adapter"
        " unmerged, or train it with ensure_weight_tying"
    ),
    "shared rows": lambda _, pairs, __: (
        f"trainable_token_indices changes rows of {pairs[0][1]} and the head shares them: no tensor is correct for"
        " both. Keep the adapter unmerged"
    ),
}
"""{outcome: the reason, from config.json, the pairs of head and embedding, and the first pair that differs}."""


def _adapter_names(shapes: Mapping[str, tuple[int, ...]], adapted: Iterable[str]) -> dict[str, str]:
    """Return `{key in the folder: the adapter's name for it}`, from the modules that the adapter adapts."""
    heads = {head for group, _ in _groups() for head, _ in group}
    return pytorch.match_model_keys(shapes, [module for module in adapted if f"{module}.weight" not in heads])


def _without_group(
    base_tensors: TensorSource,
    path: location.Location,
    adapter: PeftTensors,
    adapted: Mapping[str, Collection[str]],
    adapter_names: Mapping[str, str],
) -> UntiedBase:
    """Return the tensors of a model whose tied weights no family names.

    Args:
        path: the model's config.json.
        adapted: `{module: names of its tensors}` of the adapter.
        adapter_names: `{key in the folder: the adapter's name for it}`.
    """
    lookups = [module for module, names in adapted.items() if "lora_embedding_A" in names]
    if adapter.config.get("ensure_weight_tying"):
        missing = [f"{module}.weight" for module in adapted if f"{module}.weight" not in adapter_names.values()]
        one = lookups if len(lookups) == 1 else []
        return UntiedBase(base_tensors, tuple((head, f"{module}.weight") for head in missing for module in one))
    shapes = {adapter_names[key]: shape for key, shape in base_tensors.shapes.items()}
    _refuse_unknown_head(adapter, path, shapes, lookups)
    return UntiedBase(base_tensors)


def _refuse_unknown_head(
    adapter: PeftTensors, path: location.Location, shapes: Mapping[str, Sequence[int]], lookups: Sequence[str]
) -> None:
    """Raise `MismatchError` if an adapted embedding may be tied to a head of unknown name.

    Args:
        adapter: the adapter to merge.
        path: the model's config.json.
        shapes: the shapes of the folder's tensors, by the adapter's names.
        lookups: the modules that the adapter changes as embeddings.
    """
    saved = [
        module
        for key, shape in shapes.items()
        if len(shape) == 2
        and (module := key.removesuffix(".weight")).rpartition(".")[2] in sites.INPUTS
        and matching.is_saved(adapter.config, module)
    ]
    embeddings = [f"{module}.weight" for module in (*lookups, *saved) if f"{module}.weight" in shapes]
    unresolved = [
        key
        for key in embeddings
        if not any(shapes[key][0] in shape and len(shape) == 2 for other, shape in shapes.items() if other != key)
    ]
    if unresolved and hf_model.read_tied(path) is not False:
        raise MismatchError(
            f"{adapter.source}: cannot merge changes of a token embedding, because it may be tied to the head"
            f" ({hf_model.TIE_FIELD} in {path}) and the name of this model's head is unknown:\n"
            + paths.bullets(unresolved)
            + "\nAdd a tensor for the head to the base (a copy of the embedding), set"
            f" {hf_model.TIE_FIELD} to false and merge"
        )


def _changed_weights(
    adapter: PeftTensors, adapted: Collection[str], pairs: Sequence[tuple[str, str]]
) -> tuple[set[str], set[str]]:
    """Return the heads and embeddings that an adapter changes, and the weights whose rows it changes."""
    saved = {key.removeprefix(PEFT_PREFIX) for key in adapter.tensors}
    rows = {f"{module}.weight" for module in pytorch.token_row_modules(adapter.tensors)}
    changed = {
        key
        for pair in pairs
        for key in pair
        if (module := key.removesuffix(".weight")) in adapted or matching.is_saved(adapter.config, module)
    }
    # With ensure_weight_tying, the configuration lists only embeddings.
    ensured = saved if adapter.config.get("ensure_weight_tying") else set[str]()
    # TRAINABLE_TOKENS repeats the rows of one weight under the head's name: `drop_repeats` refuses others.
    return changed | {
        head
        for head, table in pairs
        if head in ensured or (head in rows and (table not in rows or adapter.config.get("token_indices") is None))
    }, rows


def _place_of_changed(changed: Collection[str], absent: Pairs) -> str:
    """Return "absent" if a head that the folder lacks is changed, or its embedding; else "stored"."""
    return "absent" if any(key in changed for pair in absent for key in pair) else "stored"


def _describe_change(
    changed: Collection[str], rows: Collection[str], pairs: Sequence[tuple[str, str]], ensures_tying: bool
) -> str:
    """Return the field `changes` of a case with changes."""
    if ensures_tying and any(head in changed and table in changed for head, table in pairs):
        return "together"
    if not changed:
        return "rows"
    return "apart rows" if any(table in rows and head not in rows for head, table in pairs) else "apart"


def resolve_untied_config(config: Config, base: UntiedBase) -> Config:
    """Return the adapter's configuration for the base: without tying if `is_untied`, without rows of tied heads."""
    if base.is_untied and config.get("ensure_weight_tying"):
        config = config.replace(ensure_weight_tying=False)
    rows: Any = config.get("trainable_token_indices")
    if isinstance(rows, Mapping):
        heads = tuple(head.removesuffix(".weight") for head, _ in base.tied)
        kept = {name: indices for name, indices in rows.items() if not any(head.endswith(name) for head in heads)}
        config = config.replace(trainable_token_indices=kept)
    return config


@functools.cache
def _groups() -> tuple[tuple[Pairs, bool], ...]:
    """Return the tied keys of each family, each with True if the names are of a model without its head."""
    groups: dict[Pairs, bool] = {}
    for family in families.FAMILIES.values():
        for name, keymap in ((name, family.with_spelling(name)) for name, _ in family.spellings):
            groups.setdefault(keymap.tied, name == "bare")
        groups[family.tied] = False
    return tuple((pairs, is_bare) for pairs, is_bare in groups.items() if pairs)


def _find_group(adapter_names: Mapping[str, str]) -> tuple[Pairs, Mapping[str, str]] | None:
    """Return the model's tied keys with the adapter's names (none without a head), and the names of its tensors.

    Args:
        adapter_names: `{key in the folder: the adapter's name for it}`. Names of a model with a head are preferred.
    """
    for is_bare, names in ((False, adapter_names), (False, {key: key for key in adapter_names}), (True, adapter_names)):
        keys = {name: key for key, name in names.items()}
        for group, bare in _groups():
            if bare == is_bare and all(same in keys for _, same in group):
                renamed = tuple((head, adapter_names[keys[same]]) for head, same in group)
                return () if bare else renamed, names
    return None


def _is_headless(path: location.Location) -> bool:
    """Return True if the folder's model class has no head over the tokens."""
    classes: Any = (hf_model.read_model_config(path) or {}).get("architectures")
    return (
        isinstance(classes, list)
        and bool(classes)
        and all(str(name).endswith(_HEADLESS) for name in cast("list[Any]", classes))
    )


# ---------------------------------------------------------------- merge


def merge_folder(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: Any = None,
    max_shard_size: int = base_files.SHARD,
    allow_nan: bool = False,
    progress: Progress = None,
) -> int:
    """Merge an adapter into the model of a Hugging Face folder and write the result to another folder.

    Warns if the adapter was trained on another base, as far as the fingerprint in its file tells.

    One tensor is in memory at a time, besides the base weights that the adapter's file contains. If the output head
    and the token embedding are tied (`tie_word_embeddings`) and the adapter changes only one of them, the head gets a
    separate tensor and config.json unties them.

    Args:
        base: the model's folder, or its file of weights.
        adapter: the adapter's folder or address.
        out: the folder to write to; configuration and tokenizer are copied into it.
        dtype: the dtype of the tensors, also recorded in config.json. Default: the base's. Sums are computed in float32
            and rounded once.
        max_shard_size: the largest size of one file, in bytes.
        allow_nan: accept a NaN or an infinity in the adapter, the base and the result.
        progress: None, True (bars on a terminal or in a notebook) or a function of ("merge", bytes done, total bytes),
            also called while the adapter is read.

    Returns:
        The number of changed weights.

    Raises:
        AdapterError: something does not fit. Then nothing is written.
    """
    with atomic.clean_target(out), reporter(progress) as report:
        source, target = location.to_location(base), location.to_location(out)
        base_folder = source.parent if location.is_file(source) else source
        _refuse_target(
            target,
            {
                "a .gguf file is written only for a base that is one; merge into a folder, and convert that with"
                " llama.cpp's converter": target.suffix == ".gguf",
                "this is the base model; choose another folder": location.is_same(base_folder, target),
                "the folder contains an adapter, which transformers would load instead; choose another folder": (
                    location.exists(target / location.CONFIG)
                ),
            },
        )
        with hf_model.open_model(source) as base_tensors:
            hf_model.refuse_packed(base_tensors)
            plan = plan_merge(
                base_tensors, base_folder / hf_model.CONFIG, _read_adapter(adapter, base_tensors, allow_nan, report)
            )
            new = None if dtype is None else float_dtype(dtype)
            specs = {
                key: (dtype_name(spec.dtype if new is None or not is_float(spec.dtype) else new), spec.shape)
                for key, spec in plan.base_tensors.specs.items()
            }

            def read(key: str) -> Any:
                value = plan.value(key, unrounded=new is not None)
                with np.errstate(over="ignore"):  # an overflow to infinity raises an error with the tensor's name
                    return value.astype(numpy_dtype(specs[key][0]), copy=False)

            def not_finite_error(keys: list[str]) -> MismatchError:
                names = [f"{key}{'' if regions.is_finite(plan.base_tensors[key]) else ', of the base'}" for key in keys]
                return MismatchError(
                    f"{target}: in the merged model"
                    f" {regions.not_finite_message(names, conversion.ALLOW.format('merge'))}"
                )

            others = hf_model.read_other_files(source, None if new is None else new.name, plan.is_untied)
            total = base_files.write_folder(
                target, specs, read, None if allow_nan else not_finite_error, max_shard_size, others, "merge", report
            )
    LOGGER.info("%s: %d of %d tensors changed, %d bytes", target, plan.count, len(specs), total)
    return plan.count


def _refuse_target(target: location.Location, problems: Mapping[str, bool]) -> None:
    """Raise `FileError` with the first problem that the target of a merge has."""
    for problem in met(problems):
        raise FileError(f"{target}: cannot write the merged model here: {problem}")


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """The tensors of a model's files and those that an adapter changes.

    Attributes:
        base_tensors: the model's tensors, with a separate head if the adapter needs one.
        changed: the changed tensors by key.
        count: the number of changed weights.
        is_untied: True if the head has a separate tensor that the model's files lack.
    """

    base_tensors: TensorSource
    changed: Mapping[str, base_merge.ChangedLeaf]
    count: int
    is_untied: bool

    def value(self, key: str, *, unrounded: bool) -> Any:
        """Return a tensor of the merged model; a changed one in float32 if `unrounded`."""
        value = self.base_tensors[key]
        if key not in self.changed:
            return value
        return np.asarray(self.changed[key].with_base(value).value(unrounded=unrounded))


def plan_merge(
    base_tensors: TensorSource, config: location.Location, tensors: PeftTensors, tied: bool | None = None
) -> MergePlan:
    """Plan the merge of an adapter into a model's files.

    Args:
        base_tensors: the model's tensors, with PyTorch's names and layouts.
        config: its config.json, which may be missing.
        tensors: the adapter.
        tied: True if the head is tied to the embedding. Default: as `config` states.

    Raises:
        AdapterError: the adapter does not fit.
    """
    refused = {
        "target_parameters": "the files of an adapter with target_parameters, because they do not contain the layout of"
        " these parameters in the model",
        "layer_replication": "an adapter that repeats layers of its base (layer_replication), because the folder of the"
        " base contains each layer once",
    }
    for field, reason in refused.items():
        if tensors.config.get(field):
            raise ConfigError(
                f"{tensors.source}: cannot merge {reason}; call jaxadapt.export.export_base(model, folder, adapter),"
                " which merges it into a model in memory"
            )
    untied = untie_base(base_tensors, config, tensors, tied)
    tensors = dataclasses.replace(tensors, config=resolve_untied_config(tensors.config, untied))
    specs = {key: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for key, spec in untied.tensors.specs.items()}
    keymap = load_adapter.base_keymap(tensors, untied.tensors.shapes, untied.tied)
    repeated = {key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".") for key in tensors.tensors}
    # The weights that the adapter repeats are compared with the base's.
    compared = [k for k in specs if (match := keymap.match(k)) and ".".join(match.parameter({})) in repeated]
    params = paths.unflatten(specs | {key: untied.tensors[key] for key in compared})
    loaded = load_adapter.from_peft(tensors, params, keymap=keymap)
    return MergePlan(untied.tensors, base_merge.plan_changes(specs, loaded), len(loaded.sites), untied.is_untied)


# ---------------------------------------------------------------- merge gguf


_FIELDS = {
    "F32": {"general.file_type": gguf_files.Field(0, "UINT32")},
    "F16": {"general.file_type": gguf_files.Field(1, "UINT32")},
    "BF16": {"general.file_type": gguf_files.Field(32, "UINT32")},
    "Q8_0": {
        "general.file_type": gguf_files.Field(7, "UINT32"),
        "general.quantization_version": gguf_files.Field(2, "UINT32"),
    },
}
"""{type of the matrices: fields of the file}, with llama.cpp's numbers of the types."""
_FLOATS = {"F32", "F16", "BF16"}
"""The types whose values are those of the model; the others are quantized."""


def merge_gguf(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    allow_nan: bool = False,
    progress: Progress = None,
) -> int:
    """Merge an adapter of any method into the model of a GGUF file and write another GGUF file.

    The matrices are dequantized to float32, changed, and rounded once to `dtype`. Vectors stay float32, and so does the
    table of positions. A matrix whose rows do not divide into blocks of 32 is float16 instead of q8_0. All other fields
    of the file stay, the tokenizer's included. One tensor is in memory at a time.

    Args:
        base: the GGUF file of the model.
        adapter: the adapter's folder or address.
        out: the file to write.
        dtype: "float32", "float16", "bfloat16" or "q8_0". Default: that of the base, if it is one of them.
        allow_nan: accept a NaN or an infinity in the adapter.
        progress: as in `merge_folder`.

    Returns:
        The number of changed weights.

    Raises:
        AdapterError: something does not fit. Then nothing is written.
    """
    with atomic.clean_target(out), reporter(progress) as report:
        source, target = location.to_location(base), location.to_location(out)
        _refuse_target(
            target,
            {
                "expected a file name ending in .gguf": target.suffix != ".gguf",
                "this is the base model; choose another file": location.is_same(source, target),
            },
        )
        file = gguf_files.File(source)
        tensors = gguf_files.GgufTensors(file, gguf_files.gguf_base(file))
        kind = _matrix_kind(file, dtype)
        exact = tensors if {tensor.kind for tensor in file.tensors.values()} <= _FLOATS else None
        plan = plan_merge(tensors, source, _read_adapter(adapter, exact, allow_nan, report), tensors.base.tied)
        added = {"output.weight": "lm_head.weight"} if plan.is_untied else {}
        keys = {name: key for key, name in tensors.names.items()} | added
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()} | {
            name: plan.base_tensors.shapes[key] for name, key in added.items()
        }
        fields = {name: field for name, field in file.fields.items() if name != "general.architecture"} | _FIELDS[kind]

        def get(name: str) -> np.ndarray:
            key = keys.get(name, "")
            if key not in plan.changed and name in file.tensors:
                return file.read(name)
            values = tensors.to_gguf(key, plan.value(key, unrounded=True))
            if not allow_nan and not np.isfinite(values).all():
                raise MismatchError(
                    f"{target}: the merged tensor {name} has a NaN or an infinity; check the values of the adapter and"
                    " the base, or pass allow_nan=True (`--allow-nan`)"
                )
            return values

        specs = {name: (_kind(name, shape, kind), shape) for name, shape in shapes.items()}
        gguf_files.write(target, tensors.base.architecture.name, fields, specs, get, report, "merge")
    LOGGER.info("%s: %d of %d tensors changed", target, plan.count, len(specs))
    return plan.count


def _matrix_kind(file: gguf_files.File, dtype: str | None) -> str:
    if dtype is not None:
        return gguf_files.TYPES[dtype]
    found = collections.Counter(tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1)
    if not found:
        raise FormatError(f"{file.path}: expected the matrices of a model, found none")
    ((most, _),) = found.most_common(1)
    if most not in gguf_files.TYPES.values():
        raise ConfigError(
            f"{file.path}: its matrices are {most}, which cannot be written; pass dtype= (`--dtype`):"
            f" {', '.join(gguf_files.TYPES)}"
        )
    return most


def _kind(name: str, shape: Any, matrices: str) -> str:
    if len(shape) < 2 or name == "position_embd.weight":
        return "F32"
    return "F16" if matrices == "Q8_0" and shape[-1] % 32 else matrices


def _read_adapter(
    path: str | os.PathLike[str], base: TensorSource | None, allow_nan: bool, report: Report
) -> PeftTensors:
    """Read the adapter to merge. Warn if it was trained on another base, as far as the fingerprint in its file tells.

    Of `base`, 8 weights are read; None for quantized weights, whose values differ.
    """
    tensors = folder.read(path, progress=report)
    if not allow_nan:
        conversion.refuse_nan([tensors], "merge")
    stored = tensors.fingerprint or {}
    if base is not None:
        names = verify_folder.weight_names(stored, base.shapes) or {}
        parts = [fingerprint.of_file(as_source({name: base[name]}), {key: name}) for key, name in names.items()]
        if parts and None not in parts:
            fingerprint.check(
                stored, {k: x for part in parts for k, x in (part or {}).items()}, tensors.source, strict=False
            )
    return tensors
