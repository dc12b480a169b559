"""Reinforcement learning whose server gets the new weights at each step in memory, by `jaxadapt.to_peft`.

    python examples/rl_weights.py                # 15 seconds; writes the last adapter to out/rl_weights

The trainer has a Llama in NNX with a LoRA. The server has a base of its own, a bank with one slot for the policy, and a
decoder with a cache. The reward of an answer is its share of even tokens; REINFORCE raises it. The server takes PEFT's
names and layouts, so a server of another library can take its place. It prints

    step 1: reward 0.47
    ...
    step 12: reward 0.91
    a server without the newest weights: policy: applied otherwise: 0.0812 nats from the expected log-probabilities, ...
    with them: policy: applied: 1.84e-07 nats from the expected log-probabilities, with a noise of 0.0001
    refused: out/rl_weights: the adapter was trained on another base: 4 of 4 compared weights differ, ...
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxadapt
from jaxadapt import serving
from jaxadapt.analysis import compare_logprobs
from jaxadapt.demo.llama import Llama, LlamaConfig

SIZE = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8
)
LORA = jaxadapt.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
PROMPTS, TOKENS = [[token] for token in range(16)], 8


def base(seed: int = 0) -> Llama:
    return Llama(SIZE, rngs=nnx.Rngs(seed))


class Server:
    """A base and one slot; it knows nothing of the trainer's model."""

    def __init__(self) -> None:
        self.model = base()
        self.bank = serving.create(self.model, LORA, slots=2)  # slot 0 is the base
        serving.attach(self.model, self.bank)
        forward, state = serving.nnx_forward(self.model)
        select = lambda ids: self.bank.select(ids)  # noqa: E731 (of the newest bank)
        self.decoder = serving.Decoder(SIZE, forward, state, rows=16, length=16, select=select)

    def receive(self, tensors: jaxadapt.PeftTensors) -> None:
        """Put new weights into the slot. Nothing is compiled again."""
        self.bank = serving.put(self.bank, 1, jaxadapt.from_peft(tensors, self.model))

    def answer(self, seed: int) -> np.ndarray:
        """Return prompts and sampled answers, int32 (rows, 1 + TOKENS)."""
        sampling = serving.Sampling(temperature=1.0, seed=seed)
        answers = self.decoder.generate(PROMPTS, max_tokens=TOKENS, sampling=sampling, slots=[1] * len(PROMPTS))
        return np.array([prompt + answer for prompt, answer in zip(PROMPTS, answers, strict=True)], np.int32)

    def score(self, texts: np.ndarray, slot: int) -> list[np.ndarray]:
        """Return the log-probabilities of the tokens of each text, without the first token."""
        scores = (self.decoder.start(0, text, serving.Sampling(scores=True), slot)[2] for text in texts.tolist())
        return [each.logprobs[: texts.shape[1] - 1] for each in scores if each is not None]


@nnx.jit
def score(model: Llama, texts: jax.Array) -> jax.Array:
    """Return the log-probabilities (rows, TOKENS) in the trainer's model."""
    logits = jax.nn.log_softmax(model(texts)[:, :-1])
    return jnp.take_along_axis(logits, texts[:, 1:, None], axis=-1)[..., 0]


@nnx.jit
def train_step(model: Llama, optimizer: nnx.Optimizer, texts: jax.Array, rewards: jax.Array) -> None:
    def loss(model: Llama) -> jax.Array:
        return -((rewards - rewards.mean())[:, None] * score(model, texts)).mean()

    optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, jaxadapt.AdapterParam))(model))


def main(folder: Path, steps: int = 12) -> list[float]:
    """Train, and return the mean reward of each step."""
    model, plain, server, history = jaxadapt.adapt(base(), LORA, rngs=nnx.Rngs(1)), base(), Server(), list[float]()
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=jaxadapt.AdapterParam)
    for step in range(1, steps + 1):
        server.receive(jaxadapt.to_peft(model))
        texts = server.answer(seed=1000 * step)
        rewards = (texts[:, 1:] % 2 == 0).mean(axis=1)
        train_step(model, optimizer, texts, rewards)
        history.append(float(rewards.mean()))
        print(f"step {step}: reward {history[-1]:.2f}")

    expected = {"base": score(plain, texts), "policy": score(model, texts)}
    for what in ("a server without the newest weights", "with them"):
        if what == "with them":
            server.receive(jaxadapt.to_peft(model))
        served = {"base": server.score(texts, 0), "policy": server.score(texts, 1)}
        print(f"{what}: {compare_logprobs(served, expected)[0]}")

    # A server in another process or on another machine reads files. They carry a fingerprint of the base.
    jaxadapt.save(model, folder)
    again = jaxadapt.load(folder, base(), strict="base")
    assert np.allclose(score(again, texts), expected["policy"], atol=1e-5)
    try:
        jaxadapt.load(folder, base(seed=7), strict="base")
    except jaxadapt.MismatchError as error:
        print(f"refused: {error}")
    return history


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/rl_weights"))
