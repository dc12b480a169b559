"""LoRA's configuration, with the fields and defaults of PEFT 0.21.2, and what follows from it.

`EFFECTS` names the fields that make an adapter more than W + s·B·A.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from jaxadapt.configs.base import Config, MethodConfig
from jaxadapt.configs.frozen import FrozenDict, find_pattern_value
from jaxadapt.configs.table import FACTS
from jaxadapt.configs.validation import (
    NO_LAYERS_WITH_EXPRESSION,
    NUMBER,
    NUMBERS,
    OBJECT,
    PROBABILITY,
    RANK,
    RANKS,
    TEXT,
    Rule,
    checked,
    flag_or_text,
    one_of,
)
from jaxadapt.core import paths
from jaxadapt.core.errors import ConfigError, raise_listed

# ---------------------------------------------------------------- lora variants


Effect = Literal["base", "copy", "layout", "model", "tensor", "token", "training"]

EFFECTS: dict[str, tuple[Effect, ...]] = {
    "use_dora": ("tensor",),
    "lora_bias": ("tensor",),
    "bias": ("tensor",),
    "modules_to_save": ("copy",),
    "trainable_token_indices": ("copy",),
    "kasa_config": ("tensor", "base"),
    "alora_invocation_tokens": ("token",),
    "layer_replication": ("model",),
    "ensure_weight_tying": ("model",),
    "arrow_config": ("model",),
    "megatron_config": ("model",),
    "use_qalora": ("layout",),
    "use_bdlora": ("layout",),
    "velora_config": ("training",),
    "monteclora_config": ("training",),
}
"""{field: its effects}.

| effect | with the field |
|---|---|
| base | the adapter belongs to a base whose weights its initialization changed |
| tensor | an adapted module has trained tensors besides A and B |
| copy | other modules, or rows of them, are trained in full |
| token | the adapter applies to some tokens only |
| model | the model or its other adapters take part in the computation |
| layout | A or B is stored in another form than a matrix (r, in) or (out, r) |
| training | only training differs; a trained adapter is a plain LoRA with unused tensors |
"""

# These initializations change the base weights. Unless it is converted, the adapter belongs to the changed base.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def fields_set(config: Config, *effects: Effect) -> dict[str, Any]:
    """Return `{field: value}` of the fields with one of these effects that the configuration sets; of all by default.

    An empty list counts as unset, an empty object as set (`kasa_config={}` is KaSA with PEFT's defaults).

    >>> fields_set(LoraConfig(use_dora=True, bias="all", layer_replication=[[0, 2]]), "tensor")
    {'use_dora': True, 'bias': 'all'}
    """
    values = {name: config.get(name) for name, of in EFFECTS.items() if not effects or not set(effects).isdisjoint(of)}
    return {name: value for name, value in values.items() if value not in (None, False, "none", ())}


def changes_base(config: Config) -> bool:
    """Return True if the initialization of this configuration changes the base weights."""
    init = config.get("init_lora_weights")
    by_init = isinstance(init, str) and init.lower().startswith(CHANGES_THE_BASE)
    return by_init or config.get("kasa_config") is not None


def init_field(config: Config) -> str:
    """Return the field that selects the initialization, for messages."""
    return (
        f"init_lora_weights={config.get('init_lora_weights')!r}" if config.get("kasa_config") is None else "kasa_config"
    )


def require_original_base(
    config: Config,
    source: str,
    way: str = "Read it with jaxadapt.read(path, change_base=True), and load takes that part out of the model's weights"
    " as PEFT does on loading, or with change_base=False if they are changed already",
) -> None:
    """Raise `ConfigError` if the adapter belongs to a base that its initialization changed.

    `way` says how to use it with that base.
    """
    if changes_base(config):
        raise ConfigError(
            f"{source}: {init_field(config)}: the initialization of this adapter took a part out of the base"
            f" weights, so it does not fit the original base. {way}. Or convert it to a plain LoRA with the base it was"
            " trained on (jaxadapt.initializers.for_original_base; in PEFT, save_pretrained with"
            " path_initial_model_for_weight_conversion), or merge it into that base (the only way for KaSA)"
        )


def reasons_not_a_product(config: Config) -> list[str]:
    """Return the fields that make an adapter more than W + s·B·A; an empty list if there are none."""
    if not isinstance(config, LoraConfig):
        return [f"peft_type is {config.peft_type}"]
    return [f"{name}={value!r}" for name, value in fields_set(config).items()]


def merge_advice(config: Config) -> str:
    """Return how a program gets the effect of an adapter that it has no file for; for messages.

    >>> merge_advice(LoraConfig(bias="all"))
    'merge the adapter (`jaxadapt merge BASE ADAPTER --out FOLDER`)'
    """
    facts = FACTS[config.peft_type]
    if config.peft_type not in FACTS:
        return "only PEFT runs this method"
    if not facts.merges:
        return "it changes no weight, so that no merged model has its effect either; PEFT and jaxadapt.load run it"
    if config.get("alora_invocation_tokens") is not None:
        return "it changes some tokens only, so that no merged model has its effect; PEFT and jaxadapt.load run it"
    if config.get("target_parameters") or config.get("layer_replication") or not facts.merges_files:
        return "merge it into its model in memory (jaxadapt.export.export_base(model, folder, adapter))"
    if config.get("kasa_config") is not None:
        return (
            "merge it into its base in memory (jaxadapt.load(jaxadapt.read(…, change_base=True), model),"
            " jaxadapt.merge)"
        )
    merge = "merge the adapter (`jaxadapt merge BASE ADAPTER --out FOLDER`)"
    if config.get("lora_bias"):
        return f"{merge} if the adapted modules of the base have biases; else only PEFT and jaxadapt.load run it"
    nearest = ", or approximate it by a plain LoRA (`jaxadapt export … --rank R --base BASE`)"
    return f"{merge}{nearest if config.get('use_dora') else ''}"


# ---------------------------------------------------------------- lora


_V = TypeVar("_V")

# "pissa_niter_<number>" is allowed too. PEFT ignores the case of those in `_CASELESS`.
INITS = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica", "lora_ga")
_CASELESS = ("gaussian", "olora", "mica")

_INIT = flag_or_text(
    f'true, false, {json.dumps(INITS)[1:-1]} or "pissa_niter_<number>"',
    rf"{'|'.join(INITS)}|pissa_niter_\d+|(?i:{'|'.join(_CASELESS)})",
)

_SPELLINGS = {
    **dict.fromkeys(("rank", "lora_rank", "lora_r"), "r"),
    **dict.fromkeys(("alpha", "loraalpha"), "lora_alpha"),
    **dict.fromkeys(("dropout", "dropout_rate", "lora_drop"), "lora_dropout"),
    **dict.fromkeys(("module_path", "modules", "targets", "lora_target_modules"), "target_modules"),
    **dict.fromkeys(("rslora", "use_rs_lora", "rank_stabilized"), "use_rslora"),
    **dict.fromkeys(("dora", "use_weight_decomposition"), "use_dora"),
    "init_weights": "init_lora_weights",
}
"""{name in another library or paper: field}, for suggestions in errors."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoraFields(MethodConfig):
    """The fields of LoRA, which AdaLoRA has too; `LoraConfig` describes them."""

    r: int = checked(RANK, 8)
    target_modules: str | Collection[str] | None = None
    exclude_modules: str | Collection[str] | None = None
    lora_alpha: int | float = checked(NUMBER, 8)
    lora_dropout: float = checked(PROBABILITY, 0.0)
    fan_in_fan_out: bool | None = checked(one_of(True, False, None), False)  # some files have null
    bias: str = checked(one_of("none", "all", "lora_only"), "none")
    use_rslora: bool = False
    modules_to_save: Collection[str] | None = None
    init_lora_weights: bool | str = checked(_INIT, True, null=True)
    layers_to_transform: int | Collection[int] | None = None
    layers_pattern: str | Collection[str] | None = None
    rank_pattern: Mapping[str, Any] | None = None
    alpha_pattern: Mapping[str, int | float] = checked(NUMBERS, FrozenDict())
    megatron_config: Mapping[str, Any] | None = checked(OBJECT, None)
    megatron_core: str | None = checked(TEXT, "megatron.core")
    trainable_token_indices: Collection[int] | Mapping[str, Collection[int]] | None = None
    loftq_config: Mapping[str, Any] | None = checked(OBJECT, FrozenDict())
    eva_config: Mapping[str, Any] | None = checked(OBJECT, None)
    corda_config: Mapping[str, Any] | None = checked(OBJECT, None)
    lora_ga_config: Mapping[str, Any] | None = checked(OBJECT, None)
    use_dora: bool = False
    velora_config: Mapping[str, Any] | None = checked(OBJECT, None)
    alora_invocation_tokens: Collection[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = checked(RANK, 16, null=True)
    monteclora_config: Mapping[str, Any] | None = checked(OBJECT, None)
    layer_replication: Collection[Collection[int]] | None = None
    lora_bias: bool = False
    target_parameters: Collection[str] | None = None
    use_bdlora: Mapping[str, Any] | None = checked(OBJECT, None)
    arrow_config: Mapping[str, Any] | None = checked(OBJECT, None)
    kasa_config: Mapping[str, Any] | None = checked(OBJECT, None)
    ensure_weight_tying: bool = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoraConfig(LoraFields, peft_type="LORA"):
    """LoRA (arXiv:2106.09685): y = W x + s · B A x with s = lora_alpha / r (or / √r with `use_rslora`).

    The fields are PEFT's, in PEFT's order. Sub-configurations of variants are objects and keep every key. "Refused"
    below means that the file is read and written, but `adapt` and `load` raise `ConfigError`, since the field changes
    the computation.

    Attributes:
        task_type: the task of the model: "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS",
            "FEATURE_EXTRACTION" or None. A new adapter for "SEQ_CLS", "TOKEN_CLS" or "QUESTION_ANS" also trains the
            head of the task, where the model has one (as in PEFT).
        peft_type: always "LORA".
        auto_mapping: PEFT's record of the base model's class, an object or None. Kept in the file but not applied.
        peft_version: the version of PEFT whose schema the file follows. None if a file does not state it.
        base_model_name_or_path: the Hub name or path of the base model, or None.
        revision: the Hub revision of the base model, or None.
        inference_mode: PEFT's flag for an adapter that is not trained. Saved files have true, as PEFT writes them;
            jaxadapt does not read it.
        extra: every key that this class does not know; an addition to PEFT's fields.
        r: the rank of A and B, a positive integer (default 8).
        target_modules: the modules to adapt. A list entry matches a module whose path equals the entry or ends in it
            after a dot; a string is a regular expression for the whole path, or "all-linear". None selects PEFT's
            default for the model family; if the family has none, `adapt` raises `TargetError`.
        exclude_modules: modules that are not adapted although `target_modules` matches them. Same syntax.
        lora_alpha: the numerator of the scale s; an int or a float, kept as given (default 8).
        lora_dropout: the probability, in [0, 1), that training drops an input of A.
        fan_in_fan_out: true if the PyTorch layers store their weights as (in, out), such as GPT-2's Conv1D. JAX models
            do not need it; a merge of Hugging Face files does.
        bias: the biases that are trained beside A and B: "none", "all" (of the whole model) or "lora_only" (of the
            adapted modules).
        use_rslora: true scales by lora_alpha / √r instead of lora_alpha / r (arXiv:2312.03732).
        modules_to_save: modules that are trained in full and saved beside the adapter, or None. An entry matches a
            module whose path, or whose parent's path, ends in it.
        init_lora_weights: the initialization. True draws A at random and sets B to 0, so that a new adapter changes
            nothing; false draws both; "gaussian" draws A from a normal distribution. The others need base weights,
            data or gradients, which `jaxadapt.initializers.start` takes: "eva", "olora", "pissa",
            "pissa_niter_<number>", "corda", "loftq", "orthogonal", "mica" and "lora_ga".
        layers_to_transform: the indices of the layers to adapt, an int or a list; None adapts all layers. Requires
            `target_modules` to be a list or None.
        layers_pattern: the name of the layer list in the paths ("layers", "h"), or a list of such names. None accepts
            any name. Requires `layers_to_transform`.
        rank_pattern: {pattern: rank} for modules with another rank than `r`. A pattern is a regular expression for the
            whole path, or for its end after a dot. If two patterns match one module, the first one applies, and a
            warning names both.
        alpha_pattern: {pattern: alpha} for modules with another alpha than `lora_alpha`; matched like `rank_pattern`.
        megatron_config: the configuration of Megatron's parallel layers, an object or None. Refused.
        megatron_core: the name of Megatron's core module. Kept in the file but not applied.
        trainable_token_indices: the tokens whose rows of the embedding are trained in full: a list for the input
            embedding, or {module name: list}. None trains no rows.
        loftq_config: the settings for `init_lora_weights="loftq"`, which requires them: `loftq_bits` (4 or 8, default
            4) and `loftq_iter` (default 1).
        eva_config: the settings for `init_lora_weights="eva"`, such as `rho` and `tau`. None selects PEFT's defaults.
        corda_config: the settings for `init_lora_weights="corda"`: `corda_method` "ipm" (default) or "kpm". PEFT's
            file names in it are kept but not applied.
        lora_ga_config: the settings for `init_lora_weights="lora_ga"`: `direction`, `scale` and `stable_gamma`. None
            selects PEFT's defaults.
        use_dora: true trains a magnitude for each output beside the low-rank direction (DoRA, arXiv:2402.09353).
        velora_config: the settings of VeLoRA, which compresses activations in training, an object or None. Refused.
            `jaxadapt.merging.convert_variant` converts a trained adapter.
        alora_invocation_tokens: the token sequence from which on the adapter applies (aLoRA, arXiv:2504.12397). Run
            the model inside `jaxadapt.models.invoke`. Such an adapter cannot be merged. None adapts all tokens.
        use_qalora: true for an adapter whose A takes pooled inputs, on a GPTQ base (arXiv:2309.14717). Refused.
            `jaxadapt.merging.convert_variant` converts a trained adapter.
        qalora_group_size: the number of inputs that `use_qalora` pools (default 16). Used only by the conversion above.
        monteclora_config: the settings of MonteCLoRA, which samples the factors in training, an object or None.
            Refused. `jaxadapt.merging.convert_variant` converts a trained adapter.
        layer_replication: [start, end) pairs of base layers, for an adapter of a model that repeats layers of its base.
            The JAX model must already have the repeated layers; `adapt` and `load` check their number and values.
        lora_bias: true trains a bias with B. Requires `init_lora_weights` true or false, and no `use_dora`.
        target_parameters: the parameters to adapt by their own names, such as the stacked weights of experts: a list in
            which an entry matches a path that equals it or ends in it after a dot. None selects none.
        use_bdlora: the settings of BD-LoRA, whose A or B is block-diagonal, an object or None. Refused.
            `jaxadapt.merging.convert_variant` converts a trained adapter.
        arrow_config: the settings of Arrow, which routes tokens among several adapters, an object or None. Refused.
        kasa_config: the settings of KaSA (arXiv:2412.06071), an object with `beta` and `gamma`, or None. It adds a
            trained diagonal between A and B, and `start` removes the r smallest singular values of the base weight.
        ensure_weight_tying: true adapts a tied embedding and output head as one weight, with one adapter.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> LoraConfig(r=16, target_modules=["q_proj", "v_proj"]).lora_alpha
    8
    >>> LoraConfig(r=4.0)
    Traceback (most recent call last):
    ...
    jaxadapt.core.errors.ConfigError: LoraConfig: r: expected a positive integer, found 4.0; write 4
    """

    _spellings: ClassVar[Mapping[str, str]] = _SPELLINGS
    _ordered_patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    _rules: ClassVar[tuple[Rule, ...]] = (
        *NO_LAYERS_WITH_EXPRESSION,
        Rule(
            "loftq_config",
            'an object with init_lora_weights "loftq"',
            lambda c: c.init_lora_weights == "loftq" and not c.loftq_config,
        ),
        Rule(
            "use_dora", "false with a megatron_config", lambda c: c.use_dora and c.megatron_config, "unset one of them"
        ),
        Rule(
            "lora_bias",
            "false unless init_lora_weights is true or false",
            lambda c: c.lora_bias and not isinstance(c.init_lora_weights, bool),
            "unset lora_bias or use the default initialization",
        ),
        Rule("lora_bias", "false with use_dora", lambda c: c.lora_bias and c.use_dora, "unset one of them"),
    )

    rank_pattern: Mapping[str, int] = checked(RANKS, FrozenDict())

    def rank_of(self, module: str) -> int:
        """Return the rank of one PyTorch module or parameter.

        >>> LoraConfig(r=8, rank_pattern={"q_proj": 4}).rank_of("layers.0.q_proj")
        4
        """
        return find_pattern_value(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> int | float:
        """Return the alpha of one PyTorch module or parameter.

        >>> LoraConfig(lora_alpha=8, alpha_pattern={"q_proj": 4}).alpha_of("layers.0.v_proj")
        8
        """
        return find_pattern_value(self.alpha_pattern, module, self.lora_alpha)

    def scale_of(self, module: str) -> float:
        """Return the scale s of one PyTorch module or parameter: α/r, or α/√r with `use_rslora`.

        >>> LoraConfig(r=4, lora_alpha=8).scale_of("q_proj"), LoraConfig(r=4, use_rslora=True).scale_of("q_proj")
        (2.0, 4.0)
        """
        return self.alpha_of(module) / self.scale_divisor(self.rank_of(module))

    def scale_divisor(self, rank: float) -> float:
        """Return the divisor of alpha in the scale for a rank: the rank, or its square root with `use_rslora`.

        >>> LoraConfig(use_rslora=True).scale_divisor(4)
        2.0
        """
        return math.sqrt(rank) if self.use_rslora else rank

    @property
    def largest_rank(self) -> int:
        """The largest rank of `r` and `rank_pattern`."""
        return max(self.r, *self.rank_pattern.values(), 1)

    def with_ranks(self, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> LoraConfig:
        """Return the configuration with these ranks and alphas of modules or parameters, by name.

        A pattern is the last part of a name if all names that end in it have one value, else the full name.

        Raises:
            ConfigError: no patterns express the values.

        >>> LoraConfig(r=8).with_ranks({"0.q": 4, "0.v": 8}, {"0.q": 8, "0.v": 8})
        LoraConfig(rank_pattern={'q': 4})
        >>> LoraConfig(r=8).with_ranks({"0.q": 4, "0.v": 4}, {"0.q": 6, "0.v": 6})
        LoraConfig(r=4, lora_alpha=6)
        """
        if len(set(ranks.values())) == len(set(alphas.values())) == 1:
            (r, *_), (alpha, *_) = ranks.values(), alphas.values()
            return self.replace(r=r, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})
        config = self.replace(rank_pattern=_patterns(ranks, self.r), alpha_pattern=_patterns(alphas, self.lora_alpha))
        raise_listed(
            ConfigError,
            "rank_pattern and alpha_pattern cannot give these modules their own ranks: each name is also the end of"
            " another module's name:",
            [name for name in sorted(ranks) if config.rank_of(name) != ranks[name]]
            + [name for name in sorted(ranks) if config.alpha_of(name) != alphas[name]],
        )
        return config

    def with_scale_one(self, r: int) -> LoraConfig:
        """Return the configuration with rank `r` and scale 1 everywhere: `lora_alpha = r`, no patterns, no rsLoRA.

        >>> LoraConfig(r=4, lora_alpha=8, alpha_pattern={"q": 2}, use_rslora=True).with_scale_one(2)
        LoraConfig(r=2, lora_alpha=2)
        """
        return self.replace(r=r, lora_alpha=r, rank_pattern={}, alpha_pattern={}, use_rslora=False)

    def with_default_init(self) -> LoraConfig:
        """Return the configuration with PEFT's default initialization, for values that no longer come from another.

        >>> LoraConfig(init_lora_weights="eva", eva_config={"rho": 2.0}).with_default_init()
        LoraConfig()
        """
        return self.replace(
            init_lora_weights=True, eva_config=None, corda_config=None, lora_ga_config=None, loftq_config={}
        )


def _patterns(values: Mapping[str, _V], default: _V) -> dict[str, _V]:
    """Return patterns for the names whose value is not the default."""
    values_by_end = paths.group((name.rpartition(".")[2], value) for name, value in values.items())
    ends = {name: name.rpartition(".")[2] for name in sorted(values)}
    return {
        end if len(set(values_by_end[end])) == 1 else name: values[name]
        for name, end in ends.items()
        if values[name] != default
    }
