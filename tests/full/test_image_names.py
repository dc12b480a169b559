"""Image adapters against diffusers: its UNet classes' modules, its conversion of kohya-ss' files, and its own files.

`pip install diffusers` brings it; without it these tests are skipped.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxadapt
from jaxadapt.export.conversion import convert
from jaxadapt.keymaps import pytorch
from jaxadapt.persistence.formats import Wanted, image_files

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
    assert modules.keys() <= set(pytorch.dotted_names("unet").values())
    names = image_files.kohya_keys(f"unet.{name}" for name in modules)
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
        image_files.write_file(file.tensors, tmp_path / "b.safetensors", Wanted("kohya-ss"), lambda *_: None)
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], x) for key, x in tensors.items())


def small_pipeline() -> dict[str, Any]:
    """Return {model of a pipeline: a small one of diffusers and transformers}."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        **{**SHARED, "layers_per_block": 1}, block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=16, max_position_embeddings=8, projection_dim=8, **sizes)
    return {"unet": unet, "text_encoder": CLIPTextModel(text)}


def save_pipeline(folder: Path) -> dict[str, float]:
    """Save adapters with PEFT's settings in diffusers' file, and return the scale of each adapted module.

    The first call in a process wrote tests/persistence/recorded_diffusers.safetensors.
    """
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    models, attention = small_pipeline(), "mid_block.attentions.0.transformer_blocks.0"
    models["unet"].add_adapter(LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, rank_pattern={"attn2.to_k": 3}, alpha_pattern={"attn2.to_k": 5},
        target_modules=[f"{attention}.attn1.to_k", f"{attention}.attn2.to_k"],
    ))  # fmt: skip
    models["text_encoder"].add_adapter(LoraConfig(
        r=2, lora_alpha=6, init_lora_weights=False, use_rslora=True, lora_dropout=0.1, target_modules=["q_proj"]
    ))  # fmt: skip
    layers = {m: convert_state_dict_to_diffusers(get_peft_model_state_dict(model)) for m, model in models.items()}
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers["unet"], text_encoder_lora_layers=layers["text_encoder"],
        **_collate_lora_metadata(models),
    )  # fmt: skip
    return _scales(models, "default")


def _scales(models: dict[str, Any], name: str) -> dict[str, float]:
    from peft.tuners.lora import LoraLayer

    return {
        f"{model}.{module}": layer.scaling[name]
        for model, root in models.items() for module, layer in root.named_modules() if isinstance(layer, LoraLayer)
    }  # fmt: skip


@pytest.mark.parametrize("through", ["kohya-ss", "folders", None])
def test_diffusers_scales_a_written_file_as_the_one_that_it_saved(through: str | None, tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    expected = save_pipeline(tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    if through is not None:
        other = tmp_path / ("peft" if through == "folders" else "k.safetensors")
        convert(path, other, format=None if through == "folders" else through)
        path = tmp_path / "again.safetensors"
        convert(other, path, format="diffusers")
    config = jaxadapt.read_config(path)
    assert {module: config.scale_of(module) for module in expected} == pytest.approx(expected, rel=1e-15)
    models = small_pipeline()
    tensors, alphas, stated = StableDiffusionPipeline.lora_state_dict(str(path), return_lora_metadata=True)
    given = {"network_alphas": alphas, "metadata": stated, "adapter_name": "a"}
    StableDiffusionPipeline.load_lora_into_unet(tensors, unet=models["unet"], **given)
    StableDiffusionPipeline.load_lora_into_text_encoder(tensors, text_encoder=models["text_encoder"], **given)
    assert _scales(models, "a") == pytest.approx(expected, rel=1e-15)
