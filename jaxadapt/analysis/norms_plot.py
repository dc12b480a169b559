"""Heat map of an adapter's norms by layer and module."""

from __future__ import annotations

import io
from typing import Any

from jaxadapt.analysis.norms import Grid, Norms, norms_grid, number_text
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError

_NAMES = {"norm": "", "effective_rank": "effective rank", "scale": "scale s"}
_INK, _FAINT = "#222222", "#e8e8e8"
_MAX_WIDTH = 14.0  # in inches; panels that are wider together are stacked
_LETTER_WIDTH = 0.085  # in inches, of the title


def norms_png(norms: Norms, config: Config) -> bytes:
    """Return a heat map as a PNG. The same adapter gives the same bytes.

    Raises `AdapterError` if matplotlib is missing, or if no norm is known.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AdapterError("cannot draw: matplotlib is not installed; run pip install 'jaxadapt[plot]'") from error

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
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=True):
        _draw_panel(figure, axis, grid, name, _NAMES[name] or norms.what, size[0] / columns - 1)
    figure.suptitle(title, fontsize=10, color=_INK)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _has_values(grid: Grid, name: str) -> bool:
    return any(getattr(cell, name) is not None for cell in grid.cells.values())


def _title_text(config: Config, grid: Grid) -> str:
    """Return the title: the method, the base model, and the values that all cells share."""
    base = config.base_model_name_or_path
    shared = {"rank": "r = {:g}", "scale": "s = {:.3g}", "effective_rank": "effective rank {:.2g}"}
    parts = [text.format(value) for name, text in shared.items() if (value := grid.constant(name)) is not None]
    first = config.peft_type + (f" for {base}" if base else "")
    return "\n".join([first, ", ".join(parts)] if base and parts else [", ".join([first, *parts])])


def _draw_panel(figure: Any, axis: Any, grid: Grid, name: str, title: str, width: float) -> None:
    """Draw one heat map of about `width` inches, with its colour bar."""
    import numpy as np

    values = np.array([[np.nan if v is None else v for v in row] for row in grid.values(name)], float)
    axis.set_facecolor(_FAINT)
    rank = grid.constant("rank") if name == "effective_rank" else None  # the upper bound of the effective rank
    high = float(rank or values.max(initial=0.0, where=np.isfinite(values))) or 1.0
    image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, vmax=high, interpolation="nearest")
    axis.set_title(title, fontsize=9, color=_INK)
    rotated: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(len(grid.columns)), grid.columns, fontsize=8, **rotated)
    step = max(1, round(len(grid.rows) / 32))
    ticks = range(0, len(grid.rows), step)
    axis.set_yticks(ticks, [grid.rows[i] for i in ticks], fontsize=7)
    axis.set_ylabel("layer", fontsize=8, color=_INK)
    axis.tick_params(length=0, colors=_INK)
    for side in axis.spines.values():
        side.set_visible(False)
    if len(grid.rows) <= 40:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if not np.isnan(value):
                    ink = _INK if value > 0.6 * high else "white"
                    axis.text(x, y, number_text(value, 2), ha="center", va="center", fontsize=5.5, color=ink)
    bar = figure.colorbar(image, cax=axis.inset_axes((1 + 0.06 / width, 0, 0.13 / width, 1)))  # as tall as the map
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7, colors=_INK)
