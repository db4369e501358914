"""The first step from a level without signal: alpha = 0, where a rectified flow begins.

There sigma/alpha and the log-SNR are infinite and z says nothing of x, so no solver has a rule for it but DDIM's in
x_hat, z_s = (sigma_s/sigma_t)·z_t + alpha_s·x_hat, which has no such quotient. The first step is DDIM's for all
solvers, and they begin where it ends. One step of first order leaves a method of second order what it is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffusion_distill.process.levels import Level
from diffusion_distill.process.noising import step_coefficients
from diffusion_distill.solvers.forms import X_HAT, move
from diffusion_distill.solvers.kinds import start_scale
from diffusion_distill.solvers.table import Directions, Table, build


def from_pure_noise(grid: Level, make: Callable[[Level], Table]) -> Table:
    """The table of a solver on a grid [steps + 1] whose first level has alpha = 0.

    Args:
      make: grid [steps] -> the solver's table from the second level on.
    """
    start, first, init = grid.at(0), grid.at(1), start_scale(grid.at(0))
    if len(grid.sigma) == 2:
        rows, told = [{"y": move(start, first, "x_hat", X_HAT)}], grid.at(slice(0, 1))
        return build(told, rows, init=init, directions=[[]], path=grid)
    table = make(grid.at(slice(1, None)))
    count = table.weights.shape[1]
    # Memories start as the noise times `table.init`, and y as z at the second level, in the table's own scale.
    row = np.eye(count, count + 1) * table.init / init
    row[0], scale = 0.0, table.init / start_scale(first)
    row[0, [0, -1]] = np.multiply(scale, step_coefficients(start, first))
    return Table(
        np.float64(init),
        _before(start, table.level),
        np.append(0.0, table.noise),
        np.concatenate([row[None], table.weights]),
        None if table.directions is None else _directions(start, first, table.directions),
    )


def _before(first: Level, rest: Level) -> Level:
    return Level(*(np.append(a, b) for a, b in zip(first, rest, strict=True)))


def _directions(start: Level, first: Level, directions: Directions) -> Directions:
    """Those of a table, and none in the row before."""
    weights = np.concatenate([np.zeros_like(directions.weights[:1]), directions.weights])
    published = np.concatenate([np.ones_like(directions.published[:1]), directions.published])
    return Directions(start, _before(first, directions.reached), weights, published)
