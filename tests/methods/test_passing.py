"""Types that are not applied: their files are read and written unchanged, and loading them says why."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxadapt
from jaxadapt import ConfigError, GenericConfig, MismatchError
from jaxadapt.configs import matching

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft

from tests.support.twins import llama

pytestmark = pytest.mark.peft


def base() -> Any:
    return llama.torch_llama(layers=2, width=16, inner=24, heads=2, kv_heads=1)


def passes(folder: Path, reason: str) -> None:
    """Check that a folder goes through unchanged, and that it cannot be applied, for this reason."""
    jaxadapt.write(jaxadapt.read(folder), folder.with_name("again"))
    again = folder.with_name("again")
    one, two = (json.loads((path / "adapter_config.json").read_text()) for path in (folder, again))
    assert one.items() <= two.items()  # PEFT writes more fields than the file that is written by hand
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, again))
    assert before.keys() == after.keys()
    assert before
    for key, x in before.items():
        assert (x.dtype, x.tobytes()) == (after[key].dtype, after[key].tobytes())
    with pytest.raises(ConfigError, match=re.escape(reason)):
        jaxadapt.load(folder, llama.twin_of(base(), "nnx"))


def save(config: Any, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(base(), config).save_pretrained(str(folder))


@pytest.mark.parametrize("peft_type", ["PSOFT", "LILY", "POLY", "GLORA", "FROD"])
def test_pefts_file_of_a_type_that_is_not_applied(peft_type: str, tmp_path: Path):
    fields = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    made = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[peft_type]]
    names = made.__dataclass_fields__
    save(made(**{name: value for name, value in fields.items() if name in names}), tmp_path / "peft")
    passes(tmp_path / "peft", matching.PASSING[peft_type])


def test_shadow(tmp_path: Path):
    save(peft.ShadowConfig(task_type="CAUSAL_LM"), tmp_path / "peft")
    passes(tmp_path / "peft", "it trains a second decoder beside the model")


def test_adamss(tmp_path: Path):
    """PEFT needs scikit-learn for it, so the file is written by hand, with PEFT's keys."""
    (tmp_path / "peft").mkdir()
    config = {"peft_type": "ADAMSS", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 4, "num_subspaces": 2}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    rows = {f"{module}.adamss_A.{j}": np.full((1, 4), j, "float32") for j in range(2)}
    rows |= {f"{module}.adamss_B.{j}": np.ones((8, 1), "float32") for j in range(2)}
    save_file(
        {**rows, f"{module}.adamss_newB": np.ones((4, 16), "float32")}, tmp_path / "peft/adapter_model.safetensors"
    )
    passes(tmp_path / "peft", "its rows come from scikit-learn's KMeans on PyTorch's SVD and are not in the file")


@pytest.mark.parametrize(
    ("config", "tensors", "reason"),
    [
        (
            {"peft_type": "BOFT", "boft_n_butterfly_factor": 2, "boft_block_size": 4},
            {"boft_R": (2, 4, 4, 4), "boft_s": (16, 1)},
            "several butterfly factors",
        ),
        (
            {"peft_type": "RANDLORA", "save_projection": False, "r": 4},
            {"randlora_lambda": (4, 4), "randlora_gamma": (4, 16)},
            "save_projection=false",
        ),
    ],
    ids=["boft", "randlora"],
)
def test_a_meaning_that_depends_on_the_machine(config: Any, tensors: Any, reason: str, tmp_path: Path):
    """BOFT's several factors need CUDA in PEFT, and RANDLORA's bases follow the machine's dtype; written by hand."""
    (tmp_path / "peft").mkdir()
    values = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **config}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(values))
    modules = [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in range(2)]
    arrays = {f"{module}.{name}": np.ones(shape, "float32") for module in modules for name, shape in tensors.items()}
    save_file(arrays, tmp_path / "peft/adapter_model.safetensors")
    passes(tmp_path / "peft", reason)


@pytest.mark.parametrize("depth", [1, 2])
def test_xlora_keeps_one_layer_of_its_classifier_or_none(depth: int, tmp_path: Path):
    """PEFT's fault: it drops the classifier's layers whose numbers are also names of adapters, "0" and "1".

    A file without tensors is refused, because there is nothing to read.
    """
    adapters = {}
    for name in ("0", "1"):
        save(peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path / name)
        adapters[name] = str(tmp_path / name)
    model = copy.deepcopy(base())
    model.config.use_cache = False
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, xlora_depth=depth, adapters=adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(model, config).save_pretrained(str(tmp_path / "peft"))
    kept = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    if depth == 1:
        assert not kept
        with pytest.raises(MismatchError, match="no tensors in the file"):
            jaxadapt.read(tmp_path / "peft")
        return
    assert all(".layers.2." in key or ".layers.3." in key for key in kept)
    passes(tmp_path / "peft", "it runs the model twice and scales whole LoRA adapters")


def test_every_type_that_passes_says_why():
    reasons = matching.passing_types()
    assert all(reasons.values())
    assert {"ADAMSS", "XLORA", "SHADOW"} <= reasons.keys()
    for peft_type, reason in reasons.items():
        with pytest.raises(ConfigError, match=f"cannot apply peft_type '{peft_type}': {re.escape(reason)}"):
            jaxadapt.methods.get_method(GenericConfig(peft_type=peft_type))
