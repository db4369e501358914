"""One lambda for all rows of a D-ODE solver, the best of some candidates: the paper's 'Fixed' and 'LA'.

The paper chooses by FID; here any measure of the samples serves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_distill.base import interrupts
from diffusion_distill.base.arrays import Array
from diffusion_distill.solvers.pairing import directions
from diffusion_distill.solvers.table import Table


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
    shape, values = directions(student).weights.shape[:2], []
    for candidate in candidates:
        values.append(measure(student.distilled(np.full(shape, float(candidate)))))
        interrupts.check()
    ranked = [(-value if highest else value, k) for k, value in enumerate(values) if math.isfinite(value)]
    if not ranked:
        raise ValueError(
            f"No candidate of {tuple(candidates)} gives finite images; {metric} was {values}. Try smaller ones."
        )
    return Search(metric, np.array(candidates, np.float64), np.array(values), float(candidates[min(ranked)[1]]))
