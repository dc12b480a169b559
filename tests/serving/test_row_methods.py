"""Every method that says so: each row of a batch has an adapter of its own, in NNX and Linen, unrolled and scanned."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, serving
from jaxadapt.core import paths
from jaxadapt.methods import METHODS
from tests.support import banked, meshes
from tests.support.configs import class_of

ROWS = [(t, i) for t in sorted(METHODS) if METHODS[t].rows != "no" for i in range(len(METHODS[t].examples))]
X = np.random.default_rng(0).standard_normal((4, 3, 8)).astype("f4")


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.q, self.up = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.up(jnp.tanh(self.q(x)))


# The generic keymap states no order of modules, which some methods need.
NET = jaxadapt.KeyMap(
    "net",
    tuple(jaxadapt.Weight(f"{name}.kernel", f"{name}.weight", "i o -> o i") for name in ("q", "up")),
    order=("q", "up"),
)


def blocks(scanned: bool) -> jaxadapt.KeyMap:
    return dataclasses.replace(meshes.table(scanned), order=banked.NAMES)


def config_of(peft_type: str, example: int, targets: list[str]) -> jaxadapt.Config:
    return class_of(peft_type)(**{"target_modules": targets, **METHODS[peft_type].examples[example]})


def changed(adapter: jaxadapt.Adapter, seed: int) -> jaxadapt.Adapter:
    """The adapter with other values in all that training changes."""
    rng, roles = np.random.default_rng(seed), METHODS[adapter.config.peft_type].roles
    values = {
        path: x
        if roles.get(path.rpartition(".")[2]) == "frozen"
        else jnp.asarray(x + 0.3 * rng.standard_normal(x.shape), jnp.float32)
        for path, x in adapter.flat().items()
    }
    return jaxadapt.Adapter(adapter.config, paths.unflatten(values), adapter.keymap)


def with_shared_of(adapter: jaxadapt.Adapter, first: jaxadapt.Adapter) -> jaxadapt.Adapter:
    """The adapter with the first rows and columns of another one's tensors that belong to no module."""
    own = {f"~shared.{n}": first.shared[n][tuple(map(slice, x.shape))] for n, x in adapter.shared.items()}
    return jaxadapt.Adapter(adapter.config, paths.unflatten({**adapter.flat(), **own}), adapter.keymap)


@pytest.mark.parametrize(("peft_type", "example"), ROWS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_row_is_as_with_its_adapter_alone(peft_type: str, example: int):
    config = config_of(peft_type, example, ["q", "up"])
    base = Net()
    if config.get("init_weights") == "bat":
        with pytest.raises(AttachError, match="this variant of MISS has no form"):
            serving.create(base, config, slots=4)
        return
    keymap = NET if METHODS[peft_type].ordered else None
    bank = serving.create(base, config, slots=4, keymap=keymap)
    want = [base(X)]
    first = None
    for slot, targets in enumerate((["q", "up"], ["q"]), 1):
        net = jaxadapt.adapt(Net(), config_of(peft_type, example, targets), rngs=nnx.Rngs(slot), keymap=keymap)
        adapter = changed(jaxadapt.extract(net), slot)
        first = first or adapter
        adapter = with_shared_of(adapter, first) if bank.shared else adapter
        bank = serving.put(bank, slot, adapter, base)
        alone = jaxadapt.adapt(Net(), adapter.config, rngs=nnx.Rngs(0), keymap=keymap)
        jaxadapt.inject(alone, adapter)
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


@pytest.mark.parametrize(("api", "scanned"), [("linen", False), ("linen", True), ("nnx", True)])
@pytest.mark.parametrize(("peft_type", "example"), ROWS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_row_is_as_in_a_model_that_its_adapter_is_merged_into(
    api: str, scanned: bool, peft_type: str, example: int
):
    config = config_of(peft_type, example, list(banked.NAMES))
    if config.get("init_weights") == "bat":
        return  # the test above
    served, base, first = banked.Served(api, scanned, 4, config), banked.params(scanned), None
    plain = jax.jit(lambda params: banked.LinenBlocks(scanned).apply({"params": params}, banked.INPUT))
    want = [plain(base)]
    for slot, targets in enumerate((list(banked.NAMES), ["q", "down"]), 1):
        config = config_of(peft_type, example, targets)
        adapter = jaxadapt.init(base, config, key=jax.random.key(slot), keymap=blocks(scanned))
        adapter = changed(adapter, slot)
        first = first or adapter
        adapter = with_shared_of(adapter, first) if served.bank.shared else adapter
        served.put(slot, adapter)
        want.append(plain(jaxadapt.merge(base, adapter)))
        assert np.abs(want[-1] - want[0]).max() > 1e-2
    ids = [1, 0, 2, 7, 1]
    y = served(ids, banked.INPUT)
    assert np.isnan(y[3]).all()
    for row, slot in enumerate(ids):
        if slot != 7:
            # float32 over eight products and their nonlinearities, in another order.
            np.testing.assert_allclose(y[row], want[slot][row], rtol=1e-4, atol=1e-4 * np.abs(want[slot]).max())


@pytest.mark.parametrize(
    ("peft_type", "field"), [("LORA", "lora_dropout"), ("MISS", "miss_dropout"), ("LOKR", "rank_dropout")]
)
def test_adapters_of_another_dropout_share_a_bank(peft_type: str, field: str):
    """Dropout belongs to training: a slot computes what the adapter computes in evaluation."""
    config = config_of(peft_type, 0, ["q", "up"])
    bank = serving.create(Net(), config.replace(**{field: 0.3}), slots=2, keymap=NET)
    adapter = changed(jaxadapt.init(Net(), config, key=jax.random.key(1), keymap=NET), 1)
    bank = serving.put(bank, 1, adapter)
    want = jaxadapt.inject(jaxadapt.adapt(Net(), config, rngs=nnx.Rngs(0), keymap=NET), adapter)
    want.eval()
    net = serving.attach(Net(), bank)
    with serving.route(net, bank.select([1] * 4)):
        got = net(X)
    np.testing.assert_allclose(got, want(X), rtol=1e-5, atol=1e-5)


def test_a_grouped_product_gives_each_row_its_adapter():
    """It gets the rows, or tokens, in the order of their slots."""
    config = config_of("LORA", 0, ["q", "up"])
    bank = serving.create(Net(), config, slots=3)
    for slot in (1, 2):
        adapter = changed(jaxadapt.init(Net(), config, key=jax.random.key(slot)), slot)
        bank = serving.put(bank, slot, adapter)
    net = serving.attach(Net(), bank)
    for ids in ([1, 0, 2, 1], [[2, 0, 1]] * 4):
        with serving.route(net, bank.select(ids)):
            want = net(X)
        with serving.route(net, bank.select(ids, implementation=jax.lax.ragged_dot)):
            np.testing.assert_allclose(net(X), want, rtol=1e-5, atol=1e-5)


def test_a_prompt_does_not_go_into_a_slot():
    """Its tensors belong to no weight, so no place of the bank would miss them."""
    bank = serving.create(Net(), jaxadapt.LoraConfig(r=2, target_modules=["q"]), slots=2)
    adapter = jaxadapt.init(
        Net(), jaxadapt.PromptTuningConfig(num_virtual_tokens=2, token_dim=8), key=jax.random.key(0)
    )
    with pytest.raises(AttachError, match="PROMPT_TUNING changes no weight"):
        serving.put(bank, 1, adapter)
