"""Entries of Flax's built-in layers, for keymaps whose paths are PyTorch's names: kernels, norms, embeddings."""

from collections.abc import Iterable

from jaxadapt.keymaps.weight import Weight

FROM, INTO = "m o", "i m"
"""Axes of kernels that read the residual stream, and of kernels that write to it; `same=("m",)` distinguishes them."""


def dense(*modules: str, bias: bool = True, axes: str = "i o") -> tuple[Weight, ...]:
    """Return the entries of `nn.Dense` modules; with `bias`, the model may have biases or not."""
    inputs, out = axes.split()
    kernels = (Weight(f"{m}.kernel", f"{m}.weight", f"{axes} -> {out} {inputs}") for m in modules)
    return (*kernels, *biases(modules)) if bias else tuple(kernels)


def biases(modules: Iterable[str]) -> tuple[Weight, ...]:
    """Return the entries of the biases of these modules."""
    return tuple(Weight(f"{m}.bias", f"{m}.bias", "o -> o") for m in modules)


def norms(*modules: str) -> tuple[Weight, ...]:
    """Return the entries of `nn.LayerNorm` modules."""
    return (*(Weight(f"{m}.scale", f"{m}.weight", "d -> d") for m in modules), *biases(modules))


def embeddings(*modules: str) -> tuple[Weight, ...]:
    """Return the entries of `nn.Embed` modules."""
    return tuple(Weight(f"{m}.embedding", f"{m}.weight", "v d -> v d", kind="embedding") for m in modules)


def convs(*modules: str, window: str = "h w") -> tuple[Weight, ...]:
    """Return the entries of `nn.Conv` modules, whose window axes are first in Flax and last in PyTorch."""
    kernels = (Weight(f"{m}.kernel", f"{m}.weight", f"{window} i o -> o i {window}", kind="conv") for m in modules)
    return (*kernels, *biases(modules))
