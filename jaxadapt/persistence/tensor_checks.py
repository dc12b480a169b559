"""Checks of an adapter's tensors against its configuration: complete, expected, of the right rank. Reads no values.

Checks of an adapter's values, one tensor in memory at a time: NaN, untrained tensors, huge changes.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxadapt.adapters import key_names
from jaxadapt.analysis.norms import named_parameter
from jaxadapt.configs import matching
from jaxadapt.configs.base import Config
from jaxadapt.configs.frozen import find_pattern_value
from jaxadapt.configs.table import FACTS
from jaxadapt.core.errors import FileError
from jaxadapt.keymaps.keymap import PEFT_PREFIX
from jaxadapt.persistence.stored_adapter import Finding, count, error, warning

if TYPE_CHECKING:
    import numpy as np


# ---------------------------------------------------------------- tensor checks


Shapes = Mapping[str, tuple[int, ...]]
Modules = Mapping[str, Mapping[str, tuple[int, ...]]]
"""{module: {the tensor's name in it: shape}}."""

_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out", "embeddings")
_MAX_DIGITS = 6  # of a layer's number
_SAVE_AGAIN = "save the adapter again where it was trained; the missing values cannot be restored from the file"


def split_modules(shapes: Shapes, config: Config) -> tuple[dict[str, dict[str, tuple[int, ...]]], list[str]]:
    """Return {module: {tensor: shape}} of the method's tensors, and the other keys."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    others: list[str] = []
    for key, shape in shapes.items():
        split = key_names.split_key(key, config.peft_type)
        if split is None:
            others.append(key)
        else:
            modules.setdefault(split[0], {})[split[1]] = shape
    return modules, others


def check_tensors(shapes: Shapes, config: Config, family: str = "") -> list[Finding]:
    """Return findings about missing, empty and unexpected tensors, and about ranks.

    Args:
        shapes: by PEFT's names.
        config: the configuration.
        family: the type of the base model, for PEFT's default targets; "" if it is not known.
    """
    if not key_names.is_known_method(config.peft_type):
        return check_empty(shapes)
    modules, others = split_modules(shapes, config)
    findings = check_empty(shapes)
    if not modules and not findings:
        findings.append(
            error(
                "missing",
                (),
                f"no tensor of the method {config.peft_type} among {len(shapes)} tensors",
                "the method's tensors",
                "check that the configuration belongs to these weights",
            )
        )
        return findings
    findings += _check_pairs(modules, config)
    findings += _check_variants(modules, config)
    findings += _check_ranks(modules, config)
    findings += _check_targets(modules, config, family)
    findings += _check_saved(shapes, modules, others, config)
    findings += _check_layers(modules, config)
    return findings


def check_empty(shapes: Shapes) -> list[Finding]:
    """Find tensors without elements, as DeepSpeed ZeRO-3 saves those that another process holds."""
    empty = [key for key, shape in shapes.items() if 0 in shape]
    if not empty:
        return []
    return [
        error(
            "empty",
            empty,
            f"no elements in {count(empty, 'tensor')}, such as {empty[0]} of shape {list(shapes[empty[0]])}",
            "the whole tensors",
            "DeepSpeed ZeRO-3 keeps only a part of each parameter in a process. Gather them before saving"
            " (stage3_gather_16bit_weights_on_model_save, or deepspeed.zero.GatheredParameters), and save again",
        )
    ]


def _check_pairs(modules: Modules, config: Config) -> list[Finding]:
    missing: list[str] = []
    pairs = FACTS[config.peft_type].tensor_pairs
    for module, tensors in modules.items():
        wanted = [other for pair in pairs for name, other in (pair, pair[::-1]) if name in tensors]
        if config.peft_type == "LORA" and tensors.keys() & {"lora_A.weight", "lora_embedding_A"}:
            if config.get("use_dora") and not any(t.startswith("lora_magnitude_vector") for t in tensors):
                wanted.append("lora_magnitude_vector")
            if config.get("lora_bias") and "lora_A.weight" in tensors:
                wanted.append("lora_B.bias")
        missing += [f"{PEFT_PREFIX}{module}.{name}" for name in dict.fromkeys(wanted) if name not in tensors]
    if not missing:
        return []
    return [
        error("missing", missing, f"missing: {count(missing, 'tensor')}, such as {missing[0]}",
                      "all tensors of each adapted module", _SAVE_AGAIN)
    ]  # fmt: skip


def _check_variants(modules: Modules, config: Config) -> list[Finding]:
    """Find tensors of variants of LoRA that the configuration denies: PEFT does not read them."""
    findings: list[Finding] = []
    for start, field in (("lora_magnitude_vector", "use_dora"), ("lora_B.bias", "lora_bias")):
        names = [
            f"{PEFT_PREFIX}{m}.{name}" for m, tensors in modules.items() for name in tensors if name.startswith(start)
        ]
        if config.peft_type == "LORA" and names and not config.get(field):
            findings.append(
                error(
                    "variant", names, f"{field} is false, but the file has {count(names, 'tensor')} of it, such"
                    f" as {names[0]}", f"{field}: true. Without it, PEFT ignores them and computes something else",
                    f"set {field} to true, or take adapter_config.json from where the adapter was trained",
                )
            )  # fmt: skip
    return findings


def module_settings(modules: Modules, config: Config) -> dict[str, tuple[int, float]]:
    """Return {module: (rank in the file, scale)} of a LoRA adapter's modules."""
    settings: dict[str, tuple[int, float]] = {}
    for module, tensors in modules.items():
        shape = tensors.get("lora_A.weight") or tensors.get("lora_embedding_A")
        if config.peft_type != "LORA" or not shape or 0 in shape:
            continue
        name = named_parameter(config, module)
        rank = _wanted_rank(config, name)
        alpha = find_pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha"))
        settings[module] = (shape[0], alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
    return settings


def _wanted_rank(config: Config, name: str) -> int:
    return find_pattern_value(config.get("rank_pattern"), name, config.get("r"))


def _check_ranks(modules: Modules, config: Config) -> list[Finding]:
    if config.peft_type != "LORA":
        return []
    unequal: list[str] = []
    other: list[str] = []
    example = ""
    for module, tensors in modules.items():
        for a_name, b_name in FACTS[config.peft_type].tensor_pairs:
            a, b = tensors.get(a_name), tensors.get(b_name)
            if not a or not b or 0 in a or 0 in b:
                continue
            if len(b) < 2 or (a[0] != b[1] and not config.get("use_bdlora")):
                unequal.append(f"{module}: A {list(a)}, B {list(b)}")
            name = named_parameter(config, module)
            rank = _wanted_rank(config, name)
            if a[0] != rank and not (matching.is_parameter(config, name) and a[0] % rank == 0):
                other.append(module)
                example = example or f"{module} has rank {a[0]} in the file and {rank} in the configuration"
    findings: list[Finding] = []
    if unequal:
        findings.append(
            error("shape", unequal, f"A and B do not fit in {count(unequal, 'module')}: {unequal[0]}",
                          "A of shape (r, in) and B of shape (out, r)", "save the adapter again")
        )  # fmt: skip
    if other:
        findings.append(
            error(
                "rank",
                other,
                f"another rank than the configuration states in {count(other, 'module')}: {example}",
                "r and rank_pattern of the training, on which the scale depends",
                "take adapter_config.json from where the adapter was trained, or state the ranks in rank_pattern",
            )
        )
    return findings


def check_dtypes(dtypes: Mapping[str, str], config: Config) -> list[Finding]:
    """Find trained tensors that are no floating-point numbers, as a quantizer of whole files writes them.

    Args:
        dtypes: safetensors' names of dtypes by PEFT's names of tensors.
        config: the configuration.
    """
    facts = FACTS[config.peft_type]
    trained = {*facts.new_values, *(name for pair in facts.tensor_pairs for name in pair)}
    splits = {key: key_names.split_key(key, config.peft_type) for key in dtypes}
    wrong = [
        key
        for key, split in splits.items()
        if split and split[1] in trained and not dtypes[key].startswith(("F", "BF"))
    ]
    if not wrong:
        return []
    return [
        error(
            "dtype", wrong, f"{dtypes[wrong[0]]} in {count(wrong, 'tensor')}, such as {wrong[0]}",
            "floating-point numbers: PEFT takes integers as the values themselves, without a scale",
            "save the adapter again where it was trained, or multiply the integers by their scales",
        )
    ]  # fmt: skip


def _check_default_targets(adapted: Sequence[str], config: Config, family: str) -> list[Finding]:
    """Check the modules of a configuration without targets, for which PEFT takes a default by the base's type."""
    if not FACTS[config.peft_type].default_targets or config.get("target_parameters") or not adapted:
        return []
    resolved = matching.with_default_targets(config, family)
    if matching.is_all_linear(resolved):  # as of OSF, where PEFT has no other default
        return []
    targets = resolved.names("target_modules")
    remedy = "name the adapted modules in target_modules"
    if not targets:
        text = "target_modules is null: PEFT takes its default for the type of the base model, or refuses the adapter"
        return [warning("untargeted", adapted, text, "target_modules that selects every adapted module", remedy)]
    ignored, taken = [name for name in adapted if not _is_targeted(resolved, name)], ", ".join(sorted(targets))
    if not ignored:
        return []
    return [
        error(
            "untargeted", ignored, f"target_modules is null: for the type {family} PEFT takes {taken}"
            f" and ignores {count(ignored, 'module')}, such as {ignored[0]}",
            "target_modules that selects every adapted module", remedy,
        )
    ]  # fmt: skip


def _check_targets(modules: Modules, config: Config, family: str) -> list[Finding]:
    targets = config.get("target_modules")
    if matching.is_all_linear(config) or key_names.has_no_modules(config.peft_type):
        return []
    if not FACTS[config.peft_type].target_is_expression:
        return []
    names = [module for module, tensors in modules.items() if not all(t.startswith("token_adapter") for t in tensors)]
    adapted = [name for name in names if name and name != "base_model"]
    if targets is None:
        return _check_default_targets(adapted, config, family)
    by_other_names = bool(config.get("layer_replication") or config.get("target_parameters"))
    untargeted = [] if by_other_names else [name for name in adapted if not _is_targeted(config, name)]
    if config.get("ensure_weight_tying"):  # then PEFT also adapts the head of an adapted embedding
        untargeted = [name for name in untargeted if not _is_head(modules[name], modules)]
    findings: list[Finding] = []
    if untargeted:
        findings.append(
            error(
                "untargeted",
                untargeted,
                f"target_modules does not select {count(untargeted, 'module')}, such as {untargeted[0]}",
                "target_modules that selects every adapted module: PEFT ignores the other tensors",
                "correct target_modules, or take adapter_config.json from where the adapter was trained",
            )
        )
    if not isinstance(targets, str) and not config.get("target_parameters"):
        unused = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in adapted)]
        unused = [t for t in unused if not _may_be_excluded(config, t)]
        if unused and not untargeted:
            findings.append(
                warning(
                    "target-without-tensors",
                    unused,
                    f"no tensor belongs to these target_modules: {', '.join(unused)}",
                    "tensors for each target that the model has",
                    "harmless if the model has no such modules; else their tensors are lost. --base tells which",
                )
            )
    return findings


def _is_targeted(config: Config, module: str) -> bool:
    """Return True if a target selects a module of the file, also inside a module that PEFT wraps (out_proj)."""
    names = (module, module.partition(".base_layer")[0])
    return any(matching.is_target(config, name) for name in names)


def _is_head(tensors: Mapping[str, tuple[int, ...]], modules: Modules) -> bool:
    """Return True for the tensors of a head that has the vocabulary of an adapted embedding."""
    rows = {embedding["lora_embedding_A"][-1] for embedding in modules.values() if embedding.get("lora_embedding_A")}
    return bool(tensors.get("lora_B.weight")) and tensors["lora_B.weight"][0] in rows


def _may_be_excluded(config: Config, target: str) -> bool:
    """Return True if the configuration excludes the modules that a target names, as far as their names tell."""
    excluded: str | Sequence[str] = config.get("exclude_modules") or ()
    if isinstance(excluded, str):
        return bool(excluded)  # an expression of the whole names, and the names in the base are not known
    return not matching.is_target(config, target) or any(name.endswith(f".{target}") for name in excluded)


def _check_saved(shapes: Shapes, modules: Modules, others: Iterable[str], config: Config) -> list[Finding]:
    """Check fully trained modules and token rows, and find tensors that PEFT ignores."""
    findings: list[Finding] = []
    saved: tuple[str, ...] = config.get("modules_to_save") or ()
    names = {key: key.removeprefix(PEFT_PREFIX).rpartition(".")[0] for key in others}
    absent = [
        entry for entry in saved
        if not any(matching.saving_entries(config, name) & {entry} for name in names.values())
    ]  # fmt: skip
    if saved and len(absent) == len(saved) and not config.get("ensure_weight_tying"):
        findings.append(
            error("missing", absent, f"no tensor belongs to modules_to_save: {', '.join(absent)}",
                          "the fully trained modules", _SAVE_AGAIN)
        )  # fmt: skip
    has_rows = any("trainable_tokens_delta" in tensor for tensors in modules.values() for tensor in tensors)
    if config.peft_type == "LORA" and config.get("trainable_token_indices") and not has_rows:
        findings.append(
            error("missing", ("trainable_tokens_delta",), "the rows of trainable_token_indices are missing",
                          "one tensor of rows for each embedding", _SAVE_AGAIN)
        )  # fmt: skip
    unexpected = [key for key, name in names.items() if not _is_expected(key, name, config)]
    if unexpected:
        findings.append(
            warning(
                "unexpected",
                unexpected,
                f"neither of {config.peft_type} nor of modules_to_save: {count(unexpected, 'tensor')}, such as"
                f" {unexpected[0]}",
                "no other tensors: PEFT ignores them without a message",
                "if they were trained, name their modules in modules_to_save; else remove them",
            )
        )
    return findings


def is_saved_by_peft(key: str, config: Config) -> bool:
    """Return True if PEFT saves a tensor of its complete model, by its name without the adapter's name."""
    if key_names.split_key(key, config.peft_type) is not None:
        return True
    if ".original_module." in key:
        return False
    bias: str = config.get("bias") or "none"  # "all", or "lora_only" and the like: of the adapted modules
    if key.endswith(".bias") and (bias == "all" or (bias != "none" and key.endswith(".base_layer.bias"))):
        return True
    module = key.removeprefix(PEFT_PREFIX).rpartition(".")[0]
    return matching.is_saved(matching.with_task_heads(config), module)


def _is_expected(key: str, module: str, config: Config) -> bool:
    if matching.is_saved(matching.with_task_heads(config), module):  # PEFT adds the heads of the task on loading
        return True
    if key.endswith(".bias") and config.get("bias", "none") != "none":
        return True
    stem = module.removesuffix(".base_layer").removesuffix(".token_adapter")
    return stem.rpartition(".")[2] in _EMBEDDINGS or (
        key_names.has_no_modules(config.peft_type) and key.startswith("base_model.")
    )


def _check_layers(modules: Modules, config: Config) -> list[Finding]:
    """Find layers that lack a module which nearly all other layers have."""
    if config.get("layers_to_transform") is not None or isinstance(config.get("target_modules"), str):
        return []
    layers: dict[tuple[str, str], set[int]] = {}
    for module in modules:
        match = re.fullmatch(r"(\D*?)\.?(\d+)\.(.+)", module)
        if match is not None and len(match[2]) < _MAX_DIGITS:
            layers.setdefault((match[1], match[3]), set()).add(int(match[2]))
    gaps: list[str] = []
    for (stack, name), numbers in layers.items():
        every = set().union(*(found for (other, _), found in layers.items() if other == stack))
        every |= set(range(min(every), max(every) + 1))
        absent = sorted(every - numbers)
        if absent and len(absent) * 5 <= len(every):
            gaps += [f"{stack}.{number}.{name}".lstrip(".") for number in absent]
    if not gaps:
        return []
    return [
        warning(
            "layers",
            gaps,
            f"not adapted: {count(gaps, 'module')} that nearly all other layers have, such as {gaps[0]}",
            "the same modules in all layers, unless the base has them in some layers only",
            "check that the file is complete; --base tells whether the base has these modules",
        )
    ]


# ---------------------------------------------------------------- value checks


_WORDS = {0.0: "zero", 1.0: "one"}
_HUGE_RMS = 1.0
"""Root mean square of ΔW above which a change is suspicious: weights of trained models have about 0.02."""
_HUGE_RATIO = 100.0
"""Ratio of a module's rms to the median of all modules above which it is suspicious."""


def check_values(
    keys: Mapping[str, str], shapes: Shapes, get: Callable[[str], np.ndarray], config: Config | None
) -> list[Finding]:
    """Read every tensor once and return findings about the values.

    Args:
        keys: {PEFT's name: the key in the file}.
        shapes: by PEFT's names.
        get: returns the tensor of a key in the file.
        config: the configuration; None if it is unknown, and only NaN and infinities can be found.
    """
    import numpy as np

    modules = {} if config is None else split_modules(shapes, config)[0]
    settings = {} if config is None else module_settings(modules, config)
    not_finite: list[str] = []
    unchanged: dict[float, list[str]] = {}
    grams: dict[str, dict[str, np.ndarray]] = {}
    for name, key in keys.items():
        try:
            values = np.asarray(get(key))
        except FileError as problem:
            expected = "a tensor that can be read"
            return [error("unreadable", (name,), str(problem), expected, "fetch or save the file again")]
        if values.dtype.kind not in "fV" and not values.dtype.name.startswith(("bfloat", "float")):
            continue
        values = values.astype(np.float32, copy=False) if values.dtype != np.float64 else values
        if not np.isfinite(values).all():
            not_finite.append(name)
            continue
        split = None if config is None else key_names.split_key(name, config.peft_type)
        if config is None or split is None or not values.size:
            continue
        module, tensor = split
        new = FACTS[config.peft_type].new_values.get(tensor)
        if new is not None and (values == new).all():
            unchanged.setdefault(new, []).append(name)
        if module in settings and (gram := _gram(tensor, values)) is not None:
            grams.setdefault(module, {})[tensor.partition(".")[0][-1]] = gram
    findings: list[Finding] = []
    if not_finite:
        findings.append(
            error(
                "not-finite",
                not_finite,
                f"NaN or infinity in {count(not_finite, 'tensor')}, such as {not_finite[0]}",
                "finite numbers",
                "the training diverged, or 16 bits overflowed: take an earlier checkpoint",
            )
        )
    if config is None:
        return findings
    for value, names in unchanged.items():
        findings.append(_untrained(value, names, modules, config))
    if not config.get("use_qalora") and not config.get("use_bdlora") and not config.get("kasa_config"):
        findings += _check_sizes(grams, modules, settings)
    return findings


def _gram(tensor: str, values: np.ndarray) -> np.ndarray | None:
    """Return A·Aᵀ of an A (r, in) or Bᵀ·B of a B (out, r), in float64; None for other tensors."""
    import numpy as np

    kind = tensor.removesuffix(".weight")
    if kind not in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B") or values.ndim < 2:
        return None
    matrix = values.reshape(values.shape[0], -1).astype(np.float64)
    return matrix @ matrix.T if kind.endswith("A") else matrix.T @ matrix


def _untrained(value: float, names: list[str], modules: Mapping[str, Any], config: Config) -> Finding:
    total = len({module for module in modules if module})
    is_all = len(names) >= total
    tensor = (key_names.split_key(names[0], config.peft_type) or ("", names[0]))[1]
    number = f"all {len(names)}" if is_all else f"{len(names)} of {total}"
    text = f"{number} tensors {tensor} are {_WORDS.get(value, value)}"
    return warning(
        "untrained",
        names,
        f"{text}, so {'the adapter changes' if is_all else 'these modules change'} nothing",
        "values that training has changed",
        "check that these parameters were given to the optimizer, and that this file was written after training",
    )


def _check_sizes(
    grams: Mapping[str, Mapping[str, np.ndarray]],
    modules: Mapping[str, Mapping[str, tuple[int, ...]]],
    settings: Mapping[str, tuple[int, float]],
) -> list[Finding]:
    """Find modules whose ΔW = s·B·A is huge, from ‖B·A‖² = tr(BᵀB·AAᵀ)."""
    sizes: dict[str, float] = {}
    for module, both in grams.items():
        if len(both) < 2 or both["A"].shape != both["B"].shape:
            continue
        elements = 1
        for name, shape in modules[module].items():
            if name.endswith(("_A", "_A.weight")):
                elements *= math.prod(shape[1:])
            elif name.endswith(("_B", "_B.weight")):
                elements *= math.prod((shape[0], *shape[2:]))
        square = float((both["A"] * both["B"]).sum())
        sizes[module] = abs(settings[module][1]) * math.sqrt(max(square, 0.0) / max(elements, 1))
    if not sizes:
        return []
    middle = statistics.median(sizes.values())
    huge = [m for m, size in sizes.items() if size > _HUGE_RMS or (len(sizes) > 3 and size > _HUGE_RATIO * middle > 0)]
    if not huge:
        return []
    worst = max(huge, key=lambda module: sizes[module])
    return [
        warning(
            "huge",
            huge,
            f"a huge change of {count(huge, 'module')}: the root mean square of ΔW is {sizes[worst]:.3g}"
            f" in {worst}, and {middle:.3g} in the median of all modules",
            "a change smaller than the weights (about 0.02)",
            "check the scale (lora_alpha and r) and the training: the model's outputs may be noise",
        )
    ]
