"""Whether a method says rightly that a new adapter changes nothing, with each value of its initialization's field."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxadapt.adapters import initial_values, selection
from jaxadapt.configs.base import class_of
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods import METHODS
from tests.methods.test_conformance import ORDER, PLAIN, hook_of, random, through, use_of, x_of

FIELDS = ("init_weights", "init_lora_weights", "init_ia3_weights")
CASES = [
    (peft_type, field)
    for peft_type, method in sorted(METHODS.items())
    if method.scope == "site" and not method.on_bias
    for field in FIELDS
    if class_of(peft_type).__annotations__.get(field, "").startswith("bool")
]


def test_the_cases_are_of_nearly_all_methods():
    assert {"LORA", "IA3", "ADALORA", "HIRA"} < {peft_type for peft_type, _ in CASES}
    assert len(CASES) > 20


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(("peft_type", "field"), CASES)
def test_it_agrees_with_the_output(peft_type: str, field: str, value: Any):
    examples = METHODS[peft_type].examples()
    example = next((e for e in examples if e.get(field, value) is value), {**examples[0], field: value})
    config = class_of(peft_type)(**{"target_modules": ["q"], **example, field: value})
    weight, shape = PLAIN
    found = selection.select_sites(config, KeyMap("t", (weight,), order=ORDER), {"w": shape})
    w = random(shape, 1)
    hook = hook_of(found, initial_values.init_values(config, found, jax.random.key(0), base={"w": w}))
    use = use_of(hook)
    x = x_of(use, w)
    same = np.allclose(hook.weight(w), w, atol=1e-6) and np.allclose(through(hook, use, x, w), x @ w.T, atol=1e-5)
    assert METHODS[peft_type].starts_unchanged(config) == same
