"""The sampler of EDM's ablation, arXiv:2206.00364 Table 1: every earlier sampler's choices, freely combined.

The state is z = c·(x + s·eps) along a time t, so its level is alpha = c(t), sigma = c(t)·s(t):

    dz/dt = (s'/s + c'/c)·z - (s'·c/s)·x_hat

schedule s(t):    linear   t
                  ve       sqrt(t)
                  vp       sigma/alpha of the linear-beta schedule through (epsilon_s, sigma_min) and (1, sigma_max)
scaling c(t):     none     1
                  vp       1 / sqrt(1 + s²)
solver:           euler, or heun: second order, with `alpha` and churn as in two_stage.py

The discretization is the grid: `edm_grids.discretized`. The defaults are Heun's method on EDM's grid. Where there is no
churn no noise enters; the published program lets rounding of t add some of 1e-8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_distill.base.errors import choose
from diffusion_distill.process import edm_grids, grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.solvers.churn import Churn
from diffusion_distill.solvers.general.two_stage import Flow, along, of_kind
from diffusion_distill.solvers.kinds import is_ve, is_vp
from diffusion_distill.solvers.table import Table

ORDERS = {"euler": 1, "heun": 2}


def ablation(
    grid: Level,
    schedule: str = "linear",
    scaling: str | None = None,
    solver: str = "heun",
    alpha: float = 1.0,
    *,
    process: Process | None = None,
    epsilon_s: float | None = None,
    sigma_range: tuple[float, float] | None = None,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    known: Sequence[float] | np.ndarray | None = None,
) -> Table:
    """The table of the ablation's sampler on a grid [steps + 1] of levels, of which sigma/alpha counts.

    NFE = steps for euler; as `heun` for heun.

    Args:
      schedule: 'linear', 've' or 'vp'.
      scaling: 'none' or 'vp', the kind of the levels at which the network is asked; by default the grid's own. If that
        is neither, the state is that of 'none', and alpha, by which it is multiplied for the network, is the process's.
      solver: 'euler' or 'heun'.
      alpha, process, s_churn, s_min, s_max, s_noise, known: as in `two_stage`.
      epsilon_s, sigma_range: of schedule 'vp' only: the time of sigma_min, 1e-3 by default, and (sigma_min, sigma_max),
        by default the grid's, which must then have two noisy levels.

    Raises:
      ValueError: unknown names, settings out of range or of other ones, or a grid that does not decrease.
    """
    if schedule != "vp" and (epsilon_s is not None or sigma_range is not None):
        raise ValueError(f"epsilon_s and sigma_range are for schedule='vp' of the ablation, got schedule={schedule!r}.")
    if solver == "euler" and alpha != 1:
        raise ValueError(f"alpha is for solver='heun' of the ablation, got alpha={alpha!r} with solver='euler'.")
    grid = grids.check(grid)
    sigma = grid.sigma / grid.alpha
    noisy = sigma[sigma > 0]
    sigma_range = (float(noisy[-1]), float(noisy[0])) if sigma_range is None else sigma_range
    times = time_schedule(schedule, sigma_range, *(() if epsilon_s is None else (epsilon_s,)))
    order = choose("solver of the ablation", solver, ORDERS)
    flow = flow_of(times, scaling or ("vp" if is_vp(grid) else "none"))
    table = along(flow, sigma, alpha if order == 2 else None, Churn(s_churn, s_min, s_max, s_noise, known))
    return table if scaling or is_vp(grid) or is_ve(grid) else of_kind(table, grid, process)


class TimeSchedule(NamedTuple):
    """s(t), its derivative and its inverse."""

    sigma: Callable[[float], float]
    rate: Callable[[float], float]
    time: Callable[[float], float]


def time_schedule(name: str, sigma_range: tuple[float, float] = (0.002, 80.0), epsilon_s: float = 1e-3) -> TimeSchedule:
    """One of the ablation's schedules by name; the rest is for 'vp'. Raises ValueError for an unknown name."""
    return choose("schedule of the ablation", name, TIME_SCHEDULES)(*sigma_range, epsilon_s)


def flow_of(schedule: TimeSchedule, scaling: str) -> Flow:
    """The flow of c·(x + s·eps) along the schedule's time. Raises ValueError for an unknown scaling."""
    scale, log_slope = choose("scaling of the ablation", scaling, SCALINGS)

    def level(t: float) -> Level:
        sigma = schedule.sigma(t)
        return Level(scale(sigma), scale(sigma) * sigma)

    def move(t: float, h: float) -> tuple[float, float]:
        sigma, change = schedule.sigma(t), h * schedule.rate(t)
        return change / sigma + change * log_slope(sigma), -change / sigma * scale(sigma)

    return Flow(schedule.time, level, move)


def _linear(sigma_min: float, sigma_max: float, epsilon_s: float) -> TimeSchedule:
    return TimeSchedule(lambda t: t, lambda t: 1.0, lambda sigma: sigma)


def _ve(sigma_min: float, sigma_max: float, epsilon_s: float) -> TimeSchedule:
    return TimeSchedule(math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda sigma: sigma**2)


def _vp(sigma_min: float, sigma_max: float, epsilon_s: float) -> TimeSchedule:
    fit = edm_grids.fitted_beta(sigma_min, sigma_max, epsilon_s)

    def sigma(t: float) -> float:
        level = fit.level(t)
        return float(level.sigma / level.alpha)

    def rate(t: float) -> float:
        return 0.5 * fit.beta(t) * (1 / sigma(t) + sigma(t))

    return TimeSchedule(sigma, rate, lambda s: float(fit.time(Level(1.0, s))) if s else 0.0)


#: name -> (sigma_min, sigma_max, epsilon_s) -> schedule
TIME_SCHEDULES: dict[str, Callable[[float, float, float], TimeSchedule]] = {"linear": _linear, "ve": _ve, "vp": _vp}
#: name -> (c, the derivative of log c), functions of s
SCALINGS: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "none": (lambda s: 1.0, lambda s: 0.0),
    "vp": (lambda s: 1 / math.hypot(1, s), lambda s: -s / (1 + s**2)),
}
