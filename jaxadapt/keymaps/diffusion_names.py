"""The modules of Stable Diffusion 1, 2 and XL and of CLIP, as diffusers names them, for files that flatten the names.

kohya-ss replaces the dots of a module's name by underscores ("down_blocks_0_…_to_q"). Only a list of the modules can
undo that. For SDXL it also uses the names of Stability AI's own UNet ("input_blocks.4.1.…").
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

# {a,b} and {0-9} stand for each of their values.
_ATTENTION = (
    "proj_{in,out}",
    "transformer_blocks.{0-9}.attn{1,2}.to_{q,k,v,out.0}",
    "transformer_blocks.{0-9}.ff.net.{0.proj,2}",
)
_RESNET = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
_OUTSIDE = ("conv_in", "conv_out", "time_embedding.linear_{1,2}", "add_embedding.linear_{1,2}")
_UNET = (
    *_OUTSIDE,
    *(f"down_blocks.{{0-3}}.resnets.{{0,1}}.{name}" for name in _RESNET),
    *(f"down_blocks.{{0-3}}.attentions.{{0,1}}.{name}" for name in _ATTENTION),
    *(f"up_blocks.{{0-3}}.resnets.{{0-2}}.{name}" for name in _RESNET),
    *(f"up_blocks.{{0-3}}.attentions.{{0-2}}.{name}" for name in _ATTENTION),
    *(f"mid_block.resnets.{{0,1}}.{name}" for name in _RESNET),
    *(f"mid_block.attentions.0.{name}" for name in _ATTENTION),
    "down_blocks.{0-3}.downsamplers.0.conv",
    "up_blocks.{0-3}.upsamplers.0.conv",
)
_CLIP = (
    *(f"{prefix}encoder.layers.{{0-31}}.self_attn.{{q,k,v,out}}_proj" for prefix in ("text_model.", "")),
    *(f"{prefix}encoder.layers.{{0-31}}.mlp.fc{{1,2}}" for prefix in ("text_model.", "")),  # "": transformers 5
    "text_projection",
)
MODULES: Mapping[str, tuple[str, ...]] = {"unet": _UNET, "text_encoder": _CLIP, "text_encoder_2": _CLIP}
"""{model of a diffusers pipeline: patterns of its modules}; the union of all versions."""

# SDXL: Stability AI's names, and diffusers'. Its UNet has three blocks of two (down) and three (up) layers.
_SDXL_RESNET = (
    ("in_layers.2", "conv1"), ("out_layers.3", "conv2"), ("emb_layers.1", "time_emb_proj"),
    ("skip_connection", "conv_shortcut"),
)  # fmt: skip
_SDXL_OUTSIDE = (
    ("input_blocks.0.0", "conv_in"), ("out.2", "conv_out"),
    ("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"),
    ("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
    ("input_blocks.6.0.op", "down_blocks.1.downsamplers.0.conv"),
    ("output_blocks.2.2.conv", "up_blocks.0.upsamplers.0.conv"),
    ("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
)  # fmt: skip
_SDXL_LAYERS = (
    *((f"input_blocks.{i}", f"down_blocks.{(i - 1) // 3}", (i - 1) % 3) for i in (1, 2, 4, 5, 7, 8)),
    *((f"output_blocks.{i}", f"up_blocks.{i // 3}", i % 3) for i in range(9)),
)
_SDXL_ATTENTION = ("down_blocks.1", "down_blocks.2", "up_blocks.0", "up_blocks.1")


def expand(pattern: str) -> Iterator[str]:
    """Yield each name that a pattern stands for.

    >>> list(expand("fc{1,2}")), len(list(expand("layers.{0-31}.q")))
    (['fc1', 'fc2'], 32)
    """
    pieces: list[list[str]] = []
    for text in re.split(r"(\{[^}]*\})", pattern):
        span = re.fullmatch(r"\{(\d+)-(\d+)\}", text)
        if span is not None:
            pieces.append([str(i) for i in range(int(span[1]), int(span[2]) + 1)])
        else:
            pieces.append(text[1:-1].split(",") if text.startswith("{") else [text])
    return map("".join, itertools.product(*pieces))


def _sdxl_pairs() -> Iterator[tuple[str, str]]:
    """Yield (Stability AI's name, diffusers' name) of each module of SDXL's UNet."""
    yield from _SDXL_OUTSIDE
    attention = [name for pattern in _ATTENTION for name in expand(pattern)]
    layers = [
        *((f"{ours}.0", f"{block}.resnets.{layer}") for ours, block, layer in _SDXL_LAYERS),
        ("middle_block.0", "mid_block.resnets.0"),
        ("middle_block.2", "mid_block.resnets.1"),
    ]
    yield from ((f"{ours}.{a}", f"{theirs}.{b}") for ours, theirs in layers for a, b in _SDXL_RESNET)
    attentions = [
        *((f"{i}.1", f"{b}.attentions.{layer}") for i, b, layer in _SDXL_LAYERS if b in _SDXL_ATTENTION),
        ("middle_block.1", "mid_block.attentions.0"),
    ]
    yield from ((f"{ours}.{name}", f"{theirs}.{name}") for ours, theirs in attentions for name in attention)


@functools.cache
def sdxl_names() -> Mapping[str, str]:
    """Return {diffusers' name: Stability AI's name} of the modules of SDXL's UNet."""
    return {theirs: ours for ours, theirs in _sdxl_pairs()}


@functools.cache
def dotted_names(model: str) -> Mapping[str, str]:
    """Return {flattened name: diffusers' name} of the modules of one model of a pipeline.

    >>> dotted_names("unet")["input_blocks_4_1_transformer_blocks_0_attn1_to_q"]
    'down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q'
    """
    names = {name.replace(".", "_"): name for pattern in MODULES.get(model, ()) for name in expand(pattern)}
    if model == "unet":
        names |= {ours.replace(".", "_"): theirs for theirs, ours in sdxl_names().items()}
    return names


def is_sdxl(modules: Iterable[str]) -> bool:
    """Return True if a module of a UNet is one of SDXL and not of Stable Diffusion 1 or 2.

    >>> is_sdxl(["mid_block.attentions.0.transformer_blocks.1.ff.net.2"])
    True
    """
    return any(re.search(r"transformer_blocks\.[1-9]", name) or name.startswith("add_embedding") for name in modules)
