"""A solver is a table: one row per network evaluation, everything between evaluations is linear.

There are R named registers of image shape: the first, y, is where the network is evaluated, the others
are memories. All start as init·noise. Row k does

    y ← y + noise_k · fresh noise,    x_hat = denoise(y, level_k),    registers ← W_k · (registers, x_hat)

with W_k [R, R + 1] (a general linear method; Butcher 2006). The number of rows is the number of
network evaluations (NFE), by construction. The result is y after the last row.

Tables are built in float64 on the host and are plain arguments of the compiled engine: another grid or
another solver of the same shape runs without recompiling. Coefficients may also differ from sample to sample, or be
traced by JAX; all rows of all tables are run by the same function, `rows.advance`.

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

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers.kinds import check_known


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

    def row(self, k: Array) -> Directions:
        """Those of row k."""
        return Directions(self.start, self.reached.at(k), self.weights[k], self.published[k])


class Table(NamedTuple):
    """A solver on a grid, ready to run: NFE rows over R registers.

    Attributes:
      init: scale of the starting noise, scalar.
      level: the level that the network is given in each row, [rows] or, of each sample, [rows, batch].
      noise: factor of the fresh noise added to y before each evaluation, [rows].
      weights: W, [rows, R, R + 1] or, of each sample, [rows, R, R + 1, batch]; the last column multiplies x_hat.
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

    def row(self, k: Array) -> Table:
        """Row k, with numbers where the table has one for each row."""
        directions = None if self.directions is None else self.directions.row(k)
        return Table(self.init, self.level.at(k), self.noise[k], self.weights[k], directions)

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
    columns, steps = (*registers, "x_hat"), len(rows)
    for k, row in enumerate(rows):
        for target, form in row.items():
            if target not in registers:
                raise ValueError(f"Row {k} sets {target!r} from {sorted(form)}; registers: {sorted(columns)}.")
            _check_names(form, columns, f"Row {k} sets {target!r}")
    forms = [[row.get(name, {name: 1.0}) for name in registers] for row in rows]
    weights = _coefficients(forms, columns)
    if np.shape(level.sigma)[:1] != (steps,):
        raise ValueError(f"A table of {steps} rows needs as many levels, got {np.shape(level.sigma)}.")
    if isinstance(weights, np.ndarray) and not np.isfinite(weights).all():
        check_known(level)
        raise ValueError(
            "This solver's coefficients are not finite on these levels. A first level without signal (alpha = 0) is "
            "for `tabulate`, which begins there with a step of DDIM; other levels need alpha > 0."
        )
    noise = np.zeros(steps) if noise is None else np.asarray(noise)
    made = None if directions is None else _directions(directions, columns, path or level)
    return Table(np.float64(init), level, noise, weights, made)


def stacked(levels: Sequence[Level]) -> Level:
    """Levels one after the other as one, [n] or [n, batch]."""
    xp = namespace(*(part for level in levels for part in level))
    return Level(*(xp.stack(xp.broadcast_arrays(*parts)) for parts in zip(*levels, strict=True)))


def _directions(rows: Sequence[Sequence[Direction]], columns: Sequence[str], path: Level) -> Directions:
    most = max((len(row) for row in rows), default=0)
    published = np.ones((len(rows), most))
    forms: list[list[Mapping[str, Array]]] = [[{} for _ in range(most)] for _ in rows]
    for k, row in enumerate(rows):
        for j, (difference, factor, absorbed) in enumerate(row):
            _check_names(difference, columns, f"Row {k} has a direction")
            forms[k][j] = {name: factor * value for name, value in difference.items()}
            published[k, j] = factor if absorbed else 1.0
    weights = _coefficients(forms, columns) if most else np.zeros((len(rows), 0, len(columns)))
    return Directions(path.at(0), path.at(slice(1, None)), weights, published)


def _check_names(form: Mapping[str, Array], columns: Sequence[str], what: str) -> None:
    if not set(form) <= set(columns):
        raise ValueError(f"{what} from {sorted(form)}; registers: {sorted(columns)}.")


def _coefficients(forms: Sequence[Sequence[Mapping[str, Array]]], columns: Sequence[str]) -> Array:
    """The forms [rows, n] as coefficients [rows, n, columns], or [rows, n, columns, batch] of forms for each sample."""
    places = {name: j for j, name in enumerate(columns)}
    found = [
        ((k, i, places[name]), a)
        for k, row in enumerate(forms)
        for i, form in enumerate(row)
        for name, a in form.items()
    ]
    values = [value for _, value in found]
    xp, shape = namespace(*values), np.broadcast_shapes(*map(np.shape, values))
    whole = np.zeros((len(forms), len(forms[0]), len(columns), *shape))
    if not found:
        return whole
    index = tuple(np.transpose([place for place, _ in found]))
    if xp is np:
        whole[index] = [np.broadcast_to(value, shape) for value in values] if shape else values
        return whole
    dtype = next(value.dtype for value in values if namespace(value) is xp)  # of the levels, all of one type
    values = [xp.broadcast_to(xp.asarray(value, dtype), shape) for value in values]
    return xp.asarray(whole, dtype).at[index].set(xp.stack(values))


def _reaching(weights: Array) -> list[int]:
    """The registers on which y depends in some row, y first."""
    depends, kept = np.any(weights[:, :, :-1], axis=0), {0}
    while (more := kept | {int(j) for i in kept for j in np.flatnonzero(depends[i])}) != kept:
        kept = more
    return sorted(kept)
