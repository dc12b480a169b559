"""keras-hub's own converters from Hugging Face's files beside the keymaps: the same variables, bit for bit.

keras-hub needs tensorflow-text, which the extra `test` leaves out; its JAX backend runs without it:

    pip install 'jaxadapt[test]' kagglehub && pip install --no-deps keras-hub==0.32.0

Skipped without it. There `pytest tests/keymaps/families/test_proof.py -k keras` runs keras-hub's classes too, beside
PEFT. keras-hub has no converter for Phi 3. The converter of Mistral rounds the head to float16, and that of Qwen 3 MoE
fails at layers without experts.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

if importlib.util.find_spec("keras_hub") is None:
    pytest.skip("needs keras-hub", allow_module_level=True)

from tests.keymaps.families import jax_side, specimen_arrays, torch_side
from tests.keymaps.families.specimens import BY_NAME

pytestmark = [
    pytest.mark.slow,
    pytest.mark.peft,
    pytest.mark.usefixtures("foreign_model"),
    pytest.mark.filterwarnings("ignore"),  # its own, and its libraries'
]

CONVERTERS = {
    "keras-gemma": "gemma",
    "keras-gemma2": "gemma",
    "keras-gemma3": "gemma3",
    "keras-gpt2": "gpt2",
    "keras-bert": "bert",
    "keras-roberta": "roberta",
    "keras-gemma4-e": "gemma4",
    "keras-gemma4-large": "gemma4",
    "keras-gemma4-moe": "gemma4",
    "keras-llama": "llama3",
    "keras-qwen2": "qwen",
    "keras-qwen3": "qwen3",
    "keras-mixtral": "mixtral",
    "keras-qwen2moe": "qwen_moe",
}


@pytest.mark.parametrize("name", CONVERTERS)
def test_its_converter_makes_the_same_variables(name: str, tmp_path: Path):
    specimen = BY_NAME[name]
    torch_side.base(name).save_pretrained(str(tmp_path))
    config = torch_side.base(name).config.to_dict()
    model = jax_side.keras_backbone(specimen)
    backbone = getattr(model, "backbone", model)
    utils = "keras_hub.src.utils.transformers"
    converter = importlib.import_module(f"{utils}.convert_{CONVERTERS[name]}")
    with importlib.import_module(f"{utils}.safetensor_utils").SafetensorLoader(str(tmp_path)) as loader:
        converter.convert_weights(backbone, loader, config)
    shapes = {v.path.replace("/", "."): tuple(v.shape) for v in model.weights}
    ours = specimen_arrays.base_leaves(specimen, shapes)
    own = {v.path.replace("/", "."): np.asarray(v.value) for v in backbone.weights}
    heads = ("logits.", "pooled_dense.")  # of a classifier, which the converter of a backbone does not make
    assert all(path.startswith(heads) for path in set(shapes) - set(own))
    for path, value in own.items():
        if (name, path) == ("keras-roberta", "embeddings.position_embedding.embeddings"):
            continue  # it leaves out the token type, which our leaf has
        np.testing.assert_array_equal(value, ours[path], err_msg=path)
