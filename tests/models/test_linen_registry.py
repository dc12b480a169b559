"""Every module of the registry under the Linen wrapper: exact where it can be, refused where it cannot."""

from __future__ import annotations

import string
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

import jaxadapt
from jaxadapt.arrays.layout import Axes
from jaxadapt.core import paths
from jaxadapt.keymaps.keymap import entry_from_axes
from tests.support.twins import layers

KINDS = ("LORA", "IA3")
# These tests check values, not speed.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def quick(f: Any) -> Any:
    return jax.jit(f, compiler_options=QUICK)


def last(case: layers.Case) -> list[str]:
    """Return targets by their last segment, because stacked layers have a number before it."""
    return [name.rpartition(".")[2] for name in case.targets]


def config_of(kind: str, targets: list[str]) -> Any:
    if kind == "LORA":
        return jaxadapt.LoraConfig(r=2, lora_alpha=3, target_modules=targets)
    # The first target scales its outputs, the second its inputs, and so on.
    inputs = [t for i, t in enumerate(dict.fromkeys(targets)) if i % 2]
    return jaxadapt.IA3Config(target_modules=targets, feedforward_modules=inputs)


def base_shapes(case: layers.Case) -> dict[str, tuple[int, ...]]:
    module, keys = case.make(), dict.fromkeys(("params", "dropout"), jax.random.key(0))
    variables = jax.eval_shape(lambda: module.init(keys, *case.inputs()))
    return {path: leaf.shape for path, leaf in paths.flatten(nn.meta.unbox(variables["params"])).items()}


def table_of(case: layers.Case) -> jaxadapt.KeyMap:
    """Return the roles of the registry as a keymap, for weights whose roles no call shows."""
    shapes = base_shapes(case)
    return jaxadapt.KeyMap(
        "mine", tuple(entry_from_axes(leaf, shapes[leaf], axes) for leaf, axes in case.roles.items())
    )


def needs_table(case: layers.Case) -> bool:
    return case.how in (layers.EFFECTIVE, layers.EITHER) or case.name == "embed"


def wrapped(case: layers.Case, kind: str) -> Any:
    keymap = table_of(case) if needs_table(case) else None
    return jaxadapt.adapt(case.make(), config_of(kind, last(case)), keymap=keymap)


def split(case: layers.Case) -> tuple[dict[int, Any], Any]:
    """Separate the arrays among the inputs, because an equation cannot be traced."""
    inputs = case.inputs()
    arrays = {i: x for i, x in enumerate(inputs) if not isinstance(x, str)}
    return arrays, lambda arrays: [arrays.get(i, x) for i, x in enumerate(inputs)]


def random_like(tree: Any, around: float = 0.0) -> Any:
    """Return values by path, far from the initial ones."""

    def value(path: Any, leaf: Any) -> Any:
        rng = np.random.default_rng(sum(map(ord, str(path))))
        return (around + 0.2 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, tree)


def scaled(weight: Any, l: Any, axes: Axes, feedforward: bool, stack: int | None) -> Any:
    """Return `W` times the IA3 vector."""
    if stack is not None:
        return jax.vmap(lambda w, l: scaled(w, l, axes, feedforward, None), (stack, stack), stack)(weight, l)
    letters = string.ascii_lowercase[: weight.ndim]
    of = "".join(letters[i] for i in (*axes.batch_axes, *(axes.in_axes if feedforward else axes.out_axes)))
    return jnp.einsum(f"{letters},{of}->{letters}", weight, l)


def merged_by_hand(case: layers.Case, config: Any, params: Any, adapter: Any) -> Any:
    """Return base parameters merged with the adapter by the registry's reference."""
    flat = paths.flatten(params)
    for leaf, tensors in adapter.items():
        w, stack, axes = nn.meta.unbox(flat[leaf]), case.stack.get(leaf), case.roles[leaf]
        if config.peft_type == "LORA":
            new = layers.effective(w, tensors["lora_A"], tensors["lora_B"], axes, config.lora_alpha / config.r, stack)
        else:
            module = leaf.rpartition(".")[0] if leaf.rpartition(".")[2] in layers.PLAIN else leaf
            inputs = module.rpartition(".")[2] in config.feedforward_modules
            new = scaled(w, tensors["ia3_l"], axes, inputs, stack)
            bias = f"{leaf.rpartition('.')[0]}.bias".lstrip(".")
            if bias in flat and not inputs:
                flat[bias] = flat[bias] * tensors["ia3_l"].reshape(flat[bias].shape)
        flat[leaf] = new.astype(w.dtype)
    return paths.unflatten(flat)


def close(a: Any, b: Any, tol: float = 1e-5) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=tol, atol=tol * max(1.0, float(abs(y).max())), err_msg=str(path))


# Costly to compile, and for IA3 equivalent to cheaper cases.
LORA_ONLY = (
    "scan0_remat scan1_dropout gemma_unrolled gemma_scan_remat rnn vmap_same remat gemma_mlp_root own_twice"
    " einsum_at_call"
).split()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", layers.params(layers.LINEN, how=("exact", "effective", "either")))
def test_computes_what_the_merged_weights_compute(case: layers.Case, kind: str):
    """A fresh adapter has no effect; with values, outputs and gradients equal the effective weights'."""
    if kind == "IA3" and case.name in LORA_ONLY:
        pytest.skip("as a cheaper case")
    model = wrapped(case, kind)
    module, config = model.module, model.adapters[0][1]
    arrays, inputs_of = split(case)
    key, method = jax.random.key(0), kind.lower()
    rngs, mutable = dict.fromkeys(case.rngs, key), list(case.mutable) or False
    specs = jax.eval_shape(lambda: model.init({"params": key, **rngs}, *case.inputs()))
    assert set(jaxadapt.extract(specs).sites) == set(case.roles)
    others = {
        c: jax.tree.map(lambda x: np.ones(x.shape, x.dtype), tree)
        for c, tree in specs.items()
        if c not in ("params", method)
    }
    params, values = random_like(specs["params"]), random_like(specs[method], 1.0 if kind == "IA3" else 0.0)
    fresh = jax.tree_util.tree_map_with_path(
        lambda path, x: x if "lora_A" in jax.tree_util.keystr(path) else np.full_like(x, kind == "IA3"), values
    )

    def everything(params: Any, values: Any, arrays: Any) -> Any:
        sites = jaxadapt.extract({method: values}).sites

        def loss(values: Any, how: str) -> Any:
            if how == "adapted":
                use, variables = model, {**others, "params": params, method: values}
            else:
                sites = jaxadapt.extract({method: values}).sites
                use, variables = module, {**others, "params": merged_by_hand(case, config, params, sites)}
            out = use.apply(variables, *inputs_of(arrays), rngs=rngs, mutable=mutable)
            y = out if mutable is False else out[0]
            return sum(jnp.sum(jnp.sin(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(y)), out

        results = {how: jax.value_and_grad(loss, has_aux=True)(values, how) for how in ("adapted", "hand")}
        merged = jaxadapt.merge(params, jaxadapt.extract({method: values}))
        return results["adapted"], results["hand"], merged, merged_by_hand(case, config, params, sites)

    run = quick(everything)
    adapted, hand, merged, merged_hand = run(params, values, arrays)
    tol = 3e-2 if "bf16" in case.name else 1e-5
    close(nn.meta.unbox(merged), nn.meta.unbox(merged_hand), tol)
    close(adapted, hand, tol)
    fresh_adapted, plain, *same = run(params, fresh, arrays)
    for tree in same:
        jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(tree), nn.meta.unbox(params))
    close(fresh_adapted, plain, tol)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), adapted[0][1], plain[0][1])
    assert any(jax.tree.leaves(changed)), "the adapter had no effect"


def program_of_params(module: Any, case: layers.Case) -> tuple[Any, str]:
    """Return the structure of the base parameters from `init`, and the program that computes them."""
    keys = {name: jax.random.key(3) for name in ("params", *case.rngs)}

    def init(keys: Any) -> Any:
        variables = module.init(keys, *case.inputs())
        return {c: tree for c, tree in variables.items() if c not in ("lora", "ia3")}

    closed, out = jax.make_jaxpr(init, return_shape=True)(keys)
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars}  # unused constants stay and do not count
    return jax.tree.structure(out), str(jaxpr.replace(constvars=[v for v in jaxpr.constvars if id(v) in used]))


@pytest.mark.parametrize("case", layers.params(layers.LINEN, how=("exact", "effective", "either")))
def test_base_is_initialized_by_the_very_same_program(case: layers.Case):
    model = wrapped(case, "LORA")
    assert program_of_params(model, case) == program_of_params(model.module, case)


@pytest.mark.parametrize("name", ["dense", "scan1_dropout", "batchnorm", "mha", "partitioned", "gemma_mlp", "vmap"])
def test_base_of_init_is_bit_identical(name: str):
    case = next(c for c in layers.LINEN if c.name == name)
    model, keys = wrapped(case, "LORA"), {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    base, variables = model.module.init(keys, *case.inputs()), model.init(keys, *case.inputs())
    lora = variables.pop("lora")
    assert jax.tree.structure(base) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, base, variables)
    own = model.init({**keys, "lora": jax.random.key(9)}, *case.inputs())
    jax.tree.map(np.testing.assert_array_equal, base, {c: t for c, t in own.items() if c != "lora"})
    a = jaxadapt.extract({"lora": lora}).flat(), jaxadapt.extract(own).flat()
    assert all((a[0][p] != a[1][p]).any() for p in a[0] if p.endswith("lora_A"))
    assert all((x == 0).all() for p, x in a[0].items() if p.endswith("lora_B"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", layers.params(layers.LINEN, how="refused"))
def test_what_cannot_be_exact_is_refused(case: layers.Case, kind: str):
    """At `init` or at the first call; at `apply` if the adapter was created without the module."""
    model = wrapped(case, kind)
    says = {"WeightNorm": "nn.WeightNorm", "map_variables": "nn.map_variables"}.get(case.why, case.why)
    leaf = next(iter(case.roles))

    def first_call(key: Any) -> Any:
        return model.apply(model.init(key, *case.inputs()), *case.inputs())

    with pytest.raises(jaxadapt.AttachError, match=f"(?s){leaf}.*{says}|{says}.*{leaf}"):
        jax.eval_shape(first_call, jax.random.key(0))
    variables = model.module.init(jax.random.key(0), *case.inputs())
    adapter = jaxadapt.init(variables["params"], model.adapters[0][1], key=jax.random.key(1))
    with pytest.raises(jaxadapt.AttachError, match=f"(?s){leaf}.*{says}|{says}.*{leaf}"):
        model.apply({**variables, **adapter.collection}, *case.inputs())


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in layers.params(layers.LINEN, how=("effective", "either"))
        if c.id not in ("own_reshaped", "embed_attend")
    ],
)
def test_what_no_call_tells_needs_a_table(case: layers.Case):
    """Without a keymap, the error names every targeted leaf that cannot be adapted."""
    model = jaxadapt.adapt(case.make(), config_of("LORA", last(case)))
    with pytest.raises(jaxadapt.AdapterError, match=next(iter(case.roles))):
        jax.eval_shape(model.init, jax.random.key(0), *case.inputs())
