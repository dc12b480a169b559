"""Methods of the whole model, and of copies, over eight devices and under vmap; this file names none of `METHODS`.

`test_conformance` has those that adapt weights. The model is the demo's Llama in NNX and Linen, its kernels cut over
a mesh of data × model, as FSDP with tensor parallelism cuts them, and the batch over data. Each device holds the whole
prompt, unless the caller says otherwise. float32; 1e-5 of the largest value covers the order of the sums, which the
devices change.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxadapt
from jaxadapt.adapters import sites
from jaxadapt.adapters.adapter import tensor_entries
from jaxadapt.core import paths
from jaxadapt.demo import llama
from jaxadapt.initializers import start
from jaxadapt.methods import METHODS
from tests.support.configs import class_of

SIZES = llama.LlamaConfig(
    vocab_size=32, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4
)
RNG = np.random.default_rng(0)
WEIGHTS = {name: RNG.standard_normal(shape).astype("f4") / 2 for name, shape in llama.hf_shapes(SIZES).items()}
TOKENS = RNG.integers(0, 32, (4, 5)).astype("int32")
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
TASKS = jnp.array([2, 0, 1, 2])
MESH = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # cut along their outputs

CASES = [
    pytest.param(t, i, api, id=f"{t}-{i}-{api}")
    for t in sorted(METHODS)
    if METHODS[t].scope != "site"
    for i in range(len(METHODS[t].examples))
    for api in ("nnx", "linen")
]


def cut(path: str, x: Any) -> NamedSharding:
    """The sharding of a base leaf."""
    if x.ndim < 2:
        return NamedSharding(MESH, PartitionSpec())
    along = ("data", "model") if path.split(".")[-2] in OUTPUTS else ("model", "data")
    return NamedSharding(MESH, PartitionSpec(*along))


@functools.cache
def base(api: str, spread: bool) -> tuple[Any, Any]:
    """The model, and for Linen its variables, on one device or on eight."""
    leaves = {path: jnp.asarray(x) for path, x in llama.make_leaves(SIZES, WEIGHTS)}
    leaves = {path: jax.device_put(x, cut(path, x)) for path, x in leaves.items()} if spread else leaves
    if api == "linen":
        return llama.LinenLlama(SIZES), {"params": paths.unflatten(leaves)}
    model = nnx.eval_shape(lambda: llama.Llama(SIZES, rngs=nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        variable.set_value(leaves[".".join(map(str, path))])
    return model, None


def begun(config: Any, api: str, spread: bool) -> tuple[Any, Any, Any]:
    """A model (and variables) with a new adapter, and the adapter."""
    model, variables = base(api, spread)
    example = [jnp.asarray(TOKENS)] if METHODS[config.peft_type].scope == "model" else None
    if api == "nnx":
        started = start(nnx.clone(model), config, key=jax.random.key(0), example=example)
        return started.base, None, started.adapter
    adapter = start(variables["params"], config, key=jax.random.key(0)).adapter
    return jaxadapt.adapt(model, adapter.config), {**variables, **adapter.collection}, adapter


def trained(adapter: Any) -> Any:
    """The adapter with noise on what training changes, where its tensors lie."""
    names = {t.name for t, _ in tensor_entries(sites.sites_of(adapter)) if t.trained}
    values = {
        path: x + 0.5 * np.random.default_rng(zlib.crc32(path.encode())).standard_normal(x.shape).astype("f4")
        if path.rpartition(".")[2] in names
        else x
        for path, x in adapter.flat().items()
    }
    return jaxadapt.Adapter(adapter.config, paths.unflatten(values), adapter.keymap)


def caller(model: Any, variables: Any, config: Any) -> tuple[Any, Any]:
    """Return the logits as a function of the adapter, the state, tokens, mask and tasks, and the state."""
    graphdef, state = nnx.split(model) if variables is None else (None, variables)
    has_tasks = bool(METHODS[config.peft_type].call_data(config, {"task_ids": TASKS}))

    def logits(adapter: Any, state: Any, tokens: Any, mask: Any, tasks: Any) -> Any:
        held = nnx.clone(nnx.merge(graphdef, state)) if variables is None else model
        with jaxadapt.models.invoke(held, task_ids=tasks) if has_tasks else contextlib.nullcontext(held) as ready:
            if variables is None:
                return jaxadapt.inject(ready, adapter)(tokens, mask=mask)
            return ready.apply(jaxadapt.inject(state, adapter), tokens, mask=mask)

    return logits, state


def results(model: Any, variables: Any, adapter: Any, spread: bool) -> tuple[Any, Any]:
    """The logits, and the gradients of the mean of their squares by the tensors of the adapter."""
    logits, state = caller(model, variables, adapter.config)

    def loss(adapter: Any, *rest: Any) -> Any:
        y = logits(adapter, *rest)
        return (y**2).mean(), y

    (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter, state, *inputs(spread))
    return y, gradients


def inputs(spread: bool) -> Any:
    given = jnp.asarray(TOKENS), jnp.asarray(MASK), TASKS
    return jax.device_put(given, NamedSharding(MESH, PartitionSpec("data"))) if spread else given


def close(found: Any, want: Any, name: str = "") -> None:
    scale = float(np.abs(want).max())
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * scale, err_msg=name)


def check_places(adapter: Any) -> None:
    """Every tensor lies on the mesh; those of the whole adapter are whole on each device."""
    for path, x in adapter.flat().items():
        assert isinstance(x.sharding, NamedSharding), path
        assert x.sharding.mesh == MESH, path
    assert all(x.sharding.is_fully_replicated for x in adapter.shared.values())


def along_model(x: Any) -> NamedSharding:
    """A sharding over the axis "model" of the last axis, if it divides."""
    divides = x.ndim > 0 and x.shape[-1] % 4 == 0
    return NamedSharding(MESH, PartitionSpec(*[None] * (x.ndim - 1), "model") if divides else PartitionSpec())


@pytest.mark.parametrize(("peft_type", "i", "api"), CASES)
def test_eight_devices(peft_type: str, i: int, api: str, tmp_path: Any) -> None:
    method = METHODS[peft_type]
    config = class_of(peft_type)(**method.examples[i])
    model, variables, new = begun(config, "nnx", spread=False)
    alone = trained(new)
    want, want_gradients = results(model, variables, alone, spread=False)

    # A new adapter of the base over eight devices has the same values, on all of them.
    model, variables, spread_new = begun(new.config, api, spread=True)
    check_places(spread_new)
    for path, x in spread_new.flat().items():
        np.testing.assert_array_equal(x, new.flat()[path], err_msg=path)
    spread = trained(spread_new)
    y, gradients = results(model, variables, spread, spread=True)
    close(y, want)
    scale = max(float(jnp.abs(g).max()) for g in want_gradients.flat().values())
    assert scale > 1e-3
    for path, g in gradients.flat().items():
        np.testing.assert_allclose(g, want_gradients.flat()[path], rtol=0, atol=1e-5 * scale, err_msg=path)

    # The file is the same, and fits every placement.
    one, eight = tmp_path / "one", tmp_path / "eight"
    jaxadapt.save(jaxadapt.inject(begun(new.config, "nnx", spread=False)[0], alone), one)
    held = jaxadapt.inject(model if variables is None else variables, spread)
    jaxadapt.save(held, eight)
    assert (eight / "adapter_config.json").read_bytes() == (one / "adapter_config.json").read_bytes()
    files = [jaxadapt.read(folder).tensors for folder in (one, eight)]
    assert files[0].keys() == files[1].keys()
    for key, x in files[0].items():
        close(files[1][key], x, key)  # networks and projections run on eight devices
    clean, clean_variables = base(api, True)
    target = nnx.clone(clean) if clean_variables is None else clean_variables
    held = jaxadapt.load(eight, target)
    loaded = jaxadapt.extract(held)
    check_places(loaded)
    again = jaxadapt.to_peft(held).tensors
    for key, x in files[1].items():
        np.testing.assert_array_equal(again[key], x, err_msg=key)

    # Where the caller says so, the tensors are cut.
    shardings = paths.unflatten({path: along_model(x) for path, x in loaded.flat().items()})
    target = nnx.clone(clean) if clean_variables is None else clean_variables
    held = jaxadapt.load(eight, target, shardings=shardings)
    parts = jaxadapt.extract(held)
    model, variables = (held, None) if clean_variables is None else (jaxadapt.adapt(clean, parts.config), held)
    logits, state = caller(model, variables, parts.config)
    close(jax.jit(logits)(parts, state, *inputs(True)), want)
    for path, x in parts.flat().items():
        assert x.sharding.is_equivalent_to(along_model(x), x.ndim), path
        np.testing.assert_array_equal(x, loaded.flat()[path], err_msg=path)


@pytest.mark.parametrize(("peft_type", "i", "api"), CASES)
def test_rows_can_be_mapped_and_the_base_can_have_16_bits(peft_type: str, i: int, api: str) -> None:
    config = class_of(peft_type)(**METHODS[peft_type].examples[i])
    if api == "linen":  # which has no trace of the model to take its sizes from
        config = begun(config, "nnx", spread=False)[2].config
    model, variables, new = begun(config, api, spread=False)
    adapter = trained(new)
    logits, state = caller(model, variables, adapter.config)
    want = jax.jit(logits)(adapter, state, *inputs(False))

    def of_row(adapter: Any, state: Any, *row: Any) -> Any:
        return logits(adapter, state, *(x[None] for x in row))[0]

    close(jax.jit(jax.vmap(of_row, in_axes=(None, None, 0, 0, 0)))(adapter, state, *inputs(False)), want)

    def narrow(x: Any) -> Any:
        return x.astype("bfloat16") if jnp.issubdtype(x.dtype, jnp.floating) else x

    found = jax.jit(logits)(jax.tree.map(narrow, adapter), jax.tree.map(narrow, state), *inputs(False))
    assert float(jnp.abs(found - want).max()) < 0.05 * float(jnp.abs(want).max())  # 8 bits of precision
