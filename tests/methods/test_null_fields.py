"""A null in adapter_config.json means what PEFT computes with it, and is refused where PEFT's own load fails."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxadapt
from jaxadapt import methods

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch
from peft import PeftModel

from tests.methods import test_conformance_peft
from tests.support import peft_harness as harness
from tests.support import prompts

pytestmark = pytest.mark.peft

# Fields that PEFT reads only if others are set, and that are refused here.
STRICTER = {
    ("BOFT", "boft_n_butterfly_factor"),  # PEFT sets it to 1 where its CUDA extension is missing, and fails elsewhere
    ("DEFT", "init_scale"),  # read with init_weights=false
    ("MISS", "mini_r"),  # read with init_weights="mini"
    ("OFT", "eps"),  # read with coft
    ("OFT", "num_cayley_neumann_terms"),  # read with use_cayley_neumann
    ("UNILORA", "proj_seed"),  # PEFT draws another projection at each load
}
# Older versions of PEFT wrote null for the number of steps, which only training reads. PEFT 0.21.2 opens no such file.
MILDER = {("ADALORA", "total_step")}
UNTOUCHED = {
    "peft_type",
    "target_modules",
    "feedforward_modules",
    "peft_version",
    "task_type",
    "token_indices",
    "num_virtual_tokens",
}


def outputs(folder: Path) -> np.ndarray | None:
    """PEFT's logits with the adapter of a folder; None if PEFT does not open it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = PeftModel.from_pretrained(copy.deepcopy(test_conformance_peft.torch_base()), str(folder)).eval()
            with torch.no_grad():
                return model(torch.from_numpy(test_conformance_peft.IDS)).logits.numpy()
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return None


def check_each_field(folder: Path, name: str, run: Any) -> int:
    """Set each field of a folder's configuration to null, compare with PEFT, and return the number of those read."""
    file, read = folder / harness.CONFIG, 0
    stated = json.loads(file.read_text())
    whole, want = jaxadapt.read_config(folder), run(folder)
    for field in sorted(stated.keys() - UNTOUCHED):
        if stated[field] is None:
            continue
        file.write_text(json.dumps({**stated, field: None}))
        theirs = run(folder)
        try:
            ours = jaxadapt.read_config(folder)
        except jaxadapt.ConfigError:
            assert theirs is None or (name, field) in STRICTER, field
            continue
        read += 1
        if (name, field) in MILDER:
            assert theirs is None
            continue
        assert theirs is not None, field
        if ours != whole:  # what is read here means the same to PEFT
            file.write_text(ours.to_json())
        np.testing.assert_array_equal(theirs, run(folder) if ours != whole else want, err_msg=field)
    file.write_text(json.dumps(stated))
    return read


@pytest.mark.parametrize(
    ("peft_type", "i"), [(name, 0) for name, m in sorted(methods.METHODS.items()) if m.scope != "model"]
)
def test_null_of_each_field_of_a_method(peft_type: str, i: int, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        test_conformance_peft.peft_model(peft_type, i).save_pretrained(str(tmp_path))
    assert check_each_field(tmp_path, peft_type, outputs)


@pytest.mark.parametrize("case", prompts.TYPES, ids=str)
def test_null_of_each_field_of_a_prompt(case: prompts.Case, tmp_path: Path):
    def run(folder: Path) -> np.ndarray | None:
        try:
            model = PeftModel.from_pretrained(copy.deepcopy(prompts.torch_base()), str(folder)).eval()
        except (TypeError, ValueError):
            return None
        with torch.no_grad():
            return prompts.call_peft(case, model, prompts.FULL).numpy()

    prompts.peft_model(case).save_pretrained(tmp_path)
    assert check_each_field(tmp_path, case.ours().peft_type, run)


BOOLEANS = ("use_dora", "use_rslora", "use_qalora", "lora_bias", "ensure_weight_tying", "init_lora_weights")


def test_a_file_with_nulls_gives_pefts_logits(tmp_path: Path):
    """All of LoRA's booleans at once, as a program writes them that knows no defaults; saved again they are false."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        test_conformance_peft.peft_model("LORA", 0).save_pretrained(str(tmp_path / "theirs"))
    file = tmp_path / "theirs" / harness.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | dict.fromkeys((*BOOLEANS, "qalora_group_size"))))
    want = outputs(tmp_path / "theirs")
    assert want is not None
    model = jaxadapt.load(tmp_path / "theirs", test_conformance_peft.nnx_model())
    test_conformance_peft.assert_close(model(test_conformance_peft.IDS), want)
    jaxadapt.save(model, tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / harness.CONFIG).read_text())
    assert {name: saved[name] for name in BOOLEANS} == dict.fromkeys(BOOLEANS, False)
    assert saved["qalora_group_size"] == 16


def test_a_null_that_was_true_is_false(tmp_path: Path):
    """Not the default: PEFT asks for the truth of the value."""
    values = {"peft_type": "OFT", "use_cayley_neumann": None, "target_modules": ["q"]}
    assert jaxadapt.Config.from_dict(values).get("use_cayley_neumann") is False
    with pytest.raises(jaxadapt.ConfigError, match=r"rank_pattern: expected an object .*, found null; write \{\}"):
        jaxadapt.Config.from_dict({"peft_type": "LOHA", "rank_pattern": None})
    with pytest.raises(jaxadapt.ConfigError, match="use_dora: expected true or false, found null"):
        jaxadapt.LoraConfig(use_dora=None)  # in code it is a mistake
