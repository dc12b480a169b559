"""A file of an nn.MultiheadAttention, for a model whose table lacks its lines: the error names the way out."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import jaxadapt  # noqa: E402
from jaxadapt import KeyMap, Weight  # noqa: E402

pytestmark = pytest.mark.peft


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = torch.nn.Linear(8, 4)


def params():
    heads = {name: {"kernel": np.ones((8, 2, 4)), "bias": np.ones((2, 4))} for name in ("query", "key", "value")}
    out = {"kernel": np.ones((2, 4, 8)), "bias": np.ones(8)}
    return {"attn": {**heads, "out": out}, "head": {"kernel": np.ones((8, 4)), "bias": np.ones(4)}}


@pytest.mark.parametrize("targets", [["attn"], ["attn", "head"]])
@pytest.mark.filterwarnings("ignore:target_modules. 'attn' matches no module")
def test_the_error_names_the_lines_and_they_serve(targets, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(Net(), config).save_pretrained(tmp_path)
    tensors = jaxadapt.read(tmp_path)
    with pytest.raises(
        jaxadapt.AdapterError, match=r"Weight\.attention\(path in JAX, name in PyTorch\)(.|\n)*\n  attn$"
    ):
        jaxadapt.from_peft(tensors, params())
    head = Weight("head.kernel", "head.weight", "i o -> o i")
    table = KeyMap("mine", (*Weight.attention("attn", "attn"), head))
    some = {key: x for key, x in tensors.tensors.items() if "lora_B" not in key}
    with pytest.raises(jaxadapt.MismatchError, match="missing") as caught:
        jaxadapt.from_peft(dataclasses.replace(tensors, tensors=some), params(), keymap=table)
    assert "Weight.attention" not in str(caught.value)
    adapter = jaxadapt.from_peft(tensors, params(), keymap=table)
    back = jaxadapt.to_peft(adapter)
    assert set(back.tensors) == set(tensors.tensors)
    assert all(np.array_equal(back.tensors[key], x) for key, x in tensors.tensors.items())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(adapter))
