"""The initial adapter of a changed start, as PEFT's guides save it."""

from __future__ import annotations

import numpy as np

from jaxadapt import IA3Config, LoraConfig, PeftTensors
from jaxadapt.merging import pairs

KEY = "base_model.model.q.lora_{}.weight"
TRAINED = LoraConfig(r=2, target_modules=["q"], init_lora_weights="pissa")


def initial(init: object, b: float) -> PeftTensors:
    tensors = {KEY.format("A"): np.ones((2, 4), "f4"), KEY.format("B"): np.full((6, 2), b, "f4")}
    return PeftTensors(LoraConfig(r=2, target_modules=["q"], init_lora_weights=init), tensors)


def test_an_initial_adapter_saved_with_true_began_as_the_trained_one_says():
    first = initial(True, 0.5)
    found = pairs.as_start(first, TRAINED)
    assert found.config == TRAINED
    assert found.tensors is first.tensors


def test_any_other_initial_adapter_is_taken_as_it_is():
    for first in (initial(True, 0.0), initial("olora", 0.5), initial(False, 0.5), initial("gaussian", 0.0)):
        assert pairs.as_start(first, TRAINED) is first
    other = PeftTensors(IA3Config(target_modules=["q"]), {})
    assert pairs.as_start(other, TRAINED) is other
