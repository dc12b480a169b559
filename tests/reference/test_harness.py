"""The harness itself: it has to notice what PEFT keeps to itself, or the interchange tests prove nothing."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from safetensors.numpy import save_file

from tests.support import peft_harness as harness
from tests.support.twins.gpt2 import Shape, torch_gpt2
from tests.support.twins.llama import torch_llama

pytestmark = pytest.mark.peft

IDS = np.random.RandomState(0).randint(0, 64, (2, 11))
BASES = {"llama": torch_llama, "gpt2": lambda: torch_gpt2(Shape())}


@pytest.mark.parametrize("setting", harness.SETTINGS, ids=lambda s: s.name)
def test_peft_agrees_with_itself(setting, tmp_path):
    base = BASES[setting.family]()
    model = harness.make_peft(base, setting.peft())
    loaded = harness.load(base, harness.save(model, tmp_path))
    assert loaded.complaints == []
    np.testing.assert_allclose(harness.logits(loaded.model, IDS), harness.logits(model, IDS), atol=1e-6)
    assert abs(harness.logits(model, IDS) - harness.logits(base, IDS)).max() > 0.1
    assert harness.specs(harness.read_tensors(tmp_path)) == harness.peft_specs(base, setting.peft())


@pytest.mark.parametrize("name", ["llama-lora", "llama-ia3"])
def test_missing_and_unexpected_keys_are_seen(name, tmp_path):
    setting = harness.setting(name)
    base = torch_llama()
    harness.save(harness.make_peft(base, setting.peft()), tmp_path)
    tensors = harness.read_tensors(tmp_path)
    key = sorted(tensors)[0]
    tensors[key.replace("layers.0", "layers.7")] = tensors.pop(key)
    save_file(tensors, tmp_path / harness.WEIGHTS, metadata={"format": "pt"})
    loaded = harness.load(base, tmp_path)
    assert len(loaded.missing) == 1
    assert len(loaded.unexpected) == 1
    assert len(loaded.warnings) == 1
