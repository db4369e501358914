"""What a D-ODE solver is fitted to: the student's rows paired with states of a teacher (arXiv:2309.16421).

The teacher starts from the same noise and takes `scale` steps for each row of the student. Its state for a row is the
one at the level the row reaches: teachers' grids are nested (`nested`). The published programs pair states of other
levels in places (`published`); the fitted lambdas then also make up for a shift in time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_distill.base.errors import positive_int
from diffusion_distill.process.grids import refine
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.solvers.registry import DEFAULT_SOLVER, spelled
from diffusion_distill.solvers.table import Directions, Table

#: Solvers whose teacher is the same solver: the paper's, and UniPC, which a DDIM teacher would hold back; else DDIM.
THEIR_OWN_TEACHERS = ("ipndm", "deis", "unipc")


class Teacher(NamedTuple):
    """The teacher's solver, and the states that a student is fitted to.

    Attributes:
      table: the teacher's solver on its grid.
      targets: the number of its state that each row of the student is to reach, [rows]; nfe is its result.
    """

    table: Table
    targets: Sequence[int]


def teacher_of(solver: str) -> str:
    """The teacher's solver of a solver, perhaps with options, where nobody says otherwise."""
    return solver if spelled(solver)[0] in THEIR_OWN_TEACHERS else DEFAULT_SOLVER


def teacher_steps(nfe: int, scale: int, most: int | None) -> int:
    """The steps of the teacher of a student with `nfe` evaluations: scale·nfe.

    Args:
      most: the number of times that a model of discrete times knows, as many steps its teacher takes at most; None for
        a model of continuous times.
    """
    return scale * nfe if most is None else min(scale * nfe, max(most, nfe))


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
    start, reached = path(student)
    ratio = reached.sigma / reached.alpha
    passed = sorted(set(ratio), reverse=True)  # some rows try a level another row reaches: they share its state
    first = [int(np.flatnonzero(ratio == value)[0]) for value in passed]
    coarse = Level(*(np.append(a, b[first]) for a, b in zip(start, reached, strict=True)))
    parts = [positive_int("The scale", scale) * int((ratio == value).sum()) for value in passed]
    fine = refine(process, coarse, parts)
    table = make(fine)
    ends = path(table)[1]
    states = 1 + np.array([_last(ends.sigma / ends.alpha, value) for value in passed])
    return Teacher(table, [int(states[passed.index(value)]) for value in ratio])


def published(student: Table, teacher: Table) -> Teacher:
    """The published pairing: row k of the student is to reach the teacher's state (k + 1)·n, n whole steps apart.

    The last row is to reach the teacher's result. Whether levels agree depends on the two grids.
    """
    apart = teacher.nfe // student.nfe
    return Teacher(teacher, [*(apart * (k + 1) for k in range(student.nfe - 1)), teacher.nfe])


def directions(table: Table) -> Directions:
    """A table's directions; raises ValueError if it has none."""
    if table.directions is None or not table.directions.weights.shape[1]:
        raise ValueError("This solver has no directions in which lambdas act, so there is nothing to fit.")
    return table.directions


def path(table: Table) -> tuple[Level, Level]:
    """The level at which y starts, and the levels it reaches after each row; raises ValueError if they are unknown."""
    known = table.directions
    if known is None or not table.deterministic:
        raise ValueError("Fitting needs solvers that draw no noise and know the levels they reach, such as DDIM.")
    return known.start, known.reached


def _last(ratios: np.ndarray, value: float) -> int:
    """The last row that ends at a level."""
    rows = np.flatnonzero(np.isclose(ratios, value, rtol=1e-9, atol=0))
    if not len(rows):
        raise ValueError(f"The teacher's solver does not pass through the level sigma/alpha = {value:.6g} of its grid.")
    return int(rows[-1])


def check(student: Table, teacher: Teacher) -> None:
    """Raises ValueError for a student without directions, or targets that are not one per row."""
    directions(student)
    states = teacher.table.nfe
    if len(teacher.targets) != student.nfe or not all(0 <= k <= states for k in teacher.targets):
        raise ValueError(
            f"Each of the student's {student.nfe} rows needs one state, 0 to {states}, of the teacher; "
            f"got {list(teacher.targets)}."
        )
