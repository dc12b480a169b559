"""Checks of an adapter's tensors by its configuration. Their values are read one tensor at a time.

names and shapes ──compare with the configuration──► missing, unexpected, of another rank, not selected
values           ──one tensor after the other──────► NaN, untrained, huge
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from jaxadapt.adapters import peft_tensors
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.lora import LoraConfig
from jaxadapt.configs.table import FACTS
from jaxadapt.core import paths
from jaxadapt.core.errors import FileError
from jaxadapt.core.lazy import np
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.keymaps.pytorch import named_parameter
from jaxadapt.persistence.formats import Finding, count, error, first, such_as, warning, with_subjects

_Gram: TypeAlias = "tuple[np.ndarray, int]"

Shapes = Mapping[str, tuple[int, ...]]
Modules = Mapping[str, Shapes]
"""{module: {the tensor's name in it: shape}}."""

_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out", "embeddings")
_MAX_DIGITS = 6  # of a layer's number
_SAVE_AGAIN = "save the adapter again where it was trained; the missing values cannot be restored from the file"
_LINEAR, _EMBEDDING = "lora_A.weight", "lora_embedding_A"
_VARIANTS = (("lora_magnitude_vector", "use_dora", (_LINEAR, _EMBEDDING)), ("lora_B.bias", "lora_bias", (_LINEAR,)))
"""(the start of a tensor's name, the field of LoRA that adds it, the tensors of the modules that then have it)."""


def split_modules(shapes: Shapes, config: Config) -> tuple[dict[str, dict[str, tuple[int, ...]]], list[str]]:
    """Return {module: {tensor: shape}} of the method's tensors, and the other keys."""
    splits = {key: peft_tensors.split_key(key, config.peft_type) for key in shapes}
    modules = paths.nest((*split, shapes[key]) for key, split in splits.items() if split is not None)
    return modules, [key for key, split in splits.items() if split is None]


def module_settings(modules: Modules, config: Config) -> dict[str, tuple[int, float]]:
    """Return {module: (rank in the file, scale)} of a LoRA adapter's modules."""
    if not isinstance(config, LoraConfig):
        return {}
    shapes = {module: tensors.get(_LINEAR) or tensors.get(_EMBEDDING) or (0,) for module, tensors in modules.items()}
    return {
        module: (shape[0], config.scale_of(named_parameter(config, module)))
        for module, shape in shapes.items()
        if 0 not in shape
    }


# ---------------------------------------------------------------- names and shapes


def check_tensors(shapes: Shapes, config: Config, family: str = "") -> list[Finding]:
    """Find missing, empty and unexpected tensors, and other ranks than the configuration states.

    Args:
        shapes: by PEFT's names.
        config: the configuration.
        family: the type of the base model, for PEFT's default targets; "" if it is not known.
    """
    found = check_empty(shapes)
    if not peft_tensors.is_known_method(config.peft_type):
        return found
    modules, others = split_modules(shapes, config)
    if not modules and not found:
        return [error(
            "missing", (), f"no tensor of the method {config.peft_type} among {len(shapes)} tensors",
            "the method's tensors", "check that the configuration belongs to these weights",
        )]  # fmt: skip
    return [
        *found,
        *_check_parts(modules, config),
        *_check_targets(modules, config, family),
        *_check_saved(modules, others, config),
        *_check_layers(modules, config),
    ]


def check_empty(shapes: Shapes) -> list[Finding]:
    """Find tensors without elements, as DeepSpeed ZeRO-3 saves those that another process holds."""
    empty = {key: list(shape) for key, shape in shapes.items() if 0 in shape}
    return with_subjects(error(
        "empty", empty, f"no elements in {such_as(empty, 'tensor')} of shape {next(iter(empty.values()), None)}",
        "the whole tensors",
        "DeepSpeed ZeRO-3 keeps only a part of each parameter in a process. Gather them before saving"
        " (stage3_gather_16bit_weights_on_model_save, or deepspeed.zero.GatheredParameters), and save again",
    ))  # fmt: skip


def check_dtypes(dtypes: Mapping[str, str], config: Config) -> list[Finding]:
    """Find trained tensors that are no floating-point numbers, as a quantizer of whole files writes them.

    Args:
        dtypes: safetensors' names of dtypes by PEFT's names of tensors.
        config: the configuration.
    """
    facts = FACTS[config.peft_type]
    trained = {*facts.new_values, *(name for pair in facts.tensor_pairs for name in pair)}
    integers = [key for key, dtype in dtypes.items() if not dtype.startswith(("F", "BF"))]
    wrong = [key for key in integers if (peft_tensors.split_key(key, config.peft_type) or ("", ""))[1] in trained]
    return with_subjects(error(
        "dtype", wrong, f"{first(dtypes[key] for key in wrong)} in {such_as(wrong, 'tensor')}",
        "floating-point numbers: PEFT takes integers as the values themselves, without a scale",
        "save the adapter again where it was trained, or multiply the integers by their scales",
    ))  # fmt: skip


def _check_parts(modules: Modules, config: Config) -> list[Finding]:
    """Find the tensors that a module lacks, must not have, or has in another shape."""
    missing, unexpected, unequal, ranks = list[str](), list[str](), dict[str, str](), dict[str, str]()
    for each in _compare_parts(modules, config):
        if each.expected is None:
            unexpected.append(each.name)
        elif each.found is None:
            missing.append(each.name)
        elif each.name.endswith((_LINEAR, _EMBEDDING)):
            stored, stated = ((spec.shape or (None,))[0] for spec in (each.found, each.expected))
            ranks[each.name] = f"{each.name} has rank {stored} in the file and {stated} in the configuration"
        else:
            unequal[each.name] = str(each)
    of_variants = {field: [name for name in unexpected if f".{start}" in name] for start, field, _ in _VARIANTS}
    return with_subjects(
        error(
            "missing", missing, f"missing: {such_as(missing, 'tensor')}", "all tensors of each adapted module",
            _SAVE_AGAIN,
        ),
        *(error(
            "variant", names, f"{field} is false, but the file has {count(names, 'tensor')} of it, such as"
            f" {first(names)}", f"{field}: true. Without it, PEFT ignores them and computes something else",
            f"set {field} to true, or take adapter_config.json from where the adapter was trained",
        ) for field, names in of_variants.items()),
        error(
            "shape", unequal, f"A and B do not fit in {count(unequal, 'module')}: {first(unequal.values())}",
            "A of shape (r, in) and B of shape (out, r)", "save the adapter again",
        ),
        error(
            "rank", ranks, f"another rank than the configuration states in {count(ranks, 'module')}:"
            f" {first(ranks.values())}", "r and rank_pattern of the training, on which the scale depends",
            "take adapter_config.json from where the adapter was trained, or state the ranks in rank_pattern",
        ),
    )  # fmt: skip


def _compare_parts(modules: Modules, config: Config) -> list[paths.Finding]:
    """Compare the tensors of each module with those that it must have; others of a module are left aside."""
    expected: dict[str, paths.Spec] = {}
    found: dict[str, paths.Spec] = {}
    starts = tuple(start for start, _, _ in _VARIANTS)
    for module, tensors in modules.items():
        own = _expected_parts(module, tensors, config)
        expected |= {f"{PEFT_PREFIX}{module}.{name}": spec for name, spec in own.items()}
        compared = {name: shape for name, shape in tensors.items() if name in own or name.startswith(starts)}
        found |= {f"{PEFT_PREFIX}{module}.{name}": paths.Spec(shape) for name, shape in compared.items()}
    return paths.compare(expected, found)


def _expected_parts(module: str, tensors: Shapes, config: Config) -> dict[str, paths.Spec]:
    """Return {tensor: its shape} that a module with some of them must have; None for a size that the file decides."""
    pairs = [pair for pair in FACTS[config.peft_type].tensor_pairs if not tensors.keys().isdisjoint(pair)]
    expected = {name: paths.Spec() for pair in pairs for name in pair}
    if not isinstance(config, LoraConfig):
        return expected
    parameter = named_parameter(config, module)
    for a_name, b_name in pairs:
        a, b, rank = tensors.get(a_name), tensors.get(b_name), config.rank_of(parameter)
        if a and b and 0 not in (*a, *b):
            if matching.is_parameter(config, parameter) and a[0] % rank == 0:  # experts, in one tensor
                rank = a[0]
            expected[a_name] = paths.Spec((rank, *(None,) * (len(a) - 1)))
            expected[b_name] = paths.Spec((None, None if config.use_bdlora else a[0], *(None,) * (len(b) - 2)))
    for start, field, having in _VARIANTS:
        if config.get(field):
            present = [name for name in tensors if name.startswith(start)]
            due = [] if tensors.keys().isdisjoint(having) else [start]
            expected |= dict.fromkeys(present or due, paths.Spec())
    return expected


def _check_targets(modules: Modules, config: Config, family: str) -> list[Finding]:
    """Find modules that the targets do not select, and targets without tensors."""
    if (
        matching.is_all_linear(config)
        or peft_tensors.has_no_modules(config.peft_type)
        or not FACTS[config.peft_type].target_is_expression
    ):
        return []
    # No target selects the rows of an embedding, and the tensors of the whole adapter.
    adapted = [
        name
        for name, parts in modules.items()
        if name not in ("", "base_model") and not all(part.startswith("token_adapter") for part in parts)
    ]
    targets: str | Sequence[str] | None = config.get("target_modules")
    by_parameters = config.get("target_parameters")
    if targets is None:
        return [] if by_parameters or not adapted else _check_default_targets(adapted, config, family)
    if ignored := [] if by_parameters or config.get("layer_replication") else _ignored(adapted, modules, config):
        return [error(
            "untargeted", ignored, f"target_modules does not select {such_as(ignored, 'module')}",
            f"{_ALL_SELECTED}: PEFT ignores the other tensors",
            "correct target_modules, or take adapter_config.json from where the adapter was trained",
        )]  # fmt: skip
    ends = [f".{name}" for name in adapted]
    alone = [] if isinstance(targets, str) or by_parameters else targets
    unused = [t for t in alone if not any(e.endswith(f".{t}") for e in ends) and not _may_be_excluded(config, t)]
    return with_subjects(warning(
        "target-without-tensors", unused, f"no tensor belongs to these target_modules: {', '.join(unused)}",
        "tensors for each target that the model has",
        "harmless if the model has no such modules; else their tensors are lost. --base tells which",
    ))  # fmt: skip


_ALL_SELECTED = "target_modules that selects every adapted module"


def _check_default_targets(adapted: Sequence[str], config: Config, family: str) -> list[Finding]:
    """Check the modules of a configuration without targets, for which PEFT takes a default by the base's type."""
    resolved = matching.with_default_targets(config, family)
    if not FACTS[config.peft_type].default_targets or matching.is_all_linear(resolved):
        return []  # as of OSF, where PEFT has no other default
    targets, remedy = ", ".join(sorted(resolved.names("target_modules"))), "name the adapted modules in target_modules"
    if not targets:
        return [warning(
            "untargeted", adapted,
            "target_modules is null: PEFT takes its default for the type of the base model, or refuses the adapter",
            _ALL_SELECTED, remedy,
        )]  # fmt: skip
    ignored = [name for name in adapted if not _is_targeted(resolved, name)]
    return with_subjects(error(
        "untargeted", ignored, f"target_modules is null: for the type {family} PEFT takes {targets} and ignores"
        f" {such_as(ignored, 'module')}", _ALL_SELECTED, remedy,
    ))  # fmt: skip


def _ignored(adapted: Iterable[str], modules: Modules, config: Config) -> list[str]:
    """Return the modules that no target selects. With weight tying, PEFT also adapts the head of an embedding."""
    return [
        name
        for name in adapted
        if not _is_targeted(config, name)
        and not (config.get("ensure_weight_tying") and _is_head(modules[name], modules))
    ]


def _is_targeted(config: Config, module: str) -> bool:
    """Return True if a target selects a module of the file, also inside a module that PEFT wraps (out_proj)."""
    return any(matching.is_target(config, name) for name in (module, module.partition(".base_layer")[0]))


def _is_head(tensors: Shapes, modules: Modules) -> bool:
    """Return True for the tensors of a head that has the vocabulary of an adapted embedding."""
    rows = {embedding[_EMBEDDING][-1] for embedding in modules.values() if embedding.get(_EMBEDDING)}
    return bool(tensors.get("lora_B.weight")) and tensors["lora_B.weight"][0] in rows


def _may_be_excluded(config: Config, target: str) -> bool:
    """Return True if the configuration excludes the modules that a target names, as far as their names tell."""
    excluded: str | Sequence[str] = config.get("exclude_modules") or ()
    if isinstance(excluded, str):
        return bool(excluded)  # an expression of the whole names, and the names in the base are not known
    return not matching.is_target(config, target) or any(name.endswith(f".{target}") for name in excluded)


def _check_saved(modules: Modules, others: Iterable[str], config: Config) -> list[Finding]:
    """Check fully trained modules and token rows, and find tensors that PEFT ignores."""
    saved: set[str] = set(config.get("modules_to_save") or ())
    names = {key: key.removeprefix(PEFT_PREFIX).rpartition(".")[0] for key in others}
    found = set[str]().union(*(matching.saving_entries(config, name) for name in names.values()))
    absent = [] if saved & found or config.get("ensure_weight_tying") else sorted(saved)
    has_rows = any("trainable_tokens_delta" in tensor for tensors in modules.values() for tensor in tensors)
    lacks_rows = config.peft_type == "LORA" and config.get("trainable_token_indices") and not has_rows
    unexpected = [key for key, name in names.items() if not _is_expected(key, name, config)]
    return with_subjects(
        error(
            "missing", absent, f"no tensor belongs to modules_to_save: {', '.join(absent)}",
            "the fully trained modules", _SAVE_AGAIN,
        ),
        error(
            "missing", ("trainable_tokens_delta",) if lacks_rows else (),
            "the rows of trainable_token_indices are missing", "one tensor of rows for each embedding", _SAVE_AGAIN,
        ),
        warning(
            "unexpected", unexpected,
            f"neither of {config.peft_type} nor of modules_to_save: {such_as(unexpected, 'tensor')}",
            "no other tensors: PEFT ignores them without a message",
            "if they were trained, name their modules in modules_to_save; else remove them",
        ),
    )  # fmt: skip


def _is_expected(key: str, module: str, config: Config) -> bool:
    stem = module.removesuffix(".base_layer").removesuffix(".token_adapter")
    return (
        matching.is_saved(matching.with_task_heads(config), module)  # PEFT adds the heads of the task on loading
        or (key.endswith(".bias") and config.get("bias", "none") != "none")
        or stem.rpartition(".")[2] in _EMBEDDINGS
        or (peft_tensors.has_no_modules(config.peft_type) and key.startswith("base_model."))
    )


def _check_layers(modules: Iterable[str], config: Config) -> list[Finding]:
    """Find layers that lack a module which nearly all other layers have."""
    # The number of a layer is a segment of the name ("text_encoder_2.layers.0.q"), or ends one ("layers_0.q").
    matches = (
        re.fullmatch(r"((?:.*?\.)??)(\d+)\.(.+)", module) or re.fullmatch(r"(\D*?)(\d+)\.(.+)", module)
        for module in modules
    )
    layers = paths.group(
        ((match[1], match[3]), int(match[2])) for match in matches if match and len(match[2]) < _MAX_DIGITS
    )
    gaps: list[str] = []
    is_chosen = config.get("layers_to_transform") is not None or isinstance(config.get("target_modules"), str)
    for (stack, name), numbers in layers.items():
        every = set().union(*(found for (other, _), found in layers.items() if other == stack))
        absent = sorted({*every, *range(min(every), max(every) + 1)}.difference(numbers))
        if len(absent) * 5 <= len(numbers) + len(absent):
            gaps += [f"{stack}{number}.{name}" for number in absent]
    return with_subjects(warning(
        "layers", [] if is_chosen else gaps,
        f"not adapted: {count(gaps, 'module')} that nearly all other layers have, such as {first(gaps)}",
        "the same modules in all layers, unless the base has them in some layers only",
        "check that the file is complete; --base tells whether the base has these modules",
    ))  # fmt: skip


# ---------------------------------------------------------------- values


_WORDS = {0.0: "zero", 1.0: "one"}
_HUGE_RMS = 1.0
"""Root mean square of ΔW above which a change is suspicious: weights of trained models have about 0.02."""
_HUGE_RATIO = 100.0
"""Ratio of a module's rms to the median of all modules above which it is suspicious."""


def check_values(
    keys: Mapping[str, str], modules: Modules, get: Callable[[str], np.ndarray], config: Config | None
) -> list[Finding]:
    """Read every tensor once and find NaN and infinities, untrained tensors and huge changes.

    Args:
        keys: {PEFT's name: the key in the file}.
        modules: the tensors of the method by module, as `split_modules` returns them.
        get: returns the tensor of a key in the file.
        config: the configuration; None if it is unknown, and only NaN and infinities can be found.
    """
    settings = {} if config is None else module_settings(modules, config)
    not_finite: list[str] = []
    unchanged: dict[float, list[str]] = {}
    grams: dict[str, dict[str, _Gram]] = {}
    for name, key in keys.items():
        try:
            values = _floats(get(key))
        except FileError as problem:
            return [
                error("unreadable", (name,), str(problem), "a tensor that can be read", "fetch or save the file again")
            ]
        split = None if config is None else peft_tensors.split_key(name, config.peft_type)
        if values is None:
            not_finite.append(name)
        elif config is not None and split is not None and values.size:
            module, tensor = split
            new = FACTS[config.peft_type].new_values.get(tensor)
            if new is not None and (values == new).all():
                unchanged.setdefault(new, []).append(name)
            if module in settings and (gram := _gram(tensor, values)) is not None:
                grams.setdefault(module, {})[tensor.partition(".")[0][-1]] = gram
    found = with_subjects(error(
        "not-finite", not_finite, f"NaN or infinity in {such_as(not_finite, 'tensor')}", "finite numbers",
        "the training diverged, or 16 bits overflowed: take an earlier checkpoint",
    ))  # fmt: skip
    if config is not None:
        found += [_untrained(value, names, modules, config) for value, names in unchanged.items()]
        if not config.get("use_qalora") and not config.get("use_bdlora") and not config.get("kasa_config"):
            found += _check_sizes(grams, settings)
    return found


def _floats(tensor: Any) -> np.ndarray | None:
    """Return a tensor in float32 or float64, and no elements of one that has no fractions; None for NaN or infinity."""
    values = np.asarray(tensor)
    if values.dtype.kind not in "fV" and not values.dtype.name.startswith(("bfloat", "float")):
        return np.empty(0)
    values = values.astype(np.float32, copy=False) if values.dtype != np.float64 else values
    return values if np.isfinite(values).all() else None


def _gram(tensor: str, values: np.ndarray) -> _Gram | None:
    """Return A·Aᵀ of an A (r, in) or Bᵀ·B of a B (out, r) with `in` or `out`, in float64; None for other tensors."""
    kind = tensor.removesuffix(".weight")
    if kind not in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B") or values.ndim < 2:
        return None
    matrix = values.reshape(values.shape[0], -1).astype("float64")
    matrix = matrix if kind.endswith("A") else matrix.T
    return matrix @ matrix.T, matrix.shape[1]


def _untrained(value: float, names: Sequence[str], modules: Iterable[str], config: Config) -> Finding:
    total = len({module for module in modules if module})
    is_all = len(names) >= total
    tensor = (peft_tensors.split_key(names[0], config.peft_type) or ("", names[0]))[1]
    number = f"all {len(names)}" if is_all else f"{len(names)} of {total}"
    return warning(
        "untrained",
        names,
        f"{number} tensors {tensor} are {_WORDS.get(value, value)}, so"
        f" {'the adapter changes' if is_all else 'these modules change'} nothing",
        "values that training has changed",
        "check that these parameters were given to the optimizer, and that this file was written after training",
    )


def _check_sizes(grams: Mapping[str, Mapping[str, _Gram]], settings: Mapping[str, tuple[int, float]]) -> list[Finding]:
    """Find modules whose ΔW = s·B·A is huge, from ‖B·A‖² = tr(BᵀB·AAᵀ)."""
    sizes: dict[str, float] = {}
    for module, both in grams.items():
        if len(both) == 2 and both["A"][0].shape == both["B"][0].shape:
            (a, columns), (b, rows) = both["A"], both["B"]
            square = max(float((a * b).sum()), 0.0)
            sizes[module] = abs(settings[module][1]) * (square / max(rows * columns, 1)) ** 0.5
    middle = statistics.median(sizes.values()) if sizes else 0.0
    huge = [m for m, size in sizes.items() if size > _HUGE_RMS or (len(sizes) > 3 and size > _HUGE_RATIO * middle > 0)]
    worst = max(huge, key=lambda module: sizes[module], default="")
    return with_subjects(warning(
        "huge", huge, f"a huge change of {count(huge, 'module')}: the root mean square of ΔW is"
        f" {sizes.get(worst, 0):.3g} in {worst}, and {middle:.3g} in the median of all modules",
        "a change smaller than the weights (about 0.02)",
        "check the scale (lora_alpha and r) and the training: the model's outputs may be noise",
    ))  # fmt: skip
