"""Keymaps for PyTorch state dicts, whose leaves are PyTorch's parameters in PyTorch's layout.

With such a keymap, files of adapters are merged and combined by the same arithmetic as in a model, without a model.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping

from jaxadapt.configs.tensor_names import tensor_prefixes, tensors_with_parts
from jaxadapt.core.errors import MismatchError, raise_listed
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.keymaps.weight import Weight

_ROWS = ".trainable_tokens_delta"
Shapes = Mapping[str, tuple[int, ...]]
Sizes = Callable[[str, Shapes, tuple[int, ...]], tuple[int | None, int | None]]
"""(module, its file tensors, the shape of a convolution's weight) -> its outputs and its inputs, if they are known."""

SHARED_MODULE = "base_model"  # the part of a key before the tensors of the whole adapter

KEYMAP_NAME = "pytorch"
"""The name of such a keymap."""


def adapted_shapes(tensors: Shapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return `{module: {tensor: shape}}` of an adapter file, without copies of parameters and shared tensors.

    >>> adapted_shapes({"base_model.model.q.lora_A.weight": (2, 4), "base_model.model.q.lora_B.weight": (6, 2)})
    {'q': {'lora_A': (2, 4), 'lora_B': (6, 2)}}
    """
    return {
        module: {name: tensors[key] for name, key in keys.items()} for module, keys in adapted_keys(tensors).items()
    }


def adapted_keys(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return `{module: {tensor: key}}` of an adapter file, without copies of parameters and shared tensors.

    >>> adapted_keys(["base_model.model.q.lora_A.weight"])
    {'q': {'lora_A': 'base_model.model.q.lora_A.weight'}}
    """
    found: dict[str, dict[str, str]] = {}
    tensor = _tensor_pattern(tensors_with_parts(), tensor_prefixes())
    for key in keys:
        match = tensor.fullmatch(key.removeprefix(PEFT_PREFIX))
        if match is not None and match["module"] != SHARED_MODULE and not key.endswith(_ROWS):
            found.setdefault(match["module"], {})[match["name"].replace(".", "_")] = key
    return found


@functools.cache
def _tensor_pattern(with_parts: frozenset[str], prefixes: tuple[str, ...]) -> re.Pattern[str]:
    """Return the expression for the keys of all methods' tensors."""
    parts, names = ("|".join(map(re.escape, each)) for each in (sorted(with_parts), prefixes))
    return re.compile(rf"(?P<module>.+)\.(?P<name>(?:{parts})\.\w+|(?:{names})\w+)(?:\.weight)?")


def weight_shapes(tensors: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights (linear, embedding, convolution) that a LoRA file adapts.

    A weight whose tensors do not determine its shape is left out.
    """
    weights: dict[str, tuple[int, ...]] = {}
    for module, shapes in adapted_shapes(tensors).items():
        for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if a in shapes and b in shapes and len(shapes[a]) == len(shapes[b]):
                shape = (shapes[b][0], *shapes[a][1:])  # (out, in, window…), or (dim, vocabulary) for an embedding
                weights[f"{module}.weight"] = shape if a == "lora_A" else shape[::-1]
    return weights


def token_row_modules(tensors: Shapes) -> set[str]:
    """Return the modules whose single rows an adapter file has."""
    rows = {key.removeprefix(PEFT_PREFIX).removesuffix(_ROWS) for key in tensors if key.endswith(_ROWS)}
    return {module.removesuffix(".token_adapter") for module in rows}


def state_dict_keymap(
    shapes: Shapes,
    tensors: Shapes,
    source: str,
    sizes: Sizes,
    fan_in_fan_out: bool = False,
    tied: tuple[tuple[str, str], ...] = (),
) -> KeyMap:
    """Return the keymap of a PyTorch model, with one entry for each parameter, under the adapter's names.

    Args:
        shapes: the shapes of the model's parameters, by their keys in its files.
        tensors: the shapes of the adapter's tensors. Their names may lack the first part of the model's ("model."), or
            have an additional one, as GPT-2's do.
        source: the adapter, for the message.
        sizes: the outputs and inputs of a module by its method, `methods.file_sizes` of a configuration.
        fan_in_fan_out: the adapter's setting, for weights whose sizes do not determine the orientation.
        tied: `(head, embedding)` of weights that are one weight in this model, which has no parameter for the head.

    Raises `MismatchError` listing the adapted modules that the model lacks.
    """
    adapted = adapted_shapes(tensors)
    heads = {head for head, _ in tied}
    keys = match_model_keys(shapes, [module for module in adapted if f"{module}.weight" not in heads])
    raise_listed(
        MismatchError,
        f"{source}: the model has no weight for these modules:",
        [m for m in adapted if f"{m}.weight" not in {*keys.values(), *heads}],
    )
    row_modules = token_row_modules(tensors)
    lookups = {module for module, own in adapted.items() if any("_embedding_" in name for name in own)}
    linear = {key.removesuffix(".weight"): shapes[leaf] for leaf, key in keys.items() if len(shapes[leaf]) == 2}
    turned = _find_turned(
        {m: _is_turned(linear[m], sizes(m, adapted[m], ())) for m in adapted if m in linear and m not in lookups},
        fan_in_fan_out,
        source,
    )
    entries: list[Weight] = []
    for leaf, key in keys.items():
        module = key.removesuffix(".weight")
        module_shapes = adapted.get(module, {})
        lookup = module in lookups or (module in row_modules and not module_shapes)
        groups = 1
        if module_shapes and len(shapes[leaf]) > 2:
            channels, own = sizes(module, module_shapes, shapes[leaf])[1] or 0, shapes[leaf][1]
            groups = channels // own if channels and channels % own == 0 else 1
        turns = turned.get(module, False)
        entries.append(_make_entry(leaf, key, shapes[leaf], bool(module_shapes), turns, lookup, groups))
    return KeyMap(KEYMAP_NAME, tuple(entries), tied=tied)


def match_model_keys(shapes: Shapes, modules: Iterable[str]) -> dict[str, str]:
    """Return `{key in the model's files: key in the adapter's naming}`, with a prefix added or removed if necessary."""
    adapted = [f"{module}.weight" for module in modules]
    prefixes = {key.split(".")[0] + "." for key in (*adapted, *shapes)}
    candidates: list[dict[str, str]] = [{key: key for key in shapes}]
    candidates += [{key: prefix + key for key in shapes} for prefix in sorted(prefixes)]
    candidates += [{key: key.removeprefix(prefix) for key in shapes} for prefix in sorted(prefixes)]
    fitting = [
        names for names in candidates if set(adapted) <= set(names.values()) and len(set(names.values())) == len(names)
    ]
    return fitting[0] if fitting else candidates[0]


def _make_entry(
    leaf: str, key: str, shape: tuple[int, ...], adapted: bool, turned: bool, lookup: bool, groups: int
) -> Weight:
    axes = " ".join(f"a{i}" for i in range(len(shape)))
    pattern = f"{axes} -> {axes}"
    if lookup:
        return Weight(leaf, key, pattern, kind="embedding")
    if len(shape) == 2 and adapted:
        return Weight(leaf, key, pattern, fan_in_fan_out=turned)
    if len(shape) > 2:
        return Weight(leaf, key, pattern, kind="conv" if adapted else "other", groups=groups)
    return Weight(leaf, key, pattern)


def _find_turned(by_size: Mapping[str, bool | None], fan_in_fan_out: bool, source: str) -> dict[str, bool]:
    """Return `{module: True if its weight is stored (in, out)}`, as GPT-2's Conv1D stores it.

    The sizes of the tensors determine it. For a square weight, modules of the same name determine it, or the setting
    `fan_in_fan_out`. PEFT sets that by the last module it adapts, so it counts only if all other modules agree with it.

    Raises `MismatchError` listing the modules whose orientation is unknown.
    """
    known = {module: turned for module, turned in by_size.items() if turned is not None}
    orientations, unknown = dict(known), list[str]()
    for module in by_size.keys() - known.keys():
        last = module.rpartition(".")[2]
        namesakes = {turned for other, turned in known.items() if other.rpartition(".")[2] == last}
        if len(namesakes) == 1:
            orientations[module] = namesakes.pop()
        elif set(known.values()) <= {fan_in_fan_out}:
            orientations[module] = fan_in_fan_out
        else:
            unknown.append(module)
    raise_listed(
        MismatchError,
        f"{source}: cannot determine the orientation of these square modules, (out, in) as in nn.Linear or (in,"
        f" out) as in Conv1D: fan_in_fan_out is {fan_in_fan_out}, but the sizes of other modules contradict it. Use"
        " jaxadapt.export.export_base(model, folder, adapter) to write a model with the adapter merged:",
        sorted(unknown),
    )
    return orientations


def _is_turned(shape: tuple[int, ...], sizes: tuple[int | None, int | None]) -> bool | None:
    """Return True if its outputs and inputs show that a weight is stored (in, out); None if both layouts fit."""
    straight = all(size in (None, have) for size, have in zip(sizes, shape, strict=True))
    crossed = all(size in (None, have) for size, have in zip(sizes[::-1], shape, strict=True))
    return None if straight and crossed else crossed
