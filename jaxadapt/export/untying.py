"""A model's folder whose head is tied to its table of tokens, and a head of its own where an adapter needs one.

PEFT adapts the table and the head as two modules, though they share one weight. A sum that is right for one of them
is wrong for the other, so a merged model needs two tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from jaxadapt.adapters import full_copies
from jaxadapt.adapters.adapter import PeftTensors
from jaxadapt.configs import Config, matching
from jaxadapt.core import paths
from jaxadapt.core.errors import FormatError, MismatchError
from jaxadapt.keymaps import families, pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.storage import hf_model, local_files
from jaxadapt.storage.location import Place

FIELD = "tie_word_embeddings"
"""The field of config.json that ties them."""

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
"""What a model type means by a config.json without the field."""

_HEADLESS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
"""How transformers calls classes that have no head over the tokens."""

Pairs = tuple[tuple[str, str], ...]


def read_model_config(path: Place) -> dict[str, Any] | None:
    """The fields of a config.json; None where there is no such file."""
    try:
        found: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise local_files.file_error("read", str(path), error) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: expected JSON, found: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return cast("dict[str, Any]", found)


def is_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether a config.json ties the head to the table of tokens, None if it does not tell.

    transformers 5 goes by the field beside `text_config`, transformers 4 by the field in it. Without the field both
    go by the default of the model type.

    >>> is_tied({"model_type": "gpt2"}), is_tied({"model_type": "llama"}), is_tied({"model_type": "gpt2", FIELD: False})
    (True, False, False)
    """
    text, outer = config.get("text_config"), _said(config)
    if outer is None:
        outer = DEFAULTS.get(str(config.get("model_type")))
    inner = _said(cast("Mapping[str, Any]", text)) if isinstance(text, Mapping) else None
    return outer if inner is None or inner == outer else None


def _said(config: Mapping[str, Any]) -> bool | None:
    value = config.get(FIELD)
    return value if isinstance(value, bool) else None


def untie_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json for a model whose head has a tensor of its own."""
    text: Any = config.get("text_config")
    inner = {"text_config": {**text, FIELD: False}} if isinstance(text, Mapping) else {}
    return {**config, **inner, FIELD: False}


@dataclasses.dataclass(frozen=True)
class UntiedBase:
    """A folder's tensors as an adapter needs them.

    Attributes:
        tensors: with a head of its own where `apart`.
        tied: `(head, table)` of the tensors that stay one, as the adapter names them.
        apart: whether the head has a tensor of its own that config.json must not tie.
    """

    tensors: hf_model.ModelTensors
    tied: Pairs = ()
    apart: bool = False


def untie_base(held: hf_model.ModelTensors, path: Place, adapter: PeftTensors) -> UntiedBase:
    """The tensors of a model's folder, with a head of its own where the adapter is for the table or the head alone.

    Args:
        held: the folder's tensors.
        path: its config.json, which may be missing.

    Raises `MismatchError` where the folder does not tell whether they are one weight, or how the head is called.
    """
    shapes = {key: tuple(spec.shape) for key, spec in held.specs.items()}
    tensors = {key: tuple(x.shape) for key, x in adapter.tensors.items()}
    adapted, asked = pytorch.adapted_shapes(tensors), bool(adapter.config.get("ensure_weight_tying"))
    heads = {head for group, _ in _groups() for head, _ in group}
    named = pytorch.renamed(shapes, [module for module in adapted if f"{module}.weight" not in heads])
    known = _group(named)
    if known is None:
        lookups = [module for module, own in adapted.items() if "lora_embedding_A" in own]
        missing = [f"{module}.weight" for module in adapted if f"{module}.weight" not in named.values()]
        if asked:
            return UntiedBase(
                held, tuple((head, f"{lookups[0]}.weight") for head in missing) if len(lookups) == 1 else ()
            )
        _refuse_unknown(adapter, path, {named[key]: shape for key, shape in shapes.items()}, lookups)
        return UntiedBase(held)

    group, names = known
    rows = {f"{module}.weight" for module in pytorch.rows(tensors)}
    pairs = [pair for pair in group if pair[0].endswith(".weight")]
    changed = {
        key
        for key in dict.fromkeys(key for pair in pairs for key in pair)
        if (module := key.removesuffix(".weight")) in adapted or matching.is_saved(adapter.config, module)
    }
    saved = {key.removeprefix(PEFT_PREFIX) for key in tensors}
    changed |= {head for head, _ in pairs if asked and head in saved}  # (the configuration names the table alone)
    alone = sorted(changed | {head for head, _ in pairs if head in rows})
    home = {key: leaf for leaf, key in named.items()}
    lacking = tuple(pair for pair in group if pair[0] not in home)
    if not alone and not any(table in rows for _, table in pairs):
        return UntiedBase(held, lacking)

    # PEFT knows embeddings by two names alone; those that it ties it writes under both.
    together = asked and any(head in alone and table in alone for head, table in pairs)
    state = _state(path)
    twice = [pair for pair in pairs if pair not in lacking and bitwise_same(held, home[pair[0]], home[pair[1]])]
    what = f"{adapter.source}: changes {' and '.join(alone or sorted(rows))}"
    untold = MismatchError(
        f"{what}, and {path} does not tell whether {' and '.join(dict.fromkeys(key for pair in pairs for key in pair))}"
        f" are one weight. Write {FIELD} into it, true or false (into its text_config too, if it has one)"
    )
    shared = len(pairs) > 1 and any(key in alone for pair in lacking for key in pair)
    if state is False and (together or not shared):
        return UntiedBase(held)
    apart = [pair for pair in pairs if pair not in lacking and pair not in twice]
    if state is True and apart:
        raise MismatchError(
            f"{what}, and the base's folder contradicts itself: {path} ties the head to the table ({FIELD}), and"
            f" {' and '.join(apart[0])} differ. Set {FIELD} to false if {apart[0][0]} counts, or take that tensor out"
        )
    if together or not alone:
        if state is None and twice:
            raise untold
        one = {home[head] for head, _ in twice}
        return UntiedBase(held.with_names({key: key for key in held if key not in one}), (*lacking, *twice))
    if len(pairs) > 1:
        raise MismatchError(
            f"{what} apart from the modules that share its weight, and no config.json unties all of them in such a"
            " model. Keep the adapter beside the model, or train it with ensure_weight_tying"
        )
    ((head, table),) = pairs
    if table in rows and head not in rows:
        raise MismatchError(
            f"{what}, and trainable_token_indices changes rows of {table}, which are the head's as well: there is no"
            " tensor that is right for both. Keep the adapter beside the model"
        )
    if head in home:
        return UntiedBase(held, apart=True)
    if state is None:
        raise untold
    if head not in alone and _headless(path):
        return UntiedBase(held)
    full = {name: leaf for leaf, name in names.items()} | {first: home[second] for first, second in lacking}
    return UntiedBase(held.with_names(full), apart=True)


def resolve_untied_config(config: Config, base: UntiedBase) -> Config:
    """The configuration of an adapter for these tensors: a head apart is not tied, and a tied one has no rows."""
    if base.apart and config.get("ensure_weight_tying"):
        config = config.replace(ensure_weight_tying=False)
    rows: Any = config.get("trainable_token_indices")
    if isinstance(rows, Mapping):
        heads = tuple(head.removesuffix(".weight") for head, _ in base.tied)
        own = {name: indices for name, indices in rows.items() if not any(head.endswith(name) for head in heads)}
        config = config.replace(trainable_token_indices=own)
    return config


@functools.cache
def _groups() -> tuple[tuple[Pairs, bool], ...]:
    """The tied keys of each family, and whether the names are those of a model without its head."""
    found: dict[Pairs, bool] = {}
    for family in families.FAMILIES.values():
        for name, table in ((name, family.with_spelling(name)) for name, _ in family.spellings):
            found.setdefault(table.tied, name == "bare")
        found[family.tied] = False
    return tuple((pairs, is_bare) for pairs, is_bare in found.items() if pairs)


def _group(named: Mapping[str, str]) -> tuple[Pairs, Mapping[str, str]] | None:
    """The tied keys of this model as the adapter names them, none without a head; and what its tensors are called.

    Args:
        named: `{key in the folder: the adapter's name for it}`. Of the two, the one with a head's model in it counts.
    """
    for is_bare, names in ((False, named), (False, {leaf: leaf for leaf in named}), (True, named)):
        home = {name: leaf for leaf, name in names.items()}
        for group, bare in _groups():
            if bare == is_bare and all(same in home for _, same in group):
                own = tuple((head, named[home[same]]) for head, same in group)
                return () if bare else own, names
    return None


def _state(path: Place) -> bool | None:
    config = read_model_config(path)
    return None if config is None else is_tied(config)


def _headless(path: Place) -> bool:
    """Whether the folder is of a class without a head over the tokens."""
    made: Any = (read_model_config(path) or {}).get("architectures")
    return (
        isinstance(made, list) and bool(made) and all(str(name).endswith(_HEADLESS) for name in cast("list[Any]", made))
    )


def bitwise_same(held: hf_model.ModelTensors, a: str, b: str) -> bool:
    """Whether two tensors are one, bit for bit."""
    x, y = held[a], held[b]
    return x.dtype == y.dtype and x.shape == y.shape and bool((x.view("uint8") == y.view("uint8")).all())


def _refuse_unknown(
    adapter: PeftTensors, path: Place, shapes: Mapping[str, Sequence[int]], lookups: Sequence[str]
) -> None:
    """Refuse an adapter of a table of tokens that may be the head as well, where no family's names say so.

    Args:
        shapes: by the adapter's names.
        lookups: the modules that it adapts as tables.
    """
    saved = [
        module
        for key, shape in shapes.items()
        if len(shape) == 2
        and (module := key.removesuffix(".weight")).rpartition(".")[2] in full_copies.INPUTS
        and matching.is_saved(adapter.config, module)
    ]
    tables = [f"{module}.weight" for module in (*lookups, *saved) if f"{module}.weight" in shapes]
    found = [
        key
        for key in tables
        if not any(shapes[key][0] in shape and len(shape) == 2 for other, shape in shapes.items() if other != key)
    ]
    if found and _state(path) is not False:
        raise MismatchError(
            f"{adapter.source}: changes a table of tokens. It may be the head's weight as well ({FIELD} in {path}), and"
            " what this model calls its head is not known:\n"
            + paths.bullets(found)
            + f"\nGive the base a tensor for its head (a copy of the table) and {FIELD}: false, and merge into that"
        )
