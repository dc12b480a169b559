"""Several leaves in one tensor of a file: complete, or refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadapt import LoraConfig, MismatchError
from jaxadapt.adapters import experts

CONFIG = LoraConfig(r=2, target_modules=["attn"])


def parts(*numbers):
    return {f"attn.lora_B.weight[{i}/3]": np.full((2, 2), i) for i in numbers}


@pytest.mark.parametrize("present", [(0,), (0, 1), (1, 2)])
def test_a_tensor_of_which_a_part_is_missing_is_refused(present):
    with pytest.raises(MismatchError, match=r"some tensors are incomplete(.|\n)*attn.lora_B.weight"):
        experts.join_tensors(CONFIG, (), parts(*present), None)


def test_all_parts_are_one_tensor():
    config, joined = experts.join_tensors(CONFIG, (), parts(0, 1, 2), None)
    assert config == CONFIG
    np.testing.assert_array_equal(joined["attn.lora_B.weight"], np.repeat([0, 1, 2], 2)[:, None].repeat(2, 1))


def test_arrays_are_equal_bit_for_bit_and_never_inside_jit():
    one, other = jnp.ones(2), jnp.zeros(2)
    assert experts.bitwise_equal([one, one, one])
    assert not experts.bitwise_equal([one, one, other])

    @jax.jit
    def traced(x):
        assert not experts.bitwise_equal([x, x])
        return x

    traced(one)
