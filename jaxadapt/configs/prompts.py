"""The configurations of the methods that add virtual tokens, or keys and values.

The fields and defaults are those of PEFT 0.21.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import MethodConfig
from jaxadapt.configs.validation import (
    NUMBER,
    OBJECT,
    PROBABILITY,
    RANK,
    SIZE,
    TEXT,
    Rule,
    checked,
    expects,
    is_int,
    is_ints,
    one_of,
)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PromptLearningConfig(MethodConfig):
    """The base class of the configurations whose adapter is a sequence of virtual tokens. Use one of its subclasses.

    `adapt` fills the sizes of the base that are None in, as PEFT does, if it can trace the model (`example=`).

    Attributes:
        num_virtual_tokens: the number n of virtual tokens, a positive integer.
        token_dim: the size of one virtual token: the width of the embeddings, or for keys and values the number of
            their heads times the size of one head. None: the base's.
        num_transformer_submodules: 2 for an encoder with a decoder, else 1. None: 2 if `task_type` is "SEQ_2_SEQ_LM".
        num_attention_heads: the number of attention heads of the base; for keys and values that of their heads. None:
            the base's.
        num_layers: the number of attention layers of the base. None: the base's.
        modules_to_save: modules that are trained in full beside the virtual tokens.
    """

    # The size fields that the file must state. PEFT fills in the others from the base when it loads.
    _sizes: ClassVar[tuple[str, ...]] = ("num_virtual_tokens", "token_dim")
    _rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "token_dim",
            lambda c: f"a multiple of num_attention_heads={c.num_attention_heads}",
            lambda c: c.token_dim and c.num_attention_heads and c.token_dim % c.num_attention_heads,
            reads=("num_attention_heads",),
        ),
    )

    num_virtual_tokens: int | None = checked(RANK, None)
    token_dim: int | None = checked(RANK, None)
    num_transformer_submodules: int | None = checked(expects("1, 2 or null", lambda x: x in (1, 2)), None)
    num_attention_heads: int | None = checked(RANK, None)
    num_layers: int | None = checked(RANK, None)
    modules_to_save: Collection[str] | None = None

    @property
    def submodules(self) -> int:
        """The number of transformers in the base that get virtual tokens of their own."""
        return self.num_transformer_submodules or (2 if self.task_type == "SEQ_2_SEQ_LM" else 1)

    @property
    def missing_sizes(self) -> tuple[str, ...]:
        """The fields that must have a value before the adapter's tensors have shapes."""
        return tuple(name for name in self._sizes if getattr(self, name) is None)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AdaptionPromptConfig(MethodConfig, peft_type="ADAPTION_PROMPT"):
    """LLaMA-Adapter (arXiv:2303.16199): trained tokens that the last layers attend to, by a gate that starts closed.

    The fields are PEFT's. Those of every configuration are described in `Config`.

    Attributes:
        peft_type: always "ADAPTION_PROMPT".
        target_modules: the end of the names of the attention modules. None: "self_attn", Llama's.
        adapter_len: the number of tokens in each layer.
        adapter_layers: the number of layers that have tokens, counted from the last one.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> AdaptionPromptConfig(adapter_len=4, adapter_layers=2).adapter_len
    4
    """

    target_modules: str | None = checked(TEXT, None)
    adapter_len: int | None = checked(RANK, None)
    adapter_layers: int | None = checked(RANK, None)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CartridgeConfig(PromptLearningConfig, peft_type="CARTRIDGE"):
    """Cartridges (arXiv:2506.06266): a prefix of keys and values whose first tokens stay fixed.

    The fields are PEFT's. Those of every configuration are described in `Config`, those of every prompt method in
    `PromptLearningConfig`.

    Attributes:
        peft_type: always "CARTRIDGE".
        num_frozen_tokens: the number of virtual tokens at the start that are not trained (default 1).

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> CartridgeConfig(num_virtual_tokens=20).num_frozen_tokens
    1
    """

    _sizes: ClassVar[tuple[str, ...]] = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")
    _rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "num_frozen_tokens",
            lambda c: f"at most num_virtual_tokens={c.num_virtual_tokens}",
            lambda c: c.num_virtual_tokens is not None and c.num_frozen_tokens > c.num_virtual_tokens,
            reads=("num_virtual_tokens",),
        ),
    )

    num_frozen_tokens: int = checked(SIZE, 1)


_TOKENS = expects("a list of integers of 0 or more", lambda x: is_ints(x) and min(x, default=-1) >= 0)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CPTConfig(PromptLearningConfig, peft_type="CPT"):
    """Context-aware prompt tuning (arXiv:2410.17222): the embeddings of examples, each moved by a short vector.

    The fields are PEFT's. Those of every configuration are described in `Config`, those of every prompt method in
    `PromptLearningConfig`. `num_virtual_tokens` is the number of token ids.

    Attributes:
        peft_type: always "CPT".
        cpt_token_ids: the token ids of the examples, whose embeddings the prompt starts from (default [0]).
        cpt_mask: one integer for each token, which PEFT keeps and does not use (default 1).
        cpt_tokens_type_mask: the type of each token (default 1). The remainder by 4 is 1 for the template of an input,
            2 for an input, 3 for the template of an output and 0 for an output, which is not trained. Outputs with
            larger types belong to later examples. 0 itself is no part of an example.
        opt_weighted_loss_type: "decay" weights the loss of each example's output (`jaxadapt.methods.cpt.loss`).
        opt_loss_decay_factor: the factor from one example to the one before it.
        opt_projection_epsilon: the largest norm of the vector of an input's token, times sqrt(token_dim / 2048).
        opt_projection_format_epsilon: the same for a template's token.
        tokenizer_name_or_path: the tokenizer of the token ids, for PEFT.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> CPTConfig(cpt_token_ids=[5, 2, 7], task_type="CAUSAL_LM").num_virtual_tokens
    3
    """

    _rules: ClassVar[tuple[Rule, ...]] = (
        *(
            Rule(
                name,
                lambda c: f"{len(c.cpt_token_ids)} integers, as many as cpt_token_ids",
                lambda c, name=name: (
                    None not in (c.cpt_token_ids, getattr(c, name)) and len(getattr(c, name)) != len(c.cpt_token_ids)
                ),
                reads=("cpt_token_ids",),
            )
            for name in ("cpt_mask", "cpt_tokens_type_mask")
        ),
        Rule(
            "num_virtual_tokens",
            lambda c: f"{len(c.cpt_token_ids)}, the number of cpt_token_ids",
            lambda c: c.cpt_token_ids is not None and c.num_virtual_tokens != len(c.cpt_token_ids),
            reads=("cpt_token_ids",),
        ),
        Rule("task_type", '"CAUSAL_LM"', lambda c: c.task_type != "CAUSAL_LM"),
        Rule("num_transformer_submodules", "1", lambda c: c.num_transformer_submodules not in (None, 1)),
    )

    cpt_token_ids: Sequence[int] | None = checked(_TOKENS, None)
    cpt_mask: Sequence[int] | None = checked(_TOKENS, None)
    cpt_tokens_type_mask: Sequence[int] | None = checked(_TOKENS, None)
    opt_weighted_loss_type: str = checked(one_of("none", "decay"), "none", null=True)
    opt_loss_decay_factor: float = checked(NUMBER, 1.0, null=True)
    opt_projection_epsilon: float = checked(NUMBER, 0.1, null=True)
    opt_projection_format_epsilon: float = checked(NUMBER, 0.1, null=True)
    tokenizer_name_or_path: str | None = checked(TEXT, None)

    def __post_init__(self) -> None:
        ids: Any = (0,) if self.cpt_token_ids is None else self.cpt_token_ids
        defaults = {"cpt_token_ids": ids, "num_transformer_submodules": 1}
        if isinstance(ids, Sequence):
            ones = (1,) * len(ids)
            defaults |= {"cpt_mask": ones, "cpt_tokens_type_mask": ones, "num_virtual_tokens": len(ids)}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PromptEncoderConfig(PromptLearningConfig, peft_type="P_TUNING"):
    """P-tuning (arXiv:2103.10385): prompt tuning whose embeddings are the output of a trained network.

    The fields are PEFT's. Those of every configuration are described in `Config`, those of every prompt method in
    `PromptLearningConfig`. A saved file holds the network's output, and cannot be trained further in this form.

    Attributes:
        peft_type: always "P_TUNING".
        encoder_reparameterization_type: the network: "MLP" (three dense layers) or "LSTM" (a bidirectional LSTM and two
            dense layers).
        encoder_hidden_size: the width of the network. None: `token_dim`.
        encoder_num_layers: the number of layers of the LSTM (default 2). An MLP always has three dense layers.
        encoder_dropout: the dropout between the layers of the LSTM. `adapt` refuses it; files keep it.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> PromptEncoderConfig(num_virtual_tokens=20).encoder_reparameterization_type
    'MLP'
    """

    encoder_reparameterization_type: str = checked(one_of("MLP", "LSTM"), "MLP", null=True)
    encoder_hidden_size: int | None = checked(RANK, None)
    encoder_num_layers: int = checked(RANK, 2, null=True)
    encoder_dropout: float = checked(PROBABILITY, 0.0, null=True)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PrefixTuningConfig(PromptLearningConfig, peft_type="PREFIX_TUNING"):
    """Prefix tuning (arXiv:2101.00190): trained keys and values before those of the tokens, in every attention layer.

    The fields are PEFT's. Those of every configuration are described in `Config`, those of every prompt method in
    `PromptLearningConfig`.

    Attributes:
        peft_type: always "PREFIX_TUNING".
        init_weights: None draws the prefix at random, and "zero" sets it to 0. (Also a prefix of zeros changes the
            output, since each of its keys takes part in the softmax.)
        encoder_hidden_size: the width of the layer between the embeddings and the prefix, with `prefix_projection`.
            None: `token_dim`.
        prefix_projection: true trains embeddings and two dense layers that compute the prefix. A saved file holds the
            prefix that they compute, and cannot be trained further in this form.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> PrefixTuningConfig(num_virtual_tokens=20).peft_type
    'PREFIX_TUNING'
    """

    _sizes: ClassVar[tuple[str, ...]] = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")

    init_weights: str | None = checked(one_of("zero", optional=True), None)
    encoder_hidden_size: int | None = checked(RANK, None)
    prefix_projection: bool = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PromptTuningConfig(PromptLearningConfig, peft_type="PROMPT_TUNING"):
    """Prompt tuning (arXiv:2104.08691): trained embeddings before those of the tokens.

    The fields are PEFT's. Those of every configuration are described in `Config`, those of every prompt method in
    `PromptLearningConfig`.

    Attributes:
        peft_type: always "PROMPT_TUNING".
        prompt_tuning_init: the initial values: "RANDOM" (normal), "SAMPLE_VOCAB" (the embeddings of random tokens) or
            "TEXT" (those of the tokens of a text, repeated or cut; pass them to `initializers.start`).
        prompt_tuning_init_text: the text of "TEXT". jaxadapt keeps it and has no tokenizer.
        tokenizer_name_or_path: the tokenizer of "TEXT", for PEFT.
        tokenizer_kwargs: arguments of the tokenizer of "TEXT", for PEFT.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> PromptTuningConfig(num_virtual_tokens=20).prompt_tuning_init
    'RANDOM'
    """

    _rules: ClassVar[tuple[Rule, ...]] = (
        *(
            Rule(
                name,
                'a value, because prompt_tuning_init is "TEXT"',
                lambda c, name=name: c.prompt_tuning_init == "TEXT" and not getattr(c, name),
            )
            for name in ("prompt_tuning_init_text", "tokenizer_name_or_path")
        ),
        Rule(
            "tokenizer_kwargs",
            'null unless prompt_tuning_init is "TEXT"',
            lambda c: c.prompt_tuning_init != "TEXT" and c.tokenizer_kwargs,
        ),
    )

    prompt_tuning_init: str = checked(one_of("TEXT", "SAMPLE_VOCAB", "RANDOM"), "RANDOM", null=True)
    prompt_tuning_init_text: str | None = checked(TEXT, None)
    tokenizer_name_or_path: str | None = checked(TEXT, None)
    tokenizer_kwargs: Mapping[str, Any] | None = checked(OBJECT, None)


_TASK = expects("an integer of 0 or more, or null", lambda x: x is None or (is_int(x) and x >= 0))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MultitaskPromptTuningConfig(PromptTuningConfig, peft_type="MULTITASK_PROMPT_TUNING"):
    """Multitask prompt tuning (arXiv:2303.02861): one prompt for all tasks, multiplied by a low-rank matrix per task.

    The fields are PEFT's. Those not listed here are described in `PromptTuningConfig`. Each call needs the tasks of its
    rows: see `jaxadapt.models.invoke`.

    Attributes:
        peft_type: always "MULTITASK_PROMPT_TUNING".
        prompt_tuning_init: the initial values: "RANDOM", or "TEXT" as in prompt tuning. The others start from an
            adapter of source tasks, which `prompt_tuning_init_state_dict_path` names in PEFT: "AVERAGE_SOURCE_TASKS",
            "EXACT_SOURCE_TASK" and "ONLY_SOURCE_SHARED". Pass it to `initializers.start`.
        prompt_tuning_init_state_dict_path: the path of the adapter of source tasks, for PEFT.
        prompt_tuning_init_task: the source task of "EXACT_SOURCE_TASK" (default 0).
        num_ranks: the rank of each task's matrix (default 1).
        num_tasks: the number of tasks (default 1).

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> MultitaskPromptTuningConfig(num_virtual_tokens=20, num_tasks=3).num_ranks
    1
    """

    prompt_tuning_init: str = checked(
        one_of("TEXT", "RANDOM", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"),
        "RANDOM",
        null=True,
    )
    prompt_tuning_init_state_dict_path: str | None = checked(TEXT, None)
    prompt_tuning_init_task: int | None = checked(_TASK, 0)
    num_ranks: int = checked(RANK, 1)
    num_tasks: int = checked(RANK, 1)
