"""Every module of the registry with every method: outputs and gradients against explicit effective weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt.keymaps.keymap import GENERIC, entry_from_axes
from tests.support.twins import layers, trees

ALPHA, R = 6, 3
EMBEDDINGS = ("embed", "embed_attend")  # covered by tests/reference/test_lora_matrix.py
FITTING = [p for p in layers.params(layers.NNX) if p.values[0].how != layers.REFUSED and p.id not in EMBEDDINGS]
METHODS = ["lora", "ia3"]


def config_of(method: str, case: layers.Case, **fields: Any) -> Any:
    # A stacked layer is called by its number in PyTorch: "blk.0.q", so only the last segment names them all.
    targets = [t.rpartition(".")[2] for t in case.targets] if case.stack else case.targets
    if method == "lora":
        return jaxadapt.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets, **fields)
    return jaxadapt.IA3Config(target_modules=targets, feedforward_modules=[], **fields)


def adapted(method: str, case: layers.Case, model: Any = None, *, rngs: Any = 1, **fields: Any) -> Any:
    model = case.make() if model is None else model
    axes = sorted(set(case.stack.values()))
    table = None
    if case.how in (layers.EFFECTIVE, layers.EITHER):  # no product shows the roles, so a keymap gives them
        shapes = {path: v.shape for path, v in trees.nnx_leaves(model).items()}
        table = GENERIC.with_entries(entry_from_axes(leaf, shapes[leaf], axes) for leaf, axes in case.roles.items())
    return jaxadapt.adapt(
        model,
        config_of(method, case, **fields),
        keymap=table,
        rngs=None if rngs is None else nnx.Rngs(rngs),
        stack_axes=axes or None,
        example=case.inputs(),
    )


def scaled(weight: jax.Array, l: jax.Array, axes: Any, stack: int | None) -> jax.Array:
    """Return IA3's effective weight; `l` is (batch..., out...)."""
    if stack is not None:
        return jax.vmap(lambda w, l: scaled(w, l, axes, None), (stack, stack), stack)(weight, l)
    order = sorted(range(l.ndim), key=lambda i: (axes.batch_axes + axes.out_axes)[i])
    sizes = {a: weight.shape[a] for a in axes.batch_axes + axes.out_axes}
    return weight * l.transpose(order).reshape([sizes.get(a, 1) for a in range(weight.ndim)])


def effective(method: str, case: layers.Case, leaves: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of the same model without an adapter, with effective values of the adapted ones."""
    out = dict(leaves)
    for leaf, axes in case.roles.items():
        stack = case.stack.get(leaf)
        if method == "lora":
            a, b = tensors[f"{leaf}.lora_A"], tensors[f"{leaf}.lora_B"]
            out[leaf] = layers.effective(leaves[leaf], a, b, axes, ALPHA / R, stack).astype(leaves[leaf].dtype)
        else:
            l = tensors[f"{leaf}.ia3_l"]
            out[leaf] = scaled(leaves[leaf], l, axes, stack).astype(leaves[leaf].dtype)
            bias = leaf.rpartition(".")[0] + ".bias" if "." in leaf else "bias"
            if bias in leaves:
                out[bias] = (leaves[bias] * l.reshape(leaves[bias].shape)).astype(leaves[bias].dtype)
    return out


def dotted(path: Any) -> str:
    return ".".join(map(str, path))


def site(path: Any) -> str:
    """Return `a.b.kernel.lora_A` for `a.b.lora.default.kernel.lora_A`."""
    *head, _, _, leaf, tensor = map(str, path)
    return ".".join([*head, leaf, tensor])


def comparison(method: str, case: layers.Case, model: Any) -> Any:
    """Return one jitted function of adapter values: output and gradient, adapted and with effective weights."""
    graphdef, adapter, rest = nnx.split(model, jaxadapt.AdapterParam, ...)
    plain_def, plain, other = nnx.split(case.make(), nnx.Param, ...)
    leaves = {dotted(path): v.get_value() for path, v in nnx.to_flat_state(plain)}
    inputs = case.inputs()

    def here(state: Any) -> Any:  # creates variables in this trace, where a call may change them
        return jax.tree.map(lambda x: x, state)

    def ours(adapter: Any) -> Any:
        return nnx.merge(graphdef, adapter, here(rest))(*inputs)

    def theirs(values: Mapping[str, Any]) -> Any:
        new = here(plain)
        for path, v in nnx.to_flat_state(new):
            v.set_value(values[dotted(path)])
        return nnx.merge(plain_def, new, here(other))(*inputs)

    def reference(adapter: Any) -> Any:
        tensors = {site(path): v.get_value() for path, v in nnx.to_flat_state(adapter)}
        return theirs(effective(method, case, leaves, tensors))

    def loss(f: Any) -> Any:
        def weighed(adapter: Any) -> Any:
            y = f(adapter).astype(jnp.float32)
            return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum(), y

        return jax.value_and_grad(weighed, has_aux=True)

    @jax.jit
    def both(adapter: Any) -> Any:
        (_, y), g = loss(ours)(adapter)
        (_, y_ref), g_ref = loss(reference)(adapter)
        return y, y_ref, jax.tree.leaves(g), jax.tree.leaves(g_ref), theirs(leaves).astype(jnp.float32)

    return both, adapter


def randomized(adapter: Any) -> Any:
    """Return values of order one in every tensor, so that no term vanishes."""
    leaves, tree = jax.tree.flatten(adapter)
    rng = np.random.default_rng(3)
    return tree.unflatten([jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype) for x in leaves])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", FITTING)
def test_equals_the_effective_weight(case, method):
    both, fresh = comparison(method, case, adapted(method, case))
    low = case.name == "linear_bf16"
    y, _, _, _, plain = both(fresh)
    np.testing.assert_allclose(y, plain, atol=1e-6, rtol=1e-6)
    y, y_ref, g, g_ref, plain = both(randomized(fresh))
    assert np.abs(y - plain).max() > 1e-2  # the adapter has an effect
    close = {"atol": 0.06, "rtol": 0.03} if low else {"atol": 1e-5, "rtol": 1e-5}
    np.testing.assert_allclose(y, y_ref, **close)
    assert len(g) == len(g_ref) == len(case.roles) * (2 if method == "lora" else 1)
    for ours, ref in zip(g, g_ref, strict=True):
        scale = max(1.0, float(np.abs(ref).max()))
        np.testing.assert_allclose(ours / scale, ref / scale, **close)
        assert ours.dtype == jnp.float32
        assert np.abs(ours).max() > 0
