"""Tied embeddings of a model's folder: give the output head a separate tensor if an adapter needs one.

PEFT adapts the token embedding and the head as two modules, although they share one weight. A merged weight that is
correct for one of them is wrong for the other, so the merged model needs two tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

from jaxadapt.adapters import sites
from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.arrays.tensor_source import TensorSource, as_source, rename
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import FormatError, MismatchError
from jaxadapt.keymaps import families, pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.storage import local_files
from jaxadapt.storage.location import Location

FIELD = "tie_word_embeddings"
"""The field of config.json that ties the head to the embedding."""

DEFAULTS: Mapping[str, bool] = {
    **dict.fromkeys(
        "bert bloom cohere cohere2 falcon gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gpt2"
        " gpt_bigcode gpt_neo opt paligemma roberta smollm3 starcoder2 whisper xlm-roberta".split(),
        True,
    ),
    **dict.fromkeys(
        "deepseek_v2 deepseek_v3 glm glm4 gpt_neox gpt_oss gptj granite llama llama4 llama4_text llava mistral mixtral"
        " nemotron olmo olmo2 olmo3 olmoe phi phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_moe"
        " qwen3_next qwen3_vl stablelm".split(),
        False,
    ),
}
"""The default of the field by model type."""

_HEADLESS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
"""Suffixes of transformers' classes without a head over the tokens."""

Pairs = tuple[tuple[str, str], ...]
"""`((head key, embedding key), …)`."""


def read_model_config(path: Location) -> dict[str, Any] | None:
    """Read the fields of a config.json; return None if the file does not exist."""
    try:
        document: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise local_files.file_error("read", str(path), error) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected JSON, but reading failed: {error}") from error
    if not isinstance(document, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return cast("dict[str, Any]", document)


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Return True if a config.json ties the head to the token embedding, None if it is ambiguous.

    transformers 5 reads the field beside `text_config`, transformers 4 the field in it. Without the field, both use the
    default of the model type.

    >>> is_tied({"model_type": "gpt2"}), is_tied({"model_type": "llama"}), is_tied({"model_type": "gpt2", FIELD: False})
    (True, False, False)
    """
    text, outer = config.get("text_config"), _tie_field(config)
    if outer is None:
        outer = DEFAULTS.get(str(config.get("model_type")))
    inner = _tie_field(cast("Mapping[str, Any]", text)) if isinstance(text, Mapping) else None
    return outer if inner is None or inner == outer else None


def _tie_field(config: Mapping[str, Any]) -> bool | None:
    value = config.get(FIELD)
    return value if isinstance(value, bool) else None


def untie_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json with the head untied from the embedding."""
    text: Any = config.get("text_config")
    inner = {"text_config": {**text, FIELD: False}} if isinstance(text, Mapping) else {}
    return {**config, **inner, FIELD: False}


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
    base_tensors: TensorSource, path: Location, adapter: PeftTensors, ties_head: bool | None = None
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
    adapter_names = _adapter_names(base_tensors.shapes, adapter)
    known = _find_group(adapter_names)
    if known is None:
        return _without_group(base_tensors, path, adapter, adapter_names)
    group, names = known
    file_keys = {name: key for key, name in adapter_names.items()}
    without_head = tuple(pair for pair in group if pair[0] not in file_keys)
    pairs = [pair for pair in group if pair[0].endswith(".weight")]
    changed, rows = _changed_weights(adapter, pairs)
    if not changed and rows.isdisjoint(dict(pairs).values()):
        return UntiedBase(base_tensors, without_head)
    tied = read_tied(path) if ties_head is None else ties_head
    equal, different = _compare_heads(base_tensors, pairs, file_keys)
    case = _Case(
        tied,
        _describe_change(changed, rows, pairs, bool(adapter.config.get("ensure_weight_tying"))),
        _HEADS[bool(equal), bool(different)],
        len(pairs) > 1 and _place_of_changed(changed, without_head),
    )
    outcome = case.outcome()
    if outcome in _PROBLEMS:
        weights, reason = (
            " and ".join(sorted(changed or rows)),
            _PROBLEMS[outcome](path, pairs, (different or pairs)[0]),
        )
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
    stored = {pair: bitwise_same(base_tensors, keys[pair[0]], keys[pair[1]]) for pair in pairs if pair[0] in keys}
    return [pair for pair, same in stored.items() if same], [pair for pair, same in stored.items() if not same]


def _tie(
    base_tensors: TensorSource, absent: Pairs, equal: Sequence[tuple[str, str]], keys: Mapping[str, str]
) -> UntiedBase:
    """Return the tensors without the heads that equal their embeddings; `keys` are those of the folder."""
    duplicates = {keys[head] for head, _ in equal}
    return UntiedBase(
        rename(base_tensors, {key: key for key in base_tensors if key not in duplicates}), (*absent, *equal)
    )


class _Case(NamedTuple):
    """The facts that decide what becomes of a head.

    Attributes:
        tied: what config.json states; None if it is ambiguous.
        changes: "together", of head and embedding as of one (PEFT recognizes embeddings by two names only, and writes
            those that it ties under both names); "rows", of the embedding alone, which the head shares; "apart rows",
            of the embedding, beside other changes; "apart".
        head: the head in the folder beside the embedding: "absent", "equal", "different", or "both" for several heads.
        more: for more heads than one: "absent" if a changed one is absent, else "stored"; False for one head.
    """

    tied: bool | None
    changes: str
    head: str
    more: str | bool

    def outcome(self) -> str:
        """Return the outcome of the first row of the table whose values include the case."""
        fields = self._asdict()
        rows = ((all(fields[name] in of for name, of in values.items()), outcome) for values, outcome in _OUTCOMES)
        return next(outcome for matches, outcome in rows if matches)


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

_Problem = Callable[[Location, Sequence[tuple[str, str]], tuple[str, str]], str]
_PROBLEMS: Mapping[str, _Problem] = {
    "ambiguous": lambda path, pairs, _: (
        f"{path} does not state whether {' and '.join(dict.fromkeys(key for pair in pairs for key in pair))} are tied."
        f" Set {FIELD} in it to true or false (also in its text_config, if it has one)"
    ),
    "contradiction": lambda path, _, pair: (
        f"the base's folder contradicts itself: {path} ties the head to the embedding ({FIELD}), but"
        f" {' and '.join(pair)} differ. Set {FIELD} to false to keep {pair[0]}, or remove that tensor"
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


def _adapter_names(shapes: Mapping[str, tuple[int, ...]], adapter: PeftTensors) -> dict[str, str]:
    """Return `{key in the folder: the adapter's name for it}`."""
    heads = {head for group, _ in _groups() for head, _ in group}
    adapted = pytorch.adapted_shapes(as_source(adapter.tensors).shapes)
    return pytorch.match_model_keys(shapes, [module for module in adapted if f"{module}.weight" not in heads])


def _without_group(
    base_tensors: TensorSource, path: Location, adapter: PeftTensors, adapter_names: Mapping[str, str]
) -> UntiedBase:
    """Return the tensors of a model whose tied weights no family names."""
    adapted = pytorch.adapted_shapes(as_source(adapter.tensors).shapes)
    lookups = [module for module, names in adapted.items() if "lora_embedding_A" in names]
    if adapter.config.get("ensure_weight_tying"):
        missing = [f"{module}.weight" for module in adapted if f"{module}.weight" not in adapter_names.values()]
        one = lookups if len(lookups) == 1 else []
        return UntiedBase(base_tensors, tuple((head, f"{module}.weight") for head in missing for module in one))
    shapes = {adapter_names[key]: shape for key, shape in base_tensors.shapes.items()}
    _refuse_unknown_head(adapter, path, shapes, lookups)
    return UntiedBase(base_tensors)


def _changed_weights(adapter: PeftTensors, pairs: Pairs | Sequence[tuple[str, str]]) -> tuple[set[str], set[str]]:
    """Return the heads and embeddings that an adapter changes, and the weights whose rows it changes."""
    shapes = as_source(adapter.tensors).shapes
    adapted, saved = pytorch.adapted_shapes(shapes), {key.removeprefix(PEFT_PREFIX) for key in shapes}
    rows = {f"{module}.weight" for module in pytorch.token_row_modules(shapes)}
    changed = {
        key
        for pair in pairs
        for key in pair
        if (module := key.removesuffix(".weight")) in adapted or matching.is_saved(adapter.config, module)
    }
    # With ensure_weight_tying, the configuration lists only embeddings.
    ensured = saved if adapter.config.get("ensure_weight_tying") else set[str]()
    return changed | {head for head, _ in pairs if head in rows or head in ensured}, rows


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
    file_names = {key: key for key in adapter_names}
    for is_bare, names in ((False, adapter_names), (False, file_names), (True, adapter_names)):
        keys = {name: key for key, name in names.items()}
        for group, bare in _groups():
            if bare == is_bare and all(same in keys for _, same in group):
                renamed = tuple((head, adapter_names[keys[same]]) for head, same in group)
                return () if bare else renamed, names
    return None


def read_tied(path: Location) -> bool | None:
    """Return what `is_tied` says of a config.json; None if the file does not exist."""
    config = read_model_config(path)
    return None if config is None else is_tied(config)


def _is_headless(path: Location) -> bool:
    """Return True if the folder's model class has no head over the tokens."""
    classes: Any = (read_model_config(path) or {}).get("architectures")
    return (
        isinstance(classes, list)
        and bool(classes)
        and all(str(name).endswith(_HEADLESS) for name in cast("list[Any]", classes))
    )


def bitwise_same(base_tensors: TensorSource, a: str, b: str) -> bool:
    """Return True if two tensors are equal bit for bit."""
    x, y = base_tensors[a], base_tensors[b]
    return x.dtype == y.dtype and x.shape == y.shape and bool((x.view("uint8") == y.view("uint8")).all())


def _refuse_unknown_head(
    adapter: PeftTensors, path: Location, shapes: Mapping[str, Sequence[int]], lookups: Sequence[str]
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
    if unresolved and read_tied(path) is not False:
        raise MismatchError(
            f"{adapter.source}: cannot merge changes of a token embedding, because it may be tied to the head ({FIELD}"
            f" in {path}) and the name of this model's head is unknown:\n"
            + paths.bullets(unresolved)
            + f"\nAdd a tensor for the head to the base (a copy of the embedding), set {FIELD} to false and merge"
        )
