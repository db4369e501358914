"""Phases as values: what a training run does, computed once from its settings, printed, then followed.

A run is a sequence of phases; each trains a student of `student_steps` against a teacher of
`teacher_steps` for a number of updates. What the next phase inherits is written in the phase itself.
Lengths are given in training samples, see `base.lengths`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from numbers import Real
from typing import Any

from diffusion_distill.base.errors import choose, finite_number, truth
from diffusion_distill.process.levels import Level

#: How the eval average may be taken, see `training.ema`.
AVERAGING = ("corrected", "plain", "window", "ramped")


@dataclass(frozen=True, eq=False)
class Phase:
    """One stretch of training.

    Attributes:
      name: for logs, for example 'tract 1024→32'.
      updates: number of optimizer updates.
      learning_rate: peak rate.
      teacher_steps, student_steps: sampling steps of the teacher and the student; 0 where there is none.
      warmup: updates over which the rate rises linearly from 0.
      cold_start: whether the first update has rate 0, as in EDM's programs, or already a part of the rise.
      anneal: whether the rate then falls linearly to 0 at the end of the phase.
      momentum: of the averaged student that is kept, handed on and evaluated ('eval_ema'); 0 keeps the
        student itself.
      averaging: one of `AVERAGING`, the rule of that average.
      grid: the student's levels [student_steps + 1], float64, on the host; None where there is no student.
      inputs: arrays the loss gathers its rows from (a tree of NumPy arrays); same shapes in all phases.
      restart: student, optimizer and averages start afresh from the teacher (the paper's rule), else they
        continue (the published code's).
      reset_average: when continuing, restart the bias correction of the eval average.

    Raises:
      ValueError: a rate or a warmup that is no finite number of at least 0, a momentum outside [0, 1), or a switch that
        is neither True nor False.
    """

    name: str
    updates: int
    learning_rate: float
    teacher_steps: int = 0
    student_steps: int = 0
    warmup: int = 0
    cold_start: bool = False
    anneal: bool = False
    momentum: float = 0.0
    averaging: str = "corrected"
    grid: Level | None = None
    inputs: Any = ()
    restart: bool = True
    reset_average: bool = False

    def __post_init__(self) -> None:
        for name in ("learning_rate", "warmup"):
            finite_number(name, getattr(self, name))
        for name in ("cold_start", "anneal", "restart", "reset_average"):
            truth(name, getattr(self, name))
        check_rate("momentum", self.momentum, optional=False)

    def rate(self, update: int) -> float:
        """The learning rate of the phase's update number `update`, counted from 0."""
        risen = update if self.cold_start else update + 1
        rising = min(1.0, risen / self.warmup) if self.warmup else 1.0
        return self.learning_rate * rising * (1 - update / self.updates if self.anneal else 1.0)


def check_averaging(name: str) -> None:
    """Raises ValueError for a rule that is not one of `AVERAGING`."""
    choose("averaging", name, dict.fromkeys(AVERAGING))


def check_rate(name: str, rate: float | None, *, optional: bool = True) -> None:
    """Raises ValueError for a rate (of dropout, or a momentum) that is not a number in [0, 1), or None if optional."""
    number = isinstance(rate, Real) and not isinstance(rate, bool)
    if (rate is not None or not optional) and not (number and 0 <= rate < 1):  # type: ignore[operator]
        raise ValueError(f"{name} must be a number in [0, 1), got {rate!r}.")


def momentum_for(residual: float, updates: float) -> float:
    """EMA momentum after which the weights of `updates` updates ago count for `residual` (TRACT A.7).

    Raises:
      ValueError: residual outside (0, 1) or updates not positive.
    """
    if not isinstance(residual, Real) or not 0 < residual < 1 or updates <= 0:
        raise ValueError(f"The residual must be in (0, 1) and updates positive, got {residual!r}, {updates!r}.")
    return residual ** (1 / updates)


def updates_per_phase(total_samples: int, batch_size: int, count: float) -> float:
    """The updates of a phase that is 1/count of a run, not rounded: what `momentum_for` is given (TRACT A.7)."""
    return total_samples / (batch_size * count)


def updates_for(total_samples: int, batch_size: int, shares: Sequence[float] = (1,)) -> list[int]:
    """Splits a run into phases whose lengths in updates are in proportion to `shares`, to within one update.

    Raises:
      ValueError: a share that is not a positive number, or a phase without any update.
    """
    if not all(isinstance(share, Real) and 0 < share < float("inf") for share in shares):
        raise ValueError(f"The shares of phases must be positive numbers, got {tuple(shares)}.")
    total = total_samples // batch_size
    borders = [round(total * done / sum(shares)) for done in accumulate(shares, initial=0)]
    updates = [b - a for a, b in pairwise(borders)]
    if min(updates) < 1:
        raise ValueError(
            f"{total_samples} samples in batches of {batch_size} are {total} updates, too few for {len(shares)} "
            f"phase(s) with shares {tuple(shares)}. Train longer or use a smaller batch."
        )
    return updates


def describe(phases: Sequence[Phase]) -> str:
    """The plan, one line per phase."""
    return "\n".join(
        f"phase {k + 1}/{len(phases)}: {p.name}, {p.updates} updates, learning rate {p.learning_rate:g}"
        f"{' falling to 0' if p.anneal else ''}, average momentum {p.momentum:.6g}"
        for k, p in enumerate(phases)
    )
