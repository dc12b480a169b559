"""The wrapper of a Linen module has its module's fields and methods."""

from __future__ import annotations

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxadapt


class Net(nn.Module):
    width: int = 3

    def setup(self) -> None:
        self.q = nn.Dense(self.width)
        self.head = nn.Dense(2)

    def encode(self, x: jax.Array) -> jax.Array:
        return self.q(x)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.encode(x))


CONFIG = jaxadapt.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)


def test_fields_and_methods_of_the_module():
    x, module = jnp.ones((1, 4)), jaxadapt.adapt(Net(), CONFIG)
    assert module.width == 3
    variables = module.init(jax.random.key(0), x)
    got = module.apply(variables, x, method=module.encode)
    np.testing.assert_array_equal(got, module.apply(variables, x, method="encode"))
    assert not jnp.allclose(got, Net().apply(variables, x, method="encode"), atol=1e-3)  # the adapter has an effect
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = module.nothing_here
    with pytest.raises(jaxadapt.AttachError, match="call it with apply"):
        module(x)


def test_the_wrapper_is_copied_and_pickled_as_ever():
    module = jaxadapt.adapt(Net(), CONFIG)
    for other in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (other.width, other.adapters, other.active) == (3, module.adapters, module.active)
