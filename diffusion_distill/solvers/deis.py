"""DEIS with Adams-Bashforth coefficients, arXiv:2204.13902: the polynomial through past eps is integrated exactly.

In q = sigma/alpha the flow is d(z/alpha) = eps·dq, so a step from level t to s adds to z

    sum_j C_j·eps_{t+j},   C_j = alpha_s·∫ l_j dq  from q_t to q_s

where l_j are the Lagrange polynomials through the newest points: in the process's time (tAB), or in q itself (rhoAB;
on levels alpha = 1 this is Adams-Bashforth of variable steps). The integrals are taken by Gauss-Legendre quadrature to
float64, panel by panel between a process's knots. The published programs sum instead; for parity:

    left   Riemann sum of 10,000 left ends of equal intervals of time (the authors' code)
    ends   that sum with nodes from one end to the other; exact for steps with one output (EDM's toolbox)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.solvers.adams import adams
from diffusion_distill.solvers.table import Table

PUBLISHED_NODES = 10_000
GAUSS_NODES = 96  # of a step: exact to float64 over ten orders of magnitude in q
KNOT_NODES = 12  # of a panel between knots


def deis(
    grid: Level,
    order: int = 3,
    *,
    process: Process | None = None,
    quadrature: str = "exact",
    told: Level | None = None,
) -> Table:
    """The table of DEIS on a grid [steps + 1]; NFE = steps.

    Args:
      order: most outputs in a combination, from 1 (DDIM); the paper's tAB-r has r + 1.
      process: in whose time the polynomials are (tAB); in sigma/alpha without one (rhoAB).
      quadrature: 'exact', or 'left' or 'ends' as in the published programs.
      told: the levels given to the network, [steps], if they are not the grid's (published: one index lower).

    Raises:
      ValueError: an order below 1, an unknown quadrature, a published one of a process without a rate, or a
        grid that does not decrease.
    """
    order = positive_int("The order of DEIS, the most outputs it combines,", order)
    integrate = choose("quadrature", quadrature, QUADRATURES)
    if quadrature != "exact" and process is not None and not hasattr(process, "rate"):
        raise ValueError(f"The quadrature {quadrature!r} sums in the time of a process with a rate, got {process!r}.")
    grid = grids.check(grid)
    q = grid.sigma / grid.alpha
    times = q if process is None else process.time(grid)

    def weights(k: int) -> np.ndarray:
        points = times[k::-1][:order]
        if len(points) == 1 and quadrature == "ends":
            return np.ones(1)
        of = [partial(lagrange, points, j) for j in range(len(points))]
        integrals = [integrate(process, q[k : k + 2], times[k : k + 2], f) for f in of]
        return np.array(integrals) / (q[k + 1] - q[k])

    return adams(grid, weights, order, told)


def lagrange(points: np.ndarray, j: int, t: np.ndarray) -> np.ndarray:
    """The polynomial through 1 at points[j] and 0 at the other points, at times t."""
    others = np.delete(points, j)
    return np.prod((t[..., None] - others) / (points[j] - others), axis=-1)


Integrand = Callable[[np.ndarray], np.ndarray]


def _exact(process: Process | None, q: np.ndarray, times: np.ndarray, f: Integrand) -> float:
    """∫ f dq, in log q where q stays above 0: times are smoother functions of it."""
    panels = np.array([q[0], *_between(process, times), q[1]])
    in_log = q[1] > 0
    ends = np.log(panels) if in_log else panels
    nodes, share = _gauss(GAUSS_NODES if len(ends) == 2 else KNOT_NODES)
    middle, half = (ends[1:] + ends[:-1]) / 2, (ends[1:] - ends[:-1]) / 2
    u = middle[:, None] + half[:, None] * nodes
    at, rate = (np.exp(u), np.exp(u)) if in_log else (u, 1.0)  # q and dq/du
    t = at if process is None else process.time(Level(np.ones_like(at), at))
    return float(np.sum(half[:, None] * share * rate * f(t)))


@lru_cache(maxsize=4)
def _gauss(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of Gauss-Legendre quadrature."""
    return np.polynomial.legendre.leggauss(count)


def _between(process: Process | None, times: np.ndarray) -> np.ndarray:
    """q at the process's knots inside a step, in the step's order."""
    knots = np.asarray(getattr(process, "knots", ()))
    inside = knots[(knots > times[1]) & (knots < times[0])][::-1]
    if process is None or not len(inside):
        return inside
    level = process.level(inside)
    return level.sigma / level.alpha


def _sum(process: Process | None, q: np.ndarray, times: np.ndarray, f: Integrand, endpoint: bool) -> float:
    """The published sums: ∫ f (dq/dt) dt on equal intervals; of q without a process."""
    nodes, slope = np.linspace(times[0], times[1], PUBLISHED_NODES, endpoint=endpoint), 1.0
    if process is not None:
        alpha, sigma = process.level(nodes)
        slope = process.rate(nodes) / (alpha * sigma)  # type: ignore[attr-defined]
    return float(np.sum(slope * f(nodes)) * (times[1] - times[0]) / PUBLISHED_NODES)


QUADRATURES = {"exact": _exact, "left": partial(_sum, endpoint=False), "ends": partial(_sum, endpoint=True)}
