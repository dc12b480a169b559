"""Heat maps by layer and module, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from jaxadapt.analysis.norms import number_text
from jaxadapt.core.errors import AdapterError

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
