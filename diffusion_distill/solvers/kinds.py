"""Kinds of levels: VP and VE, whose alpha follows from sigma/alpha, and all others, whose process is asked.

    VP    alpha² + sigma² = 1      alpha = 1 / hypot(1, sigma/alpha)
    VE    alpha = 1

Rectified flows, and whatever else has an alpha and a sigma, are neither. Most solvers never ask: a DDIM step is the
same for all. What differs by kind is the published choice of a start scale and of an output, and where levels between
those of a grid lie.
"""

from __future__ import annotations

import numpy as np

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process

#: How far alpha² + sigma² may be from 1 in VP levels, which may come from float32.
TOLERANCE = 1e-5


def is_vp(level: Level) -> bool:
    """Whether all levels preserve the variance: alpha² + sigma² = 1."""
    return bool(np.all(np.abs(level.alpha**2 + level.sigma**2 - 1) < TOLERANCE))


def is_ve(level: Level) -> bool:
    """Whether all levels have alpha = 1."""
    return bool(np.all(level.alpha == 1))


def start_scale(level: Level) -> float:
    """The factor of unit noise at the start of sampling: 1 for a VP level, as published, and sigma for all others."""
    return 1.0 if is_vp(level) else float(level.sigma)


def own_output(grid: Level, output: str | None) -> str:
    """The output that a solver combines or takes differences of: by default eps for VP levels, x_hat for all others.

    Raises:
      ValueError: neither 'eps' nor 'x_hat'.
    """
    if output not in (None, "eps", "x_hat"):
        raise ValueError(f"The output must be 'eps' or 'x_hat' (None for the grid's own), got {output!r}.")
    return output or ("eps" if is_vp(grid) else "x_hat")


def level_at(ratio: Array, among: Level, process: Process | None = None) -> Level:
    """The level with sigma/alpha = `ratio` of the kind of some others; on the host or traced by JAX.

    Args:
      ratio: finite, scalar or [...].
      among: levels [n] of one kind, or [n, ...]: the n levels of each entry are looked at together.
      process: of levels that are neither VP nor VE.

    Returns:
      The level [...]; NaN where the levels are neither VP nor VE and there is no process.
    """
    xp = namespace(ratio, *among)
    exploding = xp.all(among.alpha == 1, axis=0)
    preserving = xp.all(abs(among.alpha**2 + among.sigma**2 - 1) < TOLERANCE, axis=0)
    others = xp.nan
    if process is not None:
        others = process.level(process.time(Level(xp.ones_like(ratio), ratio))).alpha
    alpha = xp.where(exploding, 1.0, xp.where(preserving, 1 / xp.hypot(1.0, ratio), others))
    return Level(alpha, alpha * ratio)


def check_known(level: Level) -> Level:
    """Returns levels on the host; raises ValueError if `level_at` could not tell some of them."""
    if np.isnan(level.alpha).any():
        raise ValueError(
            "Levels between those of a grid or a step are needed. Those of VP (alpha² + sigma² = 1) and VE (alpha = 1) "
            "are known; these are neither: give the process (process=...)."
        )
    return level
