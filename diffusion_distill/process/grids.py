"""Grids: decreasing levels on the host, from noise to clean, in float64.

A grid of n steps is a `Level` [n + 1], whoever made it. `make_grid` makes one by a rule from a process, between the
times of a start and an end. In n equal steps of

    time        the process's time
    quadratic   its root
    logsnr      the log-SNR
    rho         (sigma/alpha)^(1/rho)

or by EDM's rule (arXiv:2206.00364 Eq. 5), the default of variance-exploding processes:

    karras      n - 1 steps equal in rho, down to the least noise of the process, and one to exactly zero noise

Levels of your own are a grid too, if `check` accepts them. Grids in time nest by construction: every k-th time of a
grid of k·n steps is bit for bit the grid of n steps, because both are the correctly rounded quotient of one fraction.

`refine` divides the steps of a grid: the grid of a teacher that passes through its student's levels, or the nodes
inside the steps of a singlestep solver. Published samplers of discrete models visit whole indices of the betas instead
(`ddim_indices`). The grids that EDM compares are in edm_grids.py.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.process.ve import VE

#: (process, start, end, fractions of the way, rho) -> times
Spacing = Callable[[Process, float, float, np.ndarray, float], np.ndarray]
#: (process, steps, start=, end=, rho=) -> grid
Rule = Callable[..., Level]


def make_grid(
    process: Process, steps: int, rule: str = "", *, start: float = 1.0, end: float = 0.0, rho: float = 7.0
) -> Level:
    """A grid [steps + 1] of a process.

    Args:
      steps: at least 1.
      rule: one of `RULES`; empty for the process's own, see `default_rule`.
      start, end: times of the process.
      rho: of the rules 'rho' and 'karras'.

    Raises:
      ValueError: an unknown rule, no steps, an end that does not come before the start, or one where the rule's measure
        is infinite.
    """
    make = choose("rule of a grid", rule or default_rule(process), RULES)
    return make(process, steps, start=start, end=end, rho=rho)


def default_rule(process: Process) -> str:
    """'karras' for a variance-exploding process, 'time' for every other."""
    return "karras" if isinstance(process, VE) else "time"


def karras(process: Process, steps: int, *, start: float = 1.0, end: float = 0.0, rho: float = 7.0) -> Level:
    """EDM's grid: steps equal in rho down to the least noise, and the last step to exactly zero noise.

    The least noise is the `sigma_min` of a `VE`, else what another process has at time 0. One step goes from the start
    to zero noise. With an end above 0 it is the rule 'rho'.
    """
    if end > 0:
        return process.level(spaced_times(process, steps, "rho", start=start, end=end, rho=rho))
    least = process.sigma_min / process.sigma_max if isinstance(process, VE) else 0.0
    many = positive_int("The number of steps", steps) > 1
    times = spaced_times(process, steps - 1, "rho", start=start, end=least, rho=rho) if many else np.array([start])
    alpha, sigma = process.level(times)
    return Level(np.append(alpha, 1.0), np.append(sigma, 0.0))


def spaced_times(
    process: Process, steps: int, spacing: str = "time", *, start: float = 1.0, end: float = 0.0, rho: float = 7.0
) -> np.ndarray:
    """The times [steps + 1] of a grid in equal steps of one of `SPACINGS`; both ends are exact.

    Raises:
      ValueError: as `make_grid`.
    """
    between, steps = choose("spacing", spacing, SPACINGS), positive_int("The number of steps", steps)
    if not 0 < rho < math.inf:
        raise ValueError(f"The exponent rho of a grid must be positive and finite, got {rho!r}.")
    if not 0 <= end < start:
        raise ValueError(f"A grid runs down from a time `start` to a time `end` of at least 0, got {start} and {end}.")
    fractions = np.arange(steps, -1, -1) / steps if spacing == "time" else np.arange(steps + 1) / steps
    times = between(process, start, end, fractions, rho)
    times[0], times[-1] = start, end
    return times


def _spaced(spacing: str, process: Process, steps: int, **ends: Any) -> Level:
    return process.level(spaced_times(process, steps, spacing, **ends))


def clean_end(grid: Level) -> Level:
    """The grid with its last level replaced by exactly zero noise, (alpha, sigma) = (1, 0).

    A step there returns x_hat itself: BTD's rule for its last sampling step and its last target.
    """
    alpha, sigma = np.array(grid.alpha, np.float64), np.array(grid.sigma, np.float64)
    alpha[-1], sigma[-1] = 1.0, 0.0
    return Level(alpha, sigma)


def check(grid: Level) -> Level:
    """Returns the grid in float64 if its levels are finite and its noise decreases; raises ValueError otherwise.

    The first level may be pure noise, alpha = 0, the last zero noise, sigma = 0.
    """
    alpha, sigma = np.asarray(grid.alpha, np.float64), np.asarray(grid.sigma, np.float64)
    if alpha.ndim != 1 or alpha.shape != sigma.shape or alpha.size < 2:
        raise ValueError(f"A grid is two arrays [steps + 1] with at least 2 levels, got {alpha.shape}, {sigma.shape}.")
    finite = np.isfinite(alpha).all() and np.isfinite(sigma).all()
    if not (finite and (alpha[1:] > 0).all() and alpha[0] >= 0 and (sigma >= 0).all()):
        raise ValueError("A grid's levels must be finite with sigma >= 0 and alpha > 0 (the first may have alpha = 0).")
    with np.errstate(divide="ignore"):
        ratio = sigma / alpha
    rising = np.flatnonzero(ratio[1:] >= ratio[:-1])
    if rising.size:
        k = rising[0]
        raise ValueError(
            f"A grid must decrease in noise: sigma/alpha goes from {ratio[k]:.4g} to {ratio[k + 1]:.4g} "
            f"between rows {k} and {k + 1}. Sort it from noise to clean and drop repeated levels."
        )
    return Level(alpha, sigma)


def to_numbers(grid: Level | None) -> dict[str, list[float]] | None:
    """A grid for JSON, exactly; None stays None."""
    return None if grid is None else {name: np.asarray(a, float).tolist() for name, a in grid._asdict().items()}


def from_numbers(content: Any) -> Level | None:
    """The inverse of `to_numbers`.

    Raises:
      ValueError: it is no grid.
    """
    if content is None:
        return None
    written = "A grid is written as {'alpha': [...], 'sigma': [...]}"
    if not isinstance(content, Mapping) or set(content) != {"alpha", "sigma"}:
        raise ValueError(f"{written}, got {reprlib.repr(content)}.")
    try:
        return check(Level(**{name: np.asarray(a, np.float64) for name, a in content.items()}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{written}, but: {error!s:.300}") from error


def refine(process: Process, grid: Level, parts: int | Sequence[int], spacing: str = "time") -> Level:
    """Divides each step of a grid [steps + 1] into equal parts; the grid's own levels stay unchanged.

    A step to exactly zero noise is divided as if it went to the process's time 0.

    Args:
      parts: one number for all steps, or one per step [steps].

    Raises:
      ValueError: parts that are not positive or not one per step, an unknown spacing, a grid that does not decrease.
    """
    grid = check(grid)
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
        outer = make_grid(process, len(plan), spacing, start=start, end=end)
    else:
        outer = make_grid(process, sum(plan), spacing, start=start, end=end).at(np.cumsum([0, *plan]))
    return refine(process, outer, plan, spacing)


def ddim_indices(rule: str, steps: int, count: int = 1000) -> np.ndarray:
    """The indices [steps] of `count` betas that published DDIM programs visit, decreasing.

    'uniform': multiples of count // steps. 'uniform_all': all of them below `count`, which are more than `steps` where
    steps is no divisor; published fits of D-DDIM sample their teachers so. 'uniform_torch': count·k / steps in
    float32, cut off, which for some numbers of steps gives one less than exact arithmetic. 'quad': squares of equal
    steps up to 0.8·count, cut off.

    Raises:
      ValueError: an unknown rule, or not between 1 and `count` steps.
    """
    make = choose("rule of DDIM's indices", rule, DDIM_INDICES)
    if positive_int("The number of steps", steps) > count:
        raise ValueError(f"A model of {count} betas has at most {count} steps, got {steps}.")
    return make(steps, count)[::-1]


def _in_time(process: Process, start: float, end: float, fractions: np.ndarray, rho: float) -> np.ndarray:
    # Fractions of the way up, so that grids that nest do so bit for bit.
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
    if not level.alpha[0] > 0:
        raise ValueError("Steps equal in log-SNR or in rho need some signal at their start: choose a start below 1.")
    return -0.5 * level.logsnr


def _times_of(process: Process, ratio: np.ndarray) -> np.ndarray:
    return process.time(Level(np.ones_like(ratio), ratio))


SPACINGS: dict[str, Spacing] = {"time": _in_time, "quadratic": _quadratic, "logsnr": _in_logsnr, "rho": _in_rho}
RULES: dict[str, Rule] = {**{name: partial(_spaced, name) for name in SPACINGS}, "karras": karras}


def _uniform(steps: int, count: int) -> np.ndarray:
    return np.arange(steps) * (count // steps)


def _uniform_all(steps: int, count: int) -> np.ndarray:
    return np.arange(0, count, count // steps)


def _uniform_torch(steps: int, count: int) -> np.ndarray:
    """The float32 line from 0 to count, built from both of its ends."""
    each, k = np.float32(count) / np.float32(steps), np.arange(steps + 1, dtype=np.float32)
    line = np.where(k < (steps + 1) // 2, each * k, np.float32(count) - each * (np.float32(steps) - k))
    return line[:-1].astype(np.int64)


def _quad(steps: int, count: int) -> np.ndarray:
    return (np.linspace(0, (0.8 * count) ** 0.5, steps) ** 2).astype(np.int64)


DDIM_INDICES = {"uniform": _uniform, "uniform_all": _uniform_all, "uniform_torch": _uniform_torch, "quad": _quad}
