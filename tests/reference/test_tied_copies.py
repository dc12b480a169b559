"""LN_TUNING on a token embedding that is the head too: in PEFT they are two modules, and the copy is of the lookup."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch
from transformers import AutoModelForCausalLM

import jaxadapt
from jaxadapt.cli import main
from tests.support import peft_harness as harness
from tests.support.twins import gpt2

pytestmark = pytest.mark.peft
IDS = np.random.RandomState(0).randint(0, 64, (2, 5))
TARGETS = [["wte"], ["wte", "ln_f"], ["c_attn", "ln_f"]]


def trained(api: str, targets: list[str], folder: Path) -> tuple[Any, Any, np.ndarray]:
    """PEFT's base, our twin of it, and PEFT's logits with the adapter in `folder`."""
    base, twin = gpt2.make_gpt2(api, layers=1, width=16, heads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says of each norm that it does not know the type
        model = peft.get_peft_model(
            copy.deepcopy(base), peft.LNTuningConfig(target_modules=targets, task_type="CAUSAL_LM")
        ).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        harness.save(model, folder)
    return base, twin, harness.logits(model, IDS)


def close(found: Any, want: np.ndarray) -> None:
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * abs(want).max())  # another order of sums


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_pefts_logits_and_file(api: str, targets: list[str], tmp_path: Path):
    _, twin, want = trained(api, targets, tmp_path / "theirs")
    if api == "nnx":
        loaded = jaxadapt.load(tmp_path / "theirs", twin)
        found = loaded(jnp.asarray(IDS))
    else:
        module, variables = twin
        loaded = jaxadapt.load(tmp_path / "theirs", variables)
        found = jaxadapt.adapt(module, jaxadapt.extract(loaded).config).apply(loaded, jnp.asarray(IDS))
    close(found, want)
    jaxadapt.save(loaded, tmp_path / "ours")
    ours, theirs = (harness.read_tensors(tmp_path / name) for name in ("ours", "theirs"))
    assert harness.specs(ours) == harness.specs(theirs)
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_a_merge_of_files_gives_the_head_a_tensor_of_its_own(targets: list[str], tmp_path: Path):
    base, twin, want = trained("linen", targets, tmp_path / "theirs")
    base.save_pretrained(tmp_path / "base")
    result = CliRunner().invoke(
        main, ["merge", str(tmp_path / "base"), str(tmp_path / "theirs"), "--out", str(tmp_path / "merged")]
    )
    assert result.exit_code == 0, result.output
    close(harness.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), IDS), want)
    if "wte" in targets:  # one array cannot be both
        adapter = jaxadapt.extract(jaxadapt.load(tmp_path / "theirs", twin[1]))
        with pytest.raises(
            jaxadapt.AttachError, match=r"also the head.*with a separate head \(as PEFT's merge does\)$"
        ):
            jaxadapt.merge(twin[1]["params"], adapter)


@pytest.mark.parametrize("equal", [True, False])
def test_a_merge_of_files_takes_the_rows_that_peft_writes_twice(equal: bool, tmp_path: Path):
    """TRAINABLE_TOKENS of a tied embedding: PEFT writes its rows under the head's name too. The weight stays one."""
    base, _ = gpt2.make_gpt2("linen", layers=1, width=16, heads=2)
    config = peft.TrainableTokensConfig(target_modules=["wte"], token_indices=[3, 1], task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    harness.save(model, tmp_path / "theirs")
    base.save_pretrained(tmp_path / "base")
    tensors = jaxadapt.read(tmp_path / "theirs")
    rows = {key: np.asarray(x) for key, x in tensors.tensors.items()}
    assert len(rows) == 2
    if not equal:
        rows["base_model.model.lm_head.trainable_tokens_delta"] += 1
        jaxadapt.write(jaxadapt.PeftTensors(tensors.config, rows), tmp_path / "theirs")
    result = CliRunner().invoke(
        main, ["merge", str(tmp_path / "base"), str(tmp_path / "theirs"), "--out", str(tmp_path / "merged")]
    )
    assert (result.exit_code == 0) is equal, result.output
    if equal:
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert merged.config.tie_word_embeddings
        close(harness.logits(merged, IDS), harness.logits(model, IDS))
    else:
        assert "the head is tied to the embedding, so these tensors must be equal, and they differ" in result.output
