"""MULTITASK_PROMPT_TUNING: `MultitaskPromptTuningConfig`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodFacts
from jaxadapt.configs.prompt_tuning import PromptTuningConfig
from jaxadapt.configs.validation import Problems, is_int


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning (arXiv:2303.02861): a prompt of all tasks, times a low-rank matrix of each task.

    The fields are PEFT's. Those not listed here are described in `PromptTuningConfig`. Each call needs the tasks of its
    rows: see `jaxadapt.models.invoke`.

    Attributes:
        peft_type: always "MULTITASK_PROMPT_TUNING".
        prompt_tuning_init: the initial values: "RANDOM", or "TEXT" as in prompt tuning. The others start from an
            adapter of source tasks, which `prompt_tuning_init_state_dict_path` names in PEFT: "AVERAGE_SOURCE_TASKS",
            "EXACT_SOURCE_TASK" and "ONLY_SOURCE_SHARED". Pass it to `adapt` as `prompt_source=`.
        prompt_tuning_init_state_dict_path: the path of the adapter of source tasks, for PEFT.
        prompt_tuning_init_task: the source task of "EXACT_SOURCE_TASK" (default 0).
        num_ranks: the rank of each task's matrix (default 1).
        num_tasks: the number of tasks (default 1).

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> MultitaskPromptTuningConfig(num_virtual_tokens=20, num_tasks=3).num_ranks
    1
    """

    file_tensors: ClassVar[tuple[str, ...]] = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")
    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="prefix_task_cols, prefix_task_rows, prompt_embeddings", merges=False, learning_rate=3e-2
    )
    checks: ClassVar[Mapping[str, Any]] = {
        **PromptTuningConfig.checks,
        "prompt_tuning_init": ("TEXT", "RANDOM", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"),
        "prompt_tuning_init_state_dict_path": "text",
        "prompt_tuning_init_task": "any",
        "num_ranks": "rank",
        "num_tasks": "rank",
    }

    peft_type: str = "MULTITASK_PROMPT_TUNING"
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int = 1
    num_tasks: int = 1

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        task = self.prompt_tuning_init_task
        if task is not None and not (is_int(task) and task >= 0):
            problems.add("prompt_tuning_init_task", "an integer of 0 or more, or null", task)
