"""Heat maps of the changes of an adapter, and of the differences of two adapters: PNG files, with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxadapt.analysis.changes import (
    Difference,
    Grid,
    Norm,
    Norms,
    combine_differences,
    modules_of_one_kind,
    number_text,
)
from jaxadapt.configs.base import Config
from jaxadapt.core.errors import AdapterError, bullets, raise_as

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
    with raise_as(
        AdapterError, "cannot draw without matplotlib", ImportError, advice="; run pip install 'jaxadapt[plot]'"
    ):
        from matplotlib.figure import Figure
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
    low, high = heat_map.limits
    values = np.array([[np.nan if v is None else v for v in row] for row in heat_map.cells], float)
    axis.set_facecolor(_FAINT)
    colors = "viridis" if low == 0 else "RdBu"
    image = axis.imshow(values, aspect="auto", cmap=colors, vmin=low, vmax=high, interpolation="nearest")
    axis.set_title(heat_map.title, fontsize=9, color=_INK)
    axis.set_xticks(range(len(grid.columns)), grid.columns, fontsize=8, rotation=40, ha="right", rotation_mode="anchor")
    ticks = range(0, len(grid.rows), max(1, round(len(grid.rows) / 32)))
    axis.set_yticks(ticks, [grid.rows[i] for i in ticks], fontsize=7)
    axis.set_ylabel("layer", fontsize=8, color=_INK)
    axis.tick_params(length=0, colors=_INK)
    axis.spines[:].set_visible(False)
    if len(grid.rows) <= 40:
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                share = (min(value, high) - low) / (high - low)
                color = _INK if (share > 0.6 if low == 0 else 0.2 < share < 0.8) else "white"
                axis.text(x, y, number_text(value, 2), ha="center", va="center", fontsize=5.5, color=color)
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
    >>> norms_png(jaxadapt.analysis.measure_norms(jaxadapt.PeftTensors(config, tensors)), config)[:4]
    b'\\x89PNG'
    """
    grid = norms.grid()
    if not grid.cells:
        raise AdapterError(
            "nothing to draw: the change of these modules cannot be computed from the adapter's tensors alone:\n"
            + bullets(norms.left_out)
        )
    # Beside the norms, the values of some cells that are not the same in all.
    found = grid.cells.values()
    names = [n for n in _NAMES if n == "norm" or {getattr(norm, n) for norm in found} - {None, grid.constant(n)}]
    maps: list[HeatMap] = []
    for name in names:
        cells = grid.values(name)
        largest = max((v for row in cells for v in row if v is not None and np.isfinite(v)), default=0.0)
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


def difference_png(difference: Difference, names: tuple[str, str]) -> bytes:
    """Return two heat maps as a PNG: relative distances and cosines, with the adapters' `names` in the title.

    The same adapters give the same bytes. Raises `AdapterError` without matplotlib, or if the adapters share no module.
    """
    grid = difference.grid()
    if grid is None:
        raise AdapterError(
            "nothing to draw: the adapters share no module; they have:\n"
            + bullets([*difference.only[0], *difference.only[1]])
        )
    total = combine_differences(modules_of_one_kind(difference))
    relative = grid.values("relative")
    largest = max((v for row in relative for v in row if v is not None and v < float("inf")), default=1)
    maps = (
        HeatMap("distance ÷ norm of the first", relative, (0, largest or 1)),
        HeatMap("cosine", grid.values("cosine"), (-1, 1)),
    )
    title = f"{names[0]} and {names[1]}\nin all: distance ÷ norm {total.relative:.3g}, cosine {total.cosine:.3g}"
    return draw_maps(grid, maps, title)
