"""What every method of weights must be, for each in `METHODS`: this file names none. `test_conformance_peft` has PEFT.

The configurations are the methods' own `examples`.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxadapt
from jaxadapt import AttachError, ConfigError, KeyMap, Weight
from jaxadapt.adapters import initial_values, selection, sites
from jaxadapt.adapters.adapter import make_file_plan, map_stack, tensor_entries, torch_layout
from jaxadapt.arrays.products import LETTERS, Use
from jaxadapt.core import paths
from jaxadapt.methods import METHODS, AppliedMethod
from tests.support.configs import class_of, value_of

OUT, IN = 16, 8
ROLES = {"A", "B", "embedding", "bias", "vector", "copy", "frozen", "other"}
# The ways in which a weight of one PyTorch module (OUT, IN) may look, and several modules in one leaf.
PLAIN = (Weight("w", "a.q.weight", "o i -> o i"), (OUT, IN))
LINES = {
    "heads out": (Weight("w", "a.q.weight", "i n h -> (n h) i"), (IN, 2, 8)),
    "heads in": (Weight("w", "a.q.weight", "n h o -> o (n h)"), (2, 4, OUT)),
    "turned": (Weight("w", "a.q.weight", "o i -> i o", fan_in_fan_out=True), (OUT, IN)),
    "mixed": (Weight("w", "a.q.weight", "n i h -> (h n) i"), (2, IN, 8)),
    "split": (Weight("w", "a.q.weight", "i n (c p) -> (n p c) i", p=2), (IN, 2, 8)),
    "scaled": (Weight("w", "a.q.weight", "i n h -> (n h) i", scale=("h", -0.5)), (IN, 4, 4)),
}
FUSED = (Weight("w", "{p}.weight", "{p} i o -> o i", p=("k", "q")), (2, IN, OUT))
PART = (Weight("w", "{p}.weight", "i {p} o -> o i", p=("k", "q", "v")), (IN, 3, OUT))
ORDER = ("k", "q", "up")  # of the modules in PyTorch, on which some methods depend
# The keymap of `Net`; the generic one, which the other methods have, states no order.
NET = KeyMap(
    "net",
    (Weight("{path}.kernel", "{path}.weight", "i o -> o i"), Weight("{path}.bias", "{path}.bias", "o -> o")),
    order=ORDER,
)
STACKED = (Weight("w", "h.{l}.q.weight", "i {l} o -> o i"), (IN, 3, OUT))


def is_bias(method: Any) -> bool:
    """Whether the outputs change as by a bias alone."""
    return set(method.roles.values()) == {"bias"}


def cases(on_bias: bool | None = None) -> list[Any]:
    types = [t for t in sorted(METHODS) if METHODS[t].scope == "site" and on_bias in (None, is_bias(METHODS[t]))]
    found = [(t, i) for t in types for i in range(len(METHODS[t].examples))]
    return [pytest.param(t, i, id=f"{t}-{i}") for t, i in found]


every_case = pytest.mark.parametrize(("peft_type", "i"), cases())
# Methods whose layers can run with the effective weight alone, and the others.
every_weight_case = pytest.mark.parametrize(("peft_type", "i"), cases(on_bias=False))
every_bias_case = pytest.mark.parametrize(("peft_type", "i"), cases(on_bias=True))


def config_of(peft_type: str, i: int, targets: Any = ("q",)) -> Any:
    return class_of(peft_type)(**{"target_modules": list(targets), **METHODS[peft_type].examples[i]})


def without_idle_patterns(config: Any, targets: Any) -> Any:
    """The configuration without patterns of other modules, which would be warned of."""

    def applies(pattern: str) -> bool:
        return any(value_of({pattern: 1}, target, 0) for target in targets)

    names = [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    changes = {name: {k: v for k, v in config.get(name).items() if applies(k)} for name in names}
    return config.replace(**changes) if changes else config


def random(shape: Any, seed: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


def changed(values: Any, trained: Any, seed: int = 2) -> dict[str, Any]:
    """The same values with noise on those that training changes."""
    return {
        path: x + 0.3 * random(x.shape, seed + n) if path.rpartition(".")[2] in trained else x
        for n, (path, x) in enumerate(values.items())
    }


@functools.cache
def adapted(peft_type: str, i: int, line: Any, targets: tuple[str, ...] = ("q",), noise: bool = True) -> Any:
    """The sites of one leaf, a weight, and values of the adapter."""
    weight, shape = line
    config = without_idle_patterns(config_of(peft_type, i, targets), targets)
    found = selection.select_sites(config, KeyMap("t", (weight,), order=ORDER), {"w": shape})
    w = random(shape, 1)
    values = initial_values.init_values(config, found, jax.random.key(0), base={"w": w})
    trained = {t.name for t, _ in tensor_entries(found) if t.trained}
    if noise:  # what no file holds is zero
        forms = {e.path: e.form for site in found for e in site.entries}
        values = {p: forms[p].clear_gaps(x) if p in forms else x for p, x in changed(values, trained).items()}
    return found, w, values


def hook_of(found: Any, values: Any) -> AppliedMethod:
    (site,) = found
    params = {path.rpartition(".")[2]: x for path, x in values.items()} | site.data
    return AppliedMethod(site.method, site.hparams, params, site.axes)


def use_of(hook: AppliedMethod, transposed: bool = False) -> Use:
    axes = hook.axes
    w = LETTERS[: axes.rank]
    x_role, y_role = (axes.out_axes, axes.in_axes) if transposed else (axes.in_axes, axes.out_axes)
    x = "YX" + "".join(w[a] for a in x_role)
    return Use(x, w, "YX" + "".join(w[a] for a in (*axes.batch_axes, *y_role)), axes)


def through(hook: AppliedMethod, use: Use, x: Any, w: Any) -> Any:
    """A product as a layer runs it."""
    if hook.by_weight or not hook.follows_use(use):
        return jnp.einsum(f"{use.x},{use.w}->{use.y}", x, hook.weight(w))
    x = hook.input(use, x, w)
    return hook.output(use, x, jnp.einsum(f"{use.x},{use.w}->{use.y}", x, w), w)


def x_of(use: Use, w: Any) -> Any:
    size = dict(zip(use.w, w.shape, strict=True)) | {"Y": 2, "X": 3}
    return random([size[c] for c in use.x], 3)


# ---- the interface ---------------------------------------------------------------------------------------------


@every_case
def test_a_method_is_stateless_and_its_tensors_are_consistent(peft_type: str, i: int):
    method = METHODS[peft_type]
    config = config_of(peft_type, i)
    assert vars(method) == {}
    assert method.kinds
    assert jaxadapt.Config.from_dict(json.loads(config.to_json())) == config
    assert json.loads(config.to_json())["peft_type"] == peft_type
    found, _, values = adapted(peft_type, i, PLAIN, noise=False)
    again = selection.select_sites(config.replace(), KeyMap("t", (PLAIN[0],)), {"w": PLAIN[1]})
    assert found == again
    assert hash(found[0].hparams) == hash(again[0].hparams)
    tensors = [t for t, _ in tensor_entries(found)]
    assert len({t.name for t in tensors}) == len(tensors)
    for t in tensors:
        role = method.role(found[0].hparams, t.name)
        assert role in ROLES
        assert t.trained or role == "frozen", f"{t.name}: an untrained tensor has the role 'frozen'"
        assert t.trained or t.dtype is None or jnp.issubdtype(t.dtype, jnp.integer)
    abstract = initial_values.init_values(config, found, None, abstract=True, base={"w": jnp.zeros(PLAIN[1])})
    assert {p: (x.shape, x.dtype) for p, x in abstract.items()} == {p: (x.shape, x.dtype) for p, x in values.items()}
    # The adapter alone has the same sites as the model.
    leaves = {"w": found[0].shapes}
    if found.shared:
        leaves["~shared"] = {each.tensor.name: each.entry.shape for each in found.shared}
    recovered = sites.sites_from_shapes(config, KeyMap("t", (PLAIN[0],)), leaves)
    assert [s.entries for s in recovered] == [s.entries for s in found]
    assert [s.hparams for s in recovered] == [s.hparams for s in found]
    assert recovered.shared == found.shared


@every_weight_case
def test_an_operation_that_no_method_knows_gets_the_effective_weight(peft_type: str, i: int):
    found, _, values = adapted(peft_type, i, PLAIN)
    assert not hook_of(found, values).follows("cumsum")


@every_case
def test_initial_values_follow_the_key(peft_type: str, i: int):
    config = config_of(peft_type, i)
    table = KeyMap("t", (Weight("h.{l}", "h.{l}.q.weight", "i o -> o i"),))
    base = {f"h.{l}": random((IN, OUT), l) for l in range(2)}
    found = selection.select_sites(config, table, {leaf: x.shape for leaf, x in base.items()})
    one, same = (initial_values.init_values(config, found, jax.random.key(0), base=base) for _ in range(2))
    for path, x in one.items():
        np.testing.assert_array_equal(x, same[path])
    with jax.ensure_compile_time_eval():
        traced = jax.jit(lambda b: initial_values.init_values(config, found, jax.random.key(0), base=b))(base)
    for path, x in one.items():
        np.testing.assert_allclose(traced[path], x, rtol=1e-5, atol=1e-6)


# ---- the arithmetic --------------------------------------------------------------------------------------------


@every_weight_case
def test_a_fresh_adapter_leaves_the_output_alone_where_the_method_says_so(peft_type: str, i: int):
    found, w, values = adapted(peft_type, i, PLAIN, noise=False)
    hook = hook_of(found, values)
    use = use_of(hook)
    x = x_of(use, w)
    plain = jnp.einsum(f"{use.x},{use.w}->{use.y}", x, w)
    unchanged = np.allclose(hook.weight(w), w, atol=1e-6) and np.allclose(through(hook, use, x, w), plain, atol=1e-5)
    assert unchanged == METHODS[peft_type].starts_unchanged(config_of(peft_type, i))


@pytest.mark.parametrize("name", LINES)
@every_weight_case
def test_every_layout_gives_the_same_weight_from_the_same_file(peft_type: str, i: int, name: str):
    """The file of an adapter on one layout, read on PyTorch's own, changes PyTorch's weight equally."""
    found, w, values = adapted(peft_type, i, LINES[name])
    plain_sites, _, plain_values = adapted(peft_type, i, PLAIN)
    form = methods_layout(found)
    torch_w = form.weight_to_torch(w)
    file = dict(make_file_plan(found).encode(values))
    plain = {**plain_values, **make_file_plan(plain_sites).decode(file)}
    with_w = initial_values_from(config_of(peft_type, i), plain_sites, plain, torch_w)
    want = hook_of(plain_sites, with_w).weight(torch_w)
    hook = hook_of(found, values)
    np.testing.assert_allclose(form.weight_to_torch(hook.weight(w)), want, rtol=1e-4, atol=1e-4)
    for transposed in (False, True):
        use = use_of(hook, transposed)
        x = x_of(use, w)
        expected = jnp.einsum(f"{use.x},{use.w}->{use.y}", x, hook.weight(w))
        np.testing.assert_allclose(through(hook, use, x, w), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LINES)
@every_bias_case
def test_every_layout_adds_the_bias_of_the_same_file(peft_type: str, i: int, name: str):
    found, w, values = adapted(peft_type, i, LINES[name])
    plain_sites, _, plain_values = adapted(peft_type, i, PLAIN)
    file = dict(make_file_plan(found).encode(values))
    plain = hook_of(plain_sites, {**plain_values, **make_file_plan(plain_sites).decode(file)})
    want = plain.merged_bias(jnp.zeros(OUT), 1)
    assert float(abs(want).max()) > 0.1
    np.testing.assert_allclose(plain.merged_bias(want, -1), jnp.zeros(OUT), atol=1e-6)
    hook, layout = hook_of(found, values), methods_layout(found)
    use = use_of(hook)
    x = x_of(use, w)
    change = through(hook, use, x, w) - jnp.einsum(f"{use.x},{use.w}->{use.y}", x, w)
    rows = layout.rows_to_torch("out", dict(zip(layout.left, use.w, strict=True)), change, use.y)
    # The sums of float32 before the subtraction are about 10.
    np.testing.assert_allclose(rows / layout.factor(w.shape), jnp.broadcast_to(want, rows.shape), atol=1e-5)
    if layout.scale is not None:
        with pytest.raises(AttachError, match="stores the layer's weight times a factor"):
            hook.merged_bias(jnp.zeros(OUT), 1)


def test_a_bias_is_turned_where_the_model_stores_a_multiple_of_the_weight():
    """A bias that is added may not have the weight's factor; one that is multiplied needs none."""
    found, _, values = adapted("ROAD", 0, LINES["scaled"])
    plain_sites, _, plain_values = adapted("ROAD", 0, PLAIN)
    file = dict(make_file_plan(found).encode(values))
    plain = hook_of(plain_sites, {**plain_values, **make_file_plan(plain_sites).decode(file)})
    bias = random((OUT,), 5)
    want = plain.merged_bias(bias, 1)
    assert float(abs(want - bias).max()) > 0.1
    turned = hook_of(found, values).merged_bias(bias.reshape(4, 4), 1)
    np.testing.assert_allclose(turned.reshape(-1), want, rtol=1e-5, atol=1e-6)


def methods_layout(found: Any) -> Any:
    """PyTorch's layout of the weight, for methods that do not ask for it too."""
    return torch_layout(found[0])


def initial_values_from(config: Any, found: Any, values: Any, w: Any) -> Any:
    """The values with those tensors that no file has computed from the weight."""
    absent = {paths.join("w", t.name) for t in found[0].tensors if not t.in_file}
    kept = {path: x for path, x in values.items() if path not in absent}
    return initial_values.init_values(config, found, jax.random.key(0), base={"w": w}, given=kept)


@pytest.mark.parametrize(("line", "targets"), [(FUSED, ("k", "q")), (PART, ("q",))], ids=["fused", "one part"])
@every_weight_case
def test_parts_of_a_fused_weight_are_modules_of_their_own(peft_type: str, i: int, line: Any, targets: Any):
    if len(targets) > 1 and METHODS[peft_type].examples[i].get("block_size_pattern"):
        with pytest.raises(ConfigError, match="block_size differs between the modules of one"):
            adapted(peft_type, i, line, targets)
        return
    found, w, values = adapted(peft_type, i, line, targets)
    hook = hook_of(found, values)
    whole = hook.weight(w)
    axis, names = hook.axes.batch_axes[0], line[0].index_names("{p}")
    file = dict(make_file_plan(found).encode(values))
    for n, name in enumerate(names):
        old, new = (jnp.take(x, n, axis) for x in (w, whole))
        if name not in targets:
            np.testing.assert_array_equal(old, new)
            continue
        if METHODS[peft_type].ordered:  # the module alone would have another place
            continue
        single = (Weight("w", f"{name}.weight", "i o -> o i"), (IN, OUT))
        one, _, fresh = adapted(peft_type, i, single, (name,))
        plan = make_file_plan(one)
        values_of = {**fresh, **plan.decode({key: file[key] for key in plan.keys})}
        single_config = without_idle_patterns(config_of(peft_type, i, (name,)), (name,))
        values_of = initial_values_from(single_config, one, values_of, old)
        np.testing.assert_allclose(new, hook_of(one, values_of).weight(old), rtol=1e-5, atol=1e-5)
    use = use_of(hook)
    x = x_of(use, w)
    try:
        y = through(hook, use, x, w)
    except AttachError as error:
        assert "fused weight share one input" in str(error)  # noqa: PT017
        return
    np.testing.assert_allclose(y, jnp.einsum(f"{use.x},{use.w}->{use.y}", x, whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("peft_type", ["LOHA", "LOKR"])
def test_each_part_of_a_fused_weight_has_its_own_alpha(peft_type: str):
    changes = []
    for alpha in (5, 7):
        config = class_of(peft_type)(target_modules=["k", "q"], r=2, alpha=5, alpha_pattern={"q": alpha})
        found = selection.select_sites(config, KeyMap("t", (FUSED[0],)), {"w": FUSED[1]})
        values = initial_values.init_values(config, found, jax.random.key(0), abstract=True)
        values = {path: random(x.shape, n) for n, (path, x) in enumerate(values.items())}
        changes.append(hook_of(found, values).weight(jnp.zeros(FUSED[1])))
    np.testing.assert_array_equal(changes[0][0], changes[1][0])
    np.testing.assert_allclose(changes[0][1] * 7 / 5, changes[1][1], rtol=1e-5)


@every_weight_case
def test_stacked_layers_are_the_layers_one_by_one(peft_type: str, i: int):
    found, w, values = adapted(peft_type, i, STACKED)
    (site,) = found
    own = {path.rpartition(".")[2]: x for path, x in values.items()}
    whole = map_stack(site, lambda a, w: a.weight(w), own, w)
    for l in range(3):
        one = {name: jnp.take(x, l, 1) if name in site.shapes else x for name, x in own.items()}
        hook = AppliedMethod(site.method, site.hparams, {**one, **{k: v[l] for k, v in site.data.items()}}, site.axes)
        np.testing.assert_allclose(whole[:, l], hook.weight(w[:, l]), rtol=1e-5, atol=1e-6)


@every_weight_case
def test_unmerging_gives_the_weight_back_or_is_refused(peft_type: str, i: int):
    found, w, values = adapted(peft_type, i, PLAIN)
    hook = hook_of(found, values)
    merged = hook.merged(w)
    assert not np.allclose(merged, w, atol=1e-3)
    try:
        back = hook.unweight(merged)
    except AttachError as error:
        assert "cannot unmerge" in str(error)  # noqa: PT017
        return
    np.testing.assert_allclose(back, w, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("bfloat16", "bfloat16")], ids="-".join)
@every_weight_case
def test_outputs_and_weights_keep_the_bases_dtype(peft_type: str, i: int, dtypes: Any):
    base, own = dtypes
    found, w, values = adapted(peft_type, i, PLAIN)
    exact = hook_of(found, values).weight(w)
    values = {path: x.astype(own) if jnp.issubdtype(x.dtype, jnp.floating) else x for path, x in values.items()}
    hook = hook_of(found, values)
    w = w.astype(base)
    assert hook.weight(w).dtype == base
    np.testing.assert_allclose(hook.weight(w).astype("float32"), exact, rtol=0.05, atol=0.1)
    use = use_of(hook)
    assert through(hook, use, x_of(use, w).astype(base), w).dtype == base


@every_case
def test_transformations_of_jax(peft_type: str, i: int):
    found, w, values = adapted(peft_type, i, PLAIN)
    trained = {t.name for t, _ in tensor_entries(found) if t.trained}
    (site,) = found
    own = {path.rpartition(".")[2]: x for path, x in values.items()}
    use = use_of(hook_of(found, values))
    x = x_of(use, w)

    row = Use(use.x[1:], use.w, use.y[1:], use.axes)

    def loss(params: Any, x: Any, use: Any = use) -> Any:
        hook = AppliedMethod(site.method, site.hparams, {**own, **params, **site.data}, site.axes)
        return (through(hook, use, x, w) ** 2).sum()

    params = {name: a for name, a in own.items() if name in trained}

    @jax.jit
    def transformed(params: Any, x: Any) -> Any:
        rows = jax.vmap(lambda p, x: loss(p, x, row), in_axes=(None, 0))(params, x)
        return loss(params, x), jax.grad(loss)(params, x), jax.grad(jax.checkpoint(loss))(params, x), rows

    plain = loss(params, x)
    jitted, grads, again, rows = transformed(params, x)
    assert all(bool(jnp.isfinite(g).all()) for g in grads.values())
    assert all(bool((g != 0).any()) for g in grads.values()), {k: float(abs(g).max()) for k, g in grads.items()}
    np.testing.assert_allclose(jitted, plain, rtol=1e-4)
    np.testing.assert_allclose(rows.sum(), plain, rtol=1e-4)
    for name, g in grads.items():
        np.testing.assert_allclose(again[name], g, rtol=1e-3, atol=1e-4)


# ---- models ----------------------------------------------------------------------------------------------------


class Net(nnx.Module):
    """8 -> 16 -> 8, with biases."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q = nnx.Linear(IN, OUT, rngs=rngs, bias_init=nnx.initializers.normal())
        self.up = nnx.Linear(OUT, IN, rngs=rngs, bias_init=nnx.initializers.normal())

    def __call__(self, x: Any) -> Any:
        return self.up(jnp.tanh(self.q(x)))


class LinenNet(nn.Module):
    """The same in Linen."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(IN, name="up")(jnp.tanh(nn.Dense(OUT, name="q")(x)))


X = np.random.default_rng(5).standard_normal((4, IN)).astype("float32")


def keymap_of(peft_type: str) -> KeyMap | str:
    return NET if METHODS[peft_type].ordered else "auto"


def network(peft_type: str, i: int, name: str = "default", seed: int = 2, model: Any = None) -> Any:
    """An NNX network with an adapter that has done something."""
    model = Net(nnx.Rngs(0)) if model is None else model
    config = config_of(peft_type, i, ("q", "up"))
    jaxadapt.adapt(model, config, rngs=nnx.Rngs(1), name=name, keymap=keymap_of(peft_type))
    adapter = jaxadapt.extract(model, name=name)
    trained = {t.name for t, _ in tensor_entries(sites.sites_of(adapter)) if t.trained}
    values = paths.unflatten(changed(adapter.flat(), trained, seed))
    jaxadapt.inject(model, jaxadapt.Adapter(adapter.config, values, adapter.keymap), name=name)
    return model


def base_of() -> Any:
    model = Net(nnx.Rngs(0))
    return {"params": {n: {k: getattr(getattr(model, n), k)[...] for k in ("kernel", "bias")} for n in ("q", "up")}}


@pytest.mark.every_method
@every_case
def test_nnx_and_linen_agree_and_merging_equals_applying(peft_type: str, i: int, tmp_path: Any):
    model = network(peft_type, i)
    y, adapter = model(X), jaxadapt.extract(model)
    assert not np.allclose(y, Net(nnx.Rngs(0))(X), atol=1e-3)
    module = jaxadapt.adapt(LinenNet(), adapter.config, keymap=keymap_of(peft_type))
    variables = {**base_of(), **adapter.collection}
    np.testing.assert_allclose(jax.jit(module.apply)(variables, X), y, rtol=1e-5, atol=1e-5)
    # A file gives the same adapter.
    jaxadapt.save(model, tmp_path)
    keymap = keymap_of(peft_type)
    np.testing.assert_allclose(jaxadapt.load(tmp_path, Net(nnx.Rngs(0)), keymap=keymap)(X), y, rtol=1e-6, atol=1e-6)
    loaded = jaxadapt.load(tmp_path, base_of(), keymap=keymap)
    for path, x in jaxadapt.extract(loaded).flat().items():
        np.testing.assert_array_equal(x, adapter.flat()[path], err_msg=path)
    # Merged and unmerged.
    try:
        merged = jaxadapt.merge(base_of()["params"], adapter)
    except AttachError as error:
        assert "cannot merge" in str(error) or "effective weight" in str(error)  # noqa: PT017
        return
    np.testing.assert_allclose(LinenNet().apply({"params": merged}, X), y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jaxadapt.merge(model)(X), y, rtol=1e-4, atol=1e-5)
    try:
        back = jaxadapt.unmerge(merged, adapter)
    except AttachError as error:
        assert "cannot unmerge" in str(error)  # noqa: PT017
        return
    for path, x in paths.flatten(back).items():
        np.testing.assert_allclose(x, paths.flatten(base_of()["params"])[path], rtol=1e-3, atol=1e-4)


@every_case
def test_several_adapters_and_deletion(peft_type: str, i: int):
    model = network(peft_type, i, "a")
    one = model(X)
    network(peft_type, i, "b", seed=20, model=model)
    two = model(X)
    jaxadapt.activate(model, "a")
    np.testing.assert_array_equal(model(X), one)
    jaxadapt.activate(model, ("a", "b"))
    both = model(X)
    assert not np.allclose(both, one, atol=1e-4)
    assert not np.allclose(both, two, atol=1e-4)
    jaxadapt.delete(model, name="b")
    np.testing.assert_array_equal(model(X), one)
    jaxadapt.detach(model)
    np.testing.assert_array_equal(model(X), Net(nnx.Rngs(0))(X))


@every_case
def test_eight_devices(peft_type: str, i: int):
    """The shardings follow the base, and the results do not depend on them."""
    want = network(peft_type, i)(X)
    adapter = jaxadapt.extract(network(peft_type, i))
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))

    def place(path: str, x: Any) -> Any:
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec("x", "y") if x.ndim == 2 else PartitionSpec()))

    base = paths.unflatten({p: place(p, x) for p, x in paths.flatten(base_of()["params"]).items()})
    spread = jaxadapt.from_peft(jaxadapt.to_peft(adapter), base, keymap=keymap_of(peft_type))
    assert all(isinstance(x.sharding, NamedSharding) for x in spread.flat().values())
    assert all(x.sharding.is_fully_replicated for x in spread.shared.values())
    module = jaxadapt.adapt(LinenNet(), adapter.config, keymap=keymap_of(peft_type))
    got = jax.jit(module.apply)({"params": base, **spread.collection}, X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@every_case
def test_training_in_nnx_changes_the_trained_tensors_only(peft_type: str, i: int):
    import optax

    from jaxadapt import optim

    model = network(peft_type, i)
    before = jaxadapt.extract(model).flat()
    trained = {t.name for t, _ in tensor_entries(sites.sites_of(jaxadapt.extract(model))) if t.trained}
    roles = optim.roles(nnx.state(model, jaxadapt.AdapterParam))
    assert set(jax.tree.leaves(roles)) <= ROLES
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=jaxadapt.AdapterParam)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        grads = nnx.grad(lambda m: (m(X) ** 2).sum(), argnums=nnx.DiffState(0, jaxadapt.AdapterParam))(model)
        optimizer.update(model, grads)

    step(model, optimizer)
    for path, x in jaxadapt.extract(model).flat().items():
        same = bool((x == before[path]).all())
        assert same != (path.rpartition(".")[2] in trained), path
