"""Spacings: where the steps of a sampler lie on a process.

Between the times of a start and an end, n steps are equal in

    time        the process's time
    quadratic   its root
    logsnr      the log-SNR
    rho         (sigma/alpha)^(1/rho), EDM's rule (arXiv:2206.00364 Eq. 5)

`refine` divides the steps of a grid: the grid of a teacher that passes through its student's levels, or the nodes
inside the steps of a singlestep solver.

Published samplers of discrete models visit whole indices of the betas instead (`ddim_indices`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process

Between = Callable[[Process, float, float, np.ndarray, float], np.ndarray]


def spaced(
    process: Process, steps: int, spacing: str = "time", *, start: float = 1.0, end: float = 0.0, rho: float = 7.0
) -> Level:
    """The levels [steps + 1] of a process between two of its times, in equal steps of a spacing.

    Raises:
      ValueError: an unknown spacing, no steps, or an end that does not come before the start.
    """
    return process.level(spaced_times(process, steps, spacing, start=start, end=end, rho=rho))


def spaced_times(
    process: Process, steps: int, spacing: str = "time", *, start: float = 1.0, end: float = 0.0, rho: float = 7.0
) -> np.ndarray:
    """The process's times [steps + 1] of `spaced`; both ends are exact."""
    between, steps = choose("spacing", spacing, SPACINGS), positive_int("The number of steps", steps)
    if not 0 < rho < math.inf:
        raise ValueError(f"The exponent rho of a spacing must be positive and finite, got {rho!r}.")
    if not 0 <= end < start:
        raise ValueError(f"A grid runs down from a time `start` to a time `end` of at least 0, got {start} and {end}.")
    fractions = np.arange(steps, -1, -1) / steps if spacing == "time" else np.arange(steps + 1) / steps
    times = between(process, start, end, fractions, rho)
    times[0], times[-1] = start, end
    return times


def refine(process: Process, grid: Level, parts: int | Sequence[int], spacing: str = "time") -> Level:
    """Divides each step of a grid [steps + 1] into equal parts; the grid's own levels stay unchanged.

    A step to exactly zero noise is divided as if it went to the process's time 0.

    Args:
      parts: one number for all steps, or one per step [steps].

    Raises:
      ValueError: parts that are not positive or not one per step, an unknown spacing, a grid that does not decrease.
    """
    grid = grids.check(grid)
    steps = len(grid.sigma) - 1
    counts = (np.broadcast_to(parts, steps) if np.ndim(parts) == 0 else np.asarray(parts)).tolist()
    if len(counts) != steps:
        raise ValueError(f"A grid of {steps} steps is divided by one number for each, got {len(counts)} numbers.")
    noisy = grid.at(grid.sigma > 0)
    times = np.append(process.time(noisy), np.zeros(len(grid.sigma) - len(noisy.sigma)))
    levels = []
    for k, count in enumerate(counts):
        inner = spaced_times(process, count, spacing, start=float(times[k]), end=float(times[k + 1]))[1:-1]
        levels += [grid.at(slice(k, k + 1)), process.level(inner)]
    levels.append(grid.at(slice(-1, None)))
    return Level(*(np.concatenate(part) for part in zip(*levels, strict=True)))


def singlestep(
    process: Process, plan: Sequence[int], spacing: str = "time", *, start: float = 1.0, end: float = 1e-3
) -> Level:
    """The grid [sum(plan) + 1] of a singlestep solver as published: its steps and the nodes inside them.

    Steps are equal in logsnr; of other spacings the nodes are (arXiv:2206.00927, appendix).

    Args:
      plan: evaluations of each step, as `solvers.dpm_solver.order_plan` gives them.
    """
    if spacing == "logsnr":
        outer = spaced(process, len(plan), spacing, start=start, end=end)
    else:
        outer = spaced(process, sum(plan), spacing, start=start, end=end).at(np.cumsum([0, *plan]))
    return refine(process, outer, plan, spacing)


def ddim_indices(rule: str, steps: int, count: int = 1000) -> np.ndarray:
    """The indices [steps] of `count` betas that published DDIM programs visit, decreasing.

    'uniform': multiples of count // steps. 'uniform_torch': count·k / steps in float32, cut off, which for some numbers
    of steps gives one less than exact arithmetic. 'quad': squares of equal steps up to 0.8·count, cut off.

    Raises:
      ValueError: an unknown rule, or not between 1 and `count` steps.
    """
    make = choose("rule of DDIM's indices", rule, DDIM_INDICES)
    if positive_int("The number of steps", steps) > count:
        raise ValueError(f"A model of {count} betas has at most {count} steps, got {steps}.")
    return make(steps, count)[::-1]


def _in_time(process: Process, start: float, end: float, fractions: np.ndarray, rho: float) -> np.ndarray:
    # Fractions of the way up, so that grids that nest do so bit for bit (grids.uniform_times).
    return end + (start - end) * fractions


def _quadratic(process: Process, start: float, end: float, fractions: np.ndarray, rho: float) -> np.ndarray:
    return (start**0.5 + fractions * (end**0.5 - start**0.5)) ** 2


def _in_logsnr(process: Process, start: float, end: float, fractions: np.ndarray, rho: float) -> np.ndarray:
    first, last = _log_ratios(process, start, end)
    return _times_of(process, np.exp(first + fractions * (last - first)))


def _in_rho(process: Process, start: float, end: float, fractions: np.ndarray, rho: float) -> np.ndarray:
    first, last = np.exp(_log_ratios(process, start, end) / rho)
    return _times_of(process, (first + fractions * (last - first)) ** rho)


def _log_ratios(process: Process, start: float, end: float) -> np.ndarray:
    level = process.level(np.array([start, end]))
    if not level.sigma[1] > 0:
        raise ValueError("Steps equal in log-SNR or in rho need noise at their end: choose a later end.")
    return -0.5 * level.logsnr


def _times_of(process: Process, ratio: np.ndarray) -> np.ndarray:
    return process.time(Level(np.ones_like(ratio), ratio))


SPACINGS: dict[str, Between] = {"time": _in_time, "quadratic": _quadratic, "logsnr": _in_logsnr, "rho": _in_rho}


def _uniform(steps: int, count: int) -> np.ndarray:
    return np.arange(steps) * (count // steps)


def _uniform_torch(steps: int, count: int) -> np.ndarray:
    """The float32 line from 0 to count, built from both of its ends."""
    each, k = np.float32(count) / np.float32(steps), np.arange(steps + 1, dtype=np.float32)
    line = np.where(k < (steps + 1) // 2, each * k, np.float32(count) - each * (np.float32(steps) - k))
    return line[:-1].astype(np.int64)


def _quad(steps: int, count: int) -> np.ndarray:
    return (np.linspace(0, (0.8 * count) ** 0.5, steps) ** 2).astype(np.int64)


DDIM_INDICES = {"uniform": _uniform, "uniform_torch": _uniform_torch, "quad": _quad}
