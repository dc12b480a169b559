"""A PyTorch state dict as a model of its own: the table whose leaves are PyTorch's parameters, laid out as they are.

With it adapters are merged and combined as files, by the same arithmetic as in a model, and no model is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from jaxadapt.core import paths
from jaxadapt.core.errors import MismatchError
from jaxadapt.keymaps.keymap import PEFT_PREFIX, KeyMap
from jaxadapt.keymaps.weight import Weight

_TENSOR = re.compile(
    r"(?P<module>.+)\.(?P<name>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|lora_diag|ia3_l)(?:\.weight|\.bias)?"
)
_ROWS = ".token_adapter.trainable_tokens_delta"
Shapes = Mapping[str, tuple[int, ...]]

NAME = "pytorch"
"""What such a table is called."""


def adapted_shapes(tensors: Shapes) -> dict[str, dict[str, tuple[int, ...]]]:
    """`{module: {tensor: shape}}` of an adapter file's keys; copies of whole parameters are left out.

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
    """The shapes of the weights that a LoRA file changes, as far as it tells: linear, embedding, convolution."""
    out: dict[str, tuple[int, ...]] = {}
    for module, held in adapted_shapes(tensors).items():
        for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if a in held and b in held and len(held[a]) == len(held[b]):
                shape = (held[b][0], *held[a][1:])  # (out, in, window…); of an embedding (dim, vocabulary)
                out[f"{module}.weight"] = shape if a == "lora_A" else shape[::-1]
    return out


def rows(tensors: Shapes) -> set[str]:
    """The modules of which an adapter file holds single rows: `trainable_token_indices`."""
    return {key.removeprefix(PEFT_PREFIX).removesuffix(_ROWS) for key in tensors if key.endswith(_ROWS)}


def state_dict_keymap(
    shapes: Shapes,
    tensors: Shapes,
    source: str,
    fan_in_fan_out: bool = False,
    tied: tuple[tuple[str, str], ...] = (),
) -> KeyMap:
    """One line for each parameter of a model, named as the adapter names it.

    Args:
        shapes: of the model's parameters, by PyTorch's names in its files.
        tensors: of the adapter. A file may lack the name's first part ("model."), or have one more: GPT-2's do.
        source: the adapter, for the message.
        fan_in_fan_out: what its configuration says, for weights whose sizes do not tell.
        tied: `(head, table of tokens)` of weights that are one in this model, which lacks the heads.

    Raises `MismatchError` listing what the adapter changes and the model lacks.
    """
    held = adapted_shapes(tensors)
    heads = {head for head, _ in tied}
    keys = renamed(shapes, [module for module in held if f"{module}.weight" not in heads])
    missing = [m for m in held if f"{m}.weight" not in {*keys.values(), *heads}]
    if missing:
        raise MismatchError(f"{source}: the model has no weight for these modules:\n" + paths.bullets(missing))
    some, lookups = rows(tensors), {module for module, own in held.items() if "lora_embedding_A" in own}
    linear = {key.removesuffix(".weight"): shapes[leaf] for leaf, key in keys.items() if len(shapes[leaf]) == 2}
    turned = _turned(
        {m: (linear[m], held[m]) for m in held if m in linear and m not in lookups}, fan_in_fan_out, source
    )
    lines: list[Weight] = []
    for leaf, key in keys.items():
        module = key.removesuffix(".weight")
        own = held.get(module, {})
        lookup = module in lookups or (module in some and not own)
        lines.append(_line(leaf, key, shapes[leaf], own, turned.get(module, False), lookup))
    return KeyMap(NAME, tuple(lines), tied=tied)


def renamed(shapes: Shapes, modules: Iterable[str]) -> dict[str, str]:
    """`{key in the files: key as the adapter says it}`."""
    wanted = [f"{module}.weight" for module in modules]
    starts = {key.split(".")[0] + "." for key in (*wanted, *shapes)}
    found: list[dict[str, str]] = [{key: key for key in shapes}]
    found += [{key: start + key for key in shapes} for start in sorted(starts)]
    found += [{key: key.removeprefix(start) for key in shapes} for start in sorted(starts)]
    fits = [way for way in found if set(wanted) <= set(way.values()) and len(set(way.values())) == len(way)]
    return fits[0] if fits else found[0]


def _line(leaf: str, key: str, shape: tuple[int, ...], own: Shapes, turned: bool, lookup: bool) -> Weight:
    axes = " ".join(f"a{i}" for i in range(len(shape)))
    pattern = f"{axes} -> {axes}"
    if lookup:
        return Weight(leaf, key, pattern, kind="embedding")
    if len(shape) == 2 and own:
        return Weight(leaf, key, pattern, fan_in_fan_out=turned)
    if len(shape) > 2:
        return Weight(leaf, key, pattern, kind="conv" if own else "other", groups=_groups(shape, own))
    return Weight(leaf, key, pattern)


def _turned(modules: Mapping[str, tuple[tuple[int, ...], Shapes]], said: bool, source: str) -> dict[str, bool]:
    """Which weights are stored (in, out), as GPT-2's Conv1D does.

    The tensors' sizes say it, and of a square weight others of its name, or the file. PEFT's file says what the last
    module was that it met, so it counts only where all modules agree with it.
    """
    seen = {module: _is_turned(shape, own) for module, (shape, own) in modules.items()}
    told = {module: turned for module, turned in seen.items() if turned is not None}
    found, unknown = dict(told), list[str]()
    for module in seen.keys() - told.keys():
        last = module.rpartition(".")[2]
        alike = {turned for other, turned in told.items() if other.rpartition(".")[2] == last}
        if len(alike) == 1:
            found[module] = alike.pop()
        elif set(told.values()) <= {said}:
            found[module] = said
        else:
            unknown.append(module)
    if unknown:
        raise MismatchError(
            f"{source}: these modules are square, and whether the model stores them (out, in), as nn.Linear, or (in,"
            f" out), as Conv1D, does not show: fan_in_fan_out is {said}, and by their sizes not all other modules are"
            " stored so. jaxadapt.export.export_base(model, folder, adapter) writes a model with the adapter merged:\n"
            + paths.bullets(sorted(unknown))
        )
    return found


def _is_turned(shape: tuple[int, ...], own: Shapes) -> bool | None:
    """Whether a weight is stored (in, out) by the sizes of its tensors; None where it fits both ways."""
    out, inputs = None, None
    if "lora_A" in own and "lora_B" in own:
        out, inputs = own["lora_B"][0], own["lora_A"][-1]
    elif len(own.get("ia3_l", ())) == 2:
        out, inputs = (own["ia3_l"][0], None) if own["ia3_l"][1] == 1 else (None, own["ia3_l"][1])
    straight = all(size in (None, have) for size, have in zip((out, inputs), shape, strict=True))
    crossed = all(size in (None, have) for size, have in zip((inputs, out), shape, strict=True))
    return None if straight and crossed else crossed


def _groups(shape: tuple[int, ...], own: Shapes) -> int:
    """Of a convolution whose input channels an IA3 vector scales, one number each; 1 where nothing depends on it."""
    vector = own.get("ia3_l", ())
    channels = vector[1] if len(vector) > 2 else shape[1]
    return channels // shape[1] if channels % shape[1] == 0 else 1
