"""Heat maps by layer and module, drawn with matplotlib: an adapter's norms, and the difference of two adapters."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from jaxadapt.analysis.differences import Difference, difference_grid
from jaxadapt.analysis.norms import Grid, Norms, norms_grid, number_text
from jaxadapt.configs.base import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError

# ---------------------------------------------------------------- heat map


_INK, _FAINT = "#222222", "#e8e8e8"


def make_figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, list[Any]]:
    """Return a figure of this size in inches, and its panels row by row.

    Raises `AdapterError` if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AdapterError("cannot draw: matplotlib is not installed; run pip install 'jaxadapt[plot]'") from error
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw_map(
    figure: Any,
    axis: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[float | None]],
    title: str,
    limits: tuple[float, float],
    width: float | None = None,
) -> None:
    """Draw one heat map with its color bar.

    Args:
        limits: the values of the first and the last color; two colors around 0 if the first is negative.
        width: the width of the map in inches, for a bar as tall as the map.
    """
    import numpy as np

    low, high = limits
    values = np.array([[np.nan if v is None else v for v in row] for row in cells], float)
    axis.set_facecolor(_FAINT)
    colors = "viridis" if low == 0 else "RdBu"
    image = axis.imshow(values, aspect="auto", cmap=colors, vmin=low, vmax=high, interpolation="nearest")
    axis.set_title(title, fontsize=9, color=_INK)
    axis.set_xticks(range(len(columns)), columns, fontsize=8, rotation=40, ha="right", rotation_mode="anchor")
    ticks = range(0, len(rows), max(1, round(len(rows) / 32)))
    axis.set_yticks(ticks, [rows[i] for i in ticks], fontsize=7)
    axis.set_ylabel("layer", fontsize=8, color=_INK)
    axis.tick_params(length=0, colors=_INK)
    for side in axis.spines.values():
        side.set_visible(False)
    if len(rows) <= 40:
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                share = (min(value, high) - low) / (high - low)
                light = share > 0.6 if low == 0 else 0.2 < share < 0.8
                text = number_text(value, 2)
                axis.text(x, y, text, ha="center", va="center", fontsize=5.5, color=_INK if light else "white")
    if width is None:
        place: dict[str, Any] = {"ax": axis, "fraction": 0.05, "pad": 0.02}
    else:
        place = {"cax": axis.inset_axes((1 + 0.06 / width, 0, 0.13 / width, 1))}
    bar = figure.colorbar(image, **place)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7, colors=_INK)


def to_png(figure: Any, title: str) -> bytes:
    """Return a figure with this title as a PNG; equal figures give equal bytes."""
    figure.suptitle(title, fontsize=10, color=_INK)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


# ---------------------------------------------------------------- norms plot


_NAMES = {"norm": "", "effective_rank": "effective rank", "scale": "scale s"}
_MAX_WIDTH = 14.0  # in inches; panels that are wider together are stacked
_LETTER_WIDTH = 0.085  # in inches, of the title


def norms_png(norms: Norms, config: Config) -> bytes:
    """Return a heat map as a PNG. The same adapter gives the same bytes.

    Raises `AdapterError` if matplotlib is missing, or if no norm is known.
    """
    grid = norms_grid(norms.modules)
    if not grid.cells:
        raise AdapterError(
            "nothing to draw: the change of these modules cannot be computed from the adapter's tensors alone:\n"
            + paths.bullets(norms.left_out)
        )
    names = [n for n in _NAMES if n == "norm" or (grid.constant(n) is None and _has_values(grid, n))]
    width = max(0.62 * len(grid.columns) + 1.9, 3.4)
    height = min(max(0.24 * len(grid.rows), 1.2), 14)
    columns = len(names) if width * len(names) <= _MAX_WIDTH else 1
    rows = len(names) // columns
    title = _title_text(config, grid)
    size = max(width * columns, _LETTER_WIDTH * max(map(len, title.splitlines()))) + 0.3, (height + 1.4) * rows + 0.5
    figure, panels = make_figure(*size, rows, columns)
    for axis, name in zip(panels, names, strict=True):
        cells = grid.values(name)
        largest = max((v for row in cells for v in row if v is not None and math.isfinite(v)), default=0.0)
        rank = grid.constant("rank") if name == "effective_rank" else None  # the upper bound of the effective rank
        limits = 0.0, float(rank or largest) or 1.0
        draw_map(
            figure, axis, grid.rows, grid.columns, cells, _NAMES[name] or norms.what, limits, size[0] / columns - 1
        )
    return to_png(figure, title)


def _has_values(grid: Grid, name: str) -> bool:
    return any(getattr(cell, name) is not None for cell in grid.cells.values())


def _title_text(config: Config, grid: Grid) -> str:
    """Return the title: the method, the base model, and the values that all cells share."""
    base = config.base_model_name_or_path
    shared = {"rank": "r = {:g}", "scale": "s = {:.3g}", "effective_rank": "effective rank {:.2g}"}
    parts = [text.format(value) for name, text in shared.items() if (value := grid.constant(name)) is not None]
    first = config.peft_type + (f" for {base}" if base else "")
    return "\n".join([first, ", ".join(parts)] if base and parts else [", ".join([first, *parts])])


# ---------------------------------------------------------------- differences plot


def difference_png(difference: Difference, names: tuple[str, str]) -> bytes:
    """Return two heat maps as a PNG: relative distances and cosines. The same adapters give the same bytes.

    Args:
        difference: the difference.
        names: the adapters, for the title.

    Raises `AdapterError` if matplotlib is missing, or if the adapters share no module.
    """
    grid = difference_grid(difference)
    if grid is None:
        raise AdapterError(
            "nothing to draw: the adapters share no module; they have:\n"
            + paths.bullets([*difference.only[0], *difference.only[1]])
        )
    total = difference.total(grid.kind)
    width, height = max(0.62 * len(grid.columns) + 1.9, 3.6), min(max(0.24 * len(grid.rows), 1.2), 14) + 1.6
    figure, panels = make_figure(2 * width, height, 1, 2)
    largest = max((v for row in grid.relative for v in row if v is not None and v < float("inf")), default=1)
    titles, limits = ("distance ÷ norm of the first", "cosine"), ((0, largest or 1), (-1, 1))
    for axis, cells, title, limit in zip(panels, (grid.relative, grid.cosine), titles, limits, strict=True):
        draw_map(figure, axis, grid.rows, grid.columns, cells, title, limit)
    overall = "" if total is None else f"\nin all: distance ÷ norm {total.relative:.3g}, cosine {total.cosine:.3g}"
    return to_png(figure, f"{names[0]} and {names[1]}{overall}")
