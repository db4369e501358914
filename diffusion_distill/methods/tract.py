"""TRACT, transitive closure time distillation: Berthelot et al., arXiv:2303.04248, Algorithm 1 (VP teachers).

A phase distils S steps of the teacher into S' = S/k steps of the student. The grid falls into S' groups
of k teacher steps. From any t in a group the teacher makes one step to m, and the self-teacher (a fast
average of the student itself, momentum 0.5) jumps from m to the end s of the group; the student learns
the jump t -> s at once. At the last point of a group (m = s) the target is the teacher's estimate alone.

    target = w_1·clip(x_teacher(z_t)) + w_2·clip(x_self_teacher(z_m))        (methods/targets.py)
    loss   = max(SNR, 1)·sum over pixels of (x_student(z_t) - target)²

For VE teachers (Algorithm 2) the grid is EDM's, the default of `VE`, the teacher steps by Heun's method, only the
self-teacher is clipped, and the loss is EDM's mean over pixels: `Tract.edm`. The published program has one phase; here
there may be more, in which the teacher, by then a student itself, steps by DDIM.

A schedule such as 1024, 32, 1 needs two phases whatever the reduction, where BTD needs ten. The student
evaluated and handed on is a slow average whose momentum leaves a weight of `residual` to the parameters of
one phase ago (A.7). With groups of two and self-teacher = teacher this is BTD's target at a group's first
point; with one group that ends at zero noise it is consistency distillation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from diffusion_distill.base.errors import choose
from diffusion_distill.base.lengths import parse_length
from diffusion_distill.denoisers.clipping import Clipped
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.denoisers.model import Model
from diffusion_distill.methods import targets
from diffusion_distill.methods.method import Distiller
from diffusion_distill.methods.phases import Phase, check_rate, momentum_for, updates_for, updates_per_phase
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.solvers import SOLVERS

#: What a student begins a phase with.
PHASE_STARTS = {
    "teacher": "the teacher's parameters, fresh optimizer and averages (the paper)",
    "continue": "its own parameters, optimizer and averages; only the teacher is replaced (the published code)",
}

#: Which estimates are clipped.
CLIPS = {"both": "VP teachers", "self_teacher": "EDM teachers", "none": "as in the paper's formulas"}


@dataclass(frozen=True)
class Tract(Distiller):
    """Settings of TRACT; defaults are the published ones for VP teachers, `Tract.edm` has those for EDM's.

    Attributes:
      schedule: step counts, first the teacher's; each must divide the one before it.
      length: training samples of all phases together, see `base.lengths`.
      shares: relative lengths of the phases; empty for equal ones (published).
      self_momentum: momentum of the self-teacher.
      residual: sets the momentum of the eval average from the length of a phase, see `phases.momentum_for`.
      momentum: a momentum of the eval average for all phases in place of the residual's, as in the paper's ablation
        (Table 4, Figure 5); 0 keeps the student itself. None is the residual's.
      clip: which estimates in the target are clipped to [-1, 1], one of `CLIPS`.
      teacher_solver: what the teacher steps by in the first phase, a deterministic solver of one step.
      phase_start: one of `PHASE_STARTS`.
      reset_average: with phase_start 'continue', restart the eval average's bias correction in each phase.
      others: see `Distiller`.
    """

    schedule: Sequence[int] = (1024, 32, 1)
    length: str | int = "96M"
    shares: Sequence[float] = ()
    self_momentum: float = 0.5
    residual: float = 1e-3
    momentum: float | None = None
    clip: str = "both"
    teacher_solver: str = "ddim"
    phase_start: str = "teacher"
    reset_average: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("phase_start", self.phase_start, PHASE_STARTS)
        choose("clip", self.clip, CLIPS)
        choose("solver", self.teacher_solver, SOLVERS)
        parse_length(self.length)
        check_schedule(self.schedule)
        check_shares(self.shares, self.schedule)
        check_rate("self_momentum", self.self_momentum, optional=False)
        check_rate("momentum", self.momentum)
        if self.momentum is not None and self.residual not in (0, Tract.residual):
            raise ValueError(
                f"momentum={self.momentum} and residual={self.residual} both set the momentum of the eval average. "
                "Leave one of them out, on the command line with --config.method.residual=0."
            )

    @classmethod
    def edm(cls, schedule: Sequence[int] = (40, 1), **changes: Any) -> Tract:
        """The published settings for EDM teachers; train without gradient clipping."""
        published = {"weighting": "edm", "reduction": "mean", "learning_rate": 1e-3, "clip": "self_teacher",
                     "teacher_solver": "heun", "cold_start": True}  # fmt: skip
        return cls(schedule, **{**published, **changes})

    @property
    def averages(self) -> dict[str, float]:
        """Momenta of averages kept during training besides the eval average."""
        return {"self_teacher": self.self_momentum}

    def phases(self, model: Model, batch_size: int, grid: Level | None = None) -> list[Phase]:
        """One phase per reduction of the schedule, each on every k-th level of the phase before."""
        reductions, grid = list(pairwise(self.schedule)), self.teacher_grid(model, self.schedule[0], grid)
        levels = [grid.at(slice(None, None, self.schedule[0] // steps)) for steps in self.schedule]
        solvers = [self.teacher_solver, *["ddim"] * (len(reductions) - 1)]
        ends = zip(levels[:-1], self.schedule[1:], solvers, strict=True)
        tables = targets.pad([rows(fine, end, solver, model.process) for fine, end, solver in ends])
        shares = self.shares or (1,) * len(reductions)
        updates = updates_for(parse_length(self.length), batch_size, shares)
        return [
            self.phase(
                f"tract {start}→{end}",
                levels[k],
                levels[k + 1],
                updates=updates[k],
                momentum=self._momentum(batch_size, sum(shares) / shares[k]),
                inputs=tables[k],
                restart=self.phase_start == "teacher",
                reset_average=self.reset_average,
            )
            for k, (start, end) in enumerate(reductions)
        ]

    def _momentum(self, batch_size: int, count: float) -> float:
        """The eval average's momentum in a phase that is 1/count of the run."""
        if self.momentum is not None:
            return self.momentum
        return momentum_for(self.residual, updates_per_phase(parse_length(self.length), batch_size, count))

    def estimators(self, denoisers: Mapping[str, Any], rows: targets.Rows) -> tuple[Denoise, Denoise]:
        """The teacher and the self-teacher, clipped if asked for."""
        first, second = denoisers["teacher"], denoisers["self_teacher"]
        return Clipped(first) if self.clip == "both" else first, Clipped(second) if self.clip != "none" else second


def rows(grid: Level, end: int, solver: str = "ddim", process: Process | None = None) -> targets.Rows:
    """The steps t -> m -> s of a student of `end` steps, one for each step t -> m of the teacher's grid [steps + 1].

    s is the end of t's group of steps. The cleanest step is the first row.
    """
    steps = len(grid.sigma) - 1
    group, t = steps // end, np.arange(steps - 1, -1, -1)
    return targets.make_rows(grid, t, t + 1, (t // group + 1) * group, solver=solver, process=process)


def check_shares(shares: Sequence[float], schedule: Sequence[int]) -> None:
    """Raises ValueError unless there is one share for each phase of the schedule, or none."""
    phases = len(schedule) - 1
    if shares and len(shares) != phases:
        raise ValueError(
            f"The schedule {tuple(schedule)} has {phases} phase{'s' * (phases > 1)}, but shares={tuple(shares)} are "
            f"for {len(shares)}. Give one share per phase, such as shares={(1,) * phases}, or none for phases of equal "
            "length: shares=(), on the command line --config.method.shares='()'."
        )


def check_schedule(schedule: Sequence[int]) -> None:
    """Raises ValueError unless the step counts are positive, fall, and each divides the one before."""
    if len(schedule) < 2 or any(int(n) != n or n < 1 for n in schedule):
        raise ValueError(f"A TRACT schedule is at least two positive step counts such as 1024, 32, 1; got {schedule}.")
    for start, end in pairwise(schedule):
        if start % end or start == end:
            raise ValueError(
                f"In the TRACT schedule {tuple(schedule)} the step {start}→{end} does not divide: {end} must be a "
                f"proper divisor of {start}."
            )
