"""Trees whose nodes are other libraries' own classes: lorax' weights, haliax' arrays, Flax' boxes.

Recorded with lorax 0.3.1 and Levanter 1.1 (haliax 1.3) on jax 0.4.30, the newest that both run on:
`jax.tree_util.tree_flatten_with_path` gives (DictKey("up"), DictKey("kernel"), "w"), … of `lorax.init_lora`, and
(GetAttrKey("lora"), GetAttrKey("lora_A"), GetAttrKey("weight"), FlattenedIndexKey(0)), … of a `LoraLinear`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import serialization
from jax.tree_util import GetAttrKey

import jaxadapt
from jaxadapt.models import LoraTree
from tests.models.foreign.cases import CASES, D, F, R, flat

TABLE = jaxadapt.KeyMap("case", (jaxadapt.Weight("{path}.kernel", "m.{path}.weight", "i o -> o i"),))


@dataclasses.dataclass
class LoraWeight:
    """As lorax registers it: children under bare strings, alpha among the static data."""

    w: Any
    a: Any
    b: Any
    alpha: float = 1.0


LoraWeight.__module__ = "lorax.transform"
jax.tree_util.register_pytree_with_keys(
    LoraWeight,
    lambda x: ([("w", x.w), ("a", x.a), ("b", x.b)], x.alpha),
    lambda alpha, children: LoraWeight(*children, alpha=alpha),
)


def lorax(seed: int = 0, alpha: float = 14.0) -> dict[str, Any]:
    rng = np.random.RandomState(seed)
    w, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((D, F), (R, F), (D, R)))
    return {"up": {"kernel": LoraWeight(w, a, b, alpha), "bias": np.zeros(F, np.float32)}}


def test_lorax(tmp_path):
    """alpha is in the weight itself; b is the input's side of a Flax kernel."""
    tree = lorax()
    jaxadapt.save(tree, tmp_path, keymap=TABLE)
    found = jaxadapt.read(tmp_path)
    assert (found.config.lora_alpha, found.config.r) == (14.0, R)
    node = tree["up"]["kernel"]
    np.testing.assert_array_equal(found.tensors["base_model.model.m.up.lora_A.weight"], node.b.T)
    np.testing.assert_array_equal(found.tensors["base_model.model.m.up.lora_B.weight"], node.a.T)
    back = jaxadapt.load(tmp_path, lorax(1, alpha=28.0), keymap=TABLE)
    new = back["up"]["kernel"]
    assert isinstance(new, LoraWeight)
    assert new.alpha == 28.0
    np.testing.assert_array_equal(new.b, node.b)
    np.testing.assert_array_equal(new.a, node.a / 2)  # the file's scale is half of the tree's
    np.testing.assert_array_equal(new.w, lorax(1)["up"]["kernel"].w)
    with pytest.raises(jaxadapt.ConfigError, match="lorax stores its alpha; leave it out"):
        jaxadapt.save(LoraTree(tree, lora_alpha=3), tmp_path, keymap=TABLE)


def test_a_checkpoint_is_not_restored_beside_another_alpha(tmp_path):
    """alpha is no leaf: the same arrays beside it would compute something else."""
    manager = jaxadapt.CheckpointManager(tmp_path)
    manager.save(1, lorax())
    np.testing.assert_array_equal(manager.restore(lorax(1)).model["up"]["kernel"].a, lorax()["up"]["kernel"].a)
    with pytest.raises(jaxadapt.MismatchError, match=r"up\.kernel: the alpha or scale 14 is saved, the target has 28"):
        manager.restore(lorax(1, alpha=28.0))


def test_lorax_weights_of_different_alphas():
    other = LoraWeight(np.zeros((F, D)), np.ones((R, D)), np.ones((F, R)), 3.0)
    tree = {**lorax(), "down": {"kernel": other}}
    config = jaxadapt.to_peft(tree, keymap=TABLE).config
    assert {config.lora_alpha, *config.alpha_pattern.values()} == {3.0, 14.0}
    assert len(config.alpha_pattern) == 1


class Fields:
    """A pytree class with named fields, as Equinox' modules are."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


jax.tree_util.register_pytree_with_keys(
    Fields,
    lambda x: ([(GetAttrKey(name), value) for name, value in vars(x).items()], tuple(vars(x))),
    lambda names, children: Fields(**dict(zip(names, children, strict=True))),
)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class NamedArray:
    """As haliax has it: the names of the axes are static, and the array is a child without a name."""

    array: Any
    axes: tuple[str, ...]

    def tree_flatten(self) -> Any:
        return (self.array,), self.axes

    @classmethod
    def tree_unflatten(cls, axes: Any, children: Any) -> Any:
        return cls(*children, axes)


def test_levanter(tmp_path):
    """An Equinox model with named arrays, a float among its leaves: filled without a change of its nodes."""
    (case,) = (c for c in CASES if str(c) == "levanter-q")

    def model(seed: int) -> Fields:
        leaves = flat(case.tree(seed))
        w, a, b = (NamedArray(leaves[path], ("x",)) for path, _ in (case.base, case.a, case.b))
        lora = Fields(lora_A=Fields(weight=a), lora_B=Fields(weight=b), dropout=Fields(inference=False))
        return Fields(q=Fields(wrapped=Fields(weight=w), lora=lora))

    jaxadapt.save(LoraTree(model(0), lora_alpha=14), tmp_path, keymap=case.table)
    plain = jaxadapt.to_peft(LoraTree(case.tree(0), lora_alpha=14), keymap=case.table)
    for key, x in jaxadapt.read(tmp_path).tensors.items():
        np.testing.assert_array_equal(x, plain.tensors[key])
    back: Any = jaxadapt.load(tmp_path, LoraTree(model(1), lora_alpha=14), keymap=case.table)
    assert back.q.lora.dropout.inference is False
    assert back.q.lora.lora_A.weight.axes == ("x",)
    np.testing.assert_array_equal(back.q.lora.lora_B.weight.array, flat(case.tree(0))[case.b[0]])


def test_boxes_are_opened_and_kept(tmp_path):
    """Qwix keeps the boxes of Linen's logical partitioning on what it adds."""

    def tree(seed: int) -> Any:
        rng = np.random.RandomState(seed)
        shapes = {"kernel": (D, F), "kernel_lora_a": (D, R), "kernel_lora_b": (R, F)}
        boxed = {
            name: nn.LogicallyPartitioned(rng.standard_normal(shape).astype(np.float32), ("x", "y"))
            for name, shape in shapes.items()
        }
        return {"params": {"up": boxed}, "cache": {"n": np.zeros(1)}}

    jaxadapt.save(LoraTree(tree(0), lora_alpha=14), tmp_path, keymap=TABLE)
    back = jaxadapt.load(tmp_path, LoraTree(tree(1), lora_alpha=14), keymap=TABLE)
    box = back["params"]["up"]["kernel_lora_a"]
    assert isinstance(box, nn.LogicallyPartitioned)
    assert box.names == ("x", "y")
    np.testing.assert_array_equal(box.unbox(), tree(0)["params"]["up"]["kernel_lora_a"].unbox())
    assert set(back) == {"params", "cache"}


def test_arrays_stay_on_their_devices(tmp_path):
    """New values go where the old ones were."""
    (case,) = (c for c in CASES if str(c) == "qwix-dense")
    jaxadapt.save(LoraTree(case.tree(), lora_alpha=14), tmp_path, keymap=case.table)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    other = case.tree(1)
    other["up"]["kernel_lora_a"] = jax.device_put(other["up"]["kernel_lora_a"], sharding)
    back = jaxadapt.load(tmp_path, LoraTree(other, lora_alpha=14), keymap=case.table)
    assert back["up"]["kernel_lora_a"].sharding == sharding
    spec = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), other)
    spec["up"]["kernel_lora_a"] = jax.ShapeDtypeStruct((D, R), np.float32, sharding=sharding)
    abstract = jaxadapt.load(tmp_path, LoraTree(spec, lora_alpha=14), keymap=case.table)
    assert abstract["up"]["kernel_lora_a"].sharding == sharding
    np.testing.assert_array_equal(abstract["up"]["kernel_lora_a"], flat(case.tree())[case.a[0]])
    assert isinstance(abstract["up"]["kernel"], jax.ShapeDtypeStruct)


def test_an_optimizers_moments_are_no_adapter(tmp_path):
    up = {
        "kernel": np.ones((D, F), "f4"),
        "kernel_lora_a": np.ones((D, R), "f4"),
        "kernel_lora_b": np.ones((R, F), "f4"),
    }
    moments = serialization.to_state_dict(optax.adam(1e-3).init({"up": up}))
    tree = {"model": {"up": up}, "opt_state": moments}
    found = jaxadapt.to_peft(LoraTree(tree, lora_alpha=4.0), keymap=TABLE)
    assert sorted(found.tensors) == [f"base_model.model.m.model.up.lora_{side}.weight" for side in "AB"]
    doubled = dataclasses.replace(found, tensors={key: 2 * x for key, x in found.tensors.items()})
    jaxadapt.write(doubled, tmp_path)
    back = jaxadapt.load(tmp_path, LoraTree(tree, lora_alpha=4.0), keymap=TABLE)
    np.testing.assert_array_equal(back["model"]["up"]["kernel_lora_b"], 2 * up["kernel_lora_b"])
    jax.tree.map(np.testing.assert_array_equal, back["opt_state"], moments)
