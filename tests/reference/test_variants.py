"""Variants of LoRA that begin from the base weights, or compute plain LoRA by another name, beside live PEFT."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch

import jaxadapt
from jaxadapt import optim
from jaxadapt.analysis.changes import measure_norms
from jaxadapt.core import paths
from tests.reference import test_lora_matrix as matrix
from tests.reference.test_lora_matrix import EMB, LINEAR, Case, Ours, close, lora
from tests.support import peft_harness as harness

# (PEFT warns of the shape of a bias that is its own)
pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore:.*have invalid shape")]

KASA = {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}
CASES = [
    Case("kasa", LINEAR, lora("lin", use_rslora=True, lora_bias=True, **KASA)),
    Case("kasa_patterns", LINEAR, lora("lin", "head", rank_pattern={"head": 1}, init_lora_weights="gaussian", **KASA)),
    Case("mica", LINEAR, lora("lin", init_lora_weights="mica")),
    Case("mica_embedding", EMB, lora("emb", "lin", init_lora_weights="mica")),
]
TWINS = [(CASES[0], "nnx", None), (CASES[0], "linen", 0), (CASES[1], "linen", None), (CASES[2], "nnx", 1)]
TWINS += [(CASES[3], "linen", None)]
EACH = pytest.mark.parametrize(("case", "api", "scan"), matrix.named(TWINS))


class Started(Ours):
    """A twin whose base an adapter of these may change."""

    def load(self, folder: Any) -> None:
        tensors = jaxadapt.read(folder, change_base=True if "kasa" in self.case.name else None)
        found = jaxadapt.load(tensors, self.tree, keymap=self.table)
        if self.api == "linen":
            self.variables = found

    def adapt(self) -> None:
        base = self.model if self.api == "nnx" else self.base
        left, adapter = jaxadapt.initializers.start(base, self.case.config, key=jax.random.key(0), keymap=self.table)
        if self.api == "linen":
            self.variables = {"params": left, **adapter.collection}


@functools.cache
def peft_fields(case: Case) -> dict[str, Any]:
    fields = copy.deepcopy(case.fields)
    return fields | ({"kasa_config": peft.KasaConfig(**fields["kasa_config"])} if "kasa_config" in fields else {})


def theirs(case: Case, folder: Any) -> Any:
    """PEFT's model with noise on what is trained, its file, its output and its gradients."""
    model = peft.get_peft_model(copy.deepcopy(matrix.torch_net(case.net)), peft.LoraConfig(**peft_fields(case))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    y = model(torch.from_numpy(case.net.input()))
    (y * torch.cos(torch.arange(y.numel(), dtype=torch.float32)).reshape(y.shape)).sum().backward()
    harness.save(model, folder)
    grads = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return model, y.detach().numpy(), grads


@EACH
def test_pefts_file_computes_here_what_it_computes_there(case, api, scan, tmp_path):
    model, output, gradients = theirs(case, tmp_path / "peft")
    ours = Started(case, api, scan)
    ours.load(tmp_path / "peft")
    close(ours.output(), output)
    found = ours.gradients().tensors
    assert gradients
    for key, x in found.items():
        if key in gradients:
            close(x, gradients[key], key)
        else:  # MiCA's B, which PEFT freezes
            assert "_B" in key
            assert not np.asarray(x).any()
    jaxadapt.save(ours.tree, tmp_path / "ours")
    harness.assert_same_files(tmp_path / "ours", tmp_path / "peft")
    adapter = jaxadapt.extract(ours.tree)
    base = jaxadapt.detach(ours.model) if api == "nnx" else ours.variables["params"]
    merged = model.merge_and_unload()
    if api == "nnx":
        np.testing.assert_allclose(jaxadapt.merge(base, adapter)(ours.x), output, atol=1e-5 * abs(output).max())
        return
    for key, value in matrix.in_torch(ours.table, jaxadapt.merge(base, adapter)).items():
        close(value, merged.state_dict()[key], key)


@EACH
def test_peft_computes_with_our_file_what_we_compute(case, api, scan, tmp_path):
    ours = Started(case, api, scan)
    plain = ours.plain(ours.base) if api == "linen" else ours.model(ours.x)
    ours.adapt()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = peft.get_peft_model(copy.deepcopy(matrix.torch_net(case.net)), peft.LoraConfig(**peft_fields(case)))
    with torch.no_grad():  # a fresh adapter: nothing but what KaSA cut off
        close(ours.output(), fresh.eval()(torch.from_numpy(case.net.input())))
    assert (abs(np.asarray(ours.output()) - np.asarray(plain)).max() > 1e-3) == ("kasa" in case.name)
    adapter = jaxadapt.extract(ours.tree)
    if "mica" in case.name:  # up to the signs of singular vectors
        state = fresh.state_dict()
        for key, x in jaxadapt.to_peft(adapter).tensors.items():
            end = f"{key}.default" if "embedding" in key else key.replace(".weight", ".default.weight")
            close(abs(np.asarray(x)), abs(state[end].numpy()), key)
    values, tree = jax.tree.flatten(adapter)
    rng = np.random.RandomState(0)
    ours.put(tree.unflatten([v + jnp.asarray(0.2 * rng.standard_normal(v.shape), v.dtype) for v in values]))
    output = ours.output()
    jaxadapt.save(ours.tree, tmp_path)
    loaded = harness.load(matrix.torch_net(case.net), tmp_path)
    assert loaded.missing == loaded.unexpected == []
    with torch.no_grad():
        close(output, loaded.model(torch.from_numpy(case.net.input())).numpy())


def test_kasa_is_of_another_base_than_the_original(tmp_path):
    """So it is neither attached nor loaded without a word; and nothing pretends that it is B·A on the original."""
    case = CASES[0]
    theirs(case, tmp_path)
    ours = Started(case, "nnx", None)
    with pytest.raises(
        jaxadapt.ConfigError, match=r"cannot initialize with kasa_config.*jaxadapt\.initializers\.start"
    ):
        jaxadapt.adapt(ours.model, case.config, rngs=nnx.Rngs(0), keymap=ours.table)
    with pytest.raises(jaxadapt.ConfigError, match=r"kasa_config: .* does not fit the original base.*change_base=True"):
        jaxadapt.load(tmp_path, ours.model, keymap=ours.table)
    left, adapter = jaxadapt.initializers.start(ours.base, case.config, key=jax.random.key(0), keymap=ours.table)
    with pytest.raises(jaxadapt.ConfigError, match="kasa_config"):
        jaxadapt.combine([adapter, adapter], [1.0, 1.0])
    with pytest.raises(jaxadapt.ConfigError, match="kasa_config"):
        jaxadapt.initializers.for_original_base(adapter, adapter)
    merged = jaxadapt.merge(left, adapter)
    close(ours.plain(jaxadapt.unmerge(merged, adapter)), ours.plain(left))
    rng = np.random.RandomState(0)
    values, tree = jax.tree.flatten(adapter)
    adapter = tree.unflatten([x + jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in values])
    after, before = (paths.flatten(tree)["layers.0.lin.kernel"] for tree in (jaxadapt.merge(left, adapter), left))
    change = np.asarray(after) - np.asarray(before)
    (norm,) = (n for n in measure_norms(jaxadapt.to_peft(adapter)).modules if n.module == "layers.0.lin")
    assert norm.norm == pytest.approx(np.linalg.norm(change), rel=1e-4)


@pytest.mark.parametrize(("api", "scan"), [("nnx", None), ("linen", 0)])
def test_kasas_penalty_and_its_gradients_are_pefts(api, scan, tmp_path):
    model = theirs(CASES[0], tmp_path)[0]
    ours = Started(CASES[0], api, scan)
    ours.load(tmp_path)
    model.zero_grad()
    want = model.base_model._get_kasa_loss()
    want.backward()
    held = nnx.state(ours.model, jaxadapt.AdapterParam) if api == "nnx" else {"lora": ours.variables["lora"]}
    value, slopes = jax.value_and_grad(optim.kasa_loss)(held)
    assert float(value) == pytest.approx(want.item(), rel=1e-5)
    grads = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = jaxadapt.to_peft(slopes).tensors
    for key, x in found.items():
        if not key.endswith("lora_B.bias"):  # of which there is no penalty
            close(x, grads[key], key)
    with pytest.raises(jaxadapt.ConfigError, match="needs an adapter with kasa_config"):
        optim.kasa_loss(jaxadapt.Adapter(LORA, {}, ours.table))


LORA = jaxadapt.LoraConfig(r=2, target_modules=["lin"])


@pytest.mark.parametrize("more", [{"use_dora": True}, {"r": 8}])
def test_what_peft_has_no_kasa_for(more):
    fields = lora("lin", **KASA) | more
    with pytest.raises(ValueError):
        peft.get_peft_model(LINEAR.torch(), peft.LoraConfig(**{**fields, "kasa_config": peft.KasaConfig()}))
    base = Ours(Case("kasa", LINEAR, fields), "linen", None)
    with pytest.raises(jaxadapt.ConfigError, match="kasa_config"):
        jaxadapt.initializers.start(base.base, base.case.config, key=jax.random.key(0), keymap=base.table)


def test_micas_b_stays_where_it_is_under_every_optimizer():
    """PEFT takes no gradient of it; here it is zero, and neither weight decay nor LoRA+ moves it."""
    ours = Started(CASES[2], "linen", None)
    ours.adapt()
    lora_ = {"lora": ours.variables["lora"]}
    b = {k: np.asarray(x) for k, x in jaxadapt.extract(ours.tree).flat().items() if k.endswith("_B")}
    grads = jax.tree.map(jnp.ones_like, lora_)
    for tx in (
        optax.adamw(0.1, weight_decay=0.5, mask=optim.decay_mask(lora_)),
        optim.lora_plus(lora_, optax.adamw, 0.1, 16, weight_decay=0.5),
    ):
        zero = jax.tree.map(lambda g, role: g * (role != "frozen"), grads, optim.roles(lora_))
        updates, _ = tx.update(zero, tx.init(lora_), lora_)
        moved = jaxadapt.extract({**ours.variables, **optax.apply_updates(lora_, updates)}).flat()
        for path, x in moved.items():
            assert np.array_equal(x, b[path]) if path in b else np.asarray(x).any(), path
    with pytest.raises(jaxadapt.ConfigError, match="its B is frozen"):
        optim.lora_fa(lora_, optax.adamw(0.1))
