"""D-ODE solvers: the lambdas of a solver's directions, fitted to a teacher in one pass, arXiv:2309.16421.

Row by row the student walks with the lambdas already found, and those of the row are the least squares of its distance
from the teacher's state (least_squares.py). Which state that is, is a matter of pairing.py. One lambda shared by all
rows is searched instead (search.py).

Where directions vanish or are nearly parallel, lambdas can be of any size and mean nothing for other images. So a fit
may be given a bound: a row that asks for a larger lambda keeps 0. Outputs in float32 have errors of 1e-7, which a
lambda of 1000 makes 1e-4.

The whole costs (scale + 1)·NFE evaluations of one batch. Conditional and guided models are fitted as they are sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.typing import Cond, Data
from diffusion_distill.denoisers.denoise import Denoise, as_denoise
from diffusion_distill.solvers.engine import integrate, run_host
from diffusion_distill.solvers.least_squares import Fit, fit_row
from diffusion_distill.solvers.pairing import Teacher, check
from diffusion_distill.solvers.rows import Registers, begin, look, walk
from diffusion_distill.solvers.table import Table


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
    check(student, teacher)
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
    check(student, teacher)
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


def _fit_row(
    denoise: Denoise, cond: Cond | None, largest: float, row: Table, registers: Registers, target: Data
) -> tuple:
    """`fit_row` with its call of the network."""
    y, x_hat = look(denoise, cond, row, registers)
    return fit_row(row, (y, *registers[1:]), x_hat, target, largest)


_jitted_row = jax.jit(_fit_row)
