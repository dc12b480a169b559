"""A tiny Llama with a tokenizer of bytes, its adapters, and a server of both, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from safetensors.numpy import save_file

import jaxadapt
from jaxadapt.demo import llama
from jaxadapt.demo.llama import LlamaConfig
from jaxadapt.server import app
from jaxadapt.server.engine import Base, open_base

CONFIG = LlamaConfig(
    vocab_size=260, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    max_position_embeddings=128,
)  # fmt: skip
NAMES = ("de", "fr", "it")
LENGTH, ROWS = 64, 3


def make_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: np.ones(shape, "f4") if len(shape) == 1 else rng.standard_normal(shape, "f4")
        for name, shape in llama.hf_shapes(CONFIG).items()
    }


def write_base(folder: Path) -> Path:
    """A folder as Hugging Face's: the vocabulary is the 256 bytes, three special tokens, and one that is unused."""
    folder.mkdir()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({**CONFIG.to_hf(), "eos_token_id": 256}))
    save_file(make_weights(), folder / "model.safetensors")
    return folder


def write_adapter(folder: Path, seed: int, base: Base, **fields: Any) -> Path:
    """An adapter that changes the answers."""
    config = jaxadapt.LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **fields
    )
    model = llama.to_nnx(base.config, base.weights)
    jaxadapt.save(jaxadapt.init(model, config, key=jax.random.key(seed)), folder)
    return folder


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return open_base(write_base(tmp_path_factory.mktemp("server") / "tiny"))


@pytest.fixture(scope="package")
def root(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        write_adapter(folder / name, seed, base)
    (folder / "broken").mkdir()
    (folder / "broken" / "adapter_config.json").write_text("{")
    return folder


@pytest.fixture(scope="package")
def server(base: Base, root: Path) -> Iterator[Any]:
    with pytest.warns(UserWarning, match="requests for 'broken' will fail: .*no adapter_model.safetensors"):
        made = app.make_server(base, root, rows=ROWS, length=LENGTH, rank=2, queue=4)
    yield made
    made.engine.close()
    made.pool.close()


call = nnx.jit(lambda model, tokens: model(tokens))


def alone(base: Base, folder: Path | None, prompt: str | list[int], count: int) -> list[int]:
    """The greedy answer of the uncached model, with one adapter loaded by `jaxadapt.load`."""
    model = llama.to_nnx(base.config, base.weights)
    model = model if folder is None else jaxadapt.load(folder, model)
    tokens = base.encode(prompt) if isinstance(prompt, str) else [*prompt]
    for _ in range(count):
        padded = np.zeros((1, LENGTH), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.asarray(call(model, padded))[0, len(tokens) - 1].argmax()))
    return tokens[-count:]
