"""The ancestral sampler: each step draws from the posterior q(z_s | z_t, x_hat), arXiv:2202.00512 section 3.

gamma interpolates the log-variance between the posterior's own (0, 'small') and the upper bound (1,
'large'). The noise of a step is added at the start of the next row, so none is added after the last.
"""

from __future__ import annotations

import numpy as np

from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.noising import posterior_coefficients
from diffusion_distill.solvers.forms import X_HAT, Y
from diffusion_distill.solvers.kinds import start_scale
from diffusion_distill.solvers.table import Table, build


def ancestral(grid: Level, gamma: float = 1.0) -> Table:
    """The table of the ancestral sampler on a grid [steps + 1]; NFE = steps; returns the last x_hat.

    Raises:
      ValueError: gamma outside [0, 1], or a grid that does not decrease.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1] (0: 'small' variance, 1: 'large'), got {gamma!r}.")
    grid = grids.check(grid)
    told, inner = grid.at(slice(None, -1)), grid.at(slice(1, -1))
    from_z, from_x, logvar = posterior_coefficients(told.at(slice(None, -1)), inner, gamma)
    rows = [{"y": from_z[k] * Y + from_x[k] * X_HAT} for k in range(len(from_z))]
    noise = np.concatenate([[0.0], np.exp(0.5 * logvar)])
    return build(told, [*rows, {"y": X_HAT}], noise=noise, init=start_scale(grid.at(0)))
