"""Keys of adapter files as training frameworks and exporters write them, and PEFT's names for them. Strings only."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs import matching
from jaxadapt.configs.base import class_of
from jaxadapt.configs.matching import tensor_prefixes, tensors_with_parts
from jaxadapt.core.errors import MismatchError, raise_listed, warn
from jaxadapt.keymaps.keymap import PEFT_PREFIX

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
_MATRICES = frozenset(("lora_A", "lora_B"))


def split_key(key: str, peft_type: str) -> tuple[str, str] | None:
    """Return the module and the tensor's name in it; None if the key is no tensor of the method.

    >>> split_key("base_model.model.q.lora_A.weight", "LORA"), split_key("prompt_embeddings", "PROMPT_TUNING")
    (('q', 'lora_A.weight'), ('', 'prompt_embeddings'))
    """
    if has_no_modules(peft_type):
        return ("", key) if key in matching.file_tensors() else None
    prefix = _prefix(peft_type)
    if prefix is None:
        return None
    names = (prefix, "token_adapter") if peft_type == "LORA" else (prefix,)
    parts = key.removeprefix(PEFT_PREFIX).split(".")
    for i, part in enumerate(parts):
        if part.startswith(names) and (part != "token_adapter" or "trainable_tokens_delta" in parts[i:]):
            return ".".join(parts[:i]), ".".join(parts[i:])
    return None


def _prefix(peft_type: str) -> str | None:
    cls = class_of(peft_type)
    return _OTHER_PREFIXES.get(peft_type) if cls is None else matching.prefix_of(cls)


def has_no_modules(peft_type: str) -> bool:
    """Return True for a method whose file has no tensor of a module, such as a prompt."""
    cls = class_of(peft_type)
    return cls is not None and bool(cls.file_tensors)


def is_known_method(peft_type: str) -> bool:
    """Return True if the tensor names of this method are known."""
    return class_of(peft_type) is not None or peft_type in _OTHER_PREFIXES


def has_adapter_tensors(keys: Iterable[str]) -> bool:
    """Return True if any key is a tensor of some method of PEFT."""
    known = {*matching.tensor_prefixes(), *_OTHER_PREFIXES.values()}
    prefixes = (*tuple(known - {"oft_"}), "oft_R", "oft_embedding_R", "trainable_tokens_delta")
    whole = matching.file_tensors()
    return any(key in whole or any(p.startswith(prefixes) for p in key.split(".")) for key in keys)


def wrappers_in(keys: Iterable[str]) -> list[str]:
    """Return the wrappers' names that occur in keys, with the programs that add them where they are known."""
    keys = list(keys)
    segments = {part for key in keys for part in key.split(".")}
    found = [f"{name}, of {program}" for name, program in _WRAPPERS.items() if name in segments]
    found += sorted(_outer_names(keys) - {"", "module", *_WRAPPERS})
    return found or ["module, of DataParallel"]


def _outer_names(names: Iterable[str]) -> set[str]:
    """Return the paths of the PEFT models in the modules that hold them: what precedes base_model.model. in names."""
    parts = (f".{name}".partition(f".{PEFT_PREFIX}") for name in names)
    return {before[1:] for before, found, _ in parts if found}


@dataclasses.dataclass(frozen=True)
class Names:
    """The keys of a file with PEFT's names for them.

    Attributes:
        normal: {key: PEFT's name}; None for a key that PEFT drops when it saves.
        faults: {kind of fault: the keys that have it}.
        adapters: the names of adapters in the keys, as in the state dict of a complete PEFT model.
        duplicates: {PEFT's name: the keys that have it}, for names of several keys.
        models: the paths of several PEFT models in the module that held them, such as an actor and a critic; empty for
            one.
    """

    normal: Mapping[str, str | None]
    faults: Mapping[str, tuple[str, ...]]
    adapters: tuple[str, ...]
    duplicates: Mapping[str, tuple[str, ...]]
    models: tuple[str, ...] = ()

    @property
    def has_several(self) -> bool:
        """True if the keys are those of several adapters."""
        return len(self.adapters) > 1 or bool(self.models)


def normalize_keys(keys: Collection[str], peft_type: str, *, own_names: bool = False) -> Names:
    """Return PEFT's name for each key.

    The kinds of faults: "wrappers" (names of modules that wrap others, also of the one that holds the PEFT model),
    "no-prefix", "double-prefix", "adapter-name", and "no-weight" (lora_A for lora_A.weight).

    >>> normalize_keys(["_orig_mod.base_model.model.q.lora_A.default.weight"], "LORA").normal
    {'_orig_mod.base_model.model.q.lora_A.default.weight': 'base_model.model.q.lora_A.weight'}
    """
    faults: dict[str, list[str]] = {}
    bare = {key: ".".join(part for part in key.split(".") if part not in _WRAPPERS) for key in keys}
    while bare and all(name.startswith("module.") for name in bare.values()):
        bare = {key: name.removeprefix("module.") for key, name in bare.items()}
    models = _outer_names(bare.values())
    if len(models) == 1 and (outer := next(iter(models))):
        bare = {key: name.removeprefix(f"{outer}.") for key, name in bare.items()}
    splits = {key: split_adapter_name(name) for key, name in bare.items()}
    # With bias="all" PEFT itself keeps the adapter's name in keys of fully trained modules, and only there.
    has_names = not own_names and any(
        split is not None and ".modules_to_save." not in bare[key] for key, split in splits.items()
    )
    normal: dict[str, str | None] = {}
    adapters: set[str] = set()
    for key, name in bare.items():
        if name != key:
            faults.setdefault("wrappers", []).append(key)
        split = splits[key] if has_names else None
        if split is not None:
            adapters.add(split[0])
            faults.setdefault("adapter-name", []).append(key)
            name = split[1]
        normal[key] = None if is_original_row(name) else _with_prefix(key, name, peft_type, faults)
        new = normal[key]
        if new is not None and peft_type == "LORA" and new.rpartition(".")[2] in _MATRICES:
            faults.setdefault("no-weight", []).append(key)
            normal[key] = f"{new}.weight"
    counts = Counter(name for name in normal.values() if name is not None)
    duplicates = {
        name: tuple(key for key, new in normal.items() if new == name) for name, count in counts.items() if count > 1
    }
    found = {kind: tuple(members) for kind, members in faults.items()}
    return Names(normal, found, tuple(sorted(adapters)), duplicates, tuple(sorted(models)) if len(models) > 1 else ())


def adapter_keys(keys: Collection[str], peft_type: str, name: str) -> dict[str, str]:
    """Return {key: PEFT's name} of the keys of one adapter in a file of several, and of those without a name.

    >>> keys = ["base_model.model.q.lora_A.fr.weight", "base_model.model.q.lora_A.de.weight"]
    >>> adapter_keys(keys, "LORA", "fr")
    {'base_model.model.q.lora_A.fr.weight': 'base_model.model.q.lora_A.weight'}
    """
    names = normalize_keys(keys, peft_type)
    found: dict[str, str] = {}
    for key, new in names.normal.items():
        bare = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        split = split_adapter_name(bare)
        if new is not None and (split is None or split[0] == name or not names.adapters):
            found[key] = new
    return found


def _with_prefix(key: str, name: str, peft_type: str, faults: dict[str, list[str]]) -> str:
    if has_no_modules(peft_type) or not is_known_method(peft_type):
        return name
    if not name.startswith(_SHARED_PREFIX):
        faults.setdefault("no-prefix", []).append(key)
        return PEFT_PREFIX + name
    twice = PEFT_PREFIX + PEFT_PREFIX
    if name.startswith(twice):
        faults.setdefault("double-prefix", []).append(key)
        while name.startswith(twice):
            name = name.removeprefix(PEFT_PREFIX)
    return name


# ---------------------------------------------------------------- keys with an adapter's name

_SAVED = ".modules_to_save."
_ORIGINAL = ".token_adapter.trainable_tokens_original."
_PLAIN = ("weight", "bias")
_NOT_MODULES = ("lora_magnitude_vector",)  # a module in memory, and in PEFT's files a tensor without ".weight"


def keys_without_names(keys: Iterable[str], source: str) -> dict[str, str | None]:
    """Return `{key: key without the adapter's name}` for all keys; empty if no key contains an adapter's name.

    The value is None for rows of the base. Warns if the keys contain one adapter's name. Raises `MismatchError` if they
    contain several.

    >>> keys_without_names(["base_model.model.q.lora_A.weight"], "a file")
    {}
    """
    keys = list(keys)
    parsed = {key: parts for key in keys if (parts := split_adapter_name(key)) is not None}
    if all(_SAVED in key for key in parsed):  # with bias="all" PEFT keeps the name in keys of fully trained modules
        return {}
    names = sorted({name for name, _ in parsed.values()})
    if len(names) > 1:
        raise MismatchError(
            f"{source} holds several adapters, {', '.join(map(repr, names))}, as the state dict of a complete PEFT"
            " model does. Save one of them in PyTorch, with"
            f" model.save_pretrained(folder, selected_adapters=[{names[0]!r}]), or keep only the keys of one in the"
            f" file (those that contain '.{names[0]}')"
        )
    warn(
        f"{source} is the state dict of a complete PEFT model: the adapter's name {names[0]!r} is removed from its"
        f" {len(parsed)} keys, as PEFT does when it saves"
    )
    new_keys: dict[str, str | None] = {key: None if is_original_row(key) else key for key in keys}
    new_keys |= {key: new_key for key, (_, new_key) in parsed.items()}
    raise_listed(
        MismatchError,
        f"{source} holds these tensors twice, with and without an adapter's name. Remove one of each:",
        [new_key for new_key, count in Counter(new_keys.values()).items() if new_key is not None and count > 1],
    )
    return new_keys


def without_names(tensors: PeftTensors) -> PeftTensors:
    """Return the tensors with the adapter's name removed from their keys."""
    new_keys = keys_without_names(tensors.tensors, tensors.source)
    if not new_keys:
        return tensors
    arrays = tensors.tensors
    return dataclasses.replace(
        tensors, tensors={name: arrays[key] for key, name in new_keys.items() if name is not None}
    )


def split_adapter_name(key: str) -> tuple[str, str] | None:
    """Return the adapter's name in a key and the key without it; None if the key has no adapter's name.

    >>> split_adapter_name("q.lora_A.default.weight")
    ('default', 'q.lora_A.weight')
    """
    stem, _, end = key.rpartition(".")
    if end in _PLAIN:  # of a module: lora_A.default.weight
        stem, _, name = stem.rpartition(".")
        tensor = stem.rpartition(".")[2]
        if _is_tensor(tensor):
            return name, stem if tensor in _NOT_MODULES else f"{stem}.{end}"
    elif _is_tensor(stem.rpartition(".")[2]):  # a parameter: ia3_l.default
        return end, stem
    module, separator, rest = key.rpartition(_SAVED)
    name, dot, parameter = rest.partition(".")
    return (name, f"{module}.{parameter}") if separator and dot else None


def _is_tensor(name: str) -> bool:
    return name.startswith((*tensor_prefixes(), "trainable_tokens_delta")) and name not in tensors_with_parts()


def is_original_row(key: str) -> bool:
    """Return True for the base's rows of trained tokens, which PEFT does not save."""
    return _ORIGINAL in key


def unwrapped_key(key: str) -> str:
    """Return the key of a base weight without PEFT's wrappers around its module.

    >>> unwrapped_key("q.base_layer.weight"), unwrapped_key("wte.token_adapter.base_layer.weight")
    ('q.weight', 'wte.weight')
    """
    for part in (".token_adapter.base_layer.", ".original_module.", ".base_layer."):
        key = key.replace(part, ".")
    return key
