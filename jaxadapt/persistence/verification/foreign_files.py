"""Recognition of files that are no PEFT adapter: other libraries' adapters, whole models, checkpoints of a run."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxadapt.configs.base import mlx_keys
from jaxadapt.core.errors import AdapterError
from jaxadapt.persistence import image_names, run_folder
from jaxadapt.persistence.image_names import Layout
from jaxadapt.persistence.verification import finding, key_names
from jaxadapt.persistence.verification.finding import Finding
from jaxadapt.storage import hf_model
from jaxadapt.storage.location import Location

_EXPECTED = "adapter_config.json and adapter_model.safetensors of PEFT"
_MODEL_FILES = (hf_model.SINGLE_FILE, hf_model.INDEX, hf_model.BIN, hf_model.BIN_INDEX)

# {library: (pattern of its keys, remedy)}. The first one with a matching key applies.
_MLX = (
    "name the weights adapters.safetensors, with mlx-lm's own adapter_config.json beside them; jaxadapt convert FOLDER"
    " OUT then writes PEFT's folder"
)
_IMAGE = (
    "give the file a name of its own, without a configuration beside it: diffusers (pipe.load_lora_weights) and"
    " jaxadapt then read it, and jaxadapt convert writes PEFT's folders"
)
_FUSE = "correct what the message names; otherwise fuse the adapter into its base with mlx_lm.fuse"
_LIBRARIES: Mapping[str, tuple[re.Pattern[str], str]] = {
    "mlx-lm": (
        re.compile(r".+\.(lora_[ab]|switch_mlp\..+\.lora_[ab])"),
        _MLX,
    ),
    "kohya-ss": (
        re.compile(
            r"(lora_(unet|te\d?|transformer|prior)_|lycoris_).+\.(lora_(down|up|mid)\.weight|alpha|hada_.*|lokr_.*)"
        ),
        _IMAGE,
    ),
    "diffusers": (
        re.compile(
            r"(unet|text_encoder(_2)?|transformer|prior|denoiser)\..+\.(lora_[AB](\.[^.]+)?\.weight"
            r"|lora(_linear_layer)?\.(down|up)\.weight)|.+\.processor\..+_lora\.(down|up)\.weight"
        ),
        _IMAGE,
    ),
    "an image trainer": (
        re.compile(r".+\.lora_(down|up)(\.weight)?"),
        "rename lora_down to lora_A and lora_up to lora_B with the program that wrote it, and add the configuration",
    ),
}  # fmt: skip


def foreign_library(keys: Collection[str], has_config: bool) -> Finding | None:
    """Return a finding if most keys are those of another library's adapter format.

    With a configuration of PEFT, names such as "transformer.h.0.q.lora_A.weight" are PEFT's without their prefix, and
    not diffusers'.
    """
    for library, (pattern, remedy) in _LIBRARIES.items():
        if library == "diffusers" and has_config:
            continue
        matching = [key for key in keys if pattern.fullmatch(key)]
        if 2 * len(matching) > len(keys):
            return finding.error(
                "other-library", matching, f"the tensors are named as {library} names them, such as {matching[0]}",
                "PEFT's names, such as base_model.model.<module>.lora_A.weight", remedy,
            )  # fmt: skip
    return None


def image_file(layout: Layout) -> Finding:
    """Return the finding for the one file of an image adapter, which is sound."""
    models = ", ".join(layout.models)
    if layout.method == image_names.LYCORIS:
        types = image_names.lycoris_types(layout.keys)
        text = f"a file of {layout.style} whose method PEFT does not have ({types}); it passes through as it is"
    elif layout.unknown:
        text = f"a file of {layout.style} with modules of an unknown model, whose names stay flattened"
    else:
        text = f"a file of {layout.style} for {models}"
    return finding.note("image-file", layout.unknown, text)


def mlx_folder(source: str, problem: AdapterError | None) -> Finding:
    """Return the finding for mlx-lm's folder: how to convert it, or why it cannot be."""
    if problem is not None:
        return finding.error("other-library", (), str(problem), "an adapter of mlx-lm that PEFT has a form for", _FUSE)
    return finding.error(
        "other-library", (), "the folder is mlx-lm's, which PEFT and vLLM do not read; jaxadapt does", _EXPECTED,
        f"run: jaxadapt convert {source} OUT",
    )  # fmt: skip


def not_an_adapter(keys: Collection[str], source: str) -> Finding | None:
    """Return a finding if no tensor belongs to an adapter."""
    if not keys or key_names.has_adapter_tensors(keys):
        return None
    text = f"none of the {len(keys)} tensors belongs to an adapter of PEFT, such as {next(iter(keys))}"
    if not any(key.endswith(".weight") for key in keys):
        return finding.error("no-adapter", (), text, "an adapter's tensors", "check the path")
    return finding.error(
        "whole-model", (), f"{text}: these seem to be the weights of a whole model", "an adapter's tensors",
        f"if {source} is a complete model, load it as one",
    )  # fmt: skip


def foreign_config(values: Mapping[str, Any]) -> Finding | None:
    """Return a finding if a JSON object is another library's configuration."""
    if "peft_type" in values:
        return None
    if mlx := mlx_keys(values):
        return finding.error(
            "other-library", mlx, f"adapter_config.json is mlx-lm's (no peft_type, but {', '.join(mlx)})",
            "a configuration with peft_type", _MLX,
        )  # fmt: skip
    if "architectures" in values or "model_type" in values:
        return finding.error(
            "whole-model", (), "the configuration is that of a whole model (architectures, model_type)",
            "a configuration with peft_type", "pass the adapter's folder",
        )  # fmt: skip
    return None


def training_step(folder: Location, name: str) -> Finding:
    """Return the finding for a checkpoint of a run."""
    return finding.error(
        "training-run", (name,), f"{name} is a training checkpoint of jaxadapt, in the model's own layout", _EXPECTED,
        f"run: jaxadapt checkpoints {folder} --step {name.removeprefix('step-').partition('.')[0].lstrip('0') or '0'}"
        " --export OUT",
    )  # fmt: skip


def by_name(names: Sequence[str]) -> Finding | None:
    """Return a finding for the file names of other libraries."""
    if "adapters.safetensors" in names or "adapters.npz" in names:
        return finding.error(
            "other-library", names, "the weights are mlx-lm's (adapters.safetensors)", _EXPECTED,
            _MLX,
        )  # fmt: skip
    if any(name.startswith("pytorch_lora_weights.") for name in names):
        return finding.error(
            "other-library", names, "the weights are diffusers' (pytorch_lora_weights)", _EXPECTED,
            _LIBRARIES["diffusers"][1],
        )  # fmt: skip
    return None


def other_folder(source: str, names: Sequence[str], adapters: Sequence[str]) -> Finding:
    """Return the finding for a folder without a PEFT adapter: what it holds instead, and where the adapter may be."""
    steps = [name for name in names if run_folder.NAME.fullmatch(name)]
    if steps:
        return finding.error(
            "training-run", steps, f"a training run: {finding.count(steps, 'checkpoint')}, no exported adapter",
            _EXPECTED, f"run: jaxadapt checkpoints {source} --step latest --export OUT",
        )  # fmt: skip
    if adapters:
        return finding.error(
            "subfolders", adapters, f"no adapter here, but in these subfolders: {', '.join(adapters)}", _EXPECTED,
            "pass one of them",
        )  # fmt: skip
    found = by_name(names)
    if found is not None:
        return found
    model = [name for name in names if name in _MODEL_FILES]
    if model:
        return finding.error(
            "whole-model", model, f"the folder of a whole model ({', '.join(model)})", _EXPECTED,
            "pass the adapter's folder, and this one as --base",
        )  # fmt: skip
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return finding.error(
        "no-adapter", (), f"no adapter: found {listed or 'an empty folder'}", _EXPECTED, "check the path"
    )
