"""Heun's method and its second-order relatives, with churn: EDM's sampler, arXiv:2206.00364 Algorithms 1 to 3.

In y = z/alpha and s = sigma/alpha the flow is, for VP and VE alike,

    dy/ds = (y - x_hat(y, s)) / s

A step from s to e, h = e - s, tries the slope d at s and corrects it with the slope d' at the trial:

    y' = y + a·h·d,  s' = s + a·h            y <- y + h·((1 - b)·d + b·d'),   b = 1/(2a)

With a = 1 this is Heun's method, with a = 1/2 the midpoint method, with a = 2/3 Ralston's; with a = 1/2 and the trial
half way in log s, dpm_2 of EDM's toolbox. A step to zero noise is Euler's, which gives x_hat, so N steps of a grid that
ends there make 2N - 1 evaluations. The slope at s is not remembered but taken from the trial,
d = (y' - y)/(s' - s): memory `start` holds y.

D-EDM, arXiv:2309.16421 Eq. 46 to 51: the output at s is moved by its difference from the last one of the step before,
the output at the trial by its difference from that at s. By Eq. 48 the moved output is in both slopes, as here; the
published code keeps the slope at s as it was (`keep_slope`).

Churn raises the noise before a step: from s to s·(1 + gamma), gamma = min(s_churn/N, sqrt(2) - 1), by adding
s_noise·sqrt(s_hat² - s²)·eps, wherever s is in [s_min, s_max].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.errors import choose
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers.forms import X_HAT, Form, Y, register
from diffusion_distill.solvers.table import Direction, Table, build, rescaled, start_scale


def heun(
    grid: Level,
    alpha: float = 1.0,
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    known: Sequence[float] | np.ndarray | None = None,
    trial: str = "sigma",
    keep_slope: bool = False,
) -> Table:
    """The table of Heun's method on a grid [steps + 1], VP or VE.

    NFE = 2·steps, one less if the grid ends at zero noise; two levels make a table of one step.

    Args:
      alpha: a, where the trial lies: 0 is the level a step begins at, 1 the one it ends at.
      s_churn, s_min, s_max, s_noise: churn; none by default.
      known: the only levels sigma/alpha the network knows; churned levels are rounded to the nearest.
      trial: what a divides: the step in 'sigma' (that is, sigma/alpha) or in its 'log'.
      keep_slope: of D-EDM, the published form of the corrected slope.

    Raises:
      ValueError: settings out of range, a grid that does not decrease, or one that is neither VP nor VE if levels
        between its own are needed.
    """
    grid = grids.check(grid)
    sigma = grid.sigma / grid.alpha
    place = choose("place of a trial", trial, TRIALS)
    table = two_stage(EXPLODING, sigma, alpha, Churn(s_churn, s_min, s_max, s_noise, known), place, keep_slope)
    alphas = _alphas(grid, [*table.level.sigma, sigma[-1]])
    return rescaled(table._replace(init=start_scale(grid.at(0)) / grid.alpha[0]), alphas)


class Churn(NamedTuple):
    """The noise added before steps; see the head of this file."""

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    known: Sequence[float] | np.ndarray | None = None

    def raised(self, sigma: float, steps: int) -> float:
        """The level to which a level is raised; itself where there is no churn."""
        gamma = min(self.s_churn / steps, math.sqrt(2) - 1)
        if not (gamma and self.s_min <= sigma <= self.s_max):
            return sigma
        if self.known is None:
            return sigma * (1 + gamma)
        known = np.asarray(self.known, np.float64)
        return float(known[grids.nearest(np.asarray(sigma * (1 + gamma)), known)])

    def check(self) -> Churn:
        """Itself; raises ValueError for negative numbers."""
        if not (0 <= self.s_churn < math.inf and 0 <= self.s_min <= self.s_max and 0 <= self.s_noise < math.inf):
            raise ValueError(
                "Churn needs s_churn >= 0, 0 <= s_min <= s_max and s_noise >= 0, got "
                f"s_churn={self.s_churn!r}, s_min={self.s_min!r}, s_max={self.s_max!r}, s_noise={self.s_noise!r}."
            )
        return self


class Flow(NamedTuple):
    """The flow dz/dt = A(t)·z + B(t)·x_hat along some time t that is 0 at zero noise.

    Attributes:
      time: maps sigma/alpha to t.
      level: maps t to the level of z.
      move: maps (t, h) to (h·A(t), h·B(t)).
    """

    time: Callable[[float], float]
    level: Callable[[float], Level]
    move: Callable[[float, float], tuple[float, float]]


#: alpha = 1, and sigma is the time: a step of Euler to zero noise is exactly x_hat.
EXPLODING = Flow(lambda sigma: sigma, lambda t: Level(1.0, t), lambda t, h: (h / t, -h / t))


#: (begin, end, a) -> where the trial is.
TRIALS: dict[str, Callable[[float, float, float], float]] = {
    "sigma": lambda begin, end, a: end if a == 1 else begin + a * (end - begin),
    "log": lambda begin, end, a: begin ** (1 - a) * end**a,
}
START, LAST = register("start"), register("last")


def two_stage(
    flow: Flow,
    sigma: Array,
    alpha: float | None,
    churn: Churn,
    place: Callable[[float, float, float], float] = TRIALS["sigma"],
    keep_slope: bool = False,
) -> Table:
    """The table of a second-order method along a flow, through levels sigma/alpha [steps + 1].

    Args:
      alpha: a; None for Euler's method.
      place: one of `TRIALS`.

    Raises:
      ValueError: alpha not above 0, or so large that a trial passes zero noise; or churn out of range.
    """
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha, where the trial lies in its step, must be above 0 (1 is Heun's), got {alpha!r}.")
    steps, churn = len(sigma) - 1, churn.check()
    raised = [churn.raised(s, steps) for s in map(float, sigma[:-1])]
    times, begins = [flow.time(float(s)) for s in sigma], [flow.time(s) for s in raised]
    told, ends, rows, directions, noise = [], [], [], [], []
    for k, begin in enumerate(begins):
        trial = None if alpha is None or not times[k + 1] else place(begin, times[k + 1], alpha)
        if trial is not None and trial <= 0:
            raise ValueError(f"With alpha={alpha} a trial passes zero noise: take a smaller alpha or more steps.")
        scale = 1.0  # the next step begins with its level's signal scale
        if k + 1 < steps:
            scale = flow.level(begins[k + 1]).alpha / flow.level(times[k + 1]).alpha
        made = _step(flow, begin, trial, times[k + 1], alpha, scale, LAST if k else None, keep_slope)
        rows, directions = rows + [row for row, _ in made], directions + [along for _, along in made]
        told += [begin] if trial is None else [begin, trial]
        ends += [times[k + 1]] if trial is None else [trial, times[k + 1]]
        added = churn.s_noise * math.sqrt(max(raised[k] ** 2 - sigma[k] ** 2, 0.0))
        noise += [flow.level(begin).alpha * added] + [0.0] * (len(made) - 1)
    level, path = (Level(*np.array([flow.level(t) for t in at], np.float64).T) for at in (told, [times[0], *ends]))
    return build(
        level,
        rows,
        registers=("y", "start", "last"),
        noise=np.array(noise),
        init=flow.level(begins[0]).alpha * float(sigma[0]),
        directions=directions,
        path=path,
    )


def _step(
    flow: Flow,
    begin: float,
    trial: float | None,
    end: float,
    alpha: float | None,
    scale: float,
    previous: Form | None,
    keep_slope: bool,
) -> list[tuple[dict[str, Form], list[Direction]]]:
    """One step's rows with their directions; without a trial it is Euler's."""
    from_y, from_x = flow.move(begin, (end if trial is None else trial) - begin)
    first = Y + from_y * Y + from_x * X_HAT
    if trial is None:
        return [({"y": scale * first, "last": X_HAT}, _along(previous, scale * from_x))]
    b = 1 / (2 * (alpha or 1.0))
    slope_y, slope_x = flow.move(trial, b * (end - begin))
    if keep_slope:
        again = flow.move(begin, (1 - b) * (end - begin))
        kept = START + again[0] * START + again[1] * LAST
    else:
        share = (1 - b) * (end - begin) / (trial - begin)  # of the trial's move, which is along the first slope
        kept = START + share * (Y - START)
    second = kept + slope_y * Y + slope_x * X_HAT
    return [
        ({"start": Y, "y": first, "last": X_HAT}, _along(previous, from_x)),
        ({"y": scale * second, "last": X_HAT}, _along(LAST, scale * slope_x)),
    ]


def _along(previous: Form | None, factor: float) -> list[Direction]:
    return [] if previous is None else [Direction(X_HAT - previous, factor)]


def _alphas(grid: Level, ratios: Sequence[float]) -> np.ndarray:
    """The signal scale at levels sigma/alpha: the grid's own, or that of its kind between them."""
    own = dict(zip(grid.sigma / grid.alpha, grid.alpha, strict=True))
    noisy = grid.at(grid.sigma > 0)
    if np.all(noisy.alpha == 1):
        between = np.ones_like
    elif np.allclose(noisy.alpha**2 + noisy.sigma**2, 1, rtol=0, atol=1e-6):
        between = lambda ratio: 1 / np.hypot(1, ratio)  # noqa: E731
    elif set(ratios) <= set(own):
        return np.array([own[ratio] for ratio in ratios])
    else:
        raise ValueError(
            "Levels between those of a grid are needed, so it must be VP or VE: alpha² + sigma² = 1 or alpha = 1."
        )
    return np.array([own.get(ratio, between(ratio)) for ratio in ratios])
