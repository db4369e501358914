"""iPNDM: Adams-Bashforth with fixed weights (PNDM, arXiv:2202.09778, with the warm-up of arXiv:2204.13902).

A DDIM step along a combination E of the newest noise estimates eps:

    E = eps_t                                                               first step
    E = (3·eps_t - eps_{t+1}) / 2                                           second
    E = (23·eps_t - 16·eps_{t+1} + 5·eps_{t+2}) / 12                        third
    E = (55·eps_t - 59·eps_{t+1} + 37·eps_{t+2} - 9·eps_{t+3}) / 24         from the fourth on

The weights are those of equal steps; DEIS (deis.py) has those of the grid. D-iPNDM, arXiv:2309.16421 Eq. 25, takes
E_t + lambda·(E_t - E_{t+1}) in place of E_t.
"""

from __future__ import annotations

import numpy as np

from diffusion_distill.process.levels import Level
from diffusion_distill.solvers.adams import adams
from diffusion_distill.solvers.table import Table

#: By how many outputs there are, newest first.
WEIGHTS = (
    np.array([1.0]),
    np.array([3, -1]) / 2,
    np.array([23, -16, 5]) / 12,
    np.array([55, -59, 37, -9]) / 24,
)


def ipndm(grid: Level, order: int = 4, *, told: Level | None = None) -> Table:
    """The table of iPNDM on a grid [steps + 1]; NFE = steps.

    Args:
      order: most outputs in a combination, 1 (DDIM) to 4.
      told: the levels given to the network, [steps], if they are not the grid's (published: one index lower).

    Raises:
      ValueError: an order out of range, or a grid that does not decrease.
    """
    if isinstance(order, bool | float) or order not in (1, 2, 3, 4):
        raise ValueError(f"iPNDM combines 1 to 4 outputs, got order={order!r}.")
    return adams(grid, lambda k: WEIGHTS[min(k + 1, order) - 1], order, told)
