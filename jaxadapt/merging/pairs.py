"""LoRA's tensors as pairs of matrices, one pair for each module in PyTorch: the values of all arithmetic on LoRA.

    PEFT's tensors ──read_pairs──► {module: Pair} ──arithmetic──► {module: Pair} ──write_pairs──► PEFT's tensors

The arithmetic is PEFT's, module by module, whatever layout a model has. This file needs neither JAX nor a model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs import matching
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core.errors import ConfigError, MismatchError, raise_listed
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.storage.source import as_source

Array = Any

MAGNITUDE = ".lora_magnitude_vector"
"""The end of the key of DoRA's magnitudes."""

_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora|lora_embedding)_(?P<side>[AB])(?:\.weight)?(?:\[=?(?:\d+:)?(?P<part>\d+(?:/|::)\d+)\])?"
)


class PairKeys(NamedTuple):
    """The keys of one pair."""

    a: str
    b: str


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """The factors of one module: ΔW = scale · b @ a, in PyTorch's (out, in).

    This is ΔW by PEFT's definition, which adds the output projection's of an `nn.MultiheadAttention` twice.

    Attributes:
        a: (r, in), or (experts, r, in) for a parameter of several experts. A convolution's window is part of "in".
        b: (out, r), or (experts, out, r).
        scale: the scale s.
        ends: the last axes of A and of B in the file, such as a convolution's window.
        shared: for a part of a matrix, the factor that all its parts share, "a" or "b".
    """

    a: Array
    b: Array
    scale: float
    ends: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    shared: str = ""

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[-2]

    @property
    def sizes(self) -> tuple[int, int]:
        """(in, out)."""
        return self.a.shape[-1], self.b.shape[-2]

    def in_file(self) -> tuple[Array, Array]:
        """Return A and B in the shapes of the file; the scale is left out."""
        a, b = self.a, self.b.transpose(1, 2, 0) if self.b.ndim == 3 else self.b
        ends = self.ends[0] or a.shape[-1:], self.ends[1]
        return a.reshape(-1, *ends[0]), b.reshape(b.shape[0], -1, *ends[1])


def lora_pairs(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return `{module: {"A": key, "B": key}}` of the pairs in a file; the part of a plan's key belongs to the module.

    >>> lora_pairs(["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight", "base_model.model.norm"])
    {'q': {'A': 'base_model.model.q.lora_A.weight', 'B': 'base_model.model.q.lora_B.weight'}}
    >>> list(lora_pairs(["base_model.model.attn.lora_A.weight[=0/3]", "base_model.model.attn.lora_B.weight[0/3]"]))
    ['attn[0/3]']
    """
    pairs: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _KEY.fullmatch(key.removeprefix(PEFT_PREFIX))
        if match is not None:
            module = match["module"] + (f"[{match['part']}]" if match["part"] else "")
            pairs.setdefault(module, {})[match["side"]] = key
    return pairs


def module_name(name: str) -> str:
    """Return the module that a configuration names for a pair: an `nn.MultiheadAttention` for its projections.

    >>> module_name("0.attn[0/3]"), module_name("0.attn.base_layer.out_proj")
    ('0.attn', '0.attn')
    """
    return name.partition("[")[0].removesuffix(".base_layer.out_proj")


def pair_keys(tensors: PeftTensors, keep: Collection[str] = ()) -> dict[str, PairKeys]:
    """Return `{module: keys}` of a LoRA file.

    Args:
        tensors: the adapter. Copies of base weights in it are left out.
        keep: fields of the configuration whose tensors may be there: "use_dora", "modules_to_save".

    Raises `MismatchError` for tensors that are no pairs, or of another rank than the configuration's.
    """
    config, pairs = tensors.config, lora_pairs(tensors.tensors)
    assert isinstance(config, LoraConfig)
    known = {key for keys in pairs.values() for key in keys.values()}
    problems = [f"{module}: expected A and B, found only {next(iter(k))}" for module, k in pairs.items() if len(k) < 2]
    problems += [
        f"{key}: not a tensor of a plain LoRA"
        for key in tensors.tensors
        if key not in known
        and not key.endswith(".base_layer.weight")
        and not (key.endswith(MAGNITUDE) and "use_dora" in keep)
        and "modules_to_save" not in keep
    ]
    raise_listed(MismatchError, f"{tensors.source}: cannot read these tensors as LoRA:", problems)
    keys = {module: PairKeys(own["A"], own["B"]) for module, own in pairs.items()}
    _check_ranks(tensors, keys, config)
    return keys


def _check_ranks(tensors: PeftTensors, keys: Mapping[str, PairKeys], config: LoraConfig) -> None:
    """Raise `MismatchError` for pairs of another rank than the configuration's."""
    specs, problems = as_source(tensors.tensors).specs, list[str]()
    for module, own in keys.items() if not config.target_parameters else ():
        a, b, expected = specs[own.a].shape, specs[own.b].shape, config.rank_of(module_name(module))
        if a[0] != expected or expected % max(b[1], 1):
            problems.append(f"{module}: expected rank {expected}, found A {list(a)} and B {list(b)}")
    raise_listed(MismatchError, f"{tensors.source}: the configuration has other ranks than the file:", problems)


def read_pairs(tensors: Mapping[str, Array], keys: Mapping[str, PairKeys], config: LoraConfig) -> dict[str, Pair]:
    """Return the pairs of a plain LoRA.

    Args:
        tensors: `{key: array}`.
        keys: `{module or parameter: keys}`. The tensors of a parameter hold one pair for each expert.
        config: the configuration, which states the scales.

    Raises `ConfigError` for the pairs of a convolution with groups, which have no product.
    """
    pairs: dict[str, Pair] = {}
    for name, (key_a, key_b) in keys.items():
        a, b = tensors[key_a], tensors[key_b]
        if a.shape[0] != b.shape[1]:
            raise ConfigError(
                f"{name}: expected one pair of matrices A and B, found {list(a.shape)} and {list(b.shape)} (a"
                " convolution with groups); leave this module out"
            )
        module, ends = module_name(name), (tuple(a.shape[1:]), tuple(b.shape[2:]))
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
        experts, rest = divmod(a.shape[0], config.rank_of(module)) if matching.is_parameter(config, module) else (1, 0)
        if experts > 1 and not rest:  # the rows of A are (expert, rank), the columns of B (rank, expert)
            a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1)
        shared = "a" if "[=" in key_a else "b" if "[=" in key_b else ""
        pairs[name] = Pair(a, b, config.scale_of(module), ends, shared)
    return pairs


def write_pairs(pairs: Mapping[str, Pair], keys: Mapping[str, PairKeys]) -> dict[str, Array]:
    """Return `{key: array}`: the inverse of `read_pairs`, with scale 1."""
    return {key: x for name, own in keys.items() for key, x in zip(own, pairs[name].in_file(), strict=True)}
