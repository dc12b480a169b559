"""Norms and effective ranks of the change that an adapter makes to each weight, computed from its file; heat maps.

Each method measures its own change (`Method.measure_change`). The effective rank is exp of the entropy of the
normalized singular values (Roy and Vetterli 2007). It is 1
for a rank-one change, and r if r directions have equal weight.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from jaxadapt.adapters.peft_tensors import PeftTensors
from jaxadapt.configs import matching
from jaxadapt.configs.base import Change, Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError, ConfigError
from jaxadapt.keymaps import pytorch
from jaxadapt.keymaps.keymap import PEFT_PREFIX

if TYPE_CHECKING:
    import numpy as np


@dataclasses.dataclass(frozen=True)
class Norm:
    """The norm of one module, or of one parameter in `target_parameters` with all its experts.

    Attributes:
        module: the path of the module or parameter.
        norm: the norm that `Norms.what` describes, such as the Frobenius norm ‖ΔW‖.
        effective_rank: the effective rank, averaged over experts; None if the change has none.
        rank: the rank r; None for methods without it.
        scale: the scale s; None for methods without it.
    """

    module: str
    norm: float
    effective_rank: float | None = None
    rank: int | None = None
    scale: float | None = None


@dataclasses.dataclass(frozen=True)
class Norms:
    """The norms of all modules of an adapter.

    Attributes:
        what: a description of the numbers, such as "‖ΔW‖ = ‖s·B·A‖".
        modules: the norms, one per module.
        left_out: the modules and tensors whose change cannot be computed from the file.
        not_finite: the modules that hold a NaN or an infinity.
    """

    what: str
    modules: tuple[Norm, ...]
    left_out: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the norms as plain JSON values."""
        return {
            "what": self.what,
            "modules": [dataclasses.asdict(norm) for norm in self.modules],
            "left_out": list(self.left_out),
            "not_finite": list(self.not_finite),
        }


def measure_norms(tensors: PeftTensors) -> Norms:
    """Compute the Frobenius norm of the change of each module's weight, in float64, and its effective rank.

    Raises `ConfigError` for methods whose change depends on the base.

    >>> import numpy as np, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=1, lora_alpha=2, target_modules=["q"])
    >>> a, b = np.ones((1, 4)), np.ones((9, 1))
    >>> tensors = {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b}
    >>> [norm.norm for norm in measure_norms(jaxadapt.PeftTensors(config, tensors)).modules]
    [12.0]
    """
    import numpy as np

    config = tensors.config
    what, measure = _measure_of(config)
    if what is None:
        raise ConfigError(
            f"cannot compute norms for {config.peft_type}: the file alone does not determine the change of a weight,"
            " which depends on the base model. Compare the weights before and after jaxadapt.merge"
        )
    module_keys = pytorch.adapted_keys(tensors.tensors)
    norms: list[Norm] = []
    left_out: list[str] = []
    for module, keys in module_keys.items():
        arrays = {name: as_float64(tensors.tensors[key]) for name, key in keys.items()}
        module = named_parameter(config, module)
        change = measure(module, arrays) if all(x.ndim and x.size for x in arrays.values()) else None
        if change is None:
            left_out.append(module)
        else:
            norms.append(Norm(module, **dataclasses.asdict(change)))
    owner = {key: named_parameter(config, module) for module, keys in module_keys.items() for key in keys.values()}
    left_out += [key.removeprefix(PEFT_PREFIX) for key in tensors.tensors if key not in owner]
    bad = [
        owner.get(key, key.removeprefix(PEFT_PREFIX))
        for key, x in tensors.tensors.items()
        if not np.isfinite(as_float64(x)).all()
    ]
    return Norms(what, tuple(norms), tuple(left_out), tuple(dict.fromkeys(bad)))


def _measure_of(config: Config) -> tuple[str | None, Callable[[str, Mapping[str, Any]], Change | None]]:
    """Return a description of the norm, or None, and the function that measures one module."""
    what = config.describe_change()
    if what is not None:
        return what, config.measure_change
    from jaxadapt.methods.registry import METHODS  # imports JAX, which LoRA's norms do not need

    method = METHODS.get(config.peft_type)
    if method is None:
        return None, config.measure_change
    return method.describe_change(config), functools.partial(method.measure_change, config)


def named_parameter(config: Config, module: str) -> str:
    """Return the parameter that a module path of a file stands for, or the module path if it has no such parameter.

    PEFT wraps a module once per parameter in `target_parameters`. The module's first parameter is innermost, so with
    gate_up_proj and down_proj, "experts.base_layer" stands for gate_up_proj.

    >>> from jaxadapt.configs.lora import LoraConfig
    >>> config = LoraConfig(target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    >>> named_parameter(config, "0.experts.base_layer")
    '0.experts.gate_up_proj'
    """
    depth = len(module.split(".base_layer")) - 1
    owner = module.removesuffix(".base_layer" * depth)
    ends = dict.fromkeys(entry.rpartition(".")[2] for entry in config.get("target_parameters") or ())
    adapted = sorted((end for end in ends if matching.is_parameter(config, f"{owner}.{end}")), key=_flow_position)
    position = len(adapted) - 1 - depth
    return f"{owner}.{adapted[position]}" if 0 <= position < len(adapted) else module


def as_float64(x: Any) -> np.ndarray:
    """Return an array in float64."""
    import numpy as np

    return np.asarray(x).astype(np.float64)


# ---------------------------------------------------------------- grid


class _Measured(Protocol):
    @property
    def module(self) -> str:
        """The path of the module or parameter."""
        ...


_Cell = TypeVar("_Cell", bound=_Measured)


@dataclasses.dataclass(frozen=True)
class Grid(Generic[_Cell]):
    """Measures by layer (rows) and by module within the layer (columns). Modules without an adapter have no cell."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], _Cell]

    def values(self, name: str) -> list[list[float | None]]:
        """Return one attribute of each cell, such as "norm", "effective_rank", "rank" or "scale" of a `Norm`."""
        return [
            [getattr(self.cells[r, c], name) if (r, c) in self.cells else None for c in self.columns] for r in self.rows
        ]

    def constant(self, name: str) -> float | None:
        """Return the value that all cells share; None if they differ or have none."""
        distinct = {getattr(cell, name) for cell in self.cells.values()}
        return next(iter(distinct)) if len(distinct) == 1 else None


def norms_grid(norms: Sequence[Norm]) -> Grid[Norm]:
    """Return the grid of an adapter's norms.

    Modules of several experts share a cell, with the root of the sum of squared norms and the mean effective rank.

    >>> grid = norms_grid([Norm("model.layers.0.q_proj", 3.0), Norm("model.layers.1.q_proj", 4.0)])
    >>> grid.rows, grid.columns, grid.values("norm")
    (('0', '1'), ('q_proj',), [[3.0], [4.0]])
    """
    return make_grid(norms, _combine)


def make_grid(measures: Sequence[_Cell], combine: Callable[[Sequence[_Cell]], _Cell]) -> Grid[_Cell]:
    """Return the grid of the measures of an adapter's modules; `combine` makes one of several experts'."""
    located = [(*_split_module(measure.module), measure) for measure in measures]
    stacks = list(dict.fromkeys(stack for stack, number, _, _ in located if number is not None))
    order = {stack: i for i, stack in enumerate(stacks)}
    located.sort(key=lambda item: (item[1] is None, order.get(item[0], 0), item[1] or 0))
    groups: dict[tuple[str, str], list[_Cell]] = {}
    for stack, number, label, measure in located:
        row = "–" if number is None else str(number) if len(stacks) == 1 else f"{stack}.{number}"
        groups.setdefault((row, label), []).append(measure)
    in_layers = {label for row, label in groups if row != "–"}
    labels = sorted(  # heads and embeddings, which are in no layer, come last
        dict.fromkeys(label for _, label in groups), key=lambda label: (label not in in_layers, _flow_position(label))
    )
    short = _shorten_labels(labels)
    cells = {
        (row, short[label]): members[0] if len(members) == 1 else combine(members)
        for (row, label), members in groups.items()
    }
    return Grid(tuple(dict.fromkeys(row for row, _ in cells)), tuple(short[label] for label in labels), cells)


# The order of data flow through a layer. Other names come after these, in the file's order.
_FLOW = (
    "qkv_proj", "c_attn", "query_key_value", "q_proj", "query", "to_q", "q", "k_proj", "key", "to_k", "k", "v_proj",
    "value", "to_v", "v", "o_proj", "out_proj", "to_out", "o", "dense", "gate_proj", "up_proj", "gate_up_proj", "c_fc",
    "fc1", "wi_0", "wi_1", "wi", "down_proj", "fc2", "wo",
)  # fmt: skip


def _flow_position(label: str) -> int:
    """Return the position of a module in the data flow through a layer."""
    last = label.removesuffix(".*").rpartition(".")[2]
    return _FLOW.index(last) if last in _FLOW else len(_FLOW)


def _split_module(module: str) -> tuple[str, int | None, str]:
    """Return the path of the layer stack of a module, its layer index, and its name in the layer."""
    parts = module.split(".")
    position = next((i for i, part in enumerate(parts) if part.isdecimal() and len(part) <= 18), None)
    if position is None:
        return "", None, module
    name = re.sub(r"(?<![^.])\d+(?![^.])", "*", ".".join(parts[position + 1 :]))
    return ".".join(parts[:position]), int(parts[position]), name


def _shorten_labels(labels: Sequence[str]) -> dict[str, str]:
    """Return the shortest distinct ending of each label."""
    counts = Counter(ending for label in labels for ending in matching.path_suffixes(label))
    return {
        label: next((e for e in matching.path_suffixes(label) if counts[e] == 1 and e.partition(".")[0] != "*"), label)
        for label in labels
    }


def number_text(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` significant digits, large integers in full; "" for None.

    >>> number_text(2.1), number_text(0.00123456), number_text(123.4, 2), number_text(1e7), number_text(None)
    ('2.10', '0.00123', '123', '1.00e+07', '')
    """
    if value is None:
        return ""
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:#.{digits}g}".rstrip(".")


def _combine(norms: Sequence[Norm]) -> Norm:
    """Combine the norms of the experts in one cell."""
    ranks = [n.effective_rank for n in norms if n.effective_rank is not None]
    return dataclasses.replace(
        norms[0],
        norm=math.sqrt(sum(n.norm**2 for n in norms)),
        effective_rank=sum(ranks) / len(ranks) if ranks else None,
        rank=max(n.rank or 0 for n in norms) or None,
    )


# ---------------------------------------------------------------- heat maps


_INK, _FAINT = "#222222", "#e8e8e8"


class HeatMap(NamedTuple):
    """One heat map of a picture.

    Attributes:
        title: the text above it.
        cells: the values by row and column; None where there is no cell.
        limits: the values of the first and the last color; two colors around 0 if the first is negative.
    """

    title: str
    cells: Sequence[Sequence[float | None]]
    limits: tuple[float, float]


def draw_maps(grid: Grid[Any], maps: Sequence[HeatMap], title: str) -> bytes:
    """Return heat maps over the rows and columns of a grid as a PNG; equal ones give equal bytes.

    Raises `AdapterError` if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AdapterError("cannot draw: matplotlib is not installed; run pip install 'jaxadapt[plot]'") from error
    width, height = max(0.62 * len(grid.columns) + 1.9, 3.4), min(max(0.24 * len(grid.rows), 1.2), 14)
    columns = len(maps) if width * len(maps) <= _MAX_WIDTH else 1
    rows = len(maps) // columns
    size = max(width * columns, _LETTER_WIDTH * max(map(len, title.splitlines()))) + 0.3, (height + 1.4) * rows + 0.5
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    for axis, heat_map in zip(figure.subplots(rows, columns, squeeze=False).flat, maps, strict=True):
        _draw_map(figure, axis, grid, heat_map, size[0] / columns - 1)
    figure.suptitle(title, fontsize=10, color=_INK)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _draw_map(figure: Any, axis: Any, grid: Grid[Any], heat_map: HeatMap, width: float) -> None:
    """Draw one heat map of this width in inches, with a color bar as tall as the map."""
    import numpy as np

    (low, high), rows, columns = heat_map.limits, grid.rows, grid.columns
    values = np.array([[np.nan if v is None else v for v in row] for row in heat_map.cells], float)
    axis.set_facecolor(_FAINT)
    colors = "viridis" if low == 0 else "RdBu"
    image = axis.imshow(values, aspect="auto", cmap=colors, vmin=low, vmax=high, interpolation="nearest")
    axis.set_title(heat_map.title, fontsize=9, color=_INK)
    axis.set_xticks(range(len(columns)), columns, fontsize=8, rotation=40, ha="right", rotation_mode="anchor")
    ticks = range(0, len(rows), max(1, round(len(rows) / 32)))
    axis.set_yticks(ticks, [rows[i] for i in ticks], fontsize=7)
    axis.set_ylabel("layer", fontsize=8, color=_INK)
    axis.tick_params(length=0, colors=_INK)
    axis.spines[:].set_visible(False)
    if len(rows) <= 40:
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                share = (min(value, high) - low) / (high - low)
                light = share > 0.6 if low == 0 else 0.2 < share < 0.8
                text = number_text(value, 2)
                axis.text(x, y, text, ha="center", va="center", fontsize=5.5, color=_INK if light else "white")
    bar = figure.colorbar(image, cax=axis.inset_axes((1 + 0.06 / width, 0, 0.13 / width, 1)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7, colors=_INK)


_NAMES = {"norm": "", "effective_rank": "effective rank", "scale": "scale s"}
_MAX_WIDTH = 14.0  # in inches; panels that are wider together are stacked
_LETTER_WIDTH = 0.085  # in inches, of the title


def norms_png(norms: Norms, config: Config) -> bytes:
    """Return a heat map as a PNG. The same adapter gives the same bytes.

    Raises `AdapterError` if matplotlib is missing, or if no norm is known.

    >>> import numpy as np, jaxadapt
    >>> config = jaxadapt.LoraConfig(r=1, target_modules=["q"])
    >>> a, b = np.ones((1, 4)), np.ones((9, 1))
    >>> tensors = {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b}
    >>> norms_png(measure_norms(jaxadapt.PeftTensors(config, tensors)), config)[:4]
    b'\\x89PNG'
    """
    grid = norms_grid(norms.modules)
    if not grid.cells:
        raise AdapterError(
            "nothing to draw: the change of these modules cannot be computed from the adapter's tensors alone:\n"
            + paths.bullets(norms.left_out)
        )
    # Beside the norms, the values of some cells that are not the same in all.
    names = [
        n
        for n in _NAMES
        if n == "norm" or {getattr(cell, n) for cell in grid.cells.values()} - {None, grid.constant(n)}
    ]
    maps: list[HeatMap] = []
    for name in names:
        cells = grid.values(name)
        largest = max((v for row in cells for v in row if v is not None and math.isfinite(v)), default=0.0)
        rank = grid.constant("rank") if name == "effective_rank" else None  # the upper bound of the effective rank
        maps.append(HeatMap(_NAMES[name] or norms.what, cells, (0.0, float(rank or largest) or 1.0)))
    return draw_maps(grid, maps, _title_text(config, grid))


def _title_text(config: Config, grid: Grid[Norm]) -> str:
    """Return the title: the method, the base model, and the values that all cells share."""
    base = config.base_model_name_or_path
    shared = {"rank": "r = {:g}", "scale": "s = {:.3g}", "effective_rank": "effective rank {:.2g}"}
    parts = [text.format(value) for name, text in shared.items() if (value := grid.constant(name)) is not None]
    first = config.peft_type + (f" for {base}" if base else "")
    return "\n".join([first, ", ".join(parts)] if base and parts else [", ".join([first, *parts])])
