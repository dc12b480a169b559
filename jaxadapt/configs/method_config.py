"""The base classes of the methods' configurations: fields that several methods have, described and checked once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxadapt.configs.base import Config
from jaxadapt.configs.frozen import FrozenDict, find_pattern_value
from jaxadapt.configs.validation import RANK, Problems, checked, expects, is_int


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MethodConfig(Config):
    """A configuration of a method.

    Fields that several methods have (`target_modules`, `modules_to_save`, `layers_pattern`, …) have the same check
    everywhere. A field whose default is a boolean, an integer, a number or a string takes only such values. Another
    check is stated with the default: `checked(RANK, 8)` for a positive integer, `SIZE` (an integer of at least 0),
    `INTEGER` (also null), `NUMBER`, `PROBABILITY`, `TEXT`, `OBJECT`, `RANKS` and `NUMBERS` (objects of patterns with
    such values), `one_of(…)` of the possible values, or `ANY`.
    """

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        self._check_layers(problems, with_expression=True)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TargetsConfig(MethodConfig):
    """A configuration that selects modules; its fields are as in `LoraConfig`."""

    target_modules: str | Collection[str] | None = None
    modules_to_save: Collection[str] | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LayersConfig(TargetsConfig):
    """A configuration that selects modules of some layers; its fields are as in `LoraConfig`."""

    layers_to_transform: int | Collection[int] | None = None
    layers_pattern: str | Collection[str] | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ExcludesConfig(LayersConfig):
    """A configuration that leaves out some of the selected modules, as in `LoraConfig`."""

    exclude_modules: str | Collection[str] | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LinearConfig(LayersConfig):
    """A configuration of a method for linear layers; `fan_in_fan_out` is as in `LoraConfig`.

    Attributes:
        init_weights: true starts without a change of the weight, unless the class states another meaning.
    """

    fan_in_fan_out: bool = False
    init_weights: bool = True


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RanksConfig(ExcludesConfig):
    """A configuration whose modules may have ranks of their own; its fields are as in `LoraConfig`."""

    r: int = checked(RANK, 8)
    rank_pattern: Mapping[str, int] | None = FrozenDict()

    def rank_of(self, module: str) -> int:
        """Return the rank of one PyTorch module."""
        return find_pattern_value(self.rank_pattern, module, self.r)


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

    num_virtual_tokens: int | None = checked(RANK, None)
    token_dim: int | None = checked(RANK, None)
    num_transformer_submodules: int | None = checked(expects("1, 2 or null", lambda x: x in (1, 2)), None)
    num_attention_heads: int | None = checked(RANK, None)
    num_layers: int | None = checked(RANK, None)
    modules_to_save: Collection[str] | None = None

    def _check(self, problems: Problems) -> None:
        super()._check(problems)
        width, heads = self.token_dim, self.num_attention_heads
        if is_int(width) and is_int(heads) and width and heads and heads > 0 and width % heads:
            problems.add("token_dim", f"a multiple of num_attention_heads={heads}", width)

    @property
    def submodules(self) -> int:
        """The number of transformers in the base that get virtual tokens of their own."""
        default = 2 if self.task_type == "SEQ_2_SEQ_LM" else 1
        return self.num_transformer_submodules or default

    @property
    def missing_sizes(self) -> tuple[str, ...]:
        """The fields that must have a value before the adapter's tensors have shapes."""
        return tuple(name for name in self._sizes if getattr(self, name) is None)
