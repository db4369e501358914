"""DDIM, arXiv:2010.02502 Eq. 12 with eta = 0: one deterministic step per level (Euler for VE).

    z_s = r·z_t + d·x_hat,   r = sigma_s / sigma_t,   d = alpha_s - alpha_t·r

The network is evaluated at every level but the last. A grid that ends at zero noise (grids.clean_end)
returns the last x_hat itself, as Google's sampler does; one that ends at a schedule's last level returns
z there, as TRACT's does.

D-DDIM, arXiv:2309.16421 Eq. 10, 17 and 39, puts D_t + lambda·(D_t - D_{t+1}) in the network's place, where D is its eps
(VP) or its x_hat (VE). Before the first output, D_{t+1} of eps is the noise itself; of x_hat there is none.
"""

from __future__ import annotations

from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers.forms import Form, estimate, move, move_coefficients, register
from diffusion_distill.solvers.kinds import own_output, start_scale
from diffusion_distill.solvers.table import Direction, Table, build

LAST = register("last")


def ddim(grid: Level, output: str | None = None) -> Table:
    """The table of DDIM on a grid [steps + 1]; NFE = steps.

    Args:
      output: what D-DDIM takes differences of, 'eps' or 'x_hat'; by default eps for VP, x_hat for other levels.

    Raises:
      ValueError: a grid that does not decrease, or an unknown output.
    """
    grid = grids.check(grid)
    output, told, init = own_output(grid, output), grid.at(slice(None, -1)), start_scale(grid.at(0))
    rows, directions = [], []
    for k in range(len(told.alpha)):
        t, s = grid.at(k), grid.at(k + 1)
        newest = estimate(output, t)
        rows.append({"y": move(t, s, output, newest), "last": newest})
        directions.append(along_difference(t, s, output, newest, before(k, output, LAST, init)))
    return build(told, rows, registers=("y", "last"), init=init, directions=directions, path=grid)


def before(k: int, output: str, last: Form, init: float) -> Form | None:
    """The output before row k's: a memory `last`, which starts as the noise times `init`, or none."""
    if k:
        return last
    return last / init if output == "eps" else None


def along_difference(
    t: Level, s: Level, output: str, newest: Form, previous: Form | None, absorbed: bool = True
) -> list[Direction]:
    """The direction of a step from level t to s whose estimate is moved by newest - previous; none without previous."""
    if previous is None:
        return []
    return [Direction(newest - previous, move_coefficients(t, s, output)[1], absorbed)]
