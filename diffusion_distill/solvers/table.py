"""A solver is a table: one row per network evaluation, everything between evaluations is linear.

There are R named registers of image shape: the first, y, is where the network is evaluated, the others
are memories. All start as init·noise. Row k does

    y ← y + noise_k · fresh noise,    x_hat = denoise(y, level_k),    registers ← W_k · (registers, x_hat)

with W_k [R, R + 1] (a general linear method; Butcher 2006). The number of rows is the number of
network evaluations (NFE), by construction. The result is y after the last row.

Tables are built in float64 on the host and are plain arguments of the compiled engine: another grid or
another solver of the same shape runs without recompiling.

A row is written as linear forms (forms.py) in register names, for example DDIM's

    {"y": r * Y + d * X_HAT}

where a register that is not mentioned keeps its value.

A D-ODE solver (arXiv:2309.16421) is the same table plus, in each row, one or more directions v (linear forms too): with
scalars lambda fitted to a teacher (solvers/dode.py), each row adds lambda·v to y. Directions of a solver that has
them come with its table; `Table.plain` drops them and the memories only they need, `Table.distilled` fixes lambda. Both
give plain tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Cond, Image
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.process.levels import Level


class Direction(NamedTuple):
    """A direction factor·difference in which a row's lambda moves y.

    Attributes:
      difference: of outputs of the network, such as eps_t - eps_{t+1}.
      factor: with which the row moves y along an output of the network.
      absorbed: whether the published code's lambda contains the factor, as for D-DDIM, D-iPNDM, D-DEIS and D-EDM;
        that of D-DPM-Solver is the paper's.
    """

    difference: Mapping[str, Array]
    factor: Array
    absorbed: bool = True


class Directions(NamedTuple):
    """Where lambdas act in the rows of a table, and what they are fitted to.

    Attributes:
      start: the level at which y starts.
      reached: the level at which y is after each row, [rows].
      weights: v, [rows, D, R + 1]; rows without a direction have zeros.
      published: lambda in the published code divided by lambda in the paper, [rows, D]; we use the paper's.
    """

    start: Level
    reached: Level
    weights: Array
    published: Array


class Table(NamedTuple):
    """A solver on a grid, ready to run: NFE rows over R registers.

    Attributes:
      init: scale of the starting noise, scalar.
      level: the level that the network is given in each row, [rows].
      noise: factor of the fresh noise added to y before each evaluation, [rows].
      weights: W, [rows, R, R + 1]; the last column multiplies x_hat.
      directions: of a D-ODE solver; None for a plain table.
    """

    init: Array
    level: Level
    noise: Array
    weights: Array
    directions: Directions | None = None

    @property
    def nfe(self) -> int:
        """Number of network evaluations."""
        return self.weights.shape[0]

    @property
    def deterministic(self) -> bool:
        """Whether no row adds noise."""
        return not np.any(np.asarray(self.noise))

    def plain(self) -> Table:
        """Returns the table without directions and without memories that never reach y."""
        kept = _reaching(self.weights)
        weights = self.weights[:, kept][:, :, [*kept, -1]]
        return Table(self.init, self.level, self.noise, weights)

    def ended_in_x_hat(self) -> Table:
        """Returns a table whose last row gives the network's newest x_hat; directions stay as they are."""
        weights = self.weights.copy()
        weights[-1, 0] = np.arange(weights.shape[2]) == weights.shape[2] - 1
        return self._replace(weights=weights)

    def distilled(self, lambdas: Array) -> Table:
        """The plain table of the D-ODE solver with these lambdas, [rows, D] in the paper's convention.

        Raises:
          ValueError: the table has no directions, or another number of rows or of directions per row.
        """
        if self.directions is None:
            raise ValueError("This table has no directions for lambdas to act in: its solver has no D-ODE variant.")
        lambdas, moves = np.asarray(lambdas, np.float64), self.directions.weights
        if lambdas.shape != moves.shape[:2]:
            raise ValueError(f"This solver takes lambdas of shape {moves.shape[:2]}, [rows, D]; got {lambdas.shape}.")
        weights = self.weights.copy()
        weights[:, 0] += (lambdas[:, :, None] * moves).sum(axis=1)
        return self._replace(weights=weights).plain()


def build(
    level: Level,
    rows: Sequence[Mapping[str, Mapping[str, Array]]],
    *,
    registers: Sequence[str] = ("y",),
    noise: Array | None = None,
    init: float = 1.0,
    directions: Sequence[Sequence[Direction]] | None = None,
    path: Level | None = None,
) -> Table:
    """Assembles a table from linear forms.

    Args:
      level: level of each evaluation, [rows].
      rows: for each row, the new value of each register that changes, as a linear form.
      registers: their names, the evaluated one first.
      directions: of each row, in which a D-ODE solver's lambdas act; rows may have fewer than others.
      path: the level of y before the first row and after each, [rows + 1]; needed with directions.
      noise: factor of the noise added before each evaluation, [rows]; none by default.
      init: scale of the starting noise.

    Raises:
      ValueError: a form names an unknown register, or lengths disagree.
    """
    columns = {name: j for j, name in enumerate((*registers, "x_hat"))}
    weights = np.zeros((len(rows), len(registers), len(columns)))
    weights[:, np.arange(len(registers)), np.arange(len(registers))] = 1.0
    for k, row in enumerate(rows):
        for target, form in row.items():
            if target not in registers:
                raise ValueError(f"Row {k} sets {target!r} from {sorted(form)}; registers: {sorted(columns)}.")
            weights[k, columns[target]] = _coefficients(form, columns, f"Row {k} sets {target!r}")
    if np.shape(level.sigma) != (len(rows),):
        raise ValueError(f"A table of {len(rows)} rows needs as many levels, got {np.shape(level.sigma)}.")
    noise = np.zeros(len(rows)) if noise is None else np.asarray(noise)
    made = None if directions is None else _directions(directions, columns, path or level)
    return Table(np.float64(init), level, noise, weights, made)


def _directions(rows: Sequence[Sequence[Direction]], columns: Mapping[str, int], path: Level) -> Directions:
    most = max((len(row) for row in rows), default=0)
    weights, published = np.zeros((len(rows), most, len(columns))), np.ones((len(rows), most))
    for k, row in enumerate(rows):
        for j, (difference, factor, absorbed) in enumerate(row):
            weights[k, j] = factor * _coefficients(difference, columns, f"Row {k} has a direction")
            published[k, j] = factor if absorbed else 1.0
    return Directions(path.at(0), path.at(slice(1, None)), weights, published)


def _coefficients(form: Mapping[str, Array], columns: Mapping[str, int], what: str) -> np.ndarray:
    if not set(form) <= set(columns):
        raise ValueError(f"{what} from {sorted(form)}; registers: {sorted(columns)}.")
    coefficients = np.zeros(len(columns))
    coefficients[[columns[name] for name in form]] = list(form.values())
    return coefficients


def _reaching(weights: Array) -> list[int]:
    """The registers on which y depends in some row, y first."""
    depends, kept = np.any(weights[:, :, :-1], axis=0), {0}
    while (more := kept | {int(j) for i in kept for j in np.flatnonzero(depends[i])}) != kept:
        kept = more
    return sorted(kept)


def start_scale(level: Level) -> float:
    """The factor of unit noise at the start of sampling: 1 for VP levels, as published, and sigma for VE."""
    return 1.0 if level.alpha < 1 else float(level.sigma)


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


def run_host(
    table: Table,
    denoise: Denoise,
    start: Image,
    cond: Cond | None = None,
    *,
    row_noise: Image | None = None,
    states: bool = False,
) -> np.ndarray:
    """Runs a table on the host in float64, row by row; `sampling.integrate` is the same on the device in float32.

    Args:
      denoise: maps NumPy arrays (z, level, cond) to x_hat.
      start: unit noise [batch, ...].
      row_noise: unit noise of each row, [nfe, batch, ...]; needed if the table draws noise.
      states: also return what the network saw in each row.

    Returns:
      [batch, ...]; with states, [nfe + 1, batch, ...], the last being the result.

    Raises:
      ValueError: the table draws noise and there is none, or not one per row.
    """
    start = np.asarray(start, np.float64)
    if row_noise is None and table.deterministic:
        row_noise = np.zeros((table.nfe, *[1] * start.ndim))
    elif row_noise is None or row_noise.shape != (table.nfe, *start.shape):
        given = None if row_noise is None else row_noise.shape
        raise ValueError(f"row_noise must be {(table.nfe, *start.shape)}: one per row; got {given}.")
    registers, seen = np.stack([table.init * start] * table.weights.shape[1]), []
    for k, weights in enumerate(table.weights):
        registers[0] += table.noise[k] * row_noise[k]
        seen.append(registers[0])
        level = Level(*(np.full(len(start), a[k]) for a in table.level))
        x_hat = np.asarray(denoise(registers[0], level, cond), np.float64)
        registers = np.tensordot(weights, np.stack([*registers, x_hat]), axes=1)
    return np.stack([*seen, registers[0]]) if states else registers[0]
