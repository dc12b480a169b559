"""Checks of an adapter's values, one tensor in memory at a time: NaN, untrained tensors, huge changes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jaxadapt.configs import Config
from jaxadapt.core.errors import FileError
from jaxadapt.persistence.verification import finding, key_names, tensor_checks
from jaxadapt.persistence.verification.finding import Finding

if TYPE_CHECKING:
    import numpy as np

_WORDS = {0.0: "zero", 1.0: "one"}
_HUGE_RMS = 1.0
"""Root mean square of ΔW above which a change is suspicious: weights of trained models have about 0.02."""
_HUGE_RATIO = 100.0
"""Ratio of a module's rms to the median of all modules above which it is suspicious."""


def check_values(
    keys: Mapping[str, str], shapes: tensor_checks.Shapes, get: Callable[[str], np.ndarray], config: Config | None
) -> list[Finding]:
    """Read every tensor once and return findings about the values.

    Args:
        keys: {PEFT's name: the key in the file}.
        shapes: by PEFT's names.
        get: returns the tensor of a key in the file.
        config: the configuration; None if it is unknown, and only NaN and infinities can be found.
    """
    import numpy as np

    modules = {} if config is None else tensor_checks.split_modules(shapes, config)[0]
    settings = {} if config is None else tensor_checks.module_settings(modules, config)
    not_finite: list[str] = []
    unchanged: dict[float, list[str]] = {}
    grams: dict[str, dict[str, np.ndarray]] = {}
    for name, key in keys.items():
        try:
            values = np.asarray(get(key))
        except FileError as problem:
            expected = "a tensor that can be read"
            return [finding.error("unreadable", (name,), str(problem), expected, "fetch or save the file again")]
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
        new = config.new_values.get(tensor)
        if new is not None and (values == new).all():
            unchanged.setdefault(new, []).append(name)
        if module in settings and (gram := _gram(tensor, values)) is not None:
            grams.setdefault(module, {})[tensor.partition(".")[0][-1]] = gram
    findings: list[Finding] = []
    if not_finite:
        findings.append(
            finding.error(
                "not-finite",
                not_finite,
                f"NaN or infinity in {finding.count(not_finite, 'tensor')}, such as {not_finite[0]}",
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
    count = f"all {len(names)}" if is_all else f"{len(names)} of {total}"
    text = f"{count} tensors {tensor} are {_WORDS.get(value, value)}"
    return finding.warning(
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
        finding.warning(
            "huge",
            huge,
            f"a huge change of {finding.count(huge, 'module')}: the root mean square of ΔW is {sizes[worst]:.3g}"
            f" in {worst}, and {middle:.3g} in the median of all modules",
            "a change smaller than the weights (about 0.02)",
            "check the scale (lora_alpha and r) and the training: the model's outputs may be noise",
        )
    ]
