"""The lines of the layers Flax ships, where a table keeps PyTorch's own names: kernels, norms, embeddings."""

from collections.abc import Iterable

from jaxadapt.keymaps.weight import Weight

FROM, INTO = "m o", "i m"
"""Kernels that read what lies between the layers of a model, and that write to it; `same=("m",)` tells them apart."""


def dense(*modules: str, bias: bool = True, axes: str = "i o") -> tuple[Weight, ...]:
    """`nn.Dense`, with a bias in some models or in none."""
    inputs, out = axes.split()
    kernels = (Weight(f"{m}.kernel", f"{m}.weight", f"{axes} -> {out} {inputs}") for m in modules)
    return (*kernels, *biases(modules)) if bias else tuple(kernels)


def biases(modules: Iterable[str]) -> tuple[Weight, ...]:
    return tuple(Weight(f"{m}.bias", f"{m}.bias", "o -> o") for m in modules)


def norms(*modules: str) -> tuple[Weight, ...]:
    """`nn.LayerNorm`."""
    return (*(Weight(f"{m}.scale", f"{m}.weight", "d -> d") for m in modules), *biases(modules))


def embeddings(*modules: str) -> tuple[Weight, ...]:
    """`nn.Embed`."""
    return tuple(Weight(f"{m}.embedding", f"{m}.weight", "v d -> v d", kind="embedding") for m in modules)


def convs(*modules: str, window: str = "h w") -> tuple[Weight, ...]:
    """`nn.Conv`, whose window comes first where PyTorch's comes last."""
    kernels = (Weight(f"{m}.kernel", f"{m}.weight", f"{window} i o -> o i {window}", kind="conv") for m in modules)
    return (*kernels, *biases(modules))
