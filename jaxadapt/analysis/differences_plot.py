"""Heat maps of the difference of two adapters, by layer and module."""

from __future__ import annotations

from jaxadapt.analysis.differences import Difference, difference_grid
from jaxadapt.analysis.heat_map import draw_map, make_figure, to_png
from jaxadapt.core import paths
from jaxadapt.core.errors import AdapterError


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
