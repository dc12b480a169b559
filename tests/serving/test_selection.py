"""Every implementation gives each row, and each token, its own adapter; mixtures, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import AttachError, serving
from tests.support import banked, meshes, small
from tests.support.banked import BASE, INPUT, NAMES, Given, Served, alone

PAIRS = [Given("lora", 2, 3, NAMES, seed=1), Given("rslora", 4, 5, ("q", "up"), (1, 7), 2), Given("lora", 3, 2, ("o",))]
KINDS = [PAIRS[0], Given("dora", 3, 2, ("o", "up"), seed=3), Given("ia3", 1, 1, NAMES, seed=4)]
ROW_IDS = np.array([1, 0, 3, 2, 7])
TOKEN_IDS = np.array([[1, 0, 3], [2, 2, 1], [0, -1, 3], [1, 2, 3], [3, 3, 0]])


def make(api: str, scanned: bool, mixed: bool) -> Served:
    """A banked model with three adapters: LoRAs alone, or of several kinds."""
    lora = jaxadapt.LoraConfig(r=banked.MAX_RANK, target_modules=list(NAMES))
    ia3 = jaxadapt.IA3Config(target_modules=list(NAMES), feedforward_modules=banked.FEEDFORWARD)
    served = Served(api, scanned, 4, [lora, lora.replace(use_dora=True), ia3] if mixed else [lora])
    for slot, given in enumerate(KINDS if mixed else PAIRS, 1):
        served.put(slot, given.adapter(scanned))
    return served


def check(served: Served, adapters: list[Given], ids: np.ndarray, implementation: object) -> None:
    """float32 over eight products beside float64: 1e-5 of the largest value, with a reserve."""
    y = served(ids, INPUT, served.bank.select(ids, implementation=implementation))
    each = np.broadcast_to(ids[:, None] if ids.ndim == 1 else ids, INPUT.shape[:2])
    for row, token in np.ndindex(*INPUT.shape[:2]):
        if not 0 <= (slot := each[row, token]) < served.slots:
            assert np.isnan(y[row, token]).all()
            continue
        want = alone(adapters[slot - 1] if slot else BASE, INPUT[row])[token]
        np.testing.assert_allclose(y[row, token], want, rtol=3e-5, atol=3e-5 * np.abs(want).max())


@pytest.mark.parametrize(("api", "scanned"), [("nnx", True), ("linen", False)])
def test_every_implementation_gives_rows_and_tokens_their_adapters(api, scanned):
    served = make(api, scanned, mixed=False)
    for implementation in ("layer", "mask", jax.lax.ragged_dot):
        check(served, PAIRS, ROW_IDS, implementation)
    for implementation in (None, jax.lax.ragged_dot):
        check(served, PAIRS, TOKEN_IDS, implementation)


@pytest.mark.parametrize(("api", "scanned"), [("linen", True)])
def test_tokens_of_one_row_have_adapters_of_several_kinds(api, scanned):
    served = make(api, scanned, mixed=True)
    check(served, KINDS, TOKEN_IDS, None)
    check(served, KINDS, ROW_IDS, "layer")
    with pytest.raises(AttachError, match="sorted segments need low-rank pairs.*IA3, LORA"):
        served.bank.select(ROW_IDS, implementation=jax.lax.ragged_dot)


@pytest.mark.parametrize("implementation", ["mask", jax.lax.ragged_dot])
def test_an_adapter_that_is_not_finite_changes_its_own_tokens_only(implementation):
    base = nnx.Dict(q=nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
    bank = serving.create(base, config, slots=4)
    for slot in (1, 2, 3):
        bank = serving.put(bank, slot, jaxadapt.init(base, config, key=jax.random.key(slot)))
    serving.attach(base, bank)

    def run(bank, ids):
        with serving.route(base, bank.select(np.array(ids), implementation=implementation)):
            return np.asarray(base.q(jnp.ones((2, 2, 4))))

    ids = [[1, 0], [2, 1]]
    wanted = run(bank, ids)
    for value in (jnp.nan, jnp.inf):
        broken = jax.tree.map(lambda x, value=value: x * value, jaxadapt.init(base, config, key=jax.random.key(3)))
        changed = serving.put(jax.tree.map(jnp.copy, bank), 3, broken)  # put donates
        np.testing.assert_array_equal(run(changed, ids), wanted)
        found = run(changed, [[1, 0], [3, 1]])
        assert np.isnan(found[1, 0]).all()
        np.testing.assert_array_equal(np.delete(found.reshape(4, 6), 2, 0), np.delete(wanted.reshape(4, 6), 2, 0))


def test_a_packed_row_is_as_its_sequences_alone():
    """Sequences of one row in a model without attention: every token is as in a row of its adapter."""
    served = make("nnx", False, mixed=False)
    ids = np.array([[1, 1, 2]] * 5)
    packed = served(ids, INPUT, served.bank.select(ids))
    for slot, tokens in ((1, slice(0, 2)), (2, slice(2, 3))):
        want = served([slot] * 5, INPUT)[:, tokens]
        np.testing.assert_allclose(packed[:, tokens], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_row_mixes_adapters_with_weights(api):
    served = make(api, api == "nnx", mixed=False)
    ids = np.array([[1, 3], [2, 0], [0, 0], [3, 3], [1, 9]])
    weights = np.array([[0.7, -0.3], [2.0, 5.0], [1.0, 1.0], [0.5, 0.5], [1.0, 1.0]], "f4")
    y = served(ids, INPUT, served.bank.select(ids, weights=weights))
    kernels = banked.params(False)["blocks"]

    def mixed(row: int) -> np.ndarray:
        """The model with the weights' sum W + Σ w·s·B·A, in float64."""
        x = INPUT[row].astype("f8")

        def linear(layer: int, name: str, x: np.ndarray) -> np.ndarray:
            w = kernels[str(layer)][name]["kernel"].reshape(banked.SIZES[name]).astype("f8")
            b = kernels[str(layer)][name]["bias"].ravel().astype("f8")
            base = x @ w + b
            y = base
            for slot, weight in zip(ids[row], weights[row], strict=True):
                if slot:
                    y = y + float(weight) * (PAIRS[slot - 1].linear(layer, name, x, w, b) - base)
            return y

        for layer in range(banked.LAYERS):
            x = x + linear(layer, "o", np.tanh(linear(layer, "q", x)))
            x = x + linear(layer, "down", np.tanh(linear(layer, "up", x)))
        return x

    for row in range(4):
        want = mixed(row)
        np.testing.assert_allclose(y[row], want, rtol=3e-5, atol=3e-5 * np.abs(want).max())
    assert np.isnan(y[4]).all()


@pytest.mark.parametrize("implementation", ["gather", "layer", "mask"])
def test_an_id_beyond_32_bits_is_no_slot(implementation):
    """Their lower bits are those of slot 1."""
    bank = serving.create(small.base(), small.LORA, slots=2)
    net, ids = serving.attach(small.net(), bank), [1, 2**32 + 1, 1 - 2**32]
    for given in (np.array(ids), ids, np.array([1, 2**32 + 1, 2**63 + 1], np.uint64)):
        with serving.route(net, bank.select(given, implementation=implementation)):
            np.testing.assert_array_equal(np.isnan(net(small.X)).all(1), [False, True, True])
    mixed = bank.select(np.array(ids)[:, None], weights=np.ones((3, 1)))
    np.testing.assert_array_equal(np.isnan(mixed.arrays[0]["scale"][:, 0]), [False, True, True])


def test_what_cannot_be_selected():
    bank = serving.create(small.base(), [small.LORA, small.IA3], slots=3)
    lora = serving.create(small.base(), small.LORA, slots=3)
    with pytest.raises(AttachError, match=r"(?s)only adapters whose changes add up.*IA3.*jaxadapt\.combine"):
        bank.select([[1, 2]], weights=[[1.0, 1.0]])
    with pytest.raises(AttachError, match="expected the shape of ids"):
        lora.select([[1, 2]], weights=[1.0])
    with pytest.raises(AttachError, match="'mask' takes no weights"):
        lora.select([[1, 2]], weights=[[1.0, 1.0]], implementation="mask")
    with pytest.raises(AttachError, match="takes one adapter for each row"):
        lora.select([[1, 2]], implementation="gather")
    with pytest.raises(AttachError, match="gather, layer, mask, sorted"):
        lora.select([1], implementation="fast")
    with pytest.raises(AttachError, match="multiplies every token by all slots on CPU"):
        lora.select([1], implementation="sorted")
    net = small.net()
    serving.attach(net, lora)
    x = jnp.ones((2, 4, 6))
    with (
        serving.route(net, lora.select([[0, 1, 2]] * 2)),
        pytest.raises(AttachError, match=r"first axes are not the rows and tokens \[2, 3\]"),
    ):
        net(x)


class Fused(nnx.Module):
    """Two modules in one kernel, with one input."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.qv = nnx.Einsum("btd,pdo->btpo", (2, 6, 4), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.qv(x)


FUSED = jaxadapt.KeyMap("fused", (jaxadapt.Weight("qv.kernel", "{p}.weight", "{p} i o -> o i", p=("q", "v")),))


@pytest.mark.parametrize("targets", [["q", "v"], ["v"]])
def test_fused_parts_have_the_adapters_of_their_rows(targets):
    config = jaxadapt.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = Fused(nnx.Rngs(0))
    bank = serving.create(model, config, slots=3, keymap=FUSED)
    x = np.random.default_rng(0).standard_normal((3, 5, 6)).astype("f4")
    want = [model(x)]
    for slot in (1, 2):
        adapter = jaxadapt.init(model, config, key=jax.random.key(slot), keymap=FUSED)
        bank = serving.put(bank, slot, adapter)
        want.append(jaxadapt.merge(Fused(nnx.Rngs(0)), adapter)(x))
    serving.attach(model, bank)
    for implementation in ("gather", "mask"):
        with serving.route(model, bank.select([2, 0, 1], implementation=implementation)):
            y = model(x)
        np.testing.assert_allclose(y, [want[2][0], want[0][1], want[1][2]], rtol=1e-5, atol=1e-5)
    with (
        serving.route(model, bank.select([2, 0, 1], implementation=jax.lax.ragged_dot)),
        pytest.raises(AttachError, match="without fused parts"),
    ):
        model(x)


class Experts(nnx.Module):
    """Each token goes to the expert of its last bit, by a dense product or a ragged one."""

    def __init__(self, rngs: nnx.Rngs, ragged: bool) -> None:
        self.ragged = ragged
        self.experts = nnx.Param(jax.random.normal(rngs.params(), (2, 6, 4)))

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.ragged:
            flat = x.reshape(-1, 6)
            return jax.lax.ragged_dot(flat, self.experts[...], jnp.array([len(flat) // 2, len(flat) - len(flat) // 2]))
        return jnp.einsum("btd,edo->bteo", x, self.experts[...])


EXPERTS = jaxadapt.KeyMap("experts", (jaxadapt.Weight("experts", "{e}.up.weight", "{e} i o -> o i"),))


def test_experts_are_served_only_where_the_product_sees_the_rows():
    config = jaxadapt.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    x = np.random.default_rng(0).standard_normal((3, 5, 6)).astype("f4")
    for ragged in (False, True):
        model = Experts(nnx.Rngs(0), ragged)
        bank = serving.create(model, config, slots=2, keymap=EXPERTS)
        adapter = jaxadapt.init(model, config, key=jax.random.key(1), keymap=EXPERTS)
        bank = serving.put(bank, 1, adapter)
        serving.attach(model, bank)
        with serving.route(model, bank.select([1, 0, 1])):
            if ragged:
                with pytest.raises(AttachError, match="cannot apply another LORA in each row"):
                    model(x)
                continue
            y = model(x)
        want = jaxadapt.merge(Experts(nnx.Rngs(0), False), adapter)(x)
        np.testing.assert_allclose(y[::2], want[::2], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(y[1], Experts(nnx.Rngs(0), False)(x)[1])


@pytest.mark.parametrize(("api", "kind"), [("nnx", "nf4"), ("linen", "int8")])
def test_a_quantized_base_serves_as_with_each_adapter_alone(api, kind):
    targets = ["q_proj", "up_proj"]
    lora = jaxadapt.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    dense = small.base()["params"]
    codes = jaxadapt.models.quantize(dense, kind, modules=targets, block=2)
    adapters = [small.adapter(lora, seed) for seed in (1, 2)]
    if api == "nnx":
        base = jaxadapt.models.quantize(small.net(), kind, modules=targets, block=2)
    else:
        base = {"params": codes}
    bank = serving.create(base, [lora, lora.replace(use_dora=True)], slots=4)
    for slot, adapter in enumerate(adapters, 1):
        bank = serving.put(bank, slot, adapter, base)
    dora = small.adapter(lora.replace(use_dora=True), 3)
    bank = serving.put(bank, 3, dora, base)
    attached = serving.attach(base if api == "nnx" else small.LinenNet(), bank)
    with serving.route(attached, bank.select([1, 3, 2])) as routed:
        y = routed(small.X) if api == "nnx" else routed.apply(base, small.X)
    plain = jaxadapt.models.dequantize(codes)
    for row, adapter in enumerate([adapters[0], dora, adapters[1]]):
        merged = jaxadapt.merge(plain, adapter)
        want = small.LinenNet().apply({"params": merged}, small.X)[row]
        np.testing.assert_allclose(y[row], want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


def test_an_nnx_model_on_eight_devices_serves_as_on_one():
    mesh = meshes.mesh_of("4x2")
    params = meshes.placed(banked.params(True), mesh, "4x2", "both")
    model = meshes.model(params, True)
    lora = jaxadapt.LoraConfig(r=banked.MAX_RANK, target_modules=list(NAMES))
    bank = serving.create(model, lora, slots=4, keymap=meshes.table(True))
    for slot, given in enumerate(PAIRS, 1):
        bank = serving.put(bank, slot, given.adapter(True))
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(bank))
    serving.attach(model, bank)
    graphdef, state = nnx.split(model)

    @jax.jit
    def step(state, rows, x):
        with serving.route(nnx.merge(graphdef, state), rows) as routed:
            return routed(x)

    for implementation in ("gather", "mask"):
        y = step(state, bank.select([3, 0, 2, 1, 9], implementation=implementation), jnp.asarray(INPUT))
        for row, slot in enumerate([3, 0, 2, 1]):
            want = alone(PAIRS[slot - 1] if slot else BASE, INPUT[row])
            np.testing.assert_allclose(y[row], want, rtol=3e-5, atol=3e-5 * np.abs(want).max())
        assert np.isnan(y[4]).all()
