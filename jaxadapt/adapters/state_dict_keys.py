"""Keys of a complete PEFT model's state dict (`torch.save(model.state_dict(), …)`), which contain the adapter's name.

PEFT removes the name when it saves. It loads such keys, unchanged, into an adapter of the same name. Strings only.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs.matching import tensor_prefixes, tensors_with_parts
from jaxadapt.core.errors import MismatchError, raise_listed, warn

# ---------------------------------------------------------------- state dict keys


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
