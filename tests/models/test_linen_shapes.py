"""Abstract variables for a file, layouts that bare parameters do not show, and keymaps that transpose a kernel."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxadapt
from tests.support import meshes

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
STARTS: list[dict[str, Any]] = [
    {"init_lora_weights": how} for how in ("orthogonal", "eva", "mica", "pissa", "pissa_niter_4", "olora", "corda")
] + [{"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}]


class Own(nn.Module):
    """A layer whose axis roles only its call shows."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.param("w", nn.initializers.lecun_normal(), (4, 3, 2))
        return jnp.einsum("bi,ijk->bjk", x, w).reshape(x.shape[0], 6)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Own(name="q")(x)


def adapted(**changes: Any) -> Any:
    return jaxadapt.adapt(Net(), jaxadapt.LoraConfig(r=2, target_modules=["q"], **changes))


class Headed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2, name="head")(Own(name="q")(x))


def test_the_advice_of_the_error_makes_an_adapter_of_pretrained_parameters(tmp_path: Path):
    """The start of DoRA and of copies is that of the parameters, and not of those that `init` draws."""
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], use_dora=True, modules_to_save=["head"])
    module, path, key, x = Headed(), tmp_path / "out", KEY, X
    params = module.init(jax.random.key(1), X)["params"]  # the pretrained ones
    with pytest.raises(jaxadapt.KeyMapError, match="is not known") as refused:
        jaxadapt.init(params, config, key=KEY)
    first, load, new = str(refused.value).splitlines()[-3:]
    given = {"module": module, "config": config, "params": params, "path": path, "key": key, "x": x}
    names: dict[str, Any] = {"jax": jax, "jaxadapt": jaxadapt, **given}
    exec(f"{first.strip()}\nloaded = lambda: {load.strip()}\nmade = {new.strip()}", names)
    adapter = names["made"]
    apply = jaxadapt.adapt(module, config).apply
    want = module.apply({"params": params}, X)
    np.testing.assert_allclose(apply({"params": params, **adapter.collection}, X), want, atol=1e-6)
    drawn = jaxadapt.adapt(module, config).init(KEY, X)["lora"]
    assert jnp.abs(apply({"params": params, "lora": drawn}, X) - want).max() > 0.1
    jaxadapt.save(adapter, path)
    np.testing.assert_allclose(apply(names["loaded"](), X), want, atol=1e-6)


# ---------------------------------------------------------------- shapes are independent of initial values


@pytest.mark.parametrize("how", STARTS, ids=str)
def test_shapes_do_not_depend_on_how_an_adapter_begins(how: Any):
    model, plain = adapted(**how), adapted()
    shapes, want = jax.eval_shape(model.init, KEY, X), jax.eval_shape(plain.init, KEY, X)
    mine, theirs = (jaxadapt.extract(v).flat() for v in (shapes, want))
    # KaSA has one more tensor.
    assert {p: (x.shape, x.dtype) for p, x in mine.items() if "diag" not in p} == {
        p: (x.shape, x.dtype) for p, x in theirs.items()
    }
    with pytest.raises(
        jaxadapt.ConfigError, match=r"from random numbers.*jaxadapt\.initializers\.start.*jax\.eval_shape"
    ):
        model.init(KEY, X)
    # `jit` reuses the trace of `eval_shape`, and must still refuse values.
    jitted = jax.jit(model.init)
    jax.eval_shape(jitted, KEY, X)
    with pytest.raises(jaxadapt.ConfigError, match="from random numbers"):
        jitted(KEY, X)
    jax.jit(lambda k: model.init(k, X)["params"])(KEY)  # unused values may be missing


def test_shapes_on_a_mesh_and_of_the_other_ways():
    config = meshes.CONFIG.replace(init_lora_weights="orthogonal", r=2, target_modules=["up", "down"])
    module = jaxadapt.adapt(meshes.LinenBlock(("4x2", "both")), config)
    with jax.set_mesh(meshes.mesh_of("4x2")):
        made = jax.eval_shape(module.init, KEY, meshes.X)
        params = made["params"]
        ours = jax.eval_shape(lambda key: jaxadapt.init(params, config, key=key), KEY)
    assert ours.shapes == jaxadapt.extract(made).shapes
    mesh = meshes.mesh_of("4x2", AxisType.Explicit)
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, PartitionSpec("fsdp", "tp"))
        base = {"up": {"kernel": jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=where)}}
        up = jaxadapt.LoraConfig(r=2, target_modules=["up"], init_lora_weights="orthogonal")
        found = jax.eval_shape(lambda key: jaxadapt.init(base, up, key=key), KEY).flat()
    assert found["up.kernel.lora_A"].sharding.spec == PartitionSpec(None, "fsdp")
    model = nnx.eval_shape(
        lambda: jaxadapt.adapt(
            nnx.Dict(q=nnx.Linear(4, 6, rngs=nnx.Rngs(0))),
            jaxadapt.LoraConfig(r=2, target_modules=["q"], init_lora_weights="eva"),
            rngs=nnx.Rngs(1),
        )
    )
    assert jaxadapt.extract(model).shapes == {"q.kernel": {"lora_A": (2, 4), "lora_B": (6, 2)}}


@pytest.mark.peft
@pytest.mark.parametrize("how", ["orthogonal", "mica"])
def test_a_file_of_peft_fills_the_shapes(how: str, tmp_path: Path):
    import peft
    import torch

    class Torch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(4, 6, bias=False)

        def forward(self, x: Any) -> Any:
            return self.q(x)

    if how not in str(peft.LoraConfig.__dataclass_fields__["init_lora_weights"].type):
        pytest.skip("this PEFT has no such initialization")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        Torch(), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q"], init_lora_weights=how)
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    wrapped.save_pretrained(tmp_path)
    model = jaxadapt.adapt(Net(), jaxadapt.read_config(tmp_path))
    w = wrapped.base_model.model.q.base_layer.weight.detach().numpy()
    params = {"q": {"w": jnp.asarray(w.T.reshape(4, 3, 2))}}
    made = jax.eval_shape(model.init, KEY, X)["lora"]
    variables = jaxadapt.load(tmp_path, {"params": params, "lora": made})
    want = wrapped(torch.tensor(np.asarray(X))).detach().numpy()
    np.testing.assert_allclose(model.apply(variables, X), want, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- a convolution trained in full


class Convolved(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(8, name="q")(nn.Conv(4, (4,), name="conv")(x))


def test_a_convolution_in_modules_to_save_needs_the_model(tmp_path: Path):
    """The shape (4, 4, 4) would not show that a kernel was read transposed."""
    x = jnp.ones((1, 5, 4))
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], modules_to_save=["conv"])
    model = jaxadapt.adapt(Convolved(), config)
    variables = model.init(KEY, x)
    params = variables["params"]
    need = r"in full.* 'generic' does not define.*\n  conv\.kernel \(4, 4, 4\).*\n.*KeyMap(.|\n)*jaxadapt\.adapt"
    with pytest.raises(jaxadapt.KeyMapError, match=need):
        jaxadapt.init(params, config, key=KEY)
    jaxadapt.save(variables, tmp_path)
    kernel = np.asarray(params["conv"]["kernel"])
    stored = jaxadapt.read(tmp_path).tensors["base_model.model.conv.weight"]
    np.testing.assert_array_equal(stored, kernel.transpose(2, 1, 0))  # PyTorch: (out, in, window)
    with pytest.raises(jaxadapt.KeyMapError, match=need):
        jaxadapt.load(tmp_path, {"params": params})
    made = jax.eval_shape(model.init, KEY, x)["lora"]
    loaded = jaxadapt.load(tmp_path, {"params": params, "lora": made})
    np.testing.assert_array_equal(loaded["lora"]["default"]["conv"]["kernel"]["copy"], kernel)
    table = jaxadapt.KeyMap(
        "mine",
        (
            jaxadapt.Weight("q.kernel", "q.weight", "i o -> o i"),
            jaxadapt.Weight("conv.kernel", "conv.weight", "w i o -> o i w", kind="conv"),
        ),
    )
    adapter = jaxadapt.init(params, config, key=KEY, keymap=table)
    np.testing.assert_array_equal(jaxadapt.to_peft(adapter).tensors["base_model.model.conv.weight"], stored)


@pytest.mark.parametrize(
    ("keymap", "leaf", "shape", "problem"),
    [
        (None, "kernel", (4, 4, 4), "no entry with as many axes .*ConvTranspose.* flips"),
        ("generic", "kernel", (4, 4, 4), "no entry with as many axes .*ConvTranspose.* flips"),
        (None, "embedding", (2, 9, 4), "its entry has another number of axes"),
    ],
)
def test_a_copy_whose_entry_has_other_axes_is_refused(
    keymap: str | None, leaf: str, shape: tuple[int, ...], problem: str
):
    """The generic keymap has an entry for any kernel, so that of a transposed convolution is not without one."""
    base = {
        "q": {"kernel": jax.ShapeDtypeStruct((4, 8), "float32")},
        "c": {leaf: jax.ShapeDtypeStruct(shape, "float32")},
    }
    table = jaxadapt.KeyMap(
        "mine",
        (
            jaxadapt.Weight("q.kernel", "q.weight", "i o -> o i"),
            jaxadapt.Weight("c.kernel", "c.weight", "i o -> o i"),
            jaxadapt.Weight("c.embedding", "c.weight", "i o -> i o", kind="embedding"),
        ),
    )
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], modules_to_save=["c"])
    with pytest.raises(jaxadapt.KeyMapError, match=rf"in full.*\n  c\.{leaf} .*: {problem}"):
        jaxadapt.init(base, config, key=KEY, keymap=keymap or table)


# ---------------------------------------------------------------- a keymap that transposes a kernel


def carried(n_out: int, fan_in_fan_out: bool, kind: Any = "linear") -> dict[str, Any]:
    """Return the adapter's shapes, or the reason of the refusal, for each way of attaching."""
    line = jaxadapt.Weight("q.kernel", "q.weight", "i o -> i o", fan_in_fan_out=fan_in_fan_out, kind=kind)
    table = jaxadapt.KeyMap("mine", (line,))
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], fan_in_fan_out=fan_in_fan_out)

    class Dense(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(n_out, use_bias=False, name="q")(x)

    def model() -> Any:
        return nnx.Dict(q=nnx.Linear(4, n_out, use_bias=False, rngs=nnx.Rngs(0)))

    params = Dense().init(KEY, X)["params"]
    with tempfile.TemporaryDirectory() as folder:
        jaxadapt.save(jaxadapt.init(params, config, key=KEY), folder)  # as in PEFT, A is (r, in)
        ways = {
            "NNX adapt": lambda: jaxadapt.adapt(model(), config, rngs=nnx.Rngs(1), keymap=table),
            "NNX load": lambda: jaxadapt.load(folder, model(), keymap=table),
            "Linen adapt": lambda: jaxadapt.adapt(Dense(), config, keymap=table).init(KEY, X),
            "Linen load": lambda: jaxadapt.load(folder, {"params": params}, keymap=table),
            "from_peft": lambda: jaxadapt.from_peft(jaxadapt.read(folder), params, keymap=table),
        }
        out: dict[str, Any] = {}
        for name, way in ways.items():
            try:
                out[name] = jaxadapt.extract(way()).shapes
            except jaxadapt.AttachError as error:
                out[name] = next(line for line in str(error).splitlines() if line.startswith("  q.kernel: "))
    return out


@pytest.mark.parametrize("kind", ["linear", "fused"])
@pytest.mark.parametrize("n_out", [4, 6])
def test_a_table_that_turns_a_kernel_is_refused_alike(n_out: int, kind: str):
    found = carried(n_out, False, kind)
    assert len(set(found.values())) == 1, found
    assert "contradicts the layer's own" in found["Linen load"]
    assert "fan_in_fan_out=True" in found["Linen load"]


@pytest.mark.parametrize("n_out", [4, 6])
def test_what_pytorch_stores_turned_is_right_everywhere(n_out: int):
    want = {"q.kernel": {"lora_A": (2, 4), "lora_B": (n_out, 2)}}
    assert all(shapes == want for shapes in carried(n_out, True).values())


def test_a_kernel_that_is_turned_in_a_layer_of_its_own_is_loaded_by_the_collection(tmp_path: Path):
    class Turned(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x @ self.param("kernel", nn.initializers.lecun_normal(), (4, 4)).T

    class Holder(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return Turned(name="q")(x)

    table = jaxadapt.KeyMap("mine", (jaxadapt.Weight("q.kernel", "q.weight", "o i -> o i"),))
    config = jaxadapt.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
    model = jaxadapt.adapt(Holder(), config, keymap=table)
    variables = model.init(KEY, X)
    jaxadapt.save(variables, tmp_path)
    with pytest.raises(jaxadapt.AttachError, match=r"contradicts(.|\n)*adapter = jax\.eval_shape\(jaxadapt\.adapt"):
        jaxadapt.load(tmp_path, {"params": variables["params"]}, keymap=table)
    made = jax.eval_shape(model.init, KEY, X)["lora"]
    loaded = jaxadapt.load(tmp_path, {"params": variables["params"], "lora": made})
    np.testing.assert_array_equal(model.apply(loaded, X), model.apply(variables, X))


def test_the_advice_for_an_unknown_layout_names_the_collection_of_the_method():
    base = {"q": {"kernel": jnp.ones((2, 4, 3))}}
    for config in (jaxadapt.IA3Config(target_modules=["q"]), jaxadapt.LoraConfig(target_modules=["q"])):
        name = config.peft_type.lower()
        with pytest.raises(jaxadapt.KeyMapError, match=rf'init, key, x\)\["{name}"\].*\n.*params, "{name}": adapter'):
            jaxadapt.init(base, config)
