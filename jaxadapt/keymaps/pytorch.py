"""Keymaps for PyTorch state dicts, whose leaves are PyTorch's parameters in PyTorch's layout.

With such a keymap, files of adapters are merged and combined by the same arithmetic as in a model, without a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from jaxadapt.core.errors import MismatchError, raise_listed
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.keymaps.weight import Weight

_TENSOR = re.compile(
    r"(?P<module>.+)\.(?P<name>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|lora_diag|ia3_l)(?:\.weight|\.bias)?"
)
_ROWS = ".token_adapter.trainable_tokens_delta"
Shapes = Mapping[str, tuple[int, ...]]

KEYMAP_NAME = "pytorch"
"""The name of such a keymap."""


def adapted_shapes(tensors: Shapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return `{module: {tensor: shape}}` of an adapter file, without the copies of parameters.

    >>> adapted_shapes({"base_model.model.q.lora_A.weight": (2, 4), "base_model.model.q.lora_B.weight": (6, 2)})
    {'q': {'lora_A': (2, 4), 'lora_B': (6, 2)}}
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in tensors.items():
        match = _TENSOR.fullmatch(key.removeprefix(PEFT_PREFIX))
        if match is not None and not key.endswith(".bias"):
            found.setdefault(match["module"], {})[match["name"]] = shape
    return found


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
    """Return the modules whose single rows an adapter file has (`trainable_token_indices`)."""
    return {key.removeprefix(PEFT_PREFIX).removesuffix(_ROWS) for key in tensors if key.endswith(_ROWS)}


def state_dict_keymap(
    shapes: Shapes,
    tensors: Shapes,
    source: str,
    fan_in_fan_out: bool = False,
    tied: tuple[tuple[str, str], ...] = (),
) -> KeyMap:
    """Return the keymap of a PyTorch model, with one entry for each parameter, under the adapter's names.

    Args:
        shapes: the shapes of the model's parameters, by their keys in its files.
        tensors: the shapes of the adapter's tensors. Their names may lack the first part of the model's ("model."), or
            have an additional one, as GPT-2's do.
        source: the adapter, for the message.
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
    lookups = {module for module, module_shapes in adapted.items() if "lora_embedding_A" in module_shapes}
    linear = {key.removesuffix(".weight"): shapes[leaf] for leaf, key in keys.items() if len(shapes[leaf]) == 2}
    turned = _find_turned(
        {m: (linear[m], adapted[m]) for m in adapted if m in linear and m not in lookups}, fan_in_fan_out, source
    )
    entries: list[Weight] = []
    for leaf, key in keys.items():
        module = key.removesuffix(".weight")
        module_shapes = adapted.get(module, {})
        lookup = module in lookups or (module in row_modules and not module_shapes)
        entries.append(_make_entry(leaf, key, shapes[leaf], module_shapes, turned.get(module, False), lookup))
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


def _make_entry(leaf: str, key: str, shape: tuple[int, ...], own: Shapes, turned: bool, lookup: bool) -> Weight:
    axes = " ".join(f"a{i}" for i in range(len(shape)))
    pattern = f"{axes} -> {axes}"
    if lookup:
        return Weight(leaf, key, pattern, kind="embedding")
    if len(shape) == 2 and own:
        return Weight(leaf, key, pattern, fan_in_fan_out=turned)
    if len(shape) > 2:
        return Weight(leaf, key, pattern, kind="conv" if own else "other", groups=_groups(shape, own))
    return Weight(leaf, key, pattern)


def _find_turned(
    modules: Mapping[str, tuple[tuple[int, ...], Shapes]], fan_in_fan_out: bool, source: str
) -> dict[str, bool]:
    """Return `{module: True if its weight is stored (in, out)}`, as GPT-2's Conv1D stores it.

    The sizes of the tensors determine it. For a square weight, modules of the same name determine it, or the setting
    `fan_in_fan_out`. PEFT sets that by the last module it adapts, so it counts only if all other modules agree with it.

    Raises `MismatchError` listing the modules whose orientation is unknown.
    """
    by_size = {module: _is_turned(shape, own) for module, (shape, own) in modules.items()}
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


def _is_turned(shape: tuple[int, ...], own: Shapes) -> bool | None:
    """Return True if the sizes of its tensors show that a weight is stored (in, out); None if both layouts fit."""
    out, inputs = None, None
    if "lora_A" in own and "lora_B" in own:
        out, inputs = own["lora_B"][0], own["lora_A"][-1]
    elif len(own.get("ia3_l", ())) == 2:
        out, inputs = (own["ia3_l"][0], None) if own["ia3_l"][1] == 1 else (None, own["ia3_l"][1])
    straight = all(size in (None, have) for size, have in zip((out, inputs), shape, strict=True))
    crossed = all(size in (None, have) for size, have in zip((inputs, out), shape, strict=True))
    return None if straight and crossed else crossed


def _groups(shape: tuple[int, ...], own: Shapes) -> int:
    """Return the groups of a convolution, from an IA3 vector over its input channels; 1 without such a vector."""
    vector = own.get("ia3_l", ())
    channels = vector[1] if len(vector) > 2 else shape[1]
    return channels // shape[1] if channels % shape[1] == 0 else 1
