"""Linen's boxes (`nn.Partitioned`, logical axes) and frozen dicts: results keep the structure of the input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from jax.sharding import NamedSharding, PartitionSpec

import jaxadapt
from tests.support import meshes
from tests.support.meshes import X

CONFIG = meshes.CONFIG.replace(target_modules=["up", "down"], init_lora_weights=False)
LAYOUT = ("4x2", "both")
TX = optax.adam(1e-2)
KEY = jax.random.key(0)
BOXES = pytest.mark.parametrize("logical", [False, True])


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)


def equal(a: Any, b: Any) -> None:
    same(a, b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def made(logical: bool) -> tuple[Any, Any]:
    """Return an adapted module and its boxed variables."""
    module = jaxadapt.adapt(meshes.LinenBlock(LAYOUT, logical), CONFIG)
    return module, module.init(KEY, X)


def without_boxes(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: x.value if isinstance(x, nn.Partitioned) else x, tree, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )


def by_itself(logical: bool, seed: int = 1) -> Any:
    """Return variables with an adapter from `jaxadapt.init`, as in a loop with its own module (MaxText)."""
    params = meshes.LinenBlock(LAYOUT, logical).init(KEY, X)["params"]
    return {"params": params, **jaxadapt.init(params, CONFIG, key=jax.random.key(seed)).collection}


def step(module: Any, variables: Any, state: Any) -> tuple[Any, Any]:
    def loss(lora: Any) -> jax.Array:
        return jnp.mean(module.apply({**variables, "lora": lora}, X) ** 2)

    updates, state = TX.update(jax.grad(loss)(variables["lora"]), state, variables["lora"])
    return {**variables, "lora": optax.apply_updates(variables["lora"], updates)}, state


@BOXES
def test_every_way_to_a_collection_gives_the_same_structure(logical: bool, tmp_path: Path):
    module, variables = made(logical)
    params = variables["params"]
    jaxadapt.save(variables, tmp_path)
    tensors = jaxadapt.read(tmp_path)
    up = variables["lora"]["default"]["up"]["kernel"]["lora_A"]
    assert isinstance(up, nn.LogicallyPartitioned if logical else nn.Partitioned)
    for collection in (
        jaxadapt.init(params, CONFIG, key=KEY).collection,
        jaxadapt.load(tmp_path, {"params": params}),
        jaxadapt.from_peft(tensors, params).collection,
        jaxadapt.extract(variables).collection,
        jaxadapt.initializers.start(params, CONFIG, key=KEY).adapter.collection,
    ):
        # The keymaps differ, because `adapt` sees the module's calls. The trees that optax walks over are equal.
        mine, theirs = ({k: x for k, x in held["lora"]["default"].items() if k != "~config"}
                        for held in (collection, variables))  # fmt: skip
        same(mine, theirs)
        same(nn.get_partition_spec(mine), nn.get_partition_spec(theirs))
    equal(jaxadapt.extract(variables).params, jaxadapt.from_peft(tensors, params).params)
    shapes = jax.eval_shape(module.init, KEY, X)
    same(shapes, variables)
    same(jaxadapt.init(shapes["params"], CONFIG).params, jaxadapt.extract(variables).params)
    same(jax.jit(lambda p: jaxadapt.init(p, CONFIG, key=KEY))(params), jaxadapt.init(params, CONFIG, key=KEY))


@BOXES
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("boxed", [False, True])
def test_inject_and_load_keep_the_structure(logical: bool, frozen: bool, boxed: bool, tmp_path: Path):
    variables: Any = made(logical)[1]
    if not boxed:
        variables = {**variables, "lora": without_boxes(variables["lora"])}
    variables = freeze(variables) if frozen else variables
    adapter = jaxadapt.extract(variables)
    equal(jaxadapt.inject(variables, adapter), variables)
    equal(jaxadapt.inject(variables["lora"], adapter), variables["lora"])  # a collection, and one adapter's tree
    equal(jaxadapt.inject(variables["lora"]["default"], adapter), variables["lora"]["default"])
    equal(jaxadapt.inject(adapter, adapter), adapter)
    jaxadapt.save(variables, tmp_path)
    equal(jaxadapt.load(tmp_path, variables), variables)
    twice = jax.tree.map(lambda x: 2 * x, adapter)
    for other in (twice, jaxadapt.Adapter(CONFIG, without_boxes(twice.params), adapter.keymap)):  # boxed or not
        new = jaxadapt.inject(variables, other)
        same(new, variables)
        equal(new["lora"], jax.tree.map(lambda x: 2 * x, variables["lora"]))
    both = jaxadapt.load(tmp_path, variables, name="other")  # beside it, boxed like the base
    assert type(both) is type(variables)
    equal(both["lora"]["default"], variables["lora"]["default"])
    same(nn.unbox(both["lora"]["other"]), nn.unbox(variables["lora"]["default"]))
    assert isinstance(both["lora"]["other"]["up"]["kernel"]["lora_A"], nn.Partitioned)
    abstract = jax.eval_shape(lambda: variables)
    same(jaxadapt.inject(abstract, adapter), variables)


def test_a_file_that_says_more_of_itself_is_believed(tmp_path: Path):
    variables = made(False)[1]
    adapter = jaxadapt.extract(variables)
    told = jaxadapt.Adapter(adapter.config.replace(base_model_name_or_path="org/base"), adapter.params, adapter.keymap)
    jaxadapt.save(told, tmp_path)
    loaded = jaxadapt.load(tmp_path, variables)
    assert jaxadapt.extract(loaded).config.base_model_name_or_path == "org/base"
    same(jaxadapt.extract(loaded).params, adapter.params)


@BOXES
@pytest.mark.parametrize("make", [by_itself, lambda logical, seed=0: made(logical)[1]])
def test_a_run_is_resumed_in_boxes(logical: bool, make: Any, tmp_path: Path):
    """Six steps equal three steps, a restore as in a new process, and three more."""
    module = made(logical)[0]
    variables = make(logical)
    state = TX.init(variables["lora"])
    for _ in range(3):
        variables, state = step(module, variables, state)
    with jaxadapt.CheckpointManager(tmp_path) as manager:
        manager.save(3, variables, opt_state=state)
    straight = variables, state
    for _ in range(3):
        straight = step(module, *straight)

    fresh = make(logical, seed=5)
    with jaxadapt.CheckpointManager(tmp_path) as manager:
        back = manager.restore(fresh, opt_state=TX.init(fresh["lora"]))
    equal((back.model, back.opt_state), (variables, state))
    resumed = back.model, back.opt_state
    for _ in range(3):
        resumed = step(module, *resumed)
    equal(resumed, straight)


def test_a_plain_collection_beside_boxes_is_resumed_plain(tmp_path: Path):
    module, variables = made(True)
    variables = freeze({**variables, "lora": without_boxes(variables["lora"])})
    state = TX.init(variables["lora"])
    with jaxadapt.CheckpointManager(tmp_path) as manager:
        manager.save(1, variables, opt_state=state)
        back = manager.restore(variables, opt_state=state)
        equal((back.model, back.opt_state), (variables, state))
        adapter = jaxadapt.extract(made(True)[1])
        equal(manager.restore(adapter, opt_state=state).model, adapter)
    del module


@BOXES
def test_what_is_computed_does_not_depend_on_boxes(logical: bool):
    module, variables = made(logical)
    adapter = jaxadapt.extract(variables)
    plain = jaxadapt.Adapter(adapter.config, without_boxes(adapter.params), adapter.keymap)
    assert adapter.shapes == plain.shapes
    merged = jaxadapt.merge(variables["params"], adapter)
    equal(merged, jaxadapt.merge(variables["params"], plain))
    same(merged, variables["params"])
    np.testing.assert_allclose(
        module.module.apply({"params": merged}, X), module.apply(variables, X), rtol=1e-5, atol=1e-5
    )
    # Merging rounds once, in float32, and so does unmerging.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
                 jaxadapt.unmerge(merged, adapter), variables["params"])  # fmt: skip
    equal(jaxadapt.to_peft(adapter).tensors, jaxadapt.to_peft(plain).tensors)
    with jaxadapt.models.rescale(adapter, 2.0) as double:
        same(double, adapter)
    assert str(jaxadapt.summary(variables)) == str(jaxadapt.summary({**variables, **plain.collection}))


@BOXES
def test_a_run_on_a_mesh_is_resumed_where_it_was(logical: bool, tmp_path: Path):
    mesh, rules = meshes.mesh_of("4x2"), (("F", "fsdp"), ("T", "tp"))
    module = jaxadapt.adapt(meshes.LinenBlock(LAYOUT, logical), CONFIG)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):

        def begin(key: jax.Array) -> Any:
            variables = module.init(key, X)
            return variables, TX.init(variables["lora"])

        spec = nn.get_partition_spec(jax.eval_shape(begin, KEY))
        where = nn.logical_to_mesh_sharding(spec, mesh, rules) if logical else jax.tree.map(
            lambda s: NamedSharding(mesh, s), spec, is_leaf=lambda s: isinstance(s, PartitionSpec)
        )  # fmt: skip
        variables, state = jax.jit(begin, out_shardings=where)(KEY)
        run = jax.jit(lambda v, s: step(module, v, s))
        variables, state = run(variables, state)
        with jaxadapt.CheckpointManager(tmp_path) as manager:
            manager.save(1, variables, opt_state=state)
            fresh = jax.jit(begin, out_shardings=where)(jax.random.key(9))
            back = manager.restore({**fresh[0], "params": variables["params"]}, opt_state=fresh[1])
        equal((back.model, back.opt_state), (variables, state))
        a = back.model["lora"]["default"]["up"]["kernel"]["lora_A"]
        assert a.value.sharding.spec == PartitionSpec(None, "fsdp")
        equal(run(back.model, back.opt_state), run(variables, state))
