"""The sizes of a module, from the shapes of its adapter's file tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from jaxadapt.configs import Config
from jaxadapt.keymaps.keymap import Match
from jaxadapt.keymaps.weight import Modules, Weight
from jaxadapt.methods.registry import get_method
from jaxadapt.methods.target import Target

Shape = tuple[int, ...]
_LEAF = "weight"


def file_target(config: Config, module: str, found: Mapping[str, Shape], shape: Shape = ()) -> Target:
    """Return a module as a target of its method, from its file tensors `{name: shape}`.

    Args:
        shape: the shape of a convolution's weight; empty for a matrix, whose sizes are then not known.
    """
    if len(shape) > 2:
        axes = " ".join(f"a{i}" for i in range(len(shape)))
        weight = Weight(_LEAF, f"{module}.weight", f"{axes} -> {axes}", kind="conv")
        sizes = {f"a{i}": size for i, size in enumerate(shape)}
        return Target(Match(_LEAF, weight), Modules((module,)), sizes, found)
    weight = Weight(_LEAF, f"{module}.weight", "o i -> o i", kind=_kind(found))
    return Target(Match(_LEAF, weight), Modules((module,)), {}, found)


def file_sizes(
    config: Config, module: str, found: Mapping[str, Shape], shape: Shape = ()
) -> tuple[int | None, int | None]:
    """Return the outputs and the inputs of a module, as far as its file tensors `{name: shape}` determine them.

    The inputs of a convolution are its channels, in all groups. The arguments are those of `file_target`.

    >>> from jaxadapt.configs import LoraConfig
    >>> file_sizes(LoraConfig(r=2, target_modules=["q"]), "q", {"lora_A": (2, 4), "lora_B": (6, 2)})
    (6, 4)
    """
    sizes: dict[str, int] = {}
    for tensor in get_method(config).tensors(config, file_target(config, module, found, shape)):
        if len(tensor.torch) == len(found.get(tensor.name, ())):
            sizes |= {group[0]: n for group, n in zip(tensor.torch, found[tensor.name], strict=True) if len(group) == 1}
    return sizes.get("out"), sizes.get("channels", sizes.get("in"))


def _kind(found: Mapping[str, Shape]) -> Literal["embedding", "linear"]:
    return "embedding" if any("_embedding_" in name for name in found) else "linear"
