"""Heat maps of the difference of two adapters, by layer and module."""

from __future__ import annotations

import io
from typing import Any

from jaxadapt.analysis.differences import Difference, difference_grid
from jaxadapt.analysis.norms import number_text
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError

_INK, _FAINT = "#222222", "#e8e8e8"


def difference_png(difference: Difference, names: tuple[str, str]) -> bytes:
    """Return two heat maps as a PNG: relative distances and cosines. The same adapters give the same bytes.

    Args:
        difference: the difference.
        names: the adapters, for the title.

    Raises `AdapterError` if matplotlib is missing, or if the adapters share no module.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AdapterError("cannot draw: matplotlib is not installed; run pip install 'jaxadapt[plot]'") from error
    grid = difference_grid(difference)
    if grid is None:
        raise AdapterError(
            "nothing to draw: the adapters share no module; they have:\n"
            + paths.bullets([*difference.only[0], *difference.only[1]])
        )
    total = difference.total(grid.kind)
    width, height = max(0.62 * len(grid.columns) + 1.9, 3.6), min(max(0.24 * len(grid.rows), 1.2), 14) + 1.6
    figure = Figure(figsize=(2 * width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    finite = [v for row in grid.relative for v in row if v is not None and v < float("inf")]
    _draw(
        figure,
        axes[0],
        grid.rows,
        grid.columns,
        grid.relative,
        "distance ÷ norm of the first",
        (0, max(finite, default=1) or 1),
    )
    _draw(figure, axes[1], grid.rows, grid.columns, grid.cosine, "cosine", (-1, 1))
    overall = "" if total is None else f"\nin all: distance ÷ norm {total.relative:.3g}, cosine {total.cosine:.3g}"
    figure.suptitle(f"{names[0]} and {names[1]}{overall}", fontsize=10, color=_INK)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _draw(
    figure: Any,
    axis: Any,
    rows: tuple[str, ...],
    columns: tuple[str, ...],
    cells: list[list[float | None]],
    title: str,
    limits: tuple[float, float],
) -> None:
    """Draw one heat map with its colour bar."""
    import numpy as np

    values = np.array([[np.nan if v is None else v for v in row] for row in cells], float)
    axis.set_facecolor(_FAINT)
    colors = "viridis" if limits[0] == 0 else "RdBu"
    image = axis.imshow(values, aspect="auto", cmap=colors, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axis.set_title(title, fontsize=9, color=_INK)
    axis.set_xticks(range(len(columns)), columns, fontsize=8, rotation=40, ha="right", rotation_mode="anchor")
    ticks = range(0, len(rows), max(1, round(len(rows) / 32)))
    axis.set_yticks(ticks, [rows[i] for i in ticks], fontsize=7)
    axis.set_ylabel("layer", fontsize=8, color=_INK)
    axis.tick_params(length=0, colors=_INK)
    for side in axis.spines.values():
        side.set_visible(False)
    if len(rows) <= 40:
        low, high = limits
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if not np.isnan(value):
                    share = (min(value, high) - low) / (high - low)
                    light = share > 0.6 if colors == "viridis" else 0.2 < share < 0.8
                    ink = _INK if light else "white"
                    axis.text(x, y, number_text(value, 2), ha="center", va="center", fontsize=5.5, color=ink)
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7, colors=_INK)
