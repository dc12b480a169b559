"""The Linen wrapper: init, apply and bind with their options, names, training, and refusals."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze, unfreeze

import jaxadapt
from jaxadapt.core import paths
from jaxadapt.demo import llama
from jaxadapt.demo.llama import LlamaConfig
from tests.support.twins import layers

KEY = jax.random.key(0)
LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4
)


def lora(*targets: str, **changes: Any) -> Any:
    return jaxadapt.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": list(targets), **changes})


def ia3(*targets: str) -> Any:
    return jaxadapt.IA3Config(target_modules=list(targets), feedforward_modules=[])


def trained(variables: Any, by: float = 0.3) -> Any:
    """Return the same variables with adapter values that have an effect."""
    return {
        c: jax.tree.map(lambda x: np.asarray(x) + by * np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape), tree)
        if c in ("lora", "ia3")
        else tree
        for c, tree in variables.items()
    }


def merged(variables: Any, *names: str) -> Any:
    params = variables["params"]
    for name in names or ("default",):
        params = jaxadapt.merge(params, jaxadapt.extract(variables, name=name))
    return {**{c: t for c, t in variables.items() if c not in ("lora", "ia3")}, "params": params}


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def quick(model: Any, variables: Any, *inputs: Any) -> Any:
    return jax.jit(model.apply, compiler_options=QUICK)(variables, *inputs)


def close(a: Any, b: Any, tol: float = 1e-5) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tol, atol=tol), a, b)


class Net(nn.Module):
    """Layers from `setup`, also in a list and a dict, and a second method."""

    dropout: float = 0.0

    def setup(self) -> None:
        self.q = nn.Dense(8)
        self.layers = [nn.Dense(8), nn.Dense(8)]
        self.heads = {"a": nn.Dense(4)}
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = jnp.tanh(self.encode(x))
        for layer in self.layers:
            x = self.drop(layer(x), deterministic=not train)
        return self.heads["a"](x)

    def encode(self, x: jax.Array) -> jax.Array:
        return self.q(x)


class Cached(nn.Module):
    """A custom leaf module that counts its calls, sums into a cache and has its own dropout."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        w = self.param("w", nn.initializers.normal(0.3), (8, 8))
        total = self.variable("cache", "total", jnp.zeros, (8,))
        if not self.is_initializing():
            total.value = total.value + x.sum((0, 1))
        y = nn.Dropout(0.5, name="drop")(jnp.einsum("bti,io->bto", x, w), deterministic=not train)
        self.sow("intermediates", "y", y)
        return y + total.value[None, None]


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(2):
            x = Cached(name=f"c{i}")(x, train=self.has_rng("dropout"))
        return x


ALL = ("q", "layers_0", "layers_1", "heads_a")


@pytest.fixture(scope="module")
def net() -> tuple[Any, Any, Any]:
    model, x = jaxadapt.adapt(Net(), lora(*ALL)), layers.x()
    return model, trained(model.init(KEY, x)), x


# ---------------------------------------------------------------- init


def test_init_takes_a_key_or_a_mapping(net):
    model, _, x = net
    one, other = model.init(KEY, x), model.init({"params": KEY}, x)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    mine = model.init({"params": KEY, "lora": jax.random.key(4)}, x)
    jax.tree.map(np.testing.assert_array_equal, one["params"], mine["params"])
    assert (mine["lora"]["default"]["q"]["kernel"]["lora_A"] != one["lora"]["default"]["q"]["kernel"]["lora_A"]).any()


def test_init_options_of_flax_work(net):
    model, _, x = net
    y, variables = model.init_with_output(KEY, x)
    np.testing.assert_array_equal(y, model.module.init_with_output(KEY, x)[0])
    assert set(variables) == {"params", "lora"}
    encoder = jaxadapt.adapt(Net(), lora("q"))
    assert set(encoder.init(KEY, x, method="encode")["params"]) == {"q"}
    assert set(encoder.init(KEY, x, method=Net.encode, mutable=True)["params"]) == {"q"}
    assert "intermediates" in model.init(KEY, x, capture_intermediates=True, mutable=True)


def test_collection_of_the_modules_own(net):
    class Taken(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3, name="q")(x) + self.variable("lora", "mine", jnp.zeros, (3,)).value[None, None]

    with pytest.raises(jaxadapt.AttachError, match="'lora'.*of its own"):
        jaxadapt.adapt(Taken(), lora("q")).init(KEY, layers.x())


# ---------------------------------------------------------------- apply


def test_methods_by_name_and_by_function(net):
    model, variables, x = net
    want = model.module.apply(merged(variables), x, method="encode")
    close(model.apply(variables, x, method="encode"), want)
    close(model.apply(variables, x, method=Net.encode), want)
    close(model.apply(variables, x, method=lambda m, x: m.encode(x) * 2), want * 2)


def test_frozen_variables(net):
    model, variables, x = net
    close(model.apply(freeze(variables), x), model.apply(variables, x))
    _, changed = model.apply(freeze(variables), x, mutable=["lora"])
    assert jax.tree.structure(changed["lora"]) == jax.tree.structure(freeze(variables)["lora"])


@pytest.mark.parametrize("mapping", [types.MappingProxyType, collections.UserDict])
def test_parameters_may_be_any_mappings(mapping: Any):
    """Flax calls a module with them, so the wrapper does."""
    x = jnp.ones((1, 4))
    model = jaxadapt.adapt(nn.Sequential([nn.Dense(4)]), lora("layers_0", init_lora_weights=False))
    variables = model.init(KEY, x)
    params = {name: mapping(leaves) for name, leaves in variables["params"].items()}
    for given in (params, mapping(params)):
        close(model.apply({**variables, "params": given}, x), model.apply(variables, x))


def test_parameters_in_other_mappings_are_not_printed_at_each_call():
    class Unprintable(collections.UserDict[str, Any]):
        def __repr__(self) -> str:
            raise AssertionError("printed")

    x = jnp.ones((1, 4))
    model = jaxadapt.adapt(nn.Sequential([nn.Dense(4)]), lora("layers_0", init_lora_weights=False))
    variables = model.init(KEY, x)
    params = {name: Unprintable(leaves) for name, leaves in variables["params"].items()}
    close(model.apply({**variables, "params": params}, x), model.apply(variables, x))
    assert len(model._checked) == 1, "the same call as with dicts"


def test_an_argument_may_be_hashable_by_its_type_only():
    @dataclasses.dataclass(frozen=True)
    class Options:
        factors: list[float]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any, options: Options) -> Any:
            return nn.Dense(4, name="lin")(x) * options.factors[0]

    x, options = jnp.ones((1, 4)), Options([2.0])
    model = jaxadapt.adapt(Net(), lora("lin"))
    variables = model.init(KEY, x, options)
    close(model.apply(variables, x, options), model.module.apply({"params": variables["params"]}, x, options))
    model.apply(variables, x, Options([3.0]))
    assert len(model._checked) == 2, "other arguments, another call"


def test_transforms(net):
    model, variables, x = net
    y = model.apply(variables, x)
    close(jax.jit(model.apply)(variables, x), y)
    close(jax.vmap(model.apply, (None, 0))(variables, x), y)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a * 2]), variables["lora"])
    many = jax.vmap(lambda lora: model.apply({**variables, "lora": lora}, x))(stacked)
    close(many[0], y)
    assert abs(many[1] - y).max() > 1e-3
    grads = jax.grad(lambda x: jax.checkpoint(model.apply)(variables, x).sum())(x)
    close(grads, jax.grad(lambda x: model.module.apply(merged(variables), x).sum())(x))


def test_mutable_keeps_adapters_and_hides_the_overlay():
    case = next(c for c in layers.LINEN if c.name == "batchnorm")
    model = jaxadapt.adapt(case.make(), lora("lin"))
    variables = trained(model.init(KEY, *case.inputs()))
    y, changed = model.apply(variables, *case.inputs(), mutable=["batch_stats"])
    want, reference = model.module.apply(merged(variables), *case.inputs(), mutable=["batch_stats"])
    close((y, changed), (want, reference))
    assert set(changed) == {"batch_stats"}
    _, everything = model.apply(variables, *case.inputs(), mutable=True)
    assert jax.tree.structure(everything) == jax.tree.structure(variables)
    assert jaxadapt.extract(everything).config == jaxadapt.extract(variables).config
    jax.tree.map(np.testing.assert_array_equal, everything["lora"], variables["lora"])


def test_mutable_filters(net):
    model, variables, x = net
    _, changed = model.apply(variables, x, mutable="params")
    assert jax.tree.structure(changed) == jax.tree.structure({"params": variables["params"]})
    assert set(model.apply(variables, x, mutable=nn.module.DenyList("params"))[1]) == {"lora"}
    assert model.apply(variables, x, mutable=nn.module.DenyList(True))[1] == {}


def test_boxes_stay():
    case = next(c for c in layers.LINEN if c.name == "partitioned")
    model = jaxadapt.adapt(case.make(), lora("layer"))
    variables = trained(model.init(KEY, *case.inputs()))
    y, changed = model.apply(variables, *case.inputs(), mutable=True)
    assert isinstance(changed["params"]["layer"]["kernel"], nn.Partitioned)
    close(y, model.module.apply(merged(nn.meta.unbox(variables)), *case.inputs()))


def test_cache_intermediates_and_random_numbers_of_a_custom_layer():
    """A traced layer still writes its collections, and draws the same random numbers."""
    model, x = jaxadapt.adapt(Cell(), lora("c0", "c1")), layers.x()
    variables, rngs = model.init(KEY, x), {"dropout": jax.random.key(3)}
    mutable = ["cache", "intermediates"]
    base = {c: t for c, t in variables.items() if c != "lora"}
    plain, fresh = (m.apply(v, x, rngs=rngs, mutable=mutable) for m, v in ((model.module, base), (model, variables)))
    assert jax.tree.structure(plain) == jax.tree.structure(fresh)
    jax.tree.map(np.testing.assert_array_equal, plain, fresh)
    variables = trained(variables)
    for _ in range(2):
        y, changed = model.apply(variables, x, rngs=rngs, mutable=mutable)
        close((y, changed), model.module.apply(merged(variables), x, rngs=rngs, mutable=mutable))
        variables = {**variables, "cache": changed["cache"]}
    assert abs(changed["cache"]["c1"]["total"]).max() > 0


def test_capture_intermediates(net):
    model, variables, x = net
    y, seen = model.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])
    want = model.module.apply(merged(variables), x, capture_intermediates=True, mutable=["intermediates"])
    close((y, seen), want)
    cell = jaxadapt.adapt(Cell(), lora("c0", "c1"))
    values = trained(cell.init(KEY, x))
    out = cell.apply(values, x, capture_intermediates=True, mutable=["intermediates", "cache"])
    close(
        out,
        cell.module.apply(merged(values), x, capture_intermediates=True, mutable=["intermediates", "cache"]),
    )


def test_decoding_with_attention_cache():
    module = nn.MultiHeadDotProductAttention(2, decode=True)
    model, x = jaxadapt.adapt(module, lora("query", "value")), layers.x()
    variables = trained(model.init(KEY, x))
    reference = merged(variables)
    for t in range(3):
        y, changed = model.apply(variables, x[:, t : t + 1], mutable=["cache"])
        want, theirs = module.apply(reference, x[:, t : t + 1], mutable=["cache"])
        close((y, changed), (want, theirs))
        variables, reference = {**variables, **changed}, {**reference, **theirs}
    assert changed["cache"]["cache_index"] == 3


def test_jit_inside_the_model_does_not_keep_an_older_scale():
    inner = nn.jit(nn.Dense)  # one class for all instances, so one cache

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return inner(8, name="q")(x)

    x = layers.x()
    for alpha in (2, 20):
        model = jaxadapt.adapt(Outer(), lora("q", lora_alpha=alpha))
        variables = trained(model.init(KEY, x))
        close(model.apply(variables, x), model.module.apply(merged(variables), x))
    close(
        jaxadapt.detach(model).apply({"params": variables["params"]}, x),
        Outer().apply({"params": variables["params"]}, x),
    )


def test_bind(net):
    model, variables, x = net
    bound, reference = model.bind(variables), model.module.bind(merged(variables))
    close(bound(x), reference(x))
    close(bound.encode(x), reference.encode(x))
    close(bound.q(x), reference.q(x))
    close(bound.layers[1](x), reference.layers[1](x))
    close(bound.heads["a"](x), reference.heads["a"](x))
    assert bound.dropout == 0.0
    assert jax.tree.structure(bound.variables) == jax.tree.structure(variables)
    module, values = bound.unbind()
    assert jax.tree.structure(values) == jax.tree.structure(variables)
    close(module.apply(values, x), reference(x))
    close(model.copy().apply(variables, x), reference(x))


def test_variables_from_abstract_inputs_have_the_adapters(net):
    model, _, x = net
    want, found = model.init(KEY, x), model.lazy_init(KEY, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert jax.tree.structure(found) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_the_variables_of_a_bound_submodule_are_those_that_it_had():
    module = nn.Sequential([nn.Dense(8), nn.Dense(6)])
    model = jaxadapt.adapt(module, lora("layers_0", modules_to_save=["layers_1"]))
    variables = trained(model.init(KEY, layers.x()))
    for layer, name in zip(model.bind(variables).layers, ("layers_0", "layers_1"), strict=True):
        for found in (layer.variables, layer.unbind()[1]):
            assert found["lora"].keys() == variables["lora"].keys()
            jax.tree.map(np.testing.assert_array_equal, unfreeze(found["params"]), variables["params"][name])


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", ["dense", "gemma_mlp", "scan0_remat", "mha"])
def test_no_gradient_of_a_frozen_weight(name: str):
    """No product in the compiled step has the shape of a base weight: dW is never formed."""
    case = next(c for c in layers.LINEN if c.name == name)
    module = case.make()
    model = jaxadapt.adapt(module, lora(*(t.rpartition(".")[2] for t in case.targets), r=3))
    variables = jax.jit(model.init, compiler_options=QUICK)(KEY, *case.inputs())

    def step(values: Any, *inputs: Any) -> Any:
        return jax.grad(lambda lora: model.apply({**variables, "lora": lora}, *inputs).sum())(values)

    def trained_base(params: Any, *inputs: Any) -> Any:
        return jax.grad(lambda params: module.apply({"params": params}, *inputs).sum())(params)

    def products(f: Any, values: Any) -> set[tuple[int, ...]]:
        text = jax.jit(f).lower(values, *case.inputs()).as_text()
        found = re.findall(r"stablehlo\.dot_general.*-> tensor<([\dx]+)xf32>", text)
        return {tuple(sorted(map(int, shape.split("x")))) for shape in found}

    flat = paths.flatten(variables["params"])
    weights = {
        tuple(sorted(n for i, n in enumerate(flat[leaf].shape) if i != case.stack.get(leaf))) for leaf in case.roles
    }
    assert weights & products(trained_base, variables["params"]), "the pattern finds no dW where there is one"
    assert not weights & products(step, variables["lora"])


# ---------------------------------------------------------------- a pretrained base


@pytest.mark.parametrize("scan", [None, 0, 1])
def test_init_on_parameters_gives_the_specs_of_the_wrapper(scan: int | None):
    changes = {} if scan is None else {"scan": True, "scan_axis": scan}
    module = llama.LinenLlama(LlamaConfig(**{**vars_of(LLAMA), **changes}))
    tokens = jnp.zeros((1, 3), jnp.int32)
    model = jaxadapt.adapt(module, lora("q_proj", "down_proj"))
    mine = jax.eval_shape(model.init, KEY, tokens)
    base = jax.jit(module.init, compiler_options=QUICK)(KEY, tokens)
    adapter = jaxadapt.init(base["params"], model.adapters[0][1], key=KEY)
    assert jax.tree.structure({**base, **adapter.collection}) == jax.tree.structure(mine)
    assert {p: x.shape for p, x in adapter.flat().items()} == {
        p: x.shape for p, x in jaxadapt.extract(mine).flat().items()
    }
    assert adapter.keymap.name == ("llama" if scan is None else f"llama/scan{scan}")
    variables = trained({**base, **adapter.collection})
    close(quick(model, variables, tokens), quick(module, merged(variables), tokens), 1e-4)
    named = jaxadapt.adapt(module, lora("q_proj"), keymap=adapter.keymap.name)
    named = jax.eval_shape(named.init, KEY, tokens)
    assert jaxadapt.extract(named).keymap.name == adapter.keymap.name


def vars_of(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_a_table_that_contradicts_the_model():
    module = llama.LinenLlama(LlamaConfig(**{**vars_of(LLAMA), "scan": True, "scan_axis": 1}))
    model = jaxadapt.adapt(module, lora("q_proj"), keymap="llama/scan0")
    with pytest.raises(jaxadapt.AttachError, match=r"stacks its layers on axes \(0,\), the model on \(1,\)"):
        jax.eval_shape(model.init, KEY, jnp.zeros((1, 3), jnp.int32))


@pytest.mark.parametrize("kind", ["linear", "fused"])
@pytest.mark.parametrize("sides", ["o i -> o i", "i o -> o i"])
def test_a_table_must_not_take_a_layers_outputs_for_its_inputs(sides: str, kind: Any):
    """The shape of a square kernel shows no direction, and the file would hold the change transposed."""

    class Square(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(4, name="up")(x)

    table = jaxadapt.KeyMap("mine", (jaxadapt.Weight("up.kernel", "up.weight", sides, kind=kind),))
    model = jaxadapt.adapt(Square(), lora("up"), keymap=table)
    if sides == "i o -> o i":
        model.init(KEY, jnp.ones((1, 4)))
    else:
        with pytest.raises(jaxadapt.AttachError, match=r"up.kernel: the keymap's .* contradicts .* keymap='generic'"):
            model.init(KEY, jnp.ones((1, 4)))


def test_the_advice_for_a_contradiction_holds_with_the_generic_keymap():
    class Turned(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.param("kernel", nn.initializers.lecun_normal(), (4, 4)).T

    class Holder(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return Turned(name="up")(x)

    model, x = jaxadapt.adapt(Holder(), lora("up")), jnp.ones((1, 4))
    variables = model.init(KEY, x)  # as the error says
    made = jaxadapt.init(variables["params"], lora("up"), key=KEY)
    assert made.keymap.name == "generic"
    with pytest.raises(jaxadapt.AttachError, match="With the generic keymap, create the adapter from the model's call"):
        model.apply({**variables, **made.collection}, x)
    model.apply(variables, x)


# ---------------------------------------------------------------- several adapters


def test_lora_and_ia3_together(net):
    _, _, x = net
    model = jaxadapt.adapt(jaxadapt.adapt(Net(), lora("q", "heads_a")), ia3("q", "layers_1"), name="scales")
    model = jaxadapt.activate(model, "default", "scales")
    variables = trained(model.init(KEY, x))
    assert set(variables) == {"params", "lora", "ia3"}
    close(model.apply(variables, x), model.module.apply(merged(variables, "default", "scales"), x))
    _, changed = model.apply(variables, x, mutable=["ia3"])
    assert set(changed) == {"ia3"}


# ---------------------------------------------------------------- refusals, by name


def refused(kind: type[Exception], says: str, f: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(kind, match=says):
        f(*args, **kwargs)


def test_negative_scan_axis():
    from tests.support.twins.layers_linen import Stack

    refused(
        jaxadapt.AttachError,
        "(?s)blk.q.kernel.*negative axis",
        jaxadapt.adapt(Stack(-1), lora("q")).init,
        KEY,
        layers.x(),
    )


class Decoder(nn.Module):
    """The kernel is read outside its module's call, but only in one of two methods."""

    def setup(self) -> None:
        self.enc = nn.Dense(6)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.enc(x)

    def decode(self, x: jax.Array) -> jax.Array:
        return self.enc(x) @ self.enc.variables["params"]["kernel"].T


def test_reads_outside_are_found_at_each_kind_of_call():
    model, x = jaxadapt.adapt(Decoder(), lora("enc")), layers.x()
    variables = model.init(KEY, x)
    model.apply(variables, x)
    refused(jaxadapt.AttachError, "(?s)read outside.*enc.kernel", model.apply, variables, x, method="decode")
    jitted = jax.jit(lambda v, x: model.apply(v, x, method="decode"))
    refused(jaxadapt.AttachError, "(?s)read outside.*enc.kernel", jitted, variables, x)
    bound = model.bind(variables)
    bound(x)
    refused(jaxadapt.AttachError, "(?s)read outside.*enc.kernel", bound.decode, x)
    none = jaxadapt.adapt(Decoder(), lora("enc"))
    with jaxadapt.disable(none) as plain:
        plain.apply(variables, x, method="decode")


def test_dropout_where_only_the_effective_weight_can_follow():
    from tests.support.twins.layers_linen import own

    module = own(lambda x, w: x @ w**2, 8, 6)()
    table = jaxadapt.KeyMap("t", (jaxadapt.Weight("layer.w", "layer.weight", "i o -> o i"),))
    model = jaxadapt.adapt(module, lora("layer", lora_dropout=0.1), keymap=table)
    variables = model.init(KEY, layers.x())
    model.clone(deterministic=True).apply(variables, layers.x())
    refused(jaxadapt.AttachError, "dropout", model.apply, variables, layers.x(), rngs={"dropout": KEY})


def test_variables_that_do_not_fit(net):
    model, variables, x = net
    refused(
        jaxadapt.AttachError,
        "no adapter 'default' in 'lora'",
        model.apply,
        {"params": variables["params"]},
        x,
    )
    other = jaxadapt.adapt(Net(), lora(*ALL, lora_alpha=7))
    refused(jaxadapt.AttachError, "another configuration", other.apply, variables, x)
    params = {k: v for k, v in variables["params"].items() if k not in ("q", "layers_1")}
    refused(
        jaxadapt.AttachError,
        "(?s)lack.*layers_1.kernel.*q.kernel",
        model.apply,
        {**variables, "params": params},
        x,
    )
    lost = {k: v for k, v in variables["lora"]["default"].items() if k != "~config"}
    refused(jaxadapt.AttachError, "config=", model.apply, {**variables, "lora": {"default": lost}}, x)


def test_bookkeeping_fields_are_no_other_configuration(net):
    _, variables, x = net
    jaxadapt.adapt(Net(), lora(*ALL, base_model_name_or_path="org/base")).apply(variables, x)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_all_linear_and_what_init_resolved_it_to(method: str):
    module, tokens = llama.LinenLlama(LLAMA), jnp.zeros((1, 3), jnp.int32)
    config = lora(target_modules="all-linear")
    if method == "ia3":
        config = jaxadapt.IA3Config(target_modules="all-linear", feedforward_modules=["down_proj"])
    model = jaxadapt.adapt(module, config)
    variables = trained(jax.jit(model.init, compiler_options=QUICK)(KEY, tokens))
    sites = jaxadapt.extract(variables).sites
    assert len(sites) == 14
    assert not any("embed" in leaf or "norm" in leaf for leaf in sites)
    close(quick(model, variables, tokens), quick(module, merged(variables), tokens), 1e-4)


def test_all_linear_without_a_table_leaves_stacked_vectors_alone():
    """A norm's scale stacked over layers is 2-D, but not a matrix."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            weight = self.param("weight", nn.initializers.ones, (8,))
            return nn.Dense(8, name="lin")(x * weight[None, None]), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return stack(name="blk")(x, None)[0]

    model = jaxadapt.adapt(Deep(), lora(target_modules="all-linear"))
    variables = trained(jax.jit(model.init, compiler_options=QUICK)(KEY, layers.x()))
    assert set(jaxadapt.extract(variables).sites) == {"blk.lin.kernel"}
    close(quick(model, variables, layers.x()), quick(Deep(), merged(variables), layers.x()))


@pytest.mark.parametrize(
    ("module", "inputs", "target", "leaf"),
    [
        (lambda: nn.ConvTranspose(4, (3,), name="odd"), layers.one, "odd", "odd.kernel"),
        (lambda: nn.OptimizedLSTMCell(4, name="odd"), layers.one, "ii", "odd.ii.kernel"),
    ],
    ids=["transposed conv", "lstm"],
)
def test_nothing_named_is_left_out_silently(module, inputs, target, leaf):
    """A layer no method can adapt is refused with its name, also beside one that can be adapted."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, *args: Any) -> Any:
            odd = module()
            return nn.Dense(3, name="lin")((nn.RNN(odd) if isinstance(odd, nn.RNNCellBase) else odd)(*args))

    args = inputs()
    model = jaxadapt.adapt(Two(), lora("lin", target))
    with pytest.raises(jaxadapt.AdapterError, match=leaf):
        model.init(KEY, *args)


def test_a_cell_that_shows_no_roles_takes_the_adapter_of_init():
    """The remedy in the error of the wrapper's `init` works: compare with kernels changed by hand."""
    net, x = nn.RNN(nn.OptimizedLSTMCell(6)), jax.random.normal(KEY, (2, 3, 4))
    params = jax.jit(net.init)(KEY, x)["params"]
    config = lora("ii", "hf", init_lora_weights=False)
    wrapper = jaxadapt.adapt(net, config)
    refused(jaxadapt.AttachError, r"if it is \(in, out\), take the adapter from jaxadapt\.init", wrapper.init, KEY, x)
    adapter = jaxadapt.init(params, config, key=KEY)
    (cell,) = params
    by_hand = jax.tree.map(jnp.asarray, params)
    for name in ("ii", "hf"):
        a, b = (adapter.flat()[f"{cell}.{name}.kernel.lora_{part}"] for part in "AB")
        by_hand[cell][name]["kernel"] += 3 * (b @ a).T
    close(quick(wrapper, {"params": params, **adapter.collection}, x), quick(net, {"params": by_hand}, x))


def test_a_wrapper_is_no_part_of_a_module():
    class Outer(nn.Module):
        net: Any

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3, name="head")(self.net(x))

    outer = Outer(jaxadapt.adapt(Net(), lora("q")))
    refused(jaxadapt.AttachError, "adapt the outermost module", outer.init, KEY, jnp.ones((2, 8)))


# ---- layers that one call reaches and another does not ---------------------------------------------------------


class Branches(nn.Module):
    """A small encoder-decoder, whose `init` may call only one half."""

    @nn.compact
    def __call__(self, x: Any, decode: bool = False) -> Any:
        x = nn.Dense(8, name="encoder")(x)
        return nn.Dense(8, name="decoder")(x) if decode else x


def test_a_layer_that_the_adapter_lacks_is_named_when_a_call_uses_it(recwarn: pytest.WarningsRecorder):
    x = jnp.ones((2, 8))
    config = lora("encoder", "decoder")
    base = Branches().init(KEY, x, True)["params"]
    module = jaxadapt.adapt(Branches(), config)
    with pytest.warns(UserWarning, match="target_modules: 'decoder' matches no module"):
        half = {"params": base, "lora": module.init(KEY, x)["lora"]}
    module.apply(half, x)  # calls only adapted layers
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"the adapter 'default' lacks.*\n  decoder\.kernel"):
        module.apply(half, x, True)
    whole = {"params": base, **jaxadapt.init(base, config, key=KEY).collection}
    module.apply(whole, x, True)
    module.apply(whole, x)
    assert not recwarn.list


class TwoWeights(nn.Module):
    """x·(first + second) + bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first, second = (self.param(name, nn.initializers.normal(), (4, 6)) for name in ("first", "second"))
        return x @ first + x @ second + self.param("bias", nn.initializers.normal(), (1, 6))[0][None]


class TwoWeightsNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return TwoWeights(name="m")(x)


@pytest.mark.parametrize("both", [False, True])
def test_a_bias_of_two_adapted_weights_belongs_to_neither(both: bool):
    table = jaxadapt.KeyMap(
        "t", tuple(jaxadapt.Weight(f"m.{name}", f"m.{name}.weight", "i o -> o i") for name in ("first", "second"))
    )
    config = jaxadapt.IA3Config(target_modules=["first", "second"] if both else ["first"], feedforward_modules=[])
    wrapper = jaxadapt.adapt(TwoWeightsNet(), config, keymap=table)
    variables = wrapper.init(KEY, jnp.ones((1, 4)))
    if both:
        refused(jaxadapt.AttachError, "unknown to which of the", wrapper.apply, variables, jnp.ones((2, 4)))
    else:
        wrapper.apply(variables, jnp.ones((2, 4)))
