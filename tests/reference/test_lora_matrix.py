"""LoRA as PEFT has it: layer × variant × API × direction, each against live PEFT on a torch twin.

For every combination: outputs, merged weights and gradients within 1e-5 of the largest (float32), and the same
keys, shapes, dtypes and configuration in the file.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("peft")

import torch

import jaxadapt
from jaxadapt.core import paths
from jaxadapt.keymaps import plan
from tests.support import peft_harness as harness
from tests.support.twins import trees
from tests.support.twins.tiny import Net

pytestmark = pytest.mark.peft


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and the fields of a configuration; `unmerges`: whether the base can be had back from the sum."""

    name: str
    net: Net
    fields: dict[str, Any]
    unmerges: bool = True
    merges: bool = True
    scans: bool = True

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def config(self) -> jaxadapt.LoraConfig:
        return jaxadapt.LoraConfig(**copy.deepcopy(self.fields))


LINEAR, EMB = Net(), Net(emb=True)


def lora(*targets: str, **fields: Any) -> dict[str, Any]:
    return {"r": 2, "lora_alpha": 3, "target_modules": list(targets), **fields}


CASES = [
    Case("plain", LINEAR, lora("lin")),
    Case("rslora", LINEAR, lora("lin", use_rslora=True, r=3)),
    Case("save_head", LINEAR, lora("lin", modules_to_save=["head"]), unmerges=False),
    Case("save_embedding", EMB, lora("lin", modules_to_save=["emb", "head"]), unmerges=False),
    Case("save_layers", LINEAR, lora("head", modules_to_save=["lin"]), unmerges=False),
    Case("bias_lora_only", LINEAR, lora("lin", bias="lora_only"), unmerges=False),
    Case("bias_all", LINEAR, lora("lin", bias="all"), unmerges=False),
    Case("lora_bias", LINEAR, lora("lin", lora_bias=True)),
    Case("lora_bias_and_bias", LINEAR, lora("lin", lora_bias=True, bias="lora_only"), unmerges=False),
    Case("dora", LINEAR, lora("lin", use_dora=True), unmerges=False),
    Case("dora_rslora", LINEAR, lora("lin", "head", use_dora=True, use_rslora=True), unmerges=False),
    Case("embedding", EMB, lora("emb", "lin")),
    Case("embedding_dora", EMB, lora("emb", use_dora=True), unmerges=False),
    Case("tokens", EMB, lora("lin", trainable_token_indices=[7, 2, 3]), unmerges=False),
    Case("tokens_of", EMB, lora("lin", trainable_token_indices={"emb": [0, 10]}), unmerges=False),
    Case("conv1d", Net("conv"), lora("conv")),
    Case("conv1d_stride", Net("conv", stride=2, padding=0, size=2, bias=False), lora("conv"), scans=False),
    Case("conv2d", Net("conv", ndim=2), lora("conv", "head")),
    Case("conv2d_1x1", Net("conv", ndim=2, size=1, padding=0), lora("conv")),
    Case("conv2d_dora", Net("conv", ndim=2, stride=2), lora("conv", use_dora=True), unmerges=False, scans=False),
    Case("conv2d_groups", Net("conv", ndim=2, groups=2), lora("conv", r=4), merges=False),
    Case("conv3d", Net("conv", ndim=3), lora("conv", bias="lora_only", use_rslora=True), unmerges=False),
    Case("conv1d_bias", Net("conv"), lora("conv", lora_bias=True)),
]
TWINS = [("nnx", None), ("linen", 0), ("linen", None), ("nnx", 1)]
# Two of the four twins for each case here, all of them in tests/full.
EVERY = "JAXADAPT_EVERY_TWIN" in os.environ
CHOSEN = [
    (case, *twin)
    for i, case in enumerate(CASES)
    for twin in (TWINS if EVERY else TWINS[:2] if i % 2 else TWINS[2:])
    if twin[1] is None or case.scans
]


def named(rows: list[Any]) -> list[Any]:
    return [
        pytest.param(case, api, scan, id=f"{case.name}-{api}" + ("" if scan is None else f"-scan{scan}"))
        for case, api, scan in rows
    ]


def close(found: Any, expected: Any, what: str = "") -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(
        np.asarray(found), expected, rtol=0, atol=1e-5 * max(abs(expected).max(), 1e-3), err_msg=what
    )


# ---- PEFT's side, once for each case ---------------------------------------------------------------------


@functools.cache
def torch_net(net: Net) -> Any:
    return net.torch().eval()


@dataclasses.dataclass(frozen=True)
class Theirs:
    """What PEFT makes of one case: its file, output, gradients and merged weights."""

    folder: Path
    output: np.ndarray
    gradients: dict[str, np.ndarray]
    merged: dict[str, np.ndarray] | None


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(case: Case) -> Theirs:
        folder = tmp_path_factory.mktemp(case.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice on what a test does on purpose
            return _make(case, folder)

    return make


def wrapped(case: Case) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(torch_net(case.net)), LoraConfig(**copy.deepcopy(case.fields))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator)
                p.add_(0.3 * noise if "lora_magnitude" not in name else 0.1 * noise)
    return model


def _make(case: Case, folder: Path) -> Theirs:
    model, x = wrapped(case), torch.from_numpy(case.net.input())
    y = model(x)
    (y * torch.cos(torch.arange(y.numel(), dtype=torch.float32)).reshape(y.shape)).sum().backward()
    harness.save(model, folder)
    written = harness.read_tensors(folder)
    stripped = {name.replace(".default", "").replace("modules_to_save.", ""): p for name, p in model.named_parameters()}
    dora = "lora_magnitude_vector.weight"
    stripped = {n.removesuffix(".weight") if n.endswith(dora) else n: p for n, p in stripped.items()}
    grads = {key: stripped[key].grad for key in written if key in stripped}
    gradients = {key: grad.numpy() for key, grad in grads.items() if grad is not None}
    output = y.detach().numpy()
    merged = None
    if case.merges:
        merged = {k: v.numpy() for k, v in copy.deepcopy(model).merge_and_unload().state_dict().items()}
    return Theirs(folder, output, gradients, merged)


# ---- our side --------------------------------------------------------------------------------------------


class Ours:
    """A twin of one API with what a test does to it."""

    def __init__(self, case: Case, api: str, scan: int | None) -> None:
        self.case, self.api, self.net = case, api, case.net
        self.table = self.net.table(api, scan)
        leaves = self.net.leaves(api, scan, torch_net(self.net))
        self.base = trees.nest(leaves)
        self.x = self.net.ours(self.net.input())
        if api == "nnx":
            self.model: Any = self.net.nnx(torch_net(self.net), scan)
        else:
            self.module, self.variables = self.net.linen(scan), {"params": self.base}

    def load(self, folder: Path) -> None:
        if self.api == "nnx":
            jaxadapt.load(folder, self.model, keymap=self.table)
        else:
            self.variables = jaxadapt.load(folder, self.variables, keymap=self.table)

    def adapt(self) -> None:
        if self.api == "nnx":
            jaxadapt.adapt(self.model, self.case.config, rngs=nnx.Rngs(0), keymap=self.table)
        else:
            adapter = jaxadapt.init(self.base, self.case.config, key=jax.random.key(0), keymap=self.table)
            self.variables = {**self.variables, **adapter.collection}

    @property
    def tree(self) -> Any:
        return self.model if self.api == "nnx" else self.variables

    def put(self, adapter: Any) -> None:
        out = jaxadapt.inject(self.tree, adapter)
        if self.api == "linen":
            self.variables = out

    def forward(self) -> Any:
        """`(f, params)`: the output as a function of the adapter's parameters."""
        if self.api == "nnx":
            graphdef, params, rest = nnx.split(self.model, jaxadapt.AdapterParam, ...)
            own = lambda: jax.tree.map(lambda x: x, rest)  # noqa: E731 (variables of the trace that asks)
            return lambda params: nnx.merge(graphdef, params, own())(self.x), params
        module = jaxadapt.adapt(self.module, jaxadapt.extract(self.variables).config, keymap=self.table)
        base, adapter = {"params": self.variables["params"]}, self.variables["lora"]
        return lambda adapter: module.apply({**base, "lora": adapter}, self.x), adapter

    def output(self) -> Any:
        f, params = self.forward()
        return f(params)

    def gradients(self) -> Any:
        f, params = self.forward()

        def loss(params: Any) -> Any:
            y = f(params)
            return (y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)).sum()

        found = jax.jit(jax.grad(loss))(params)
        return jaxadapt.to_peft(found if self.api == "nnx" else {"lora": found})

    def plain(self, base: Any) -> Any:
        """The output of the network without an adapter on these base parameters."""
        if self.api == "linen":
            return self.module.apply({"params": base}, self.x)
        jaxadapt.detach(self.model)
        trees.fill(self.model, dict(flat(base)))
        return self.model(self.x)


def flat(tree: Any) -> list[tuple[str, Any]]:
    """`(dotted path, leaf)`, sorted."""
    return sorted(paths.flatten(tree).items())


def in_torch(table: Any, base: Any) -> dict[str, np.ndarray]:
    """Base parameters under PyTorch's names and in its layout."""
    leaves = dict(flat(base))
    made = plan.base_plan(table, {k: v.shape for k, v in leaves.items()})
    return {key: np.asarray(value) for key, value in made.encode(leaves).items()}


# ---- the matrix ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "api", "scan"), named(CHOSEN))
def test_pefts_file_computes_here_what_it_computes_there(case, api, scan, theirs, tmp_path):
    want = theirs(case)
    ours = Ours(case, api, scan)
    ours.load(want.folder)
    close(ours.output(), want.output)
    found = ours.gradients().tensors
    assert set(found) == set(harness.read_tensors(want.folder))
    assert want.gradients
    for key, gradient in want.gradients.items():
        close(found[key], gradient, key)
    # the same file again
    jaxadapt.save(ours.tree, tmp_path)
    harness.assert_same_files(tmp_path, want.folder)
    # taken out, put back, shown, merged, removed
    adapter = jaxadapt.extract(ours.tree)
    ours.put(jax.tree.map(lambda x: x * 1, adapter))
    assert "trainable" in str(jaxadapt.summary(ours.tree))
    if case.merges:
        merged = jaxadapt.merge(ours.base, adapter)
        sums = in_torch(ours.table, merged)
        assert set(sums) == set(want.merged) - ({"head.weight"} if case.net.tied else set())
        for key, value in sums.items():
            close(value, want.merged[key], key)
        if case.unmerges:
            for (path, value), (_, old) in zip(flat(jaxadapt.unmerge(merged, adapter)), flat(ours.base), strict=True):
                close(value, old, path)
        else:
            with pytest.raises(jaxadapt.AttachError, match="cannot unmerge"):
                jaxadapt.unmerge(merged, adapter)
        close(ours.plain(merged), want.output)
    else:
        with pytest.raises(jaxadapt.AdapterError):
            jaxadapt.merge(ours.base, adapter)


# The other direction takes the same paths back: one twin of each case.
@pytest.mark.parametrize(("case", "api", "scan"), named(CHOSEN if EVERY else CHOSEN[::2]))
def test_peft_computes_with_our_file_what_we_compute(case, api, scan, theirs, tmp_path):
    ours = Ours(case, api, scan)
    plain = ours.plain(ours.base)
    ours.adapt()
    np.testing.assert_allclose(ours.output(), plain, rtol=0, atol=2e-6)  # a fresh adapter changes nothing
    values, tree = jax.tree.flatten(jaxadapt.extract(ours.tree))
    rng = np.random.RandomState(0)
    values = [v + jnp.asarray(0.2 * rng.standard_normal(v.shape), v.dtype) for v in values]
    ours.put(tree.unflatten(values))
    output = ours.output()
    assert abs(np.asarray(output) - np.asarray(plain)).max() > 0.01
    jaxadapt.save(ours.tree, tmp_path)
    want = theirs(case)
    assert harness.specs(harness.read_tensors(tmp_path)) == harness.specs(harness.read_tensors(want.folder))
    # `auto_mapping` names torch's class, which only torch knows
    of_torch = {"auto_mapping": harness.read_json(want.folder)["auto_mapping"]}
    assert harness.read_json(tmp_path) | of_torch == harness.read_json(want.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = harness.load(torch_net(case.net), tmp_path)
    assert loaded.missing == loaded.unexpected == []
    with torch.no_grad():
        close(output, loaded.model(torch.from_numpy(case.net.input())).numpy())
