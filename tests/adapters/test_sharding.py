"""An adapter's shardings follow its base's; what is compiled has the collectives of LoRA written by hand."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxadapt
from jaxadapt.arrays import regions
from jaxadapt.core import paths
from tests.support import meshes
from tests.support.meshes import CONFIG, LAYOUTS, X

BOXED = CONFIG.replace(target_modules=["up", "down"])
COMPILED = [("8", "fsdp"), ("8", "tp"), ("4x2", "both"), ("2x2x2", "both")]


def same_spec(found: Any, spec: PartitionSpec, mesh: jax.sharding.Mesh, ndim: int) -> bool:
    return found.is_equivalent_to(NamedSharding(mesh, spec), ndim)


@pytest.fixture(autouse=True)
def placed_as_flax_does() -> Iterator[None]:
    """Importing Tunix turns this off for the whole process."""
    before = flax.config.flax_always_shard_variable
    flax.config.update("flax_always_shard_variable", True)
    yield
    flax.config.update("flax_always_shard_variable", before)


def _lines() -> jaxadapt.KeyMap:
    """A table for one block alone."""
    lines = [
        jaxadapt.Weight(w.leaf.removeprefix("blocks.{l}."), w.key.removeprefix("h.{l}."), w.pattern)
        for w in meshes.TABLE.weights
    ]
    return jaxadapt.KeyMap("block", tuple(lines))


def check(adapter: jaxadapt.Adapter, mesh: jax.sharding.Mesh, layout: tuple[str, str], stacked: bool = False) -> None:
    flat = adapter.flat()
    assert len(flat) == len(adapter.sites) * 2
    for path, leaf in flat.items():
        site, _, tensor = path.rpartition(".")
        want = meshes.wanted(site, tensor, *layout, stacked=stacked)
        assert same_spec(leaf.sharding, want, mesh, leaf.ndim), f"{path}: {leaf.sharding.spec}, expected {want}"


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_adapters_follow_concrete_arrays(layout: tuple[str, str], scanned: bool) -> None:
    mesh = meshes.mesh_of(layout[0])
    params = meshes.placed(meshes.base(scanned), mesh, *layout)
    table, key = meshes.table(scanned), jax.random.key(0)
    adapter = jaxadapt.init(params, CONFIG, key=key, keymap=table)
    check(adapter, mesh, layout, scanned)
    on_one = jaxadapt.init(meshes.base(scanned), CONFIG, key=key, keymap=table)
    jax.tree.map(np.testing.assert_array_equal, adapter, on_one)  # where it is made is not what it is
    model = jaxadapt.adapt(meshes.model(params, scanned), CONFIG, rngs=nnx.Rngs(0), keymap=table)
    check(jaxadapt.extract(model), mesh, layout, scanned)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    check(jaxadapt.init(abstract, CONFIG, keymap=table), mesh, layout, scanned)
    model = jaxadapt.adapt(meshes.model(abstract, scanned), CONFIG, keymap=table)
    check(jaxadapt.extract(model), mesh, layout, scanned)


def test_nnx_metadata() -> None:
    layout = ("2x2x2", "both")
    mesh = meshes.mesh_of(layout[0])

    def build() -> meshes.Block:
        return jaxadapt.adapt(meshes.Block(nnx.Rngs(0), layout), CONFIG, rngs=nnx.Rngs(1))

    with jax.set_mesh(mesh):
        eager, jitted = build(), nnx.jit(build)()
        abstract = jaxadapt.adapt(nnx.eval_shape(lambda: meshes.Block(nnx.Rngs(0), layout)), CONFIG)
    for model in (eager, jitted):
        check(jaxadapt.extract(model), mesh, layout)
    jax.tree.map(np.testing.assert_array_equal, jaxadapt.extract(eager), jaxadapt.extract(jitted))
    for path, leaf in jaxadapt.extract(abstract).flat().items():
        site, _, tensor = path.rpartition(".")
        assert tuple(leaf.sharding.spec) == tuple(meshes.wanted(site, tensor, *layout))
    for path, var in nnx.to_flat_state(nnx.state(eager, jaxadapt.AdapterParam)):
        want = meshes.wanted(f"{path[0]}.kernel", path[-1], *layout)
        assert nnx.get_partition_spec({"v": var})["v"].get_value() == want
    optimizer = nnx.Optimizer(eager, optax.adam(1e-2), wrt=jaxadapt.AdapterParam)
    mu = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"][0]["mu"]["up"]["lora"]["default"]["kernel"]
    assert same_spec(mu["lora_A"].sharding, meshes.wanted("up.kernel", "lora_A", *layout), mesh, 2)


@pytest.mark.parametrize("logical", [False, True])
def test_linen_boxes(logical: bool, tmp_path: Any) -> None:
    layout = ("4x2", "both")
    mesh, rules = meshes.mesh_of("4x2"), (("F", "fsdp"), ("T", "tp"))
    module = jaxadapt.adapt(meshes.LinenBlock(layout, logical), BOXED)
    abstract = jax.eval_shape(module.init, jax.random.key(0), X)
    boxed = nn.get_partition_spec(abstract)
    up = boxed["lora"]["default"]["up"]["kernel"]
    assert up == ({"lora_A": PartitionSpec(None, "F" if logical else "fsdp"),
                   "lora_B": PartitionSpec("T" if logical else "tp", None)})  # fmt: skip
    where = nn.logical_to_mesh_sharding(boxed, mesh, rules) if logical else jax.tree.map(
        lambda s: NamedSharding(mesh, s), boxed, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )  # fmt: skip
    variables = jax.jit(module.init, out_shardings=where)(jax.random.key(0), X)
    check(jaxadapt.extract(variables), mesh, layout)
    plain = module.init(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, jaxadapt.extract(plain), jaxadapt.extract(variables))
    for a, b in zip(jax.tree.leaves(plain["params"]), jax.tree.leaves(variables["params"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-7)  # Flax's own draws, fused or not: the last bit
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        y = jax.jit(module.apply)(variables, X)
        here = module.init(jax.random.key(0), X)  # outside jit, as Flax's own can
        assert str(jaxadapt.summary(abstract)) == str(jaxadapt.summary(variables))
        key = jax.random.key(3)
        check(jaxadapt.init(abstract["params"], BOXED, key=key), mesh, layout)
    jax.tree.map(np.testing.assert_array_equal, jaxadapt.extract(here), jaxadapt.extract(plain))
    # float32 sums in another order
    np.testing.assert_allclose(y, module.apply(plain, X), rtol=2e-6, atol=2e-6)
    jaxadapt.save(variables, tmp_path)
    again = jaxadapt.load(tmp_path, {"params": variables["params"]})
    assert jax.tree.structure(again["lora"]["default"]["up"]) == jax.tree.structure(variables["lora"]["default"]["up"])
    leaves = {k: v for k, v in variables["lora"]["default"].items() if k != "~config"}
    bare = jaxadapt.extract(jaxadapt.models.LoraTree({"lora": {"default": leaves}}, config=BOXED))
    jax.tree.map(np.testing.assert_array_equal, bare.params, jaxadapt.extract(variables).params)


def test_logical_names_without_a_mesh_place_nothing() -> None:
    module = jaxadapt.adapt(meshes.LinenBlock(("4x2", "both"), True), BOXED)
    abstract = jax.eval_shape(module.init, jax.random.key(0), X)
    adapter = jaxadapt.init(abstract["params"], BOXED, key=jax.random.key(0))
    assert {x.sharding.num_devices for x in adapter.flat().values()} == {1}


@pytest.mark.parametrize("layout", COMPILED, ids="-".join)
def test_explicit_meshes(layout: tuple[str, str]) -> None:
    """The model must say what a sum over sharded axes is to be, as everywhere on such meshes; the adapter need not."""
    mesh = meshes.mesh_of(layout[0], AxisType.Explicit)
    with jax.set_mesh(mesh):
        model = jaxadapt.adapt(meshes.Block(nnx.Rngs(0), layout), CONFIG, rngs=nnx.Rngs(1))
        check(jaxadapt.extract(model), mesh, layout)
        base = nnx.to_pure_dict(nnx.state(meshes.Block(nnx.Rngs(0), layout)))
        made = jax.jit(lambda base, key: jaxadapt.init(base, CONFIG, key=key, keymap=_lines()))(base, jax.random.key(0))
        check(made, mesh, layout)
        adapter = jax.tree.map(lambda x: x + 1, jaxadapt.extract(model))
        jaxadapt.inject(model, adapter)

        def run(model: Any, x: jax.Array) -> jax.Array:
            whole = PartitionSpec(None, None)
            y = model.q(x, out_sharding=PartitionSpec(None, None, None))
            x = x + model.o(jnp.tanh(y), out_sharding=whole)
            return x + model.down(jnp.tanh(model.up(x)), out_sharding=whole)

        trained = nnx.DiffState(0, jaxadapt.AdapterParam)
        both = nnx.value_and_grad(lambda m: (run(m, jnp.asarray(X)) ** 2).sum(), argnums=trained)
        value, grads = nnx.jit(both)(model)
    host = jax.tree.map(np.asarray, nnx.state(model))
    alone = nnx.merge(nnx.graphdef(model), jax.tree.map(jnp.asarray, host))
    want, wants = nnx.value_and_grad(lambda m: (m(X) ** 2).sum(), argnums=trained)(alone)
    np.testing.assert_allclose(value, want, rtol=1e-5)  # float32 sums in another order

    def close(a: jax.Array, b: jax.Array) -> None:
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))

    jax.tree.map(close, grads, wants)


class LinenTwo(nn.Module):
    """Linen's layers cannot say how a sum lies: on an explicit mesh its models cut outputs, and gather in between."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = jnp.tanh(nn.Dense(meshes.F, name="up")(x))
        on_a_mesh = not jax.sharding.get_abstract_mesh().empty
        return nn.Dense(meshes.D, name="down")(jax.sharding.reshard(h, PartitionSpec("fsdp", None)) if on_a_mesh else h)


def test_linen_on_an_explicit_mesh() -> None:
    mesh, module = meshes.mesh_of("4x2", AxisType.Explicit), jaxadapt.adapt(LinenTwo(), BOXED)
    params = {name: meshes.base(False)["blocks"]["0"][name] for name in ("up", "down")}
    cut = {"kernel": NamedSharding(mesh, PartitionSpec(None, "tp")), "bias": NamedSharding(mesh, PartitionSpec("tp"))}

    def trained(params: Any, x: jax.Array) -> Any:
        adapter = jax.tree.map(lambda x: x + 1, jaxadapt.init(params, BOXED, key=jax.random.key(0)))
        loss = jax.value_and_grad(lambda lora: (module.apply({"params": params, **lora}, x) ** 2).sum())
        return adapter, jax.jit(loss)(adapter.collection)

    _, want = trained(params, jnp.asarray(X))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("fsdp", None)))
        adapter, found = trained(jax.device_put(params, {"up": cut, "down": cut}), x)
    assert {path.rpartition(".")[2]: tuple(leaf.sharding.spec) for path, leaf in adapter.flat().items()} == {
        "lora_A": (None, None), "lora_B": ("tp", None)
    }  # fmt: skip
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))  # sums in another order


def test_axes_that_cannot_be_followed_are_replicated() -> None:
    mesh = meshes.mesh_of("4x2")
    line = jaxadapt.Weight("kv", "{p}_proj.weight", "{p} n d h -> (n h) d", p=("k", "v"))
    table = jaxadapt.KeyMap("fused", (line,))
    where = NamedSharding(mesh, PartitionSpec("tp", None, "fsdp", None))
    params = {"kv": jax.ShapeDtypeStruct((2, 4, 8, 2), jnp.float32, sharding=where)}

    def specs(modules: list[str]) -> dict[str, tuple[Any, ...]]:
        config = jaxadapt.LoraConfig(r=4, target_modules=modules)
        found = jaxadapt.init(params, config, keymap=table).flat()
        return {path: tuple(x.sharding.spec) for path, x in found.items()}

    assert specs(["k_proj", "v_proj"]) == {
        "kv.lora_A": ("tp", None, "fsdp"),
        "kv.lora_B": ("tp", None, None, None),
    }
    # v alone: its axis of parts has one entry, which two devices cannot share
    assert specs(["v_proj"]) == {"kv.lora_A": (None, None, "fsdp"), "kv.lora_B": (None, None, None, None)}


def test_ia3_follows_by_the_roles_of_its_axes() -> None:
    mesh = meshes.mesh_of("4x2")
    params = meshes.placed(meshes.base(False), mesh, "4x2", "both")
    config = jaxadapt.IA3Config(target_modules=["q", "down"], feedforward_modules=["down"])
    found = jaxadapt.init(params, config, key=jax.random.key(0), keymap=meshes.TABLE).flat()
    assert tuple(found["blocks.0.q.kernel.ia3_l"].sharding.spec) == ("tp", None)
    assert tuple(found["blocks.0.down.kernel.ia3_l"].sharding.spec) == ("tp",)


def test_everything_a_method_adds_follows() -> None:
    """DoRA's magnitudes the outputs, copies of whole leaves their leaf, trained biases too."""
    mesh = meshes.mesh_of("2x2x2")
    params = meshes.placed(meshes.base(False), mesh, "2x2x2", "both")
    config = meshes.CONFIG.replace(target_modules=["q", "o"], modules_to_save=["up"], use_dora=True, bias="lora_only")
    found = jaxadapt.init(params, config, key=jax.random.key(0), keymap=meshes.TABLE)
    alone = jaxadapt.init(meshes.base(False), config, key=jax.random.key(0), keymap=meshes.TABLE)
    # DoRA's norms are float32 sums in another order
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found.params, alone.params)
    flat, fsdp = found.flat(), ("data", "fsdp")
    for path, spec in {
        "q.kernel.lora_magnitude_vector": ("tp",), "o.kernel.lora_magnitude_vector": (fsdp,),
        "up.kernel.copy": (fsdp, "tp"), "up.bias.copy": (), "q.kernel.lora_A": (None, fsdp), "q.kernel.lora_B": ("tp",),
    }.items():  # fmt: skip
        leaf = flat[f"blocks.0.{path}"]
        assert same_spec(leaf.sharding, PartitionSpec(*spec), mesh, leaf.ndim), path
    merged = paths.flatten(jaxadapt.merge(params, found))
    for path, leaf in paths.flatten(params).items():
        assert merged[path].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def test_stacked_and_expert_axes_follow() -> None:
    """Layers in one array, cut over pipeline stages; experts over their own mesh axis: A and B alike."""
    mesh = jax.make_mesh((2, 2, 2), ("stage", "expert", "tp"))
    line = jaxadapt.Weight("layers.experts.up.kernel", "l.{l}.experts.{e}.up.weight", "{l} {e} d f -> f d")
    where = NamedSharding(mesh, PartitionSpec("stage", "expert", None, "tp"))
    params = {"layers": {"experts": {"up": {"kernel": jax.ShapeDtypeStruct((4, 2, 8, 6), "f4", sharding=where)}}}}
    config = jaxadapt.LoraConfig(r=4, target_modules=["up"])
    found = jaxadapt.init(params, config, key=jax.random.key(0), keymap=jaxadapt.KeyMap("moe", (line,))).flat()
    specs = {path.rpartition(".")[2]: tuple(x.sharding.spec) for path, x in found.items()}
    assert specs == {"lora_A": ("stage", "expert", None, None), "lora_B": ("stage", "expert", "tp", None)}


class Wide(nnx.Module):
    """4 GiB of float32, if anything made it."""

    def __init__(self, rngs: nnx.Rngs, size: int = 1 << 15) -> None:
        said = {"kernel_metadata": {"out_sharding": ("x", None)}}
        self.q = nnx.Linear(size, size, use_bias=False, rngs=rngs, **said)


def _abstract_base(key: jax.Array, mesh: jax.sharding.Mesh) -> Any:
    size = 1 << 15
    spec = NamedSharding(mesh, PartitionSpec("x", None))
    base = {"q": {"kernel": jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=spec)}}
    return jaxadapt.init(base, WIDE, key=key).params


def _abstract_model(key: jax.Array, mesh: jax.sharding.Mesh) -> Any:
    model = nnx.eval_shape(lambda: Wide(nnx.Rngs(0)))
    return nnx.state(jaxadapt.adapt(model, WIDE, rngs=nnx.Rngs(key)), jaxadapt.AdapterParam)


def _model_made_inside(key: jax.Array, mesh: jax.sharding.Mesh) -> Any:
    return nnx.state(jaxadapt.adapt(Wide(nnx.Rngs(key)), WIDE, rngs=nnx.Rngs(key)), jaxadapt.AdapterParam)


def _linen_init(key: jax.Array, mesh: jax.sharding.Mesh) -> Any:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("x", None))
    module = jaxadapt.adapt(nn.Dense(1 << 15, use_bias=False, name="q", kernel_init=init), WIDE_BARE)
    made = module.init(key, jnp.zeros((1, 1 << 15)))
    return jaxadapt.extract({"lora": made["lora"]}).params


WIDE = jaxadapt.LoraConfig(r=4, target_modules=["q"])
WIDE_BARE = jaxadapt.LoraConfig(r=4, target_modules="all-linear")


@pytest.mark.parametrize("make", [_abstract_base, _abstract_model, _model_made_inside, _linen_init])
def test_an_abstract_base_costs_nothing_but_the_adapter(make: Any) -> None:
    """Read off the compiled program: bytes in, out, and in between, on each device."""
    mesh, size = meshes.mesh_of("8"), 1 << 15
    with jax.set_mesh(mesh):
        made = jax.jit(lambda key: make(key, mesh)).lower(jax.random.key(0)).compile()
    adapter, stats = (size + size) * 4 * 4, made.memory_analysis()
    whole = size * 4 * 4
    # A is cut in eight and B is not; 16 for a tuple of two. (A base made inside has no sharding there to follow: the
    # compiler chooses.)
    assert stats.output_size_in_bytes in (whole // 8 + whole + 16, 2 * whole + 16)
    if make in (_abstract_base, _abstract_model):
        assert stats.output_size_in_bytes == whole // 8 + whole + 16
    assert stats.argument_size_in_bytes < 64
    assert stats.temp_size_in_bytes < adapter  # random bits need twice their numbers, in A's shards


# ---------------------------------------------------------------- what is compiled


def collectives(compiled: Any) -> collections.Counter[str]:
    """The collectives of a program, with the shapes they move."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (\S+?)(?:\{{\S*)? ({kinds})(?:-start)?\(", compiled.as_text())
    return collections.Counter(f"{kind} {shape}" for shape, kind in found)


def by_hand(params: Any, lora: Any, x: jax.Array, said: Any = None) -> jax.Array:
    """The block with LoRA as one would write it; `said`: how outputs lie, by layer, for an explicit mesh."""

    def dense(name: str, x: jax.Array, eq: str, a: str, b: str) -> jax.Array:
        layer, low, on = params[name], lora[name]["kernel"], said and said[name]
        rank = said and PartitionSpec(on[0], None)
        delta = jnp.einsum(b, jnp.einsum(a, x, low["lora_A"], out_sharding=rank) * 2.0, low["lora_B"], out_sharding=on)
        bias = layer["bias"].reshape((1, *layer["bias"].shape))
        return jnp.einsum(eq, x, layer["kernel"], out_sharding=on) + bias + delta

    h = jnp.tanh(dense("q", x, "bd,dnh->bnh", "bd,rd->br", "br,nhr->bnh"))
    x = x + dense("o", h, "bnh,nhd->bd", "bnh,rnh->br", "br,dr->bd")
    h = jnp.tanh(dense("up", x, "bd,df->bf", "bd,rd->br", "br,fr->bf"))
    return x + dense("down", h, "bf,fd->bd", "bf,rf->br", "br,dr->bd")


TRAINED = [*((layout, "nnx") for layout in COMPILED), (("2x2x2", "both"), "linen")]


@pytest.mark.parametrize(("layout", "api"), TRAINED)
def test_no_collective_that_hand_written_lora_lacks(layout: tuple[str, str], api: str) -> None:
    """A whole training step, with its optimizer; kinds, shapes and numbers of the collectives are the same."""
    mesh = meshes.mesh_of(layout[0])
    params = meshes.placed(meshes.base(False)["blocks"]["0"], mesh, *layout)
    adapter = jaxadapt.init(params, CONFIG, key=jax.random.key(0), keymap=_lines())
    first = mesh.axis_names if layout[1] == "fsdp" else mesh.axis_names[0]
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec(first) if layout != ("8", "tp") else PartitionSpec()))
    tx = optax.sgd(1e-2, momentum=0.9)
    if api == "nnx":
        model = meshes.Block(nnx.Rngs(0))
        for path, var in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            var.set_value(params[path[0]][path[1]])
        jaxadapt.inject(jaxadapt.adapt(model, CONFIG, rngs=nnx.Rngs(0)), adapter)
        graphdef, lora, base = nnx.split(model, jaxadapt.AdapterParam, ...)

        def ours(lora: Any, base: Any, x: jax.Array) -> jax.Array:
            return (nnx.merge(graphdef, lora, base)(x) ** 2).sum()
    else:
        module = jaxadapt.adapt(meshes.LinenBlock(), CONFIG)
        lora, base = adapter.collection, {"params": params}

        def ours(lora: Any, base: Any, x: jax.Array) -> jax.Array:
            return (module.apply({**base, **lora}, x) ** 2).sum()

    def hand(lora: Any, params: Any, x: jax.Array) -> jax.Array:
        return (by_hand(params, lora, x) ** 2).sum()

    def compiled(f: Any, lora: Any, base: Any) -> tuple[Any, Any]:
        state = tx.init(lora)

        def step(lora: Any, state: Any, base: Any, x: jax.Array) -> Any:
            value, grads = jax.value_and_grad(f)(lora, base, x)
            updates, state = tx.update(grads, state)
            return optax.apply_updates(lora, updates), state, value

        where = jax.tree.map(lambda x: x.sharding, (lora, state))
        made = jax.jit(step, out_shardings=(*where, None)).lower(lora, state, base, x).compile()
        return made, made(lora, state, base, x)[2]

    mine, value = compiled(ours, lora, base)
    other, want = compiled(hand, adapter.params, params)
    np.testing.assert_allclose(value, want, rtol=1e-5)  # float32 sums in another order
    assert collectives(other)  # else there is nothing to compare
    assert collectives(mine) == collectives(other)


@pytest.mark.parametrize("layout", [("8", "fsdp"), ("8", "tp"), ("4x2", "both")], ids="-".join)
def test_no_collective_that_hand_written_lora_lacks_on_an_explicit_mesh(layout: tuple[str, str]) -> None:
    """There every sum over axes that are cut says how its result lies: the layers say it, the adapter takes it over."""
    mesh = meshes.mesh_of(layout[0], AxisType.Explicit)
    batch = None if layout[1] == "tp" else mesh.axis_names[0]
    cut = meshes.names("up.kernel", *layout)[1]
    wide = {"q": PartitionSpec(batch, cut, None), "up": PartitionSpec(batch, cut)}
    said = {**wide, "o": PartitionSpec(batch, None), "down": PartitionSpec(batch, None)}

    def run(model: Any, x: jax.Array) -> jax.Array:
        x = x + model.o(jnp.tanh(model.q(x, out_sharding=said["q"])), out_sharding=said["o"])
        return x + model.down(jnp.tanh(model.up(x, out_sharding=said["up"])), out_sharding=said["down"])

    with jax.set_mesh(mesh):
        model = jaxadapt.adapt(meshes.Block(nnx.Rngs(0), layout), CONFIG, rngs=nnx.Rngs(1))
        jaxadapt.inject(model, jax.tree.map(lambda x: x + 1, jaxadapt.extract(model)))
        graphdef, lora, base = nnx.split(model, jaxadapt.AdapterParam, ...)
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec(batch, None)))

        def compiled(f: Any, *given: Any) -> tuple[Any, Any]:
            step = jax.jit(jax.value_and_grad(lambda lora, base, x: (f(lora, base, x) ** 2).sum()))
            made = step.lower(*given, x).compile()
            return made, jax.tree.leaves(made(*given, x))

        mine, found = compiled(lambda lora, base, x: run(nnx.merge(graphdef, lora, base), x), lora, base)
        params = nnx.to_pure_dict(nnx.state(meshes.Block(nnx.Rngs(0), layout)))
        other, want = compiled(
            lambda lora, base, x: by_hand(base, lora, x, said), jaxadapt.extract(model).params, params
        )
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
    assert collectives(other)
    assert collectives(mine) == collectives(other)


# ---------------------------------------------------------------- who holds which bytes


def test_boxes_cover_each_array_once() -> None:
    rng = np.random.default_rng(0)
    for name, (shape, axes, _) in meshes.MESHES.items():
        mesh = meshes.mesh_of(name)
        for spec in [(), (axes[0],), (None, axes[-1]), (axes, None), (axes[-1], axes[0] if len(axes) > 1 else None)]:
            found = regions.device_regions(NamedSharding(mesh, PartitionSpec(*spec)), (16, 24))
            count = np.zeros((16, 24), int)
            for box, devices in found.items():
                count[regions.to_slices(box)] += 1
                assert devices
            assert (count == 1).all()
            assert sum(len(devices) for devices in found.values()) == np.prod(shape)
            some = [box for box in found if rng.random() < 0.6]
            joined = regions.merge_neighbors(some)
            assert sorted(b for members in joined.values() for b in members) == sorted(some)
            for box, members in joined.items():
                assert regions.region_size(box) == sum(map(regions.region_size, members))
        assert list(
            regions.merge_neighbors(regions.device_regions(NamedSharding(mesh, PartitionSpec(axes, None)), (16, 24)))
        ) == [regions.full_region((16, 24))]


def test_pieces_of_a_box_are_its_part_of_each_tensor() -> None:
    """Against the plan's own whole-array encode: leaves stacked, fused, transposed, interleaved, scaled."""
    config = jaxadapt.LoraConfig(r=3, target_modules="all-linear")
    line = jaxadapt.Weight("kv", "{p}_proj.weight", "{p} n d h -> (n h) d", p=("k", "v"))
    pairs = jaxadapt.Weight("q", "q.weight", "d n (c p) -> (n p c) d", p=2, scale=("c", -0.5))
    lines = (line, pairs, *meshes.TABLE.scanned(1).weights)
    shapes = {"q": (6, 3, 4, 2), "up": (6, 3, 9)}
    blocks = {name: {"kernel": jax.ShapeDtypeStruct(shape, "f4")} for name, shape in shapes.items()}
    kv, q = jax.ShapeDtypeStruct((2, 4, 6, 5), "f4"), jax.ShapeDtypeStruct((6, 3, 12), "f4")
    base = {"kv": kv, "q": q, "blocks": blocks}
    adapter = jaxadapt.init(base, config, key=jax.random.key(1), keymap=jaxadapt.KeyMap("all", lines))
    tensors = jaxadapt.to_peft(adapter).tensors
    rng = np.random.default_rng(0)
    seen = 0
    for entry in tensors.plan.entries:
        leaf = rng.standard_normal(entry.shape)
        for _ in range(40):
            box = tuple(tuple(sorted(rng.choice(n + 1, 2, replace=False).tolist())) for n in entry.shape)
            part = leaf[regions.to_slices(box)]
            back = np.zeros_like(part)
            for piece in regions.file_regions(entry.form, box):
                whole = entry.form.encode(leaf, piece.number).reshape(piece.shape)
                tile = piece.encode(part[regions.relative_slices(piece.region, box)])
                np.testing.assert_array_equal(whole[regions.to_slices(piece.tensor_region)], tile)
                back[regions.relative_slices(piece.region, box)] += piece.decode(tile)
                seen += 1
            # each number is in one piece, and comes back (times a factor and divided by it: within rounding)
            np.testing.assert_allclose(back, part, rtol=0 if entry.form.is_exact else 1e-15)
    assert seen > 200
