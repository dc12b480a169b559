"""MULTITASK_PROMPT_TUNING (arXiv:2303.02861; PEFT's `tuners/multitask_prompt_tuning/model.py`).

The virtual tokens of task t are prompt_embeddings ∘ (prefix_task_cols[t] · prefix_task_rows[t]), with tensors of shapes
(n · submodules, token_dim), (tasks, n · submodules, ranks) and (tasks, ranks, token_dim).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxadapt.core.errors import AttachError, MismatchError, raise_listed
from jaxadapt.methods.prompt import EMBEDDINGS, TASKS, Array, Draw, EmbeddingPrompt, Examples, Params, Shapes, StartData

COLS, ROWS = "prefix_task_cols", "prefix_task_rows"


class MultitaskPromptTuning(EmbeddingPrompt, peft_type="MULTITASK_PROMPT_TUNING"):
    """Embeddings before those of the tokens, shared by all tasks and scaled by a matrix of each."""

    in_decoder = True
    examples: Examples = ({"num_virtual_tokens": 3, "num_tasks": 3, "num_ranks": 2},)

    def shapes(self, config: Any, *, stored: bool) -> dict[str, tuple[int, ...]]:
        whole = super().shapes(config, stored=stored)
        rows, d = whole[EMBEDDINGS]
        return {
            COLS: (config.num_tasks, rows, config.num_ranks),
            ROWS: (config.num_tasks, config.num_ranks, d),
            **whole,
        }

    def draw(self, config: Any, name: str) -> Draw:
        return super().draw(config, name) if name == EMBEDDINGS else Draw("normal", 0.02)

    def start_values(self, config: Any, shapes: Shapes, data: StartData) -> dict[str, Array]:
        kind = config.prompt_tuning_init
        if self.start_setting(config)[1] != ("source",):
            return super().start_values(config, shapes, data)
        assert data.source is not None
        names = (EMBEDDINGS,) if kind == "ONLY_SOURCE_SHARED" else (EMBEDDINGS, COLS, ROWS)
        if any(name not in data.source for name in names):
            raise MismatchError(f"source: expected {', '.join(names)}, found {', '.join(data.source) or 'no tensor'}")
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
