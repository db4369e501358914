"""Lines: panels of labelled lines, in one figure with one legend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_distill.base.errors import choose
from diffusion_distill.base.files import user_path
from diffusion_distill.report.figures import figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE = 10.0  # values that differ by this factor are drawn on a logarithmic axis if the scale is "auto"
SCALES: dict[str, None] = dict.fromkeys(("linear", "log", "asinh", "auto"))
LEAST_WIDTH, LEAST_PANEL, HEIGHT = 9.0, 3.2, 3.4  # of a figure, of a panel, and of a row of panels, in inches
MOST_TICKS = 8  # of an axis that is not linear
LEGEND_COLUMNS, LEGEND_LINE = 4, 0.22  # the height in inches
LEGEND_LETTER, LEGEND_HANDLE = 0.09, 0.6  # widths in inches


class Line(NamedTuple):
    """A line of a panel; points that are not finite are left out and interrupt it.

    Attributes:
      x, y: [points] each.
      style: matplotlib's name of the dashes: "-", "--", ":", "-.".
      marker: matplotlib's name of the symbol at each point; "" for none.
      like: the label of the line whose colour it takes, which need not be drawn itself; None for its own.
    """

    x: ArrayLike
    y: ArrayLike
    style: str = "-"
    marker: str = ""
    like: str | None = None


class Panel(NamedTuple):
    """Lines on common axes.

    Attributes:
      lines: label -> line.
      xlabel, ylabel: what the axes count.
      xscale, yscale: "linear"; "log", which leaves out values that are not above 0; "asinh", logarithmic for both
        signs and linear around 0; or "auto", which chooses one of them from the values.
      linear: for "asinh", the size up to which it is about linear; None chooses it from the values.
      marks: label -> x of a thin vertical line, named above the panel.
    """

    lines: Mapping[str, Line]
    xlabel: str = ""
    ylabel: str = ""
    xscale: str = "linear"
    yscale: str = "linear"
    linear: float | None = None
    marks: Mapping[str, float] | None = None


def line_plot(rows: Sequence[Mapping[str, Panel]], path: str | Path, title: str = "") -> Path:
    """Writes rows of panels {title: panel}. Lines of one label have one colour and one entry in the legend.

    Args:
      rows: the panels of each row, which share its width.
      path: the file; its ending is the format, and its folder must exist.
      title: a line above the panels.

    Returns:
      The path.

    Raises:
      ValueError: there are no panels, a panel has no lines, a line's x and y are not [points] each or it has no point
        to show, or a scale is unknown.
      ImportError: matplotlib is not installed.
    """
    panels = [(str(name), checked_panel(str(name), panel)) for row in rows for name, panel in row.items()]
    if not panels or not all(rows):
        raise ValueError("There are no panels. Pass rows [{title: Panel(lines)}, ...] of at least one panel each.")
    lines = dict(chain.from_iterable(panel.lines.items() for _, panel in panels))
    colours = _colours(lines)
    counts = [len(row) for row in rows]
    width = max(LEAST_WIDTH, LEAST_PANEL * max(counts))
    entry = LEGEND_HANDLE + LEGEND_LETTER * max(map(len, lines))
    columns = max(1, min(LEGEND_COLUMNS, len(lines), int(width / entry)))
    below = -(-len(lines) // columns)
    figure, axes = figure_of(counts, (width, HEIGHT * len(rows) + 0.3 + LEGEND_LINE * below))
    handles = {}
    for place, (name, panel) in zip(axes, panels, strict=True):
        for label, handle in _draw(place, panel, colours).items():
            handles.setdefault(label, handle)
        place.set_title(name, loc="left")  # the right is for the names of marks
    if title:
        figure.suptitle(title)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)
    path = user_path(path)
    figure.savefig(path)
    return path


def fitting_scale(values: ArrayLike) -> str:
    """ "log" or, if some are not above 0, "asinh" for values of very different sizes; else "linear"."""
    sizes = sizes_of(values)
    if not sizes.size:
        return "linear"
    if np.nanmin(values) > 0:
        return "log" if sizes.max() > WIDE * sizes.min() else "linear"
    return "asinh" if sizes.max() > WIDE * np.median(sizes) else "linear"


def checked_panel(name: str, panel: Panel) -> Panel:
    """The panel with arrays of floats in its lines, NaN where there is nothing to show."""
    for scale in (panel.xscale, panel.yscale):
        choose("scale", scale, SCALES)
    if not panel.lines:
        raise ValueError(f"Panel {name!r} has no lines. Pass at least one entry {{label: Line(x, y)}}.")
    lines = {}
    for label, line in panel.lines.items():
        x, y = (np.array(values, np.float64) for values in (line.x, line.y))
        if x.ndim != 1 or x.shape != y.shape:
            raise ValueError(f"Line {label!r} of panel {name!r} has x {x.shape} and y {y.shape}; need [points] each.")
        hidden = ~(np.isfinite(x) & np.isfinite(y))
        for values, scale in ((x, panel.xscale), (y, panel.yscale)):
            if scale == "log":
                hidden |= ~(values > 0)
        if hidden.all():
            raise ValueError(f"Line {label!r} of panel {name!r} has nothing to show in {len(x)} points.")
        x[hidden] = y[hidden] = np.nan
        lines[str(label)] = line._replace(x=x, y=y)
    return panel._replace(lines=lines)


def _colours(lines: Mapping[str, Line]) -> dict[str, Any]:
    """label -> colour: different ones, except for lines that take another line's; beyond 20 labels colours repeat."""
    from matplotlib import colormaps

    groups = list(dict.fromkeys(line.like or label for label, line in lines.items()))
    palette = colormaps["tab10" if len(groups) <= 10 else "tab20"]
    return {label: palette(groups.index(line.like or label) % palette.N) for label, line in lines.items()}


def _draw(axes: Axes, panel: Panel, colours: Mapping[str, Any]) -> dict[str, Any]:
    """Draws a panel; returns label -> what the legend shows."""
    handles = {}
    for label, line in panel.lines.items():
        look: dict[str, Any] = {"linestyle": line.style, "marker": line.marker, "markersize": 4, "linewidth": 1.5}
        [handles[label]] = axes.plot(line.x, line.y, color=colours[label], label=label, **look)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    _scale(axes, "x", panel.xscale, panel.linear, [line.x for line in panel.lines.values()])
    _scale(axes, "y", panel.yscale, panel.linear, [line.y for line in panel.lines.values()])
    for text, x in (panel.marks or {}).items():
        axes.axvline(x, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
        at = {"xytext": (0, 2), "textcoords": "offset points", "fontsize": 8, "color": "0.35"}
        axes.annotate(text, (x, 1), xycoords=axes.get_xaxis_transform(), va="bottom", ha="center", **at)
    axes.grid(True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return handles


def _scale(axes: Axes, name: str, scale: str, linear: float | None, values: Sequence[Any]) -> None:
    """Sets the scale of the x or y axis, with ticks at round numbers."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    together = np.concatenate(values)
    scale = fitting_scale(together) if scale == "auto" else scale
    if scale == "linear":
        return
    sizes = sizes_of(together)
    width = linear or (float(np.median(sizes)) if sizes.size else 1.0)
    options = {"linear_width": width} if scale == "asinh" else {}
    axis, set_scale = (axes.xaxis, axes.set_xscale) if name == "x" else (axes.yaxis, axes.set_yscale)
    set_scale(scale, **options)
    low, high = axis.get_view_interval()
    ticks = round_numbers(low, high, np.log if scale == "log" else lambda value: np.arcsinh(value / width))
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def round_numbers(low: float, high: float, place: Callable[[float], float]) -> list[float]:
    """Round numbers between low and high that are not too close on the axis, the roundest first."""
    top = math.floor(math.log10(max(abs(low), abs(high))))
    bottom = math.floor(math.log10(low)) if low > 0 else top - 12
    sizes = [digit * 10.0**power for digit in (1, 5, 2, 3) for power in range(top, bottom - 1, -1)]
    least, kept = (place(high) - place(low)) / MOST_TICKS, []
    for number in [0.0, *(sign * size for size in sizes for sign in (1, -1))]:
        if low <= number <= high and all(abs(place(number) - place(other)) >= least for other in kept):
            kept.append(number)
    return kept


def sizes_of(values: ArrayLike) -> NDArray[np.float64]:
    """The absolute values of all values that are finite and not 0."""
    sizes = np.abs(np.asarray(values, np.float64))
    return sizes[np.isfinite(sizes) & (sizes > 0)]
