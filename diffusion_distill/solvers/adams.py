"""Adams-Bashforth steps: DDIM along a combination of the newest noise estimates. What iPNDM and DEIS share.

    E_t = sum_j w_{t,j}·eps_{t+j},   z_s = (alpha_s/alpha_t)·z_t + (sigma_s - (alpha_s/alpha_t)·sigma_t)·E_t

The weights of a step sum to 1 unless they come from an inexact quadrature.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers.ddim import along_difference, before
from diffusion_distill.solvers.forms import ZERO, eps_hat, move, register
from diffusion_distill.solvers.kinds import start_scale
from diffusion_distill.solvers.table import Table, build

LAST = register("last")  # the combination of the step before


def adams(grid: Level, weights: Callable[[int], np.ndarray], order: int, told: Level | None = None) -> Table:
    """The table of steps along weighted eps on a grid [steps + 1].

    Args:
      weights: those of step k, newest output first, at most min(k + 1, order) of them.
      order: most outputs in a combination.
      told: the levels given to the network, [steps]; the grid's by default.

    Raises:
      ValueError: the grid does not decrease, or `told` does not have one level per step.
    """
    grid = grids.check(grid)
    if told is not None and np.shape(told.sigma) != (len(grid.sigma) - 1,):
        raise ValueError(f"`told` needs one level per step, {len(grid.sigma) - 1} of them; got {np.shape(told.sigma)}.")
    told, init = grid.at(slice(None, -1)) if told is None else told, start_scale(grid.at(0))
    memories = [f"eps_{j}" for j in range(1, order)]  # of j steps ago
    rows, directions = [], []
    for k in range(len(grid.alpha) - 1):
        t, s = grid.at(k), grid.at(k + 1)
        outputs = [eps_hat(told.at(k)), *map(register, memories)]
        combined = sum((w * eps for w, eps in zip(weights(k), outputs, strict=False)), ZERO)
        kept = dict(zip(memories, outputs[:-1], strict=True))
        rows.append({"y": move(t, s, "eps", combined), **kept, "last": combined})
        directions.append(along_difference(t, s, "eps", combined, before(k, "eps", LAST, init)))
    return build(
        told,
        rows,
        registers=("y", *memories, "last"),
        init=init,
        directions=directions,
        path=grid,
    )
