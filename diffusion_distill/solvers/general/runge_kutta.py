"""Explicit Runge–Kutta methods along the flow: Heun's, the midpoint method, the classical method of order 4.

In u = z/alpha and tau = sigma/alpha the flow is, whatever the process (arXiv:2206.00364 Eq. 4),

    du/dtau = (u - x_hat(u, tau)) / tau

A step over h = tau_s - tau_t with the tableau a, b (Butcher 2016, section 23) visits the stages

    u_i = u + h·sum_{j<i} a_ij·k_j,   tau_i = tau_t + h·sum_j a_ij,   k_i = (u_i - x_hat_i) / tau_i

and ends at u + h·sum_i b_i·k_i. Along u itself the slope is that of a straight line through 0, which every such method
follows exactly, so u_i = (tau_i/tau_t)·u + S_i, where S_i holds estimates only. In z, with S_0 = 0:

    z_i = (sigma_i/sigma_t)·z_t + alpha_i·S_i,   S_i = h·sum_{j<i} a_ij·(S_j - x_hat_j) / tau_j

No large z is subtracted from another, so rows keep float32's digits even where alpha is near 0. With one stage this is
DDIM.

A step to zero noise is one of Euler's method, which ends at x_hat: the flow has no slope where there is no noise, so
Heun's second stage does not exist there (EDM's rule), and the others would end outside the range of their estimates.
"""

from __future__ import annotations

from functools import partial

from diffusion_distill.base.arrays import namespace
from diffusion_distill.base.errors import choose
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.solvers.forms import X_HAT, ZERO, Form, Y, register
from diffusion_distill.solvers.kinds import level_at, start_scale
from diffusion_distill.solvers.table import Direction, Table, build, stacked

#: Lower triangles a_ij of Butcher's tableaux, row by row, and b as the last row; nodes c are the sums of rows.
Tableau = tuple[tuple[float, ...], ...]
EULER: Tableau = ((), (1.0,))
HEUN: Tableau = ((), (1.0,), (1 / 2, 1 / 2))
MIDPOINT: Tableau = ((), (1 / 2,), (0.0, 1.0))
RK4: Tableau = ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
TABLEAUX = {"euler": EULER, "heun": HEUN, "midpoint": MIDPOINT, "rk4": RK4}

START, LAST = register("start"), register("last")


def runge_kutta(grid: Level, tableau: str, *, process: Process | None = None) -> Table:
    """The table of a Runge–Kutta method on a grid [steps + 1].

    NFE = stages·steps, where a step to zero noise has one stage only. D-ODE's directions are the differences of each
    output from the one before it.

    Args:
      tableau: a name of `TABLEAUX`.
      process: says where levels between those of the grid lie if they are neither VP nor VE.

    Raises:
      ValueError: an unknown tableau, a grid that does not decrease, or needed levels of an unknown kind.
    """
    grid, method = grids.check(grid), choose("Runge–Kutta tableau", tableau, TABLEAUX)
    told, rows, directions = [], [], []
    for k in range(len(grid.sigma) - 1):
        end = grid.at(k + 1)
        levels, made = step(grid.at(k), end, method if end.sigma else EULER, process)
        for row in made:
            directions.append([Direction(X_HAT - LAST, row["y"]["x_hat"])] if rows else [])
            rows.append({**row, "last": X_HAT})
        told += levels
    return build(
        stacked(told),
        rows,
        registers=("y", "start", *map(_output, range(len(method) - 2)), "last"),
        init=start_scale(grid.at(0)),
        directions=directions,
        path=stacked([*told, grid.at(-1)]),
    )


midpoint = partial(runge_kutta, tableau="midpoint")
rk4 = partial(runge_kutta, tableau="rk4")


def step(
    start: Level, end: Level, tableau: Tableau, process: Process | None = None
) -> tuple[list[Level], list[dict[str, Form]]]:
    """One step between two levels: the level given to the network in each stage, and the row after it.

    Rows are over the registers y, start and x_0, x_1, ..., the outputs of the stages but the last.

    Args:
      start, end: scalars or [batch], on the host or traced by JAX; alpha > 0, and sigma > 0 at the start. Where the end
        is zero noise all stages lie at the start, and the step ends at the first one's x_hat.
    """
    xp, stages = namespace(*start, *end), len(tableau) - 1
    h, clean = end.sigma / end.alpha - start.sigma / start.alpha, end.sigma == 0
    levels, shifts, rows = [start], [ZERO], []
    for i, shares in enumerate(tableau[1:], start=1):
        if i < stages:
            level = between(start, end, sum(shares), process)
            level = Level(xp.where(clean, start.alpha, level.alpha), xp.where(clean, start.sigma, level.sigma))
            shares = [xp.where(clean, 0.0, share) for share in shares]
        else:
            level = end
            shares = [xp.where(clean, float(j == 0), share) for j, share in enumerate(shares)]
        slopes = [(shifts[j] - register(_output(j))) * (levels[j].alpha / levels[j].sigma) for j in range(i)]
        shifts.append(sum((h * share * slope for share, slope in zip(shares, slopes, strict=True)), ZERO))
        levels.append(level)
        begin, newest = START if i > 1 else Y, _output(i - 1)
        row = {"y": _renamed(level.sigma / start.sigma * begin + level.alpha * shifts[i], newest, "x_hat")}
        rows.append(row if i == stages else {**row, "start": begin, newest: X_HAT})
    return levels[:-1], rows


def between(start: Level, end: Level, node: float, process: Process | None = None) -> Level:
    """The level at tau = tau_t + node·(tau_s - tau_t), of the kind of start and end; NaN as in `level_at`."""
    if node in (0, 1):
        return end if node else start
    tau = (1 - node) * (start.sigma / start.alpha) + node * (end.sigma / end.alpha)
    return level_at(tau, stacked([start, end]), process)


def _output(stage: int) -> str:
    return f"x_{stage}"


def _renamed(form: Form, old: str, new: str) -> Form:
    return Form({new if name == old else name: factor for name, factor in form.items()})
