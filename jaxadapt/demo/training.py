"""Training of an adapter on SmolLM2, in NNX and in Linen, with the same interface."""

from __future__ import annotations

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
from jaxadapt.demo.llama import PROJECTIONS, LlamaConfig
from jaxadapt.methods.prompt import PromptMethod
from jaxadapt.methods.registry import COLLECTIONS, get_method
from jaxadapt.models import invoke
from jaxadapt.training import optim

Weights = Mapping[str, Any]
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


def _logits(model: Any, config: Any, tokens: jax.Array, variables: Any = None) -> jax.Array:
    """Return the logits (B, T, V) at the tokens' places, without those of virtual tokens.

    `variables` are the arrays of a Linen module; an NNX model has its own.
    """
    tasks = task_data(config, tokens.shape[0])
    with invoke(model, task_ids=tasks["task_ids"]) if tasks else contextlib.nullcontext(model) as ready:
        found = ready(tokens) if variables is None else ready.apply(variables, tokens)
        return found[:, -tokens.shape[1] :]


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


class Trainer:
    """A base model with an adapter, and an optimizer for the adapter only.

    Attributes:
        adapter: the trained parameters.
        rest: all other arrays: those of the base, and those of the adapter that training leaves as they are.
        state: the optimizer's state.
        compute_step: the compiled function (adapter, state, rest, tokens) -> (adapter, state, loss before the step).
    """

    def __init__(
        self,
        adapter: Any,
        rest: Any,
        tx: optax.GradientTransformation,
        join: Callable[[Any, Any], Any],
        call: Callable[[Any, jax.Array], jax.Array],
    ) -> None:
        """Compile the functions of an adapted model.

        `join(adapter, rest)` returns what `jaxadapt.save` takes, and `call` its logits (B, T, V) for tokens (B, T).
        """
        self.adapter, self.rest, self._join = adapter, rest, join
        self.state: Any = tx.init(adapter)

        # `rest` is an argument: a compiled program would hold a copy of arrays from outside.
        def logits(adapter: Any, rest: Any, tokens: jax.Array) -> jax.Array:
            return call(join(adapter, rest), tokens)

        def loss(adapter: Any, rest: Any, tokens: jax.Array) -> jax.Array:
            return next_token_loss(logits(adapter, rest, tokens), tokens)

        def step(adapter: Any, state: Any, rest: Any, tokens: jax.Array) -> Any:
            value, grads = jax.value_and_grad(loss)(adapter, rest, tokens)
            updates, state = tx.update(grads, state, adapter)
            return optax.apply_updates(adapter, updates), state, value

        self.compute_step = jax.jit(step)
        self._loss, self._logits = jax.jit(loss), jax.jit(logits)

    def step(self, tokens: np.ndarray) -> float:
        """Train one step on tokens (B, T) and return the loss before it."""
        stepped = self.compute_step(self.adapter, self.state, self.rest, jnp.asarray(tokens))
        self.adapter, self.state, value = stepped
        return float(value)

    def loss(self, tokens: np.ndarray) -> float:
        """Return the loss on tokens (B, T)."""
        return float(self._loss(self.adapter, self.rest, jnp.asarray(tokens)))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Return the logits (B, T, V) in float32."""
        return np.asarray(self._logits(self.adapter, self.rest, jnp.asarray(tokens)))

    def adapter_size(self) -> int:
        """Return the number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.adapter))

    def save(self, out: Path, base_model: str) -> None:
        """Write the adapter."""
        jaxadapt.save(self._join(self.adapter, self.rest), out, base_model=base_model)


def make_trainer(api: str, config: LlamaConfig, weights: Weights, method: str, steps: int, seed: int = 0) -> Trainer:
    """Return a trainer with a new adapter on the base, for `steps` steps.

    Raises:
        ConfigError: `api` or `method` is unknown.
    """
    if api not in APIS:
        raise ConfigError(f"api: expected one of {', '.join(APIS)}, found {api!r}")
    adapter, key = adapter_config(method, steps), jax.random.key(seed)
    make = _make_nnx if api == "nnx" else _make_linen
    return make(config, weights, adapter, functools.partial(optimizer, method, steps), key)


def _make_nnx(config: LlamaConfig, weights: Weights, adapter: Any, make: MakeOptimizer, key: jax.Array) -> Trainer:
    """Return a trainer of the NNX model."""
    model = llama_nnx.to_nnx(config, weights)
    if _is_started(adapter):
        initializers.start(model, adapter, key=key, example=[TOKENS])
    else:
        jaxadapt.adapt(model, adapter, rngs=nnx.Rngs(key), example=[TOKENS])
    # Flax's default filter, nnx.Param, also selects the base, so pass AdapterParam.
    graphdef, trained, rest = nnx.split(model, jaxadapt.AdapterParam, ...)
    join: Any = functools.partial(nnx.merge, graphdef)
    return Trainer(
        trained, rest, make(optim.decay_mask(model)), join, lambda model, tokens: _logits(model, adapter, tokens)
    )


def _make_linen(config: LlamaConfig, weights: Weights, adapter: Any, make: MakeOptimizer, key: jax.Array) -> Trainer:
    """Return a trainer of the Linen module in jaxadapt's wrapper; parameters and adapter are plain trees."""
    base = llama_linen.to_linen(config, weights)["params"]
    module: Any = jaxadapt.adapt(llama_linen.Llama(config), adapter)
    if get_method(adapter).scope == "model":  # a trace completes its configuration with the base's sizes
        adapter = jaxadapt.extract(jax.eval_shape(module.init, jax.random.key(0), TOKENS)).config
    started = _is_started(adapter)
    lora = initializers.start(base, adapter, key=key).adapter if started else jaxadapt.init(base, adapter, key=key)
    roles = optim.roles(lora.collection)

    def keep(tree: Any, *, frozen: bool) -> Any:
        """Return the tree with None in place of the leaves that are not frozen, or of those that are."""
        return jax.tree.map(lambda x, role: x if (role == "frozen") == frozen else None, tree, roles)

    def join(trained: Any, rest: Any) -> Any:
        base, fixed = rest
        filled = jax.tree.map(lambda x, y: y if x is None else x, trained, fixed, is_leaf=lambda x: x is None)
        return {"params": base, **filled}

    # Tensors that are not trained (VeRA's projections) get no gradient and no weight decay.
    trained, fixed = (keep(lora.collection, frozen=frozen) for frozen in (False, True))
    tx = make(keep(optim.decay_mask(lora.collection), frozen=False))
    return Trainer(trained, (base, fixed), tx, join, lambda held, tokens: _logits(module, adapter, tokens, held))


def load_logits(api: str, config: LlamaConfig, weights: Weights, folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the logits (B, T, V) of the base with a saved adapter loaded."""
    found = jaxadapt.read_config(folder)
    if api == "nnx":
        graphdef, held = nnx.split(jaxadapt.load(folder, llama_nnx.to_nnx(config, weights)))
        compute = jax.jit(lambda held, tokens: _logits(nnx.merge(graphdef, held), found, tokens))
    else:
        module: Any = jaxadapt.adapt(llama_linen.Llama(config), found)
        held = jaxadapt.load(folder, llama_linen.to_linen(config, weights))
        compute = jax.jit(lambda held, tokens: _logits(module, found, tokens, held))
    return np.asarray(compute(held, jnp.asarray(tokens)))
