"""Whether a method says rightly that a new adapter changes nothing, with each value of its initialization's field."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxadapt import KeyMap
from jaxadapt.adapters import initial_values, selection
from jaxadapt.methods import METHODS
from tests.methods.test_conformance import ORDER, PLAIN, hook_of, random, through, use_of, x_of
from tests.support.configs import class_of

FIELDS = {"LORA": "init_lora_weights", "IA3": "init_ia3_weights", "TINYLORA": "init_weights"}


# Those whose examples, which `test_conformance` takes, have one of the values only.
@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(("peft_type", "field"), FIELDS.items())
def test_it_agrees_with_the_output(peft_type: str, field: str, value: Any):
    config = class_of(peft_type)(**{"target_modules": ["q"], **METHODS[peft_type].examples[0], field: value})
    weight, shape = PLAIN
    found = selection.select_sites(config, KeyMap("t", (weight,), order=ORDER), {"w": shape})
    w = random(shape, 1)
    hook = hook_of(found, initial_values.init_values(config, found, jax.random.key(0), base={"w": w}))
    use = use_of(hook)
    x = x_of(use, w)
    same = np.allclose(hook.weight(w), w, atol=1e-6) and np.allclose(through(hook, use, x, w), x @ w.T, atol=1e-5)
    assert METHODS[peft_type].starts_unchanged(config) == same
