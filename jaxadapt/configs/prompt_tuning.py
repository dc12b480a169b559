"""PROMPT_TUNING and MULTITASK_PROMPT_TUNING, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.prompt import PromptLearningConfig
from jaxadapt.configs.validation import Problems, is_int


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning (arXiv:2104.08691): trained embeddings before those of the tokens.

    The fields are PEFT's. Those of every configuration are described in `Config`, those of every prompt method in
    `PromptLearningConfig`.

    Attributes:
        peft_type: always "PROMPT_TUNING".
        prompt_tuning_init: the initial values: "RANDOM" (normal), "SAMPLE_VOCAB" (the embeddings of random tokens) or
            "TEXT" (those of the tokens of a text, repeated or cut; pass them to `adapt` as `prompt_tokens=`).
        prompt_tuning_init_text: the text of "TEXT". jaxadapt keeps it and has no tokenizer.
        tokenizer_name_or_path: the tokenizer of "TEXT", for PEFT.
        tokenizer_kwargs: arguments of the tokenizer of "TEXT", for PEFT.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> PromptTuningConfig(num_virtual_tokens=20).prompt_tuning_init
    'RANDOM'
    """

    _type: ClassVar[str | None] = "PROMPT_TUNING"
    _inits: ClassVar[tuple[str, ...]] = ("TEXT", "SAMPLE_VOCAB", "RANDOM")

    peft_type: str = "PROMPT_TUNING"
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: Mapping[str, Any] | None = None

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        problems.one_of("prompt_tuning_init", self.prompt_tuning_init, self._inits)
        problems.text("prompt_tuning_init_text", self.prompt_tuning_init_text)
        problems.text("tokenizer_name_or_path", self.tokenizer_name_or_path)
        problems.mapping("tokenizer_kwargs", self.tokenizer_kwargs)
        if self.prompt_tuning_init == "TEXT":
            for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                if not getattr(self, name):
                    problems.add(name, 'a value, because prompt_tuning_init is "TEXT"', getattr(self, name))
        elif self.tokenizer_kwargs:
            problems.add("tokenizer_kwargs", 'null unless prompt_tuning_init is "TEXT"', self.tokenizer_kwargs)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multitask prompt tuning (arXiv:2303.02861): a prompt of all tasks, times a low-rank matrix of each task.

    The fields are PEFT's. Those not listed here are described in `PromptTuningConfig`. Each call needs the tasks of its
    rows: see `jaxadapt.models.prompting`.

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

    _type: ClassVar[str | None] = "MULTITASK_PROMPT_TUNING"
    _inits: ClassVar[tuple[str, ...]] = (
        "TEXT", "RANDOM", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED",
    )  # fmt: skip

    peft_type: str = "MULTITASK_PROMPT_TUNING"
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        problems.text("prompt_tuning_init_state_dict_path", self.prompt_tuning_init_state_dict_path)
        problems.rank("num_ranks", self.num_ranks)
        problems.rank("num_tasks", self.num_tasks)
        task = self.prompt_tuning_init_task
        if task is not None and not (is_int(task) and task >= 0):
            problems.add("prompt_tuning_init_task", "an integer of 0 or more, or null", task)
