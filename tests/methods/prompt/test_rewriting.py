"""The rewriting of a computation's calls of attention: counts, scans, and the precision of attention itself."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadapt import AttachError
from jaxadapt.models import attention
from jaxadapt.models.attention_calls import require_count, rewrite_attention

X = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 2, 4)), jnp.float32)
SCALES = jnp.asarray([1.0, 0.5, 2.0, 3.0], jnp.float32)


@pytest.mark.parametrize("others", [1, 3, 4, 5, 7])
def test_a_decoder_with_calls_that_fit_no_cross_attention_is_refused(others: int):
    """Two decoder layers beside four encoder layers have two calls without a prefix, or six with the encoder's."""
    with pytest.raises(AttachError, match=f"computes 2 with a prefix, and {others} without one"):
        require_count(2, others, 4, True)
    for fitting in (2, 6):
        require_count(2, fitting, 4, True)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_keeps_its_direction(reverse: bool):
    """The steps do not commute, and a change that computes the call itself changes nothing."""

    def f(x: Any) -> Any:
        def step(h: Any, scale: Any) -> Any:
            h = h + scale * attention(h, h, h)
            return h, h

        return jax.lax.scan(step, x, SCALES, reverse=reverse)

    same = rewrite_attention(f, lambda call, arrays, _: call.run(arrays), jnp.zeros(4), X)
    for ours, expected in zip(same, f(X), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)  # compiled in another way


def test_calls_without_a_prefix_count_once_for_each_step_of_a_scan():
    def f(x: Any) -> Any:
        def step(h: Any, scale: Any) -> Any:
            return attention(h, h, h, prefix=False) + scale * attention(h, h, h), None

        return jax.lax.scan(step, x, SCALES)[0]

    with pytest.raises(AttachError, match="computes 4 with a prefix, and 4 without one"):
        rewrite_attention(f, lambda call, arrays, _: call.run(arrays), jnp.zeros(3), X, decoder=True)


def test_the_weights_of_attention_are_computed_in_32_bits():
    """A softmax in bfloat16 over 512 keys would be off by 8e-3; the inputs and the output have 16 bits."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 512, 1, 4)), jnp.bfloat16) for _ in range(3))
    scores = np.einsum("bthd,bshd->bhts", *(np.asarray(x, np.float64) for x in (q, k))) / 2
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), np.asarray(v, np.float64))
    got = np.asarray(attention(q, k, v), np.float64)
    assert np.abs(got - want).max() < 6e-3  # rounding the weights and the output to 16 bits: 4.5e-3
