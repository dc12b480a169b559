"""IA3 on convolutions, each against live PEFT on a torch twin: output, gradients, files, merged weights.

Within 1e-5 of the largest, in float32.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch

import jaxadapt
from jaxadapt import KeyMap, Weight
from jaxadapt.export import merge_files
from jaxadapt.storage import safetensors
from tests.reference.test_lora_matrix import close, flat, in_torch
from tests.support import peft_harness as harness
from tests.support.twins import trees
from tests.support.twins.tiny import Net

pytestmark = pytest.mark.peft


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    net: Net
    feedforward: tuple[str, ...] = ()
    targets: tuple[str, ...] = ("conv",)
    scans: bool = True

    @property
    def fields(self) -> dict[str, Any]:
        return {"target_modules": list(self.targets), "feedforward_modules": list(self.feedforward)}


CONV = ("conv",)
CASES = [
    Case("conv2d", Net("conv", ndim=2), targets=("conv", "head")),
    Case("conv2d_feedforward", Net("conv", ndim=2), CONV),
    Case("conv2d_stride_no_bias", Net("conv", ndim=2, stride=2, bias=False), scans=False),
    Case("conv2d_dilation_feedforward", Net("conv", ndim=2, dilation=2, padding=2), CONV),
    Case("conv2d_groups", Net("conv", ndim=2, groups=2)),
    Case("conv2d_groups_feedforward", Net("conv", ndim=2, groups=4), CONV),
    Case("conv2d_one_feedforward", Net("conv", ndim=2), ("layers.1.conv",), ("layers.0.conv", "layers.1.conv"), False),
    Case("conv3d", Net("conv", ndim=3)),
    Case("conv3d_feedforward_stride", Net("conv", ndim=3, stride=2, groups=2), CONV, scans=False),
]
TWINS = [("nnx", None), ("linen", None), ("linen", 0), ("nnx", 1)]
CHOSEN = [
    pytest.param(case, api, scan, id=f"{case.name}-{api}-{scan}")
    for i, case in enumerate(CASES)
    for api, scan in (TWINS[:2] if i % 2 and case.scans else TWINS[1:] if case.net.groups > 1 else TWINS)
    if scan is None or case.scans
]


@functools.cache
def base_of(net: Net) -> Any:
    return net.torch().eval()


@dataclasses.dataclass(frozen=True)
class Theirs:
    folder: Path
    output: np.ndarray
    gradients: dict[str, np.ndarray]
    merged: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(case: Case) -> Theirs:
        folder = tmp_path_factory.mktemp(case.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = harness.make_peft(base_of(case.net), peft.IA3Config(**case.fields))
            y = model(torch.from_numpy(case.net.input()))
            (y * torch.cos(torch.arange(y.numel(), dtype=torch.float32)).reshape(y.shape)).sum().backward()
            harness.save(model, folder)
            grads = {n.replace(".default", ""): p.grad.numpy() for n, p in model.named_parameters() if "ia3_l" in n}
            merged = {k: v.numpy() for k, v in copy.deepcopy(model).merge_and_unload().state_dict().items()}
        return Theirs(folder, y.detach().numpy(), grads, merged)

    return make


class Ours:
    def __init__(self, case: Case, api: str, scan: int | None) -> None:
        self.case, self.api, self.table = case, api, case.net.table(api, scan)
        self.base = trees.nest(case.net.leaves(api, scan, base_of(case.net)))
        self.x = case.net.ours(case.net.input())
        self.module = None if api == "nnx" else case.net.linen(scan)
        self.tree: Any = case.net.nnx(base_of(case.net), scan) if api == "nnx" else {"params": self.base}

    def load(self, folder: Path) -> None:
        self.tree = jaxadapt.load(folder, self.tree, keymap=self.table)

    def adapt(self) -> None:
        config = jaxadapt.IA3Config(**self.case.fields)
        if self.api == "nnx":
            jaxadapt.adapt(self.tree, config, rngs=nnx.Rngs(0), keymap=self.table)
        else:
            adapter = jaxadapt.init(self.base, config, key=jax.random.key(0), keymap=self.table)
            self.tree = {**self.tree, **adapter.collection}

    def forward(self) -> Any:
        if self.module is None:
            graphdef, params, rest = nnx.split(self.tree, jaxadapt.AdapterParam, ...)
            own = lambda: jax.tree.map(lambda x: x, rest)  # noqa: E731 (variables of the trace that asks)
            return lambda params: nnx.merge(graphdef, params, own())(self.x), params
        module = jaxadapt.adapt(self.module, jaxadapt.extract(self.tree).config, keymap=self.table)
        base, adapter = {"params": self.tree["params"]}, self.tree["ia3"]
        return lambda adapter: module.apply({**base, "ia3": adapter}, self.x), adapter

    def output(self) -> Any:
        f, params = self.forward()
        return f(params)

    def gradients(self) -> Any:
        f, params = self.forward()

        def loss(params: Any) -> Any:
            y = f(params)
            return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum()

        found = jax.jit(jax.grad(loss))(params)
        return jaxadapt.to_peft(found if self.api == "nnx" else {"ia3": found}).tensors

    def train(self) -> None:
        f, params = self.forward()
        rule = optax.sgd(0.1)

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            grads = jax.grad(lambda p: (f(p) ** 2).sum())(params)
            updates, state = rule.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = rule.init(params)
        for _ in range(2):
            params, state = step(params, state)
        if self.api == "nnx":
            nnx.update(self.tree, params)
        else:
            self.tree = {**self.tree, "ia3": params}


@pytest.mark.parametrize(("case", "api", "scan"), CHOSEN)
def test_pefts_file_computes_here_what_it_computes_there(case, api, scan, theirs, tmp_path):
    want, ours = theirs(case), Ours(case, api, scan)
    ours.load(want.folder)
    close(ours.output(), want.output)
    found = ours.gradients()
    assert found.keys() == want.gradients.keys()
    for key, gradient in want.gradients.items():
        close(found[key], gradient, key)
    jaxadapt.save(ours.tree, tmp_path)
    harness.assert_same_files(tmp_path, want.folder)
    adapter = jaxadapt.extract(ours.tree)
    merged = jaxadapt.merge(ours.base, adapter)
    for key, value in in_torch(ours.table, merged).items():
        close(value, want.merged[key], key)
    for (path, value), (_, old) in zip(flat(jaxadapt.unmerge(merged, adapter)), flat(ours.base), strict=True):
        close(value, old, path)


@pytest.mark.parametrize(("case", "api", "scan"), CHOSEN[::3])
def test_peft_computes_with_our_file_what_we_compute(case, api, scan, theirs, tmp_path):
    ours = Ours(case, api, scan)
    ours.adapt()
    values = jax.tree.leaves(jaxadapt.extract(ours.tree))
    assert all((x == 1).all() for x in values)
    ours.train()
    output = ours.output()
    jaxadapt.save(ours.tree, tmp_path)
    assert harness.specs(harness.read_tensors(tmp_path)) == harness.specs(harness.read_tensors(theirs(case).folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = harness.load(base_of(case.net), tmp_path)
    assert loaded.missing == loaded.unexpected == []
    with torch.no_grad():
        close(output, loaded.model(torch.from_numpy(case.net.input())).numpy())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_files_are_merged_as_peft_merges(case, theirs, tmp_path):
    want = theirs(case)
    safetensors_file = tmp_path / "base" / "model.safetensors"
    safetensors_file.parent.mkdir()
    from safetensors.torch import save_file

    save_file(base_of(case.net).state_dict(), str(safetensors_file), metadata={"format": "pt"})
    (tmp_path / "base" / "config.json").write_text("{}")
    merge_files.merge_folder(tmp_path / "base", want.folder, tmp_path / "out")
    got = safetensors.read(tmp_path / "out" / "model.safetensors")
    assert got.keys() == want.merged.keys()
    for key, value in want.merged.items():
        close(got[key], value, key)


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("mode", ["circular", "reflect"])
def test_padding_is_the_layers_own(mode, feedforward, tmp_path):
    """The vector is for channels, so it is the same before padding and after."""
    torch.manual_seed(0)
    base = torch.nn.Sequential()
    base.add_module("conv", torch.nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode))
    fields = {"target_modules": CONV, "feedforward_modules": CONV if feedforward else ()}
    model = harness.make_peft(base, peft.IA3Config(**{k: list(v) for k, v in fields.items()}))
    harness.save(model, tmp_path)
    x = np.random.RandomState(0).standard_normal((2, 4, 6, 5)).astype("float32")
    want = np.moveaxis(model(torch.from_numpy(x)).detach().numpy(), 1, -1)
    table = KeyMap(
        "one",
        (
            Weight("conv.kernel", "conv.weight", "h w i o -> o i h w", kind="conv"),
            Weight("conv.bias", "conv.bias", "o -> o"),
        ),
    )

    class One(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Conv(6, (3, 3), padding=mode.upper(), name="conv")(x)

    kernel = base.conv.weight.detach().numpy().transpose(2, 3, 1, 0)
    params = {"conv": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(base.conv.bias.detach().numpy())}}
    variables = jaxadapt.load(tmp_path, {"params": params}, keymap=table)
    module = jaxadapt.adapt(One(), jaxadapt.read_config(tmp_path), keymap=table)
    close(module.apply(variables, jnp.asarray(np.moveaxis(x, 1, -1))), want)


def test_the_layers_own_class_tells_without_a_table(theirs, tmp_path):
    """`nnx.Conv` and `nn.Conv` under PyTorch's names, by the generic map."""
    case = next(case for case in CASES if case.name == "conv2d_groups_feedforward")
    want, model = theirs(case), case.net.nnx(base_of(case.net))
    jaxadapt.load(want.folder, model)
    close(model(case.net.ours(case.net.input())), want.output)
    jaxadapt.save(model, tmp_path)
    assert harness.specs(harness.read_tensors(tmp_path)) == harness.specs(harness.read_tensors(want.folder))


@pytest.mark.parametrize("feedforward", [[], ["conv"]])
def test_a_convolution_over_one_dimension_is_refused_as_in_peft(feedforward):
    net = Net("conv", ndim=1)
    fields = {"target_modules": ["conv"], "feedforward_modules": feedforward}
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(copy.deepcopy(base_of(net)), peft.IA3Config(**fields))
    with pytest.raises(jaxadapt.ConfigError, match="2-D and 3-D convolutions, but not for 1-D"):
        jaxadapt.adapt(net.nnx(base_of(net)), jaxadapt.IA3Config(**fields), keymap=net.table("nnx"))
