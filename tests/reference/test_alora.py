"""aLoRA: PEFT finds the invocation sequence in the tokens of a call; here `invoke` does, and what it finds is data."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import torch
from peft.tuners.lora.variants import calculate_alora_offsets

import jaxadapt
from tests.support import peft_harness as harness
from tests.support.twins import llama

pytestmark = pytest.mark.peft

SEQUENCE = [7, 9]
FIELDS: dict[str, Any] = {
    "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], "alora_invocation_tokens": SEQUENCE,
}  # fmt: skip
# once, twice, not at all, at the end, and broken off
IDS = np.random.RandomState(0).randint(10, 64, (5, 8))
IDS[0, 2:4] = IDS[1, 1:3] = IDS[1, 4:6] = IDS[3, 6:8] = SEQUENCE
IDS[4, 7] = SEQUENCE[0]
OTHERS = IDS[::-1].copy()
TWINS = [("nnx", False), ("nnx", True), ("linen", True)]


@functools.cache
def theirs() -> Any:
    return harness.make_peft(llama.torch_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **FIELDS))


class Twin:
    """Our Llama with PEFT's file in it, or a fresh adapter."""

    def __init__(self, api: str, scan: bool, folder: Any) -> None:
        made = llama.twin_of(llama.torch_llama(), api, scan=scan)
        self.api = api
        if api == "nnx":
            self.base, self.tree = made, jaxadapt.load(folder, made)
        else:
            self.tree = jaxadapt.load(folder, made[1])
            self.module = jaxadapt.adapt(made[0], jaxadapt.extract(self.tree).config)

    def run(self, tree: Any, ids: Any, tokens: Any) -> Any:
        if self.api == "nnx":
            with jaxadapt.models.invoke(tree, tokens):
                return tree(ids)
        with jaxadapt.models.invoke(self.module, tokens) as module:
            return module.apply(tree, ids)


def mask_of(ids: Any) -> Any:
    """The tokens from the last sequence on, as PEFT finds them."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=SEQUENCE)
    offsets = calculate_alora_offsets({"default": config}, "default", torch.from_numpy(ids))
    return jnp.arange(ids.shape[1])[None] >= ids.shape[1] - jnp.array([n or 0 for n in offsets])[:, None]


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * abs(np.asarray(wanted)).max())


@pytest.mark.parametrize(("api", "scan"), TWINS)
def test_outputs_gradients_and_files_are_pefts(api, scan, tmp_path):
    model = theirs()
    harness.save(model, tmp_path / "peft")
    twin, traces = Twin(api, scan, tmp_path / "peft"), []

    def loss(params: Any, rest: Any, ids: Any) -> Any:
        traces.append(ids)
        # (Variables of the trace that asks.)
        own = jax.tree.map(lambda x: x, rest)
        tree = nnx.merge(graph, params, own) if api == "nnx" else {**rest, "lora": params}
        y = twin.run(tree, ids, ids)
        return jnp.mean(y**2), y

    if api == "nnx":
        graph, params, rest = nnx.split(twin.tree, jaxadapt.AdapterParam, ...)
    else:
        params, rest = twin.tree["lora"], {"params": twin.tree["params"]}
    step = jax.jit(jax.grad(loss, has_aux=True))
    for ids in (IDS, OTHERS):  # compiled once: which tokens are adapted is data
        slopes, y = step(params, rest, jnp.asarray(ids))
        model.zero_grad()
        out = model(input_ids=torch.from_numpy(ids)).logits
        out.square().mean().backward()
        close(y, out.detach())
        found = jaxadapt.to_peft(slopes if api == "nnx" else {"lora": slopes}).tensors
        expected = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys()
        for key, grad in expected.items():
            close(found[key], grad)
    assert len(traces) == 1
    bare = harness.logits(llama.torch_llama(), IDS)
    close(y[::-1][2], bare[2])  # the row without the sequence
    assert abs(np.asarray(y[::-1][0]) - bare[0]).max() > 1e-3
    # or a mask
    close(twin.run(twin.tree, jnp.asarray(IDS), mask_of(IDS)), y[::-1])
    jaxadapt.save(twin.tree, tmp_path / "ours")
    assert harness.read_json(tmp_path / "ours") == harness.read_json(tmp_path / "peft")
    mine, before = (harness.read_tensors(tmp_path / who) for who in ("ours", "peft"))
    assert all(np.array_equal(mine[key], x) for key, x in before.items())
    assert mine.keys() == before.keys()


def test_a_call_that_does_not_say_which_tokens_is_refused(tmp_path):
    """PEFT then runs the base alone, without a word. And there is no merged weight, nor a sum with others."""
    harness.save(theirs(), tmp_path)
    model = llama.twin_of(llama.torch_llama())
    base = nnx.state(model, nnx.Param)
    tree = jaxadapt.load(tmp_path, model)
    graph = nnx.graphdef(tree)
    with pytest.raises(jaxadapt.AttachError, match=r"within jaxadapt\.models\.invoke"):
        tree(IDS)
    with (
        pytest.raises(jaxadapt.AttachError, match=r"token ids have shape \[5, 6\] \(batch, time\)"),
        jaxadapt.models.invoke(tree, IDS[:, :6]),
    ):
        tree(IDS)
    assert nnx.graphdef(tree) == graph
    adapter = jaxadapt.extract(tree)
    with pytest.raises(jaxadapt.AttachError, match="no single effective weight"):
        jaxadapt.merge(nnx.to_pure_dict(base), adapter)
    with pytest.raises(jaxadapt.ConfigError, match="alora_invocation_tokens"):
        jaxadapt.combine([adapter], [1.0])
    refused = pytest.raises(jaxadapt.AttachError, match="expected token ids or a boolean mask")
    with refused, jaxadapt.models.invoke(tree, IDS * 1.0):
        pass
    jaxadapt.activate(tree)
    refused = pytest.raises(jaxadapt.AttachError, match="no active adapter is an aLoRA")
    with refused, jaxadapt.models.invoke(tree, IDS):
        pass


ODD = [{"use_dora": True}, {"target_modules": ["embed_tokens"]}, {"init_lora_weights": "mica"}]


@pytest.mark.parametrize("more", ODD)
def test_what_peft_has_no_alora_for(more):
    fields = FIELDS | more
    with pytest.raises(ValueError):
        peft.get_peft_model(llama.torch_llama(tied=False), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    with pytest.raises(jaxadapt.ConfigError, match="alora_invocation_tokens with"):
        jaxadapt.initializers.start(
            llama.twin_of(llama.torch_llama()), jaxadapt.LoraConfig(**fields), key=jax.random.key(0)
        )
