"""Keys of a whole PEFT model's state dict (`torch.save(model.state_dict(), …)`), in which the adapter's name stands.

PEFT takes the name out when it saves, and loads such keys as they are into an adapter of the same name. Strings only.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.core import paths
from jaxadapt.core.errors import MismatchError, warn

_TENSORS = frozenset(
    "lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector lora_diag"
    " ia3_l trainable_tokens_delta".split()
)
_SAVED = ".modules_to_save."
_ORIGINAL = ".token_adapter.trainable_tokens_original."
_PLAIN = ("weight", "bias")


def keys_without_names(keys: Iterable[str], source: str) -> dict[str, str | None]:
    """`{key: as PEFT's file has it}` of all keys, None for rows of the base; empty where no adapter's name is in them.

    Warns where there is one, and raises `MismatchError` where there are several.

    >>> keys_without_names(["base_model.model.q.lora_A.weight"], "a file")
    {}
    """
    keys = list(keys)
    found = {key: both for key in keys if (both := _without_name(key)) is not None}
    if all(_SAVED in key for key in found):  # with bias="all" PEFT leaves a name in keys of modules trained in full
        return {}
    names = sorted({name for name, _ in found.values()})
    if len(names) > 1:
        raise MismatchError(
            f"{source} holds several adapters, {', '.join(map(repr, names))}, as the state dict of a whole PEFT model"
            f" does. Save one of them in PyTorch, model.save_pretrained(folder, selected_adapters=[{names[0]!r}]), or"
            f" leave only the keys of one in the file (those with '.{names[0]}' in them)"
        )
    warn(
        f"{source} is the state dict of a whole PEFT model: {names[0]!r}, the adapter's name, is taken out of its"
        f" {len(found)} keys, as PEFT does when it saves"
    )
    out: dict[str, str | None] = {key: None if _ORIGINAL in key else key for key in keys}
    out |= {key: new for key, (_, new) in found.items()}
    twice = [new for new, count in Counter(out.values()).items() if new is not None and count > 1]
    if twice:
        raise MismatchError(f"{source} holds these tensors twice, with an adapter's name:\n" + paths.bullets(twice))
    return out


def without_names(tensors: PeftTensors) -> PeftTensors:
    """The same, with an adapter's name taken out of the keys where it stands in them."""
    new = keys_without_names(tensors.tensors, tensors.source)
    if not new:
        return tensors
    held = tensors.tensors
    return dataclasses.replace(tensors, tensors={name: held[key] for key, name in new.items() if name is not None})


def _without_name(key: str) -> tuple[str, str] | None:
    """The adapter's name in a key, and the key without it; None if there is none."""
    at, _, last = key.rpartition(".")
    if last in _PLAIN:  # of a module: lora_A.default.weight
        at, _, name = at.rpartition(".")
        tensor = at.rpartition(".")[2]
        if tensor in _TENSORS:
            return name, at if tensor == "lora_magnitude_vector" else f"{at}.{last}"
    elif at.rpartition(".")[2] in _TENSORS:  # a parameter: ia3_l.default
        return last, at
    module, found, rest = key.rpartition(_SAVED)
    name, dot, parameter = rest.partition(".")
    return (name, f"{module}.{parameter}") if found and dot else None


def unwrapped_key(key: str) -> str:
    """What a base weight is called without PEFT's wrappers around its module.

    >>> unwrapped_key("q.base_layer.weight"), unwrapped_key("wte.token_adapter.base_layer.weight")
    ('q.weight', 'wte.weight')
    """
    for part in (".token_adapter.base_layer.", ".original_module.", ".base_layer."):
        key = key.replace(part, ".")
    return key
