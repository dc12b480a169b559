"""The configurations of the methods whose change of a weight has low-rank factors; `lora` has LoRA's own.

The fields and defaults are those of PEFT 0.21.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from jaxadapt.configs.base import BiasConfig, ExcludesConfig, InitConfig, LinearConfig, RanksConfig
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.lora import LoraFields
from jaxadapt.configs.validation import (
    ANY,
    INTEGER,
    NO_LAYERS_WITH_EXPRESSION,
    NUMBER,
    NUMBERS,
    PROBABILITY,
    RANK,
    RANKS,
    SIZE,
    Problems,
    Rule,
    checked,
    expects,
    is_number,
    one_of,
)

_MASKS = expects(
    "an object of module.lora_E -> list of booleans, or null", lambda x: x is None or isinstance(x, FrozenDict)
)
_DECAY = expects("a number in (0, 1)", lambda x: is_number(x) and 0 < x < 1)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AdaLoraConfig(LoraFields, peft_type="ADALORA"):
    """AdaLoRA (arXiv:2303.10512): LoRA with a diagonal E between A and B, whose ranks shrink during training.

    The fields are those of `LoraConfig` and the schedule of the allocator. PEFT ignores some of the former. Besides the
    attributes of `Config`:

    Attributes:
        r: not used; the rank is `init_r`. A new adapter needs the default 8.
        init_r: the rank of every module at the start. The scale is lora_alpha / init_r, also after ranks shrank.
        target_r: the average rank at the end.
        tinit: the number of first steps, in which no rank shrinks.
        tfinal: the number of last steps, in which the ranks stay as they are.
        deltaT: the number of steps between two allocations of ranks.
        beta1, beta2: the decay of the averages of the sensitivity and of its uncertainty, in (0, 1).
        orth_reg_weight: the weight of `methods.adalora.orthogonality_loss` in the loss.
        total_step: the number of steps of the training. PEFT opens no file without it, and a new adapter needs it.
        rank_pattern: `{path of lora_E: list of booleans}`, the ranks that remain of `init_r` in the tensors of a file.
            None if all remain.
        target_modules, exclude_modules, lora_alpha, lora_dropout, fan_in_fan_out, bias, modules_to_save,
            layers_to_transform, layers_pattern, trainable_token_indices, layer_replication, ensure_weight_tying: as in
            `LoraConfig`.
        init_lora_weights: true starts with an E of zeros, false with random values everywhere.
        use_dora, loftq_config: refused, as in PEFT.
        use_rslora, alpha_pattern, megatron_config, megatron_core, eva_config, corda_config, lora_ga_config,
            velora_config, alora_invocation_tokens, use_qalora, qalora_group_size, monteclora_config, lora_bias,
            target_parameters, use_bdlora, arrow_config, kasa_config: fields of `LoraConfig` that PEFT keeps in the file
            and ignores. A new adapter needs their defaults.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> AdaLoraConfig(target_modules=["q_proj"], total_step=100).init_r
    12
    """

    ignored: ClassVar[tuple[str, ...]] = (
        "r", "use_rslora", "alpha_pattern", "megatron_config", "eva_config", "corda_config", "lora_ga_config",
        "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "lora_bias", "use_bdlora",
        "arrow_config", "kasa_config",
    )  # fmt: skip
    _rules: ClassVar[tuple[Rule, ...]] = (
        Rule("use_dora", "no value with ADALORA", lambda c: c.use_dora, "unset it, or use LORA"),
        Rule("loftq_config", "no value with ADALORA", lambda c: c.loftq_config, "unset it, or use LORA"),
        Rule(
            "tinit",
            "less than total_step - tfinal",
            lambda c: c.total_step is not None and c.tinit >= c.total_step - c.tfinal,
            "decrease tinit or tfinal, or increase total_step",
            reads=("tfinal", "total_step"),
        ),
    )

    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, Collection[bool]] | None = checked(_MASKS, None)
    r: int = checked(RANK, 8, null=True)
    alpha_pattern: Mapping[str, int | float] = checked(NUMBERS, FrozenDict(), null=True)
    target_r: int = checked(RANK, 8, null=True)
    init_r: int = checked(RANK, 12)
    tinit: int = checked(SIZE, 0)
    tfinal: int = checked(SIZE, 0)
    deltaT: int = checked(RANK, 1, null=True)
    beta1: float = checked(_DECAY, 0.85, null=True)
    beta2: float = checked(_DECAY, 0.85, null=True)
    orth_reg_weight: float = checked(expects("a number of at least 0", lambda x: is_number(x) and x >= 0), 0.5)
    total_step: int | None = checked(RANK, None)

    def mask_of(self, module: str) -> tuple[bool, ...]:
        """Return for each of the first ranks of a PyTorch module if it remains in the tensors of a file.

        >>> AdaLoraConfig(init_r=3, rank_pattern={"0.q.lora_E": [True, False, True]}).mask_of("0.q")
        (True, False, True)
        """
        return tuple((self.rank_pattern or {}).get(f"{module}.lora_E", (True,) * self.init_r))

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        masks: Mapping[str, Any] = self.rank_pattern or {}
        for key, mask in masks.items() if "rank_pattern" not in problems else ():
            if not isinstance(mask, tuple) or not all(isinstance(kept, bool) for kept in cast("tuple[Any, ...]", mask)):
                problems.add(f"rank_pattern[{key!r}]", "a list of booleans", mask)
            elif len(cast("tuple[Any, ...]", mask)) != self.init_r or not f".{key}".endswith(".lora_E"):
                problems.add(f"rank_pattern[{key!r}]", f"init_r = {self.init_r} booleans for a path of lora_E", mask)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DeftConfig(BiasConfig, ExcludesConfig, LinearConfig, peft_type="DEFT", bias="deft_only"):
    """DEFT: removes a subspace of the outputs from a weight, and puts a trained matrix in its place.

    Besides the attributes of `Config`:

    Attributes:
        r: the dimension of the subspace; a module with fewer outputs uses all of them.
        target_modules, exclude_modules, modules_to_save, fan_in_fan_out, bias, layers_to_transform, layers_pattern: as
            in `LoraConfig`.
        decomposition_method: "relu" projects with P·relu(P)ᵀ, "qr" with an orthonormal basis of P.
        init_scale: the factor of the initial values of R if `init_weights` is false.
        alpha: R is multiplied by alpha / r; null or 0 for no factor.
        para: true removes the subspace only, without R.
        deft_dropout: the dropout of R's input in training.
        init_weights: true starts without a change of the weight (except with `para`), false with a random one.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> DeftConfig(target_modules=["q_proj"]).decomposition_method
    'relu'
    """

    r: int = checked(RANK, 8)
    decomposition_method: str = checked(one_of("relu", "qr"), "relu")
    init_scale: float = 1.0
    alpha: int | None = checked(INTEGER, None)
    para: bool = False
    deft_dropout: float = checked(PROBABILITY, 0.0)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DeloraConfig(BiasConfig, InitConfig, RanksConfig, peft_type="DELORA", bias="delora_only"):
    """DeLoRA (arXiv:2503.18225): a low-rank change whose components have unit length and one learned strength.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank.
        delora_lambda: the initial strength.
        module_dropout: the dropout of the input in training. Despite its name, PEFT drops single entries of the input.
        target_modules, exclude_modules, modules_to_save, bias, layers_to_transform, layers_pattern, rank_pattern: as in
            `LoraConfig`.
        init_weights: true starts without a change of the weight, false with a random one.
        lambda_pattern: {pattern: initial strength} for modules with another one, matched like `rank_pattern`.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> DeloraConfig(target_modules=["q_proj"]).delora_lambda
    15
    """

    delora_lambda: int | float = checked(NUMBER, 15)
    module_dropout: float = checked(PROBABILITY, 0.0)
    lambda_pattern: Mapping[str, float] | None = checked(NUMBERS, FrozenDict())


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GraloraConfig(BiasConfig, LinearConfig, peft_type="GRALORA", bias="gralora_only"):
    """GraLoRA (arXiv:2505.20355): the weight is a grid of equal blocks, each with a low-rank change of its own.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank of a row of blocks, a multiple of `gralora_k`; each block has the rank r / gralora_k.
        hybrid_r: the rank of a LoRA of the whole weight beside the blocks; 0 for none.
        target_modules, fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        alpha: the change is multiplied by alpha / (r + hybrid_r).
        gralora_dropout: the dropout of the input in training.
        gralora_k: the number of blocks in each row and column, which must divide the inputs and the outputs.
        init_weights: true starts without a change of the weight, false with a random one.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> GraloraConfig(target_modules=["q_proj"]).gralora_k
    2
    """

    _rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "r",
            lambda c: f"a multiple of gralora_k = {c.gralora_k}",
            lambda c: c.r % c.gralora_k,
            reads=("gralora_k",),
        ),
    )

    r: int = checked(RANK, 32)
    hybrid_r: int = checked(SIZE, 0)
    alpha: int | float = checked(NUMBER, 64)
    gralora_dropout: float = checked(PROBABILITY, 0.0)
    gralora_k: int = checked(RANK, 2)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HiraConfig(ExcludesConfig, peft_type="HIRA"):
    """HiRA (Huang et al., ICLR 2025): the change of a weight is its elementwise product with a low-rank matrix.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank of the low-rank matrix.
        target_modules, exclude_modules, fan_in_fan_out, modules_to_save, layers_to_transform, layers_pattern: as in
            `LoraConfig`.
        hira_dropout: the dropout of the input in training; embeddings have none.
        init_weights: true and "gaussian" start without a change of the weight, false with a random one. "gaussian"
            draws A of a linear layer from a normal distribution.
        rank_pattern: kept in the file. PEFT ignores it, so that a new adapter may not set it.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> HiraConfig(target_modules=["q_proj"]).r
    32
    """

    _rules: ClassVar[tuple[Rule, ...]] = NO_LAYERS_WITH_EXPRESSION

    r: int = checked(RANK, 32)
    hira_dropout: float = checked(PROBABILITY, 0.0)
    fan_in_fan_out: bool = False
    init_weights: bool | str | None = checked(ANY, True)
    rank_pattern: Mapping[str, int] = checked(RANKS, FrozenDict())


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LycorisConfig(RanksConfig):
    """The fields of LoHa and LoKr, which are described there."""

    alpha_pattern: Mapping[str, float] = checked(NUMBERS, FrozenDict())
    alpha: int | float = checked(NUMBER, 8)
    rank_dropout: float = checked(PROBABILITY, 0.0, null=True)
    module_dropout: float = checked(PROBABILITY, 0.0, null=True)
    use_effective_conv2d: bool = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoHaConfig(InitConfig, LycorisConfig, peft_type="LOHA"):
    """LoHa (arXiv:2108.06098): the change of a weight is the elementwise product of two low-rank matrices.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank of both matrices.
        alpha: the change is multiplied by alpha / r.
        rank_dropout, module_dropout: the probability, in each call in training, of a row of the change to be 0, and of
            the whole change of a module.
        use_effective_conv2d: true decomposes the kernels of convolutions over their channels only. PEFT trains such an
            adapter with wrong gradients of `hada_w1_a` and `hada_w2_a`; jaxadapt's are those of the function.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern, rank_pattern,
            alpha_pattern: as in `LoraConfig`.
        init_weights: true starts without a change of the weight, false with a random one.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> LoHaConfig(target_modules=["q_proj"]).alpha
    8
    """


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoKrConfig(LycorisConfig, peft_type="LOKR"):
    """LoKr (arXiv:2309.14859): the change of a weight is the Kronecker product of two small matrices.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank of each factor that is itself a product of two matrices.
        alpha: the change is multiplied by alpha / r.
        rank_dropout, module_dropout: the probability, in each call in training, of a row of the change to be 0, and of
            the whole change of a module.
        use_effective_conv2d: true decomposes the kernels of convolutions over their channels only.
        decompose_both: true also decomposes the first factor, if r is less than half of its larger size.
        decompose_factor: the size of the first factor, or its upper bound if it does not divide a weight's size; -1
            splits each size into two divisors as close to each other as possible.
        rank_dropout_scale: true divides the rows that `rank_dropout` keeps by their share.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern, rank_pattern,
            alpha_pattern: as in `LoraConfig`.
        init_weights: true starts with a first factor of zeros, "lycoris" with a second factor of zeros, and false with
            a random change of the weight.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> LoKrConfig(target_modules=["q_proj"]).decompose_factor
    -1
    """

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | str = checked(one_of(True, False, "lycoris"), True, null=True)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MissConfig(BiasConfig, ExcludesConfig, peft_type="MISS", bias="MiSS_only"):
    """MiSS (arXiv:2409.15371): one trained block is repeated over all blocks of r inputs.

    Besides the attributes of `Config`:

    Attributes:
        r: the number of inputs of a block.
        miss_dropout: the dropout of the input in training. PEFT ignores it with `init_weights="bat"`.
        mini_r: with `init_weights="mini"`, the number of outputs of a block, a divisor of the outputs.
        target_modules, exclude_modules, layers_to_transform, layers_pattern, bias, modules_to_save: as in `LoraConfig`.
        init_weights: the variant: true adds a matrix to each block, "bat" multiplies the blocks by matrices too, and
            "mini" adds a smaller matrix that is the same for blocks of outputs. False is true with a random start.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> MissConfig(target_modules=["q_proj"]).r
    64
    """

    r: int = checked(RANK, 64)
    miss_dropout: float = checked(PROBABILITY, 0.0)
    mini_r: int = checked(RANK, 1)
    init_weights: bool | str = checked(one_of(True, False, "bat", "mini"), True, null=True)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PeanutConfig(InitConfig, ExcludesConfig, peft_type="PEANUT"):
    """PEANuT (arXiv:2410.01870): a small neural network of the weight computes its change.

    Besides the attributes of `Config`:

    Attributes:
        r: the width of the network.
        depth: the number of hidden layers on each side of the network, 0 or more.
        act_fn: the activation function, by its name in transformers. jaxadapt computes with those listed in
            `methods/peanut.py`.
        scaling: the factor of the change.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        init_weights: true starts without a change of the weight, false with a random one.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> PeanutConfig(target_modules=["q_proj"]).r
    32
    """

    r: int = checked(RANK, 32)
    depth: int = checked(SIZE, 0)
    act_fn: str = "relu"
    scaling: float = 1.0
