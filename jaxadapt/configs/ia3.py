"""IA3: `IA3Config`, with the fields and defaults of PEFT 0.21.2."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from jaxadapt.configs.base import Change, Config, MethodFacts
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.validation import Problems, match
from jaxadapt.core.errors import TargetError


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class IA3Config(Config):
    """(IA)³ (arXiv:2205.05638): one trained vector per module scales the outputs, or the inputs of feedforward modules.

    The fields are PEFT's, in PEFT's order.

    Attributes:
        task_type: the task of the model: "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS",
            "FEATURE_EXTRACTION" or None. A new adapter for "SEQ_CLS", "TOKEN_CLS" or "QUESTION_ANS" also trains the
            head of the task, where the model has one (as in PEFT).
        peft_type: always "IA3".
        auto_mapping: PEFT's record of the base model's class, an object or None. Kept in the file but not applied.
        peft_version: the version of PEFT whose schema the file follows. None if a file does not state it.
        base_model_name_or_path: the Hub name or path of the base model, or None.
        revision: the Hub revision of the base model, or None.
        inference_mode: PEFT's flag for an adapter that is not trained. Saved files have true, as PEFT writes them;
            jaxadapt does not read it.
        extra: every key that this class does not know; an addition to PEFT's fields.
        target_modules: the modules to adapt. A list entry matches a module whose path equals the entry or ends in it
            after a dot; a string is a regular expression for the whole path, or "all-linear". None selects PEFT's
            default for the model family; if the family has none, `adapt` raises `TargetError`.
        exclude_modules: modules that are not adapted although `target_modules` matches them. Same syntax.
        feedforward_modules: the targets whose vector scales the inputs instead of the outputs: a regular expression
            for the whole path, or a list of path endings. A list must be a subset of a list in `target_modules`; `[]`
            means that every vector scales outputs. None is allowed only if `target_modules` is None too, and selects
            PEFT's default.
        fan_in_fan_out: true if the PyTorch layers store their weights as (in, out), such as GPT-2's Conv1D. JAX models
            do not need it; a merge of Hugging Face files does.
        modules_to_save: modules that are trained in full and saved beside the adapter, or None. An entry matches a
            module whose path, or whose parent's path, ends in it.
        init_ia3_weights: true starts with ones, so that a new adapter changes nothing; false starts with random
            vectors.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]).peft_type
    'IA3'
    """

    shortens_targets: ClassVar[bool] = False
    new_values: ClassVar[Mapping[str, float]] = {"ia3_l": 1.0}
    facts: ClassVar[MethodFacts] = MethodFacts(
        trains="ia3_l",
        rows="call",
        learning_rate=2e-2,
        demo=FrozenDict({"target_modules": ("k_proj", "v_proj", "down_proj"), "feedforward_modules": ("down_proj",)}),
        accuracy=0.455,
        time=1.13,
    )
    default_targets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gpt2": {"target_modules": ("c_attn", "mlp.c_proj"), "feedforward_modules": ("mlp.c_proj",)},
        "bert|roberta": {
            "target_modules": ("key", "value", "output.dense"),
            "feedforward_modules": ("output.dense",),
        },
        "gpt_neo(?!x)": {"target_modules": ("q_proj", "v_proj", "c_proj"), "feedforward_modules": ("c_proj",)},
        "gptj": {"target_modules": ("q_proj", "v_proj", "fc_out"), "feedforward_modules": ("fc_out",)},
        # The keymap "llama" also serves Qwen2, which has other defaults in PEFT, so only numbered Llamas have one here.
        r"llama[123]|mistral": {
            "target_modules": ("k_proj", "v_proj", "down_proj"),
            "feedforward_modules": ("down_proj",),
        },
        r"qwen(?!\d_moe)|gemma": {
            "target_modules": ("q_proj", "v_proj", "down_proj"),
            "feedforward_modules": ("down_proj",),
        },
    }

    peft_type: str = "IA3"
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    feedforward_modules: str | Collection[str] | None = None
    fan_in_fan_out: bool | None = False
    modules_to_save: Collection[str] | None = None
    init_ia3_weights: bool = True

    def describe_change(self) -> str:
        return "relative change, rms of l − 1"

    def measure_change(self, module: str, arrays: Mapping[str, Any]) -> Change | None:
        l = arrays.get("ia3_l")
        return None if l is None else Change(float(((l - 1) ** 2).mean()) ** 0.5)

    def with_targets(self, targets: Sequence[str]) -> Self:
        inputs = self.feedforward_modules
        if isinstance(inputs, tuple):
            # IA3 requires a subset of the targets, so the names must be spelled alike. (PEFT keeps the old names, and
            # then refuses the file that it has written.)
            inputs = [name for name in targets if is_feedforward(self, name)]
        return self.replace(target_modules=targets, feedforward_modules=inputs)

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        targets, inputs = self.target_modules, self.feedforward_modules
        if isinstance(targets, tuple) and isinstance(inputs, tuple):
            untargeted = sorted(set(inputs) - set(targets), key=str)
            if untargeted:
                way_out = "add them to target_modules, or remove them here"
                problems.add("feedforward_modules", "a subset of target_modules", untargeted, way_out)


def is_feedforward(config: Config, name: str) -> bool:
    """Return True if the IA3 vector of the target `name` scales the module's inputs.

    A string must match the whole name. An entry of a list must be the name's end; as in PEFT, without a dot before it.

    Raises:
        TargetError: `feedforward_modules` is null, for which PEFT has defaults by model type.
        ConfigError: a regular expression is invalid.
    """
    inputs: str | tuple[str, ...] | None = config.get("feedforward_modules")
    if inputs is None:
        raise TargetError(
            "feedforward_modules: expected names, found null, which selects PEFT's default only if target_modules is"
            " null too; list the targets whose vectors scale inputs, or write [] for none"
        )
    if isinstance(inputs, str):
        return match("feedforward_modules", inputs, name) is not None
    return name.endswith(inputs)
