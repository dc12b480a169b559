"""Heat map of an adapter's norms by layer and module."""

from __future__ import annotations

import math

from jaxadapt.analysis.heat_map import draw_map, make_figure, to_png
from jaxadapt.analysis.norms import Grid, Norms, norms_grid
from jaxadapt.configs import Config
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError

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
