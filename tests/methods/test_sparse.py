"""SHiRA's and Super-Tuning's positions, against PEFT's own and NumPy."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxadapt
from jaxadapt import ConfigError

KERNEL = np.random.default_rng(1).standard_normal((8, 12)).astype("float32")
BASE = {"q": {"kernel": KERNEL}}


def file_of(config: Any) -> Any:
    return jaxadapt.to_peft(jaxadapt.init(BASE, config, key=jax.random.key(0)))


@pytest.mark.peft
def test_shiras_random_mask_is_pefts():
    torch = pytest.importorskip("torch")
    mask_functions = pytest.importorskip("peft.tuners.shira.mask_functions")
    mask = mask_functions.random_mask(torch.nn.Linear(8, 12), 2, random_seed=3).numpy()
    file = file_of(jaxadapt.ShiraConfig(r=2, random_seed=3, target_modules=["q"]))
    np.testing.assert_array_equal(file.tensors["base_model.model.q.shira_indices"], np.stack(np.nonzero(mask)))


def test_shiras_positions_may_be_left_out_if_they_have_a_seed():
    for seed in (3, None):
        file = file_of(jaxadapt.ShiraConfig(r=2, random_seed=seed, target_modules=["q"]))
        key = "base_model.model.q.shira_indices"
        rest = jaxadapt.PeftTensors(file.config, {k: v for k, v in file.tensors.items() if k != key})
        if seed is None:
            with pytest.raises(jaxadapt.MismatchError, match="missing"):
                jaxadapt.from_peft(rest, BASE)
        else:
            drawn = jaxadapt.from_peft(rest, BASE).flat()["q.kernel.shira_indices"]
            np.testing.assert_array_equal(drawn, file.tensors[key])
            assert drawn.dtype == np.int32


def test_shiras_positions_from_a_key_are_distinct_and_the_same_inside_jit():
    config = jaxadapt.ShiraConfig(r=3, target_modules=["q"])

    def positions(key: jax.Array) -> jax.Array:
        return jaxadapt.init(BASE, config, key=key).flat()["q.kernel.shira_indices"]

    found = np.asarray(positions(jax.random.key(0)))
    assert len({*map(tuple, found.T)}) == found.shape[1] == 3 * sum(KERNEL.shape)
    assert (found.max(1) < KERNEL.shape[::-1]).all()
    np.testing.assert_array_equal(jax.jit(positions)(jax.random.key(0)), found)
    assert not np.array_equal(positions(jax.random.key(1)), found)


@pytest.mark.parametrize("largest", [True, False])
def test_super_tuning_takes_the_largest_or_smallest_entries(largest: bool):
    config = jaxadapt.SupertuningConfig(sparsity=0.75, select_top=largest, target_modules=["q"])
    found = file_of(config).tensors["base_model.model.q.supertuning_indices"]
    order = np.argsort(abs(KERNEL.T).ravel())
    np.testing.assert_array_equal(found, order[::-1][:24] if largest else order[:24])


def test_sizes_and_fields_that_do_not_fit():
    with pytest.raises(ConfigError, match="cannot change 100 entries"):
        file_of(jaxadapt.ShiraConfig(r=5, target_modules=["q"]))
    with pytest.raises(ConfigError, match="mask_type='other'"):
        file_of(jaxadapt.ShiraConfig(r=1, mask_type="other", target_modules=["q"]))
    with pytest.raises(ConfigError, match="leaves none of the weight's 96 entries"):
        file_of(jaxadapt.SupertuningConfig(sparsity=0.999, target_modules=["q"]))
    with pytest.raises(ConfigError, match="cannot train SUPERTUNING with lora_dropout"):
        file_of(jaxadapt.SupertuningConfig(sparsity=0.5, r=1, lora_dropout=0.1, target_modules=["q"]))
    with pytest.raises(ConfigError, match="lora_alpha: expected null if r is null"):
        jaxadapt.SupertuningConfig(lora_alpha=2.0)
    with pytest.raises(ConfigError, match="sample_at_inference"):
        file_of(jaxadapt.PveraConfig(r=2, sample_at_inference=True, target_modules=["q"]))
