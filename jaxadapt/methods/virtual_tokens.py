"""Virtual tokens before those of the input, as embeddings or as keys and values.

The methods are PROMPT_TUNING, MULTITASK_PROMPT_TUNING and P_TUNING, PREFIX_TUNING and CARTRIDGE.

PROMPT_TUNING (arXiv:2104.08691; PEFT's `tuners/prompt_tuning/model.py`): trained embeddings before the tokens'.

The one tensor of both forms is `prompt_embeddings` (n · submodules, token_dim).

MULTITASK_PROMPT_TUNING (arXiv:2303.02861; PEFT's `tuners/multitask_prompt_tuning/model.py`).

The virtual tokens of task t are prompt_embeddings ∘ (prefix_task_cols[t] · prefix_task_rows[t]), with tensors of shapes
(n · submodules, token_dim), (tasks, n · submodules, ranks) and (tasks, ranks, token_dim).

P_TUNING (arXiv:2103.10385; PEFT's `tuners/p_tuning/model.py`): embeddings that a trained network computes.

The stored form is that of PROMPT_TUNING: the output of the network. The trained form has an embedding table, for "LSTM"
the parameters of a bidirectional LSTM, and dense layers with ReLU between them: three for "MLP", two for "LSTM".

PREFIX_TUNING (arXiv:2101.00190; PEFT's `tuners/prefix_tuning/model.py` and `PeftModel.get_prompt`).

The stored form is one tensor `prompt_embeddings` (n, layers · 2 · token_dim), whose last axis is (layer, key or value,
head, dim). The keys are used as they are: where the base rotates its keys, they are taken to be rotated already.

In an encoder-decoder (`num_transformer_submodules` 2) the prefix enters the self-attention of the decoder. PEFT gives
its layer i the keys and values of layer 2·i mod layers, because its cache takes four tensors a layer (those for cross
attention are dropped); so does jaxadapt, since a file trained by PEFT means that. PEFT takes the number of layers from
the encoder: a decoder of fewer layers uses the first of them, and in one of more layers PEFT fails. A new adapter of
jaxadapt has as many layers as the decoder, which PEFT reads from the configuration.

With `prefix_projection` the trained form is an embedding table and two dense layers:
prompt_embeddings = tanh(embedding · kernel_0 + bias_0) · kernel_1 + bias_1.

CARTRIDGE (arXiv:2506.06266; PEFT's `tuners/cartridge/model.py`): a prefix whose first tokens are not trained.

The stored form is that of PREFIX_TUNING. The trained form has the fixed and the trained tokens as two tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.nn import relu, sigmoid

from jaxadapt.core.errors import AttachError, ConfigError, MismatchError, raise_listed
from jaxadapt.methods.base import tensor_roles
from jaxadapt.methods.prompt import (
    EMBEDDINGS,
    TASKS,
    Array,
    Draw,
    EmbeddingPrompt,
    Params,
    PromptMethod,
    Shapes,
    StartData,
    dense,
    draw_dense,
)

# ---------------------------------------------------------------- prompt_tuning


class PromptTuning(EmbeddingPrompt):
    """Trained embeddings before those of the tokens."""

    peft_type = "PROMPT_TUNING"
    examples = ({"num_virtual_tokens": 3}, {"num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"})


# ---------------------------------------------------------------- multitask_prompt_tuning


COLS, ROWS = "prefix_task_cols", "prefix_task_rows"


class MultitaskPromptTuning(EmbeddingPrompt):
    """Embeddings before those of the tokens, shared by all tasks and scaled by a matrix of each."""

    peft_type = "MULTITASK_PROMPT_TUNING"
    in_decoder = True
    examples = ({"num_virtual_tokens": 3, "num_tasks": 3, "num_ranks": 2},)

    def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
        whole = super().shapes(config, stored=stored)
        (rows, d), tasks, ranks = whole[EMBEDDINGS], config.num_tasks, config.num_ranks
        return {COLS: (tasks, rows, ranks), ROWS: (tasks, ranks, d), **whole}

    def draw(self, config: Any, name: str) -> Draw:
        return super().draw(config, name) if name == EMBEDDINGS else Draw("normal", 0.02)

    def start_values(self, config: Any, shapes: Shapes, data: StartData) -> dict[str, Array]:
        kind = config.prompt_tuning_init
        if self.start_setting(config)[1] != ("source",):
            return super().start_values(config, shapes, data)
        assert data.source is not None
        names = (EMBEDDINGS,) if kind == "ONLY_SOURCE_SHARED" else (EMBEDDINGS, COLS, ROWS)
        if any(name not in data.source for name in names):
            found = ", ".join(data.source) or "no tensor"
            raise MismatchError(f"source: expected {', '.join(names)}, found {found}")
        values = {name: jnp.asarray(data.source[name], jnp.float32) for name in names}
        for name in names[1:]:
            task, count = config.prompt_tuning_init_task or 0, len(values[name])
            if kind == "AVERAGE_SOURCE_TASKS":
                values[name] = values[name].mean(0, keepdims=True)
            elif task < count:
                values[name] = values[name][task][None]
            else:
                raise MismatchError(f"source: prompt_tuning_init_task={task}, but the source has {count} tasks")
        raise_listed(
            MismatchError,
            f"source: its tensors do not fit the new adapter ({kind} gives one task, num_tasks=1):",
            [
                f"{name}: expected {list(shapes[name])}, found {list(x.shape)}"
                for name, x in values.items()
                if tuple(x.shape) != shapes[name]
            ],
        )
        return values

    def stored(self, config: Any, shared: Params) -> dict[str, Array]:
        return {name: shared[name] for name in (COLS, ROWS, EMBEDDINGS)}

    def call_data(self, config: Any, given: Mapping[str, Array]) -> dict[str, Array]:
        data = super().call_data(config, given)
        if TASKS not in given:
            return data
        ids = given[TASKS]
        if not (ids.ndim == 1 and jnp.issubdtype(ids.dtype, jnp.integer)):
            raise AttachError(f"task_ids: expected integers of shape (batch,), found {ids.dtype} of {list(ids.shape)}")
        if not isinstance(ids, Tracer) and not bool(((ids >= 0) & (ids < config.num_tasks)).all()):
            raise AttachError(
                f"task_ids: expected tasks from 0 to {config.num_tasks - 1}, because the adapter has"
                f" num_tasks={config.num_tasks}, found {ids.tolist()}"
            )
        return {**data, TASKS: ids}

    def tokens(self, config: Any, params: Params, data: Params) -> Array:
        if TASKS not in data:
            raise AttachError(
                "MULTITASK_PROMPT_TUNING: the call needs the task of each row; make it inside"
                " jaxadapt.models.invoke(model, task_ids=ids), with ids of shape (batch,)"
            )
        # Inside jit a wrong task cannot raise, and clipping it would be silent. NaN shows in the output.
        tasks = data[TASKS]
        known = jnp.where(tasks < 0, config.num_tasks, tasks)
        cols, rows = (jnp.take(params[name], known, axis=0, mode="fill", fill_value=jnp.nan) for name in (COLS, ROWS))
        with jax.numpy_rank_promotion("allow"):
            return params[EMBEDDINGS] * (cols @ rows)


# ---------------------------------------------------------------- p_tuning


_DIRECTIONS = ("forward", "reverse")


class PTuning(EmbeddingPrompt):
    """Embeddings before those of the tokens, computed by a trained network."""

    peft_type = "P_TUNING"
    from_base = False
    examples = (
        {"num_virtual_tokens": 3, "encoder_hidden_size": 5},
        {"num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 5},
    )

    def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
        whole = super().shapes(config, stored=True)
        if stored:
            return whole
        if config.encoder_dropout and config.encoder_reparameterization_type == "LSTM":
            raise ConfigError(
                f"P_TUNING: encoder_dropout={config.encoder_dropout} is not implemented; set 0.0 (a file with dropout"
                " loads, because it holds the network's output)"
            )
        (rows, d), h = whole[EMBEDDINGS], config.encoder_hidden_size or config.token_dim
        shapes: dict[str, tuple[int, ...]] = {"embedding": (rows, d)}
        if config.encoder_reparameterization_type == "MLP":
            widths = [d, h, h, d]
        else:
            widths = [2 * h, 2 * h, d]
            for layer in range(config.encoder_num_layers):
                for direction in _DIRECTIONS:
                    prefix = f"lstm_{layer}_{direction}"
                    shapes[f"{prefix}_input"] = (2 * h if layer else d, 4 * h)
                    shapes[f"{prefix}_hidden"] = (h, 4 * h)
                    shapes[f"{prefix}_input_bias"] = shapes[f"{prefix}_hidden_bias"] = (4 * h,)
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            shapes[f"kernel_{i}"], shapes[f"bias_{i}"] = (before, after), (after,)
        return shapes

    def draw(self, config: Any, name: str) -> Draw:
        if name == "embedding":
            return super().draw(config, name)
        h = config.encoder_hidden_size or config.token_dim
        if name.startswith("lstm"):
            return draw_dense(h)  # torch's nn.LSTM draws all its tensors alike
        return draw_dense(self.shapes(config, stored=False)[name.replace("bias", "kernel")][0])

    def encode(self, config: Any, shared: Params) -> Array:
        x = shared["embedding"]
        if config.encoder_reparameterization_type == "LSTM":
            for layer in range(config.encoder_num_layers):
                x = jnp.concatenate([_lstm(shared, f"lstm_{layer}_{d}", x, d) for d in _DIRECTIONS], axis=-1)
            return dense(shared, 1, relu(dense(shared, 0, x)))
        for i in range(2):
            x = relu(dense(shared, i, x))
        return dense(shared, 2, x)


def _lstm(shared: Params, prefix: str, xs: Array, direction: str) -> Array:
    """Return the hidden states (n, h) of one direction of an LSTM layer over xs (n, d); gates in torch's order."""
    kernel = shared[f"{prefix}_hidden"]
    bias = shared[f"{prefix}_input_bias"] + shared[f"{prefix}_hidden_bias"]
    inputs = xs @ shared[f"{prefix}_input"] + bias[None]

    def step(state: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
        hidden, cell = state
        entry, forget, candidate, out = jnp.split(x + hidden @ kernel, 4)
        cell = sigmoid(forget) * cell + sigmoid(entry) * jnp.tanh(candidate)
        hidden = sigmoid(out) * jnp.tanh(cell)
        return (hidden, cell), hidden

    zeros = jnp.zeros(kernel.shape[0], inputs.dtype)
    return jax.lax.scan(step, (zeros, zeros), inputs, reverse=direction == "reverse")[1]


# ---------------------------------------------------------------- prefix_tuning


class PrefixTuning(PromptMethod):
    """Trained keys and values before those of every attention layer."""

    peft_type = "PREFIX_TUNING"
    adds = "keys"
    examples = (
        {"num_virtual_tokens": 3},
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 5},
    )

    def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
        self.require_sizes(config)
        n, d, width = config.num_virtual_tokens, config.token_dim, config.num_layers * 2 * config.token_dim
        if stored or not config.prefix_projection:
            return {EMBEDDINGS: (n, width)}
        h = config.encoder_hidden_size or d
        return {"embedding": (n, d), "kernel_0": (d, h), "bias_0": (h,), "kernel_1": (h, width), "bias_1": (width,)}

    def draw(self, config: Any, name: str) -> Draw:
        zero = config.init_weights == "zero"
        if name in (EMBEDDINGS, "embedding"):  # torch's nn.Embedding
            return Draw("constant", 0.0) if zero and name == EMBEDDINGS else Draw("normal", 1.0)
        if zero and name in ("kernel_1", "bias_1"):
            return Draw("constant", 0.0)
        fan_in = config.token_dim if name.endswith("0") else config.encoder_hidden_size or config.token_dim
        return draw_dense(fan_in)

    def encode(self, config: Any, shared: Params) -> Array:
        return dense(shared, 1, jnp.tanh(dense(shared, 0, shared["embedding"])))


# ---------------------------------------------------------------- cartridge


_FROZEN, _TRAINED = "frozen_embedding", "trainable_embedding"


class Cartridge(PromptMethod):
    """Keys and values before those of every attention layer; the first tokens are fixed."""

    peft_type = "CARTRIDGE"
    adds = "keys"
    roles = tensor_roles(frozen=_FROZEN)
    examples = ({"num_virtual_tokens": 3, "num_frozen_tokens": 2},)

    def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
        self.require_sizes(config)
        n, frozen, width = config.num_virtual_tokens, config.num_frozen_tokens, config.num_layers * 2 * config.token_dim
        if stored:
            return {EMBEDDINGS: (n, width)}
        return {name: (size, width) for name, size in ((_FROZEN, frozen), (_TRAINED, n - frozen)) if size}

    def draw(self, config: Any, name: str) -> Draw:
        return Draw("normal", 1.0)

    def stored(self, config: Any, shared: Params) -> dict[str, Array]:
        whole = shared.get(EMBEDDINGS)
        frozen = shared.get(_FROZEN) if whole is None else whole[: config.num_frozen_tokens]
        trained = shared.get(_TRAINED) if whole is None else whole[config.num_frozen_tokens :]
        parts = [None if frozen is None else jax.lax.stop_gradient(frozen), trained]
        return {EMBEDDINGS: jnp.concatenate([part for part in parts if part is not None])}
