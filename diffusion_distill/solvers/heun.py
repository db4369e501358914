"""Heun's method with churn, EDM's sampler, arXiv:2206.00364 Algorithms 1 and 2.

A step from level t to s is DDIM's, z_s = r·z_t + d·x_hat, taken twice: along the output at t, and then, after one more
call of the network where that ends, along a mix of both outputs,

    (1 - w)·x_hat_t + w·x_hat_s,    w = (sigma_t/alpha_t) / (2·sigma_s/alpha_s)

This is Heun's corrector in z/alpha and sigma/alpha. A step to zero noise stays DDIM's, which gives x_hat, so N steps
of a grid that ends there make 2N - 1 calls.

D-EDM, arXiv:2309.16421 Eq. 46 to 51: the output at t is moved by its difference from the last one of the step before,
the output at s by its difference from that at t. By Eq. 48 the moved output at t is in both slopes of the corrected
step, as here: the step is written with the trial y' = r·z_t + d·x_hat_t of the first row, which lambda has moved,

    z_s = w·r·z_t + (1 - w)·y' + w·d·x_hat_s

The published code keeps the slope at t as it was (`keep_slope`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.noising import step_coefficients
from diffusion_distill.process.processes import Process
from diffusion_distill.solvers.churn import Churn
from diffusion_distill.solvers.forms import X_HAT, Y, register
from diffusion_distill.solvers.kinds import check_known, level_at, start_scale
from diffusion_distill.solvers.table import Direction, Table, build, stacked

START, LAST = register("start"), register("last")


def heun(
    grid: Level,
    *,
    process: Process | None = None,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    known: Sequence[float] | np.ndarray | None = None,
    keep_slope: bool = False,
) -> Table:
    """The table of Heun's method on a grid [steps + 1]; NFE = 2·steps, one less if it ends at zero noise.

    Args:
      process: says where raised levels lie if they are neither VP nor VE.
      s_churn, s_min, s_max, s_noise, known: see `Churn`; none by default.
      keep_slope: of D-EDM, the published form of the corrected step.

    Raises:
      ValueError: settings out of range, a grid that does not decrease, or raised levels of an unknown kind.
    """
    grid, churn = grids.check(grid), Churn(s_churn, s_min, s_max, s_noise, known).check()
    begins, noise = _raised(grid, churn, process)
    told, reached, added, rows, directions = [], [grid.at(0)], [], [], []
    for k in range(len(noise)):
        t, s = begins.at(k), grid.at(k + 1)
        r, d = step_coefficients(t, s)
        stages = [({"y": r * Y + d * X_HAT, "last": X_HAT}, d)]
        if s.sigma > 0:
            stages[0][0]["start"] = Y
            w = (t.sigma / t.alpha) / (2 * s.sigma / s.alpha)
            kept = r * START + d * LAST if keep_slope else Y  # the trial, without or with what lambda moved it by
            first = w * r * START + 0.5 * kept + (0.5 - w) * Y
            scale = begins.alpha[k + 1] / s.alpha  # z/alpha stays where churn raises the next step's level
            stages.append(({"y": scale * (first + w * d * X_HAT), "last": X_HAT}, scale * w * d))
        for j, (row, factor) in enumerate(stages):
            rows.append(row)
            directions.append([Direction(X_HAT - LAST, factor)] if k or j else [])
            told, reached, added = [*told, s if j else t], [*reached, s], [*added, 0.0 if j else noise[k]]
    return build(
        stacked(told),
        rows,
        registers=("y", "start", "last"),
        noise=np.array(added),
        init=start_scale(grid.at(0)) * begins.alpha[0] / grid.alpha[0],
        directions=directions,
        path=stacked(reached),
    )


def _raised(grid: Level, churn: Churn, process: Process | None) -> tuple[Level, np.ndarray]:
    """The levels [steps + 1] at which steps begin, the last being the end, and the noise [steps] added before each."""
    ratio, steps = grid.sigma / grid.alpha, len(grid.sigma) - 1
    raised = np.array([*(churn.raised(float(q), steps) for q in ratio[:-1]), ratio[-1]])
    moved = raised != ratio
    if not moved.any():
        return grid, np.zeros(steps)
    level = check_known(level_at(raised[moved], grid, process))
    begins = Level(*(a.copy() for a in grid))
    begins.alpha[moved], begins.sigma[moved] = level
    added = [churn.added(*pair) for pair in zip(ratio[:-1], raised[:-1], strict=True)]
    return begins, begins.alpha[:-1] * added
