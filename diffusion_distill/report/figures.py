"""Figures: empty axes in rows, ready to be drawn in and saved without a screen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120


def figure_of(rows: Sequence[int], size: tuple[float, float], square: bool = False) -> tuple[Figure, list[Axes]]:
    """Returns a figure of `size` inches (width, height) with the given number of axes per row, and its axes in order.

    The axes of a row share its width, whatever the number in other rows.

    Args:
      square: the axes keep a shape of their own, as images do; they are moved together.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, layout="compressed" if square else "constrained")
    FigureCanvasAgg(figure)
    columns = math.lcm(*rows)
    grid, axes = figure.add_gridspec(len(rows), columns), []
    for row, count in enumerate(rows):
        width = columns // count
        axes += [figure.add_subplot(grid[row, k * width : (k + 1) * width]) for k in range(count)]
    return figure, axes
