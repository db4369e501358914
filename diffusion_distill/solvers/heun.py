"""Heun's method and its second-order relatives, with churn: EDM's sampler, arXiv:2206.00364 Algorithms 1 to 3.

In y = z/alpha and s = sigma/alpha the flow is, for VP and VE alike,

    dy/ds = (y - x_hat(y, s)) / s

A step from s to e, h = e - s, tries the slope d at s and corrects it with the slope d' at the trial:

    y' = y + a·h·d,  s' = s + a·h            y <- y + h·((1 - b)·d + b·d'),   b = 1/(2a)

With a = 1 this is Heun's method, with a = 1/2 the midpoint method, with a = 2/3 Ralston's. A step to zero noise is
Euler's, which gives x_hat, so N steps of a grid that ends there make 2N - 1 evaluations. The slope at s is not
remembered but taken from the trial, d = (y' - y)/(a·h): memory `start` holds y.

Churn raises the noise before a step: from s to s·(1 + gamma), gamma = min(s_churn/N, sqrt(2) - 1), by adding
s_noise·sqrt(s_hat² - s²)·eps, wherever s is in [s_min, s_max].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_distill.arrays import Array
from diffusion_distill.diffusion import grids
from diffusion_distill.levels import Level
from diffusion_distill.solvers.table import Form, Table, build, rescaled, start_scale


def heun(
    grid: Level,
    alpha: float = 1.0,
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    known: Sequence[float] | Array | None = None,
) -> Table:
    """The table of Heun's method on a grid [steps + 1], VP or VE.

    NFE = 2·steps, one less if the grid ends at zero noise; two levels make a table of one step.

    Args:
      alpha: a, where the trial lies: 0 is the level a step begins at, 1 the one it ends at.
      s_churn, s_min, s_max, s_noise: churn; none by default.
      known: the only levels sigma/alpha the network knows; churned levels are rounded to the nearest.

    Raises:
      ValueError: settings out of range, a grid that does not decrease, or one that is neither VP nor VE if levels
        between its own are needed.
    """
    grid = grids.check(grid)
    sigma = grid.sigma / grid.alpha
    table = two_stage(EXPLODING, sigma, alpha, Churn(s_churn, s_min, s_max, s_noise, known))
    alphas = _alphas(grid, [*table.level.sigma, sigma[-1]])
    return rescaled(table._replace(init=start_scale(grid.at(0)) / grid.alpha[0]), alphas)


class Churn(NamedTuple):
    """How much noise is added before steps; see the head of this file."""

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    known: Sequence[float] | Array | None = None

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


def two_stage(flow: Flow, sigma: Array, alpha: float | None, churn: Churn) -> Table:
    """The table of a second-order method along a flow, through levels sigma/alpha [steps + 1].

    Args:
      alpha: a; None for Euler's method.

    Raises:
      ValueError: alpha not above 0, or so large that a trial passes zero noise; or churn out of range.
    """
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha, where the trial lies in its step, must be above 0 (1 is Heun's), got {alpha!r}.")
    steps, churn = len(sigma) - 1, churn.check()
    raised = [churn.raised(s, steps) for s in map(float, sigma[:-1])]
    times, begins = [flow.time(float(s)) for s in sigma], [flow.time(s) for s in raised]
    told, rows, noise = [], [], []
    for k, begin in enumerate(begins):
        at, forms = _step(flow, begin, times[k + 1], alpha)
        added = churn.s_noise * math.sqrt(max(raised[k] ** 2 - sigma[k] ** 2, 0.0))
        if k + 1 < steps:  # the next step begins with its level's signal scale
            scale = flow.level(begins[k + 1]).alpha / flow.level(times[k + 1]).alpha
            forms[-1]["y"] = {name: scale * factor for name, factor in forms[-1]["y"].items()}
        told, rows = told + at, rows + forms
        noise += [flow.level(begin).alpha * added] + [0.0] * (len(at) - 1)
    level = Level(*np.array([flow.level(t) for t in told], np.float64).T)
    registers = ("y",) if alpha is None else ("y", "start")
    init = flow.level(begins[0]).alpha * float(sigma[0])
    return build(level, rows, registers=registers, noise=np.array(noise), init=init)


def _step(flow: Flow, begin: float, end: float, alpha: float | None) -> tuple[list[float], list[dict[str, Form]]]:
    """One step: the times of its evaluations, and its rows."""
    h = end - begin
    if alpha is None or not end:
        from_y, from_x = flow.move(begin, h)
        return [begin], [{"y": {"y": 1 + from_y, "x_hat": from_x}}]
    from_y, from_x = flow.move(begin, alpha * h)
    predict: dict[str, Form] = {"start": {"y": 1.0}, "y": {"y": 1 + from_y, "x_hat": from_x}}
    trial, b = end if alpha == 1 else begin + alpha * h, 1 / (2 * alpha)
    if trial <= 0:
        raise ValueError(f"With alpha={alpha} a trial passes zero noise: take a smaller alpha or more steps.")
    from_y, from_x = flow.move(trial, b * h)
    kept = (1 - b) / alpha  # of the trial's move, which is alpha·h times the first slope
    return [begin, trial], [predict, {"y": {"start": 1 - kept, "y": kept + from_y, "x_hat": from_x}}]


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
