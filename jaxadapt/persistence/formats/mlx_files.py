"""mlx-lm's adapter folder ↔ `PeftTensors`: adapters.safetensors and an adapter_config.json of its own.

mlx-lm computes y + scale·(x·lora_a)·lora_b with lora_a (in, r) and lora_b (r, out), the transposes of PEFT's A and B.
A DoRA multiplies the result by m / ‖W + ΔW‖, as PEFT's does. One rank and one scale hold for all modules. The tensors
name the modules, so that a reader does not need `num_layers` and `keys` of the configuration.

The source is mlx-lm 0.32.2 (`tuner/utils.py`, `tuner/lora.py`, `tuner/dora.py`) and its history.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Generator, Mapping
from typing import Any, Literal

from jaxadapt.adapters.peft_tensors import PeftTensors, require_floats
from jaxadapt.arrays.tensor_source import TensorSource, as_source, combine, rename, transpose
from jaxadapt.configs import lora
from jaxadapt.configs.validation import mlx_keys
from jaxadapt.core.errors import (
    AdapterError,
    ConfigError,
    FileError,
    MismatchError,
    Report,
    byte_counter,
    raise_as,
    raise_listed,
    repeated,
)
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.merging.pairs import MAGNITUDE, PairKeys, lora_pairs
from jaxadapt.persistence.formats import EXPECTED, Finding, Format, Opened, Place, Wanted, error, module_keys, read_text
from jaxadapt.storage import atomic, location, safetensors

FUSE = "fuse the adapter into its base with mlx_lm.fuse"

# (the beginning of a module's name in PyTorch, in mlx-lm, and a pattern of what follows it)
_NAMES = tuple(
    (torch, mlx, re.compile(rest))
    for torch, mlx, rest in (
        ("gpt_neox.layers.", "model.h.", r"\d+\.(attention\.|mlp\.dense_)"),
        ("gpt_neox.embed_in", "model.embed_in", "$"),
        ("embed_out", "model.embed_out", "$"),
        ("transformer.h.", "model.h.", r"\d+\."),  # GPT-2 and GPT-J
        ("transformer.wte", "model.wte", "$"),
        ("transformer.wpe", "model.wpe", "$"),
        ("model.language_model.", "language_model.model.", ""),  # models with images, since transformers 4.52
    )
)
_CONV1D = re.compile(r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)")
_EMBEDDINGS = re.compile(r"(.+\.)?(embed_tokens|wte|wpe|word_embeddings|embed_in|tok_embeddings)")
_HEADS = ("lm_head", "embed_out")
_KEY = re.compile(r"(.+)\.(lora_a|lora_b|m)")
_LINEAR = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_EMBEDDING = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}


def translate_name(module: str, to: Literal["mlx", "torch"]) -> str:
    """Return the name that mlx-lm or PyTorch gives to a module of the other.

    >>> translate_name("transformer.h.0.attn.c_attn", "mlx"), translate_name("model.h.0.attention.dense", "torch")
    ('model.h.0.attn.c_attn', 'gpt_neox.layers.0.attention.dense')
    >>> translate_name("model.layers.0.mlp.up_proj", "mlx")
    'model.layers.0.mlp.up_proj'
    """
    for torch, mlx, rest in _NAMES:
        old, new = (torch, mlx) if to == "mlx" else (mlx, torch)
        if module.startswith(old) and rest.match(module, len(old)):
            return new + module.removeprefix(old)
    return module


# ---------------------------------------------------------------- finding


def recognizes(place: Place) -> bool:
    """Return True for a folder of mlx-lm, or a file of its weights (also "0000100_adapters.safetensors") in one."""
    if place.names is not None:
        return {location.CONFIG, location.MLX_WEIGHTS} <= place.names
    return place.at.name.endswith(location.MLX_WEIGHTS) and location.exists(place.at.parent / location.CONFIG)


# ---------------------------------------------------------------- the configuration


def parse_settings(text: str, source: str) -> lora.LoraConfig:
    """Return PEFT's configuration for mlx-lm's adapter_config.json, without the modules, which the tensors name.

    Raises `ConfigError` for a full fine-tune, for missing or invalid numbers, and for a scale with two meanings.
    """
    with raise_as(ConfigError, f"{source}: expected JSON", ValueError, RecursionError, advice="; write it again"):
        values: Any = json.loads(text)
    if not isinstance(values, dict) or not mlx_keys(values):
        raise ConfigError(
            f"{source}: expected mlx-lm's configuration with lora_parameters beside its weights; pass the folder that"
            " mlx_lm.lora wrote"
        )
    kind = values.get("fine_tune_type", "dora" if values.get("use_dora") is True else "lora")
    if kind == "full":
        raise ConfigError(
            f'{source}: expected an adapter, found fine_tune_type "full": the file has whole weights, for which PEFT'
            f" has no form; fuse them into the base with mlx_lm.fuse"
        )
    if kind not in ("lora", "dora"):
        raise ConfigError(f'{source}: fine_tune_type: expected "lora", "dora" or "full", found {kind!r}; {FUSE}')
    fields: Any = values.get("lora_parameters")
    if not isinstance(fields, dict):
        raise ConfigError(f"{source}: lora_parameters: expected an object, found {fields!r}; write rank and scale")
    rank: Any = fields.get("rank")
    scale, dropout = _number(fields.get("scale")), _number(fields.get("dropout", 0.0))
    rules = {
        f"rank: expected a positive integer, found {rank!r}": type(rank) is int and 1 <= rank < 2**31,
        f"scale: expected a number, found {fields.get('scale')!r}": not math.isnan(scale),
        f"dropout: expected a number from 0 to 1, found {fields.get('dropout')!r}": 0 <= dropout < 1,
    }
    raise_listed(
        ConfigError,
        f"{source}: invalid lora_parameters; correct them:",
        [text for text, is_kept in rules.items() if not is_kept],
    )
    _refuse_two_scales(values, fields.get("alpha"), rank, scale, source)
    model = values.get("model")
    return lora.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model if isinstance(model, str) and model else None,
        inference_mode=True,
        r=rank,
        lora_alpha=alpha_of(scale, rank),
        lora_dropout=dropout,
        use_dora=kind == "dora",
    )


def _number(value: object) -> float:
    """Return a finite number; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _refuse_two_scales(values: Mapping[str, Any], alpha: Any, rank: int, scale: float, source: str) -> None:
    """Refuse an alpha in a file that may be older than mlx-lm 0.14.2, which multiplied the scale by alpha / rank."""
    if alpha is None or "fine_tune_type" in values or alpha == rank:
        return
    number = _number(alpha)
    old = "" if math.isnan(number) else f" = {scale * number / rank:g}"
    raise ConfigError(
        f"{source}: the scale has two meanings: mlx-lm before 0.14.2 scales by scale·alpha/rank{old}, later versions by"
        f" scale = {scale:g}, and the file does not name its version. Remove alpha from lora_parameters, and set scale"
        " to the one that the adapter was trained with"
    )


def alpha_of(scale: float, rank: int) -> float:
    """Return the `lora_alpha` with alpha / rank == scale, an integer if it is one.

    A few scales of 64 bits are no quotient; alpha / rank is then one unit in the last place away.

    >>> alpha_of(20.0, 8), alpha_of(2.3, 3), alpha_of(2.3, 3) / 3
    (160, 6.8999999999999995, 2.3)
    """
    alpha = float(scale * rank)
    return int(alpha) if alpha.is_integer() else alpha


# ---------------------------------------------------------------- the tensors


@contextlib.contextmanager
def open_files(place: Place) -> Generator[Opened]:
    """Open an adapter of mlx-lm under PEFT's names; its tensors are read, and transposed, on demand.

    Raises:
        ConfigError: see `parse_settings`.
        MismatchError: PEFT has no form for a tensor, or a tensor contradicts the configuration; all are listed.
        FileError: a file cannot be read.
    """
    weights = place.at if place.names is None else place.at / location.MLX_WEIGHTS
    config = weights.parent / location.CONFIG
    settings = parse_settings(read_text(config), str(config))
    with safetensors.TensorFile(weights) as file:
        yield Opened(read_tensors(file, settings, os.fspath(place.path)), weights, "mlx-lm's folder")


def read_tensors(file: TensorSource, settings: lora.LoraConfig, source: str) -> PeftTensors:
    """Return the content of an open file as PEFT's; see `open_files`."""
    modules, problems = module_keys(file, _KEY, "lora_a, lora_b or m of a module")
    names = {module: translate_name(module, "torch") for module in modules}
    untied = any(name.rpartition(".")[2] in _HEADS for name in names.values())
    for module, keys in modules.items():
        shapes = {name: tuple(file.specs[key].shape) for name, key in keys.items()}
        if problem := _problem(names[module], shapes, settings, untied):
            problems.append(f"{module}: {problem}")
    problems += [f"{name}: two modules of the file have this name in PyTorch" for name in repeated(names.values())]
    if not modules:
        problems.append("no module with lora_a and lora_b")
    raise_listed(MismatchError, f"{source}: cannot read mlx-lm's adapter in PEFT's form; {FUSE}:", problems)
    matrices: dict[str, str] = {}
    for module, keys in modules.items():
        endings = _EMBEDDING if _EMBEDDINGS.fullmatch(names[module]) else _LINEAR
        matrices |= {f"{PEFT_PREFIX}{names[module]}.{endings[name]}": key for name, key in sorted(keys.items())}
    vectors = {new: matrices.pop(new) for new in list(matrices) if new.endswith(MAGNITUDE)}
    tensors = combine(source, [transpose(file, matrices), rename(file, vectors)])
    settings = settings.replace(
        target_modules=sorted(names.values()), fan_in_fan_out=all(map(_CONV1D.fullmatch, names.values()))
    )
    return PeftTensors(settings, tensors, source)


def _problem(name: str, shapes: Mapping[str, tuple[int, ...]], settings: lora.LoraConfig, untied: bool) -> str:
    """Return why a module has no form in PEFT; "" if it has one."""
    a, b, m = shapes.get("lora_a"), shapes.get("lora_b"), shapes.get("m")
    if a is None or b is None or (m is None) == settings.use_dora:
        wanted = "lora_a, lora_b and m" if settings.use_dora else "lora_a and lora_b"
        return f"expected {wanted}, found {', '.join(sorted(shapes))}"
    if len(a) == len(b) == 3:
        return f"one tensor holds all {a[0]} experts (mlx-lm's switch layer), which PEFT does not adapt as one module"
    rank = settings.r
    if len(a) != 2 or len(b) != 2 or a[1] != rank or b[0] != rank or 0 in (*a, *b):
        return f"expected lora_a (in, {rank}) and lora_b ({rank}, out), found {list(a)} and {list(b)}"
    if m is not None and m != b[1:]:
        return f"expected m ({b[1]},), found {list(m)}"
    if _EMBEDDINGS.fullmatch(name):
        if settings.use_dora:
            return "mlx-lm normalizes the rows of a DoRA embedding, PEFT its columns"
        if not untied:
            return "mlx-lm also changes a head that is tied to the embedding, PEFT does not; the head may be tied"
    return ""


# ---------------------------------------------------------------- writing


_TABLES = re.compile(r"(^|\.)(embed_tokens|wte|lm_head)$")


def write_folder(tensors: PeftTensors, folder: location.Location, wanted: Wanted, report: Report) -> int:
    """Write a LoRA or DoRA in its plain form as mlx-lm's folder. Return the number of its tensors.

    Args:
        tensors: the adapter in its plain form, with DoRA's magnitudes.
        folder: the folder.
        wanted: whether the base's head is its token embedding.
        report: called with ("export", bytes done, total bytes).

    Raises:
        MismatchError: mlx-lm has no form for a tensor; the message lists all of them.
        FileError: the folder contains a PEFT adapter, or cannot be written.
    """
    if location.exists(folder / location.WEIGHTS[0]):
        raise FileError(
            f"{folder}: contains a PEFT adapter, whose configuration has the same name; choose another folder"
        )
    config: Any = tensors.config
    arrays = as_source(tensors.tensors)
    modules = lora_pairs(arrays)
    require_floats(tensors.config, arrays.specs, folder)
    _refuse_modules(tensors, arrays, modules, wanted.tied, bool(config.use_dora))
    keys = {name: translate_name(name, "mlx") for name in modules}
    sides = {
        f"{keys[name]}.lora_{side}": key for name, pair in modules.items() for side, key in zip("ab", pair, strict=True)
    }
    stacks = {name: key for name, key in sides.items() if len(arrays.specs[key].shape) == 3}  # of experts, not turned
    matrices = {name: key for name, key in sides.items() if name not in stacks}
    vectors = {f"{keys[name]}.m": f"{PEFT_PREFIX}{name}{MAGNITUDE}" for name in modules if config.use_dora}
    file = combine(tensors.source, [transpose(arrays, matrices), rename(arrays, stacks | vectors)])
    document: dict[str, Any] = {
        "fine_tune_type": "dora" if config.use_dora else "lora",
        "num_layers": 0,  # no layers by position: `keys` has full names
        "lora_parameters": {"rank": config.r, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys.values())},
        **({"model": config.base_model_name_or_path} if config.base_model_name_or_path else {}),
    }
    count = byte_counter(report, "export", sum(map(file.nbytes, file)))
    atomic.make_folder(folder)
    with atomic.replacing_all([folder / location.MLX_WEIGHTS, folder / location.CONFIG]) as (weights, text):
        safetensors.write_to(weights, file.kinds, file.read, {"format": "mlx"}, progress=count, ahead=True)
        text.write(memoryview(json.dumps(document, indent=4, sort_keys=True).encode()))
    return len(file)


def _refuse_modules(
    tensors: PeftTensors, arrays: TensorSource, modules: dict[str, PairKeys], tied: bool | None, dora: bool
) -> None:
    problems: list[str] = []
    why = "the head is tied to it" if tied else "the head may be tied to it; pass base="
    for module, keys in modules.items():
        a, b = (arrays.specs[key].shape for key in keys)
        obstacles = {
            f"expected matrices A (r, in) and B (out, r), found {list(a)} and {list(b)}": (
                len(a) not in (2, 3) or len(b) != len(a) or a[:-2] != b[:-2] or a[-2] != b[-1]
            ),
            f"mlx-lm would change the token embedding and the head; {why}": (
                tied is not False and _TABLES.search(module) is not None
            ),
            "mlx-lm normalizes the rows of a DoRA embedding, PEFT its columns": dora and "lora_embedding" in keys.a,
            "expected its magnitudes, since use_dora is true, found none": (
                dora and f"{PEFT_PREFIX}{module}{MAGNITUDE}" not in arrays
            ),
        }
        problems += [f"{module}: {text}" for text, is_met in obstacles.items() if is_met][:1]
    raise_listed(
        MismatchError,
        f"{tensors.source}: mlx-lm has no form for these modules; {lora.merge_advice(tensors.config)}:",
        problems,
    )


def describe(source: str, opened: Opened | AdapterError) -> Finding:
    """Return the finding about a folder: how to convert it, or why it cannot be converted."""
    if isinstance(opened, AdapterError):
        return error(
            "other-library", (), str(opened), "an adapter of mlx-lm that PEFT has a form for",
            "correct what the message names; otherwise fuse the adapter into its base with mlx_lm.fuse",
        )  # fmt: skip
    return error(
        "other-library", (), "the folder is mlx-lm's, which PEFT and vLLM do not read; jaxadapt does", EXPECTED,
        f"run: jaxadapt convert {source} OUT",
    )  # fmt: skip


FORMAT = Format(recognizes, open_files, write_folder, describe=describe)
