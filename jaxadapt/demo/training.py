"""Training of an adapter on SmolLM2, in NNX and in Linen, with the same interface."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxadapt
from jaxadapt import initializers, methods
from jaxadapt.configs import Config, CPTConfig, PromptTuningConfig
from jaxadapt.configs.base import class_of
from jaxadapt.core.errors import ConfigError
from jaxadapt.demo import llama_linen, llama_nnx
from jaxadapt.demo.llama import PROJECTIONS, LlamaConfig, Tensor
from jaxadapt.methods.prompt import BaseSizes, PromptMethod
from jaxadapt.training import optim

Weights = Mapping[str, Tensor]
MakeOptimizer = Callable[[Any], optax.GradientTransformation]
APIS = ("nnx", "linen")


def method_names() -> list[str]:
    """Return the methods that the demo can train, in lower case."""
    return sorted(methods.COLLECTIONS)


def adapter_config(method: str) -> Any:
    """Return the demo's configuration of a method: on all seven projections, with the fields in its facts.

    Raises:
        ConfigError: the method is unknown.
    """
    cls = class_of(method.upper())
    if cls is None:
        raise ConfigError(f"method: expected one of {', '.join(method_names())}, found {method!r}")
    known = {item.name for item in dataclasses.fields(cls)}
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": list(PROJECTIONS), "num_virtual_tokens": 16}
    return cls(**{name: value for name, value in fields.items() if name in known} | dict(cls.facts.demo))


def optimizer(method: str, steps: int, decays: Any) -> optax.GradientTransformation:
    """Return AdamW with a short warm-up and a cosine decay over `steps`, with the learning rate of the method's facts.

    `decays` is `optim.decay_mask` of the trained tree. Weight decay is for matrices only: it would pull vectors such as
    IA3's, which start at one, to zero.
    """
    peak = adapter_config(method).facts.learning_rate
    warmup = min(5, max(1, steps // 4))
    schedule = optax.warmup_cosine_decay_schedule(peak / 10, peak, warmup, max(steps, warmup + 1), peak / 10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01, mask=decays))


def complete_config(config: Config, base: LlamaConfig) -> Any:
    """Return a configuration with the sizes of the base that a prompt needs."""
    method = methods.get_method(config)
    sizes = BaseSizes(base.hidden_size, base.num_layers, base.num_heads, base.num_kv_heads, base.head_dim)
    return method.complete(config, sizes) if isinstance(method, PromptMethod) else config


def start_adapter(config: Config, base: Any, seed: int) -> jaxadapt.Adapter:
    """Return a new adapter for base parameters or an NNX model's state; a prompt may start from embeddings."""
    key = jax.random.key(seed)
    if isinstance(config, PromptTuningConfig | CPTConfig):
        return initializers.start(config, base, key=key).adapter
    return jaxadapt.init(config, base, key=key)


@contextlib.contextmanager
def for_rows(model: Any, config: Config, batch: int) -> Generator[Any]:
    """Yield the model for a batch of text, which belongs to task 0 if the adapter has tasks."""
    if config.get("num_tasks") is None:
        yield model
        return
    with jaxadapt.models.invoke(model, task_ids=jnp.zeros(batch, jnp.int32)) as called:
        yield called


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the mean cross-entropy, in nats, of each token (B, T) given the previous ones; logits (B, T, V)."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return jnp.mean(losses)


class Trainer(Protocol):
    """A base model with an adapter, and an optimizer for the adapter only."""

    def step(self, tokens: np.ndarray) -> float:
        """Train one step on tokens (B, T) and return the loss before it."""
        ...

    def loss(self, tokens: np.ndarray) -> float:
        """Return the loss on tokens (B, T)."""
        ...

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return the logits (B, T, V) in float32."""
        ...

    def save(self, out: Path, base_model: str) -> None:
        """Write the adapter."""
        ...

    def adapter_size(self) -> int:
        """Return the number of trained parameters."""
        ...


class NnxTrainer:
    """A trainer of the NNX model, adapted in place."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights,
        adapter: Any,
        make: MakeOptimizer,
        seed: int,
    ) -> None:
        self.model = llama_nnx.to_nnx(config, weights)
        if isinstance(adapter, PromptTuningConfig | CPTConfig):
            initializers.start(adapter, self.model, key=jax.random.key(seed))
        else:
            jaxadapt.adapt(self.model, adapter, rngs=nnx.Rngs(seed))
        state = nnx.state(self.model, jaxadapt.AdapterParam)
        self.optimizer = nnx.Optimizer(self.model, make(optim.decay_mask(state)), wrt=jaxadapt.AdapterParam)

        def logits(model: Any, tokens: jax.Array) -> jax.Array:
            with for_rows(model, adapter, len(tokens)) as called:
                return called(tokens)[:, -tokens.shape[1] :]  # those of virtual tokens come first

        def loss(model: Any, tokens: jax.Array) -> jax.Array:
            return next_token_loss(logits(model, tokens), tokens)

        # Flax's default filter, nnx.Param, also selects the base, so pass AdapterParam here and above.
        trained = nnx.DiffState(0, jaxadapt.AdapterParam)

        def step(model: Any, optimizer: Any, tokens: jax.Array) -> jax.Array:
            value, grads = nnx.value_and_grad(loss, argnums=trained)(model, tokens)
            optimizer.update(model, grads)
            return value

        # nnx.jit returns every Variable that it was given. Donate them, or each step would hold the base
        # twice. The functions below change nothing, so plain jit is enough.
        self._step: Any = nnx.jit(step, donate_argnums=(0, 1))
        graphdef = nnx.graphdef(self.model)
        self._loss = jax.jit(lambda state, tokens: loss(nnx.merge(graphdef, state), tokens))
        self._logits = jax.jit(lambda state, tokens: logits(nnx.merge(graphdef, state), tokens))

    def step(self, tokens: np.ndarray) -> float:
        return float(self._step(self.model, self.optimizer, jnp.asarray(tokens)))

    def loss(self, tokens: np.ndarray) -> float:
        return float(self._loss(nnx.state(self.model), jnp.asarray(tokens)))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self._logits(nnx.state(self.model), jnp.asarray(tokens)))

    def save(self, out: Path, base_model: str) -> None:
        jaxadapt.save(self.model, out, base_model=base_model)

    def adapter_size(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self.model, jaxadapt.AdapterParam)))


def _keep(wanted: Callable[[str], bool], tree: Any, roles: Any) -> Any:
    """Return the tree with None in place of the leaves of other roles."""
    return jax.tree.map(lambda x, role: x if wanted(role) else None, tree, roles)


class LinenTrainer:
    """A trainer of the Linen module in jaxadapt's wrapper; parameters and adapter are plain trees."""

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights,
        adapter: Any,
        make: MakeOptimizer,
        seed: int,
    ) -> None:
        base, config_of_adapter = llama_linen.to_linen(config, weights)["params"], adapter
        self.module: Any = jaxadapt.adapt(llama_linen.Llama(config), adapter)
        lora = start_adapter(adapter, base, seed)
        self.base: Any = {"params": base}
        roles = optim.roles(lora.collection)
        # Tensors that are not trained (VeRA's projections) get no gradient and no weight decay.
        self.adapter: Any = _keep(lambda role: role != "frozen", lora.collection, roles)
        self.fixed: Any = _keep(lambda role: role == "frozen", lora.collection, roles)
        tx = make(_keep(lambda role: role != "frozen", optim.decay_mask(lora.collection), roles))
        self.state: Any = tx.init(self.adapter)

        def logits(variables: Any, tokens: jax.Array) -> jax.Array:
            with for_rows(self.module, config_of_adapter, len(tokens)) as called:
                return called.apply(variables, tokens)[:, -tokens.shape[1] :]

        def loss(adapter: Any, base: Any, tokens: jax.Array) -> jax.Array:
            return next_token_loss(logits({**base, **self._whole(adapter)}, tokens), tokens)

        def step(adapter: Any, state: Any, base: Any, tokens: jax.Array) -> Any:
            value, grads = jax.value_and_grad(loss)(adapter, base, tokens)
            updates, state = tx.update(grads, state, adapter)
            return optax.apply_updates(adapter, updates), state, value

        self.compute_step = step
        self._step = jax.jit(step)
        self._loss = jax.jit(loss)
        self._logits = jax.jit(logits)

    def _whole(self, trained: Any) -> Any:
        """Return the adapter's collection with these trained tensors."""
        return jax.tree.map(lambda x, y: y if x is None else x, trained, self.fixed, is_leaf=lambda x: x is None)

    def step(self, tokens: np.ndarray) -> float:
        stepped = self._step(self.adapter, self.state, self.base, jnp.asarray(tokens))
        self.adapter, self.state, value = stepped
        return float(value)

    def loss(self, tokens: np.ndarray) -> float:
        return float(self._loss(self.adapter, self.base, jnp.asarray(tokens)))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self._logits({**self.base, **self._whole(self.adapter)}, jnp.asarray(tokens)))

    def save(self, out: Path, base_model: str) -> None:
        jaxadapt.save({**self.base, **self._whole(self.adapter)}, out, base_model=base_model)

    def adapter_size(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.adapter))


def make_trainer(api: str, config: LlamaConfig, weights: Weights, method: str, steps: int, seed: int = 0) -> Trainer:
    """Return a trainer with a new adapter on the base, for `steps` steps.

    Raises:
        ConfigError: `api` or `method` is unknown.
    """
    kind = {"nnx": NnxTrainer, "linen": LinenTrainer}.get(api)
    if kind is None:
        raise ConfigError(f"api: expected one of {', '.join(APIS)}, found {api!r}")
    adapter = complete_config(adapter_config(method), config)
    return kind(config, weights, adapter, functools.partial(optimizer, method, steps), seed)


def load_logits(api: str, config: LlamaConfig, weights: Weights, folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the logits (B, T, V) of the base with a saved adapter loaded."""
    inputs, adapter = jnp.asarray(tokens), jaxadapt.read_config(folder)

    def logits(call: Callable[[Any], Any], model: Any, tokens: jax.Array) -> jax.Array:
        with for_rows(model, adapter, len(tokens)) as called:
            return call(called)(tokens)[:, -tokens.shape[1] :]

    if api == "nnx":
        graphdef, state = nnx.split(jaxadapt.load(folder, llama_nnx.to_nnx(config, weights)))
        run = jax.jit(lambda state, tokens: logits(lambda model: model, nnx.merge(graphdef, state), tokens))
        return np.asarray(run(state, inputs))
    module: Any = jaxadapt.adapt(llama_linen.Llama(config), adapter)
    variables = jaxadapt.load(folder, llama_linen.to_linen(config, weights))

    def apply(variables: Any, tokens: jax.Array) -> jax.Array:
        return logits(lambda module: functools.partial(module.apply, variables), module, tokens)

    return np.asarray(jax.jit(apply)(variables, inputs))
