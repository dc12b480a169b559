"""The twins compute what the PyTorch models compute, before any adapter is involved."""

from __future__ import annotations

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from tests.support.twins import trees
from tests.support.twins.gpt2 import make_gpt2
from tests.support.twins.llama import make_llama

pytestmark = pytest.mark.peft

IDS = np.random.RandomState(0).randint(0, 64, (2, 11))


def torch_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.numpy()


def flax_logits(twin):
    if isinstance(twin, tuple):
        module, variables = twin
        return np.asarray(module.apply(variables, IDS))
    return np.asarray(twin(IDS))


@pytest.mark.parametrize("scan_axis", [None, 0, 1])
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_gpt2_agrees_with_torch(api, scan_axis):
    torch_model, twin = make_gpt2(api, scan_axis=scan_axis)
    np.testing.assert_allclose(flax_logits(twin), torch_logits(torch_model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scan_axis", [None, 1])
def test_gpt2_apis_have_the_same_leaves(scan_axis):
    _, model = make_gpt2("nnx", scan_axis=scan_axis)
    _, (module, variables) = make_gpt2("linen", scan_axis=scan_axis)
    born = jax.eval_shape(module.init, jax.random.key(0), IDS)["params"]
    paths = {".".join(k.key for k in path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(born)}
    assert paths == {path: v.shape for path, v in trees.nnx_leaves(model).items()}
    assert jax.tree.structure(born) == jax.tree.structure(variables["params"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scan_axis", [None, 0, 1])
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_llama_agrees_with_torch(api, scan_axis, tied):
    torch_model, twin = make_llama(
        api, scan=scan_axis is not None, scan_axis=scan_axis or 0, tied=tied, layers=3, rope_theta=500.0
    )
    np.testing.assert_allclose(flax_logits(twin), torch_logits(torch_model), atol=1e-5, rtol=1e-5)
