"""The walk over NNX models lists what Flax lists: the leaves of `nnx.state`, and the objects of `nnx.iter_graph`."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import graphlib
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxadapt
from jaxadapt.demo import llama
from jaxadapt.models import graph
from tests.keymaps.families import jax_side, specimen_arrays
from tests.keymaps.families.specimens import BY_NAME
from tests.support import small

Pair = collections.namedtuple("Pair", ["left", "right"])


class Plain(nnx.Module):
    """A module whose attributes are given."""

    def __init__(self, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(self, name, value)


class NoPytree(Plain, pytree=False):
    """A module of the older kind: no attribute is marked, each value decides."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    """A container that only JAX knows, and whose order of fields is not that of their names."""

    weight: Any
    bias: Any


def check(model: Any) -> None:
    """Compare with `nnx.state` by path and identity, and with `nnx.iter_graph` by order, too."""
    ours = graph.walk(model)
    flat = graphlib.flatten(model, graph=True)[1]
    same([(path, x) for path, x in ours if not is_node(x)], list(zip(flat.paths, flat.leaves, strict=True)))
    assert {path for path, x in ours if not is_node(x)} == {p for p, _ in nnx.to_flat_state(nnx.state(model))}
    flax = [(path, x) for path, x in nnx.iter_graph(model) if is_node(x) or isinstance(x, nnx.Variable)]
    same([(path, x) for path, x in ours if is_node(x) or isinstance(x, nnx.Variable)], flax)


def is_node(x: Any) -> bool:
    return isinstance(graphlib.get_node_impl(x), graphlib.GraphNodeImpl)


def same(ours: list[tuple[Any, Any]], flax: list[tuple[Any, Any]]) -> None:
    assert [path for path, _ in ours] == [path for path, _ in flax]
    assert all(a is b for (_, a), (_, b) in zip(ours, flax, strict=True))


def atoms() -> list[Any]:
    """Values without contents: variables of several kinds, arrays, and what is static."""
    return [
        nnx.Param(jnp.ones(2)), nnx.BatchStat(jnp.zeros(3)), nnx.Param(jnp.ones(1), ref=True),
        nnx.Variable({"a": jnp.ones(1), "b": [1]}), nnx.Param(np.float32(1)), jnp.ones(1), np.ones(2),
        jax.new_ref(jnp.ones(1)), 3, 2.5, "text", None, jnp.float32, jnp.tanh,
    ]  # fmt: skip


def build(kind: str, named: dict[str, Any]) -> Any:
    """A container or a module with these parts; each marked as data where Flax has them marked."""
    parts = list(named.values())
    data = {f"x{name}": nnx.data(part) for name, part in named.items()}
    if kind in ("Pair", "Registered"):
        return {"Pair": Pair, "Registered": Registered}[kind](*[*parts, None, None][:2])
    if kind == "List":
        return nnx.List([nnx.data(part) for part in parts])
    if kind in ("Plain", "Dict"):
        return {"Plain": Plain, "Dict": nnx.Dict}[kind](**data)
    if kind == "NoPytree":
        return NoPytree(**{f"x{name}": part for name, part in named.items()})
    return {"list": parts, "tuple": tuple(parts), "dict": named}[kind]


KINDS = ("list", "tuple", "dict", "Pair", "Registered", "List", "Plain", "Dict", "NoPytree")


@st.composite
def models(draw: st.DrawFn) -> Any:
    """A module over objects that share parts, each built of earlier ones."""
    pool = atoms()
    for kind in draw(st.lists(st.sampled_from(KINDS), max_size=12)):
        parts = draw(st.lists(st.sampled_from(pool), max_size=4))
        pool.append(build(kind, dict(zip(draw(st.permutations(["b", "a", "10", "9"])), parts, strict=False))))
    chosen = draw(st.lists(st.sampled_from(pool), max_size=8)) + pool[-2:]
    root = Plain(static=("text", 1), **{f"y{i}": nnx.data(x) for i, x in enumerate(chosen)})
    for module in [x for x in pool if isinstance(x, Plain)][: draw(st.integers(0, 2))]:
        module.root = root  # a cycle
    return root


@given(models())
@settings(max_examples=150, deadline=None)
def test_any_model_has_flax_paths_in_flax_order(model):
    check(model)


def real_models() -> dict[str, Any]:
    config = llama.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=12, num_heads=2, num_kv_heads=1, head_dim=4,
        rope_theta=1e4, max_position_embeddings=8,
    )  # fmt: skip
    return {
        "demo": lambda: llama.Llama(config, rngs=nnx.Rngs(0)),
        "demo, scanned": lambda: llama.Llama(dataclasses.replace(config, scan=True), rngs=nnx.Rngs(0)),
        "dropout and batch norm": lambda: nnx.Sequential(
            nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)), jnp.tanh,
            nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(2)),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", real_models())
def test_models_of_flax_layers(name):
    model = real_models()[name]()
    check(model)
    check(nnx.state(model))
    check(nnx.eval_shape(real_models()[name]))


@pytest.mark.usefixtures("foreign_model")
@pytest.mark.parametrize("name", ["mixtral", "tunix-qwen3-tied"])
def test_models_of_other_libraries(name):
    if name.startswith("tunix"):
        pytest.importorskip("tunix")  # of the extra `test`, which the core tests do without
    side = jax_side.side(BY_NAME[name])
    model = side.make(specimen_arrays.base_leaves(BY_NAME[name], side.shapes))
    assert isinstance(model, nnx.Module)
    check(model)


def test_a_linen_module_inside():
    check(Plain(b=nnx.Linear(2, 2, rngs=nnx.Rngs(0)), a=bridged()))


def bridged() -> Any:
    return nnx.bridge.lazy_init(nnx.bridge.ToNNX(flax.linen.Dense(3), rngs=nnx.Rngs(0)), jnp.ones((1, 2)))


def test_adapted_models_and_the_states_of_transforms():
    model = jaxadapt.adapt(small.net(), small.LORA.replace(lora_dropout=0.1), rngs=nnx.Rngs(1))
    model = jaxadapt.adapt(model, small.IA3, name="other", rngs=nnx.Rngs(2))
    check(model)
    seen = [graph.walk(model)]

    @nnx.jit
    def traced(model: Any, x: Any) -> Any:
        check(model)
        check(Plain(array=x, again=x, list=nnx.data([x, 1])))
        return model(x)

    traced(model, jnp.ones((1, 6)))
    check(nnx.grad(lambda m: m(small.X).sum(), argnums=nnx.DiffState(0, jaxadapt.AdapterParam))(model))
    same(graph.walk(model), seen[0])


def test_hijax_variables():
    with nnx.var_defaults(hijax=True):
        model = Plain(b=nnx.Param(jnp.ones(2)), a=nnx.List([nnx.Param(jnp.ones(1))]))
        check(model)
        jax.jit(lambda: check(Plain(b=nnx.Param(jnp.ones(2)), a=nnx.data([jnp.ones(1)]))))()
    assert [path for path, _ in graph.walk(model)] == [("a", 0), ("a",), ("b",), ()]
