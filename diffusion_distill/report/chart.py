"""Charts as HTML: lines in an SVG that stretches to its box, with text beside it that keeps its size.

The drawing has SIDE units along both axes, whatever the size of the box on a screen. Each line carries its values as
text, one for each point of its path, which the script of the page shows under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_distill.report.lines import Line, Panel, checked_panel, fitting_scale, round_numbers, sizes_of

SIDE = 1000
MOST_POINTS = 500  # of a line
FEW_POINTS = 40  # lines of at most so many points show them
TICKS = 6  # at most so many on a linear axis
COLOURS = 10  # custom properties --c0, ... of the style
MARGIN = 0.03  # beyond the values, of an axis's length
DASHES = {"--": "6 4", ":": "2 3", "-.": "7 3 2 3"}

Floats = NDArray[np.float64]


class Axis(NamedTuple):
    """Where values stand: `place` is linear, logarithmic or asinh; low and high are places."""

    scale: str
    place: Callable[[ArrayLike], Floats]
    low: float
    high: float
    ticks: Sequence[float]

    def at(self, values: ArrayLike) -> Floats:
        """Fractions of the axis, 0 at its low end."""
        return (self.place(values) - self.low) / (self.high - self.low)


def chart_html(title: str, panel: Panel) -> str:
    """A panel as HTML; errors as of `line_plot`."""
    panel = checked_panel(title, panel)
    lines = {label: thinned(line) for label, line in panel.lines.items()}
    across = axis_of([line.x for line in lines.values()], panel.xscale, panel.linear)
    up = axis_of([line.y for line in lines.values()], panel.yscale, panel.linear)
    colours = _colours(lines)
    paths = "".join(_path(label, line, across, up, colours[label]) for label, line in lines.items())
    grid = "".join(f"M0 {_unit(1 - y)}H{SIDE}" for y in up.at(up.ticks)) + "".join(
        f"M{_unit(x)} 0V{SIDE}" for x in across.at(across.ticks)
    )
    texts = [_tick("y", "bottom", up, tick) for tick in up.ticks]
    texts += [_tick("x", "left", across, tick) for tick in across.ticks]
    texts += [_mark(text, float(across.at(x))) for text, x in (panel.marks or {}).items() if 0 <= across.at(x) <= 1]
    keys = (f'<li style="--line:var(--c{colours[label]})">{escape(label)}</li>' for label in lines)
    said = f"Chart: {title}. {panel.ylabel} against {panel.xlabel}: {', '.join(lines)}."
    return f"""<figure class="chart">
<figcaption>{escape(title)}</figcaption>
<ul class="legend">{"".join(keys)}</ul>
<div class="ylabel">{escape(panel.ylabel)}</div>
<div class="plot" role="img" aria-label="{escape(said)}" data-x="{escape(panel.xlabel)}">
<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none"><path class="grid" d="{grid}"/>{paths}</svg>
{"".join(texts)}
</div>
<div class="xlabel">{escape(panel.xlabel)}</div>
</figure>"""


def thinned(line: Line, most: int = MOST_POINTS) -> Line:
    """The line with at most `most` points: the ends, and the least and the greatest y of each of equal stretches.

    Args:
      line: x, y [points], NaN where it is interrupted. Gaps between stretches that hold no values stay.
    """
    x, y = (np.asarray(values, np.float64) for values in (line.x, line.y))
    if len(x) <= most:
        return line._replace(x=x, y=y)
    borders = np.linspace(1, len(x) - 1, (most - 2) // 2 + 1).astype(int)
    kept = {0, len(x) - 1}
    for begin, end in pairwise(borders):
        here = y[begin:end]
        if np.isnan(here).all():
            kept.add(begin)
        else:
            kept |= {begin + int(np.nanargmin(here)), begin + int(np.nanargmax(here))}
    chosen = np.array(sorted(kept))
    return line._replace(x=x[chosen], y=y[chosen])


def axis_of(values: Sequence[ArrayLike], scale: str, linear: float | None = None) -> Axis:
    """The axis that holds all values, NaN left out; scale and linear as in `Panel`."""
    together = np.concatenate([np.asarray(part, np.float64) for part in values])
    scale = fitting_scale(together) if scale == "auto" else scale
    sizes = sizes_of(together)
    width = linear or (float(np.median(sizes)) if sizes.size else 1.0)
    places: dict[str, Callable] = {"log": np.log10, "asinh": lambda v: np.arcsinh(np.asarray(v) / width)}
    backs: dict[str, Callable] = {"log": lambda p: 10.0**p, "asinh": lambda p: np.sinh(p) * width}
    place, back = places.get(scale, np.asarray), backs.get(scale, float)
    least, most = float(np.nanmin(place(together))), float(np.nanmax(place(together)))
    spare = MARGIN * (most - least) or 0.5 * max(abs(most), 1e-3)
    low, high = least - spare, most + spare
    if scale == "linear":
        ticks = _even_ticks(low, high)
    else:
        ticks = round_numbers(float(back(low)), float(back(high)), place) or [float(back((low + high) / 2))]
    return Axis(scale, place, low, high, ticks)


def _even_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between low and high, at most `TICKS`."""
    power = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step = next(power * digit for digit in (1, 2, 5, 10, 20) if (high - low) / (power * digit) <= TICKS)
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _colours(lines: Mapping[str, Line]) -> dict[str, int]:
    """label -> number of its colour, which is another line's if it is `like` that one."""
    groups = list(dict.fromkeys(line.like or label for label, line in lines.items()))
    return {label: groups.index(line.like or label) % COLOURS for label, line in lines.items()}


def _path(label: str, line: Line, across: Axis, up: Axis, colour: int) -> str:
    """The path of a line, with its values as text; of few points also dots, which are lines of no length."""
    x, y = (np.asarray(values, np.float64) for values in (line.x, line.y))
    shown = ~np.isnan(y)
    points = [
        f"{_unit(left)} {_unit(1 - height)}" for left, height in zip(across.at(x[shown]), up.at(y[shown]), strict=True)
    ]
    joined = np.concatenate([[False], shown[:-1]])[shown]  # whether the point before is shown too
    way = "".join(f"{'L' if follows else 'M'}{point}" for follows, point in zip(joined, points, strict=True))
    look = f'style="--line:var(--c{colour})"'
    dashes = f' stroke-dasharray="{DASHES[line.style]}"' if line.style in DASHES else ""
    values = f'data-x="{_numbers(x[shown], 7)}" data-y="{_numbers(y[shown], 4)}"'
    dots = "".join(f"M{point}h0" for point in points) if len(points) <= FEW_POINTS else ""
    drawn = f'<path class="line" {look}{dashes} data-label="{escape(label)}" {values} d="{way}"/>'
    return drawn + (f'<path class="dots" {look} d="{dots}"/>' if dots else "")


def _numbers(values: Floats, digits: int) -> str:
    return " ".join(f"{value:.{digits}g}" for value in values.tolist())


def _unit(fraction: float) -> str:
    """A fraction of an axis in the units of the drawing."""
    return f"{SIDE * fraction:.1f}".removesuffix(".0")


def _tick(name: str, side: str, axis: Axis, tick: float) -> str:
    return f'<span class="{name}tick" style="{side}:{100 * float(axis.at(tick)):.2f}%">{escape(short(tick))}</span>'


def _mark(text: str, fraction: float) -> str:
    return f'<span class="mark" style="left:{100 * fraction:.2f}%">{escape(text)}</span>'


def short(number: float) -> str:
    """A number as ticks show it: 20000 is 20k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(number) < 1000 * size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"
