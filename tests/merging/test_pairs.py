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


def test_a_plain_lora_of_a_variant_subtracts_the_initial_adapter_as_the_variant_reads_it():
    """QALoRA's A, of the means of two inputs, stands for a wider A."""
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=["q"], use_qalora=True, qalora_group_size=2, init_lora_weights="olora"
    )
    rng = np.random.default_rng(0)
    trained, first = (
        PeftTensors(config, {KEY.format("A"): rng.random((2, 4), "f4"), KEY.format("B"): rng.random((6, 2), "f4")})
        for _ in range(2)
    )
    found = pairs.plain_lora(trained, first)
    wide = [{key: np.asarray(x) for key, x in pairs.convert_variant(each).tensors.items()} for each in (trained, first)]
    change, start = (each[KEY.format("B")] @ each[KEY.format("A")] for each in wide)
    a, b = (np.asarray(found.tensors[KEY.format(name)]) for name in "AB")
    assert a.shape == (4, 8)
    np.testing.assert_allclose(b @ a, change - start, rtol=1e-5, atol=1e-6)
