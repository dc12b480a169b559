"""The names of image adapters against diffusers: its UNet classes' modules, and its conversion of kohya-ss' files.

`pip install diffusers` brings it; without it these tests are skipped.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxadapt.keymaps import diffusion_names
from jaxadapt.persistence import image_files, image_names

P = "base_model.model."
SHARED: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 8,
    "norm_num_groups": 2, "attention_head_dim": 2,
}  # fmt: skip
SDXL: dict[str, Any] = {
    "block_out_channels": (4, 8, 8), "use_linear_projection": True, "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_time_embed_dim": 4,
    "addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 16,
}  # fmt: skip
VERSIONS = {"SD": {"block_out_channels": (4, 4, 8, 8)}, "SDXL": SDXL}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")


@pytest.mark.parametrize("version", VERSIONS)
def test_every_module_is_what_diffusers_takes_it_for(version: str, tmp_path: Path):
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import lora_conversion_utils as conversion
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from safetensors.torch import load_file, save_file

    unet = UNet2DConditionModel(**SHARED, **VERSIONS[version])
    modules = {
        name: module for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert modules.keys() <= set(diffusion_names.dotted_names("unet").values())
    names = image_names.kohya_keys(f"unet.{name}" for name in modules)
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, module) in enumerate(modules.items()):
        (rows, columns), window = module.weight.shape[:2], module.weight.shape[2:]
        key = names[f"unet.{name}"]
        tensors[f"{key}.lora_down.weight"] = torch.randn(2, columns, *window)
        tensors[f"{key}.lora_up.weight"] = torch.randn(rows, 2, *(1 for _ in window))
        tensors[f"{key}.alpha"] = torch.tensor(1.0 + number % 5)
    theirs = dict(tensors)
    if version == "SDXL":
        theirs = conversion._maybe_map_sgm_blocks_to_diffusers(theirs, unet.config)
    theirs, alphas = conversion._convert_non_diffusers_lora_to_diffusers(theirs)
    theirs = convert_unet_state_dict_to_peft({key.removeprefix("unet."): x for key, x in theirs.items()})
    save_file(tensors, tmp_path / "a.safetensors")
    with image_files.open_file(tmp_path / "a.safetensors") as file:
        ours, config = file.tensors.tensors, file.tensors.config
        assert {key.removeprefix(f"{P}unet.") for key in ours} == theirs.keys()
        for key, x in theirs.items():
            np.testing.assert_array_equal(ours[f"{P}unet.{key}"], x.numpy(), err_msg=key)
        assert len(alphas) == len(modules)
        for number, name in enumerate(modules):
            assert config.scale_of(f"unet.{name}") == (1 + number % 5) / 2
        image_files.write_file(file.tensors, tmp_path / "b.safetensors")
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], x) for key, x in tensors.items())
