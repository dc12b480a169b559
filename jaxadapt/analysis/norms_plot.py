"""The norms of an adapter as a heat map, layer by module. The only file that draws."""

from __future__ import annotations

import io
from typing import Any

from jaxadapt.analysis.norms import Grid, Norms, norms_grid, number_text
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError

_NAMES = {"norm": "", "effective_rank": "effective rank", "scale": "scale s"}
_INK, _FAINT = "#222222", "#e8e8e8"
_PAGE = 14.0  # inches: panels that are wider together go below each other
_LETTER = 0.085  # inches of a title, each


def norms_png(norms: Norms, config: Config) -> bytes:
    """A PNG; the same adapter gives the same bytes. Raises `AdapterError` where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AdapterError("a picture needs matplotlib: pip install 'jaxadapt[plot]'") from error

    cells = norms_grid(norms.modules)
    if not cells.cells:
        raise AdapterError(
            "there is nothing to draw: of no module of this adapter the change follows from its tensors alone:\n"
            + paths.bullets(norms.left_out)
        )
    shown = [n for n in _NAMES if n == "norm" or (cells.constant(n) is None and _has(cells, n))]
    wide = max(0.62 * len(cells.columns) + 1.9, 3.4)
    tall = min(max(0.24 * len(cells.rows), 1.2), 14)
    beside = len(shown) if wide * len(shown) <= _PAGE else 1
    below = len(shown) // beside
    title = _title(config, cells)
    size = max(wide * beside, _LETTER * max(map(len, title.splitlines()))) + 0.3, (tall + 1.4) * below + 0.5
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(below, beside, squeeze=False)
    for axis, name in zip(axes.flat, shown, strict=True):
        _panel(figure, axis, cells, name, _NAMES[name] or norms.what, size[0] / beside - 1)
    figure.suptitle(title, fontsize=10, color=_INK)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _has(cells: Grid, name: str) -> bool:
    return any(getattr(cell, name) is not None for cell in cells.cells.values())


def _title(config: Config, cells: Grid) -> str:
    base = config.base_model_name_or_path
    shared = {"rank": "r = {:g}", "scale": "s = {:.3g}", "effective_rank": "effective rank {:.2g}"}
    parts = [text.format(value) for name, text in shared.items() if (value := cells.constant(name)) is not None]
    first = config.peft_type + (f" for {base}" if base else "")
    return "\n".join([first, ", ".join(parts)] if base and parts else [", ".join([first, *parts])])


def _panel(figure: Any, axis: Any, cells: Grid, name: str, title: str, wide: float) -> None:
    """One heat map, about `wide` inches wide, with its colours beside it."""
    import numpy as np

    values = np.array([[np.nan if v is None else v for v in row] for row in cells.values(name)], float)
    axis.set_facecolor(_FAINT)
    rank = cells.constant("rank") if name == "effective_rank" else None  # what it could be at most
    high = float(rank or values.max(initial=0.0, where=np.isfinite(values))) or 1.0
    image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0.0, vmax=high, interpolation="nearest")
    axis.set_title(title, fontsize=9, color=_INK)
    turned: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(len(cells.columns)), cells.columns, fontsize=8, **turned)
    step = max(1, round(len(cells.rows) / 32))
    at = range(0, len(cells.rows), step)
    axis.set_yticks(at, [cells.rows[i] for i in at], fontsize=7)
    axis.set_ylabel("layer", fontsize=8, color=_INK)
    axis.tick_params(length=0, colors=_INK)
    for side in axis.spines.values():
        side.set_visible(False)
    if len(cells.rows) <= 40:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if not np.isnan(value):
                    ink = _INK if value > 0.6 * high else "white"
                    axis.text(x, y, number_text(value, 2), ha="center", va="center", fontsize=5.5, color=ink)
    bar = figure.colorbar(image, cax=axis.inset_axes((1 + 0.06 / wide, 0, 0.13 / wide, 1)))  # as tall as the map
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7, colors=_INK)
