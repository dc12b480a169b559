"""Files and configurations of prompts that do not fit: a named error with the way out."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxadapt
from jaxadapt import ConfigError, MismatchError
from jaxadapt.demo import llama
from jaxadapt.demo.llama import LlamaConfig

SIZES = LlamaConfig(
    vocab_size=16, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
)
TOKENS = jnp.array([[3, 1, 4, 1]])
PROMPT = jaxadapt.PromptTuningConfig(num_virtual_tokens=3, token_dim=8)
PREFIX = jaxadapt.PrefixTuningConfig(num_virtual_tokens=3, token_dim=4, num_layers=2, num_attention_heads=1)


def model() -> Any:
    return nnx.eval_shape(lambda: llama.Llama(SIZES, rngs=nnx.Rngs(0)))


def call(folder: Path) -> Any:
    """Trace a call of the model with a folder's adapter."""
    graphdef, state = nnx.split(jaxadapt.load(folder, model()))
    return jax.eval_shape(lambda state: nnx.merge(graphdef, state)(TOKENS), state)


def write(folder: Path, config: Any, **tensors: tuple[int, ...]) -> Path:
    values = {name.replace("__", "."): np.ones(shape, np.float32) for name, shape in tensors.items()}
    jaxadapt.write(jaxadapt.PeftTensors(config, values, "these"), folder)
    return folder


def test_a_prompt_for_another_width(tmp_path: Path) -> None:
    folder = write(tmp_path, PROMPT.replace(token_dim=6), prompt_embeddings=(3, 6))
    with pytest.raises(MismatchError, match=r"virtual tokens have the shape \(3, 6\).*width of the base"):
        call(folder)


def test_a_prefix_for_other_heads_or_layers(tmp_path: Path) -> None:
    wide = write(tmp_path / "wide", PREFIX.replace(token_dim=6), prompt_embeddings=(3, 24))
    with pytest.raises(MismatchError, match=r"width 6 \(token_dim\), but those of the model have 1 heads of size 4"):
        call(wide)
    deep = write(tmp_path / "deep", PREFIX.replace(num_layers=3), prompt_embeddings=(3, 24))
    with pytest.raises(jaxadapt.AttachError, match=r"3 attention layers \(num_layers\), and this call.* computes 2"):
        call(deep)


def test_a_cross_attention_that_takes_a_prefix_too() -> None:
    """It is not taken for a layer of a decoder with fewer layers than the encoder."""

    class Pair(nnx.Module):
        def __init__(self, marked: bool) -> None:
            self.embed, self.marked = nnx.Embed(16, 8, rngs=nnx.Rngs(0)), marked

        def __call__(self, tokens: Any, decoder_tokens: Any, decoder_positions: Any = None) -> Any:
            x, y = (self.embed(each)[:, :, None] for each in (tokens, decoder_tokens))
            y = y + jaxadapt.models.attention(y, y, y, is_causal=True)
            return y + jaxadapt.models.attention(y, x, x, prefix=not self.marked)

    config = PREFIX.replace(task_type="SEQ_2_SEQ_LM", token_dim=8, num_layers=4)
    for marked, text in ((False, "computes 2 with a prefix, and 0 without one"), (True, None)):
        net = jaxadapt.adapt(Pair(marked), config, rngs=nnx.Rngs(1))
        with contextlib.nullcontext() if text is None else pytest.raises(jaxadapt.AttachError, match=text):
            net(TOKENS, TOKENS)


def test_tensors_that_are_missing_unknown_or_of_another_shape(tmp_path: Path) -> None:
    short = write(tmp_path / "short", PROMPT, prompt_embeddings=(2, 8))
    with pytest.raises(MismatchError, match=r"prompt_embeddings: expected \[3, 8\], found \[2, 8\]"):
        jaxadapt.load(short, model())
    tasks = jaxadapt.MultitaskPromptTuningConfig(num_virtual_tokens=3, token_dim=8, num_tasks=2)
    missing = write(tmp_path / "missing", tasks, prompt_embeddings=(3, 8), prefix_task_cols=(2, 3, 1))
    with pytest.raises(MismatchError, match=r"1 missing from .*\n  prefix_task_rows"):
        jaxadapt.load(missing, model())
    more = write(tmp_path / "more", PROMPT, prompt_embeddings=(3, 8), base_model__other__weight=(2, 2))
    with pytest.raises(MismatchError, match=r"(?s)unexpected.*base_model\.other\.weight"):
        jaxadapt.load(more, model())


def test_fields_that_contradict_each_other() -> None:
    for fields, text in (
        (
            {"token_dim": 7, "num_attention_heads": 2},
            "token_dim: expected a multiple of num_attention_heads=2, found 7",
        ),
        ({"num_transformer_submodules": 3}, "num_transformer_submodules: expected 1, 2 or null"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: expected a positive integer"),
        ({"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text: expected a value"),
    ):
        with pytest.raises(ConfigError, match=text):
            jaxadapt.PromptTuningConfig(**{"num_virtual_tokens": 3, **fields})
    with pytest.raises(ConfigError, match="num_frozen_tokens: expected at most num_virtual_tokens=3"):
        jaxadapt.CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=4)
    assert jaxadapt.CartridgeConfig(num_virtual_tokens=3, num_frozen_tokens=3).num_frozen_tokens == 3


@pytest.mark.parametrize("tokens", [[], [[1, 2]], [0.5]])
def test_a_text_is_a_list_of_token_ids(tokens: Any) -> None:
    text = {"prompt_tuning_init_text": "a b", "tokenizer_name_or_path": "t"}
    config = PROMPT.replace(prompt_tuning_init="TEXT", **text)
    with pytest.raises(jaxadapt.AttachError, match="tokens: expected a list of token ids, found"):
        jaxadapt.initializers.start(model(), config, tokens)
