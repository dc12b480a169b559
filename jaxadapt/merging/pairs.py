"""LoRA's tensors as pairs of matrices, one pair for each module in PyTorch, and the plain form of a LoRA file.

    PEFT's tensors ──read_pairs──► {module: Pair} ──arithmetic──► {module: Pair} ──write_pairs──► PEFT's tensors

The arithmetic is PEFT's, module by module, whatever layout a model has. Every reader of PEFT's files understands the
plain form: one rank, `lora_alpha = r`, the scales inside B, no patterns, no rsLoRA and no variant. Variants of LoRA
that are trained differently but compute what a plain LoRA does are converted, as PEFT 0.21.2 computes them
(`tuners/lora/variants.py`). The plain form's tensors are computed when they are read, so that one of them is in
memory at a time. This file needs neither JAX nor a model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.arrays.tensor_source import Derived, TensorSource, TensorSpec, as_source
from jaxadapt.configs import lora, matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.core.errors import ConfigError, MismatchError, met, raise_listed
from jaxadapt.keymaps.keymap import PEFT_PREFIX

# ---------------------------------------------------------------- pairs


Array = Any

MAGNITUDE = ".lora_magnitude_vector"
"""The end of the key of DoRA's magnitudes."""

_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora|lora_embedding)_(?P<side>[AB])(?:\.weight)?(?:\[=?(?:\d+:)?(?P<part>\d+(?:/|::)\d+)\])?"
)


class PairKeys(NamedTuple):
    """The keys of one pair; "" for a tensor that the file lacks."""

    a: str = ""
    b: str = ""


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
        b = self.b.transpose(1, 2, 0) if self.b.ndim == 3 else self.b
        end_a, end_b = self.ends
        return self.a.reshape(-1, *(end_a or self.a.shape[-1:])), b.reshape(b.shape[0], -1, *end_b)


def lora_pairs(keys: Iterable[str]) -> dict[str, PairKeys]:
    """Return `{module: keys}` of the pairs in a file; the part of a plan's key belongs to the module.

    >>> lora_pairs(["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight", "base_model.model.norm"])
    {'q': PairKeys(a='base_model.model.q.lora_A.weight', b='base_model.model.q.lora_B.weight')}
    >>> list(lora_pairs(["base_model.model.attn.lora_A.weight[=0/3]", "base_model.model.attn.lora_B.weight[0/3]"]))
    ['attn[0/3]']
    """
    pairs: dict[str, PairKeys] = {}
    for key in keys:
        match = _KEY.fullmatch(key.removeprefix(PEFT_PREFIX))
        if match is not None:
            module = match["module"] + (f"[{match['part']}]" if match["part"] else "")
            pairs[module] = pairs.get(module, PairKeys())._replace(**{match["side"].lower(): key})
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
    config = tensors.config
    assert isinstance(config, LoraConfig)
    pairs = lora_pairs(tensors.tensors)
    known = set[str]().union(*pairs.values())
    problems = [f"{module}: expected A and B, found only {k.a or k.b}" for module, k in pairs.items() if "" in k] + [
        f"{key}: not a tensor of a plain LoRA"
        for key in tensors.tensors
        if key not in known
        and not key.endswith(".base_layer.weight")
        and not (key.endswith(MAGNITUDE) and "use_dora" in keep)
        and "modules_to_save" not in keep
    ]
    raise_listed(MismatchError, f"{tensors.source}: cannot read these tensors as LoRA:", problems)
    shapes = as_source(tensors.tensors).shapes
    problems = []
    for module, keys in pairs.items() if not config.target_parameters else ():
        a, b = shapes[keys.a], shapes[keys.b]
        expected = config.rank_of(module_name(module))
        if a[0] != expected or expected % max(b[1], 1):
            problems.append(f"{module}: expected rank {expected}, found A {list(a)} and B {list(b)}")
    raise_listed(MismatchError, f"{tensors.source}: the configuration has other ranks than the file:", problems)
    return pairs


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
        module = module_name(name)
        ends = tuple(a.shape[1:]), tuple(b.shape[2:])
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
        rank = config.rank_of(module) if matching.is_parameter(config, module) else len(a)
        if len(a) > rank and len(a) % rank == 0:  # the rows of A are (expert, rank), the columns of B (rank, expert)
            a = a.reshape(-1, rank, a.shape[1])
            b = b.reshape(b.shape[0], rank, -1).transpose(2, 0, 1)
        shared = "a" if "[=" in key_a else "b" if "[=" in key_b else ""
        pairs[name] = Pair(a, b, config.scale_of(module), ends, shared)
    return pairs


def write_pairs(pairs: Mapping[str, Pair], keys: Mapping[str, PairKeys]) -> dict[str, Array]:
    """Return `{key: array}`: the inverse of `read_pairs`, with scale 1."""
    return {key: x for name, own in keys.items() for key, x in zip(own, pairs[name].in_file(), strict=True)}


# ---------------------------------------------------------------- plain


_ONLY_IN_TRAINING = {"velora_config": ".lora_velora_embed", "monteclora_config": ".lora_monteclora_sampler."}


def convert_variant(tensors: PeftTensors) -> PeftTensors:
    """Convert the file of a LoRA variant to a LoRA without it that computes exactly the same.

    | field | conversion |
    |---|---|
    | `use_bdlora` | zeros are put between the blocks of A or B: A (r, in), B (out, r) |
    | `use_qalora` (arXiv:2309.14717; on a GPTQ base) | A (r, in/group) repeats for each input, times in/group² |
    | `velora_config`, `monteclora_config` | removed with their tensors, which only training uses |

    Further training trains a LoRA, not the variant. Other files are returned unchanged.

    Raises `ConfigError` for an adapter that is not LoRA, `MismatchError` if a tensor does not divide into the blocks.

    >>> import numpy as np
    >>> config = LoraConfig(r=2, target_modules=["q"], use_bdlora={"target_modules_bd_a": ["q"], "nblocks": 2})
    >>> a, b = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
    >>> convert_variant(PeftTensors(config, {a: np.ones((2, 2)), b: np.ones((3, 2))})).tensors[a].tolist()
    [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    """
    config = tensors.config
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{tensors.source}: convert_variant converts LORA only, found {config.peft_type}")
    arrays = {
        key: x
        for key, x in tensors.tensors.items()
        if not any(config.get(field) and part in f"{key}." for field, part in _ONLY_IN_TRAINING.items())
    }
    if config.use_bdlora:
        arrays = {key: _blocks_to_matrix(config.use_bdlora, key, x, tensors.source) for key, x in arrays.items()}
    if config.use_qalora:
        # PEFT averages each group of inputs and multiplies by the number of groups: A on the inputs themselves.
        size = config.qalora_group_size
        arrays |= {
            key: np.repeat(np.asarray(a) * np.asarray(a.shape[1] / size, a.dtype), size, axis=1)
            for key, a in arrays.items()
            if key.endswith(".lora_A.weight") and len(a.shape) == 2  # `pair_keys` refuses others
        }
    return dataclasses.replace(
        tensors,
        config=config.replace(use_bdlora=None, use_qalora=False, **dict.fromkeys(_ONLY_IN_TRAINING)),
        tensors=arrays,
    )


def _blocks_to_matrix(bdlora: Mapping[str, Any], key: str, x: Array, source: str) -> Array:
    """Return a tensor's blocks on the diagonal of a matrix; other tensors unchanged."""
    module, dot, side = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
    field = {"A.weight": "target_modules_bd_a", "B.weight": "target_modules_bd_b"}.get(side, "") if dot else ""
    if not any(pattern in module for pattern in bdlora.get(field) or ()):  # as in PEFT, anywhere in the name
        return x
    count = bdlora.get("nblocks", 1)
    if x.shape[0] % count:
        raise MismatchError(f"{source}: {key}: expected rows for {count} blocks (use_bdlora), found {list(x.shape)}")
    rows, columns = x.shape[0] // count, x.shape[1]
    matrix = np.zeros((count, rows, count, columns), x.dtype)
    matrix[range(count), :, range(count)] = np.asarray(x).reshape(count, rows, columns)
    return matrix.reshape(x.shape[0], count * columns)


# ---------------------------------------------------------------- plain form


_SCALE_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_VARIANTS = ("use_qalora", "use_bdlora", "velora_config", "monteclora_config")


def plain_lora(tensors: PeftTensors, first: PeftTensors | None = None, *, keep: Collection[str] = ()) -> PeftTensors:
    """Return a LoRA file in its plain form, which computes the same.

    A and B are padded with zeros to the largest rank r; `lora_alpha` is r, so that the scale is 1, and B is multiplied
    by the old scale. B in bfloat16 or float16 becomes float32 unless the product is exact, and so does a tensor of
    another dtype than in `first`. `target_modules` lists the modules of the file if the configuration chooses them by
    an expression, by layers or by exclusion.

    Args:
        tensors: the adapter; its tensors are read later, one at a time.
        first: the initial adapter, for a configuration whose initialization changed the base (PiSSA, OLoRA, …). The
            result is for the original base and has twice the rank: s·(B·A − B₀·A₀) = [sB, −sB₀]·[A; A₀].
        keep: fields of the configuration whose tensors stay although a plain LoRA has none: "use_dora",
            "modules_to_save".

    Raises:
        ConfigError: the configuration is more than a LoRA; the message lists the fields and what helps.
        MismatchError: tensors are missing, unknown, or of another rank than the configuration's.

    >>> import numpy as np
    >>> config = LoraConfig(r=4, lora_alpha=8, target_modules=["q"], use_rslora=True)
    >>> a, b = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
    >>> plain = plain_lora(PeftTensors(config, {a: np.ones((4, 2)), b: np.ones((3, 4))}))
    >>> plain.config, float(plain.tensors[b][0, 0])
    (LoraConfig(r=4, target_modules=['q'], lora_alpha=4), 4.0)
    """
    config = tensors.config
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"{tensors.source}: a plain LoRA cannot express {config.peft_type}: {lora.merge_advice(config)}"
        )
    _refuse_fields(config, tensors.source, first is not None, keep)
    if any(config.get(name) for name in _VARIANTS):
        return plain_lora(convert_variant(tensors), None if first is None else convert_variant(first), keep=keep)
    arrays = as_source(tensors.tensors)
    pairs = pair_keys(tensors, keep)
    start = None if first is None else _check_first(tensors, first, arrays)
    ranks = _padded_ranks(config, pairs, arrays, tensors.source, first is not None)
    r = (1 if first is None else 2) * max(ranks.values(), default=config.r)
    parts: dict[str, _Part] = {
        key: (TensorSpec(*spec), functools.partial(arrays.read_into, key, None)) for key, spec in arrays.specs.items()
    }
    for module, keys in pairs.items():
        size = r if module in ranks else None
        parts[keys.a] = _plain_tensor(arrays, start, keys.a, 0, 1.0, size)
        parts[keys.b] = _plain_tensor(arrays, start, keys.b, 1, config.scale_of(module_name(module)), size)
    plain = config.with_scale_one(r).with_default_init()
    if isinstance(config.target_modules, str) or config.exclude_modules or config.layers_to_transform is not None:
        plain = plain.replace(
            target_modules=sorted(pairs), exclude_modules=None, layers_to_transform=None, layers_pattern=None
        )
    computed = Derived(
        tensors.source, parts, lambda key: parts[key][0], lambda key, slices: parts[key][1]()[*slices, ...]
    )
    return dataclasses.replace(tensors, config=plain, tensors=computed)


def _refuse_fields(config: LoraConfig, source: str, converts: bool, keep: Collection[str]) -> None:
    """Raise `ConfigError` for the fields that make the adapter more than W + s·B·A, with what helps for each."""
    fields = lora.fields_set(config, "base", "tensor", "copy", "token", "model")
    advice = lora.merge_advice(config)
    problems = [f"{name}={value!r}: {advice}" for name, value in fields.items() if name not in keep]
    problems += met(
        {
            f"{lora.init_field(config)}: this initialization changed the base of the adapter; pass the"
            " initial adapter (first=, `--first FOLDER`), or the original base (base=, `--base FOLDER`) for olora"
            " and pissa": lora.changes_base(config) and not converts and config.kasa_config is None,
            "target_parameters with patterns or a changed base: load the adapter into its model and use"
            " jaxadapt.merging.resize_rank, for a changed base after"
            " jaxadapt.initializers.for_original_base": config.target_parameters
            and (config.rank_pattern or config.alpha_pattern or converts),
        }
    )
    raise_listed(ConfigError, f"{source}: a plain LoRA cannot express this adapter:", problems)


def _padded_ranks(
    config: LoraConfig, pairs: Mapping[str, PairKeys], arrays: TensorSource, source: str, doubles: bool
) -> dict[str, int]:
    """Return `{module: rank}` of the modules that are padded: not those of experts and grouped convolutions.

    Raises `MismatchError` if one rank for all modules is impossible.
    """
    if config.target_parameters:
        return {}
    sizes = {module: (arrays.specs[keys.a].shape[0], arrays.specs[keys.b].shape[1]) for module, keys in pairs.items()}
    ranks = {module: rank for module, (rank, columns) in sizes.items() if rank == columns}
    largest = max(ranks.values(), default=config.r)
    raise_listed(
        MismatchError,
        f"{source}: one rank for all modules is impossible, because these are grouped convolutions, whose ranks belong"
        f" to their groups; {lora.merge_advice(config)}:",
        [module for module, (rank, _) in sizes.items() if module not in ranks and (doubles or rank != largest)],
    )
    return ranks


def _check_first(tensors: PeftTensors, first: PeftTensors, arrays: TensorSource) -> TensorSource:
    """Return the tensors of the initial adapter. Raises `MismatchError` if it is that of another adapter."""
    start = as_source(first.tensors)
    differ = [
        key
        for key in arrays
        if not key.endswith(".base_layer.weight")
        and (key not in start or start.specs[key].shape != arrays.specs[key].shape)
    ]
    what = f"{first.source}: expected the initial adapter of {tensors.source}"
    raise_listed(MismatchError, f"{what}; they differ at:", differ)
    ours, theirs = (
        {name: value for name, value in each.config.to_dict().items() if name in (*_SCALE_FIELDS, "init_lora_weights")}
        for each in (tensors, as_start(first, tensors.config))
    )
    if ours != theirs:
        raise MismatchError(f"{what}, with the same {', '.join(n for n in ours if ours[n] != theirs.get(n))}")
    return start


def as_start(first: PeftTensors, trained: Config) -> PeftTensors:
    """Return an initial adapter with the initialization of the trained one, if PEFT saved it as its guides say.

    These set `init_lora_weights` to true before they save it, so that a load does not change the base once more. A LoRA
    that starts so by itself has a B of zeros, and is returned unchanged.
    """
    if first.config.get("init_lora_weights") is not True or not isinstance(first.config, LoraConfig):
        return first
    is_zero = not any(np.asarray(first.tensors[pair.b]).any() for pair in lora_pairs(first.tensors).values())
    init = trained.get("init_lora_weights")
    return first if is_zero else dataclasses.replace(first, config=first.config.replace(init_lora_weights=init))


_Part = tuple[TensorSpec, Callable[[], np.ndarray]]
"""A tensor's spec, and the function that computes the tensor."""


def _plain_tensor(
    arrays: TensorSource, start: TensorSource | None, key: str, axis: int, scale: float, size: int | None
) -> _Part:
    """Return the plain form of A or B.

    Args:
        start: the initial adapter, whose tensor lies beside that of `arrays` along the rank, B's subtracted.
        axis: the axis of the rank.
        scale: the factor that multiplies it.
        size: the new rank; None for a tensor whose rank stays.
    """
    shape, dtype = arrays.specs[key]
    if start is not None and dtype != (other := start.specs[key].dtype):
        dtype = np.dtype(f"f{max(4, dtype.itemsize, other.itemsize)}")
    # bfloat16 has the exponents of float32, so a power of two is exact in it.
    is_exact = scale == 1 or (dtype.name == "bfloat16" and math.frexp(scale)[0] == 0.5)
    wide = dtype if dtype.itemsize >= 4 or is_exact else np.dtype("float32")
    new = TensorSpec(tuple(size if size and i == axis else n for i, n in enumerate(shape)), wide)

    def read() -> Any:
        values = np.asarray(arrays[key])
        if start is not None:
            first = np.asarray(start[key])
            values = np.concatenate(
                [x.astype(dtype, copy=False) for x in (values, first if axis == 0 else -first)], axis
            )
        if scale != 1:
            kind = np.promote_types(values.dtype, "float32")
            values = np.multiply(values, kind.type(scale), dtype=kind).astype(new.dtype, copy=False)
        missing = new.shape[axis] - values.shape[axis]
        return np.pad(values, [(0, missing if i == axis else 0) for i in range(values.ndim)]) if missing else values

    return new, read
