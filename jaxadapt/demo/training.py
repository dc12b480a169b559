"""Training of an adapter on SmolLM2, in NNX and in Linen, with the same interface."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxadapt
from jaxadapt import initializers
from jaxadapt.configs.base import class_of
from jaxadapt.configs.table import FACTS
from jaxadapt.core.errors import ConfigError
from jaxadapt.demo import llama_linen, llama_nnx
from jaxadapt.demo.llama import PROJECTIONS, LlamaConfig, Tensor
from jaxadapt.methods.prompt import PromptMethod
from jaxadapt.methods.registry import COLLECTIONS, get_method
from jaxadapt.models import invoke
from jaxadapt.training import optim

Weights = Mapping[str, Tensor]
MakeOptimizer = Callable[[Any], optax.GradientTransformation]
APIS = ("nnx", "linen")
TOKENS = jax.ShapeDtypeStruct((1, 2), "int32")  # an input to trace the models with


def method_names() -> list[str]:
    """Return the methods that the demo can train, in lower case."""
    return sorted(COLLECTIONS)


def adapter_config(method: str, steps: int = 40) -> Any:
    """Return the demo's configuration of a method: on all seven projections, with the fields in its facts.

    `steps` is the number of training steps, for methods whose configuration has it.

    Raises:
        ConfigError: the method is unknown.
    """
    cls = class_of(method.upper())
    if cls is None:
        raise ConfigError(f"method: expected one of {', '.join(method_names())}, found {method!r}")
    known = {item.name for item in dataclasses.fields(cls)}
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": list(PROJECTIONS), "num_virtual_tokens": 16}
    fields["total_step"] = steps
    return cls(**{name: value for name, value in fields.items() if name in known} | dict(FACTS[cls.peft_type].demo))


def _is_started(config: Any) -> bool:
    """Return True if `initializers.start` creates the adapter, because it may read the base's embeddings."""
    method = get_method(config)
    return isinstance(method, PromptMethod) and method.from_base


def task_data(config: Any, batch: int) -> dict[str, jax.Array]:
    """Return the data for `jaxadapt.models.invoke` that the method's calls need: the first task for each of the rows.

    Empty for methods without tasks.
    """
    tasks = {"task_ids": jnp.zeros(batch, jnp.int32)}
    return get_method(config).call_data(config, tasks) and tasks


def _logits(model: Any, config: Any, tokens: jax.Array, call: Callable[[Any], jax.Array]) -> jax.Array:
    """Return the logits (B, T, V) of `call(model)` at the tokens' places, without those of virtual tokens."""
    tasks = task_data(config, tokens.shape[0])
    with invoke(model, task_ids=tasks["task_ids"]) if tasks else contextlib.nullcontext(model) as ready:
        return call(ready)[:, -tokens.shape[1] :]


def optimizer(method: str, steps: int, decays: Any) -> optax.GradientTransformation:
    """Return AdamW with a short warm-up and a cosine decay over `steps`, with the learning rate of the method's facts.

    `decays` is the mask of the weight decay. It is for matrices only: it would pull vectors such as IA3's, which start
    at one, to zero.
    """
    peak = FACTS[adapter_config(method, steps).peft_type].learning_rate
    warmup = min(5, max(1, steps // 4))
    schedule = optax.warmup_cosine_decay_schedule(peak / 10, peak, warmup, max(steps, warmup + 1), peak / 10)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01, mask=decays))


def next_token_loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return the mean cross-entropy, in nats, of each token (B, T) given the previous ones; logits (B, T, V)."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return jnp.mean(losses)


class Trainer(abc.ABC):
    """A base model with an adapter, and an optimizer for the adapter only."""

    def __init__(self, call: Callable[[Any, jax.Array], jax.Array]) -> None:
        """Compile the functions that change nothing, from one that returns the logits (B, T, V) of `variables()`."""
        self._logits = jax.jit(call)
        self._loss = jax.jit(lambda variables, tokens: next_token_loss(call(variables, tokens), tokens))

    @abc.abstractmethod
    def step(self, tokens: np.ndarray) -> float:
        """Train one step on tokens (B, T) and return the loss before it."""

    @abc.abstractmethod
    def variables(self) -> Any:
        """Return the arrays of the base and of the adapter."""

    @abc.abstractmethod
    def trained(self) -> Any:
        """Return the trained parameters."""

    @abc.abstractmethod
    def save(self, out: Path, base_model: str) -> None:
        """Write the adapter."""

    def loss(self, tokens: np.ndarray) -> float:
        """Return the loss on tokens (B, T)."""
        return float(self._loss(self.variables(), jnp.asarray(tokens)))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return the logits (B, T, V) in float32."""
        return np.asarray(self._logits(self.variables(), jnp.asarray(tokens)))

    def adapter_size(self) -> int:
        """Return the number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.trained()))


class NnxTrainer(Trainer):
    """A trainer of the NNX model, adapted in place."""

    def __init__(self, config: LlamaConfig, weights: Weights, adapter: Any, make: MakeOptimizer, seed: int) -> None:
        self.model = llama_nnx.to_nnx(config, weights)
        if _is_started(adapter):
            initializers.start(self.model, adapter, key=jax.random.key(seed), example=[TOKENS])
        else:
            jaxadapt.adapt(self.model, adapter, rngs=nnx.Rngs(seed), example=[TOKENS])
        self.optimizer = nnx.Optimizer(self.model, make(optim.decay_mask(self.model)), wrt=jaxadapt.AdapterParam)

        def call(model: Any, tokens: jax.Array) -> jax.Array:
            return _logits(model, adapter, tokens, lambda ready: ready(tokens))

        # Flax's default filter, nnx.Param, also selects the base, so pass AdapterParam here and above.
        trained = nnx.DiffState(0, jaxadapt.AdapterParam)

        def step(model: Any, optimizer: Any, tokens: jax.Array) -> jax.Array:
            def loss(model: Any) -> jax.Array:
                return next_token_loss(call(model, tokens), tokens)

            value, grads = nnx.value_and_grad(loss, argnums=trained)(model)
            optimizer.update(model, grads)
            return value

        # nnx.jit returns every Variable that it was given. Donate them, or each step would hold the base
        # twice. Loss and logits change nothing, so plain jit is enough for them.
        self._step: Any = nnx.jit(step, donate_argnums=(0, 1))
        graphdef = nnx.graphdef(self.model)
        super().__init__(lambda state, tokens: call(nnx.merge(graphdef, state), tokens))

    def step(self, tokens: np.ndarray) -> float:
        return float(self._step(self.model, self.optimizer, jnp.asarray(tokens)))

    def variables(self) -> Any:
        return nnx.state(self.model)

    def trained(self) -> Any:
        return nnx.state(self.model, jaxadapt.AdapterParam)

    def save(self, out: Path, base_model: str) -> None:
        jaxadapt.save(self.model, out, base_model=base_model)


def _keep(wanted: Callable[[str], bool], tree: Any, roles: Any) -> Any:
    """Return the tree with None in place of the leaves of other roles."""
    return jax.tree.map(lambda x, role: x if wanted(role) else None, tree, roles)


def _fill(trained: Any, fixed: Any) -> Any:
    """Return the adapter's collection of the two trees that `_keep` made."""
    return jax.tree.map(lambda x, y: y if x is None else x, trained, fixed, is_leaf=lambda x: x is None)


class LinenTrainer(Trainer):
    """A trainer of the Linen module in jaxadapt's wrapper; parameters and adapter are plain trees."""

    def __init__(self, config: LlamaConfig, weights: Weights, adapter: Any, make: MakeOptimizer, seed: int) -> None:
        base = llama_linen.to_linen(config, weights)["params"]
        module: Any = jaxadapt.adapt(llama_linen.Llama(config), adapter)
        if get_method(adapter).scope == "model":  # a trace completes its configuration with the base's sizes
            adapter = jaxadapt.extract(jax.eval_shape(module.init, jax.random.key(0), TOKENS)).config
        key = jax.random.key(seed)
        started = _is_started(adapter)
        lora = initializers.start(base, adapter, key=key).adapter if started else jaxadapt.init(base, adapter, key=key)
        self.base: Any = {"params": base}
        roles = optim.roles(lora.collection)
        # Tensors that are not trained (VeRA's projections) get no gradient and no weight decay.
        self.adapter: Any = _keep(lambda role: role != "frozen", lora.collection, roles)
        self.fixed: Any = _keep(lambda role: role == "frozen", lora.collection, roles)
        tx = make(_keep(lambda role: role != "frozen", optim.decay_mask(lora.collection), roles))
        self.state: Any = tx.init(self.adapter)

        def call(variables: Any, tokens: jax.Array) -> jax.Array:
            return _logits(module, adapter, tokens, lambda ready: ready.apply(variables, tokens))

        # `fixed` is an argument: a compiled program would hold a copy of arrays from outside.
        def loss(adapter: Any, fixed: Any, base: Any, tokens: jax.Array) -> jax.Array:
            return next_token_loss(call({**base, **_fill(adapter, fixed)}, tokens), tokens)

        def step(adapter: Any, state: Any, fixed: Any, base: Any, tokens: jax.Array) -> Any:
            value, grads = jax.value_and_grad(loss)(adapter, fixed, base, tokens)
            updates, state = tx.update(grads, state, adapter)
            return optax.apply_updates(adapter, updates), state, value

        self.compute_step = jax.jit(step)
        super().__init__(call)

    def step(self, tokens: np.ndarray) -> float:
        stepped = self.compute_step(self.adapter, self.state, self.fixed, self.base, jnp.asarray(tokens))
        self.adapter, self.state, value = stepped
        return float(value)

    def variables(self) -> Any:
        return {**self.base, **_fill(self.adapter, self.fixed)}

    def trained(self) -> Any:
        return self.adapter

    def save(self, out: Path, base_model: str) -> None:
        jaxadapt.save(self.variables(), out, base_model=base_model)


def make_trainer(api: str, config: LlamaConfig, weights: Weights, method: str, steps: int, seed: int = 0) -> Trainer:
    """Return a trainer with a new adapter on the base, for `steps` steps.

    Raises:
        ConfigError: `api` or `method` is unknown.
    """
    kind = {"nnx": NnxTrainer, "linen": LinenTrainer}.get(api)
    if kind is None:
        raise ConfigError(f"api: expected one of {', '.join(APIS)}, found {api!r}")
    adapter = adapter_config(method, steps)
    return kind(config, weights, adapter, functools.partial(optimizer, method, steps), seed)


def load_logits(api: str, config: LlamaConfig, weights: Weights, folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the logits (B, T, V) of the base with a saved adapter loaded."""
    found = jaxadapt.read_config(folder)
    if api == "nnx":
        graphdef, held = nnx.split(jaxadapt.load(folder, llama_nnx.to_nnx(config, weights)))

        def call(held: Any, tokens: jax.Array) -> jax.Array:
            return _logits(nnx.merge(graphdef, held), found, tokens, lambda ready: ready(tokens))

    else:
        module: Any = jaxadapt.adapt(llama_linen.Llama(config), found)
        held = jaxadapt.load(folder, llama_linen.to_linen(config, weights))

        def call(held: Any, tokens: jax.Array) -> jax.Array:
            return _logits(module, found, tokens, lambda ready: ready.apply(held, tokens))

    return np.asarray(jax.jit(call)(held, jnp.asarray(tokens)))
