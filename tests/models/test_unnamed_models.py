"""A library's model that no keymap matches is refused: PEFT loads an adapter with other names without effect.

The models here have the leaves of Bonsai's LLaDA (commit 3628425), and say that they are of that library.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jaxadapt
from jaxadapt import KeyMapError
from jaxadapt.models import LoraTree

CONFIG = jaxadapt.LoraConfig(r=2, target_modules=["q_proj"])
LIBRARY = "bonsai.models.llada.modeling"
REFUSED = r"no keymap has the names of [\w.]+\.{} in PyTorch(.|\n)*keymap='generic'"


class Own(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([nnx.Dict(attn=nnx.Dict(q_proj=nnx.Linear(4, 6, use_bias=False, rngs=rngs)))])

    def __call__(self, x: Any) -> Any:
        return self.blocks[0].attn.q_proj(x)


class Llada(Own):
    __module__ = LIBRARY


class Finetuned(Llada):
    """A class of the user's own, with the leaves of the library's."""


class LinenLlada(nn.Module):
    __module__ = LIBRARY

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(6, name="q_proj")(x)


@pytest.mark.parametrize("cls", [Llada, Finetuned])
def test_an_nnx_model_is_refused_until_generic_names_are_asked_for(cls, tmp_path):
    with pytest.raises(KeyMapError, match=REFUSED.format(cls.__name__)):
        jaxadapt.adapt(cls(nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))
    model = jaxadapt.adapt(cls(nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1), keymap="generic")
    jaxadapt.save(model, tmp_path)
    assert set(jaxadapt.read(tmp_path).tensors) == {
        f"base_model.model.blocks.0.attn.q_proj.lora_{x}.weight" for x in "AB"
    }
    with pytest.raises(KeyMapError, match="no keymap has the names"):
        jaxadapt.load(tmp_path, cls(nnx.Rngs(0)))
    jaxadapt.load(tmp_path, cls(nnx.Rngs(0)), keymap="generic")


class InOwnFile(Own):
    """In a file gemma.py, which is not the package."""

    __module__ = "gemma"


@pytest.mark.parametrize("cls", [Own, InOwnFile])
def test_a_model_of_ones_own_has_the_names_of_its_paths(cls, tmp_path):
    jaxadapt.save(jaxadapt.adapt(cls(nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1)), tmp_path)
    assert len(jaxadapt.read(tmp_path).tensors) == 2


def test_a_linen_module_is_refused():
    x = jnp.ones((1, 4))
    with pytest.raises(KeyMapError, match=REFUSED.format("LinenLlada")):
        jaxadapt.adapt(LinenLlada(), CONFIG).init(jax.random.key(0), x)
    assert "lora" in jaxadapt.adapt(LinenLlada(), CONFIG, keymap="generic").init(jax.random.key(0), x)


def test_lora_of_another_library_in_such_a_model_is_refused():
    model = Llada(nnx.Rngs(0))
    attention = model.blocks[0].attn
    attention.q_proj = nnx.LoRALinear(4, 6, lora_rank=2, use_bias=False, rngs=nnx.Rngs(1))
    tree = LoraTree(model, lora_alpha=2)
    with pytest.raises(KeyMapError, match=REFUSED.format("Llada")):
        jaxadapt.to_peft(tree)
