"""Names that no JAX class of ours shows: Qwen's lines of the table "llama", and vision-language spellings."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

import jaxadapt
from jaxadapt.core import paths
from jaxadapt.keymaps import families, plan
from tests.keymaps.families import jax_side, specimen_arrays, torch_side
from tests.keymaps.families.specimens import BY_NAME, DECODER, SIZES, recorded, rope, values
from tests.support.twins import trees

pytestmark = pytest.mark.peft


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3"])
def test_the_llama_table_holds_qwens_biases_and_norms(name):
    """Flax's own convention, written out: a Dense kernel is the transposed weight, all else is as it was."""
    config = getattr(tf, f"{name}Config")(**DECODER, **rope(), tie_word_embeddings=False)
    weights = {k: x.numpy() for k, x in getattr(tf, f"{name}ForCausalLM")(config).state_dict().items()}
    leaves = {}
    for key, x in weights.items():
        stem = key.removesuffix(".weight")
        if key.endswith("embed_tokens.weight"):
            leaves[f"{stem}.embedding"] = x
        else:
            leaves[key if x.ndim == 1 else f"{stem}.kernel"] = x.T
    shapes = {path: x.shape for path, x in leaves.items()}
    assert any("q_norm" in path or "q_proj.bias" in path for path in leaves)
    table = families.resolve_keymap("auto", shapes)
    assert table.name == "llama"
    made = plan.base_plan(table, shapes)
    assert set(made.keys) == set(weights)
    for path, leaf in made.decode(weights).items():
        np.testing.assert_array_equal(leaf, leaves[path])


def vision_language() -> torch.nn.Module:
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 6, "query_pre_attn_scalar": 6}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = tf.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    with torch.device("meta"):
        return tf.Gemma3ForConditionalGeneration(config)


def test_the_adapter_of_a_vision_language_model_fits_the_language_model_alone(tmp_path):
    """The keys are PEFT's on transformers' own class; read, loaded and saved again they are the same."""
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)")
    keys = {
        name.replace(".default", ""): tuple(x.shape)
        for name, x in get_peft_model(vision_language(), config).named_parameters()
        if "lora_" in name
    }
    tensors = {key: values(key, shape) for key, shape in keys.items()}
    ours = jaxadapt.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)")
    jaxadapt.write(jaxadapt.PeftTensors(ours, tensors), tmp_path / "a")
    specimen = BY_NAME["gemma-gemma3"]
    shapes = recorded(specimen.name)["leaves"] if not jax_side.here(specimen) else jax_side.side(specimen).shapes
    variables = {"params": trees.nest(specimen_arrays.base_leaves(specimen, shapes))}
    loaded = jaxadapt.load(tmp_path / "a", variables)
    assert jaxadapt.extract(loaded).keymap.name == "gemma:gemma3/vl"
    jaxadapt.save(loaded, tmp_path / "b")
    found = jaxadapt.read(tmp_path / "b").tensors
    assert set(found) == set(tensors)
    for key, value in tensors.items():
        np.testing.assert_array_equal(found[key], value)


def test_the_base_weights_of_a_vision_language_model_are_the_spellings_own():
    """Each weight of the language model inside is a key of the table, and nothing else begins so."""
    names = [key for key in vision_language().state_dict() if "language_model" in key]
    shapes = recorded("gemma-gemma3")["leaves"]
    assert set(plan.base_plan(families.get_family("gemma:gemma3/vl"), shapes).keys) == set(names)


def test_a_vit_in_files_of_either_naming(tmp_path):
    """Whole models keep the names of transformers 4 (5 writes them so); adapters have those they were made with."""
    specimen = BY_NAME["flax-vit"]
    shapes = recorded(specimen.name)["leaves"]
    torch_side.base(specimen.name).save_pretrained(tmp_path / "base")
    leaves = specimen_arrays.base_leaves(specimen, shapes)
    target = trees.nest({path: np.zeros_like(x) for path, x in leaves.items()})
    found = jaxadapt.export.import_base(tmp_path / "base", target)
    for path, x in paths.flatten(found).items():
        np.testing.assert_array_equal(x, leaves[path])
    keys = {k for table in ("vit", "vit/v4") for k in plan.base_plan(families.get_family(table), shapes).keys}
    assert {"vit.layers.1.attention.q_proj.weight", "vit.encoder.layer.1.attention.attention.query.weight"} <= keys
    files = []
    for table, targets in (("vit", ["q_proj"]), ("vit/v4", ["query"])):
        config = jaxadapt.LoraConfig(r=2, target_modules=targets)
        files.append(jaxadapt.to_peft(jaxadapt.init(found, config, key=jax.random.key(0), keymap=table)))
        adapter = jaxadapt.from_peft(files[-1], found)
        assert adapter.keymap.name == table
        assert set(jaxadapt.to_peft(adapter).tensors) == set(files[-1].tensors)
    new, old = (set(file.tensors) for file in files)
    assert new == {k.replace("encoder.layer", "layers").replace("attention.query", "q_proj") for k in old}


def test_an_adapter_of_tunix_without_its_base_is_recognized():
    """Bonsai's Qwen 3 has the same names and layouts of these modules."""
    leaves = [f"layers.0.mlp.{p}_proj.kernel" for p in ("gate", "up", "down")]
    assert all(families.get_family("bonsai:qwen3").match(leaf) is not None for leaf in leaves)
    assert families.family_of_leaves(leaves).name == "tunix:llama3"


@pytest.mark.parametrize("table", ["bonsai:vit/v4", "bonsai:dinov3/v4", "bonsai:gemma3/file"])
def test_bonsais_spellings_are_the_names_in_files(table, tmp_path):
    """As transformers writes them; published files have one more name in the path of Gemma's vision tower."""
    name = table.partition("/")[0].replace(":", "-")
    torch_side.base(name).save_pretrained(tmp_path)
    keys = {
        re.sub("^vision_tower", "vision_tower.vision_model", key) for key in load_file(tmp_path / "model.safetensors")
    }
    assert set(plan.base_plan(families.get_family(table), recorded(name)["leaves"]).keys) == keys


def test_an_adapter_of_gemma_without_vision_fits_bonsais_gemma():
    text = {k: v for k, v in BY_NAME["bonsai-gemma3"].config["text_config"].items() if k != "tie_word_embeddings"}
    with torch.device("meta"):
        model = get_peft_model(
            tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**text)), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
        )
    keys = {k.replace(".default", ""): tuple(x.shape) for k, x in model.named_parameters() if "lora_" in k}
    file = jaxadapt.PeftTensors(
        jaxadapt.LoraConfig(r=2, target_modules=r"model\.layers.*\.(q_proj|down_proj)"),
        {key: values(key, shape) for key, shape in keys.items()},
    )
    tree = trees.nest({path: np.zeros(shape, "float32") for path, shape in recorded("bonsai-gemma3")["leaves"].items()})
    adapter = jaxadapt.from_peft(file, tree)
    assert adapter.keymap.name == "bonsai:gemma3/text"
    assert set(jaxadapt.to_peft(adapter).tensors) == set(keys)
