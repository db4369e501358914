"""D-ODE solvers: the lambdas of a solver's directions, fitted to a teacher in one pass, arXiv:2309.16421.

A student's row takes y to y' + sum_j lambda_j·v_j, which is affine in the lambdas (solvers/table.py). They are those of
least squares over a batch, Eq. 14,

    lambda* = argmin ‖ y_teacher - y' - sum_j lambda_j·v_j ‖²

one number per direction for all pixels and images together, row by row while the student walks with the lambdas
already found. The teacher starts from the same noise and takes `scale` steps for each row of the student. Its state for
a row is the one at the level the row reaches: teachers' grids are nested (`nested`). The published programs pair states
of other levels in places (`published`); the fitted lambdas then also make up for a shift in time.

Where directions vanish or are nearly parallel, lambdas can be of any size and mean nothing for other images. So a fit
may be given a bound: a row that asks for a larger lambda keeps 0. Outputs in float32 have errors of 1e-7, which a
lambda of 1000 makes 1e-4.

The paper's 'Fixed' and 'LA' have one lambda for all rows, the best of some candidates by any measure (`search`).

The whole costs (scale + 1)·NFE evaluations of one batch. Conditional and guided models are fitted as they are sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base import interrupts
from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.base.errors import positive_int
from diffusion_distill.base.typing import Cond, Data
from diffusion_distill.denoisers.denoise import Denoise, as_denoise
from diffusion_distill.process.grids import refine
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.solvers.engine import Registers, advance, begin, combine, integrate, run_host, walk
from diffusion_distill.solvers.table import Table


class Teacher(NamedTuple):
    """The teacher's solver, and the states that a student is fitted to.

    Attributes:
      table: the teacher's solver on its grid.
      targets: the number of its state that each row of the student is to reach, [rows]; nfe is its result.
    """

    table: Table
    targets: Sequence[int]


class Fit(NamedTuple):
    """Fitted lambdas.

    Attributes:
      lambdas: in the paper's convention, [rows, D]; 0 where a row has no direction.
      plain: root mean square distance of each row's state from its target before its lambdas act, [rows].
      fitted: the same afterwards, [rows].
      result: the student's last state, [batch, ...].
      asked: the lambdas of least squares, [rows, D]; of rows whose lambdas are 0 for it, beyond the bound.
    """

    lambdas: Array
    plain: Array
    fitted: Array
    result: Data
    asked: Array


class Search(NamedTuple):
    """The result of a search for one lambda shared by all rows.

    Attributes:
      metric: by which they were measured.
      candidates: lambdas, [n].
      values: of the metric, [n]; nan where the student's images are not finite.
      best: the candidate that was chosen.
    """

    metric: str
    candidates: Array
    values: Array
    best: float

    @property
    def at_edge(self) -> bool:
        """Whether the best is the least or the greatest of several candidates, so that a better one may lie beyond."""
        return len(self.candidates) > 1 and self.best in (min(self.candidates), max(self.candidates))


def nested(student: Table, process: Process, scale: int, make: Callable[[Level], Table]) -> Teacher:
    """The teacher with `scale` steps per row of the student whose grid passes through all levels the student reaches.

    Args:
      student: a table with directions.
      process: in whose time the student's steps are divided.
      make: grid -> table of the teacher's solver.

    Raises:
      ValueError: a student without directions, a scale that is not positive, a teacher that draws noise or does not
        pass through its grid's levels.
    """
    start, reached = _path(student)
    ratio = reached.sigma / reached.alpha
    passed = sorted(set(ratio), reverse=True)  # some rows try a level another row reaches: they share its state
    first = [int(np.flatnonzero(ratio == value)[0]) for value in passed]
    coarse = Level(*(np.append(a, b[first]) for a, b in zip(start, reached, strict=True)))
    parts = [positive_int("The scale", scale) * int((ratio == value).sum()) for value in passed]
    fine = refine(process, coarse, parts)
    table = make(fine)
    ends = _path(table)[1]
    states = 1 + np.array([_last(ends.sigma / ends.alpha, value) for value in passed])
    return Teacher(table, [int(states[passed.index(value)]) for value in ratio])


def published(student: Table, teacher: Table) -> Teacher:
    """The published pairing: row k of the student is to reach the teacher's state (k + 1)·n, n whole steps apart.

    The last row is to reach the teacher's result. Whether levels agree depends on the two grids.
    """
    apart = teacher.nfe // student.nfe
    return Teacher(teacher, [*(apart * (k + 1) for k in range(student.nfe - 1)), teacher.nfe])


def fit(
    denoise: Denoise,
    student: Table,
    teacher: Teacher,
    start: Data,
    cond: Cond | None = None,
    teacher_denoise: Denoise | None = None,
    largest: float = math.inf,
) -> Fit:
    """Fits a student's lambdas to a teacher.

    With `start` split over devices, the lambdas are those of the whole batch.

    Args:
      denoise: the student's model, (z, level, cond) -> x_hat.
      student: a table with directions.
      start: unit noise [batch, ...].
      cond: the conditions, of conditional models.
      teacher_denoise: the teacher's model; the student's by default. (Of a model distilled to few steps, whose own
        estimates say nothing between them, it is the model it was distilled from.)
      largest: a row one of whose lambdas is larger in size, or not finite, keeps 0.

    Raises:
      ValueError: a student without directions, or targets that are not one per row.
      Interrupted: the program was asked to stop.
    """
    _check(student, teacher)
    wanted = sorted(set(teacher.targets))
    states = integrate(teacher_denoise or denoise, teacher.table, start, cond, states=wanted)
    goals = [states[wanted.index(target)] for target in teacher.targets]
    table = jax.tree.map(lambda a: np.asarray(a, np.float32), student)
    return _fitted(partial(_jitted_row, as_denoise(denoise), cond, largest), table, start, goals)


def fit_host(
    denoise: Denoise,
    student: Table,
    teacher: Teacher,
    start: Data,
    cond: Cond | None = None,
    largest: float = math.inf,
) -> Fit:
    """`fit` on the host in float64; `denoise` takes NumPy arrays."""
    _check(student, teacher)
    start = np.asarray(start, np.float64)
    states = run_host(teacher.table.plain(), denoise, start, cond, states=True)
    goals = [states[target] for target in teacher.targets]
    return _fitted(partial(_fit_row, denoise, cond, largest), student, start, goals)


def _fitted(step: Callable[..., tuple], student: Table, start: Data, goals: Sequence[Data]) -> Fit:
    found, result = [], start
    for registers, *facts in walk(step, student, begin(student, start), goals):
        result = registers[0]
        found.append(facts)
    lambdas, plain, fitted, asked = (np.stack(jax.device_get(part)) for part in zip(*found, strict=True))
    return Fit(lambdas, plain, fitted, result, asked)


def search(
    student: Table,
    candidates: Sequence[float],
    measure: Callable[[Table], float],
    metric: str = "l2",
    highest: bool = False,
) -> Search:
    """The one lambda of the candidates, for all rows, with which the student's samples are best.

    The paper's 'Fixed' and 'LA', which it chooses by FID.

    Args:
      measure: what is compared, of the student's table with a candidate, such as `distance_from`.
      metric: what that is called.
      highest: the highest value is best, not the lowest.

    Raises:
      ValueError: a student without directions, or no candidate with a finite value.
      Interrupted: the program was asked to stop.
    """
    shape, values = _directions(student).weights.shape[:2], []
    for candidate in candidates:
        values.append(measure(student.distilled(np.full(shape, float(candidate)))))
        interrupts.check()
    ranked = [(-value if highest else value, k) for k, value in enumerate(values) if math.isfinite(value)]
    if not ranked:
        raise ValueError(
            f"No candidate of {tuple(candidates)} gives finite images; {metric} was {values}. Try smaller ones."
        )
    return Search(metric, np.array(candidates, np.float64), np.array(values), float(candidates[min(ranked)[1]]))


def distance_from(
    teacher: Teacher,
    denoise: Denoise,
    start: Data,
    cond: Cond | None = None,
    teacher_denoise: Denoise | None = None,
) -> Callable[[Table], float]:
    """The root mean square distance of a table's result from the teacher's, from the same noise; as in `fit`."""
    target = integrate(teacher_denoise or denoise, teacher.table, start, cond)

    def measure(table: Table) -> float:
        return float(jnp.sqrt(jnp.mean((integrate(denoise, table, start, cond) - target) ** 2)))

    return measure


def least_squares(columns: Sequence[Data], target: Data) -> Array:
    """The x [D] that minimises ‖target - sum_j x_j·column_j‖; columns that depend on those before get 0.

    By Gram-Schmidt orthogonalisation, done twice, whose sums run over devices as they are; squaring the problem
    instead (normal equations) would lose half of the digits.
    """
    xp = namespace(target)
    least = 30 * xp.finfo(target.dtype).eps
    dot = lambda a, b: xp.sum(a * b)  # noqa: E731  (not a matrix product, which accelerators round)
    basis, factors, projections = [], [], []
    for column in columns:
        rest, along = column, [xp.zeros((), target.dtype)] * len(basis)
        for _ in range(2):
            for i, q in enumerate(basis):
                step = dot(q, rest)
                rest, along[i] = rest - step * q, along[i] + step
        norm, whole = xp.sqrt(dot(rest, rest)), xp.sqrt(dot(column, column))
        kept = norm > least * whole
        scale = xp.where(kept, norm, xp.ones_like(norm))
        basis.append(xp.where(kept, rest / scale, xp.zeros_like(rest)))
        factors.append([*along, scale])
    for q in basis:
        step = dot(q, target)
        target = target - step * q
        projections.append(step)
    solution = [xp.zeros((), target.dtype)] * len(columns)
    for j in reversed(range(len(columns))):
        above = sum((factors[i][j] * solution[i] for i in range(j + 1, len(columns))), start=0.0)
        solution[j] = (projections[j] - above) / factors[j][j]
    return xp.stack(solution)


def _fit_row(
    denoise: Denoise, cond: Cond | None, largest: float, row: Table, registers: Registers, target: Data
) -> tuple:
    """One row of the student: (registers after it, lambdas [D], distance before, distance after, lambdas asked for)."""
    (plain, *memories), y, x_hat = advance(denoise, cond, row, registers)
    xp, operands = namespace(plain), (y, *registers[1:], x_hat)
    columns = [combine(weights, operands) for weights in _directions(row).weights]
    asked = least_squares(columns, target - plain)
    lambdas = xp.where(xp.all(xp.abs(asked) <= largest), asked, xp.zeros_like(asked))
    moved = plain + combine(lambdas, columns)
    distances = (xp.sqrt(xp.mean((target - state) ** 2)) for state in (plain, moved))
    return (moved, *memories), lambdas, *distances, asked


_jitted_row = jax.jit(_fit_row)


def _directions(table: Table) -> Any:
    if table.directions is None or not table.directions.weights.shape[1]:
        raise ValueError("This solver has no directions in which lambdas act, so there is nothing to fit.")
    return table.directions


def _path(table: Table) -> tuple[Level, Level]:
    directions = table.directions
    if directions is None or not table.deterministic:
        raise ValueError("Fitting needs solvers that draw no noise and know the levels they reach, such as DDIM.")
    return directions.start, directions.reached


def _last(ratios: np.ndarray, value: float) -> int:
    """The last row that ends at a level."""
    rows = np.flatnonzero(np.isclose(ratios, value, rtol=1e-9, atol=0))
    if not len(rows):
        raise ValueError(f"The teacher's solver does not pass through the level sigma/alpha = {value:.6g} of its grid.")
    return int(rows[-1])


def _check(student: Table, teacher: Teacher) -> None:
    _directions(student)
    states = teacher.table.nfe
    if len(teacher.targets) != student.nfe or not all(0 <= k <= states for k in teacher.targets):
        raise ValueError(
            f"Each of the student's {student.nfe} rows needs one state, 0 to {states}, of the teacher; "
            f"got {list(teacher.targets)}."
        )
