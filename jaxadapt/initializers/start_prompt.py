"""Initial values of a prompt that read the base's embeddings, or an adapter of other tasks, as PEFT computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadapt.adapters.adapter import Adapter, PeftTensors
from jaxadapt.arrays import quantized
from jaxadapt.configs.cpt import CPTConfig
from jaxadapt.configs.prompt_tuning import PromptTuningConfig
from jaxadapt.core.errors import AttachError, MismatchError, raise_listed
from jaxadapt.keymaps.keymap import KeyMap
from jaxadapt.methods.cpt import FIXED
from jaxadapt.methods.multitask_prompt_tuning import COLS, ROWS
from jaxadapt.methods.prompt import EMBEDDINGS
from jaxadapt.models.prompt.embedding import input_embedding

Array = Any
Tokens = Sequence[int] | Callable[[str], Sequence[int]]

_OF_TASKS = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
NEEDS: Mapping[str, tuple[str, ...]] = {
    "RANDOM": ("key",),
    "SAMPLE_VOCAB": ("key",),
    "TEXT": ("tokens",),
    **dict.fromkeys(_OF_TASKS, ("source",)),
}
"""The arguments of `start` that each `prompt_tuning_init` needs."""


def start_setting(config: PromptTuningConfig | CPTConfig) -> tuple[str, tuple[str, ...]]:
    """Return the setting that decides where a prompt starts, for messages, and the arguments that it needs."""
    if isinstance(config, CPTConfig):
        return "CPT", ()
    return f'prompt_tuning_init="{config.prompt_tuning_init}"', NEEDS[config.prompt_tuning_init]


def prompt_values(
    config: PromptTuningConfig | CPTConfig,
    shapes: Mapping[str, tuple[int, ...]],
    key: Array,
    table: Callable[[], Array],
    tokens: Tokens | None,
    source: Adapter | PeftTensors | None,
) -> dict[str, Array]:
    """Return the tensors that do not start at random, float32.

    Args:
        config: the configuration, with all its sizes.
        shapes: the shapes of the adapter's tensors.
        key: the random key of "SAMPLE_VOCAB".
        table: returns the embeddings of all tokens (vocabulary, token_dim).
        tokens: the token ids of "TEXT", or a function from the text to them.
        source: the adapter of the source tasks.

    Raises `AttachError` for invalid token ids, `MismatchError` if the source has other shapes.
    """
    if isinstance(config, CPTConfig):
        embeddings, ids = table(), np.asarray(config.cpt_token_ids)
        return {FIXED: _lookup(embeddings, _checked("cpt_token_ids", ids, embeddings))}
    rows, kind = shapes[EMBEDDINGS][0], config.prompt_tuning_init
    if kind == "SAMPLE_VOCAB":
        embeddings = table()
        return {EMBEDDINGS: _lookup(embeddings, jax.random.randint(key, (rows,), 0, embeddings.shape[0]))}
    if kind == "TEXT":
        assert tokens is not None
        ids = np.asarray(tokens(config.prompt_tuning_init_text or "") if callable(tokens) else tokens)
        embeddings = table()
        if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise AttachError(f"tokens: expected a list of token ids, found {ids.dtype} of shape {list(ids.shape)}")
        return {EMBEDDINGS: _lookup(embeddings, np.resize(_checked("tokens", ids, embeddings), rows))}  # as in PEFT
    if kind in _OF_TASKS:
        return _from_tasks(config, shapes, source)
    return {}


def token_table(keymap: KeyMap, leaves: Mapping[str, Array], peft_type: str) -> Array:
    """Return the embeddings of all tokens (vocabulary, token_dim); raise `AttachError` if their leaf is unclear."""
    leaf = input_embedding(keymap, leaves)
    x = None if leaf is None else leaves[leaf]
    if x is None or isinstance(x, jax.ShapeDtypeStruct) or len(x.shape) != 2:
        raise AttachError(
            f"{peft_type}: the start needs the values of the token embeddings (vocabulary, width), and"
            f" {'several or no parameters may hold them' if leaf is None else f'{leaf} has none of this shape'}."
            ' Use prompt_tuning_init="RANDOM", and write your own values with jaxadapt.inject'
        )
    return jnp.asarray(quantized.to_dense(x))


def _checked(name: str, ids: np.ndarray, table: Array) -> np.ndarray:
    """Return token ids; raise `AttachError` if the base has no embeddings of some."""
    if ids.min() < 0 or ids.max() >= table.shape[0]:
        raise AttachError(
            f"{name}: expected ids from 0 to {table.shape[0] - 1}, those of the base's embeddings, found"
            f" {ids.min()} to {ids.max()}"
        )
    return ids


def _lookup(table: Array, ids: Array) -> Array:
    return table[jnp.asarray(ids)].astype(jnp.float32)


def _from_tasks(
    config: Any, shapes: Mapping[str, tuple[int, ...]], source: Adapter | PeftTensors | None
) -> dict[str, Array]:
    if not isinstance(source, Adapter | PeftTensors):
        raise AttachError(f"source: expected an Adapter or PeftTensors (jaxadapt.read), found {type(source).__name__}")
    given = source.shared if isinstance(source, Adapter) else source.tensors
    kind = config.prompt_tuning_init
    names = (EMBEDDINGS,) if kind == "ONLY_SOURCE_SHARED" else (EMBEDDINGS, COLS, ROWS)
    missing = [name for name in names if name not in given]
    if missing:
        raise MismatchError(f"source: expected {', '.join(names)}, found {', '.join(given) or 'no tensor'}")
    values = {name: jnp.asarray(given[name], jnp.float32) for name in names}
    for name in names[1:]:
        task, count = config.prompt_tuning_init_task or 0, len(values[name])
        if kind == "AVERAGE_SOURCE_TASKS":
            values[name] = values[name].mean(0, keepdims=True)
        elif task < count:
            values[name] = values[name][task][None]
        else:
            raise MismatchError(f"source: prompt_tuning_init_task={task}, but the source has {count} tasks")
    wrong = [
        f"{name}: expected {list(shapes[name])}, found {list(x.shape)}"
        for name, x in values.items()
        if tuple(x.shape) != shapes[name]
    ]
    raise_listed(
        MismatchError, f"source: its tensors do not fit the new adapter ({kind} gives one task, num_tasks=1):", wrong
    )
    return values
