"""Methods of second order in two stages, along any flow, with churn: arXiv:2206.00364 Algorithm 3.

In y = z/alpha and s = sigma/alpha the flow is, whatever the process,

    dy/ds = (y - x_hat(y, s)) / s

A step from s to e, h = e - s, tries the slope d at s and corrects it with the slope d' at the trial:

    y' = y + a·h·d,  s' = s + a·h            y <- y + h·((1 - b)·d + b·d'),   b = 1/(2a)

With a = 1 this is Heun's method (heun.py has that alone), with a = 1/2 the midpoint method, with a = 2/3 Ralston's;
with a = 1/2 and the trial half way in log s, dpm_2 of EDM's toolbox. A step to zero noise is Euler's, which gives
x_hat. The slope at s is not remembered but taken from the trial, d = (y' - y)/(s' - s): memory `start` holds y.

Along another time than s, and of another state than y, the same is not the same method: see `Flow` and ablation.py.
D-EDM's directions and `keep_slope` are those of heun.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.errors import choose
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.solvers.churn import Churn
from diffusion_distill.solvers.forms import X_HAT, Form, Y, register
from diffusion_distill.solvers.kinds import check_known, level_at, start_scale
from diffusion_distill.solvers.table import Direction, Directions, Table, build, stacked


def two_stage(
    grid: Level,
    alpha: float = 0.5,
    *,
    process: Process | None = None,
    trial: str = "sigma",
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    known: Sequence[float] | np.ndarray | None = None,
    keep_slope: bool = False,
) -> Table:
    """The table of a two-stage method in sigma/alpha on a grid [steps + 1].

    NFE = 2·steps, one less if the grid ends at zero noise.

    Args:
      alpha: a, where the trial lies: 0 is the level a step begins at, 1 the one it ends at.
      process: says where levels between those of the grid lie if they are neither VP nor VE.
      trial: what a divides: the step in 'sigma' (that is, sigma/alpha) or in its 'log'.
      s_churn, s_min, s_max, s_noise, known: see `Churn`; none by default.
      keep_slope: of D-EDM, the published form of the corrected slope.

    Raises:
      ValueError: settings out of range, a grid that does not decrease, or levels of an unknown kind.
    """
    grid = grids.check(grid)
    place = choose("place of a trial", trial, TRIALS)
    churn = Churn(s_churn, s_min, s_max, s_noise, known)
    return of_kind(along(EXPLODING, grid.sigma / grid.alpha, alpha, churn, place, keep_slope), grid, process)


class Flow(NamedTuple):
    """The flow dz/dt = A(t)·z + B(t)·x_hat along some time t that is 0 at zero noise.

    Attributes:
      time: maps sigma/alpha to t.
      level: maps t to the level of z.
      move: maps (t, h) to (h·A(t), h·B(t)).
    """

    time: Callable[[float], float]
    level: Callable[[float], Level]
    move: Callable[[float, float], tuple[float, float]]


#: alpha = 1, and sigma is the time: a step of Euler to zero noise is exactly x_hat.
EXPLODING = Flow(lambda sigma: sigma, lambda t: Level(1.0, t), lambda t, h: (h / t, -h / t))


#: (begin, end, a) -> where the trial is.
TRIALS: dict[str, Callable[[float, float, float], float]] = {
    "sigma": lambda begin, end, a: end if a == 1 else begin + a * (end - begin),
    "log": lambda begin, end, a: begin ** (1 - a) * end**a,
}
START, LAST = register("start"), register("last")


def along(
    flow: Flow,
    sigma: Array,
    alpha: float | None,
    churn: Churn,
    place: Callable[[float, float, float], float] = TRIALS["sigma"],
    keep_slope: bool = False,
) -> Table:
    """The table of a second-order method along a flow, through levels sigma/alpha [steps + 1].

    Args:
      alpha: a; None for Euler's method.
      place: one of `TRIALS`.

    Raises:
      ValueError: alpha not above 0, or so large that a trial passes zero noise; or churn out of range.
    """
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha, where the trial lies in its step, must be above 0 (1 is Heun's), got {alpha!r}.")
    steps, churn = len(sigma) - 1, churn.check()
    raised = [churn.raised(s, steps) for s in map(float, sigma[:-1])]
    times, begins = [flow.time(float(s)) for s in sigma], [flow.time(s) for s in raised]
    told, ends, rows, directions, noise = [], [], [], [], []
    for k, begin in enumerate(begins):
        trial = None if alpha is None or not times[k + 1] else place(begin, times[k + 1], alpha)
        if trial is not None and trial <= 0:
            raise ValueError(f"With alpha={alpha} a trial passes zero noise: take a smaller alpha or more steps.")
        scale = 1.0  # the next step begins with its level's signal scale
        if k + 1 < steps:
            scale = flow.level(begins[k + 1]).alpha / flow.level(times[k + 1]).alpha
        made = _step(flow, begin, trial, times[k + 1], alpha, scale, LAST if k else None, keep_slope)
        rows, directions = rows + [row for row, _ in made], directions + [moved for _, moved in made]
        told += [begin] if trial is None else [begin, trial]
        ends += [times[k + 1]] if trial is None else [trial, times[k + 1]]
        noise += [flow.level(begin).alpha * churn.added(sigma[k], raised[k])] + [0.0] * (len(made) - 1)
    level, path = (stacked([flow.level(t) for t in at]) for at in (told, [times[0], *ends]))
    return build(
        level,
        rows,
        registers=("y", "start", "last"),
        noise=np.array(noise),
        init=flow.level(begins[0]).alpha * float(sigma[0]),
        directions=directions,
        path=path,
    )


def _step(
    flow: Flow,
    begin: float,
    trial: float | None,
    end: float,
    alpha: float | None,
    scale: float,
    previous: Form | None,
    keep_slope: bool,
) -> list[tuple[dict[str, Form], list[Direction]]]:
    """One step's rows with their directions; without a trial it is Euler's."""
    from_y, from_x = flow.move(begin, (end if trial is None else trial) - begin)
    first = Y + from_y * Y + from_x * X_HAT
    if trial is None:
        return [({"y": scale * first, "last": X_HAT}, _along(previous, scale * from_x))]
    b = 1 / (2 * (alpha or 1.0))
    slope_y, slope_x = flow.move(trial, b * (end - begin))
    if keep_slope:
        again = flow.move(begin, (1 - b) * (end - begin))
        kept = START + again[0] * START + again[1] * LAST
    else:
        share = (1 - b) * (end - begin) / (trial - begin)  # of the trial's move, which is along the first slope
        kept = START + share * (Y - START)
    second = kept + slope_y * Y + slope_x * X_HAT
    return [
        ({"start": Y, "y": first, "last": X_HAT}, _along(previous, from_x)),
        ({"y": scale * second, "last": X_HAT}, _along(LAST, scale * slope_x)),
    ]


def _along(previous: Form | None, factor: float) -> list[Direction]:
    return [] if previous is None else [Direction(X_HAT - previous, factor)]


def of_kind(table: Table, grid: Level, process: Process | None) -> Table:
    """Turns a table at levels alpha = 1 into one for levels like those of a grid."""
    ratios = np.append(table.level.sigma, grid.sigma[-1] / grid.alpha[-1])
    own = dict(zip(grid.sigma / grid.alpha, grid.alpha, strict=True))
    alpha = np.array([own.get(ratio, np.nan) for ratio in ratios])
    if (between := np.isnan(alpha)).any():
        alpha[between] = check_known(level_at(ratios[between], grid, process)).alpha
    return rescaled(table._replace(init=start_scale(grid.at(0)) / grid.alpha[0]), alpha)


def rescaled(table: Table, alpha: Array) -> Table:
    """Turns the table of a solver for y, at levels alpha = 1, into one for z = alpha·y.

    Only the evaluated register is scaled; memories keep what they hold for y.

    Args:
      alpha: signal scale of each evaluation and of the result, [rows + 1].
    """
    alpha = np.asarray(alpha, np.float64)
    told, after, weights, directions = alpha[:-1], alpha[1:], table.weights.copy(), table.directions
    weights[:, :, 0] /= told[:, None]
    weights[:, 0, :] *= after[:, None]
    if directions is not None:
        moves = directions.weights * after[:, None, None]
        moves[:, :, 0] /= told[:, None]
        factors = np.where(directions.published == 1, 1.0, directions.published * after[:, None])
        start, reached = (
            Level(told[0], told[0] * directions.start.sigma),
            Level(after, after * directions.reached.sigma),
        )
        directions = Directions(start, reached, moves, factors)
    level = Level(told, told * table.level.sigma)
    return Table(table.init * told[0], level, told * table.noise, weights, directions)
