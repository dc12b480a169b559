"""Each kind of tree is recognized once, and an operation that a kind lacks says which kinds have it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxadapt
from jaxadapt.core import paths
from jaxadapt.models import LoraTree, graph
from jaxadapt.models.carriers import Carrier, carrier, lora_carrier

CONFIG = jaxadapt.LoraConfig(r=2, target_modules=["q"])
BASE = {"q": {"kernel": np.ones((4, 6), "float32")}}
QWIX = {"q": {"kernel": np.ones((4, 6)), "kernel_lora_a": np.ones((4, 2)), "kernel_lora_b": np.ones((2, 6))}}


class Net(nnx.Module):
    def __init__(self):
        self.q = nnx.Linear(4, 6, rngs=nnx.Rngs(0))


def test_kinds():
    model, adapter = Net(), jaxadapt.init(BASE, CONFIG)
    for tree, kind in (
        (model, "Model"),
        (nnx.state(model), "State"),
        (nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param), "Object"),
        (nnx.Dict(q=nnx.Linear(4, 6, rngs=nnx.Rngs(0))), "Model"),  # which is a mapping too
        (adapter, "Value"),
        (nn.Dense(2), "Module"),
        (jaxadapt.adapt(nn.Dense(2), CONFIG), "Wrapper"),
        ({"params": BASE}, "Variables"),
        (BASE, "Params"),
        ([jnp.ones(2)], "Carrier"),
    ):
        assert type(carrier(tree)).__name__ == kind
        assert type(lora_carrier(tree)).__name__ == kind
    assert type(lora_carrier(QWIX)).__name__ == "Foreign"
    assert type(carrier(QWIX)).__name__ == "Params"


def test_what_a_kind_lacks_is_refused():
    for tree, says in ((nn.Dense(2), "holds no parameters"), ([1], "found list"), (BASE, "bare parameters")):
        with pytest.raises(jaxadapt.AttachError, match=f"NNX model.*{says}"):
            carrier(tree).attach(jaxadapt.init(BASE, CONFIG), (), "default", None, None, {})


def test_leaves_are_replaced_where_they_are():
    new = {"q.kernel": jnp.zeros((4, 6))}
    for tree in (Net(), BASE, {"params": BASE, "batch_stats": {}}):
        again: Carrier = carrier(carrier(tree).replace(new))
        assert not again.leaves()["q.kernel"].any()
    assert BASE["q"]["kernel"].all()


def test_leaves_have_the_paths_of_flattened_trees():
    """An empty name is in no path, in mappings as in plans."""
    params = {"": {"q": {"kernel": np.ones((4, 6), "float32")}}}
    assert list(carrier(params).leaves()) == list(paths.flatten(params)) == ["q.kernel"]
    merged = jaxadapt.merge(params, jaxadapt.init(params, CONFIG, key=jax.random.key(0)))
    assert merged[""]["q"]["kernel"].shape == (4, 6)


def test_a_model_with_lora_of_another_library_is_walked_once(monkeypatch: pytest.MonkeyPatch):
    model, walks, walk = Net(), list[object](), graph.walk
    model.q.kernel_lora_a, model.q.kernel_lora_b = nnx.Param(jnp.ones((4, 2))), nnx.Param(jnp.ones((2, 6)))
    monkeypatch.setattr(graph, "walk", lambda node: walks.append(node) or walk(node))
    jaxadapt.to_peft(LoraTree(model, lora_alpha=4))
    assert walks == [model]
