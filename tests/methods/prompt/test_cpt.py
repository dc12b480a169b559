"""CPT beside PEFT: the projection, its gradient, steps of an optimizer, and the loss; what it refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch

import jaxadapt
from jaxadapt import AttachError, ConfigError, MismatchError
from jaxadapt.initializers import start
from jaxadapt.methods import METHODS, cpt

pytestmark = pytest.mark.peft

FIELDS = {
    "cpt_token_ids": [5, 2, 7, 1, 4, 4, 3, 2],
    "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8],
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.7,
    "task_type": "CAUSAL_LM",
}
N, D, V = 8, 16, 11
OURS = jaxadapt.CPTConfig(**FIELDS, token_dim=D)
TABLE = np.random.default_rng(0).standard_normal((V, D)).astype(np.float32)


def theirs() -> tuple[Any, Any]:
    config = peft.CPTConfig(**FIELDS)
    config.token_dim = D
    embedding = torch.nn.Embedding(V, D)
    embedding.weight.data = torch.tensor(TABLE)
    return config, peft.tuners.CPTEmbedding(config, embedding)


def test_projection_gradient_and_steps_are_pefts() -> None:
    """Three steps of gradient descent; after each, both libraries have the same parameter."""
    rng = np.random.default_rng(1)
    delta = (0.02 * rng.standard_normal((N, D))).astype(np.float32)
    delta[1], delta[4] = 0, 0.001  # a zero vector, and a short one, which stay
    _, encoder = theirs()
    encoder.delta_embedding.weight.data = torch.tensor(delta)
    ours = {cpt.FIXED: jnp.asarray(TABLE[FIELDS["cpt_token_ids"]]), cpt.DELTA: jnp.asarray(delta)}
    for _ in range(3):
        cotangent = rng.standard_normal((N, D)).astype(np.float32)
        encoder.zero_grad()
        out = encoder(torch.arange(N))
        (out * torch.tensor(cotangent)).sum().backward()

        def loss(params: Any, cotangent: Any = cotangent) -> Any:
            return (METHODS["CPT"].tokens(OURS, params, {}) * cotangent).sum()

        np.testing.assert_allclose(METHODS["CPT"].tokens(OURS, ours, {}), out.detach(), atol=1e-6)
        gradients = jax.grad(loss)(ours)
        assert not np.asarray(gradients[cpt.FIXED]).any()
        weight = encoder.delta_embedding.weight
        np.testing.assert_allclose(gradients[cpt.DELTA], weight.grad, atol=1e-6)
        with torch.no_grad():
            weight -= 0.01 * weight.grad
        # PEFT's parameter was replaced by its projection in the forward pass
        ours[cpt.DELTA] = cpt.project(OURS, ours[cpt.DELTA]) - 0.01 * gradients[cpt.DELTA]
        np.testing.assert_allclose(ours[cpt.DELTA], weight.detach(), atol=1e-7)


@pytest.mark.parametrize("kind", ["decay", "none"])
def test_loss_is_pefts(kind: str) -> None:
    config, encoder = theirs()
    config.opt_weighted_loss_type = kind
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((2, N + 6, V)).astype(np.float32)
    labels = rng.integers(0, V, (2, 6))
    labels[1, 3] = -100
    types = np.array([[1, 2, 3, 4, 4, 0], [2, 4, 6, 8, 8, 8]])
    for given in (types, None):
        # as PEFT's `_cpt_forward` prepares them
        whole = torch.tensor(np.full((2, 6), 4) if given is None else given)
        whole[whole > 0] += max(FIELDS["cpt_tokens_type_mask"])
        whole = torch.cat([torch.tensor([FIELDS["cpt_tokens_type_mask"]] * 2), whole], dim=1)
        targets = torch.cat([torch.tensor([FIELDS["cpt_token_ids"]] * 2), torch.tensor(labels)], dim=1)
        targets[~((whole > 0) & (whole % 4 == 0))] = -100
        output = type("Output", (), {"logits": torch.tensor(logits)})()
        want = encoder.calculate_loss(output, targets, whole, config).loss
        ours = OURS.replace(opt_weighted_loss_type=kind)
        found = jax.jit(lambda *a, ours=ours: cpt.loss(ours, *a))(logits, labels, given)
        np.testing.assert_allclose(found, want, rtol=1e-6)


def test_bad_input() -> None:
    base = {"embed": {"embedding": jnp.asarray(TABLE)}}
    with pytest.raises(ConfigError, match=r'task_type: expected "CAUSAL_LM"'):
        jaxadapt.CPTConfig(cpt_token_ids=[1])
    with pytest.raises(ConfigError, match="cpt_mask: expected 2 integers"):
        jaxadapt.CPTConfig(cpt_token_ids=[1, 2], cpt_mask=[1], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"initializers\.start\(model, config\)"):
        jaxadapt.init(base, OURS, key=jax.random.key(0))
    with pytest.raises(AttachError, match="cpt_token_ids: expected ids from 0 to 10"):
        start(base, jaxadapt.CPTConfig(cpt_token_ids=[11], task_type="CAUSAL_LM"))
    adapter = start(base, OURS.replace(token_dim=None)).adapter
    assert adapter.config.token_dim == D
    np.testing.assert_array_equal(adapter.shared[cpt.FIXED], TABLE[FIELDS["cpt_token_ids"]])
    with pytest.raises(MismatchError, match="CPT's loss: expected logits"):
        cpt.loss(OURS, jnp.zeros((1, 5, V)), jnp.zeros((1, 5), int))
    with pytest.raises(ConfigError, match="with a multiple of 4"):
        cpt.loss(OURS.replace(cpt_tokens_type_mask=[1] * N), jnp.zeros((1, N + 1, V)), jnp.zeros((1, 1), int))
