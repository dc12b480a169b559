"""Stacked layers of which a configuration names some: the file's tensors have the shapes of any other layer."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxadapt
from jaxadapt import KeyMap, Weight
from jaxadapt.adapters import selection
from jaxadapt.methods import METHODS
from tests.support.configs import class_of

KEYMAP = KeyMap("layers", (Weight("w", "h.{l}.q.weight", "{l} i o -> o i"),))


def file_shapes(peft_type: str, fields: Any, targets: list[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of layer 1."""
    config = class_of(peft_type)(**{**fields, "target_modules": targets})
    sites = selection.select_sites(config, KEYMAP, {"w": (3, 8, 16)})
    return {
        key: entry.form.shape_of(i if i < entry.form.count else 0)
        for site in sites
        for entry in site.entries
        for i, key in enumerate(entry.keys)
        if ".h.1." in key
    }


@pytest.mark.parametrize("peft_type", sorted(t for t in METHODS if METHODS[t].scope == "site"))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_tensors_of_one_layer_have_their_whole_shape(peft_type: str):
    for fields in METHODS[peft_type].examples:
        assert file_shapes(peft_type, fields, ["h.1.q"]) == file_shapes(peft_type, fields, ["q"]) != {}


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_a_merge_changes_the_adapted_layers_and_no_other(array: Any):
    """Arrays of NumPy, which a merge of files has, and of JAX; the products are NumPy's."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 8, 16)).astype("f4")
    a, b = rng.normal(size=(2, 8)).astype("f4"), rng.normal(size=(16, 2)).astype("f4")
    key = "base_model.model.h.1.q.lora_{}.weight"
    config = jaxadapt.LoraConfig(r=2, lora_alpha=6, target_modules=["h.1.q"])
    file = jaxadapt.PeftTensors(config, {key.format("A"): a, key.format("B"): b})
    base = {"w": array(w)}
    merged = jaxadapt.merge(base, jaxadapt.from_peft(file, base, keymap=KEYMAP))["w"]
    want = w.copy()
    want[1] += 3 * (b @ a).T
    np.testing.assert_allclose(merged, want, rtol=1e-5, atol=1e-5)  # float32 in another order
    np.testing.assert_array_equal(np.asarray(base["w"]), w)
