"""The configurations of the methods without low-rank factors: rotations, vectors, entries and copies.

The fields and defaults are those of PEFT 0.21.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from jaxadapt.configs.base import (
    BiasConfig,
    Config,
    ExcludesConfig,
    InitConfig,
    LinearConfig,
    TargetsConfig,
)
from jaxadapt.configs.matching import is_feedforward
from jaxadapt.configs.validation import (
    INTEGER,
    NUMBER,
    PROBABILITY,
    RANK,
    TEXT,
    Rule,
    all_of,
    checked,
    expects,
    is_ints,
    is_number,
    one_of,
    patterns,
)
from jaxadapt.core.errors import repeated


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BeftConfig(InitConfig, TargetsConfig, peft_type="BEFT"):
    """BEFT: a trained vector is added to the output of each module, as a bias.

    Besides the attributes of `Config`:

    Attributes:
        target_modules: the modules to adapt, as in `LoraConfig`. None selects the projection of the values.
        modules_to_save: as in `LoraConfig`.
        init_weights: true starts with zeros, false with normal values.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> BeftConfig(target_modules=["v_proj"]).init_weights
    True
    """


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BOFTConfig(BiasConfig, ExcludesConfig, LinearConfig, peft_type="BOFT", bias="boft_only"):
    """BOFT (arXiv:2311.06243): a block-diagonal orthogonal matrix rotates the inputs, and a vector scales the outputs.

    Besides the attributes of `Config`:

    Attributes:
        boft_block_size: the size of a block; 0 if `boft_block_num` is given.
        boft_block_num: the number of blocks; 0 if `boft_block_size` is given.
        boft_n_butterfly_factor: the number of block-diagonal factors, which are permuted against each other. jaxadapt
            computes one.
        target_modules, exclude_modules, fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as
            in `LoraConfig`.
        boft_dropout: the share of blocks, rounded down, that are the identity in each call in training.
        init_weights: true starts without a change, false with random rotations and scales.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> BOFTConfig(target_modules=["q_proj"]).boft_block_size
    4
    """

    _rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "boft_block_size",
            "0 if boft_block_num is given, else the size of a block",
            lambda c: (c.boft_block_size == 0) == (c.boft_block_num == 0),
            "set one of them to 0",
        ),
    )

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = checked(RANK, 1)
    boft_dropout: float = checked(PROBABILITY, 0.0)
    init_weights: bool = checked(one_of(True, False), True)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HRAConfig(BiasConfig, InitConfig, ExcludesConfig, peft_type="HRA", bias="hra_only"):
    """HRA (arXiv:2405.17484): a chain of r reflections of the inputs of a module.

    Besides the attributes of `Config`:

    Attributes:
        r: the number of reflections. An even number starts without a change.
        apply_GS: true makes the reflections orthogonal to each other (Gram-Schmidt).
        target_modules, exclude_modules, layers_to_transform, layers_pattern, bias, modules_to_save: as in `LoraConfig`.
        init_weights: true starts with pairs of equal reflections, which cancel, if r is even; false with random ones.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> HRAConfig(target_modules=["q_proj"]).r
    8
    """

    r: int = checked(RANK, 8)
    apply_GS: bool = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class IA3Config(Config, peft_type="IA3"):
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

    _rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "feedforward_modules",
            "a subset of target_modules",
            lambda c: (
                isinstance(c.target_modules, tuple)
                and isinstance(c.feedforward_modules, tuple)
                and not set(c.feedforward_modules) <= set(c.target_modules)
            ),
            "add them to target_modules, or remove them here",
            found=lambda c: sorted(set(c.feedforward_modules) - set(c.target_modules), key=str),
        ),
    )

    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    feedforward_modules: str | Collection[str] | None = None
    fan_in_fan_out: bool | None = checked(one_of(True, False, None), False)
    modules_to_save: Collection[str] | None = None
    init_ia3_weights: bool = True

    def with_targets(self, targets: Sequence[str]) -> Self:
        inputs = self.feedforward_modules
        if isinstance(inputs, tuple):
            # IA3 requires a subset of the targets, so the names must be spelled alike. (PEFT keeps the old names, and
            # then refuses the file that it has written.)
            inputs = [name for name in targets if is_feedforward(self, name)]
        return self.replace(target_modules=targets, feedforward_modules=inputs)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LNTuningConfig(TargetsConfig, peft_type="LN_TUNING"):
    """LN tuning (arXiv:2312.11420): full training of the norms of a model.

    Besides the attributes of `Config`:

    Attributes:
        target_modules: the norms to train, or any other modules, as in `LoraConfig`. None selects PEFT's default for
            the model family.
        exclude_modules, modules_to_save: as in `LoraConfig`.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> LNTuningConfig(target_modules=["norm"]).peft_type
    'LN_TUNING'
    """

    exclude_modules: str | Collection[str] | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OFTConfig(BiasConfig, ExcludesConfig, LinearConfig, peft_type="OFT", bias="oft_only"):
    """OFT (arXiv:2306.07280): an orthogonal matrix of equal diagonal blocks rotates the inputs of a module.

    Besides the attributes of `Config`:

    Attributes:
        r: the number of blocks; 0 if `oft_block_size` is given.
        oft_block_size: the size of a block; 0 if `r` is given.
        module_dropout: the dropout of blocks in training, which PEFT does not apply, and neither does jaxadapt.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern, fan_in_fan_out, bias: as
            in `LoraConfig`.
        init_weights: true starts with the identity, false with random rotations.
        coft: true limits the rotation to a ball of radius eps / √blocks around the identity.
        eps: the radius.
        block_share: true uses the same rotation in all blocks.
        use_cayley_neumann: true approximates the rotation by a series, which in PEFT turns the other way than the exact
            rotation.
        num_cayley_neumann_terms: the number of terms of the series.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> OFTConfig(target_modules=["q_proj"]).oft_block_size
    32
    """

    _rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "r",
            "0 if oft_block_size is given, else the number of blocks",
            lambda c: (c.r == 0) == (c.oft_block_size == 0),
            "set one of them to 0",
        ),
    )

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = checked(PROBABILITY, 0.0)
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = checked(RANK, 5)
    init_weights: bool = checked(one_of(True, False), True)


_KEPT = expects("a positive number or null", lambda x: x is None or (is_number(x) and x > 0))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OSFConfig(TargetsConfig, peft_type="OSF"):
    """OSF (arXiv:2504.07097): the small singular directions of a weight are trained, and the large ones are kept.

    Besides the attributes of `Config`:

    Attributes:
        effective_rank: the number of singular directions to keep, or a fraction of the smaller size of the weight.
            None keeps half of them.
        target_modules, modules_to_save: as in `LoraConfig`, but None means "all-linear" for the families without a
            default of PEFT.
        rank_pattern: other values of `effective_rank`, by a regular expression that is searched in the module's path;
            the first one that matches is used.
        init_weights: false starts with random directions instead of the weight's own.
        target_svd_config: ignored, as in PEFT.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> OSFConfig(target_modules=["q_proj"]).effective_rank
    """

    effective_rank: int | float | None = checked(_KEPT, None)
    rank_pattern: Mapping[str, int | float] | None = checked(patterns(_KEPT), None)
    init_weights: bool | None = checked(one_of(True, False, None), True)
    target_svd_config: Mapping[str, int] | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RoadConfig(InitConfig, TargetsConfig, peft_type="ROAD"):
    """RoAd (arXiv:2409.00119): pairs of outputs of a module are rotated and scaled.

    Besides the attributes of `Config`:

    Attributes:
        variant: "road_1" has one angle and one scale per pair, "road_2" one per output, "road_4" two per output.
        group_size: the first half of each group of outputs is paired with the second half; an even divisor of the
            outputs.
        init_weights: true starts without a change, false with random angles and scales.
        target_modules, modules_to_save: as in `LoraConfig`.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> RoadConfig(target_modules=["q_proj"]).variant
    'road_1'
    """

    variant: str = checked(one_of("road_1", "road_2", "road_4"), "road_1")
    group_size: int = checked(all_of(RANK, expects("an even number", lambda x: x % 2 == 0)), 64)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ShiraConfig(InitConfig, TargetsConfig, peft_type="SHIRA"):
    """SHiRA (arXiv:2406.13175): a sparse change of the weight, at positions that stay fixed.

    Besides the attributes of `Config`:

    Attributes:
        r: the number of changed entries of a weight (out, in) is r·(out + in).
        mask_type: how the positions are chosen: "random". A file may have any other, since it holds the positions.
        random_seed: the seed of the random positions, drawn as PyTorch draws them; null draws from the adapter's key.
        target_modules: the modules to adapt, as in `LoraConfig`.
        fan_in_fan_out, modules_to_save: as in `LoraConfig`.
        init_weights: true starts without a change of the weight, false with a random one.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> ShiraConfig(target_modules=["q_proj"]).r
    32
    """

    r: int = checked(RANK, 32)
    mask_type: str | None = checked(TEXT, "random")
    random_seed: int | None = checked(INTEGER, None)
    fan_in_fan_out: bool = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SupertuningConfig(InitConfig, TargetsConfig, peft_type="SUPERTUNING"):
    """Super-Tuning (arXiv:2607.09287): a change of the largest entries of a weight, optionally with LoRA's.

    Besides the attributes of `Config`:

    Attributes:
        target_modules: the modules to adapt, as in `LoraConfig`.
        modules_to_save: as in `LoraConfig`.
        sparsity: the share of a weight's entries that stays as it is, from 0 to below 1.
        select_top: true changes the entries of the largest magnitude, false those of the smallest.
        r: the rank of an additional LoRA; null for none.
        lora_alpha: its change is multiplied by lora_alpha / r; 2·r by default.
        lora_dropout: the dropout of its input in training.
        init_weights: true starts without a change of the weight, false with a random one.
        save_precomputed_indices: false leaves the positions out of the file; a reader finds them in the base weight.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> SupertuningConfig(target_modules=["q_proj"], r=4).lora_alpha
    8
    """

    _rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "lora_alpha",
            "null if r is null",
            lambda c: c.r is None and c.lora_alpha is not None,
            "set r, or remove lora_alpha",
        ),
    )

    sparsity: float = checked(PROBABILITY, 0.99)
    select_top: bool = checked(one_of(True, False), True)
    r: int | None = checked(RANK, None)
    lora_alpha: float | None = checked(NUMBER, None)
    lora_dropout: float = checked(PROBABILITY, 0.0)
    save_precomputed_indices: bool = True

    def __post_init__(self) -> None:
        if self.lora_alpha is None and isinstance(self.r, int):
            object.__setattr__(self, "lora_alpha", 2 * self.r)  # as in PEFT
        super().__post_init__()


_TOKENS = expects("a list of integers from 0 on", lambda x: is_ints(x) and min(x, default=0) >= 0)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TrainableTokensConfig(InitConfig, peft_type="TRAINABLE_TOKENS"):
    """Trainable tokens: trains single rows of an embedding, as LoRA's `trainable_token_indices` without LoRA.

    Besides the attributes of `Config`:

    Attributes:
        token_indices: the rows to train.
        target_modules: the embeddings, as in `LoraConfig`; None selects the model's token embedding.
        init_weights: true starts with the embedding's own rows, false with random ones.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> TrainableTokensConfig(token_indices=[5, 7]).token_indices
    (5, 7)
    """

    _rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "token_indices",
            "each token once",
            lambda c: len(set(c.token_indices)) < len(c.token_indices),
            "remove the repeated tokens",
            found=lambda c: repeated(c.token_indices),
        ),
    )

    token_indices: Collection[int] = checked(_TOKENS, ())
    target_modules: str | Collection[str] | None = None
