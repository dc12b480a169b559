"""VeRA in a bank: one copy of the random projections for all slots, rows and layers; the slots hold the vectors."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxadapt
from jaxadapt import AttachError, VeraConfig, serving
from tests.support import banked, meshes, small
from tests.support.banked import INPUT, LAYERS, NAMES, SIZES, Given, Served, check_rows

WAYS = [(api, scanned) for api in ("nnx", "linen") for scanned in (False, True)]
RANK = 4
A, B = (np.random.default_rng(n).uniform(-1, 1, shape).astype("f4") for n, shape in ((1, (RANK, 32)), (2, (32, RANK))))


@dataclasses.dataclass(frozen=True)
class Vera(Given):
    """An adapter with the first rows and columns of the projections `A` and `B`, or of these times `factor`."""

    factor: float = 1.0

    @property
    def config(self) -> VeraConfig:
        return VeraConfig(r=self.r, target_modules=list(self.targets))

    @functools.cached_property
    def tensors(self) -> dict[tuple[int, str], dict[str, np.ndarray]]:
        rng = np.random.default_rng(self.seed)
        return {
            (layer, name): {
                "vera_lambda_b": rng.standard_normal(SIZES[name][1]).astype("f4"),
                "vera_lambda_d": rng.standard_normal(self.r).astype("f4"),
            }
            for layer in range(LAYERS)
            for name in self.targets
        }

    @property
    def projections(self) -> tuple[np.ndarray, np.ndarray]:
        inputs, outputs = (max(SIZES[name][axis] for name in self.targets) for axis in (0, 1))
        return self.factor * A[: self.r, :inputs], self.factor * B[:outputs, : self.r]

    def peft(self) -> jaxadapt.PeftTensors:
        a, b = self.projections
        shared = {"base_model.vera_A": a.astype("f4"), "base_model.vera_B": b.astype("f4")}
        return jaxadapt.PeftTensors(self.config, {**super().peft().tensors, **shared})

    def linear(self, layer: int, name: str, x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The paper's formula: x·W + b + (((x·Aᵀ)∘d)·Bᵀ)∘b."""
        y, own = x @ w + b, self.tensors.get((layer, name))
        if own is None:
            return y
        first, last = self.projections
        h = (x @ first[:, : w.shape[0]].T) * own["vera_lambda_d"]
        return y + (h @ last[: w.shape[1]].T) * own["vera_lambda_b"]


ROOM = Vera("vera", RANK, 1, NAMES)
MIXED = [ROOM, Vera("vera", 2, 1, NAMES, seed=1), Vera("vera", RANK, 1, ("q", "down"), seed=2)]


@functools.cache
def served(api: str, scanned: bool) -> Served:
    """A model with a bank for `ROOM` and smaller ones; each test puts its own adapters."""
    return Served(api, scanned, 4, ROOM.adapter(scanned))


@pytest.mark.parametrize(("api", "scanned"), WAYS)
def test_each_row_is_as_with_its_adapter_alone_and_nothing_is_compiled_again(api, scanned, caplog):
    model = served(api, scanned)
    check_rows(model, MIXED, [0, 1, 2, 3, 7])
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for slot, given in enumerate([MIXED[2], MIXED[0]], 1):
            adapter = given.adapter(scanned)
            caplog.clear()
            model.put(slot, adapter)
            model([slot, 0, 9, -1, 1], INPUT)
            assert not [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]


@pytest.mark.parametrize(("api", "scanned"), WAYS)
def test_the_projections_are_held_once(api, scanned):
    model = served(api, scanned)
    model.put(1, ROOM.adapter(scanned))
    held, rows = model.bank.shared, model.bank.select([1, 0, 1])
    assert [{name: x.shape for name, x in of.items()} for of in held] == [{"vera_A": (4, 32), "vera_B": (32, 4)}]
    assert all(rows.shared[0][name] is x for name, x in held[0].items())
    model.put(2, MIXED[1].adapter(scanned))  # which donates the slots, but not what the rows still use
    assert all(model.bank.shared[0][name] is x and not x.is_deleted() for name, x in held[0].items())
    vectors = LAYERS * sum(out + RANK + 1 for _, out in SIZES.values())  # and whether the module is adapted
    assert model.bank.nbytes == 4 * (4 * vectors + A.size + B.size)
    many = model.bank.select(np.zeros(1000, np.int32))
    call = jax.make_jaxpr(model.step)(model.state, many, jnp.zeros((1000, 1, meshes.D)))
    assert 1000 * meshes.D <= max(intermediates(call.jaxpr)) < 1000 * A.size  # no projection for each row


def intermediates(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from intermediates(inner)


@pytest.mark.full
def test_tokens_layers_and_mixtures_share_them_too():
    model = served("nnx", True)
    for slot, given in enumerate(MIXED, 1):
        model.put(slot, given.adapter(True))
    ids = np.array([1, 0, 3, 2, 7])
    want = model(ids, INPUT)
    for rows in (
        model.bank.select(ids, implementation="layer"),
        model.bank.select(ids, implementation="mask"),
        model.bank.select(np.repeat(ids[:, None], INPUT.shape[1], 1)),
        model.bank.select(np.stack([ids, ids], 1), weights=np.full((5, 2), 0.5)),
    ):
        np.testing.assert_allclose(model(ids, INPUT, rows), want, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(want)))


def test_other_projections_are_refused_unless_the_bank_has_them_too():
    other = Vera("vera", 2, 1, NAMES, seed=3, factor=1.5)
    with pytest.raises(
        AttachError,
        match=r"(?s)vera_A: 64 of 64 values differ, by up to 0\.[45].*shape \[2, 32\], the bank's is \[4, 32\].*"
        r"vera_B: 64 of 64.*create\(base, \[config, adapter\]\).*LoRA of rank 2.*to_lora",
    ):
        served("linen", False).put(1, other.adapter(False))
    both = Served("linen", True, 4, [ROOM.adapter(True), other.adapter(True)])
    check_rows(both, [ROOM, other, MIXED[1]], [2, 1, 3, 0, 2])
    room = jaxadapt.LoraConfig(r=2, target_modules=list(NAMES))
    bank = serving.create(banked.params(True), room, slots=2, keymap=meshes.table(True))
    with pytest.raises(AttachError, match="the bank has no vera_A"):
        serving.put(bank, 1, other.adapter(True))
    serving.put(bank, 1, jaxadapt.merging.to_lora(other.adapter(True), params=banked.params(True)).adapter)


def test_a_configuration_alone_gives_the_projections_of_a_new_adapter():
    config = VeraConfig(r=3, target_modules=list(NAMES), projection_prng_key=5)
    base, keymap = banked.params(True), meshes.table(True)
    bank = serving.create(base, config, slots=2, keymap=keymap)
    adapter = jaxadapt.init(base, config, key=jax.random.key(0), keymap=keymap)
    for name, x in adapter.shared.items():
        np.testing.assert_array_equal(bank.shared[0][name], x)
    found = serving.get(serving.put(bank, 1, adapter), 1, adapter)
    assert found.flat().keys() == adapter.flat().keys()
    for path, x in found.flat().items():
        np.testing.assert_array_equal(x, adapter.flat()[path])
    with pytest.raises(AttachError, match="two of the configurations have the same kind of VERA"):
        serving.create(base, [config, adapter], slots=2, keymap=keymap)
    seeds = [config, config.replace(projection_prng_key=6)]
    assert len(serving.create(base, seeds, slots=2, keymap=keymap).shared) == 2


def test_a_pool_leases_and_evicts_them(tmp_path):
    base, keymap = banked.params(False), meshes.table(False)
    for number in range(4):
        given = Vera("vera", RANK, 1, NAMES, seed=number, factor=1.0 if number < 3 else 2.0)
        jaxadapt.save(given.adapter(False), tmp_path / str(number))
    bank = serving.create(base, ROOM.adapter(False), slots=3, keymap=keymap)
    pool = serving.AdapterPool(bank, base, tmp_path, keymap=keymap)
    shared = bank.shared
    for names in (["0", "1"], ["2", None], ["1", "0"]):
        with pool.lease(names) as ids:
            rows = pool.select(ids)
            for place, arrays in zip(bank.layout.places, rows.arrays, strict=True):
                _, layer, name, _ = place.row.leaf.split(".")
                for row, adapter in enumerate(names):
                    given = Vera("vera", RANK, 1, NAMES, seed=int(adapter or 0))
                    own = given.tensors[int(layer), name]["vera_lambda_d"] * (adapter is not None)
                    np.testing.assert_array_equal(arrays["vera_lambda_d"][row], own)
        assert rows.shared is shared
    errors: dict[str, Exception] = {}
    with pool.lease(["3", "2"], failed=errors) as ids:
        assert ids.slots[0] == -1
    assert "values differ" in str(errors["3"])
    pool.close()


@pytest.mark.full
def test_training_in_slots_leaves_the_projections():
    config = VeraConfig(r=2, target_modules=["q_proj", "up_proj"])
    adapter, base = small.adapter(config), small.base()
    bank = serving.put(serving.create(base, adapter, slots=3), 1, adapter)
    module = serving.attach(small.LinenNet(), bank)
    tx = jaxadapt.optim.per_slot(optax.adamw(1e-2, weight_decay=0.1), bank)

    @jax.jit
    def step(bank):
        def loss(bank):
            with serving.route(module, bank.select(jnp.array([1, 1, 1]))) as routed:
                return (routed.apply(base, small.X) ** 2).sum()

        grads = jax.grad(loss)(bank)
        updates, _ = tx.update(grads, tx.init(bank), bank, active=jnp.array([False, True, False]))
        return optax.apply_updates(bank, updates)

    after = step(bank)
    for name, x in bank.shared[0].items():
        np.testing.assert_array_equal(after.shared[0][name], x)
    trained = serving.get(after, 1, adapter).flat()
    kept = {path for path, x in trained.items() if bool((x == adapter.flat()[path]).all())}
    assert kept == {"~shared.vera_A", "~shared.vera_B"}


def test_on_eight_devices_every_device_has_them():
    mesh = meshes.mesh_of("4x2")
    params = meshes.placed(banked.params(True), mesh, "4x2", "both")
    bank = serving.create(params, ROOM.adapter(True), slots=2, keymap=meshes.table(True))
    for x in bank.shared[0].values():
        assert x.sharding.is_fully_replicated
        assert len(x.sharding.device_set) == 8
