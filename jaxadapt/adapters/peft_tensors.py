"""The content of a PEFT file as a value, and the keys of files as training frameworks and exporters write them.

A `Rule` says how programs change PEFT's keys, and undoes it. `without_names` applies the rule of adapters' names, as
PEFT does. `verify` reports the rules that apply, and `repair` undoes them.
This module imports neither JAX nor numpy: to inspect files takes neither.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

from jaxadapt.arrays.tensor_source import TensorSource, is_float, rename
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config, class_of
from jaxadapt.configs.table import FACTS
from jaxadapt.core import paths
from jaxadapt.core.errors import MismatchError, raise_listed, warn
from jaxadapt.keymaps.keymap import PEFT_PREFIX

# ---------------------------------------------------------------- tensors


@dataclasses.dataclass(frozen=True, eq=False)
class PeftTensors:
    """An adapter as a PEFT file holds it: PEFT's tensor names, PyTorch's layout.

    Args:
        config: the configuration of `adapter_config.json`.
        tensors: `{key: array}`; the mapping may read its values on demand.
        source: the place it was read from, for messages.
        fingerprint: that of the base it was trained on (`persistence.fingerprint`); None if it is not known.
        change_base: for an adapter whose initialization took a part out of the base weights (PiSSA, OLoRA, …). True:
            `load` takes that part out of the model's weights, as PEFT does. False: the model's weights are changed
            already. None: `load` and `from_peft` refuse such an adapter.
        fit_vocabulary: True if `load` and `from_peft` may resize tensors for another vocabulary to the model's.

    >>> import numpy as np, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    >>> PeftTensors(config, {"base_model.model.q.lora_A.weight": np.ones((2, 4))})
    PeftTensors(LORA, 1 tensors, from these tensors)
    """

    config: Config
    tensors: Mapping[str, Any]
    source: str = "these tensors"
    fingerprint: Mapping[str, Any] | None = None
    change_base: bool | None = None
    fit_vocabulary: bool = False

    def __repr__(self) -> str:
        return f"PeftTensors({self.config.peft_type}, {len(self.tensors)} tensors, from {self.source})"


def require_floats(config: Config, specs: Mapping[str, Any], target: object) -> None:
    """Raise `MismatchError` listing the integers and complex numbers among `{key: array or spec}` to be written.

    Indices are integers, and so may be tensors of a type that only passes through. `target` is the path that messages
    name.
    """
    if class_of(config.peft_type) is None:
        return
    raise_listed(
        MismatchError,
        f"{target}: cannot write these tensors: expected floating-point numbers, found:",
        [f"{k}: {x.dtype}" for k, x in specs.items() if matching.has_fractions(k) and not is_float(x.dtype)],
    )


# ---------------------------------------------------------------- key names


# The starts of the tensor names in PEFT 0.21.2 (PEFT_TYPE_TO_PREFIX_MAPPING) for the types without a configuration.
_OTHER_PREFIXES: Mapping[str, str] = {
    **{name: f"{name.lower()}_" for name in ("ADAMSS", "FROD", "GLORA", "LILY", "POLY", "PSOFT", "SHADOW")},
    "XLORA": "internal_xlora_classifier",
}

_SHARED_PREFIX = "base_model."
# {segment that a wrapper of modules adds to a key: the wrapper}.
_WRAPPERS: Mapping[str, str] = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
_SAVED = ".modules_to_save."
_ORIGINAL = ".token_adapter.trainable_tokens_original."
_MAGNITUDE = ".lora_magnitude_vector"  # a module in memory, and in PEFT's files a tensor without ".weight"

# ---------------------------------------------------------------- names of tensors


def split_key(key: str, peft_type: str) -> tuple[str, str] | None:
    """Return the module and the tensor's name in it; None if the key is no tensor of the method.

    >>> split_key("base_model.model.q.lora_A.weight", "LORA"), split_key("prompt_embeddings", "PROMPT_TUNING")
    (('q', 'lora_A.weight'), ('', 'prompt_embeddings'))
    """
    if has_no_modules(peft_type):
        return ("", key) if key in matching.tensor_names(tuple(FACTS)).whole else None
    prefix = matching.prefix_of(peft_type) if peft_type in FACTS else _OTHER_PREFIXES.get(peft_type)
    if prefix is None:
        return None
    names = (prefix, "token_adapter") if peft_type == "LORA" else (prefix,)
    parts = key.removeprefix(PEFT_PREFIX).split(".")
    for i, part in enumerate(parts):
        if part.startswith(names) and (part != "token_adapter" or "trainable_tokens_delta" in parts[i:]):
            return ".".join(parts[:i]), ".".join(parts[i:])
    return None


def is_saved_by_peft(key: str, config: Config) -> bool:
    """Return True if PEFT saves a tensor of its complete model, by its name without the adapter's name."""
    bias: str = config.get("bias") or "none"  # "all", or "lora_only" and the like: of the adapted modules
    is_bias = key.endswith(".bias" if bias == "all" else ".base_layer.bias") and bias != "none"
    is_saved = is_bias or matching.is_saved(
        matching.with_task_heads(config), key.removeprefix(PEFT_PREFIX).rpartition(".")[0]
    )
    return split_key(key, config.peft_type) is not None or (is_saved and ".original_module." not in key)


def has_no_modules(peft_type: str) -> bool:
    """Return True for a method whose file has no tensor of a module, such as a prompt."""
    return bool(FACTS[peft_type].file_tensors)


def is_known_method(peft_type: str) -> bool:
    """Return True if the tensor names of this method are known."""
    return peft_type in FACTS or peft_type in _OTHER_PREFIXES


def is_method_of_peft(peft_type: str) -> bool:
    """Return True if PEFT has this method, too; other packages may register methods that it lacks."""
    return is_known_method(peft_type) and peft_type in matching.PEFT_TYPES


def has_adapter_tensors(keys: Iterable[str]) -> bool:
    """Return True if any key is a tensor of some method of PEFT."""
    names = matching.tensor_names(tuple(FACTS))
    known = {*names.prefixes, *_OTHER_PREFIXES.values()} - {"oft_"}
    prefixes = (*known, "oft_R", "oft_embedding_R", "trainable_tokens_delta")
    return any(key in names.whole or any(p.startswith(prefixes) for p in key.split(".")) for key in keys)


_LOOKS_LIKE_EXPERTS = re.compile(r"\.experts\.|\.gate\.lora_")


def may_have_experts(keys: Iterable[str]) -> bool:
    """Return True if some keys look like those of adapters of experts."""
    return any(_LOOKS_LIKE_EXPERTS.search(key) for key in keys)


def split_adapter_name(key: str) -> tuple[str, str] | None:
    """Return the adapter's name in a key and the key without it; None if the key has no adapter's name.

    >>> split_adapter_name("q.lora_A.default.weight")
    ('default', 'q.lora_A.weight')
    """
    return _split_adapter_name(key, tuple(FACTS))


@functools.lru_cache(maxsize=1 << 14)  # loading adapters one after the other asks for the same keys
def _split_adapter_name(key: str, types: tuple[str, ...]) -> tuple[str, str] | None:
    stem, _, end = key.rpartition(".")
    if end in ("weight", "bias"):  # of a module: lora_A.default.weight
        stem, _, name = stem.rpartition(".")
        if _is_tensor(stem.rpartition(".")[2], types):
            return name, stem if stem.endswith(_MAGNITUDE) else f"{stem}.{end}"
    elif _is_tensor(stem.rpartition(".")[2], types):  # a parameter: ia3_l.default
        return end, stem
    module, separator, rest = key.rpartition(_SAVED)
    name, dot, parameter = rest.partition(".")
    return (name, f"{module}.{parameter}") if separator and dot else None


@functools.lru_cache(maxsize=1024)
def _is_tensor(name: str, types: tuple[str, ...]) -> bool:
    names = matching.tensor_names(types)
    return name.startswith((*names.prefixes, "trainable_tokens_delta")) and name not in names.with_parts


def unwrapped_key(key: str) -> str:
    """Return the key of a base weight without PEFT's wrappers around its module.

    >>> unwrapped_key("q.base_layer.weight"), unwrapped_key("wte.token_adapter.base_layer.weight")
    ('q.weight', 'wte.weight')
    """
    for part in (".token_adapter.base_layer.", ".original_module.", ".base_layer."):
        key = key.replace(part, ".")
    return key


# ---------------------------------------------------------------- rules


Names = Mapping[str, str]
"""{key of a file: its name after the rules so far}."""


class Rule(NamedTuple):
    """One way in which programs change PEFT's keys, and the step that undoes it.

    Attributes:
        code: the kind of the finding.
        undo: returns `{key: PEFT's name}`, with None for a tensor that PEFT does not save.
        found: a text about the keys, after their number.
        expected: the names that PEFT reads.
        done: the repair, after the number of keys.
    """

    code: str
    undo: Callable[[Names], Mapping[str, str | None]]
    found: str
    expected: str
    done: str


def _without_wrappers(names: Names) -> dict[str, str]:
    bare = {key: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for key, name in names.items()}
    while bare and all(name.startswith("module.") for name in bare.values()):
        bare = {key: name.removeprefix("module.") for key, name in bare.items()}
    outer = _outer_names(bare.values())
    if len(outer) != 1 or "" in outer:
        return bare
    return {key: name.removeprefix(f"{next(iter(outer))}.") for key, name in bare.items()}


def _outer_names(names: Iterable[str]) -> set[str]:
    """Return the paths of the PEFT models in the modules that hold them: what precedes base_model.model. in names."""
    parts = (f".{name}".partition(f".{PEFT_PREFIX}") for name in names)
    return {before[1:] for before, found, _ in parts if found}


def _without_adapter_names(names: Names) -> Mapping[str, str | None]:
    if not _adapter_names(names):
        return names
    splits = {key: split_adapter_name(name) for key, name in names.items()}
    return {
        key: None if _ORIGINAL in names[key] else names[key] if split is None else split[1]
        for key, split in splits.items()
    }


def _adapter_names(names: Names) -> dict[str, str]:
    """Return {key: the adapter's name in it}.

    Empty if only keys of fully trained modules contain one: with bias="all" PEFT itself keeps it there.
    """
    found = {key: split[0] for key, name in names.items() if (split := split_adapter_name(name)) is not None}
    return {} if all(_SAVED in names[key] for key in found) else found


def _each(change: Callable[[str], str], names: Names) -> dict[str, str]:
    return {key: change(name) for key, name in names.items()}


_REPEATED = f"^(?:{re.escape(PEFT_PREFIX)})+"
_BARE = (".lora_A", ".lora_B")
_WITHOUT_EFFECT = "PEFT loads an adapter without effect"
WRAPPERS = Rule(
    "wrapper-names",
    _without_wrappers,
    "contain the names of modules that wrap others ({wrappers})",
    f"the model's own names. With others, {_WITHOUT_EFFECT}",
    "the names of wrapping modules removed",
)
ADAPTER_NAME = Rule(
    "adapter-name",
    _without_adapter_names,
    "contain the adapter's name {adapter!r}: the state dict of a complete PEFT model",
    "keys without it. PEFT accepts the name, other programs do not",
    "the adapter's name removed",
)
_PREFIXES = (
    Rule(
        "prefix",
        lambda names: _each(lambda name: name if name.startswith(_SHARED_PREFIX) else PEFT_PREFIX + name, names),
        "lack the prefix base_model.model., which some exporters leave out",
        f"base_model.model.<module>.<tensor>. Without the prefix, {_WITHOUT_EFFECT}",
        "the prefix base_model.model. added",
    ),
    Rule(
        "prefix",
        lambda names: _each(lambda name: re.sub(_REPEATED, PEFT_PREFIX, name), names),
        "have the prefix base_model.model. more than once: a PEFT model was wrapped in a PEFT model",
        f"the prefix once. With two, {_WITHOUT_EFFECT}",
        "the repeated prefix base_model.model. removed",
    ),
)
_WEIGHT = Rule(
    "tensor-names",
    lambda names: _each(lambda name: f"{name}.weight" if name.endswith(_BARE) else name, names),
    "end in lora_A or lora_B without .weight, as loralib names them",
    f"lora_A.weight and lora_B.weight. With other names, {_WITHOUT_EFFECT}",
    ".weight added",
)
MAGNITUDE = Rule(
    "tensor-names",
    lambda names: _each(
        lambda name: name.removesuffix(".weight") if name.endswith(f"{_MAGNITUDE}.weight") else name, names
    ),
    "end in lora_magnitude_vector.weight, the name of DoRA's magnitudes in a PEFT model",
    "lora_magnitude_vector. PEFT accepts both names, other programs do not",
    ".weight removed",
)


@dataclasses.dataclass(frozen=True)
class NormalKeys:
    """The keys of a file with PEFT's names for them.

    Attributes:
        names: {key: PEFT's name}; None for a key that PEFT drops when it saves.
        steps: the rules that change a key, each with {key: its name after the rule}.
        owners: {key: the name of its adapter}, as in the state dict of a complete PEFT model.
        models: the paths of several PEFT models in the module that held them, such as an actor and a critic; empty for
            one.
    """

    names: Mapping[str, str | None]
    steps: tuple[tuple[Rule, Mapping[str, str | None]], ...] = ()
    owners: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    models: tuple[str, ...] = ()

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters."""
        return sorted(set(self.owners.values()))

    @property
    def has_several(self) -> bool:
        """True if the keys are those of several adapters."""
        return len(self.adapters) > 1 or bool(self.models)

    def keys_of(self, adapter: str | None = None) -> dict[str, str]:
        """Return {PEFT's name: the first key that has it}, of all keys or without those of other adapters."""
        found: dict[str, str] = {}
        for key, name in self.names.items():
            if name is not None and (adapter is None or self.owners.get(key, adapter) == adapter):
                found.setdefault(name, key)
        return found


def normalize_keys(keys: Iterable[str], peft_type: str) -> NormalKeys:
    """Return PEFT's name for each key.

    >>> normalize_keys(["_orig_mod.base_model.model.q.lora_A.default.weight"], "LORA").names
    {'_orig_mod.base_model.model.q.lora_A.default.weight': 'base_model.model.q.lora_A.weight'}
    """
    names: dict[str, str | None] = {key: key for key in keys}
    bare = _without_wrappers({key: key for key in names})
    models = _outer_names(bare.values())
    if len(models) > 1:
        return NormalKeys(names, models=tuple(sorted(models)))
    steps: list[tuple[Rule, Mapping[str, str | None]]] = []
    prefixes = _PREFIXES if is_known_method(peft_type) and not has_no_modules(peft_type) else ()
    for rule in (WRAPPERS, ADAPTER_NAME, *prefixes, *((_WEIGHT, MAGNITUDE) if peft_type == "LORA" else ())):
        now = {key: name for key, name in names.items() if name is not None}
        changed = {key: name for key, name in rule.undo(now).items() if name != now[key]}
        if changed:
            steps.append((rule, changed))
        names |= changed
    return NormalKeys(names, tuple(steps), _adapter_names(bare))


def find_duplicates(names: Mapping[str, str | None]) -> dict[str, tuple[str, ...]]:
    """Return {name: the keys that have it}, for the names of several keys.

    >>> find_duplicates({"a": "q", "b": "q", "c": None})
    {'q': ('a', 'b')}
    """
    groups = paths.group((name, key) for key, name in names.items() if name is not None)
    return {name: tuple(keys) for name, keys in groups.items() if len(keys) > 1}


def wrappers_in(keys: Iterable[str]) -> list[str]:
    """Return the wrappers' names that occur in keys, with the programs that add them where they are known."""
    keys = list(keys)
    segments = {part for key in keys for part in key.split(".")}
    found = [f"{name}, of {program}" for name, program in _WRAPPERS.items() if name in segments] + sorted(
        _outer_names(keys) - {"", "module", *_WRAPPERS}
    )
    return found or ["module, of DataParallel"]


# ---------------------------------------------------------------- reading


def without_names(tensors: PeftTensors) -> PeftTensors:
    """Return the tensors with their keys as PEFT saves them, for all keys that PEFT loads.

    DoRA's magnitudes may have the name that they have in a PEFT model, with `.weight`.
    The keys of a complete PEFT model's state dict (`torch.save(model.state_dict(), …)`) contain the adapter's name.
    PEFT loads them, unchanged, into an adapter of the same name. Rows of the base are left out. Warns if the keys
    contain one adapter's name. Raises `MismatchError` if they contain several.
    """
    whole, source = {key: key for key in tensors.tensors}, tensors.source
    owners = _adapter_names(whole)
    adapters = sorted(set(owners.values()))
    names = _without_adapter_names(cast("Names", MAGNITUDE.undo(whole)))
    if names == whole:
        return tensors
    if len(adapters) > 1:
        raise MismatchError(
            f"{source} holds several adapters, {', '.join(map(repr, adapters))}, as the state dict of a complete PEFT"
            " model does. Save one of them in PyTorch, with"
            f" model.save_pretrained(folder, selected_adapters=[{adapters[0]!r}]), or keep only the keys of one in the"
            f" file (those that contain '.{adapters[0]}')"
        )
    if adapters:
        warn(
            f"{source} is the state dict of a complete PEFT model: the adapter's name {adapters[0]!r} is removed from"
            f" its {len(owners)} keys, as PEFT does when it saves"
        )
    raise_listed(
        MismatchError,
        f"{source} holds these tensors twice, under two names that PEFT reads. Remove one of each:",
        find_duplicates(names),
    )
    keys, arrays = {name: key for key, name in names.items() if name is not None}, tensors.tensors

    # Arrays in memory may be traced, so that only a dict may hold them.
    is_source = isinstance(arrays, TensorSource)
    renamed = rename(arrays, keys) if is_source else {name: arrays[key] for name, key in keys.items()}
    return dataclasses.replace(tensors, tensors=renamed)
