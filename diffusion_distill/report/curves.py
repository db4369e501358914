"""Curves: training losses on a logarithmic axis, raw and smoothed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_distill.base.files import user_path
from diffusion_distill.report.figures import figure_of

SMOOTHED_PARTS = 40  # the moving mean spans this fraction of a curve


def loss_plot(
    histories: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    xlabel: str = "training images",
    phases: Mapping[str, float] | None = None,
    title: str = "",
) -> Path:
    """Writes a plot of losses: for each history a faint line as recorded, a strong line of its moving mean.

    Losses that a logarithmic axis cannot show (not finite, or not above 0) are left out and counted in the
    legend.

    Args:
      histories: label -> (x, loss) pairs with x increasing, in images or steps.
      path: the file; its ending is the format, and its folder must exist.
      xlabel: what x counts.
      phases: label -> x where a phase begins, marked by a vertical line. Means do not reach across it.
      title: a line above the plot.

    Returns:
      The path.

    Raises:
      ValueError: there are no histories, one is not a list of pairs or has no loss to show, or x decreases.
      ImportError: matplotlib is not installed.
    """
    from matplotlib.ticker import EngFormatter

    if not histories:
        raise ValueError("There are no histories. Pass at least one entry {label: [(x, loss), ...]}.")
    curves = {str(label): _curve(str(label), history) for label, history in histories.items()}
    phases = phases or {}

    figure, [axes] = figure_of([1], (9, 5))
    for index, (label, (x, loss, hidden)) in enumerate(curves.items()):
        colour = f"C{index}"
        axes.plot(x, loss, color=colour, alpha=0.25, linewidth=0.8)
        legend = f"{label} ({hidden} left out)" if hidden else label
        axes.plot(
            x, _smooth_between(x, loss, sorted(phases.values())), color=colour, linewidth=1.8, label=legend, zorder=3
        )
    _mark(axes, phases)
    axes.set(xlabel=xlabel, ylabel="loss", yscale="log", title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, which="major", alpha=0.3)
    axes.grid(True, which="minor", axis="y", alpha=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    if phases:  # room above the curves for the names of the phases
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.2)
    figure.legend(loc="outside lower center", ncols=min(4, len(curves)), frameon=False)
    path = user_path(path)
    figure.savefig(path)
    return path


def _mark(axes: Any, phases: Mapping[str, float]) -> None:
    """Vertical lines where phases begin, with their names just inside the top, whatever the losses are."""
    for label, start in phases.items():
        axes.axvline(start, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
        place = {"xytext": (3, -4), "textcoords": "offset points", "rotation": 90, "fontsize": 8, "color": "0.35"}
        # x in data units, y in units of the axes.
        axes.annotate(label, (start, 1), xycoords=axes.get_xaxis_transform(), va="top", ha="left", **place)


def moving_mean(values: ArrayLike, window: int) -> NDArray[np.float64]:
    """Centred mean over `window` neighbours of values [n]; near the ends, over fewer neighbours."""
    values = np.asarray(values, np.float64)
    before, after = (window - 1) // 2, window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    position = np.arange(len(values))
    first, last = np.maximum(position - before, 0), np.minimum(position + after + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _curve(label: str, history: Sequence[tuple[float, float]]) -> tuple[NDArray, NDArray, int]:
    """The points that can be shown, x [n] and loss [n], and the number of those that cannot."""
    pairs = np.asarray(history, np.float64)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"History {label!r} has shape {pairs.shape}; need a list of pairs (x, loss), not empty.")
    x, loss = pairs.T
    if (np.diff(x) < 0).any():
        raise ValueError(f"The x of history {label!r} go back. Sort the pairs, or pass the runs as two histories.")
    shown = np.isfinite(loss) & (loss > 0)
    if not shown.any():
        raise ValueError(f"History {label!r} has no finite loss above 0 in {len(loss)} values: nothing to plot.")
    return x[shown], loss[shown], int((~shown).sum())


def _smooth_between(x: NDArray[np.float64], loss: NDArray[np.float64], starts: list[float]) -> NDArray[np.float64]:
    """Moving means of the losses, separately between the sorted starts of phases."""
    window = max(1, len(loss) // SMOOTHED_PARTS)
    borders = np.searchsorted(x, starts)
    return np.concatenate([moving_mean(piece, window) for piece in np.split(loss, borders)])
