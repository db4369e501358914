"""Time grids: decreasing times on the host, from noise to clean, in float64.

Grids nest by construction: every k-th time of a grid of k·n steps is bit for bit the grid of n steps,
because both are the correctly rounded quotient of the same fraction.
"""

from __future__ import annotations

import numpy as np

from diffusion_distill.diffusion.schedules import Schedule
from diffusion_distill.errors import positive_int
from diffusion_distill.levels import Level


def uniform_times(steps: int) -> np.ndarray:
    """Times 1 = t_0 > ... > t_steps = 0 in equal steps, [steps + 1] float64.

    Raises:
      ValueError: steps is not a whole number of at least 1.
    """
    steps = positive_int("The number of steps", steps)
    return np.arange(steps, -1, -1) / steps


def uniform(schedule: Schedule, steps: int) -> Level:
    """The levels of a schedule at uniform times, [steps + 1], decreasing in noise."""
    return schedule.level(uniform_times(steps))


def clean_end(grid: Level) -> Level:
    """The grid with its last level replaced by exactly zero noise, (alpha, sigma) = (1, 0).

    A step there returns x_hat itself: BTD's rule for its last sampling step and its last target.
    """
    alpha, sigma = np.array(grid.alpha, np.float64), np.array(grid.sigma, np.float64)
    alpha[-1], sigma[-1] = 1.0, 0.0
    return Level(alpha, sigma)


def check(grid: Level) -> Level:
    """Returns the grid if its levels are finite and its noise decreases; raises ValueError otherwise."""
    alpha, sigma = np.asarray(grid.alpha, np.float64), np.asarray(grid.sigma, np.float64)
    if alpha.ndim != 1 or alpha.shape != sigma.shape or alpha.size < 2:
        raise ValueError(f"A grid is two arrays [steps + 1] with at least 2 levels, got {alpha.shape}, {sigma.shape}.")
    if not (np.isfinite(alpha).all() and np.isfinite(sigma).all() and (alpha > 0).all() and (sigma >= 0).all()):
        raise ValueError("A grid's levels must be finite with alpha > 0 and sigma >= 0.")
    ratio = sigma / alpha
    rising = np.flatnonzero(ratio[1:] >= ratio[:-1])
    if rising.size:
        k = rising[0]
        raise ValueError(
            f"A grid must decrease in noise: sigma/alpha goes from {ratio[k]:.4g} to {ratio[k + 1]:.4g} "
            f"between rows {k} and {k + 1}. Sort it from noise to clean and drop repeated levels."
        )
    return Level(alpha, sigma)
