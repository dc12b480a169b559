"""`to_lora` of a method that computes its factors: the same change at the method's rank, without the base's values."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxadapt
from jaxadapt import AttachError, KeyMap, Weight
from jaxadapt.core import paths
from jaxadapt.methods import METHODS
from jaxadapt.methods.matrix import FactoredMethod
from tests.support.configs import class_of

# Split heads in another order than PyTorch's, a stacked axis that is not the first, fused parts, and a scaled weight.
KEYMAP = KeyMap(
    "fancy",
    (
        Weight("q", "h.{l}.q.weight", "n {l} d h -> (n h) d", scale=("h", -0.5)),
        Weight("kv", "h.{l}.{p}.weight", "{p} {l} d o -> o d", p=("k", "v")),
        Weight("o", "h.{l}.o.weight", "{l} o d -> o d"),
    ),
    order=("q", "k", "v", "o"),
)
SHAPES = {"q": (3, 2, 8, 4), "kv": (2, 2, 8, 12), "o": (2, 8, 12)}
RANKS = {"LOHA": 9, "PVERA": 3, "TINYLORA": 2, "UNILORA": 4, "VBLORA": 2, "VERA": 3}
FIELDS: dict[str, dict[str, Any]] = {
    "LOHA": {"r": 2, "alpha": 3, "rank_pattern": {"h.1.o": 3}, "alpha_pattern": {"h.0.o": 7}},
    "VBLORA": {"r": 2, "num_vectors": 9, "vector_length": 4},
}
BASE = {name: np.random.default_rng(0).standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}


def adapter_of(peft_type: str) -> jaxadapt.Adapter:
    fields = FIELDS.get(peft_type, METHODS[peft_type].examples[0])
    config = class_of(peft_type)(**{**fields, "target_modules": ["q", "v", "o"]})
    adapter, rng = jaxadapt.init(BASE, config, key=jax.random.key(0), keymap=KEYMAP), np.random.default_rng(1)
    roles = METHODS[peft_type].roles
    values = {
        path: x if roles[path.rpartition(".")[2]] == "frozen" else x + rng.standard_normal(x.shape).astype("f4")
        for path, x in adapter.flat().items()
    }
    return jaxadapt.Adapter(config, paths.unflatten(values), adapter.keymap)


@pytest.mark.parametrize("peft_type", sorted(RANKS))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_plain_lora_of_the_methods_rank_changes_the_weights_alike(peft_type: str):
    computing = {t for t in METHODS if isinstance(METHODS[t], FactoredMethod)}
    assert computing == RANKS.keys()
    adapter = adapter_of(peft_type)
    shapes = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in SHAPES.items()}
    lora, error = jaxadapt.merging.to_lora(adapter, params=shapes)
    assert (lora.config.peft_type, lora.config.r) == ("LORA", RANKS[peft_type])
    assert set(error.values()) == {0.0}
    assert error.keys() == {f"h.{layer}.{name}" for layer in range(2) for name in "qvo"}
    zeros = jax.tree.map(np.zeros_like, BASE)
    want, got = jaxadapt.merge(zeros, adapter), jaxadapt.merge(zeros, lora)
    for name, change in want.items():
        assert np.abs(change).max() > 0.01
        np.testing.assert_allclose(got[name], change, rtol=1e-5, atol=1e-6 * np.abs(change).max())
    np.testing.assert_array_equal(got["kv"][0], 0)
    smaller, error = jaxadapt.merging.to_lora(adapter, 1, params=shapes)
    assert smaller.config.r == 1
    assert 0 < max(error.values()) < 1
    with pytest.raises(AttachError, match="pass params=base"):
        jaxadapt.merging.to_lora(adapter, 2)
