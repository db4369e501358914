"""Heat maps: matrices side by side, with one scale of colours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from diffusion_distill.base.files import user_path
from diffusion_distill.report.figures import figure_of

COLUMNS = 4  # at most so many matrices beside each other
SIDE = 3.2  # of a matrix, in inches
COLOURS = "viridis"


def heat_maps(
    maps: Mapping[str, ArrayLike],
    path: str | Path,
    title: str = "",
    axis: str = "",
    quantity: str = "",
    limits: tuple[float, float] | None = None,
) -> Path:
    """Writes matrices as squares of colours, entry by entry; row 0 is at the top.

    Args:
      maps: label -> matrix [rows, columns].
      path: the file; its ending is the format, and its folder must exist.
      title: a line above the matrices.
      axis: what rows and columns count.
      quantity: what the colours mean.
      limits: the values of the first and the last colour; the least and the greatest of all matrices by default.

    Returns:
      The path.

    Raises:
      ValueError: no maps, one that is no matrix or not finite, or limits that do not increase.
      ImportError: matplotlib is not installed.
    """
    from matplotlib.ticker import MaxNLocator

    matrices = {str(label): _matrix(str(label), values) for label, values in maps.items()}
    if not matrices:
        raise ValueError("There are no maps. Pass at least one entry {label: matrix}.")
    low, high = limits or (min(m.min() for m in matrices.values()), max(m.max() for m in matrices.values()))
    if limits and not low < high:
        raise ValueError(f"The limits of the colours must increase, got {limits}.")

    count = len(matrices)
    columns = math.ceil(count / math.ceil(count / COLUMNS))  # six are two rows of three
    rows = [columns] * math.ceil(count / columns)
    figure, axes = figure_of(rows, (SIDE * columns + 1.0, (SIDE + 0.3) * len(rows) + 0.3), square=True)
    for spare in axes[count:]:
        spare.remove()
    image = None
    for k, (place, (label, matrix)) in enumerate(zip(axes, matrices.items(), strict=False)):
        image = place.imshow(matrix, cmap=COLOURS, vmin=low, vmax=high, interpolation="nearest")
        place.set(title=label, xlabel=axis if k + columns >= count else "", ylabel="" if k % columns else axis)
        for ticks in (place.xaxis, place.yaxis):
            ticks.set_major_locator(MaxNLocator(nbins=6, integer=True))
    figure.colorbar(image, ax=axes[:count], label=quantity, shrink=0.9, pad=0.02)  # type: ignore[arg-type]
    if title:
        figure.suptitle(title)
    path = user_path(path)
    figure.savefig(path)
    return path


def _matrix(label: str, values: ArrayLike) -> np.ndarray:
    matrix = np.asarray(values, np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"Map {label!r} has shape {matrix.shape}; need a matrix [rows, columns], not empty.")
    if not np.isfinite(matrix).all():
        raise ValueError(f"Map {label!r} has values that are not finite. Find out which step made them.")
    return matrix
