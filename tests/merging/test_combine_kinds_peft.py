"""`combine` on convolutions, tables of tokens and attention, beside PEFT's `add_weighted_adapter`."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

import peft
import torch
from peft.tuners.lora import LoraLayer

import jaxadapt
from jaxadapt.core import paths
from jaxadapt.merging import combination
from tests.reference import test_attention as attention
from tests.support import peft_pairs
from tests.support.twins import trees
from tests.support.twins.tiny import Net

pytestmark = [pytest.mark.peft, pytest.mark.filterwarnings("ignore:The density 1.0 is greater")]

NAMES, WEIGHTS = ["one", "two", "three"], [0.7, -0.4, 1.2]
NETS = {
    "conv1d": (Net("conv"), ["conv"]),
    "conv2d": (Net("conv", ndim=2), ["conv"]),
    "conv2d 1x1": (Net("conv", ndim=2, size=1, padding=0), ["conv"]),
    "conv3d": (Net("conv", ndim=3), ["conv"]),
    "embedding": (Net(emb=True), ["emb", "lin"]),
    "attention": (None, ["attn"]),
}


@functools.cache
def base_of(kind: str) -> tuple[Any, Any, jaxadapt.KeyMap]:
    """The network in torch, its parameters as ours, and the table between them."""
    net = NETS[kind][0]
    if net is None:
        return attention.torch_net(), trees.nest(attention.leaves()), attention.TABLE
    model = net.torch().eval()
    return model, trees.nest(net.leaves("linen", None, model)), net.table("linen")


@functools.cache
def adapted(kind: str, equal: bool) -> Any:
    """Three adapters of random values on one torch network; those that need equal ranks have them."""
    model: Any = None
    for i, name in enumerate(NAMES):
        config = peft.LoraConfig(r=3 if equal else 2 + i, lora_alpha=2 + i, target_modules=NETS[kind][1])
        if model is None:
            model = peft.get_peft_model(copy.deepcopy(base_of(kind)[0]), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def factors(tensors: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of each module, windows and all flattened."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, x in tensors.items():
        stem, side = key.replace("lora_embedding_", "lora_").removesuffix(".weight").rsplit(".lora_", 1)
        found.setdefault(stem, {})[side] = np.asarray(x, "float64")
    return {k: (v["A"].reshape(len(v["A"]), -1), v["B"].reshape(-1, v["B"].shape[1])) for k, v in found.items()}


def ours(model: Any, kind: str, name: str) -> jaxadapt.Adapter:
    tensors = peft_pairs.tensors_of(model, name)
    return jaxadapt.from_peft(tensors, base_of(kind)[1], keymap=base_of(kind)[2])


def drawn_masks(model: Any, kind: str, drawn: Any) -> list[Any]:
    """The masks that PEFT drew for A and B, module by module, in our layout."""
    files: dict[str, dict[str, np.ndarray]] = {n: {} for n in NAMES}
    drawn = iter(drawn)
    for path, module in model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        table = "one" in module.lora_embedding_A
        end = "" if table or isinstance(module, torch.nn.MultiheadAttention) else ".weight"
        for side, n in itertools.product("AB", NAMES):
            files[n][f"{peft_pairs.PREFIX}{path}.lora_{'embedding_' if table else ''}{side}{end}"] = next(drawn)
    assert next(drawn, None) is None
    held = [jaxadapt.PeftTensors(peft_pairs.tensors_of(model, n).config, files[n]) for n in NAMES]
    return [jaxadapt.from_peft(tensors, base_of(kind)[1], keymap=base_of(kind)[2]).params for tensors in held]


SVD = [m for m in combination.OPERATORS if m.endswith("svd") and "dare" not in m]  # (DARE's masks of ΔW: test_combine)
FACTORS = [m for m in combination.OPERATORS if not m.endswith("svd")]


WHERE = [(k, m) for k in NETS for m in FACTORS + SVD if k not in ("conv1d", "conv3d") or m in ("cat", "dare_ties")]


@pytest.mark.parametrize(("kind", "method"), WHERE)
def test_equal_to_peft(kind, method):
    given: dict[str, Any] = {"density": 0.5} if method.startswith(("ties", "dare", "magnitude")) else {}
    given |= {"svd_rank": 3} if method.endswith("svd") else {}
    model = copy.deepcopy(adapted(kind, method in FACTORS and method != "cat"))
    with peft_pairs.recorded_bernoulli() as drawn:
        model.add_weighted_adapter(NAMES, WEIGHTS, "mix", combination_type=method, **given)
    adapters = [ours(model, kind, name) for name in NAMES]
    more = {"masks": drawn_masks(model, kind, drawn)} if "dare" in method else {}
    mix = jaxadapt.combine(adapters, WEIGHTS, method=method, **given, **more)
    theirs = peft_pairs.tensors_of(model, "mix")
    assert mix.config == theirs.config
    mine = jaxadapt.to_peft(mix).tensors
    wanted = {k: x for k, x in theirs.tensors.items() if "base_layer.weight" not in k}
    assert {k: x.shape for k, x in mine.items()} == {k: x.shape for k, x in wanted.items()}
    found, wanted = factors(mine), factors(wanted)
    assert found.keys() == wanted.keys()
    for module, (a, b) in wanted.items():
        if not method.endswith("svd"):  # the factors are determined
            np.testing.assert_allclose(found[module][0], a, rtol=2e-5, atol=2e-6, err_msg=module)
            np.testing.assert_allclose(found[module][1], b, rtol=2e-5, atol=2e-6, err_msg=module)
        most = np.abs(b @ a).max()
        product = found[module][1] @ found[module][0]
        np.testing.assert_allclose(product, b @ a, rtol=2e-5, atol=5e-6 * most, err_msg=module)


def test_where_peft_has_none():
    """Its SVD takes no windows of one or three axes, and nothing of target_parameters; test_combine_kinds has ours."""
    for kind in ("conv1d", "conv3d"):
        with pytest.raises(RuntimeError):
            copy.deepcopy(adapted(kind, False)).add_weighted_adapter(NAMES, WEIGHTS, "mix", combination_type="svd")
    config = peft.LoraConfig(r=2, target_modules=["head"], target_parameters=["layers.0.lin.weight"])
    model = peft.get_peft_model(Net().torch(), config, adapter_name="one")
    with pytest.raises(ValueError, match="does not support targeting"):
        model.add_weighted_adapter(["one"], [1.0], "mix", combination_type="cat")


def test_queries_keys_and_values_stay_one_matrix():
    """They share an A in the file: of another rank they share one still. Inside jit nobody can tell that they do."""
    adapter = ours(adapted("attention", True), "attention", "one")
    smaller, lost = jaxadapt.merging.resize_rank(adapter, 2)
    tensors = jaxadapt.to_peft(smaller).tensors
    for module, (a, b) in factors(jaxadapt.to_peft(adapter).tensors).items():
        u, s, vh = np.linalg.svd((2 / 3) * b @ a)  # alpha 2, rank 3
        best = u[:, :2] * s[:2] @ vh[:2]
        mine = factors(tensors)[module]
        np.testing.assert_allclose(mine[1] @ mine[0], best, atol=5e-6 * s[0])
        assert lost[module.removeprefix(peft_pairs.PREFIX)] == pytest.approx(s[2] / np.linalg.norm(s), rel=1e-4)
    with pytest.raises(jaxadapt.AttachError, match="cannot compare these A and B tensors inside jit"):
        jax.jit(lambda a: jaxadapt.combine([a], [1.0], method="svd"))(adapter)
    apart = [jax.tree.map(lambda x, i=i: x + 0.01 * (i + 1), adapter) for i in range(2)]
    flat = {p: x + 0.1 * ("query" in p) for p, x in apart[0].flat().items()}
    apart[0] = jaxadapt.Adapter(apart[0].config, paths.unflatten(flat), apart[0].keymap)
    mix = jaxadapt.combine(apart, [1.0, 0.5], method="svd", svd_rank=6)  # each of them a matrix by itself
    base = jax.tree.map(np.zeros_like, base_of("attention")[1])
    sums = [paths.flatten(jaxadapt.merge(base, a)) for a in (*apart, mix)]
    for path, x in sums[2].items():
        np.testing.assert_allclose(x, sums[0][path] + 0.5 * sums[1][path], atol=1e-5)
