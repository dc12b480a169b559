"""Every method that says so: each row of a batch has an adapter of its own, in NNX and in scanned Linen layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import serving
from jaxadapt.configs.base import class_of
from jaxadapt.core import paths
from jaxadapt.core.errors import AttachError
from jaxadapt.methods import METHODS

ROWS = [(t, i) for t in sorted(METHODS) if METHODS[t].rows != "no" for i in range(len(METHODS[t].examples()))]
X = np.random.default_rng(0).standard_normal((4, 3, 8)).astype("f4")


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.q, self.up = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.up(jnp.tanh(self.q(x)))


def config_of(peft_type: str, example: int, targets: list[str]) -> jaxadapt.Config:
    return class_of(peft_type)(**{"target_modules": targets, **METHODS[peft_type].examples()[example]})


def adapter_of(config: jaxadapt.Config, seed: int) -> jaxadapt.Adapter:
    """An adapter with other values in all that training changes."""
    adapter = jaxadapt.extract(jaxadapt.adapt(Net(), config, rngs=nnx.Rngs(seed)))
    rng, roles = np.random.default_rng(seed), METHODS[config.peft_type].roles
    values = {
        path: x if roles.get(path.rpartition(".")[2]) == "frozen" else x + 0.3 * rng.standard_normal(x.shape)
        for path, x in adapter.flat().items()
    }
    values = {path: jnp.asarray(x, jnp.float32) for path, x in values.items()}
    return jaxadapt.Adapter(config, paths.unflatten(values), adapter.keymap)


@pytest.mark.parametrize(("peft_type", "example"), ROWS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_row_is_as_with_its_adapter_alone(peft_type: str, example: int):
    config = config_of(peft_type, example, ["q", "up"])
    base = Net()
    if config.get("init_weights") == "bat":
        with pytest.raises(AttachError, match="this variant of MISS has no form"):
            serving.create(base, config, slots=4)
        return
    bank = serving.create(base, config, slots=4)
    want = [base(X)]
    for slot, targets in enumerate((["q", "up"], ["q"]), 1):
        adapter = adapter_of(config_of(peft_type, example, targets), slot)
        bank = serving.put(bank, slot, adapter, base)
        alone = jaxadapt.adapt(Net(), adapter.config, rngs=nnx.Rngs(0))
        jaxadapt.inject(adapter, alone)
        alone.eval()
        want.append(alone(X))
        assert np.abs(want[-1] - want[0]).max() > 1e-2
    serving.attach(base, bank)
    ids = [1, 0, 2, 7]
    with serving.route(base, bank.select(ids)):
        y = base(X)
    for row, slot in enumerate(ids[:3]):
        # The same float32 sums, in a product of another shape.
        np.testing.assert_allclose(y[row], want[slot][row], rtol=1e-5, atol=1e-5 * np.abs(want[slot]).max())
    assert np.isnan(y[3]).all()
    with serving.route(base, bank.select([[2, 0, 1]] * 4)):
        y = base(X)
    for token, slot in enumerate([2, 0, 1]):
        each = want[slot][:, token]
        np.testing.assert_allclose(y[:, token], each, rtol=1e-5, atol=1e-5 * np.abs(each).max())


def test_methods_without_a_form_for_rows_are_refused():
    refused = [t for t in sorted(METHODS) if METHODS[t].rows == "no" and METHODS[t].scope == "site"]
    assert {"LOHA", "VERA", "HIRA"} <= set(refused)
    for peft_type in ("LOHA", "VERA", "HIRA"):
        config = config_of(peft_type, 0, ["q"])
        with pytest.raises(AttachError, match=f"(?s){peft_type} has no form with a separate adapter.*to_lora.*merge"):
            serving.create(Net(), config, slots=2)


def test_a_prompt_does_not_go_into_a_slot():
    """Its tensors belong to no weight, so no place of the bank would miss them."""
    bank = serving.create(Net(), jaxadapt.LoraConfig(r=2, target_modules=["q"]), slots=2)
    adapter = jaxadapt.init(
        jaxadapt.PromptTuningConfig(num_virtual_tokens=2, token_dim=8), Net(), key=jax.random.key(0)
    )
    with pytest.raises(AttachError, match="PROMPT_TUNING changes no weight"):
        serving.put(bank, 1, adapter)
