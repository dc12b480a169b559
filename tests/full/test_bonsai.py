"""Bonsai's own models: the weights that its own loaders read, and adapters from JAX in PEFT and back.

It needs the package of github.com/jax-ml/bonsai and is skipped without it:

    pip install --no-deps git+https://github.com/jax-ml/bonsai@3628425
    python -m pytest tests/full/test_bonsai.py

Each loader reads a folder of Hugging Face's files, which transformers writes here. Three loaders need help. Whisper's
has the sizes of one model in it. UMT5's fails on safetensors files, so it reads `.bin`. Qwen 3's leaves numpy arrays,
which the model takes only in `jax.jit`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt import KeyMapError
from jaxadapt.core import paths
from jaxadapt.keymaps import families, plan
from tests.keymaps.families import bonsai_side
from tests.keymaps.families.specimens import BY_NAME, INPUTS, Specimen
from tests.support.twins import trees

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
import transformers
from peft import PeftModel

from tests.keymaps.families import torch_side

pytestmark = [
    pytest.mark.peft,
    pytest.mark.slow,
    pytest.mark.usefixtures("foreign_model"),
    pytest.mark.skipif(importlib.util.find_spec("bonsai") is None, reason="needs Bonsai: see the docstring"),
]
NAMES = [name for name in BY_NAME if name.startswith("bonsai-")]
CLOSE = {"rtol": 0, "atol": 1e-4}  # as in tests/keymaps/families/test_proof.py


def loader(model: str) -> Any:
    return importlib.import_module(f"bonsai.models.{model}.params")


def library(model: str) -> Any:
    return importlib.import_module(f"bonsai.models.{model}.modeling")


def qwen3(folder: Path, tied: bool = False) -> nnx.Module:
    model = loader("qwen3").create_model_from_safe_tensors(folder, bonsai_side.qwen3_config(tied))
    nnx.update(model, jax.tree.map(jnp.asarray, nnx.state(model)))
    return model


def umt5(folder: Path, cls: str = "UMT5Model") -> nnx.Module:
    return loader("umt5").create_model(getattr(library("umt5"), cls), folder / "bin", bonsai_side.umt5_config())


def whisper(folder: Path) -> nnx.Module:
    config = bonsai_side.whisper_config()
    with mock.patch.object(library("whisper").ModelConfig, "whisper_tiny", return_value=config):
        return loader("whisper").create_whisper_from_pretrained(folder)


LOADERS: dict[str, Callable[[Path], nnx.Module]] = {
    "bonsai-qwen3": qwen3,
    "bonsai-gemma3": lambda folder: loader("gemma3").create_gemma3_from_pretrained(folder, bonsai_side.gemma3_config()),
    "bonsai-vit": lambda folder: loader("vit").create_vit_from_pretrained(folder, bonsai_side.vit_config()),
    "bonsai-dinov3": lambda folder: loader("dinov3").create_model_from_safe_tensors(
        folder, bonsai_side.dinov3_config(gated=False)
    ),
    "bonsai-dinov3-gated": lambda folder: loader("dinov3").create_model_from_safe_tensors(
        folder, bonsai_side.dinov3_config(gated=True)
    ),
    "bonsai-whisper": whisper,
    "bonsai-umt5": umt5,
}


def write(model: Any, folder: Path) -> Path:
    """The model's files; Gemma's vision tower with the names that the published files have."""
    model.save_pretrained(folder)
    (folder / "bin").mkdir()
    torch.save(model.state_dict(), folder / "bin" / "pytorch_model.bin")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if any(key.startswith("vision_tower.") for key in tensors):
        named = {key.replace("vision_tower.", "vision_tower.vision_model."): x for key, x in tensors.items()}
        save_file(named, file, {"format": "pt"})
    return folder


def without_torch(leaves: dict[str, Any]) -> dict[str, Any]:
    """The leaves that PyTorch has; the others are the biases of Whisper's keys, and are zero."""
    own = {path for path in leaves if path.endswith("_attn.key.bias")}
    assert all(not np.asarray(leaves[path]).any() for path in own)
    return {path: x for path, x in leaves.items() if path not in own}


def values_of(model: nnx.Module) -> dict[str, np.ndarray]:
    leaves = {path: np.asarray(x.get_value()) for path, x in trees.nnx_leaves(model).items()}
    return without_torch(leaves)


def same_as_the_loader(model: nnx.Module, state: dict[str, np.ndarray], folder: Path) -> None:
    """Our keymap, from the state dict and from the files, gives the weights that Bonsai's loader gave."""
    loaded = values_of(model)
    table = families.resolve_keymap("auto", {path: x.shape for path, x in loaded.items()})
    made = plan.base_plan(table, {path: x.shape for path, x in loaded.items()})
    assert set(made.keys) <= set(state)
    decoded = made.decode({key: state[key] for key in made.keys})
    empty = trees.nest({path: np.zeros_like(x) for path, x in loaded.items()})
    imported = paths.flatten(jaxadapt.export.import_base(folder, empty))
    assert set(loaded) == set(decoded) == set(imported)
    for path, x in loaded.items():
        np.testing.assert_array_equal(decoded[path], x, err_msg=path)
        np.testing.assert_array_equal(imported[path], x, err_msg=path)


def outputs(model: Any, specimen: Specimen) -> np.ndarray:
    return torch_side.outputs(model, specimen.inputs)


def through_peft(model: nnx.Module, base: Any, targets: tuple[str, ...], folder: Path) -> tuple[nnx.Module, Any]:
    """The model with a random adapter, and PEFT's model with the file of it."""
    config = jaxadapt.LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), init_lora_weights=False)
    adapted = jaxadapt.adapt(model, config, rngs=nnx.Rngs(1))
    jaxadapt.save(adapted, folder)
    peft_model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    keys = {key.replace(".default", "") for key in peft_model.state_dict() if "lora_" in key}
    assert keys == set(jaxadapt.read(folder).tensors)
    return adapted, peft_model


@pytest.mark.parametrize("name", NAMES)
def test_its_loader_reads_the_weights_that_the_keymap_maps(name, tmp_path):
    base = torch_side.base(name)
    same_as_the_loader(
        LOADERS[name](write(base, tmp_path / "base")), torch_side.state(BY_NAME[name]), tmp_path / "base"
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_jax_in_peft_and_back(name, tmp_path):
    specimen, base = BY_NAME[name], torch_side.base(name)
    folder = write(base, tmp_path / "base")
    _, run, _ = bonsai_side.MODELS[specimen.options["model"]](specimen)
    adapted, peft_model = through_peft(LOADERS[name](folder), base, specimen.targets, tmp_path / "adapter")
    expected = outputs(peft_model, specimen)
    assert np.abs(expected - torch_side.logits(name, adapter=False)).max() > 0.1
    np.testing.assert_allclose(np.asarray(run(adapted)), expected, **CLOSE)
    peft_model.save_pretrained(str(tmp_path / "peft"))
    again = jaxadapt.load(tmp_path / "peft", LOADERS[name](folder))
    np.testing.assert_array_equal(np.asarray(run(again)), np.asarray(run(adapted)))


def test_a_tied_qwen3_has_its_embedding_twice(tmp_path):
    specimen = BY_NAME["bonsai-qwen3"]
    base = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**{**specimen.config, "tie_word_embeddings": True}, attn_implementation="eager")
    ).eval()
    folder = write(base, tmp_path / "base")
    model = qwen3(folder, tied=True)
    same_as_the_loader(model, {key: x.numpy() for key, x in base.state_dict().items()}, folder)
    adapted, peft_model = through_peft(model, base, specimen.targets, tmp_path / "adapter")
    _, run, _ = bonsai_side.qwen3(specimen)
    np.testing.assert_allclose(np.asarray(run(adapted)), outputs(peft_model, specimen), **CLOSE)


def test_the_encoder_of_umt5_alone(tmp_path):
    specimen = BY_NAME["bonsai-umt5"]
    base = transformers.UMT5EncoderModel(transformers.UMT5Config(**specimen.config, attn_implementation="eager")).eval()
    folder = write(base, tmp_path / "base")
    model = umt5(folder, "UMT5EncoderModel")
    same_as_the_loader(model, {key: x.numpy() for key, x in base.state_dict().items()}, folder)
    adapted, peft_model = through_peft(model, base, specimen.targets, tmp_path / "adapter")
    expected = torch_side.outputs(peft_model, ("input_ids",))
    np.testing.assert_allclose(np.asarray(adapted(jnp.asarray(INPUTS["input_ids"]))), expected, **CLOSE)


OTHERS: dict[str, Callable[[Any], nnx.Module]] = {
    "vjepa2": lambda models: models.VJEPA2Model(models.ModelConfig.standard_test(), nnx.Rngs(0)),
    "qwen3_vl": lambda models: models.Qwen3VLForConditionalGeneration(
        models.ModelConfig.qwen3vl_2b(), rngs=nnx.Rngs(0)
    ),
    "mamba2": lambda models: models.Mamba2ForCausalLM(models.ModelConfig(), rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_its_other_models_are_refused(name):
    models = library(name)
    model = nnx.eval_shape(lambda: OTHERS[name](models))
    config = jaxadapt.LoraConfig(r=2, target_modules="all-linear")
    with pytest.raises(KeyMapError, match=f"no keymap has the names of bonsai.models.{name}"):
        jaxadapt.adapt(model, config, rngs=nnx.Rngs(0))
