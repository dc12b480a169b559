"""LOKR where PEFT cannot be asked: a tensor for the window of a 1-D convolution, sizes, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxadapt
from jaxadapt import ConfigError, KeyMap, LoKrConfig, Weight
from jaxadapt.adapters import initial_values, selection
from jaxadapt.adapters.adapter import make_file_plan
from jaxadapt.methods import AppliedMethod
from jaxadapt.methods.matrix import split_size

LINEAR = Weight("w", "a.q.weight", "i o -> o i")
CONV = Weight("w", "a.q.weight", "x i o -> o i x", kind="conv")
KEY = "base_model.model.a.q."


def sites_of(config: Any, weight: Weight = LINEAR, shape: Any = (8, 16), found: Any = None) -> Any:
    return selection.select_sites(config, KeyMap("t", (weight,)), {"w": shape}, found=found)


def test_a_tensor_for_the_window_of_a_1d_convolution():
    """PEFT makes the tensors, but torch's Kronecker product fails on them. The formula, entry by entry."""
    config = LoKrConfig(r=1, alpha=3, target_modules=["q"], use_effective_conv2d=True, decompose_both=True)
    found = sites_of(config, CONV, (3, 12, 20))
    shapes = {t.name: e.form.file_shape for t, e in zip(found[0].tensors, found[0].entries, strict=True)}
    assert shapes == {
        "lokr_w1_a": (4, 1), "lokr_w1_b": (1, 3), "lokr_t2": (1, 1, 3, 1), "lokr_w2_a": (1, 5), "lokr_w2_b": (1, 4),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    file = {f"{KEY}{name}": rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}
    plan = make_file_plan(found)
    values = {path.rpartition(".")[2]: x for path, x in plan.decode(file).items()}
    t = {name: file[f"{KEY}{name}"] for name in shapes}
    w1 = t["lokr_w1_a"] @ t["lokr_w1_b"]
    w = rng.standard_normal((3, 12, 20)).astype("f4")
    want = w.copy()
    for x, i, o in np.ndindex(3, 12, 20):
        inner = t["lokr_t2"][0, 0, x, 0] * t["lokr_w2_a"][0, o % 5] * t["lokr_w2_b"][0, i % 4]
        want[x, i, o] += 3 * w1[o // 5, i // 4] * inner
    site = found[0]
    got = AppliedMethod(site.method, site.hparams, values, site.axes).weight(jnp.asarray(w))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # float32 in another order
    fresh = initial_values.init_values(config, found, jax.random.key(0))
    assert not np.asarray(fresh["w.lokr_w1_a"]).any()


@pytest.mark.peft
def test_sizes_are_split_as_peft_splits_them():
    factorization = pytest.importorskip("peft.tuners.lokr.layer").factorization
    for size in (*range(1, 130), 576, 1024, 4096, 11008):
        for factor in (-2, -1, 0, 1, 2, 3, 5, 7, 8, 16, 60):
            assert split_size(size, factor) == factorization(size, factor), (size, factor)


def test_what_does_not_fit_is_refused():
    stacked = Weight("w", "h.{l}.q.weight", "i {l} o -> o i")
    config = LoKrConfig(r=1, target_modules=["q"], rank_pattern={"0.q": 4})
    with pytest.raises(ConfigError, match=r"w: the ranks \[1, 4\] of its modules decompose their matrices differently"):
        sites_of(config, stacked, (8, 2, 16))
    volume = Weight("w", "a.q.weight", "x y z i o -> o i x y z", kind="conv")
    with pytest.raises(ConfigError, match="1-D and 2-D convolutions only"):
        sites_of(LoKrConfig(target_modules=["q"]), volume, (3, 3, 3, 4, 4))
    with pytest.raises(ConfigError, match='init_weights: expected true, false or "lycoris"'):
        LoKrConfig(init_weights="pissa")


FULL = {"lokr_w1": (2, 2), "lokr_w2": (8, 4)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({**FULL, "lokr_w2": (8, 3)}, "Kronecker product of the adapter's matrices has shape (16, 6), but the weight"),
        ({**FULL, "lokr_w2_a": (8, 1), "lokr_w2_b": (1, 4)}, "has lokr_w2 and lokr_w2_a, which exclude each other"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (8, 1)}, "lokr_w2_b"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (8, 3), "lokr_w2_b": (3, 4)}, "lokr_w2_a"),
    ],
)
def test_a_file_that_contradicts_itself_or_the_model_is_refused(shapes: Any, message: str):
    tensors = {f"{KEY}{name}": np.ones(shape, "f4") for name, shape in shapes.items()}
    file = jaxadapt.PeftTensors(LoKrConfig(r=1, target_modules=["q"]), tensors)
    base = {"a": {"q": {"kernel": jnp.ones((8, 16))}}}
    with pytest.raises(jaxadapt.MismatchError, match=re.escape(message)):
        jaxadapt.from_peft(file, base)


def test_a_file_decides_which_matrices_are_decomposed():
    """LyCORIS's files have other factors than PEFT would choose."""
    tensors = {f"{KEY}{name}": np.ones(shape, "f4") for name, shape in FULL.items()}
    file = jaxadapt.PeftTensors(LoKrConfig(r=1, target_modules=["q"]), tensors)
    adapter = jaxadapt.from_peft(file, {"a": {"q": {"kernel": jnp.ones((8, 16))}}})
    again = jaxadapt.to_peft(adapter).tensors
    assert {key: x.shape for key, x in again.items()} == {key: x.shape for key, x in tensors.items()}


@pytest.mark.peft
def test_the_scale_divides_by_the_rank_of_the_module_as_in_peft():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    fields = {"r": 2, "alpha": 6, "rank_pattern": {"b": 3}, "target_modules": ["a", "b"], "init_weights": False}
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    for name in "ab":
        net.add_module(name, torch.nn.Linear(16, 16))
    base = {name: {"kernel": np.array(getattr(net, name).weight.detach().numpy().T)} for name in "ab"}
    model = peft.get_peft_model(net, peft.LoKrConfig(**fields))
    state = {key: x.numpy().copy() for key, x in peft.get_peft_model_state_dict(model).items()}
    ours = jaxadapt.merge(base, jaxadapt.from_peft(jaxadapt.PeftTensors(LoKrConfig(**fields), state), base))
    model.merge_adapter()
    for name in "ab":
        want = getattr(net, name).base_layer.weight.detach().numpy().T
        np.testing.assert_allclose(ours[name]["kernel"], want, rtol=1e-5, atol=1e-5)  # float32 in another order
