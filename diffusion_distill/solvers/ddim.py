"""DDIM, arXiv:2010.02502 Eq. 12 with eta = 0: one deterministic step per level (Euler for VE).

    z_s = r·z_t + d·x_hat,   r = sigma_s / sigma_t,   d = alpha_s - alpha_t·r

The network is evaluated at every level but the last. A grid that ends at zero noise (grids.clean_end)
returns the last x_hat itself, as Google's sampler does; one that ends at a schedule's last level returns
z there, as TRACT's does.
"""

from __future__ import annotations

from diffusion_distill.diffusion import grids
from diffusion_distill.diffusion.forward import step_coefficients
from diffusion_distill.levels import Level
from diffusion_distill.solvers.table import Table, build, start_scale


def ddim(grid: Level) -> Table:
    """The table of DDIM on a grid [steps + 1]; NFE = steps. Raises ValueError for a grid that does not decrease."""
    grid = grids.check(grid)
    told = grid.at(slice(None, -1))
    r, d = step_coefficients(told, grid.at(slice(1, None)))
    rows = [{"y": {"y": r[k], "x_hat": d[k]}} for k in range(len(r))]
    return build(told, rows, init=start_scale(grid.at(0)))
