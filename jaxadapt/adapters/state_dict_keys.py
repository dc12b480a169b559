"""Names in an adapter's file and configuration that differ from those of the model.

Keys of a complete PEFT model's state dict (`torch.save(model.state_dict(), …)`), which contain the adapter's name.

PEFT removes the name when it saves. It loads such keys, unchanged, into an adapter of the same name. Strings only.

The configuration of an adapter under another keymap's names.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.adapters.sites import Site, parameter_names
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.matching import tensor_prefixes, tensors_with_parts
from jaxadapt.core.errors import ConfigError, KeyMapError, MismatchError, raise_listed, warn
from jaxadapt.keymaps.keymap import KeyMap, Match

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


# ---------------------------------------------------------------- renaming


def rename_targets(config: Config, sites: Sequence[Site], keymap: KeyMap) -> Config:
    """Return the configuration for the same sites under another keymap's module names.

    Without this, a model adapted under its JAX names and saved under PyTorch's would give a file whose `target_modules`
    match nothing. PEFT loads such a file without an effect.

    Raises `ConfigError` if other fields use the old names, and `KeyMapError` for a leaf without an entry in the keymap.
    """
    new_names: list[str] = []
    renamed: list[str] = []
    unmapped: list[str] = []
    for site in sites:
        match = keymap.match(site.leaf)
        if match is None:
            unmapped.append(site.leaf)
        elif site.method.on_parameters:
            names = parameter_names(match, _braced_sizes(site, match)).values()
            renamed += [name for name in names if not matching.is_parameter(config, name)]
        elif site.method.copies:
            names = parameter_names(match, _braced_sizes(site, match)).values()
            renamed += [name for name in site.modules if name not in names]
        else:
            names = tuple(match.modules(_braced_sizes(site, match)).values())
            old_names = site.named.names
            new_names += (
                [name for name, old_name in zip(names, old_names, strict=True) if old_name is not None]
                if len(names) == len(old_names)
                else names
            )
    raise_listed(
        KeyMapError,
        f"cannot rename the targets: the keymap {keymap.name!r} has no entry for these adapted leaves. Add entries"
        " for them:",
        unmapped,
    )
    old_modules = [
        name for site in sites if not site.method.copies and not site.method.on_parameters for name in site.modules
    ]
    raise_listed(
        ConfigError,
        f"cannot rename the targets: in the keymap {keymap.name!r} these parameters have other names, and"
        " modules_to_save, target_parameters or bias use the old ones. Pass config= with the new names:",
        renamed,
    )
    if set(old_modules) == set(new_names):
        return config
    stale = [
        name
        for name in ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "feedforward_modules")
        if config.get(name)
    ]
    if stale:
        raise ConfigError(
            f"cannot rename the targets: in the keymap {keymap.name!r} the modules are called"
            f" {', '.join(sorted(new_names)[:3])}, …, and {', '.join(stale)} of the configuration use the old names"
            f" {', '.join(sorted(old_modules)[:3])}, …. Pass config= with the new names"
        )
    if all(matching.is_target(config, name) for name in new_names):
        return config
    return config.replace(target_modules=sorted(set(new_names)))  # full names: a suffix could match further modules


def _braced_sizes(site: Site, match: Match) -> dict[str, int]:
    """Return the sizes of the braced axes of another keymap's entry for the same leaf, axis by axis."""
    sizes = {
        new_axis: site.axis_sizes.get(old_axis, 0)
        for old_axis, new_axis in zip(site.match.weight.left, match.weight.left, strict=True)
    }
    return {axis: len(match.weight.index_names(axis) or ()) or sizes[axis] for axis in match.braced}
