"""The bank: each row of a batch is as with its adapter alone, and nothing is compiled again."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxadapt
from jaxadapt import AttachError, serving
from tests.support import banked, meshes, small
from tests.support.banked import INPUT, KINDS, MAX_RANK, NAMES, ROWS, Given, Served, alone, check_rows, served

WAYS = [(api, scanned) for api in ("nnx", "linen") for scanned in (False, True)]
MIXED = [
    Given("lora", 2, 3, NAMES),
    Given("rslora", 4, 5, ("q", "up"), pattern=(1, 7), seed=1),
    Given("dora", 3, 2, ("o", "up", "down"), pattern=(2, 8), seed=2),
    Given("ia3", 1, 1, NAMES, seed=3),
    Given("bias", 1, 4, ("q", "down"), seed=4),
]


@st.composite
def adapters(draw) -> Given:
    ranks = st.integers(1, MAX_RANK)
    targets = draw(st.sets(st.sampled_from(NAMES), min_size=1))
    pattern = draw(st.none() | st.tuples(ranks, st.integers(1, 9))) if "up" in targets else None
    kind = draw(st.sampled_from(KINDS))
    order = tuple(sorted(targets))
    return Given(kind, draw(ranks), draw(st.integers(1, 9)), order, pattern, draw(st.integers(0, 9)))


@pytest.mark.parametrize(("api", "scanned"), WAYS)
def test_each_row_is_as_with_its_adapter_alone(api, scanned):
    check_rows(served(api, scanned), MIXED, [0, 1, 2, 3, 4])
    check_rows(served(api, scanned), MIXED, [5, 2, 2, 3, 0])


@pytest.mark.parametrize(("api", "scanned"), WAYS)
@settings(max_examples=4, deadline=None)
@given(st.lists(adapters(), min_size=1, max_size=3), st.lists(st.integers(-2, 7), min_size=ROWS, max_size=ROWS))
def test_any_mixture(api, scanned, mixture, ids):
    served_model = served(api, scanned)
    for slot in range(1, served_model.slots):
        served_model.put(slot, None)
    check_rows(served_model, mixture, ids)


@pytest.mark.parametrize(("api", "scanned"), WAYS)
def test_nothing_is_compiled_again(api, scanned, caplog):
    model = served(api, scanned)
    check_rows(model, MIXED[:1], [0, 1, 0, 1, 0])
    with jax.log_compiles(), jax.transfer_guard("allow"), caplog.at_level("WARNING"):
        for slot, one in enumerate(MIXED, 1):
            adapter = one.adapter(scanned)
            caplog.clear()
            model.put(slot, adapter)
            model([slot, 0, 9, -1, 1], INPUT)
            assert not [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
        model([0], INPUT[:1])  # another size is compiled, which the log shows
        assert any("Compiling" in record.getMessage() for record in caplog.records)


def test_put_reuses_the_memory_of_the_bank():
    model = Served("nnx", True)
    before = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(model.bank)}
    old = model.bank
    model.put(1, MIXED[0].adapter(True))
    assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(model.bank)} == before
    assert all(x.is_deleted() for x in jax.tree.leaves(old))


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_a_call_without_a_route_raises(api):
    net = small.net() if api == "nnx" else small.LinenNet()
    bank = serving.create(small.base(), small.LORA, slots=2)
    attached = serving.attach(net, bank)
    call = attached if api == "nnx" else lambda x: attached.apply(small.base(), x)
    with pytest.raises(AttachError, match="no route"):
        call(small.X)
    with serving.route(attached, bank.select([0, 0, 0])) as routed:
        y = routed(small.X) if api == "nnx" else routed.apply(small.base(), small.X)
    np.testing.assert_array_equal(y, small.net()(small.X))
    with pytest.raises(AttachError, match="no route"):
        call(small.X)
    with pytest.raises(AttachError, match="has a bank already"):
        serving.attach(attached, bank)
    plain = serving.detach(attached)
    assert type(plain) is (small.Net if api == "nnx" else small.LinenNet)


def test_a_banked_nnx_model_is_as_before_after_detach():
    net = small.net()
    before = nnx.graphdef(net)
    bank = serving.create(net, [small.LORA, small.IA3], slots=2)
    serving.attach(net, bank)
    with pytest.raises(ZeroDivisionError), serving.route(net, bank.select([0])):
        raise ZeroDivisionError
    serving.detach(net)
    assert nnx.graphdef(net) == before


def test_an_active_adapter_acts_in_every_row_beside_the_bank():
    net = small.trained()
    alone_y = net(small.X)
    bank = serving.create(net, small.IA3, slots=2)
    bank = serving.put(bank, 1, small.adapter(small.IA3))
    serving.attach(net, bank)
    with serving.route(net, bank.select([0, 1, 0])):
        y = net(small.X)
    np.testing.assert_allclose(y[::2], alone_y[::2], rtol=1e-6)
    assert np.abs(y[1] - alone_y[1]).max() > 0.1


# ---------------------------------------------------------------- what cannot be put


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (jaxadapt.LoraConfig(r=9, target_modules=["q_proj"]), "lora_A: r is 9, the bank has 4"),
        (jaxadapt.LoraConfig(r=2, target_modules=["up_proj"]), "up_proj.kernel: the bank has no place"),
        (jaxadapt.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "dora=True.*the bank has LORA .dora=F"),
        (jaxadapt.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"]), "copy of the weight"),
        (jaxadapt.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1]), "aLoRA"),
        (jaxadapt.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj"]), "is OFT; the bank has LORA"),
        (jaxadapt.LoHaConfig(r=3, target_modules=["q_proj"]), "lora_A: r is 9, the bank has 4"),
        (jaxadapt.HiraConfig(target_modules=["q_proj"]), "HIRA has no form"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(config, message):
    bank = serving.create(small.base(), jaxadapt.LoraConfig(r=4, target_modules=["q_proj"]), slots=2)
    adapter = jaxadapt.init(small.base()["params"], config, key=jax.random.key(0))
    ways_out = {"copy of": "jaxadapt.merge", "aLoRA": "jaxadapt.load", "the bank has LORA": r"create\(base, \[\.\.\., "}
    way_out = next((out for part, out in ways_out.items() if part in message), "to_lora.*merge")
    with pytest.raises(AttachError, match=rf"(?s){message}.*{way_out}"):
        serving.put(bank, 1, adapter, small.base())
    assert not any(x.is_deleted() for x in jax.tree.leaves(bank))


def test_a_plain_lora_in_a_bank_of_doras_is_told_what_to_pass_to_create():
    dora = small.LORA.replace(use_dora=True)
    adapter = small.adapter(small.LORA)
    with pytest.raises(AttachError, match=r"is LORA \(dora=False\); the bank has LORA \(dora=True\)\n") as refused:
        serving.put(serving.create(small.base(), dora, slots=2), 1, adapter, small.base())
    assert f"serving.create(base, [..., {adapter.config!r}], slots=2)" in str(refused.value)
    bank = serving.create(small.base(), [dora, adapter.config], slots=2)
    serving.put(bank, 1, adapter, small.base())


def test_an_adapter_of_a_narrower_base_is_refused():
    """Only ranks are filled up: an input of 3 is no input of 4 whose last column is zero."""
    wide, narrow = ({"q": {"kernel": np.ones((size, 6), "f4")}} for size in (4, 3))
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"])
    bank = serving.create(wide, config, slots=2)
    with pytest.raises(AttachError, match=r"q\.kernel\.lora_A: i is 3, the bank has 4"):
        serving.put(bank, 1, jaxadapt.init(narrow, config, key=jax.random.key(0)))


def test_an_adapter_of_one_fused_part_goes_to_this_part_of_every_stacked_layer():
    line = jaxadapt.Weight("h.qv", "h.{l}.{p}.weight", "{l} {p} i o -> o i", p=("q", "v"))
    base = {"h": {"qv": np.random.default_rng(0).standard_normal((3, 2, 4, 5)).astype("f4")}}
    config = jaxadapt.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
    bank = serving.create(base, config, slots=2, keymap=(keymap := jaxadapt.KeyMap("stacked", (line,))))
    adapter = jaxadapt.init(base, config.replace(target_modules=["v"]), key=jax.random.key(0), keymap=keymap)
    (slot,) = serving.prepare(bank, adapter)
    change = np.einsum("lpor,lpri,lp->lpio", slot["lora_B"], slot["lora_A"], slot["scale"])
    np.testing.assert_allclose(change, jaxadapt.merge(base, adapter)["h"]["qv"] - base["h"]["qv"], atol=1e-5)


@pytest.mark.parametrize("slot", [0, 2, -1])
def test_only_slots_of_the_bank_are_written(slot):
    bank = serving.create(small.base(), small.LORA, slots=2)
    with pytest.raises(AttachError, match=f"expected 1 to 1, found {slot}"):
        serving.put(bank, slot, None)


def test_bad_requests():
    base = small.base()
    with pytest.raises(AttachError, match="at least 2"):
        serving.create(base, small.LORA, slots=1)
    with pytest.raises(AttachError, match=r"(?s)cannot create the bank.*HIRA has no form.*to_lora.*merge"):
        serving.create(base, jaxadapt.HiraConfig(target_modules=["q_proj"]), slots=2)
    with pytest.raises(AttachError, match="two of the configurations"):
        serving.create(base, [small.LORA, small.LORA.replace(r=9)], slots=2)
    bank = serving.create(base, small.LORA.replace(use_dora=True), slots=2)
    with pytest.raises(AttachError, match="norm of a DoRA"):
        serving.put(bank, 1, None)
    for ids in ([[[1]]], [1.0], 1):
        with pytest.raises(AttachError, match="expected integers of shape"):
            bank.select(ids)
    other = serving.create(base, small.LORA, slots=2)
    with (
        pytest.raises(AttachError, match="another bank"),
        serving.route(serving.attach(small.LinenNet(), bank), other.select([0])),
    ):
        pass
    with pytest.raises(AttachError, match="no bank"), serving.route(small.net(), bank.select([0])):
        pass


def test_a_layer_that_does_not_see_the_rows_is_refused():
    net = small.net()
    bank = serving.create(net, small.LORA, slots=2)
    serving.attach(net, bank)
    with serving.route(net, bank.select([0, 1])), pytest.raises(AttachError, match="first axis is not the 2 rows"):
        net(small.X)


# ---------------------------------------------------------------- shardings, gradients


@pytest.mark.parametrize("scanned", [False, True])
def test_on_eight_devices_the_arrays_are_sharded_as_the_base(scanned):
    mesh = meshes.mesh_of("4x2")
    params = meshes.placed(banked.params(scanned), mesh, "4x2", "both")
    bank = banked.create(params, scanned)
    given_adapter = dataclasses.replace(MIXED[2], targets=NAMES)
    bank = serving.put(bank, 3, given_adapter.adapter(scanned), params)
    for place, arrays in zip(bank.layout.places, bank.arrays, strict=True):
        leaf = place.row.leaf
        if place.row.method.peft_type != "LORA":
            continue
        for tensor in ("lora_A", "lora_B"):
            spec = meshes.wanted(leaf, tensor, "4x2", "both")
            want = jax.sharding.PartitionSpec(*[None] * (1 + scanned), *spec)
            assert arrays[tensor].sharding.is_equivalent_to(jax.NamedSharding(mesh, want), arrays[tensor].ndim), leaf
    module = serving.attach(banked.LinenBlocks(scanned), bank)

    @jax.jit
    def step(params, rows, x):
        with serving.route(module, rows) as routed:
            return routed.apply({"params": params}, x)

    y = step(params, bank.select([3, 0, 3, 0, 3]), jnp.asarray(INPUT))
    for row in (0, 1):
        want = alone(given_adapter if row == 0 else banked.BASE, INPUT[row])
        np.testing.assert_allclose(y[row], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_gradients_reach_only_the_slots_in_use():
    bank = serving.create(small.base(), small.LORA, slots=4)
    for slot in (1, 2, 3):
        bank = serving.put(bank, slot, small.adapter(seed=slot))
    module = serving.attach(small.LinenNet(), bank)

    @jax.jit
    @jax.grad
    def gradient(bank):
        with serving.route(module, bank.select(jnp.array([1, 3, 3]))) as routed:
            return (routed.apply(small.base(), small.X) ** 2).sum()

    sizes = np.array([np.abs(np.asarray(x)).max(tuple(range(1, x.ndim))) for x in jax.tree.leaves(gradient(bank))])
    assert (sizes[:, [1, 3]] > 0).all()
    assert (sizes[:, [0, 2]] == 0).all()


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
@pytest.mark.parametrize("spec", [(None, "model"), ("data", "model"), ("model", None)])
@pytest.mark.parametrize("dora", [False, True])
def test_put_on_a_mesh(kind: str, spec: tuple[str | None, ...], dora: bool):
    """An adapter in a slot of a bank that is spread over devices, whichever type the axes of the mesh have."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], use_dora=dora)
    adapter = jaxadapt.init({"q": {"kernel": jnp.ones((4, 6))}}, config, key=jax.random.key(0))
    adapter = jax.tree.map(lambda x: x + 1, adapter)
    with jax.set_mesh(mesh):
        base = {"q": {"kernel": jax.device_put(jnp.ones((4, 6)), sharding)}}
        bank = serving.create(base, config, slots=3)
        before = {name: x.sharding for name, x in bank.arrays[0].items()}
        bank = serving.put(bank, 1, adapter, base)
        assert all(x.sharding.is_equivalent_to(before[name], x.ndim) for name, x in bank.arrays[0].items())
        for name in ("lora_A", "lora_B"):
            got = np.asarray(bank.arrays[0][name])
            np.testing.assert_array_equal(got[1], np.asarray(adapter.flat()[f"q.kernel.{name}"]).reshape(got[1].shape))
            assert not got[0].any()
            assert not got[2].any()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_needs_a_word_about_the_banks_base(init: str):
    """As in `load`: on the original base it would compute something else, and nothing would show it."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((4, 6), "float32"), rng.standard_normal((2, 4), "float32")
    original = {"q": {"kernel": w}}
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], init_lora_weights=init)
    changed, first = jaxadapt.initializers.start(original, config)
    trained = jax.tree.map(lambda leaf: leaf + 0.5 * rng.standard_normal(leaf.shape).astype("float32"), first)

    def product(adapter: jaxadapt.Adapter) -> np.ndarray:
        site = {name: np.asarray(leaf) for name, leaf in adapter.params["q"]["kernel"].items()}
        return (config.lora_alpha / config.r) * site["lora_A"].T @ site["lora_B"].T

    want = x @ (w - product(first) + product(trained))  # numpy

    def rows(base: dict[str, dict[str, np.ndarray]], adapter: jaxadapt.Adapter, **options: bool) -> np.ndarray:
        model = nnx.Dict(q=nnx.Linear(4, 6, use_bias=False, rngs=nnx.Rngs(0)))
        model.q.kernel[...] = base["q"]["kernel"]
        bank = serving.create(model, config.replace(r=4, init_lora_weights=True), slots=2)
        bank = serving.put(bank, 1, adapter, **options)
        with serving.route(serving.attach(model, bank), bank.select([1, 1])):
            return np.asarray(model.q(x))

    with pytest.raises(jaxadapt.ConfigError, match=f"init_lora_weights='{init}'.*does not fit the original base") as e:
        rows(original, trained)
    assert "base_is_changed=True" in str(e.value)
    np.testing.assert_allclose(rows(changed, trained, base_is_changed=True), want, rtol=0, atol=1e-5 * abs(want).max())
    plain = jaxadapt.initializers.for_original_base(trained, first)
    np.testing.assert_allclose(rows(original, plain), want, rtol=0, atol=1e-5 * abs(want).max())
    assert not np.allclose(rows(original, trained, base_is_changed=True), want, atol=1e-2)  # what was silent
    with pytest.raises(jaxadapt.ConfigError, match="does not fit the original base"):
        serving.prepare(serving.create(original, config, slots=2), trained)
