"""Linen variables carry the configuration; its loss is an error, which `config=` resolves."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.core import freeze, unfreeze
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export

import jaxadapt
from tests.support.twins import layers, layers_linen

KEY = jax.random.key(0)
CONFIG = jaxadapt.LoraConfig(r=2, lora_alpha=7, target_modules=["v_proj"])
KEYMAP = jaxadapt.KeyMap(
    "mine",
    (
        jaxadapt.Weight("attn.q_einsum.w", "attn.q_proj.weight", "n d h -> (n h) d"),
        jaxadapt.Weight("attn.kv_einsum.w", "attn.{p}_proj.weight", "{p} n d h -> (n h) d", p=("k", "v")),
        jaxadapt.Weight("attn.attn_vec_einsum.w", "attn.o_proj.weight", "n h d -> d (n h)"),
    ),
)
MODEL = jaxadapt.adapt(layers_linen.Held(lambda name: layers_linen.Attention(name=name), "attn"), CONFIG, keymap=KEYMAP)


@pytest.fixture(scope="module")
def variables() -> Any:
    made = MODEL.init(KEY, layers.x())
    return {**made, "lora": jax.tree.map(lambda a: a + 0.1, made["lora"])}


def updated(variables: Any) -> Any:
    tx = optax.adamw(1e-3)
    state = tx.init(variables["lora"])

    @jax.jit
    def step(lora: Any, state: Any) -> Any:
        grads = jax.grad(lambda lora: MODEL.apply({**variables, "lora": lora}, layers.x()).sum())(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state

    for _ in range(2):
        lora, state = step(variables["lora"], state)
    return {**variables, "lora": lora}


def train_state(variables: Any) -> Any:
    state = TrainState.create(apply_fn=MODEL.apply, params=variables["lora"], tx=optax.adam(1e-3))
    state = state.apply_gradients(grads=state.params)
    return {"lora": state.params}


KEEPS: dict[str, Callable[[Any], Any]] = {
    "jit": jax.jit(lambda v: v),
    "tree_map": lambda v: jax.tree.map(lambda a: a * 1, v),
    "eval_shape": lambda v: jax.eval_shape(lambda v: v, v),
    "grad": lambda v: jax.grad(lambda v: MODEL.apply(v, layers.x()).sum())(v),
    "vmap": lambda v: jax.tree.map(lambda a: a[0], jax.vmap(lambda _: v)(jnp.arange(2))),
    "optax": updated,
    "train_state": train_state,
    "mutable": lambda v: MODEL.apply(v, layers.x(), mutable=True)[1],
    "freeze": freeze,
    "unfreeze": lambda v: unfreeze(freeze(v)),
    "flatten_dict": lambda v: unflatten_dict(flatten_dict(v)),
    "flatten_dict_sep": lambda v: unflatten_dict(flatten_dict(v, sep="/"), sep="/"),
    "dict": lambda v: {k: dict(t) for k, t in v.items()},
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda v: pickle.loads(pickle.dumps(jax.tree.map(np.asarray, v))),
    "state_dict": serialization.to_state_dict,
    "from_state_dict": lambda v: serialization.from_state_dict(v, serialization.to_state_dict(v)),
    "from_bytes": lambda v: serialization.from_bytes(v, serialization.to_bytes(v)),
    "msgpack_restore": lambda v: serialization.msgpack_restore(serialization.to_bytes(v)),
    "replicate": lambda v: jax.device_put(v, jax.devices()[0]),
    "unbox": nn.meta.unbox,
    "collection": lambda v: v["lora"],
    "one_name": lambda v: v["lora"]["default"],
}


def orbax_v0(variables: Any, target: Any, where: Path) -> Any:
    with ocp.PyTreeCheckpointer() as saver:
        saver.save(where / "v0", variables)
        if target is None:
            return saver.restore(where / "v0")
        return saver.restore(where / "v0", item=target)


def orbax_standard(variables: Any, target: Any, where: Path) -> Any:
    with ocp.StandardCheckpointer() as saver:
        saver.save(where / "standard", variables)
        saver.wait_until_finished()
        return saver.restore(where / "standard", target)


def orbax_v1(variables: Any, target: Any, where: Path) -> Any:
    try:
        from orbax.checkpoint import v1
    except ImportError:
        from orbax.checkpoint.experimental import v1
    v1.save_pytree(where / "v1", variables)
    return v1.load_pytree(where / "v1", target) if target is not None else v1.load_pytree(where / "v1")


def same(a: jaxadapt.Adapter, b: jaxadapt.Adapter) -> None:
    assert a.config == b.config
    assert a.config.to_dict() == b.config.to_dict()
    assert a.keymap == b.keymap
    assert {p: x.shape for p, x in a.flat().items()} == {p: x.shape for p, x in b.flat().items()}


@pytest.mark.parametrize("how", KEEPS)
def test_kept(how: str, variables: Any):
    after = KEEPS[how](variables)
    adapter = jaxadapt.extract(after)
    same(adapter, jaxadapt.extract(variables))
    if how not in (
        "grad",
        "eval_shape",
        "collection",
        "one_name",
        "train_state",
        "msgpack_restore",
        "state_dict",
    ):
        want = MODEL.apply({**variables, "lora": after["lora"]}, layers.x())
        np.testing.assert_array_equal(MODEL.apply(after, layers.x()), want)


@pytest.mark.filterwarnings("ignore:Sharding info not provided", "ignore:Use `(save|load)` instead")
@pytest.mark.parametrize("save", [orbax_v0, orbax_standard, orbax_v1])
@pytest.mark.parametrize("targeted", [True, False], ids=["target", "bare"])
def test_orbax(save: Any, targeted: bool, variables: Any, tmp_path: Path):
    """A restore with a target returns everything, one without a target only the arrays, which need `config=`."""
    target = jax.eval_shape(lambda v: v, variables) if targeted else None
    after = save(variables, target, tmp_path)
    wanted = jaxadapt.extract(variables)
    if targeted:
        same(jaxadapt.extract(after), wanted)
    else:
        with pytest.raises(jaxadapt.AttachError, match="config="):
            jaxadapt.extract(after)
    again = jaxadapt.extract(jaxadapt.models.LoraTree(after, config=CONFIG), keymap=KEYMAP)
    same(again, wanted)
    for path, value in wanted.flat().items():
        np.testing.assert_array_equal(again.flat()[path], value)


@pytest.mark.parametrize(
    "lose",
    [
        lambda v: {
            **v,
            "lora": {"default": {k: t for k, t in v["lora"]["default"].items() if k != "~config"}},
        },
        lambda v: {"lora": unflatten_dict({k: a for k, a in flatten_dict(v["lora"]).items() if k[-1] != "~config"})},
        lambda v: {k: t for k, t in v["lora"]["default"].items() if k != "~config"},
        lambda v: {"lora": {"default": {**v["lora"]["default"], "~config": None}}},
    ],
    ids=["dropped", "flat", "bare", "none"],
)
def test_lost_and_given_again(lose: Any, variables: Any):
    after = lose(variables)
    with pytest.raises(jaxadapt.AttachError, match="config="):
        jaxadapt.extract(after)
    if "lora" in after and "params" in after:
        with pytest.raises(jaxadapt.AttachError, match="config=") as caught:
            MODEL.apply(after, layers.x())
        again = str(caught.value).rpartition(": ")[2].replace("config=config)", "config=config), keymap=keymap")
        names = {
            "variables": after,
            "extract": jaxadapt.extract,
            "LoraTree": jaxadapt.models.LoraTree,
            "config": CONFIG,
            "keymap": KEYMAP,
        }
        restored = eval(again, names)  # noqa: S307 - the way out that the message shows
        np.testing.assert_array_equal(MODEL.apply(restored, layers.x()), MODEL.apply(variables, layers.x()))
    same(jaxadapt.extract(jaxadapt.models.LoraTree(after, config=CONFIG), keymap=KEYMAP), jaxadapt.extract(variables))


def test_moments_are_no_adapter(variables: Any):
    """From the tree of a training state without its configuration, only the adapter is read."""
    held = {"default": {k: t for k, t in variables["lora"]["default"].items() if k != "~config"}}
    moments = serialization.to_state_dict(optax.adam(1e-3).init({"lora": held}))
    tree = {"params": variables["params"], "lora": held, "opt_state": moments}
    same(jaxadapt.extract(jaxadapt.models.LoraTree(tree, config=CONFIG), keymap=KEYMAP), jaxadapt.extract(variables))


def test_two_methods_under_one_name_are_told(variables: Any):
    ia3 = jaxadapt.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    other = jaxadapt.init(variables["params"], ia3, key=KEY, keymap=KEYMAP)
    with pytest.raises(jaxadapt.AttachError, match="several adapters have the name 'default' here, in ia3 and lora"):
        jaxadapt.extract({**variables, **other.collection})
    both = {**variables, **other.named("other")}
    assert [jaxadapt.extract(both, name=n).config.peft_type for n in ("default", "other")] == ["LORA", "IA3"]


def test_another_configuration_leaves_the_table(variables: Any):
    more = CONFIG.replace(task_type="CAUSAL_LM")
    assert jaxadapt.extract(jaxadapt.models.LoraTree(variables, config=more)).config.task_type == "CAUSAL_LM"
    tensors = jaxadapt.to_peft(jaxadapt.models.LoraTree(variables, config=more)).tensors
    assert sorted(tensors) == [f"base_model.model.attn.v_proj.lora_{side}.weight" for side in "AB"]


def test_export(variables: Any):
    """An exported step takes and returns trees with the configuration in them."""

    @jax.jit
    def step(lora: Any) -> Any:
        return jax.tree.map(lambda a: a * 2, lora)

    out = export.export(step)(variables["lora"]).call(variables["lora"])
    same(jaxadapt.extract(out), jaxadapt.extract(variables))


def test_equal_configurations_do_not_retrace(variables: Any):
    traces = []

    @jax.jit
    def f(v: Any) -> Any:
        traces.append(1)
        return MODEL.apply(v, layers.x())

    f(variables)
    f(serialization.from_bytes(variables, serialization.to_bytes(variables)))
    base = jaxadapt.extract(variables)
    other = jaxadapt.Adapter(base.config.replace(inference_mode=True), base.params, base.keymap)
    f({**variables, **other.collection})
    assert len(traces) == 1
