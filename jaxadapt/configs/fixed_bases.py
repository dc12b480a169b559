"""The configurations of the methods that train few numbers of a basis, which is fixed or shared by all modules.

The fields and defaults are those of PEFT 0.21.2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxadapt.configs.base import BiasConfig, ExcludesConfig, LayersConfig, LinearConfig
from jaxadapt.configs.frozen import FrozenDict
from jaxadapt.configs.validation import (
    INTEGER,
    POSITIVE,
    PROBABILITY,
    RANK,
    RANKS,
    Problems,
    Rule,
    all_of,
    checked,
    expects,
    is_number,
    one_of,
)


def _refuse_alternatives(problems: Problems, name: str, patterns: Mapping[str, Any] | None) -> None:
    """Report the patterns with alternatives at their top level, which PEFT's `.*\\.{pattern}$` splits."""
    for pattern in patterns or ():
        rest, groups = pattern, 1
        while groups:
            rest, groups = re.subn(r"\\.|\[[^]]*\]|\([^()]*\)", "", rest)
        if "|" in rest:
            problems.add(name, "patterns without alternatives at the top level", pattern, "put them in parentheses")


_UNGROUPED = all_of(RANKS, _refuse_alternatives)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ProjectionsConfig(BiasConfig, LinearConfig):
    """A configuration whose modules share random projections; its fields are as in `VeraConfig`."""

    r: int = checked(RANK, 256)
    projection_prng_key: int = 0
    save_projection: bool = True


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class C3AConfig(BiasConfig, LayersConfig, peft_type="C3A", bias="c3a_only"):
    """C3A (arXiv:2407.19342): the change of a weight consists of circulant blocks.

    Besides the attributes of `Config`:

    Attributes:
        block_size: the size of a block, which divides the inputs and the outputs of each module.
        target_modules, modules_to_save, bias, layers_to_transform, layers_pattern: as in `LoraConfig`.
        block_size_pattern: {pattern: block size} for modules with another block size, matched like `rank_pattern`, but
            an expression must match after a dot of the name, as in PEFT. PEFT does not group a pattern, so alternatives
            at its top level ("q|v") are refused.
        init_weights: true starts with zeros; "gaussian", "kaiming_uniform", "xavier_uniform" or false (the same as
            "xavier_uniform") with a random change.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> C3AConfig(target_modules=["q_proj"]).block_size
    256
    """

    block_size: int = checked(RANK, 256)
    block_size_pattern: Mapping[str, int] | None = checked(_UNGROUPED, FrozenDict())
    init_weights: bool | str = checked(
        one_of(True, False, "gaussian", "kaiming_uniform", "xavier_uniform"), "xavier_uniform"
    )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FourierFTConfig(BiasConfig, ExcludesConfig, LinearConfig, peft_type="FOURIERFT", bias="fourier_only"):
    """FourierFT (arXiv:2405.03003): the change of a weight has a sparse spectrum at random frequencies.

    Besides the attributes of `Config`:

    Attributes:
        n_frequency: the number of frequencies of a module, at most inputs · outputs.
        scaling: the factor of the change.
        random_loc_seed: the seed of the frequencies' positions, drawn as PyTorch draws them.
        fan_in_fan_out, target_modules, exclude_modules, modules_to_save, bias, layers_to_transform, layers_pattern: as
            in `LoraConfig`.
        n_frequency_pattern: {pattern: number} for modules with another number of frequencies, matched like
            `rank_pattern`, but an expression must match after a dot of the name, as in PEFT. PEFT does not group a
            pattern, so alternatives at its top level ("q|v") are refused.
        init_weights: true starts with zeros, false with normal values, which change the model.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> FourierFTConfig(target_modules=["q_proj"]).n_frequency
    1000
    """

    n_frequency: int = checked(RANK, 1000)
    scaling: float = 150.0
    random_loc_seed: int = 777
    n_frequency_pattern: Mapping[str, int] | None = checked(_UNGROUPED, FrozenDict())
    init_weights: bool = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PveraConfig(ProjectionsConfig, peft_type="PVERA", bias="pvera_only"):
    """PVeRA (arXiv:2512.07703): VeRA whose vector over ranks is the mean and the variance of a distribution.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank, which is larger than LoRA's.
        target_modules: the modules to adapt, as in `LoraConfig`.
        projection_prng_key: the seed of the shared projections, drawn as PyTorch draws them.
        save_projection: false leaves the projections out of the file; a reader draws them again from the seed.
        pvera_dropout: the dropout of the input in training.
        d_initial: the initial value of the vector over ranks.
        fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        init_weights: false draws the vector over ranks at random, and fills the vector over outputs with ones.
        sample_at_inference: true draws from the distribution outside training as well, which jaxadapt refuses.
        generator_seed: the seed of these draws in PEFT.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> PveraConfig(target_modules=["q_proj"]).r
    256
    """

    pvera_dropout: float = checked(PROBABILITY, 0.0)
    d_initial: float = 0.1
    sample_at_inference: bool = False
    generator_seed: int | None = checked(INTEGER, None)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RandLoraConfig(ProjectionsConfig, peft_type="RANDLORA", bias="randlora_only"):
    """RandLoRA (arXiv:2502.00987): scaled random bases, shared by all modules, make a change of full rank.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank of each basis.
        target_modules: the modules to adapt, as in `LoraConfig`.
        projection_prng_key: the seed of the bases of a new adapter.
        save_projection: true, since the bases that PEFT draws depend on the machine.
        sparse, very_sparse: true draws bases of -1, 0 and 1; two thirds or most of these are 0.
        randlora_dropout: the dropout of the input in training.
        fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        randlora_alpha: the change is multiplied by randlora_alpha / r.
        init_weights: true starts without a change of the weight, false with a random one.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> RandLoraConfig(target_modules=["q_proj"]).randlora_alpha
    640
    """

    r: int = checked(RANK, 32)
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = checked(PROBABILITY, 0.0)
    randlora_alpha: int = 640


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TinyLoraConfig(BiasConfig, LayersConfig, peft_type="TINYLORA", bias="tinylora_only"):
    """TinyLoRA (arXiv:2602.04118): a tiny vector mixes random matrices between a weight's largest singular vectors.

    Besides the attributes of `Config`:

    Attributes:
        r: the number of singular vectors.
        u: the length of each trained vector.
        weight_tying: the share of modules that have no vector of their own: 0 gives each module a vector, 1 all
            modules the same.
        projection_seed: the seed of the random matrices, drawn as PyTorch draws them.
        save_projection: false leaves the random matrices out of the file; a reader draws them again.
        init_v_bound: the bound of the vector's initial values with `init_weights="uniform"`.
        target_modules: the modules to adapt, as in `LoraConfig`.
        tinylora_dropout: the dropout of the input in training.
        fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        init_weights: true starts with zeros, "uniform" with values between `init_v_bound` and its negative. PEFT leaves
            the vector without values for false; here false starts with zeros.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> TinyLoraConfig(target_modules=["q_proj"]).u
    64
    """

    r: int = checked(RANK, 2)
    u: int = checked(RANK, 64)
    weight_tying: float = checked(expects("a number in [0, 1]", lambda x: is_number(x) and 0 <= x <= 1), 0.0)
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = checked(PROBABILITY, 0.0)
    fan_in_fan_out: bool = False
    init_weights: bool | str = checked(one_of(True, False, "uniform"), True, null=True)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class UniLoraConfig(BiasConfig, LinearConfig, peft_type="UNILORA", bias="unilora_only"):
    """Uni-LoRA (arXiv:2506.00799): the entries of all LoRA matrices are those of one trained vector.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank.
        proj_seed: the seed of the positions of the vector's entries.
        theta_d_length: the length of the vector.
        target_modules: the modules to adapt, as in `LoraConfig`.
        unilora_dropout: the dropout of the input in training.
        fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        init_theta_d_bound: the vector starts uniform between this number and its negative.
        init_weights: false starts with normal values.
        save_indices: true for a file that holds the positions, so that reading needs no order of modules.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> UniLoraConfig(target_modules=["q_proj"]).theta_d_length
    256
    """

    r: int = checked(RANK, 4)
    proj_seed: int = 42
    theta_d_length: int = checked(RANK, 256)
    unilora_dropout: float = checked(PROBABILITY, 0.0)
    init_theta_d_bound: float = checked(POSITIVE, 0.02)
    save_indices: bool = False


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VBLoRAConfig(BiasConfig, ExcludesConfig, peft_type="VBLORA", bias="vblora_only"):
    """VB-LoRA (arXiv:2405.15179): the matrices of LoRA consist of vectors from one bank that all modules share.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank.
        num_vectors: the number of vectors in the bank.
        vector_length: the length of each vector, which divides the inputs and the outputs of every module.
        topk: the number of vectors that are mixed for each part of a matrix.
        target_modules: the modules to adapt, as in `LoraConfig`.
        save_only_topk_weights: true for a file with the chosen vectors and their weights, which cannot be trained
            further; false for one with the logits of all vectors.
        vblora_dropout: the dropout of the input in training.
        exclude_modules, fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        init_vector_bank_bound: the bank starts uniform between this number and its negative.
        init_logits_std: the logits start normal with this deviation.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> VBLoRAConfig(target_modules=["q_proj"]).num_vectors
    256
    """

    _rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "topk",
            lambda c: f"at most num_vectors, {c.num_vectors}",
            lambda c: c.topk > c.num_vectors,
            reads=("num_vectors",),
        ),
    )

    r: int = checked(RANK, 4)
    num_vectors: int = checked(RANK, 256)
    vector_length: int = checked(RANK, 256)
    topk: int = checked(RANK, 2)
    save_only_topk_weights: bool = False
    vblora_dropout: float = checked(PROBABILITY, 0.0)
    fan_in_fan_out: bool = False
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VeraConfig(ProjectionsConfig, peft_type="VERA", bias="vera_only"):
    """VeRA (arXiv:2310.11454): two vectors per module scale random projections that all modules share.

    Besides the attributes of `Config`:

    Attributes:
        r: the rank, which is larger than LoRA's.
        target_modules: the modules to adapt, as in `LoraConfig`.
        projection_prng_key: the seed of the shared projections, drawn as PyTorch draws them.
        save_projection: false leaves the projections out of the file; a reader draws them again from the seed.
        vera_dropout: the dropout of the input in training.
        d_initial: the initial value of the vector over ranks.
        fan_in_fan_out, bias, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        init_weights: false draws the vector over ranks at random, and fills the vector over outputs with ones.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> VeraConfig(target_modules=["q_proj"]).r
    256
    """

    vera_dropout: float = checked(PROBABILITY, 0.0)
    d_initial: float = 0.1


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class WaveFTConfig(BiasConfig, ExcludesConfig, LinearConfig, peft_type="WAVEFT", bias="waveft_only"):
    """WaveFT (arXiv:2505.12532): the change of a weight has a few wavelet coefficients at random positions.

    Besides the attributes of `Config`:

    Attributes:
        n_frequency: the number of coefficients of a module, at most inputs · outputs.
        scaling: the factor of the change.
        wavelet_family: the wavelet. jaxadapt computes with "db1" (Haar) to "db10", "sym2" and "sym3".
        use_idwt: false uses the coefficients as entries of the change, without a wavelet.
        random_loc_seed: the seed of the coefficients' positions, drawn as PyTorch draws them.
        fan_in_fan_out, target_modules, exclude_modules, modules_to_save, bias, layers_to_transform, layers_pattern: as
            in `LoraConfig`.
        n_frequency_pattern: {pattern: number} for modules with another number of coefficients, matched like
            `rank_pattern`.
        proportional_parameters: true gives a module a number of coefficients in proportion to the size of its weight.
        init_weights: true starts with zeros, false with normal values of deviation 0.01, which change the model.

    Raises:
        ConfigError: a value is invalid, or two values contradict each other; one error lists all problems.

    >>> WaveFTConfig(target_modules=["q_proj"]).wavelet_family
    'db1'
    """

    n_frequency: int = checked(RANK, 2592)
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    n_frequency_pattern: Mapping[str, int] | None = checked(RANKS, FrozenDict())
    proportional_parameters: bool = False
